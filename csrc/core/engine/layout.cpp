// See layout.hpp.
#include "core/engine/layout.hpp"

#include <algorithm>
#include <bit>
#include <numeric>
#include <string>
#include <tuple>

#include "core/engine/memory.hpp"
#include "core/error.hpp"

namespace vramkit {
namespace {

// Ranges that share a unit, or lie in neighbouring ones, are read as one.
constexpr std::int64_t kJoinGap = kDirectUnit;

void check(const SourceRange& range) {
  if (range.source < 0 || range.offset < 0 || range.bytes < 0) {
    throw InvalidArgument("a range of a source has a source, an offset and a size of 0 or more");
  }
  if (!std::has_single_bit(static_cast<std::uint64_t>(range.alignment)) ||
      range.alignment > kPackUnit) {
    throw InvalidArgument("an alignment is a power of two up to " + std::to_string(kPackUnit) +
                          ", not " + std::to_string(range.alignment));
  }
}

std::int64_t useful(std::span<const SourceRange> ranges) {
  std::int64_t sum = 0;
  for (const SourceRange& range : ranges) sum += range.bytes;
  return sum;
}

}  // namespace

BlockLayout layout_in_place(std::span<const SourceRange> ranges) {
  for (const SourceRange& range : ranges) check(range);
  std::vector<std::size_t> order(ranges.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::tie(ranges[a].source, ranges[a].offset) <
           std::tie(ranges[b].source, ranges[b].offset);
  });
  BlockLayout block;
  block.places.resize(ranges.size());
  std::vector<std::size_t> misfits;
  std::int64_t end = 0;  // of the block so far
  for (std::size_t index : order) {
    const SourceRange& range = ranges[index];
    if (range.offset % range.alignment != 0) {
      misfits.push_back(index);
      continue;
    }
    if (!block.extents.empty()) {
      Extent& last = block.extents.back();
      const std::int64_t gap = range.offset - (last.source_offset + last.bytes);
      if (last.source == range.source && gap <= kJoinGap) {
        block.places[index] = last.block_offset + (range.offset - last.source_offset);
        last.bytes = std::max(last.bytes, range.offset + range.bytes - last.source_offset);
        end = last.block_offset + last.bytes;
        continue;
      }
    }
    const std::int64_t start = round_up_to(end, kDirectUnit) + range.offset % kDirectUnit;
    block.extents.push_back({range.source, range.offset, start, range.bytes});
    block.places[index] = start;
    end = start + range.bytes;
  }
  end = round_up_to(end, kDirectUnit);
  for (std::size_t index : misfits) {
    const SourceRange& range = ranges[index];
    end = round_up_to(end, kPackUnit);
    block.extents.push_back({range.source, range.offset, end, range.bytes});
    block.places[index] = end;
    end += range.bytes;
    block.direct = false;
  }
  std::erase_if(block.extents, [](const Extent& extent) { return extent.bytes == 0; });
  block.bytes = round_up_to(end, kDirectUnit);
  block.padding = block.bytes - useful(ranges);
  return block;
}

BlockLayout layout_packed(std::span<const SourceRange> ranges) {
  BlockLayout block;
  std::int64_t end = 0;
  for (const SourceRange& range : ranges) {
    check(range);
    end = round_up_to(end, kPackUnit);
    block.places.push_back(end);
    if (range.bytes > 0) {
      block.extents.push_back({range.source, range.offset, end, range.bytes});
      block.direct = block.direct && (range.offset - end) % kDirectUnit == 0;
    }
    end += range.bytes;
  }
  block.bytes = round_up_to(end, kDirectUnit);
  block.padding = block.bytes - useful(ranges);
  return block;
}

SlotPlan colour_slots(std::span<const std::int64_t> order, std::span<const std::int64_t> bytes,
                      const std::vector<bool>& needs, std::int64_t depth, std::int64_t most) {
  const std::size_t count = bytes.size();
  if (depth < 1 || most < 1) {
    throw InvalidArgument("slots: the depth and the number of slots are at least 1, not " +
                          std::to_string(depth) + " and " + std::to_string(most));
  }
  std::vector<std::int64_t> path;  // the streamed calls
  for (std::int64_t block : order) {
    if (block < 0 || block >= static_cast<std::int64_t>(count)) {
      throw InvalidArgument("slots: the order names block " + std::to_string(block) + " of " +
                            std::to_string(count));
    }
    if (needs[static_cast<std::size_t>(block)]) path.push_back(block);
  }
  std::vector<std::vector<std::size_t>> near(count);
  for (std::size_t at = 0; at < path.size(); ++at) {
    for (std::size_t ahead = 1; ahead <= static_cast<std::size_t>(depth); ++ahead) {
      const auto a = static_cast<std::size_t>(path[at]);
      const auto b = static_cast<std::size_t>(path[(at + ahead) % path.size()]);
      if (a == b) continue;
      near[a].push_back(b);
      near[b].push_back(a);
    }
  }
  for (auto& others : near) {
    std::sort(others.begin(), others.end());
    others.erase(std::unique(others.begin(), others.end()), others.end());
  }

  // The block whose neighbours have the most slots goes next (Brélaz's rule: exact where two
  // slots do), the larger first, so that slots are opened by those that set their size.
  SlotPlan plan;
  plan.slot_of.assign(count, -1);
  auto saturation = [&](std::size_t block) {
    std::uint64_t seen = 0;
    for (std::size_t other : near[block]) {
      if (plan.slot_of[other] >= 0) seen |= std::uint64_t{1} << (plan.slot_of[other] % 64);
    }
    return std::popcount(seen);
  };
  for (std::int64_t left = std::count(needs.begin(), needs.end(), true); left > 0; --left) {
    std::size_t block = count;
    for (std::size_t other = 0; other < count; ++other) {
      if (!needs[other] || plan.slot_of[other] >= 0) continue;
      if (block == count ||
          std::pair(saturation(other), bytes[other]) > std::pair(saturation(block), bytes[block])) {
        block = other;
      }
    }
    const std::int64_t size = round_up_to(bytes[block], kDirectUnit);
    const auto open = static_cast<std::int64_t>(plan.capacity.size());
    std::int64_t best = -1;
    std::tuple<std::int64_t, std::int64_t> best_cost;
    for (std::int64_t slot = 0; slot < std::min(open + 1, most); ++slot) {
      const auto clashes = static_cast<std::int64_t>(
          std::count_if(near[block].begin(), near[block].end(),
                        [&](std::size_t other) { return plan.slot_of[other] == slot; }));
      const std::int64_t has = slot < open ? plan.capacity[static_cast<std::size_t>(slot)] : 0;
      const std::tuple cost{clashes, std::max<std::int64_t>(size - has, 0)};
      if (best < 0 || cost < best_cost) best = slot, best_cost = cost;
    }
    if (best == open) plan.capacity.push_back(0);
    auto& capacity = plan.capacity[static_cast<std::size_t>(best)];
    capacity = std::max(capacity, size);
    plan.slot_of[block] = best;
    plan.conflicts += std::get<0>(best_cost);
  }
  return plan;
}

std::vector<bool> spread_residents(std::span<const std::int64_t> bytes, std::int64_t budget) {
  const std::int64_t total = std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0});
  std::vector<bool> stays(bytes.size(), false);
  if (budget >= total) {
    stays.assign(bytes.size(), true);
    return stays;
  }
  // Each block brings its share of what may stay; one stays whenever half of it has come together.
  const double share = total > 0 ? static_cast<double>(budget) / static_cast<double>(total) : 0;
  double due = 0;
  std::int64_t left = budget;
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    due += share * static_cast<double>(bytes[at]);
    if (bytes[at] <= left && due >= 0.5 * static_cast<double>(bytes[at])) {
      stays[at] = true;
      left -= bytes[at];
      due -= static_cast<double>(bytes[at]);
    }
  }
  for (std::size_t at = 0; at < bytes.size(); ++at) {  // what rounding left over
    if (!stays[at] && bytes[at] <= left) {
      stays[at] = true;
      left -= bytes[at];
    }
  }
  return stays;
}

}  // namespace vramkit
