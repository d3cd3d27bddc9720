// Python's view of loading whole files: many runs at once into memory, and files as memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "bindings/signals.hpp"
#include "core/engine/bulk_read.hpp"
#include "core/engine/mapping.hpp"
#include "core/platform/file.hpp"
#include "core/safetensors.hpp"

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

// A part of a store that goes back to the system when nothing refers to it any more.
class HostPart {
 public:
  HostPart(std::shared_ptr<HostStore> store, std::int64_t offset, std::int64_t bytes)
      : store_(std::move(store)), offset_(offset), bytes_(bytes) {
    if (offset < 0 || bytes < 0 || offset > store_->bytes() - bytes) {
      throw InvalidArgument("a store of " + std::to_string(store_->bytes()) + " bytes has no " +
                            std::to_string(bytes) + " at " + std::to_string(offset));
    }
  }
  HostPart(const HostPart&) = delete;
  HostPart& operator=(const HostPart&) = delete;
  ~HostPart() { store_->discard(offset_, bytes_); }

  std::byte* data() const { return store_->data() + offset_; }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<HostStore> store_;
  std::int64_t offset_;
  std::int64_t bytes_;
};

py::buffer_info bytes_at(std::byte* start, std::int64_t bytes) {
  return {reinterpret_cast<std::uint8_t*>(start), static_cast<py::ssize_t>(bytes)};
}

using Run = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::uintptr_t>;

py::dict read_all(const std::vector<std::shared_ptr<FileSource>>& files,
                  const std::vector<Run>& wanted, bool whole_units, std::int64_t threads,
                  std::int64_t piece, const py::object& progress) {
  const std::vector<std::shared_ptr<const Source>> sources(files.begin(), files.end());
  std::vector<ReadRun> runs;
  runs.reserve(wanted.size());
  for (const auto& [source, offset, bytes, address] : wanted) {
    runs.push_back({source, offset, bytes, reinterpret_cast<std::byte*>(address)});
  }
  const bool told = !progress.is_none();
  std::int64_t said = 0;
  const auto watch = [&](std::int64_t done) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) return true;
    if (told && done > said) progress(done - said);
    said = done;
    return false;
  };
  const auto by_path = with_signals([&] {
    return read_runs(sources, runs, {threads, piece, whole_units}, watch);
  });
  py::dict paths;
  for (const ReadPath path :
       {ReadPath::memory, ReadPath::cached, ReadPath::direct, ReadPath::plain}) {
    paths[to_string(path)] = by_path[static_cast<std::size_t>(path)];
  }
  return paths;
}

}  // namespace

void bind_loading(py::module_& m) {
  py::class_<HostPart>(m, "HostPart", py::buffer_protocol(),
                       "A part of a HostStore; its memory goes back to the system with it.")
      .def(py::init<std::shared_ptr<HostStore>, std::int64_t, std::int64_t>(), py::arg("store"),
           py::arg("offset"), py::arg("bytes"))
      .def_buffer([](HostPart& part) { return bytes_at(part.data(), part.bytes()); })
      .def_property_readonly("bytes", &HostPart::bytes);
  py::class_<FileMapping, std::shared_ptr<FileMapping>>(
      m, "FileMapping", py::buffer_protocol(),
      R"(A block as memory: extents of files, mapped at their places in it.

The mapping is private: what is written to it never reaches the files. What no extent covers must
not be touched. Raises ValueError for extents that do not lie in the block as pages lie in their
file, MemoryError where the system has no addresses left.)")
      .def(py::init([](const std::vector<std::shared_ptr<FileSource>>& files,
                       std::vector<Extent> extents, std::int64_t bytes) {
             return std::make_shared<FileMapping>(FileMapping::Files(files.begin(), files.end()),
                                                  std::move(extents), bytes);
           }),
           py::arg("files"), py::arg("extents"), py::arg("bytes"))
      .def_buffer([](FileMapping& mapping) { return bytes_at(mapping.data(), mapping.bytes()); })
      .def_property_readonly("bytes", &FileMapping::bytes)
      .def_property_readonly("address",
                             [](const FileMapping& mapping) {
                               return reinterpret_cast<std::uintptr_t>(mapping.data());
                             })
      .def(
          "find",
          [](const FileMapping& mapping, std::uintptr_t address, std::int64_t bytes) {
            return mapping.find(reinterpret_cast<const std::byte*>(address), bytes);
          },
          py::arg("address"), py::arg("bytes"),
          "The Extent of these bytes of memory: of which file, where there, and where in the "
          "block. "
          "None if they are no part of one extent.")
      .def("changed", &FileMapping::changed, py::arg("begin"), py::arg("bytes"),
           py::call_guard<py::gil_scoped_release>(),
           "Whether a page of these bytes of the block was written to.");
  m.def(
      "source_of",
      [](const SafetensorsFile& file, bool direct) {
        const py::gil_scoped_release unlocked;
        return source_of(file, direct ? DirectReads::automatic : DirectReads::off);
      },
      py::arg("file"), py::arg("direct") = true,
      R"(The file as a FileSource.

Raises FileChangedError if its name means another file by now, or it was written to.)");
  m.def(
      "open_unnamed_file",
      [](const std::string& folder, int) { return open_unnamed_file(folder).release(); },
      py::arg("folder"), py::arg("flags") = 0,
      "An opener for open(folder, 'wb', opener=…): a new file that has no name in the folder. "
      "`flags` are not used. OSError.");
  m.def("read_runs", &read_all, py::arg("files"), py::arg("runs"), py::kw_only(),
        py::arg("whole_units") = false, py::arg("threads") = 2,
        py::arg("piece") = std::int64_t{8} << 20, py::arg("progress") = py::none(),
        R"(Read (file, offset, bytes, address) runs into memory, several pieces at once.

`whole_units`: all of each unit of 4096 bytes that a run touches in memory may be written.
`progress` is called with the bytes that have come since it was last called. Returns bytes by the
way that they were read. The addresses must stay valid; after an error their content is unspecified.

Raises ValueError for runs that a file does not have, OSError if the system cannot read,
FileChangedError if a file has changed since it was opened, MemoryError, what a signal's handler
raised, and what `progress` raises.)");
}

}  // namespace vramkit::bindings
