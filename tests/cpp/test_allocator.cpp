// The caching allocator's invariants after every single step, its rules at their thresholds, and
// the replay's accounts and errors. Agreement with an independent oracle is tested from Python.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "core/allocator_simulator.hpp"
#include "core/error.hpp"

namespace vramkit {
namespace {

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

using Events = std::vector<AllocatorEvent>;

ReplayResult run(const Events& events, const AllocatorConfig& config = {}) {
  return replay(events, config);
}

AllocatorConfig limited(std::int64_t bytes) {
  AllocatorConfig config;
  config.limit = bytes;
  return config;
}

// The invariants of caching_allocator.hpp, from what it says of itself.
void expect_sound(CachingAllocator& allocator, const std::map<std::int64_t, std::int64_t>& live) {
  std::int64_t reserved = 0, allocated = 0, awaiting = 0, requested = 0;
  std::size_t found = 0;
  std::int64_t serial = -1, end = 0;
  for (const SegmentInfo& segment : allocator.segments()) {
    // By address; runs of one expandable segment are apart.
    ASSERT_TRUE(segment.serial > serial || (segment.serial == serial && segment.offset > end));
    if (!segment.expandable) {
      ASSERT_NE(segment.serial, serial);
    }
    serial = segment.serial;
    std::int64_t place = segment.offset;
    BlockState before = BlockState::live;
    for (const BlockInfo& block : segment.blocks) {
      ASSERT_EQ(block.offset, place);
      ASSERT_GT(block.bytes, 0);
      ASSERT_EQ(block.bytes % kAllocatorGranule, 0);
      ASSERT_FALSE(before == BlockState::free && block.state == BlockState::free);
      before = block.state;
      place += block.bytes;
      if (block.state == BlockState::live) {
        allocated += block.bytes;
        requested += block.requested;
        ASSERT_EQ(live.at(block.owner), block.requested);
        ASSERT_GE(block.bytes, block.requested);
        found += 1;
      }
      if (block.state == BlockState::awaiting) awaiting += block.bytes;
    }
    ASSERT_EQ(place, segment.offset + segment.bytes);
    end = place;
    reserved += segment.bytes;
  }
  ASSERT_EQ(found, live.size());
  const AllocatorCounters& counters = allocator.counters();
  ASSERT_EQ(reserved, counters.reserved);
  ASSERT_EQ(allocated, counters.allocated);
  ASSERT_EQ(awaiting, counters.awaiting);
  ASSERT_EQ(requested, counters.requested);
  ASSERT_GE(counters.reserved_high, counters.reserved);
}

TEST(CachingAllocator, InvariantsHoldAfterEveryStep) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    std::mt19937_64 random(seed);
    AllocatorConfig config;
    config.expandable_segments = seed % 3 == 1;
    if (seed % 2 == 1) config.limit = 300 * kMiB;
    if (seed % 4 >= 2) config.garbage_collection_threshold = 0.3;
    if (seed % 5 == 4) config.max_split_size = 24 * kMiB;
    if (seed % 7 == 3) config.roundup_power2_divisions.fill(4);
    check(config);
    CachingAllocator allocator(config);
    struct Live {
      CachingAllocator::BlockIndex block;
      std::int64_t owner;
    };
    std::vector<Live> live;
    std::vector<std::int64_t> released;
    std::map<std::int64_t, std::int64_t> asked;
    for (std::int64_t step = 0; step < 300; ++step) {
      const auto dice = random() % 100;
      if (dice < 45 && !live.empty()) {
        const std::size_t i = random() % live.size();
        allocator.release(live[i].block);
        released.push_back(live[i].owner);
        asked.erase(live[i].owner);
        live[i] = live.back();
        live.pop_back();
      } else if (dice < 52 && !live.empty()) {
        allocator.note_use(live[random() % live.size()].block,
                           static_cast<std::int64_t>(random() % 3));
      } else if (dice < 56 && !released.empty()) {
        allocator.complete(released[random() % released.size()]);
      } else if (dice < 58) {
        allocator.empty_cache();
      } else {
        const std::int64_t bytes =
            1 + static_cast<std::int64_t>(random() % (std::uint64_t{1} << (10 + random() % 16)));
        const auto block = allocator.allocate(bytes, static_cast<std::int64_t>(random() % 3), step);
        if (block) {
          live.push_back({*block, step});
          asked[step] = bytes;
        }
      }
      expect_sound(allocator, asked);
      if (HasFatalFailure()) {
        FAIL() << "seed " << seed << ", step " << step;
      }
    }
    for (const Live& left : live) allocator.release(left.block);
    allocator.empty_cache();
    EXPECT_EQ(allocator.counters().reserved, 0);
    EXPECT_EQ(allocator.counters().awaiting, 0);
    EXPECT_TRUE(allocator.segments().empty());
  }
}

struct Sizes {
  std::int64_t asked, allocated, reserved;
};

TEST(CachingAllocator, SizesAndSegmentsAtTheThresholds) {
  for (const auto& [asked, allocated, reserved] : std::vector<Sizes>{
           {1, 512, 2 * kMiB},
           {512, 512, 2 * kMiB},
           {513, 1024, 2 * kMiB},
           {kMiB, kMiB, 2 * kMiB},
           {kMiB + 1, kMiB + 512, 20 * kMiB},
           {10 * kMiB - 512, 10 * kMiB - 512, 20 * kMiB},
           {10 * kMiB - 511, 10 * kMiB, 10 * kMiB},
           {10 * kMiB, 10 * kMiB, 10 * kMiB},
           {11 * kMiB - 512, 11 * kMiB - 512, 12 * kMiB},
           {11 * kMiB, 12 * kMiB, 12 * kMiB},
       }) {
    CachingAllocator allocator({});
    const auto block = allocator.allocate(asked, 0, 0);
    ASSERT_TRUE(block);
    EXPECT_EQ(allocator.bytes(*block), allocated) << asked;
    EXPECT_EQ(allocator.counters().reserved, reserved) << asked;
    EXPECT_EQ(allocator.device_bytes(asked), reserved) << asked;
  }
}

TEST(CachingAllocator, ReleasedNeighboursMergeInAnyOrder) {
  std::vector<std::size_t> order{0, 1, 2, 3};
  do {
    CachingAllocator allocator({});
    std::vector<CachingAllocator::BlockIndex> blocks;
    for (std::int64_t i = 0; i < 4; ++i) blocks.push_back(*allocator.allocate(4 * kMiB, 0, i));
    for (const std::size_t i : order) allocator.release(blocks[i]);
    const auto segments = allocator.segments();
    ASSERT_EQ(segments.size(), 1U);
    ASSERT_EQ(segments[0].blocks.size(), 1U);
    EXPECT_EQ(segments[0].blocks[0].bytes, 20 * kMiB);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(CachingAllocator, ExpandableSegmentsFillGapsBeforeTheyGrow) {
  AllocatorConfig config;
  config.expandable_segments = true;
  CachingAllocator allocator(config);
  const auto first = *allocator.allocate(40 * kMiB, 0, 0);
  ASSERT_TRUE(allocator.allocate(20 * kMiB, 0, 1));
  allocator.release(first);
  allocator.empty_cache();
  EXPECT_EQ(allocator.counters().reserved, 20 * kMiB);
  ASSERT_TRUE(allocator.allocate(30 * kMiB, 0, 2));
  const auto segments = allocator.segments();
  ASSERT_EQ(segments.size(), 1U);  // one run again, from the segment's first byte
  EXPECT_EQ(segments[0].offset, 0);
  EXPECT_EQ(segments[0].bytes, 60 * kMiB);
  EXPECT_EQ(segments[0].blocks[0].bytes, 30 * kMiB);
  EXPECT_EQ(segments[0].blocks[1].state, BlockState::free);
}

TEST(Replay, PeaksAreTheFirstOfTheirHeightAndNameWhatWasAlive) {
  const ReplayResult result = run({{7, 5 * kMiB, 0, 70},
                                   {8, 600, 0, 80},
                                   {9, 6 * kMiB, 0, 90},
                                   {8, kEventRelease, 0, 0},
                                   {8, 600, 0, 81},
                                   {7, kEventRelease, 0, 0}});
  EXPECT_EQ(result.events, 6);
  EXPECT_EQ(result.peak_allocated, 11 * kMiB + 1024);
  EXPECT_EQ(result.peak_allocated_event, 2);
  EXPECT_EQ(result.requested_at_peak, 11 * kMiB + 600);
  EXPECT_EQ(result.reserved_at_peak, 22 * kMiB);
  EXPECT_EQ(result.peak_reserved_event, 1);
  EXPECT_EQ(result.allocated_at_peak_reserved, 5 * kMiB + 1024);
  EXPECT_DOUBLE_EQ(result.fragmentation, 1.0 - (5.0 * 1024 + 1) / (22 * 1024));
  ASSERT_EQ(result.peak_blocks.size(), 3U);
  EXPECT_EQ(result.peak_blocks[0].tag, 90);
  EXPECT_EQ(result.peak_blocks[1].tag, 70);
  EXPECT_EQ(result.peak_blocks[2].tag, 80);  // of the two allocations of block 8 the first
  EXPECT_EQ(result.peak_blocks[2].requested, 600);
  EXPECT_EQ(result.peak_blocks[2].bytes, 1024);
  EXPECT_EQ(result.end.allocated, 6 * kMiB + 1024);
}

TEST(Replay, ATraceOfNothingIsNothing) {
  for (const AllocatorKind kind : {AllocatorKind::cuda, AllocatorKind::cpu}) {
    AllocatorConfig config;
    config.kind = kind;
    const ReplayResult result = run({}, config);
    EXPECT_EQ(result.peak_allocated, 0);
    EXPECT_FALSE(result.peak_allocated_event);
    EXPECT_FALSE(result.out_of_memory);
    EXPECT_TRUE(result.timeline(5).empty());
    const ReplayResult zero = run({{1, 0, 0, 0}, {1, kEventRelease, 0, 0}}, config);
    EXPECT_EQ(zero.events, 2);
    EXPECT_EQ(zero.end.device_allocations, 0);
  }
}

TEST(Replay, StopsWhereMemoryRunsOut) {
  const Events events{{1, 30 * kMiB, 0, 0}, {2, 30 * kMiB, 0, 5}, {9, kEventRelease, 0, 0}};
  const ReplayResult result = run(events, limited(50 * kMiB));
  ASSERT_TRUE(result.out_of_memory);
  EXPECT_EQ(result.out_of_memory->event, 1);
  EXPECT_EQ(result.out_of_memory->tag, 5);
  EXPECT_EQ(result.out_of_memory->requested, 30 * kMiB);
  EXPECT_EQ(result.out_of_memory->free, 20 * kMiB);
  EXPECT_EQ(result.events, 1);
  EXPECT_EQ(result.end.retries, 1);
  EXPECT_EQ(result.timeline().size(), 2U);
}

TEST(Replay, CachedMemoryIsGivenBackBeforeMemoryRunsOut) {
  const Events events{{1, 30 * kMiB, 0, 0}, {1, kEventRelease, 0, 0}, {2, 40 * kMiB, 0, 0}};
  const ReplayResult result = run(events, limited(50 * kMiB));
  EXPECT_FALSE(result.out_of_memory);
  EXPECT_EQ(result.end.retries, 1);
  EXPECT_EQ(result.end.device_frees, 1);
  EXPECT_EQ(result.end.reserved, 40 * kMiB);
}

TEST(Replay, IdsAreAnyNumbers) {
  Events events;
  for (std::int64_t i = 0; i < 5000; ++i) {
    events.push_back({i * 0x100000001LL * (i % 2 == 0 ? 1 : -1), 512, 0, i});
  }
  for (const std::int64_t id : {kMax, std::numeric_limits<std::int64_t>::min()}) {
    events.push_back({id, 512, 0, id});
  }
  const std::size_t count = events.size();
  for (std::size_t i = 0; i < count; ++i) events.push_back({events[i].id, kEventRelease, 0, 0});
  const ReplayResult result = run(events);
  EXPECT_EQ(result.peak_allocated, static_cast<std::int64_t>(count) * 512);
  EXPECT_EQ(result.end.allocated, 0);
  EXPECT_EQ(result.peak_blocks.size(), count);
}

void expect_event_error(const Events& events, std::int64_t event, const std::string& part,
                        const AllocatorConfig& config = {}) {
  try {
    run(events, config);
    FAIL() << "no error for: " << part;
  } catch (const EventError& error) {
    EXPECT_EQ(error.event(), event);
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(Replay, EventsThatCannotBeAreNamed) {
  const AllocatorEvent one{5, 8, 0, 0}, gone{5, kEventRelease, 0, 0};
  expect_event_error({gone}, 0, "never allocated");
  expect_event_error({one, gone, gone}, 2, "released before; it was last allocated by event 0");
  expect_event_error({one, one}, 1, "still alive since event 0");
  expect_event_error({one, {5, kEventUse, 1, 0}, gone, one}, 3, "awaiting another stream");
  expect_event_error({one, {5, kEventComplete, 0, 0}}, 1, "was not released");
  expect_event_error({{5, -9, 0, 0}}, 0, "-9 bytes");
  expect_event_error({{5, kMax, 0, 0}}, 0, "2^60 at most");
  Events large;
  for (std::int64_t i = 0; i < 5; ++i) large.push_back({i, kAllocatorMostBytes, 0, 0});
  expect_event_error(large, 4, "2^62");
  AllocatorConfig config;
  config.expandable_segments = true;
  expect_event_error(large, 3, "2^62", config);  // each is rounded up to a granule of 20 MiB
  config = {};
  config.kind = AllocatorKind::cpu;
  expect_event_error(large, 4, "2^62", config);
}

TEST(Replay, OptionsThatCannotBeAreRefused) {
  const auto refused = [](const AllocatorConfig& config) {
    EXPECT_THROW(run({}, config), InvalidArgument);
  };
  refused(limited(-1));
  AllocatorConfig config;
  config.max_split_size = 19 * kMiB;
  refused(config);
  config.max_split_size = 20 * kMiB + 512;
  refused(config);
  config.max_split_size = 20 * kMiB;
  config.large_segment_size = 21 * kMiB;
  refused(config);
  config = {};
  config.garbage_collection_threshold = 1;
  refused(config);
  config.garbage_collection_threshold = std::numeric_limits<double>::quiet_NaN();
  refused(config);
  config = {};
  config.roundup_power2_divisions[3] = 3;
  refused(config);
  EXPECT_THROW(run({}).timeline(0), InvalidArgument);
}

TEST(Replay, TimelineKeepsEachIntervalsMaximum) {
  Events events;
  for (std::int64_t i = 0; i < 7; ++i) events.push_back({i, (i % 3 + 1) * 600, 0, 0});
  AllocatorConfig config;
  config.kind = AllocatorKind::cpu;
  events.push_back({6, kEventRelease, 0, 0});
  const ReplayResult result = run(events, config);
  const auto points = result.timeline(3);  // events 0-2, 3-5, 6-7
  ASSERT_EQ(points.size(), 3U);
  EXPECT_EQ(points[0].event, 2);
  EXPECT_EQ(points[0].allocated, 3600);
  EXPECT_EQ(points[1].event, 5);
  EXPECT_EQ(points[1].allocated, 7200);
  EXPECT_EQ(points[2].event, 6);
  EXPECT_EQ(points[2].allocated, 7800);
  EXPECT_EQ(points[2].reserved, 7800);
  EXPECT_EQ(result.timeline(100).size(), 8U);
}

}  // namespace
}  // namespace vramkit
