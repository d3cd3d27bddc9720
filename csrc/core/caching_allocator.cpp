#include "core/caching_allocator.hpp"

#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "core/error.hpp"

namespace vramkit {
namespace {

int log2_floor(std::int64_t value) {
  return 63 - std::countl_zero(static_cast<std::uint64_t>(value));
}

}  // namespace

CachingAllocator::CachingAllocator(const AllocatorConfig& config) : config_(config) {}

// --- Sizes -----------------------------------------------------------------------------------

std::int64_t CachingAllocator::round(std::int64_t bytes) const {
  if (bytes < kAllocatorGranule) return kAllocatorGranule;
  const int interval = std::clamp(log2_floor(bytes) - 20, 0, 15);
  const std::int64_t divisions =
      config_.roundup_power2_divisions[static_cast<std::size_t>(interval)];
  if (divisions <= 1 || bytes <= kAllocatorGranule * divisions) {
    return round_up(bytes, kAllocatorGranule);
  }
  // `divisions` is a power of two: equal steps from one power of two to the next.
  return round_up(bytes, (std::int64_t{1} << log2_floor(bytes)) / divisions);
}

std::int64_t CachingAllocator::segment_bytes(std::int64_t size) const {
  if (size <= kAllocatorSmallSize) return kAllocatorSmallSegment;
  if (size < kAllocatorLargeRequest) return config_.large_segment_size;
  return round_up(size, kAllocatorLargeGranule);
}

// --- Blocks, segments, lists -----------------------------------------------------------------

std::int32_t CachingAllocator::find_pool(std::int64_t stream, bool small) {
  const auto [it, added] =
      pool_index_[small ? 1 : 0].try_emplace(stream, static_cast<std::int32_t>(pools_.size()));
  if (added) {
    pools_.push_back({stream, small, FreeList(&memory_), std::pmr::set<UnmappedKey>(&memory_)});
  }
  return it->second;
}

CachingAllocator::BlockIndex CachingAllocator::new_block(std::int32_t segment, std::int64_t offset,
                                                         std::int64_t size) {
  BlockIndex b = kNone;
  if (spare_blocks_.empty()) {
    b = static_cast<BlockIndex>(blocks_.size());
    blocks_.emplace_back();
  } else {
    b = spare_blocks_.back();
    spare_blocks_.pop_back();
    block(b) = Block();
  }
  block(b).segment = segment;
  block(b).offset = offset;
  block(b).size = size;
  return b;
}

std::int32_t CachingAllocator::new_segment(std::int32_t pool, std::int64_t granule) {
  std::int32_t s = 0;
  if (spare_segments_.empty()) {
    s = static_cast<std::int32_t>(segments_.size());
    segments_.emplace_back();
  } else {
    s = spare_segments_.back();
    spare_segments_.pop_back();
  }
  segments_[static_cast<std::size_t>(s)] = {serial_++, granule, pool, kNone};
  return s;
}

void CachingAllocator::link_after(BlockIndex b, BlockIndex added) {
  const BlockIndex next = block(b).next;
  block(added).prev = b;
  block(added).next = next;
  block(b).next = added;
  if (next != kNone) block(next).prev = added;
}

void CachingAllocator::insert_free(BlockIndex b) {
  Block& added = block(b);
  Pool& pool = pool_of(added);
  added.state = BlockState::free;
  added.requested = 0;
  added.owner = -1;
  added.born = searches(pool.small);
  pool.free.insert({added.size, segment_of(added).serial, added.offset, b});
}

void CachingAllocator::erase_free(BlockIndex b) {
  const Block& gone = block(b);
  pool_of(gone).free.erase({gone.size, segment_of(gone).serial, gone.offset, b});
}

void CachingAllocator::insert_unmapped(BlockIndex b) {
  Block& added = block(b);
  added.state = BlockState::unmapped;
  pool_of(added).unmapped.insert({segment_of(added).serial, added.offset, b});
}

void CachingAllocator::erase_unmapped(BlockIndex b) {
  const Block& gone = block(b);
  pool_of(gone).unmapped.erase({segment_of(gone).serial, gone.offset, b});
}

// Takes in a neighbour of the same state, which leaves its list. `into` is in no list.
void CachingAllocator::merge(BlockIndex into, BlockIndex neighbour) {
  if (neighbour == kNone || block(neighbour).state != block(into).state) return;
  if (block(into).state == BlockState::free) {
    erase_free(neighbour);
  } else {
    erase_unmapped(neighbour);
  }
  Block& target = block(into);
  const Block& gone = block(neighbour);
  if (target.prev == neighbour) {
    target.offset = gone.offset;
    target.prev = gone.prev;
    if (target.prev == kNone) {
      segment_of(target).head = into;
    } else {
      block(target.prev).next = into;
    }
  } else {
    target.next = gone.next;
    if (target.next != kNone) block(target.next).prev = into;
  }
  target.size += gone.size;
  drop_block(neighbour);
}

void CachingAllocator::free_block(BlockIndex b) {
  block(b).state = BlockState::free;
  block(b).used_elsewhere = false;
  merge(b, block(b).prev);
  merge(b, block(b).next);
  insert_free(b);
}

void CachingAllocator::check_reserved(std::int64_t added) const {
  if (counters_.reserved + added > kMostReserved) {
    throw InvalidArgument(
        "more than 2^62 bytes would be reserved; set a limit, and check that sizes are in bytes");
  }
}

void CachingAllocator::reserve(std::int64_t bytes) {
  counters_.reserved += bytes;
  counters_.reserved_high = std::max(counters_.reserved_high, counters_.reserved);
  counters_.device_allocations += 1;
}

void CachingAllocator::unreserve(std::int64_t bytes) {
  counters_.reserved -= bytes;
  counters_.device_frees += 1;
}

// --- Allocation ------------------------------------------------------------------------------

std::optional<CachingAllocator::BlockIndex> CachingAllocator::allocate(std::int64_t bytes,
                                                                       std::int64_t stream,
                                                                       std::int64_t owner) {
  const std::int64_t size = round(bytes);
  const std::int32_t pool = find_pool(stream, size <= kAllocatorSmallSize);
  BlockIndex b = take_cached(pool, size);
  if (b == kNone) {
    if (collects()) collect_garbage();
    b = take_new(pool, size);
  }
  if (b == kNone && release_oversize(pool, size)) b = take_new(pool, size);
  if (b == kNone) {
    empty_cache();
    counters_.retries += 1;
    b = take_new(pool, size);
  }
  if (b == kNone) return std::nullopt;

  cut(b, size);
  Block& taken = block(b);
  taken.state = BlockState::live;
  taken.requested = bytes;
  taken.owner = owner;
  counters_.allocated += taken.size;
  counters_.requested += bytes;
  return b;
}

// The smallest cached block that fits, of those the one with the lowest address; it leaves its
// list.
CachingAllocator::BlockIndex CachingAllocator::take_cached(std::int32_t pool_number,
                                                           std::int64_t size) {
  Pool& pool = pools_[static_cast<std::size_t>(pool_number)];
  if (collects()) searches(pool.small) += 1;
  auto it = pool.free.lower_bound({size, -1, -1, kNone});
  if (it == pool.free.end()) return kNone;
  if (config_.expandable_segments) {
    // A block that can grow counts with the address space behind it, so that it is kept for
    // requests that need it.
    const auto room = [&](const FreeKey& key) {
      const BlockIndex next = block(key.block).next;
      const bool grows = next != kNone && block(next).state == BlockState::unmapped;
      return key.size + (grows ? block(next).size : 0);
    };
    for (auto next = std::next(it); next != pool.free.end() && room(*next) < room(*it); ++next) {
      it = next;
    }
  }
  if (config_.max_split_size) {
    const std::int64_t oversize = *config_.max_split_size;
    if (size < oversize && it->size >= oversize) return kNone;
    if (size >= oversize && it->size >= size + config_.max_non_split_rounding_size) return kNone;
  }
  const BlockIndex found = it->block;
  pool.free.erase(it);
  return found;
}

// A block from the device, in no list; kNone if the device or the limit has no room.
CachingAllocator::BlockIndex CachingAllocator::take_new(std::int32_t pool, std::int64_t size) {
  const std::int64_t wanted = segment_bytes(size);
  if (config_.limit && counters_.reserved + wanted > *config_.limit) return kNone;
  if (config_.expandable_segments) return expand(pool, size);
  if (config_.device_memory && counters_.reserved + wanted > *config_.device_memory) return kNone;
  check_reserved(wanted);
  const std::int32_t segment = new_segment(pool, 0);
  const BlockIndex b = new_block(segment, 0, wanted);
  segments_[static_cast<std::size_t>(segment)].head = b;
  reserve(wanted);
  return b;
}

// Leaves what exceeds `size` to a free block of its own, where the rules allow a split.
void CachingAllocator::cut(BlockIndex b, std::int64_t size) {
  const std::int64_t left = block(b).size - size;
  if (pool_of(block(b)).small || config_.expandable_segments) {
    if (left < kAllocatorGranule) return;
  } else if (left <= kAllocatorSmallSize ||
             (config_.max_split_size && size >= *config_.max_split_size)) {
    return;
  }
  const BlockIndex rest = new_block(block(b).segment, block(b).offset + size, left);
  block(b).size = size;
  link_after(b, rest);
  insert_free(rest);
}

BlockState CachingAllocator::release(BlockIndex b) {
  Block& gone = block(b);
  counters_.allocated -= gone.size;
  counters_.requested -= gone.requested;
  if (gone.used_elsewhere) {
    gone.state = BlockState::awaiting;
    counters_.awaiting += gone.size;
    awaiting_.emplace(gone.owner, b);
    return BlockState::awaiting;
  }
  free_block(b);
  return BlockState::free;
}

void CachingAllocator::note_use(BlockIndex b, std::int64_t stream) {
  if (stream != pool_of(block(b)).stream) block(b).used_elsewhere = true;
}

void CachingAllocator::complete(std::int64_t owner) {
  const auto it = awaiting_.find(owner);
  if (it == awaiting_.end()) return;
  counters_.awaiting -= block(it->second).size;
  free_block(it->second);
  awaiting_.erase(it);
}

// --- Giving memory back ----------------------------------------------------------------------

// A whole free segment goes back to the device.
void CachingAllocator::give_back(BlockIndex b) {
  erase_free(b);
  unreserve(block(b).size);
  segment_of(block(b)).head = kNone;
  spare_segments_.push_back(block(b).segment);
  drop_block(b);
}

// Above the threshold, gives back unused large segments that are older than the average one, age
// being the number of searches since they became free, until enough is released.
void CachingAllocator::collect_garbage() {
  const auto threshold = static_cast<std::int64_t>(config_.garbage_collection_threshold *
                                                   static_cast<double>(*config_.limit));
  if (counters_.reserved <= threshold) return;
  const std::int64_t target = counters_.reserved - threshold;
  std::vector<BlockIndex> whole;
  std::int64_t total_age = 0, count = 0, released = 0;
  const auto age = [&](BlockIndex b) { return searches(false) - block(b).born; };
  for (const Pool& pool : pools_) {
    if (pool.small) continue;
    for (const FreeKey& key : pool.free) {
      if (block(key.block).prev != kNone || block(key.block).next != kNone) continue;
      total_age += age(key.block);
      count += 1;
      // One that is expandable counts, and stays.
      if (segment_of(block(key.block)).granule == 0) whole.push_back(key.block);
    }
  }
  bool progress = true;
  while (released < target && progress && count > 0) {
    const double average = static_cast<double>(total_age) / static_cast<double>(count);
    progress = false;
    std::vector<BlockIndex> younger;
    for (const BlockIndex b : whole) {
      if (static_cast<double>(age(b)) < average) {
        younger.push_back(b);
        continue;
      }
      progress = true;
      released += block(b).size;
      total_age -= age(b);
      count -= 1;
      give_back(b);
    }
    whole = std::move(younger);
  }
}

// With max_split_size: gives back the smallest oversize block that is as large as the request, or
// else oversize blocks from the largest on. True if that makes room for the request.
bool CachingAllocator::release_oversize(std::int32_t pool_number, std::int64_t size) {
  if (!config_.max_split_size || config_.expandable_segments) return false;
  Pool& pool = pools_[static_cast<std::size_t>(pool_number)];
  const std::int64_t wanted = std::max(size, *config_.max_split_size);
  const auto fits = pool.free.lower_bound({wanted, -1, -1, kNone});
  if (fits != pool.free.end()) {
    give_back(fits->block);
    return true;
  }
  std::int64_t released = 0;
  while (released < wanted && !pool.free.empty() &&
         pool.free.rbegin()->size >= *config_.max_split_size) {
    released += pool.free.rbegin()->size;
    give_back(pool.free.rbegin()->block);
  }
  return released >= wanted;
}

void CachingAllocator::empty_cache() {
  while (!awaiting_.empty()) complete(awaiting_.begin()->first);
  release_all(false);
  release_all(true);
}

void CachingAllocator::release_all(bool small) {
  std::vector<BlockIndex> cached;
  for (const Pool& pool : pools_) {
    if (pool.small != small) continue;
    for (const FreeKey& key : pool.free) cached.push_back(key.block);
  }
  for (const BlockIndex b : cached) {
    if (segment_of(block(b)).granule > 0) {
      unmap(b);
    } else if (block(b).prev == kNone && block(b).next == kNone) {
      give_back(b);
    }
  }
}

// --- What there is ---------------------------------------------------------------------------

std::vector<SegmentInfo> CachingAllocator::segments() const {
  std::vector<const Segment*> alive;
  for (const Segment& segment : segments_) {
    if (segment.head != kNone) alive.push_back(&segment);
  }
  std::sort(alive.begin(), alive.end(),
            [](const Segment* a, const Segment* b) { return a->serial < b->serial; });
  std::vector<SegmentInfo> found;
  for (const Segment* segment : alive) {
    const Pool& pool = pools_[static_cast<std::size_t>(segment->pool)];
    bool open = false;
    for (BlockIndex b = segment->head; b != kNone; b = blocks_[at(b)].next) {
      const Block& part = blocks_[at(b)];
      if (part.state == BlockState::unmapped) {
        open = false;
        continue;
      }
      if (!open) {
        found.push_back(
            {segment->serial, part.offset, 0, pool.stream, pool.small, segment->granule > 0, {}});
        open = true;
      }
      found.back().bytes += part.size;
      found.back().blocks.push_back(
          {part.offset, part.size, part.requested, part.owner, part.state});
    }
  }
  return found;
}

}  // namespace vramkit
