// Replays a trace of allocations and releases through a model of torch's allocators: how much is
// allocated and reserved, when it is most, what was alive then, and where memory runs out.
//
// CUDA: the rules of the caching allocator (caching_allocator.hpp). CPU: no caching at all, every
// block is the bytes that were asked for, and reserved equals allocated.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/allocator_config.hpp"
#include "core/caching_allocator.hpp"

namespace vramkit {

// One row of a trace. `bytes` >= 0 allocates block `id` on `stream`; the negative values are other
// events. `tag` is the caller's own, of allocations alone.
struct AllocatorEvent {
  std::int64_t id = 0;
  std::int64_t bytes = 0;
  std::int64_t stream = 0;
  std::int64_t tag = 0;
};
static_assert(sizeof(AllocatorEvent) == 4 * sizeof(std::int64_t));

inline constexpr std::int64_t kEventRelease = -1;
// Block `id` is used by `stream`: once released it waits for kEventComplete, or for the allocator
// to run out of memory, before it can be given out again.
inline constexpr std::int64_t kEventUse = -2;
inline constexpr std::int64_t kEventComplete = -3;
inline constexpr std::int64_t kEventEmptyCache = -4;  // of all streams; `id` is not looked at

// A block that was alive when most was allocated.
struct PeakBlock {
  std::int64_t id = 0;
  std::int64_t bytes = 0;      // what it occupied
  std::int64_t requested = 0;  // what was asked for
  std::int64_t stream = 0;
  std::int64_t tag = 0;
  std::int64_t event = 0;  // the index of its allocation
};

struct OutOfMemory {
  std::int64_t event = 0;  // its index
  std::int64_t id = 0;
  std::int64_t requested = 0;  // bytes
  std::int64_t needed = 0;     // bytes that it would have taken from the device
  std::int64_t free = 0;       // bytes that the limit and the device left at that time
  std::int64_t reserved = 0;   // bytes, all cached memory having been given back
  std::int64_t allocated = 0;  // bytes of live blocks
  std::int64_t stream = 0;
  std::int64_t tag = 0;
};

struct TimelinePoint {
  std::int64_t event = 0;      // index of the interval's first event with the most allocated
  std::int64_t allocated = 0;  // most in the interval
  std::int64_t reserved = 0;   // most in the interval
};

struct ReplayResult {
  std::int64_t events = 0;  // replayed; all of the trace unless memory ran out
  // Of several events at which a peak is reached, the first. None if nothing was allocated.
  std::int64_t peak_allocated = 0;
  std::optional<std::int64_t> peak_allocated_event;
  std::int64_t reserved_at_peak = 0;   // after that event
  std::int64_t requested_at_peak = 0;  // likewise
  std::int64_t peak_reserved = 0;
  std::optional<std::int64_t> peak_reserved_event;
  std::int64_t allocated_at_peak_reserved = 0;  // after that event
  // 1 - allocated_at_peak_reserved / peak_reserved: the share of the memory that was reserved when
  // most was, and that no live block held. 0 if nothing was reserved.
  double fragmentation = 0;
  AllocatorCounters end;              // after the last event replayed
  std::vector<SegmentInfo> segments;  // likewise; block owners are indices of events
  std::optional<OutOfMemory> out_of_memory;
  std::vector<PeakBlock> peak_blocks;  // largest first, of equals the one allocated first
  std::vector<std::int64_t> allocated, reserved;  // after each event; reserved: most during it

  // At most `max_points` points (>= 1) that divide the events evenly, by default one for each.
  std::vector<TimelinePoint> timeline(std::optional<std::int64_t> max_points = std::nullopt) const;
};

// Throws EventError, which names the event, for a trace that cannot be: a block allocated twice, a
// block released, used or completed that is not there, a kind of event that is not known, a size
// above 2^60 bytes, or 2^62 bytes reserved where nothing bounds the memory. InvalidArgument:
// check().
ReplayResult replay(std::span<const AllocatorEvent> events, const AllocatorConfig& config);

}  // namespace vramkit
