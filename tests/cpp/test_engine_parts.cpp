// What the engine is made of, each part alone: memory and its adaptors, arena, layouts, slots,
// residents, the order of calls, pressure, and sources.
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <numeric>
#include <random>

#include "core/engine/pressure.hpp"
#include "engine_cases.hpp"

namespace vramkit::testing {
namespace {

constexpr std::int64_t kGranule = kSmallPage;

TEST(EngineMemory, AdaptorsStack) {
  HostMemory host(kGranule);
  CountedMemory counted(host);
  LimitedMemory limited(counted, 3 * kGranule);
  bool fails = false;
  FaultyMemory faulty(limited, [&](std::int64_t) { return fails; });
  Memory& memory = faulty;
  std::byte* start = memory.reserve(8 * kGranule);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(start) % kGranule, 0U);
  memory.commit(start, 2 * kGranule);
  start[2 * kGranule - 1] = std::byte{1};
  EXPECT_EQ(message_of<BudgetError>([&] { memory.commit(start + 4 * kGranule, 2 * kGranule); }),
            "the limit of 12288 bytes has no room for 8192 more than the 8192 in use");
  fails = true;
  EXPECT_THROW(memory.commit(start + 4 * kGranule, kGranule), OutOfMemoryError);
  EXPECT_THROW(memory.reserve(kGranule), OutOfMemoryError);
  fails = false;
  memory.commit(start + 4 * kGranule, kGranule);
  EXPECT_EQ(limited.committed(), 3 * kGranule);
  memory.decommit(start, 2 * kGranule);
  memory.commit(start, kGranule);
  EXPECT_EQ(start[kGranule - 1], std::byte{0});  // it went to the system and is fresh
  limited.set_limit(kGranule);
  EXPECT_THROW(memory.commit(start + kGranule, kGranule), BudgetError);
  const MemoryCounts counts = counted.counts();
  EXPECT_EQ(counts.committed, 2 * kGranule);
  EXPECT_EQ(counts.peak_committed, 3 * kGranule);
  EXPECT_EQ(counts.reserved, 8 * kGranule);
  EXPECT_EQ(counts.commits, 3);
  EXPECT_EQ(counts.decommits, 1);
  memory.unreserve(start, 8 * kGranule);
  EXPECT_EQ(counted.counts().reserved, 0);
  EXPECT_THROW(host.reserve(std::int64_t{1} << 60), OutOfMemoryError);
  EXPECT_THROW(HostMemory(1000), InvalidArgument);
  EXPECT_THROW(HostMemory(6000), InvalidArgument);
  EXPECT_THROW(LimitedMemory(host, -1), InvalidArgument);
}

TEST(EngineMemory, AllocationsGoBack) {
  HostMemory host(kGranule);
  CountedMemory counted(host);
  {
    Allocation a(counted, 5000);
    EXPECT_EQ(a.bytes(), 2 * kGranule);
    Allocation b = std::move(a);
    EXPECT_FALSE(a);  // NOLINT(bugprone-use-after-move): that is the question
    a = Allocation(counted, 1);
    b = std::move(a);
    EXPECT_EQ(counted.counts().committed, kGranule);
  }
  EXPECT_EQ(counted.counts().reserved, 0);
  FaultyMemory faulty(counted, [](std::int64_t call) { return call == 1; });
  EXPECT_THROW(Allocation(faulty, 1), OutOfMemoryError);
  EXPECT_EQ(counted.counts().reserved, 0);
}

TEST(EngineArena, GranulesAreSharedAndCounted) {
  HostMemory host(kGranule);
  CountedMemory counted(host);
  int calls_left = -1;
  FaultyMemory faulty(counted, [&](std::int64_t) { return calls_left-- == 0; });
  Arena arena(faulty, 10 * kGranule - 1);
  EXPECT_EQ(arena.reserved(), 10 * kGranule);
  std::mt19937 random(5);
  struct Range {
    std::int64_t offset, bytes;
  };
  std::vector<Range> ranges;
  const auto truth = [&] {
    std::int64_t sum = 0;
    for (std::int64_t granule = 0; granule < 10; ++granule) {
      sum += std::any_of(ranges.begin(), ranges.end(), [&](const Range& r) {
        return r.bytes > 0 && r.offset < (granule + 1) * kGranule &&
               r.offset + r.bytes > granule * kGranule;
      });
    }
    return sum * kGranule;
  };
  for (int step = 0; step < 2000; ++step) {
    if (!ranges.empty() && random() % 2 == 0) {
      const auto index = random() % ranges.size();
      const Range r = ranges[index];
      const std::int64_t gain = arena.gain(r.offset, r.bytes);
      ranges.erase(ranges.begin() + static_cast<std::ptrdiff_t>(index));
      const std::int64_t before = arena.committed();
      arena.decommit(r.offset, r.bytes);
      EXPECT_EQ(before - arena.committed(), gain);
    } else {
      const auto offset = static_cast<std::int64_t>(random() % arena.reserved());
      const auto bytes = static_cast<std::int64_t>(random() % (arena.reserved() - offset + 1));
      const std::int64_t cost = arena.cost(offset, bytes), before = arena.committed();
      if (random() % 4 == 0) calls_left = static_cast<int>(random() % 3);
      try {
        arena.commit(offset, bytes);
        ranges.push_back({offset, bytes});
        EXPECT_EQ(arena.committed() - before, cost);
        if (bytes > 0) arena.base()[offset + bytes - 1] = std::byte{1};
      } catch (const OutOfMemoryError&) {
        EXPECT_EQ(arena.committed(), before);
      }
      calls_left = -1;
    }
    ASSERT_EQ(arena.committed(), truth());
    ASSERT_EQ(counted.counts().committed, truth());
  }
}

TEST(EngineLayout, RangesKeepTheirPlaceInTheirUnits) {
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    std::vector<SourceRange> ranges;
    std::int64_t at[2] = {0, 0};
    for (int i = 0; i < 12; ++i) {
      const auto source = static_cast<std::int64_t>(random() % 2);
      std::int64_t& end = at[source];
      if (random() % 3 == 0) end += static_cast<std::int64_t>(random() % 20'000);
      const auto bytes = static_cast<std::int64_t>(random() % 9'000);
      const std::int64_t alignment = std::int64_t{1} << random() % 4;
      ranges.push_back({source, end, bytes, alignment});
      end += bytes;
    }
    std::shuffle(ranges.begin(), ranges.end(), random);
    for (const bool packed : {false, true}) {
      const BlockLayout block = packed ? layout_packed(ranges) : layout_in_place(ranges);
      EXPECT_EQ(block.bytes % kDirectUnit, 0);
      std::int64_t end = 0, units = 0;
      for (const Extent& e : block.extents) {
        EXPECT_GE(e.block_offset, end);
        if (block.direct && !packed) {  // whole units may be written around it
          EXPECT_EQ((e.block_offset - e.source_offset) % kDirectUnit, 0);
          EXPECT_GE(e.block_offset / kDirectUnit * kDirectUnit, units);
          units = round_up_to(e.block_offset + e.bytes, kDirectUnit);
        }
        end = e.block_offset + e.bytes;
      }
      EXPECT_LE(end, block.bytes);
      std::int64_t useful = 0;
      for (std::size_t i = 0; i < ranges.size(); ++i) {
        const SourceRange& range = ranges[i];
        useful += range.bytes;
        EXPECT_EQ(block.places[i] % range.alignment, 0);
        if (range.bytes == 0) continue;
        EXPECT_TRUE(std::any_of(block.extents.begin(), block.extents.end(), [&](const Extent& e) {
          return e.source == range.source && e.source_offset <= range.offset &&
                 range.offset + range.bytes <= e.source_offset + e.bytes &&
                 e.block_offset - e.source_offset == block.places[i] - range.offset;
        })) << i;
      }
      EXPECT_EQ(block.padding, block.bytes - useful);
    }
  }
  // Neighbours are one extent; what lies askew is packed by itself.
  const std::vector<SourceRange> near{{0, 100, 50, 2}, {0, 152, 10, 4}, {0, 201, 8, 4}};
  const BlockLayout block = layout_in_place(near);
  ASSERT_EQ(block.extents.size(), 2U);
  EXPECT_EQ(block.places, (std::vector<std::int64_t>{100, 152, 4096}));
  EXPECT_FALSE(block.direct);
  EXPECT_EQ(layout_in_place({}).bytes, 0);
  EXPECT_THROW(layout_in_place(std::vector<SourceRange>{{0, 0, 8, 3}}), InvalidArgument);
  EXPECT_THROW(layout_packed(std::vector<SourceRange>{{0, -1, 8, 1}}), InvalidArgument);
}

TEST(EngineLayout, SlotsByColouring) {
  const auto colour = [](std::vector<std::int64_t> order, std::vector<std::int64_t> bytes,
                         std::int64_t depth, std::int64_t most) {
    return colour_slots(order, bytes, std::vector<bool>(bytes.size(), true), depth, most);
  };
  const std::vector<std::int64_t> even{0, 1, 2, 3, 4, 5}, odd{0, 1, 2, 3, 4};
  EXPECT_EQ(colour(even, std::vector<std::int64_t>(6, 10), 1, 3).capacity.size(), 2U);
  EXPECT_EQ(colour(odd, std::vector<std::int64_t>(5, 10), 1, 3).capacity.size(), 3U);
  EXPECT_EQ(colour(odd, std::vector<std::int64_t>(5, 10), 1, 3).conflicts, 0);
  EXPECT_EQ(colour(odd, std::vector<std::int64_t>(5, 10), 1, 2).conflicts, 1);
  EXPECT_EQ(colour(even, std::vector<std::int64_t>(6, 10), 2, 3).capacity.size(), 3U);
  // Each slot is as large as its largest block: large ones share.
  const SlotPlan plan = colour(even, {9'000, 100, 9'000, 100, 9'000, 100}, 1, 3);
  EXPECT_EQ(plan.capacity, (std::vector<std::int64_t>{3 * kDirectUnit, kDirectUnit}));
  // Random orders with repeats: proper wherever no conflict is reported.
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    const std::size_t count = 2 + random() % 12;
    std::vector<std::int64_t> order, bytes;
    std::vector<bool> needs;
    for (std::size_t block = 0; block < count; ++block) {
      bytes.push_back(1 + static_cast<std::int64_t>(random() % 20'000));
      needs.push_back(random() % 5 != 0);
    }
    for (std::size_t call = 0; call < 2 * count; ++call) {
      order.push_back(static_cast<std::int64_t>(random() % count));
    }
    const SlotPlan some = colour_slots(order, bytes, needs, 1, 4);
    std::vector<std::int64_t> path;
    for (std::int64_t block : order) {
      if (needs[static_cast<std::size_t>(block)]) path.push_back(block);
    }
    std::int64_t clashes = 0;
    for (std::size_t at = 0; at < path.size(); ++at) {
      const std::int64_t a = path[at], b = path[(at + 1) % path.size()];
      clashes += a != b && some.slot_of[static_cast<std::size_t>(a)] ==
                               some.slot_of[static_cast<std::size_t>(b)];
    }
    EXPECT_EQ(clashes > 0, some.conflicts > 0);
    for (std::size_t block = 0; block < count; ++block) {
      EXPECT_EQ(some.slot_of[block] >= 0, needs[block]);
      if (needs[block]) {
        EXPECT_GE(some.capacity[static_cast<std::size_t>(some.slot_of[block])], bytes[block]);
      }
    }
  }
  EXPECT_THROW(colour({0, 7}, {1}, 1, 2), InvalidArgument);
  EXPECT_THROW(colour({0}, {1}, 0, 2), InvalidArgument);
}

TEST(EngineLayout, ResidentsAreSpread) {
  std::mt19937 random(4);
  for (int round = 0; round < 500; ++round) {
    const std::size_t count = 1 + random() % 40;
    const bool equal = round % 2 == 0;
    std::vector<std::int64_t> bytes;
    for (std::size_t i = 0; i < count; ++i) bytes.push_back(equal ? 100 : 1 + random() % 200);
    const std::int64_t total = std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0});
    const auto budget = static_cast<std::int64_t>(random() % static_cast<unsigned>(total + 50));
    const std::vector<bool> stays = spread_residents(bytes, budget);
    std::int64_t used = 0, smallest_left = INT64_MAX;
    std::size_t longest = 0, run = 0;
    for (std::size_t i = 0; i < count; ++i) {
      if (stays[i]) {
        used += bytes[i];
        run = 0;
      } else {
        smallest_left = std::min(smallest_left, bytes[i]);
        longest = std::max(longest, ++run);
      }
    }
    EXPECT_LE(used, budget);
    if (used < total) {
      EXPECT_GT(smallest_left, budget - used);  // nothing more fits
    }
    if (equal && budget >= 100) {
      const std::size_t residents = static_cast<std::size_t>(std::min(budget, total) / 100);
      // The best, and one more for what the budget has beyond whole blocks.
      EXPECT_LE(longest, (count - residents) / residents + 2) << count << ' ' << residents;
    }
  }
}

std::int64_t misses(Predictor& predictor, const std::vector<std::int64_t>& calls) {
  std::int64_t missed = 0;
  for (std::int64_t call : calls) {
    missed += predictor.next() != call ? 1 : 0;
    predictor.observe(call);
  }
  return missed;
}

TEST(EnginePredictor, ContextTellsRepeatedBlocksApart) {
  const std::vector<std::int64_t> order{0, 1, 2, 1, 3, 2, 0, 4};
  Predictor told(5, order);
  EXPECT_EQ(told.next(), -1);                 // before the first call
  EXPECT_EQ(misses(told, order), 1 + 0 + 1);  // the first, and 1 after 2 needs what came before
  EXPECT_EQ(misses(told, order), 0);
  Predictor untold(5, {});
  EXPECT_GT(misses(untold, order), 5);
  misses(untold, order);
  EXPECT_EQ(misses(untold, order), 0);
  // Several steps ahead, without having seen them.
  std::vector<std::int64_t> ahead;
  for (std::size_t step = 0; step < 16; ++step) {
    ahead.push_back(told.next(ahead));
    EXPECT_EQ(ahead.back(), order[step % order.size()]);
  }
  EXPECT_THROW(Predictor(2, std::vector<std::int64_t>{2}), InvalidArgument);
}

TEST(EnginePredictor, LearnsAnotherOrderWithinAPass) {
  Predictor predictor(6, std::vector<std::int64_t>{0, 1, 2, 3, 4, 5});
  misses(predictor, {0, 1, 2, 3, 4, 5});
  EXPECT_GT(misses(predictor, {5, 4, 3, 2, 1, 0}), 3);
  EXPECT_LE(misses(predictor, {5, 4, 3, 2, 1, 0}), 1);
  EXPECT_EQ(misses(predictor, {5, 4, 3, 2, 1, 0}), 0);
}

TEST(EnginePressure, GivesUpAtOnceAndTakesBackWithPatience) {
  PressureGauge gauge({100, 300, 3});
  EXPECT_EQ(gauge.observe(250), 0);
  EXPECT_EQ(gauge.observe(99), -101);  // to the middle of the band
  EXPECT_EQ(gauge.observe(0), -200);
  EXPECT_EQ(gauge.observe(500), 0);
  EXPECT_EQ(gauge.observe(400), 0);
  EXPECT_EQ(gauge.observe(300), 0);  // not above: begins again
  EXPECT_EQ(gauge.observe(500), 0);
  EXPECT_EQ(gauge.observe(400), 0);
  EXPECT_EQ(gauge.observe(600), 100);  // what was there all the time
  EXPECT_EQ(gauge.observe(600), 0);
}

class EngineSources : public EngineTest {};

TEST_F(EngineSources, PathsByWhereTheBytesAre) {
  const std::string data = pattern(10 * kSmallPage + 123, 5);
  const FileSource file(put(data, "data"), DirectReads::automatic, disk_);
  EXPECT_EQ(file.bytes(), static_cast<std::int64_t>(data.size()));
  EXPECT_EQ(file.path_for(0, 100), ReadPath::direct);
  disk_->in_cache = true;
  EXPECT_EQ(file.path_for(0, 100), ReadPath::cached);
  disk_->in_cache = false;
  HostMemory host(kSmallPage);
  const Allocation buffer(host, 16 * kSmallPage);
  // The units around the range may be written, nothing beyond them.
  std::memset(buffer.data(), 0x55, 16 * kSmallPage);
  std::byte* dst = buffer.data() + 2 * kSmallPage + 17;
  const std::int64_t offset = 3 * kSmallPage + 17;
  EXPECT_EQ(file.read(ReadPath::direct, dst, offset, 5'000), ReadPath::direct);
  EXPECT_EQ(std::memcmp(dst, data.data() + offset, 5'000), 0);
  EXPECT_EQ(buffer.data()[2 * kSmallPage - 1], std::byte{0x55});
  EXPECT_EQ(buffer.data()[4 * kSmallPage], std::byte{0x55});
  // The last unit of a file is not whole.
  const std::int64_t last = 10 * kSmallPage + 5;
  EXPECT_EQ(file.read(ReadPath::direct, buffer.data() + 5, last, 118), ReadPath::direct);
  EXPECT_EQ(std::memcmp(buffer.data() + 5, data.data() + last, 118), 0);
  // Refused direct reads are not tried again.
  disk_->instead = [](std::int64_t call, std::int64_t) {
    return call == 2 ? static_cast<std::int64_t>(-EINVAL) : TestDisk::kDoIt;
  };
  EXPECT_EQ(file.read(ReadPath::direct, buffer.data(), 0, 9'000), ReadPath::plain);
  EXPECT_EQ(std::memcmp(buffer.data(), data.data(), 9'000), 0);
  EXPECT_FALSE(file.direct());
  EXPECT_EQ(file.path_for(0, 100), ReadPath::plain);
  EXPECT_THROW(FileSource(path("nothing")), SystemError);
  EXPECT_EQ(std::string(to_string(ReadPath::direct)), "direct");
}

TEST_F(EngineSources, TheSystemsOwnCalls) {
  const std::string data = pattern(64 * kSmallPage, 6);
  const std::string name = put(data, "data");
  const FileSource file(name);
  std::string out(data.size(), '\0');
  auto* dst = reinterpret_cast<std::byte*>(out.data());
  EXPECT_EQ(file.read(ReadPath::plain, dst, 0, file.bytes()), ReadPath::plain);
  EXPECT_EQ(out, data);
  const DiskCalls calls;
  const Descriptor open = open_regular_file(name);
  const std::int64_t cached = calls.cached(open, 0, file.bytes());
  EXPECT_TRUE(cached == -1 || cached == file.bytes()) << cached;
  EXPECT_EQ(calls.cached(open, 5, 0), 0);
  if (cached >= 0) {
    EXPECT_EQ(calls.cached(open, 100, 5000), 5000);
  }
  const FileSource off(name, DirectReads::off);
  EXPECT_FALSE(off.direct());
}

}  // namespace
}  // namespace vramkit::testing
