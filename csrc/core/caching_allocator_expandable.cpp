// Expandable segments of the caching allocator: address space of which as much has memory behind it
// as is needed, in granules of 2 MiB (small) or large_segment_size.
#include <algorithm>

#include "core/caching_allocator.hpp"

namespace vramkit {

// Maps memory behind the lowest address that has room for `size`; the block that results is in no
// list. kNone if the device has no more; what was mapped on the way stays, as cached memory.
CachingAllocator::BlockIndex CachingAllocator::expand(std::int32_t pool, std::int64_t size) {
  BlockIndex b = find_expandable(pool, size);
  if (block(b).state == BlockState::unmapped && !map(b, std::min(block(b).size, size))) {
    return kNone;
  }
  while (block(b).size < size) {
    const BlockIndex next = block(b).next;
    if (!map(next, std::min(size - block(b).size, block(next).size))) return kNone;
    b = next;  // it has taken in the block before it
  }
  erase_free(b);
  return b;
}

// The first of a row of free and unmapped blocks that together have room for `size`; a new segment
// if there is none.
CachingAllocator::BlockIndex CachingAllocator::find_expandable(std::int32_t pool_number,
                                                               std::int64_t size) {
  Pool& pool = pools_[static_cast<std::size_t>(pool_number)];
  const auto available = [&](BlockIndex b) {
    return b != kNone &&
           (block(b).state == BlockState::free || block(b).state == BlockState::unmapped);
  };
  for (const UnmappedKey& key : pool.unmapped) {
    BlockIndex first = key.block;
    if (available(block(first).prev)) first = block(first).prev;
    std::int64_t room = 0;
    for (BlockIndex b = first; room < size && available(b); b = block(b).next) {
      room += block(b).size;
    }
    if (room >= size) return first;
  }
  const std::int64_t granule = pool.small ? kAllocatorSmallSegment : config_.large_segment_size;
  // torch reserves addresses for 9/8 of the device's memory.
  const std::int64_t memory =
      config_.device_memory.value_or(config_.limit.value_or(kAllocatorMostBytes));
  const std::int64_t space = std::max(memory + memory / 8, size);
  const std::int32_t segment = new_segment(pool_number, granule);
  const BlockIndex b = new_block(segment, 0, round_up(space, granule));
  segments_[static_cast<std::size_t>(segment)].head = b;
  insert_unmapped(b);
  return b;
}

// Puts memory behind the first `size` bytes of an unmapped block, in whole granules. The block then
// is a free one that has taken in its free neighbours. False, and nothing done, if the device has
// no more.
bool CachingAllocator::map(BlockIndex b, std::int64_t size) {
  const std::int64_t bytes = round_up(size, segment_of(block(b)).granule);
  if (config_.device_memory && counters_.reserved + bytes > *config_.device_memory) return false;
  check_reserved(bytes);
  erase_unmapped(b);
  block(b).state = BlockState::free;
  const std::int64_t left = block(b).size - bytes;
  if (left > 0) {
    const BlockIndex rest = new_block(block(b).segment, block(b).offset + bytes, left);
    block(b).size = bytes;
    link_after(b, rest);
    insert_unmapped(rest);
  }
  merge(b, block(b).prev);
  merge(b, block(b).next);
  insert_free(b);
  reserve(bytes);
  return true;
}

// Takes the memory from behind the whole granules of a free block. A segment with nothing mapped
// is given up.
void CachingAllocator::unmap(BlockIndex b) {
  const std::int64_t granule = segment_of(block(b)).granule;
  const std::int64_t begin = round_up(block(b).offset, granule);
  const std::int64_t end = (block(b).offset + block(b).size) / granule * granule;
  if (begin >= end) return;
  erase_free(b);
  const std::int64_t before = begin - block(b).offset;
  const std::int64_t after = block(b).offset + block(b).size - end;
  if (after > 0) {
    const BlockIndex rest = new_block(block(b).segment, end, after);
    link_after(b, rest);
    insert_free(rest);
  }
  if (before > 0) {
    const BlockIndex rest = new_block(block(b).segment, begin, end - begin);
    link_after(b, rest);
    block(b).size = before;
    insert_free(b);
    b = rest;
  }
  block(b).offset = begin;
  block(b).size = end - begin;
  block(b).state = BlockState::unmapped;
  merge(b, block(b).prev);
  merge(b, block(b).next);
  unreserve(end - begin);
  if (block(b).prev == kNone && block(b).next == kNone) {
    segment_of(block(b)).head = kNone;
    spare_segments_.push_back(block(b).segment);
    drop_block(b);
    return;
  }
  insert_unmapped(b);
}

}  // namespace vramkit
