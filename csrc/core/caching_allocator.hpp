// torch's CUDA caching allocator without the device: which block answers which request, when a
// segment is taken from the device and when it goes back. The rules are those of torch's
// documentation and source (c10/cuda/CUDACachingAllocator.cpp, first with large_segment_size);
// docs/allocator.md lists them. Addresses are pairs (segment, offset): segments count up in the
// order in which they are taken, since where the driver puts them is not known.
//
// Invariants, true whenever no call is inside:
//   1. The blocks of a segment tile it: sorted by offset they neither overlap nor leave a gap.
//   2. Every segment's free blocks, and no others, are in its pool's free list; an expandable
//      segment's unmapped blocks, and no others, in the list of unmapped ones.
//   3. No two neighbours in a segment are both free, or both unmapped: merging is complete.
//   4. reserved = the sum of all mapped blocks; allocated = the sum of all live ones.
//   5. Unmapped blocks begin and end on the segment's granule.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "core/allocator_config.hpp"

namespace vramkit {

enum class BlockState : std::uint8_t {
  free,
  live,
  awaiting,  // released, but another stream may still read it
  unmapped,  // address space of an expandable segment with no memory behind it
};

// One block of a segment, as it stands.
struct BlockInfo {
  std::int64_t offset = 0;  // in the segment
  std::int64_t bytes = 0;
  std::int64_t requested = 0;  // 0 unless live or awaiting
  std::int64_t owner = -1;     // what allocate() was given; -1 unless live or awaiting
  BlockState state = BlockState::free;
};

// Memory taken from the device: a segment, or a run of mapped bytes of an expandable one.
struct SegmentInfo {
  std::int64_t serial = 0;  // in the order in which segments were made
  std::int64_t offset = 0;  // of a run in its expandable segment, else 0
  std::int64_t bytes = 0;
  std::int64_t stream = 0;
  bool small = false;
  bool expandable = false;
  std::vector<BlockInfo> blocks;  // by offset
};

struct AllocatorCounters {
  std::int64_t allocated = 0;           // bytes of live blocks, rounding included
  std::int64_t reserved = 0;            // bytes taken from the device
  std::int64_t requested = 0;           // bytes asked for by what is live
  std::int64_t awaiting = 0;            // bytes released that another stream may still read
  std::int64_t device_allocations = 0;  // segments taken, or ranges mapped
  std::int64_t device_frees = 0;        // segments given back, or ranges unmapped
  std::int64_t retries = 0;             // attempts after all cached memory was given back
  std::int64_t reserved_high = 0;       // highest `reserved` since the caller last lowered it
};

class CachingAllocator {
 public:
  using BlockIndex = std::int32_t;

  explicit CachingAllocator(const AllocatorConfig& config);

  // A block of at least `bytes` (1 … kAllocatorMostBytes), or nothing if memory has run out.
  // `owner` is the caller's name for it. Throws InvalidArgument where nothing bounds the memory and
  // more than 2^62 bytes would be reserved.
  std::optional<BlockIndex> allocate(std::int64_t bytes, std::int64_t stream, std::int64_t owner);
  // A live block: it becomes free, or awaiting if another stream has used it.
  BlockState release(BlockIndex block);
  // The live block is used by `stream` (Tensor.record_stream).
  void note_use(BlockIndex block, std::int64_t stream);
  // The other streams are through with the block that `owner` released. Nothing happens if it was
  // freed since, as running out of memory waits for all of them.
  void complete(std::int64_t owner);
  // Gives all cached memory back (torch.cuda.empty_cache).
  void empty_cache();

  std::int64_t bytes(BlockIndex block) const { return blocks_[at(block)].size; }
  // What a request of `bytes` takes from the device where no cached block answers it.
  std::int64_t device_bytes(std::int64_t bytes) const { return segment_bytes(round(bytes)); }
  AllocatorCounters& counters() { return counters_; }
  // By serial and offset.
  std::vector<SegmentInfo> segments() const;

 private:
  static constexpr BlockIndex kNone = -1;
  static constexpr std::int64_t kMostReserved = std::int64_t{1} << 62;

  static std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }

  struct Block {
    std::int64_t offset = 0, size = 0, requested = 0, owner = -1;
    std::int64_t born = 0;  // the pool's count of searches when it became free
    BlockIndex prev = kNone, next = kNone;
    std::int32_t segment = 0;
    BlockState state = BlockState::free;
    bool used_elsewhere = false;
  };

  struct FreeKey {
    std::int64_t size, serial, offset;
    BlockIndex block;
    bool operator<(const FreeKey& other) const {
      return std::tie(size, serial, offset) < std::tie(other.size, other.serial, other.offset);
    }
  };
  struct UnmappedKey {
    std::int64_t serial, offset;
    BlockIndex block;
    bool operator<(const UnmappedKey& other) const {
      return std::tie(serial, offset) < std::tie(other.serial, other.offset);
    }
  };
  using FreeList = std::pmr::set<FreeKey>;

  // The cached blocks of one stream, small or large.
  struct Pool {
    std::int64_t stream;
    bool small;
    FreeList free;
    std::pmr::set<UnmappedKey> unmapped;
  };
  struct Segment {
    std::int64_t serial = 0;
    std::int64_t granule = 0;  // of expandable segments, else 0
    std::int32_t pool = 0;
    BlockIndex head = kNone;  // kNone: given back
  };

  static std::size_t at(BlockIndex block) { return static_cast<std::size_t>(block); }
  Block& block(BlockIndex b) { return blocks_[at(b)]; }
  Segment& segment_of(const Block& b) { return segments_[static_cast<std::size_t>(b.segment)]; }
  Pool& pool_of(const Block& b) { return pools_[static_cast<std::size_t>(segment_of(b).pool)]; }

  std::int64_t round(std::int64_t bytes) const;
  std::int64_t segment_bytes(std::int64_t size) const;
  std::int32_t find_pool(std::int64_t stream, bool small);
  std::int64_t& searches(bool small) { return searches_[small ? 1 : 0]; }
  bool collects() const { return config_.limit && config_.garbage_collection_threshold > 0; }

  BlockIndex new_block(std::int32_t segment, std::int64_t offset, std::int64_t size);
  std::int32_t new_segment(std::int32_t pool, std::int64_t granule);
  void drop_block(BlockIndex b) { spare_blocks_.push_back(b); }
  void link_after(BlockIndex b, BlockIndex added);
  void insert_free(BlockIndex b);
  void erase_free(BlockIndex b);
  void insert_unmapped(BlockIndex b);
  void erase_unmapped(BlockIndex b);
  void merge(BlockIndex into, BlockIndex neighbour);
  void free_block(BlockIndex b);

  BlockIndex take_cached(std::int32_t pool, std::int64_t size);
  BlockIndex take_new(std::int32_t pool, std::int64_t size);
  void cut(BlockIndex b, std::int64_t size);
  void check_reserved(std::int64_t added) const;  // throws past kMostReserved
  void reserve(std::int64_t bytes);
  void unreserve(std::int64_t bytes);

  void give_back(BlockIndex b);
  void collect_garbage();
  bool release_oversize(std::int32_t pool, std::int64_t size);
  void release_all(bool small);

  BlockIndex expand(std::int32_t pool, std::int64_t size);
  BlockIndex find_expandable(std::int32_t pool, std::int64_t size);
  bool map(BlockIndex b, std::int64_t size);
  void unmap(BlockIndex b);

  const AllocatorConfig config_;
  std::pmr::unsynchronized_pool_resource memory_;  // of the lists' nodes
  std::vector<Block> blocks_;
  std::vector<BlockIndex> spare_blocks_;
  std::vector<Segment> segments_;
  std::vector<std::int32_t> spare_segments_;
  std::int64_t serial_ = 0;
  std::vector<Pool> pools_;
  std::unordered_map<std::int64_t, std::int32_t> pool_index_[2];  // by stream; large, small
  std::int64_t searches_[2] = {0, 0};                             // large, small
  std::map<std::int64_t, BlockIndex> awaiting_;                   // by owner
  AllocatorCounters counters_;
};

}  // namespace vramkit
