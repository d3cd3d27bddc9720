#include "core/allocator_simulator.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/error.hpp"

namespace vramkit {
namespace {

// What is known of a block id: never allocated, alive, released but awaiting other streams, or
// gone.
enum class IdState : std::uint8_t { unknown, live, awaiting, released };

struct Known {
  std::int64_t id = 0;
  std::int64_t event = 0;   // of its latest allocation
  std::int64_t bytes = 0;   // of the block, where there is no CachingAllocator to ask
  std::int32_t block = -1;  // -1: none, as for 0 bytes
  IdState state = IdState::unknown;
};

// Ids to what is known of them: open addressing, since this is the replay's hottest table. Ids are
// never forgotten, so that a second release is told from that of an unknown block.
class IdTable {
 public:
  IdTable() : slots_(1024) {}

  Known& find(std::int64_t id) {
    if (2 * (used_ + 1) > slots_.size()) grow();
    Known& slot = *probe(slots_, id);
    if (slot.state == IdState::unknown) slot.id = id;
    return slot;
  }
  void count_new() { used_ += 1; }  // a slot that find() gave out leaves IdState::unknown

 private:
  static Known* probe(std::vector<Known>& slots, std::int64_t id) {
    // The finalizer of splitmix64: ids are addresses or counters, whose low bits tell too little.
    auto hash = static_cast<std::uint64_t>(id);
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9U;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebU;
    const std::size_t mask = slots.size() - 1;
    std::size_t i = (hash ^ (hash >> 31)) & mask;
    while (slots[i].state != IdState::unknown && slots[i].id != id) i = (i + 1) & mask;
    return &slots[i];
  }

  void grow() {
    std::vector<Known> larger(2 * slots_.size());
    for (const Known& known : slots_) {
      if (known.state != IdState::unknown) *probe(larger, known.id) = known;
    }
    slots_ = std::move(larger);
  }

  std::vector<Known> slots_;  // a power of two, at most half in use
  std::size_t used_ = 0;
};

constexpr std::int64_t kMostAllocated = std::int64_t{1} << 62;

// torch's CPU allocator: what is asked for comes from the system, and goes back at once.
class PlainAllocator {
 public:
  explicit PlainAllocator(const AllocatorConfig& config) : config_(config) {}

  bool allocate(std::int64_t bytes) {
    const auto fits = [&](std::optional<std::int64_t> bound) {
      return !bound || counters_.allocated + bytes <= *bound;
    };
    if (!fits(config_.limit) || !fits(config_.device_memory)) return false;
    if (counters_.allocated + bytes > kMostAllocated) {
      throw InvalidArgument(
          "more than 2^62 bytes would be allocated; check that sizes are in bytes");
    }
    change(bytes);
    counters_.device_allocations += 1;
    counters_.reserved_high = std::max(counters_.reserved_high, counters_.reserved);
    return true;
  }
  void release(std::int64_t bytes) {
    change(-bytes);
    counters_.device_frees += 1;
  }
  AllocatorCounters& counters() { return counters_; }

 private:
  void change(std::int64_t bytes) {
    counters_.allocated += bytes;
    counters_.requested += bytes;
    counters_.reserved += bytes;
  }

  const AllocatorConfig& config_;
  AllocatorCounters counters_;
};

class Replay {
 public:
  Replay(std::span<const AllocatorEvent> events, const AllocatorConfig& config)
      : events_(events), config_(config), caching_(config), plain_(config) {
    released_.assign(events.size(), std::numeric_limits<std::int64_t>::max());
    occupied_.assign(events.size(), 0);
    result_.allocated.reserve(events.size());
    result_.reserved.reserve(events.size());
  }

  ReplayResult run() {
    for (std::size_t i = 0; i < events_.size(); ++i) {
      counters().reserved_high = counters().reserved;
      const bool room = step(static_cast<std::int64_t>(i), events_[i]);
      note(static_cast<std::int64_t>(i));
      if (!room) break;
      result_.events += 1;
    }
    finish();
    return std::move(result_);
  }

 private:
  bool cuda() const { return config_.kind == AllocatorKind::cuda; }
  AllocatorCounters& counters() { return cuda() ? caching_.counters() : plain_.counters(); }

  // False if memory has run out.
  bool step(std::int64_t index, const AllocatorEvent& event) {
    if (event.bytes >= 0) return allocate(index, event);
    switch (event.bytes) {
      case kEventRelease:
        release(index, event);
        break;
      case kEventUse: {
        const Known& known = live(index, event, "used by a stream");
        if (cuda() && known.block >= 0) caching_.note_use(known.block, event.stream);
        break;
      }
      case kEventComplete:
        complete(index, event);
        break;
      case kEventEmptyCache:
        if (cuda()) caching_.empty_cache();
        break;
      default:
        fail(index, event,
             "has " + std::to_string(event.bytes) +
                 " bytes; sizes are 0 or more, -1 releases, -2 is a use by another stream, -3 its "
                 "end, -4 empties the cache");
    }
    return true;
  }

  [[noreturn]] static void fail(std::int64_t index, const AllocatorEvent& event,
                                const std::string& what) {
    throw EventError(
        "event " + std::to_string(index) + ": block " + std::to_string(event.id) + " " + what,
        index);
  }

  Known& live(std::int64_t index, const AllocatorEvent& event, const char* what) {
    Known& known = ids_.find(event.id);
    if (known.state == IdState::unknown) {
      fail(index, event, std::string("is ") + what + " but was never allocated");
    }
    if (known.state != IdState::live) {
      fail(index, event,
           std::string("is ") + what + " but was released before; it was last allocated by event " +
               std::to_string(known.event));
    }
    return known;
  }

  bool allocate(std::int64_t index, const AllocatorEvent& event) {
    Known& known = ids_.find(event.id);
    if (known.state == IdState::live || known.state == IdState::awaiting) {
      fail(index, event,
           std::string("is allocated but still ") +
               (known.state == IdState::live ? "alive" : "awaiting another stream") +
               " since event " + std::to_string(known.event));
    }
    if (event.bytes > kAllocatorMostBytes) {
      fail(index, event,
           "asks for " + std::to_string(event.bytes) + " bytes; sizes are in bytes, 2^60 at most");
    }
    if (known.state == IdState::unknown) ids_.count_new();
    known.state = IdState::live;
    known.event = index;
    known.block = -1;
    known.bytes = 0;
    if (event.bytes == 0) return true;  // torch gives a null pointer, no block
    try {
      if (cuda()) {
        const auto block = caching_.allocate(event.bytes, event.stream, index);
        if (!block) return run_out(index, event);
        known.block = *block;
        known.bytes = caching_.bytes(*block);
      } else {
        if (!plain_.allocate(event.bytes)) return run_out(index, event);
        known.bytes = event.bytes;
      }
    } catch (const InvalidArgument& error) {
      fail(index, event, "asks for " + std::to_string(event.bytes) + " bytes: " + error.what());
    }
    occupied_[static_cast<std::size_t>(index)] = known.bytes;
    return true;
  }

  bool run_out(std::int64_t index, const AllocatorEvent& event) {
    const std::int64_t bound =
        std::min(config_.limit.value_or(std::numeric_limits<std::int64_t>::max()),
                 config_.device_memory.value_or(std::numeric_limits<std::int64_t>::max()));
    result_.out_of_memory = {index, event.id, event.bytes,
                             cuda() ? caching_.device_bytes(event.bytes) : event.bytes,
                             // Expandable segments can pass the limit by less than a granule.
                             std::max(bound - counters().reserved, std::int64_t{0}),
                             counters().reserved, counters().allocated, event.stream, event.tag};
    return false;
  }

  void release(std::int64_t index, const AllocatorEvent& event) {
    Known& known = live(index, event, "released");
    known.state = IdState::released;
    released_[static_cast<std::size_t>(known.event)] = index;
    if (known.bytes == 0) return;
    if (!cuda()) {
      plain_.release(known.bytes);
    } else if (caching_.release(known.block) == BlockState::awaiting) {
      known.state = IdState::awaiting;
    }
  }

  void complete(std::int64_t index, const AllocatorEvent& event) {
    Known& known = ids_.find(event.id);
    if (known.state == IdState::unknown) fail(index, event, "is completed but was never allocated");
    if (known.state == IdState::live) fail(index, event, "is completed but was not released");
    if (known.state == IdState::awaiting) caching_.complete(known.event);
    known.state = IdState::released;
  }

  void note(std::int64_t index) {
    const AllocatorCounters& now = counters();
    result_.allocated.push_back(now.allocated);
    result_.reserved.push_back(now.reserved_high);
    if (now.allocated > result_.peak_allocated) {
      result_.peak_allocated = now.allocated;
      result_.peak_allocated_event = index;
      result_.reserved_at_peak = now.reserved;
      result_.requested_at_peak = now.requested;
    }
    if (now.reserved_high > result_.peak_reserved) {
      result_.peak_reserved = now.reserved_high;
      result_.peak_reserved_event = index;
      result_.allocated_at_peak_reserved = now.allocated;
    }
  }

  void finish() {
    if (result_.peak_reserved > 0) {
      result_.fragmentation = 1.0 - static_cast<double>(result_.allocated_at_peak_reserved) /
                                        static_cast<double>(result_.peak_reserved);
    }
    result_.end = counters();
    if (cuda()) result_.segments = caching_.segments();
    if (!result_.peak_allocated_event) return;
    const std::int64_t peak = *result_.peak_allocated_event;
    for (std::int64_t i = 0; i <= peak; ++i) {
      const auto at = static_cast<std::size_t>(i);
      if (occupied_[at] == 0 || released_[at] <= peak) continue;
      const AllocatorEvent& event = events_[at];
      result_.peak_blocks.push_back(
          {event.id, occupied_[at], event.bytes, event.stream, event.tag, i});
    }
    std::stable_sort(result_.peak_blocks.begin(), result_.peak_blocks.end(),
                     [](const PeakBlock& a, const PeakBlock& b) { return a.bytes > b.bytes; });
  }

  const std::span<const AllocatorEvent> events_;
  const AllocatorConfig& config_;
  CachingAllocator caching_;
  PlainAllocator plain_;
  IdTable ids_;
  std::vector<std::int64_t> released_;  // by the index of the allocation: that of its release
  std::vector<std::int64_t> occupied_;  // likewise: the bytes of its block
  ReplayResult result_;
};

void check_bound(const std::optional<std::int64_t>& bytes, const char* name) {
  if (bytes && (*bytes < 0 || *bytes > kAllocatorMostBytes)) {
    throw InvalidArgument(std::string(name) + " is " + std::to_string(*bytes) +
                          "; it is in bytes, 0 to 2^60, or none");
  }
}

void check_whole_mib(std::int64_t bytes, std::int64_t least, const char* name) {
  if (bytes < least || bytes % kMiB != 0 || bytes > kAllocatorMostBytes) {
    throw InvalidArgument(std::string(name) + " is " + std::to_string(bytes) +
                          " bytes; it is whole MiB, at least " + std::to_string(least / kMiB));
  }
}

}  // namespace

void check(const AllocatorConfig& config) {
  check_bound(config.limit, "limit");
  check_bound(config.device_memory, "device_memory");
  // torch: more than 10 MiB, or the requests that share such a segment would not fit.
  check_whole_mib(config.large_segment_size, kAllocatorLargeRequest + kMiB, "large_segment_size");
  if (config.max_split_size) {
    check_whole_mib(*config.max_split_size, std::max(20 * kMiB, config.large_segment_size),
                    "max_split_size");
  }
  check_whole_mib(config.max_non_split_rounding_size, 20 * kMiB, "max_non_split_rounding_size");
  const double threshold = config.garbage_collection_threshold;
  if (!(threshold >= 0 && threshold < 1)) {
    throw InvalidArgument("garbage_collection_threshold is " + std::to_string(threshold) +
                          "; it is a share of the limit between 0 (never) and 1");
  }
  for (const std::int64_t divisions : config.roundup_power2_divisions) {
    if (divisions < 0 ||
        (divisions != 0 && !std::has_single_bit(static_cast<std::uint64_t>(divisions)))) {
      throw InvalidArgument("roundup_power2_divisions has " + std::to_string(divisions) +
                            "; each is a power of two, or 0 for plain rounding");
    }
  }
}

std::vector<TimelinePoint> ReplayResult::timeline(std::optional<std::int64_t> max_points) const {
  const auto count = static_cast<std::int64_t>(allocated.size());
  if (max_points && *max_points < 1) {
    throw InvalidArgument("max_points is " + std::to_string(*max_points) + "; it is 1 or more");
  }
  const std::int64_t intervals = std::min(count, max_points.value_or(count));
  std::vector<TimelinePoint> points;
  points.reserve(static_cast<std::size_t>(intervals));
  std::int64_t begin = 0;
  for (std::int64_t k = 0; k < intervals; ++k) {
    // The first intervals are one event longer where the events do not divide evenly.
    const std::int64_t end = count / intervals * (k + 1) + std::min(k + 1, count % intervals);
    TimelinePoint point{begin, allocated[static_cast<std::size_t>(begin)], 0};
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      if (allocated[at] > point.allocated) {
        point.event = i;
        point.allocated = allocated[at];
      }
      point.reserved = std::max(point.reserved, reserved[at]);
    }
    points.push_back(point);
    begin = end;
  }
  return points;
}

ReplayResult replay(std::span<const AllocatorEvent> events, const AllocatorConfig& config) {
  check(config);
  if (events.size() >= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()) / 2) {
    throw InvalidArgument("a trace has 2^30 events at most; replay it in parts");
  }
  return Replay(events, config).run();
}

}  // namespace vramkit
