// Python's view of the allocator simulator: a buffer of events in, a ReplayResult out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bindings/bindings.hpp"
#include "core/allocator_simulator.hpp"
#include "core/error.hpp"

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

constexpr std::int64_t kColumns = 4;

AllocatorKind kind_of(const std::string& name) {
  if (name == "cuda") return AllocatorKind::cuda;
  if (name == "cpu") return AllocatorKind::cpu;
  throw InvalidArgument("unknown kind of allocator '" + name + "'; there are 'cuda' and 'cpu'");
}

const char* name_of(BlockState state) {
  switch (state) {
    case BlockState::live:
      return "live";
    case BlockState::awaiting:
      return "awaiting";
    case BlockState::free:
    case BlockState::unmapped:
      break;
  }
  return "free";
}

// A view of the caller's memory; `info` keeps it alive.
std::span<const AllocatorEvent> events_in(const py::buffer_info& info) {
  const std::string& format = info.format;
  const char type = format.empty() ? '\0' : format.back();
  const bool prefix =
      format.size() == 1 || (format.size() == 2 && format[0] != '>' && format[0] != '!');
  if (info.itemsize != 8 || !prefix || (type != 'q' && type != 'l')) {
    throw py::type_error(
        "events are 64-bit integers (numpy.int64, array('q')), not of the buffer "
        "format '" +
        format + "'");
  }
  std::string shape = "[";
  for (const py::ssize_t size : info.shape) shape += std::to_string(size) + ", ";
  if (shape.size() > 1) shape.resize(shape.size() - 2);
  shape += "]";
  const bool table = info.ndim == 2 && info.shape[1] == kColumns;
  if (!table && !(info.ndim == 1 && info.shape[0] % kColumns == 0)) {
    throw InvalidArgument(
        "events have the shape [n, 4] (id, bytes, stream, tag), or are flat with 4 "
        "numbers each; got " +
        shape);
  }
  const bool contiguous =
      info.size == 0 || (info.strides.back() == 8 &&
                         (!table || info.shape[0] == 1 || info.strides[0] == 8 * kColumns));
  if (!contiguous) {
    throw InvalidArgument(
        "events lie one after another in memory (C-contiguous); copy them first, as "
        "numpy.ascontiguousarray does");
  }
  return {static_cast<const AllocatorEvent*>(info.ptr),
          static_cast<std::size_t>(info.size / kColumns)};
}

void bind_config(py::module_& m) {
  using Divisions = std::vector<std::int64_t>;
  py::class_<AllocatorConfig>(
      m, "AllocatorConfig",
      "What an allocator is told before it runs: torch's options, under torch's names, in bytes.")
      .def(py::init([](const std::string& kind, std::optional<std::int64_t> limit,
                       std::optional<std::int64_t> device_memory,
                       std::optional<std::int64_t> max_split_size,
                       std::int64_t max_non_split_rounding_size, std::int64_t large_segment_size,
                       double garbage_collection_threshold, bool expandable_segments,
                       const Divisions& roundup_power2_divisions) {
             AllocatorConfig config;
             config.kind = kind_of(kind);
             config.limit = limit;
             config.device_memory = device_memory;
             config.max_split_size = max_split_size;
             config.max_non_split_rounding_size = max_non_split_rounding_size;
             config.large_segment_size = large_segment_size;
             config.garbage_collection_threshold = garbage_collection_threshold;
             config.expandable_segments = expandable_segments;
             auto& divisions = config.roundup_power2_divisions;
             if (roundup_power2_divisions.size() == 1) {
               divisions.fill(roundup_power2_divisions[0]);
             } else if (roundup_power2_divisions.size() == divisions.size()) {
               std::copy(roundup_power2_divisions.begin(), roundup_power2_divisions.end(),
                         divisions.begin());
             } else if (!roundup_power2_divisions.empty()) {
               throw InvalidArgument("roundup_power2_divisions has " +
                                     std::to_string(roundup_power2_divisions.size()) +
                                     " numbers; it has none, 1 for all sizes, or 16");
             }
             check(config);
             return config;
           }),
           py::arg("kind") = "cuda", py::kw_only(), py::arg("limit") = py::none(),
           py::arg("device_memory") = py::none(), py::arg("max_split_size") = py::none(),
           py::arg("max_non_split_rounding_size") = AllocatorConfig().max_non_split_rounding_size,
           py::arg("large_segment_size") = AllocatorConfig().large_segment_size,
           py::arg("garbage_collection_threshold") = 0.0, py::arg("expandable_segments") = false,
           py::arg("roundup_power2_divisions") = Divisions{},
           R"(kind: 'cuda' (the caching allocator) or 'cpu' (no caching).
limit: bytes that the process may reserve; device_memory: bytes that the device has; None: no bound.
roundup_power2_divisions: one number for all sizes, or 16 for sizes below 2 MiB, 4 MiB, ... 64 GiB
and above; each a power of two, or 0.
Raises ValueError for what torch refuses too; docs/allocator.md has the rules.)")
      .def_property_readonly("kind",
                             [](const AllocatorConfig& config) {
                               return config.kind == AllocatorKind::cuda ? "cuda" : "cpu";
                             })
      .def_readonly("limit", &AllocatorConfig::limit)
      .def_readonly("device_memory", &AllocatorConfig::device_memory)
      .def_readonly("max_split_size", &AllocatorConfig::max_split_size)
      .def_readonly("max_non_split_rounding_size", &AllocatorConfig::max_non_split_rounding_size)
      .def_readonly("large_segment_size", &AllocatorConfig::large_segment_size)
      .def_readonly("garbage_collection_threshold", &AllocatorConfig::garbage_collection_threshold)
      .def_readonly("expandable_segments", &AllocatorConfig::expandable_segments)
      .def_property_readonly("roundup_power2_divisions", [](const AllocatorConfig& config) {
        return Divisions(config.roundup_power2_divisions.begin(),
                         config.roundup_power2_divisions.end());
      });
}

void bind_parts(py::module_& m) {
  py::class_<PeakBlock>(m, "PeakBlock", "A block that was alive when most was allocated.")
      .def_readonly("id", &PeakBlock::id)
      .def_readonly("bytes", &PeakBlock::bytes, "what it occupied, rounding included")
      .def_readonly("requested_bytes", &PeakBlock::requested)
      .def_readonly("stream", &PeakBlock::stream)
      .def_readonly("tag", &PeakBlock::tag)
      .def_readonly("event", &PeakBlock::event, "index of its allocation");
  py::class_<OutOfMemory>(m, "OutOfMemory", "Where the replay ran out of memory.")
      .def_readonly("event", &OutOfMemory::event, "index of the allocation that failed")
      .def_readonly("id", &OutOfMemory::id)
      .def_readonly("requested_bytes", &OutOfMemory::requested)
      .def_readonly("needed_bytes", &OutOfMemory::needed,
                    "what it would have taken from the device: the segment for it")
      .def_readonly("free_bytes", &OutOfMemory::free, "what the limit and the device still left")
      .def_readonly("reserved_bytes", &OutOfMemory::reserved)
      .def_readonly("allocated_bytes", &OutOfMemory::allocated)
      .def_readonly("stream", &OutOfMemory::stream)
      .def_readonly("tag", &OutOfMemory::tag);
  py::class_<BlockInfo>(m, "AllocatorBlock", "One block of a segment at the end of a replay.")
      .def_readonly("offset", &BlockInfo::offset, "as its segment's: in bytes")
      .def_readonly("bytes", &BlockInfo::bytes)
      .def_readonly("requested_bytes", &BlockInfo::requested, "0 if free")
      .def_readonly("event", &BlockInfo::owner, "index of its allocation, -1 if free")
      .def_property_readonly(
          "state", [](const BlockInfo& block) { return name_of(block.state); },
          "'free', 'live', or 'awaiting' another stream");
  py::class_<SegmentInfo>(
      m, "AllocatorSegment",
      "Memory taken from the device, or one mapped run of an expandable segment.")
      .def_readonly("serial", &SegmentInfo::serial, "segments count up as they are made")
      .def_readonly("offset", &SegmentInfo::offset, "of the run in its segment, else 0")
      .def_readonly("bytes", &SegmentInfo::bytes)
      .def_readonly("stream", &SegmentInfo::stream)
      .def_readonly("small", &SegmentInfo::small)
      .def_readonly("expandable", &SegmentInfo::expandable)
      .def_property_readonly(
          "blocks", [](const SegmentInfo& segment) { return segment.blocks; },
          "AllocatorBlocks by offset; a new list at each access");
}

void bind_result(py::module_& m) {
  py::class_<ReplayResult>(m, "ReplayResult", "What a replay came to; sizes are in bytes.")
      .def_readonly("events", &ReplayResult::events, "events replayed: all, unless memory ran out")
      .def_readonly("peak_allocated_bytes", &ReplayResult::peak_allocated)
      .def_readonly("peak_allocated_event", &ReplayResult::peak_allocated_event,
                    "index of the first event after which that much was allocated")
      .def_readonly("reserved_at_peak_bytes", &ReplayResult::reserved_at_peak)
      .def_readonly("requested_at_peak_bytes", &ReplayResult::requested_at_peak)
      .def_readonly("peak_reserved_bytes", &ReplayResult::peak_reserved)
      .def_readonly("peak_reserved_event", &ReplayResult::peak_reserved_event)
      .def_readonly("allocated_at_peak_reserved_bytes", &ReplayResult::allocated_at_peak_reserved)
      .def_readonly("fragmentation", &ReplayResult::fragmentation,
                    "1 - allocated_at_peak_reserved_bytes / peak_reserved_bytes; 0 if none")
      .def_property_readonly("allocated_bytes",
                             [](const ReplayResult& r) { return r.end.allocated; })
      .def_property_readonly("reserved_bytes", [](const ReplayResult& r) { return r.end.reserved; })
      .def_property_readonly("requested_bytes",
                             [](const ReplayResult& r) { return r.end.requested; })
      .def_property_readonly(
          "awaiting_bytes", [](const ReplayResult& r) { return r.end.awaiting; },
          "released, and not yet free because another stream used it")
      .def_property_readonly(
          "device_allocations", [](const ReplayResult& r) { return r.end.device_allocations; },
          "segments taken from the device, or ranges mapped; on the CPU every allocation")
      .def_property_readonly("device_frees",
                             [](const ReplayResult& r) { return r.end.device_frees; })
      .def_property_readonly(
          "retries", [](const ReplayResult& r) { return r.end.retries; },
          "allocations tried again after all cached memory was given back")
      .def_readonly("out_of_memory", &ReplayResult::out_of_memory)
      .def_property_readonly(
          "segments", [](const ReplayResult& r) { return r.segments; },
          "AllocatorSegments at the end, in the order of their making; a new list at each access")
      .def(
          "peak_blocks",
          [](const ReplayResult& r, std::optional<std::int64_t> most) {
            if (most && *most < 0) throw InvalidArgument("most is 0 or more");
            const auto count =
                std::min<std::size_t>(r.peak_blocks.size(), most ? static_cast<std::size_t>(*most)
                                                                 : r.peak_blocks.size());
            return std::vector<PeakBlock>(
                r.peak_blocks.begin(), r.peak_blocks.begin() + static_cast<std::ptrdiff_t>(count));
          },
          py::arg("most") = py::none(),
          "The blocks alive at peak_allocated_event, largest first; at most `most` of them.")
      .def(
          "timeline",
          [](const ReplayResult& r, std::optional<std::int64_t> max_points) {
            py::list points;
            for (const TimelinePoint& p : r.timeline(max_points)) {
              points.append(py::make_tuple(p.event, p.allocated, p.reserved));
            }
            return points;
          },
          py::arg("max_points") = py::none(),
          R"((event, allocated, reserved) after each event, or of at most `max_points` intervals.

Of an interval the most that was allocated and the most that was reserved; `event` is the first with
that much allocated. An allocation that ran out of memory is the last event.)");
}

}  // namespace

void bind_allocator(py::module_& m) {
  bind_config(m);
  bind_parts(m);
  bind_result(m);
  m.def(
      "replay",
      [](const py::buffer& events, const AllocatorConfig& config) {
        const py::buffer_info info = events.request();
        const auto view = events_in(info);
        py::gil_scoped_release release;
        return replay(view, config);
      },
      py::arg("events"), py::arg("config"),
      R"(Replays allocations and releases through a model of torch's allocator.

events: a C-contiguous int64 buffer [n, 4], or flat, of (block id, bytes, stream, tag); bytes >= 0
allocates, -1 releases, -2: the block is used by `stream` too, -3: those uses of the released block
are over, -4 empties the cache. Nothing of it is kept.
Raises EventError (a ValueError with the event's index) for events that cannot be, ValueError for
another shape, TypeError for another dtype.)");
}

}  // namespace vramkit::bindings
