// Python's view of the offload engine. Calls that may wait release the GIL; the engine asks every
// few hundredths of a second whether a signal has come, so that Ctrl-C ends a wait.
#include "core/engine/engine.hpp"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "bindings/cuda.hpp"
#include "bindings/signals.hpp"
#include "bindings/view.hpp"
#include "core/engine/block_cache.hpp"
#include "core/engine/pressure.hpp"
#include "core/engine/relief.hpp"
#include "core/error.hpp"

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

// A Python object that memory belongs to, let go of under the GIL whoever lets go of it.
std::shared_ptr<const void> keeper_of(py::object object) {
  return {new py::object(std::move(object)), [](const void* held) {
            const py::gil_scoped_acquire acquire;
            delete static_cast<const py::object*>(held);
          }};
}

StreamHandle stream_of(std::uintptr_t stream) { return reinterpret_cast<StreamHandle>(stream); }

using Sources = std::vector<std::shared_ptr<Source>>;

std::vector<std::shared_ptr<const Source>> read_only(const Sources& sources) {
  return {sources.begin(), sources.end()};
}

std::shared_ptr<Engine> make_engine(const Sources& sources, std::vector<BlockSpec> blocks,
                                    std::int64_t limit, std::vector<std::int64_t> order,
                                    std::int64_t depth, std::int64_t slots, std::int64_t threads,
                                    std::int64_t piece, std::optional<std::int64_t> granularity,
                                    bool poison, std::int64_t timeline, const std::string& device) {
  EngineConfig config;
  const int index = device_index(device);
  if (index < 0) {
    config.backend = std::make_shared<HostBackend>(
        std::make_shared<HostMemory>(granularity.value_or(HostMemory::kLargePage)));
  } else {
    const py::gil_scoped_release release;  // a context may take a second
    config.backend = cuda_backend(index, granularity.value_or(CudaBackend::kSegment));
  }
  config.sources = read_only(sources);
  config.blocks = std::move(blocks);
  config.order = std::move(order);
  config.options = {limit, depth, slots, threads, piece, poison, timeline};
  const py::gil_scoped_release release;
  return std::make_shared<Engine>(std::move(config));
}

void bind_sources(py::module_& m) {
  py::class_<Source, std::shared_ptr<Source>>(m, "Source", "Where the bytes of blocks come from.")
      .def_property_readonly("bytes", &Source::bytes)
      .def_property_readonly("name", &Source::name);
  py::class_<FileSource, Source, std::shared_ptr<FileSource>>(m, "FileSource")
      .def(py::init([](std::string path, bool direct) {
             const py::gil_scoped_release release;
             return std::make_shared<FileSource>(
                 std::move(path), direct ? DirectReads::automatic : DirectReads::off);
           }),
           py::arg("path"), py::arg("direct") = true)
      .def_property_readonly("direct", &FileSource::direct)
      .def("check", &FileSource::check, "Raises FileChangedError if the file has changed.");
  py::class_<MemorySource, Source, std::shared_ptr<MemorySource>>(m, "MemorySource")
      .def(py::init([](std::uintptr_t address, std::int64_t bytes, py::object keeper) {
             return std::make_shared<MemorySource>(reinterpret_cast<const std::byte*>(address),
                                                   bytes, keeper_of(std::move(keeper)));
           }),
           py::arg("address"), py::arg("bytes"), py::arg("keeper"),
           "`keeper` is the object that the memory belongs to.");
  py::class_<HostStore, std::shared_ptr<HostStore>>(m, "HostStore", py::buffer_protocol(),
                                                    "Memory for blocks, in one piece.")
      .def(py::init([](std::int64_t bytes, std::int64_t granularity, const std::string& device) {
             const int index = device_index(device);
             const py::gil_scoped_release release;
             std::shared_ptr<Memory> memory;
             if (index < 0) {
               memory = std::make_shared<HostMemory>(granularity);
             } else {
               memory = cuda_backend(index, CudaBackend::kSegment)->shared_staging();
             }
             return std::make_shared<HostStore>(std::move(memory), bytes);
           }),
           py::arg("bytes"), py::arg("granularity") = HostMemory::kLargePage,
           py::arg("device") = "cpu",
           "`device`: whose copies it is for; memory for a GPU is pinned, at its exact size.")
      .def_buffer([](HostStore& store) -> py::buffer_info {
        return {reinterpret_cast<std::uint8_t*>(store.data()),
                static_cast<py::ssize_t>(store.bytes())};
      })
      .def_property_readonly("bytes", &HostStore::bytes)
      .def("source", [](const std::shared_ptr<HostStore>& store) { return source_of(store); });
}

void bind_layouts(py::module_& m) {
  py::class_<Extent>(m, "Extent", "A run of bytes that a block takes from a source.")
      .def(py::init([](std::int64_t source, std::int64_t source_offset, std::int64_t block_offset,
                       std::int64_t bytes) {
             return Extent{source, source_offset, block_offset, bytes};
           }),
           py::arg("source"), py::arg("source_offset"), py::arg("block_offset"), py::arg("bytes"))
      .def_readonly("source", &Extent::source)
      .def_readonly("source_offset", &Extent::source_offset)
      .def_readonly("block_offset", &Extent::block_offset)
      .def_readonly("bytes", &Extent::bytes);
  py::class_<BlockLayout>(m, "BlockLayout", "Where the ranges of a block lie in it.")
      .def_readonly("bytes", &BlockLayout::bytes)
      .def_readonly("extents", &BlockLayout::extents)
      .def_readonly("places", &BlockLayout::places)
      .def_readonly("padding", &BlockLayout::padding)
      .def_readonly("direct", &BlockLayout::direct);
  using Ranges = std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>>;
  m.def(
      "block_layout",
      [](const Ranges& ranges, bool packed) {
        std::vector<SourceRange> plain;
        for (const auto& [source, offset, bytes, alignment] : ranges) {
          plain.push_back({source, offset, bytes, alignment});
        }
        return packed ? layout_packed(plain) : layout_in_place(plain);
      },
      py::arg("ranges"), py::arg("packed") = false,
      "Lay out (source, offset, bytes, alignment) ranges as one block: such that files can be "
      "read straight into it, or packed.");
  py::enum_<Residence>(m, "Residence")
      .value("automatic", Residence::automatic)
      .value("resident", Residence::resident)
      .value("streamed", Residence::streamed);
  py::class_<BlockSpec>(m, "BlockSpec", "A block: its bytes, and where they come from.")
      .def(py::init([](std::string name, std::int64_t bytes, std::vector<Extent> extents,
                       Residence residence) {
             return BlockSpec{std::move(name), bytes, std::move(extents), residence};
           }),
           py::arg("name"), py::arg("bytes"), py::arg("extents"),
           py::arg("residence") = Residence::automatic)
      .def_readonly("name", &BlockSpec::name)
      .def_readonly("bytes", &BlockSpec::bytes)
      .def_readonly("extents", &BlockSpec::extents)
      .def_readonly("residence", &BlockSpec::residence);
}

void bind_stats(py::module_& m) {
  py::enum_<BlockStatus>(m, "BlockStatus")
      .value("absent", BlockStatus::absent)
      .value("requested", BlockStatus::requested)
      .value("copying", BlockStatus::copying)
      .value("ready", BlockStatus::ready)
      .value("in_use", BlockStatus::in_use)
      .value("released", BlockStatus::released);
  py::class_<BlockStats>(m, "BlockStats", "What the engine knows of one block.")
      .def_readonly("state", &BlockStats::state)
      .def_readonly("resident", &BlockStats::resident)
      .def_readonly("acquires", &BlockStats::acquires)
      .def_readonly("hits", &BlockStats::hits)
      .def_readonly("wait_ns", &BlockStats::wait_ns)
      .def_readonly("loads", &BlockStats::loads)
      .def_readonly("bytes", &BlockStats::bytes);
  py::class_<EngineStats>(m, "EngineStats", "Bytes, counts and times of an engine.")
      .def_readonly("limit", &EngineStats::limit)
      .def_readonly("committed", &EngineStats::committed)
      .def_readonly("staging", &EngineStats::staging)
      .def_readonly("slots", &EngineStats::slots)
      .def_readonly("slot_bytes", &EngineStats::slot_bytes)
      .def_readonly("residents", &EngineStats::residents)
      .def_readonly("resident_bytes", &EngineStats::resident_bytes)
      .def_readonly("acquires", &EngineStats::acquires)
      .def_readonly("hits", &EngineStats::hits)
      .def_readonly("waits", &EngineStats::waits)
      .def_readonly("wait_ns", &EngineStats::wait_ns)
      .def_readonly("loads", &EngineStats::loads)
      .def_readonly("dropped", &EngineStats::dropped)
      .def_readonly("cancelled", &EngineStats::cancelled)
      .def_readonly("failed", &EngineStats::failed)
      .def_readonly("displaced", &EngineStats::displaced)
      .def_readonly("given_up", &EngineStats::given_up)
      .def_readonly("regrown", &EngineStats::regrown)
      .def_readonly("bytes_copied", &EngineStats::bytes_copied)
      .def_property_readonly("bytes_by_path",
                             [](const EngineStats& stats) {
                               py::dict paths;
                               for (const ReadPath path : {ReadPath::memory, ReadPath::cached,
                                                           ReadPath::direct, ReadPath::plain}) {
                                 paths[to_string(path)] =
                                     stats.bytes_by_path[static_cast<std::size_t>(path)];
                               }
                               return paths;
                             })
      .def_readonly("copy_ns", &EngineStats::copy_ns)
      .def_readonly("active_ns", &EngineStats::active_ns)
      .def_readonly("commits", &EngineStats::commits)
      .def("__repr__", [](const EngineStats& s) {
        return "EngineStats(committed=" + std::to_string(s.committed) +
               ", limit=" + std::to_string(s.limit) + ", slots=" + std::to_string(s.slots) +
               ", residents=" + std::to_string(s.residents) + ", hits=" + std::to_string(s.hits) +
               ", waits=" + std::to_string(s.waits) +
               ", bytes_copied=" + std::to_string(s.bytes_copied) + ")";
      });
}

int device_of(const Engine& engine) {
  const auto* cuda = dynamic_cast<const CudaBackend*>(&engine.backend());
  return cuda == nullptr ? -1 : cuda->device();
}

void bind_calls(py::module_& m) {
  py::class_<View>(m, "EngineView", py::buffer_protocol(),
                   "Addresses of the engine: a buffer on the host, and DLPack everywhere.")
      .def_buffer(&View::buffer)
      .def("__dlpack_device__",
           [](const View& self) { return py::make_tuple(self.device().type, self.device().index); })
      .def(
          "__dlpack__",
          [](const View& self, const py::object&, const py::object&, const py::object&,
             const py::object&) { return self.capsule(); },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none(),
          "Bytes, uint8. acquire() has ordered the stream that it was given after the copies.");
  py::class_<Engine, std::shared_ptr<Engine>>(
      m, "Engine",
      "Blocks of bytes that are in memory when they are called; see docs/offload.md. Addresses "
      "are valid between acquire and release, in the process that made the engine.")
      .def(py::init(&make_engine), py::arg("sources"), py::arg("blocks"), py::kw_only(),
           py::arg("limit"), py::arg("order") = std::vector<std::int64_t>{}, py::arg("depth") = 1,
           py::arg("slots") = 3, py::arg("threads") = 2, py::arg("piece") = std::int64_t{8} << 20,
           py::arg("granularity") = py::none(), py::arg("poison") = false, py::arg("timeline") = 0,
           py::arg("device") = "cpu",
           "`device`: 'cpu', or 'cuda:0' and so on; `granularity`: bytes of memory taken at once, "
           "2 MiB on the host and 32 MiB on a GPU unless given.")
      .def("__len__", &Engine::blocks)
      .def(
          "acquire",
          [](Engine& self, std::int64_t block, std::uintptr_t stream) {
            const std::byte* at =
                with_signals([&] { return self.acquire(block, stream_of(stream), signalled); });
            return reinterpret_cast<std::uintptr_t>(at);
          },
          py::arg("block"), py::arg("stream") = 0, "Address of the block, until release().")
      .def(
          "release",
          [](Engine& self, std::int64_t block, std::uintptr_t stream) {
            const py::gil_scoped_release release;
            self.release(block, stream_of(stream));
          },
          py::arg("block"), py::arg("stream") = 0)
      .def("prefetch", &Engine::prefetch, py::arg("block"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "invalidate",
          [](Engine& self, std::int64_t block) {
            with_signals([&] { self.invalidate(block, signalled); });
          },
          py::arg("block"), "The block's source has changed: it is loaded again when called.")
      .def("resize", &Engine::resize, py::arg("limit"), py::call_guard<py::gil_scoped_release>())
      .def("give_up", &Engine::give_up, py::arg("bytes"), py::call_guard<py::gil_scoped_release>())
      .def(
          "park", [](Engine& self) { return with_signals([&] { return self.park(signalled); }); },
          "Gives residents and slots back until the next acquire; returns the bytes.")
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("closed", &Engine::closed)
      .def_property_readonly("minimum", &Engine::minimum)
      .def_property_readonly(
          "base", [](const Engine& self) { return reinterpret_cast<std::uintptr_t>(self.base()); })
      .def_property_readonly("reserved", &Engine::reserved)
      .def("slot_of", &Engine::slot_of, py::arg("block"))
      .def(
          "view",
          [](const std::shared_ptr<Engine>& self) {
            if (!self->contiguous()) {
              throw InvalidArgument(
                  "this device has no addresses without memory: view each block by window()");
            }
            return View(self, self->base(), self->reserved(), device_of(*self));
          },
          "All addresses as one buffer, which keeps the engine alive. Only what is acquired may be "
          "read.")
      .def(
          "window",
          [](const std::shared_ptr<Engine>& self, std::uintptr_t address, std::int64_t bytes) {
            return View(self, reinterpret_cast<std::byte*>(address), bytes, device_of(*self));
          },
          py::arg("address"), py::arg("bytes"), "`bytes` from an address that acquire() returned.")
      .def_property_readonly("contiguous", &Engine::contiguous,
                             "Whether all addresses are one range, so that view() works.")
      .def_property_readonly("device",
                             [](const Engine& self) {
                               const int index = device_of(self);
                               return index < 0 ? std::string("cpu")
                                                : "cuda:" + std::to_string(index);
                             })
      .def(
          "device_memory",
          [](const Engine& self) -> py::object {
            std::optional<DeviceMemoryInfo> info;
            {
              const py::gil_scoped_release release;
              info = self.backend().memory_info();
            }
            if (!info) return py::none();
            return py::make_tuple(info->free, info->total);
          },
          "(free, total) bytes of the GPU, whoever uses them; None on the host.")
      .def(
          "relieve",
          [](Engine& self, PressureGauge& gauge, std::int64_t most) {
            const py::gil_scoped_release release;
            return relieve(self, gauge, most);
          },
          py::arg("gauge"), py::arg("most"),
          "Looks at what is free on the GPU and moves the limit as the gauge says, to at most "
          "`most`; returns by how many bytes.")
      .def("stats", &Engine::stats)
      .def("block_stats", &Engine::block_stats, py::arg("block"))
      .def(
          "timeline",
          [](const Engine& self) {
            static constexpr const char* kKinds[] = {"copy", "wait", "use"};
            py::list records;
            for (const TimelineRecord& r : self.timeline()) {
              records.append(
                  py::make_tuple(kKinds[r.kind], r.block, r.thread, r.begin_ns, r.end_ns));
            }
            return records;
          },
          "The latest (kind, block, thread, begin_ns, end_ns), kinds copy, wait and use.")
      .def("keep_timeline", &Engine::keep_timeline, py::arg("records"),
           "From now on keep the latest `records`, 0 for none; earlier ones are forgotten.")
      .def("check", &Engine::check, "Raises an error that names the first broken invariant.");
}

void bind_cache(py::module_& m) {
  py::class_<BlockFile, std::shared_ptr<BlockFile>>(
      m, "BlockFile", "A file of a BlockCache, which stays there for as long as this does.")
      .def_property_readonly("path", &BlockFile::path)
      .def_property_readonly("offsets", &BlockFile::offsets)
      .def_property_readonly("built", &BlockFile::built);
  py::class_<BlockCache>(m, "BlockCache", "Converted block files in a folder of bounded size.")
      .def(py::init<std::string, std::int64_t>(), py::arg("folder"), py::arg("most_bytes"))
      .def(
          "open",
          [](BlockCache& self, const Sources& files, const std::vector<BlockSpec>& blocks) {
            return with_signals([&] {
              const auto sources = read_only(files);
              std::vector<std::int64_t> bytes;
              for (const BlockSpec& block : blocks) bytes.push_back(block.bytes);
              return self.open(
                  describe(sources, blocks), bytes,
                  [&](std::int64_t block, std::byte* dst) {
                    read_block(sources, blocks[static_cast<std::size_t>(block)], dst);
                  },
                  signalled);
            });
          },
          py::arg("files"), py::arg("blocks"),
          "The file with these blocks of these FileSources, built if it is not there.")
      .def("trim", &BlockCache::trim, py::arg("most"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("folder", &BlockCache::folder)
      .def_property_readonly("bytes", &BlockCache::bytes);
  py::class_<PressureGauge>(m, "PressureGauge", "When to give memory up and take it back.")
      .def(py::init([](std::int64_t low, std::int64_t high, std::int64_t patience) {
             if (low < 0 || high < low || patience < 1) {
               throw InvalidArgument(
                   "a band of pressure has 0 <= low <= high and a patience of at least 1, not " +
                   std::to_string(low) + ", " + std::to_string(high) + " and " +
                   std::to_string(patience));
             }
             return PressureGauge({low, high, patience});
           }),
           py::arg("low"), py::arg("high"), py::arg("patience") = 3)
      .def("observe", &PressureGauge::observe, py::arg("free"),
           "Bytes to change by: negative, give up so many; positive, up to so many may be taken.");
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_sources(m);
  bind_layouts(m);
  bind_stats(m);
  bind_cache(m);
  bind_calls(m);
}

}  // namespace vramkit::bindings
