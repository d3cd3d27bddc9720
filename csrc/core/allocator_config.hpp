// What an allocator is told before it runs, under torch's names for its options, in bytes.
#pragma once
#include <array>
#include <cstdint>
#include <optional>

namespace vramkit {

inline constexpr std::int64_t kMiB = std::int64_t{1} << 20;

// The facts of torch's CUDA caching allocator that no option changes (c10/core/AllocatorConfig.h).
inline constexpr std::int64_t kAllocatorGranule = 512;     // every block is a multiple of it
inline constexpr std::int64_t kAllocatorSmallSize = kMiB;  // the largest block of small pools
inline constexpr std::int64_t kAllocatorSmallSegment = 2 * kMiB;
inline constexpr std::int64_t kAllocatorLargeRequest = 10 * kMiB;  // from here a segment of its own
inline constexpr std::int64_t kAllocatorLargeGranule = 2 * kMiB;   // of such segments
inline constexpr std::int64_t kAllocatorMostBytes = std::int64_t{1} << 60;  // sums cannot overflow

enum class AllocatorKind { cuda, cpu };

struct AllocatorConfig {
  AllocatorKind kind = AllocatorKind::cuda;
  // What this process may reserve (torch.cuda.set_per_process_memory_fraction); none: no bound.
  // On the CPU a bound on what is allocated.
  std::optional<std::int64_t> limit;
  // What the device itself can give; none: without end. Garbage collection looks at `limit` alone.
  std::optional<std::int64_t> device_memory;
  // Blocks of at least this size are never split; none: all are.
  std::optional<std::int64_t> max_split_size;
  // By how much a block of at least max_split_size may exceed a request.
  std::int64_t max_non_split_rounding_size = 20 * kMiB;
  // The segment for requests between 1 and 10 MiB, and the granule of large expandable segments.
  std::int64_t large_segment_size = 20 * kMiB;
  // Share of `limit` above which unused segments are given back by age; 0: never.
  double garbage_collection_threshold = 0;
  bool expandable_segments = false;
  // Divisions between powers of two that sizes are rounded up to, for sizes below 2 MiB, 4 MiB …
  // 64 GiB and above; 0 or 1: plain rounding.
  std::array<std::int64_t, 16> roundup_power2_divisions{};
};

// Throws InvalidArgument for an option that torch refuses too, or that makes no sense.
void check(const AllocatorConfig& config);

}  // namespace vramkit
