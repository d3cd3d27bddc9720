// Python's view of the checkpoint reader and writer: buffers come as address and size, so that
// this module needs neither torch nor numpy, and the interpreter lock is released during I/O.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.hpp"
#include "core/safetensors.hpp"
#include "core/safetensors_writer.hpp"

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

using Path = std::filesystem::path;
using SpecTuple = std::tuple<std::string, std::string, std::vector<std::int64_t>>;

std::vector<TensorInfo> to_vector(std::span<const TensorInfo> tensors) {
  return {tensors.begin(), tensors.end()};
}

std::unique_ptr<SafetensorsFile> open_file(const Path& path) {
  const py::gil_scoped_release unlocked;
  return std::make_unique<SafetensorsFile>(path.string());
}

std::unique_ptr<SafetensorsWriter> make_writer(
    const Path& path, std::vector<SpecTuple> tensors,
    std::optional<std::map<std::string, std::string>> metadata) {
  const py::gil_scoped_release unlocked;
  std::vector<TensorSpec> specs;
  specs.reserve(tensors.size());
  for (auto& [name, dtype, shape] : tensors) {
    specs.push_back({std::move(name), std::move(dtype), std::move(shape)});
  }
  return std::make_unique<SafetensorsWriter>(
      path.string(), specs, metadata ? std::move(*metadata) : std::map<std::string, std::string>());
}

void read_into(const SafetensorsFile& file, const std::string& name, std::uintptr_t ptr,
               std::int64_t nbytes, std::optional<std::int64_t> offset, bool drop_cache) {
  const py::gil_scoped_release unlocked;
  void* const dst = reinterpret_cast<void*>(ptr);
  if (offset) {
    file.read_range(name, *offset, dst, nbytes, drop_cache);
  } else {
    file.read_into(name, dst, nbytes, drop_cache);
  }
}

void write(SafetensorsWriter& writer, const std::string& name, std::uintptr_t ptr,
           std::int64_t nbytes, std::int64_t offset) {
  const py::gil_scoped_release unlocked;
  writer.write(name, reinterpret_cast<const void*>(ptr), nbytes, offset);
}

void bind_reader(py::module_& m) {
  py::class_<SafetensorsFile>(m, "SafetensorsFile",
                              R"(An open safetensors file whose header has been checked.

The header is refused unless it has exactly one meaning: names and fields once each, known dtypes,
sizes that match, and tensors that fill the file without gap or overlap. Immutable; several threads
may read at once.

Raises CheckpointError for a file that is not sound (the text names the file and the tensor) and
OSError if it cannot be opened or read.)")
      .def(py::init(&open_file), py::arg("path"))
      .def_property_readonly("path", [](const SafetensorsFile& f) { return Path(f.path()); })
      .def_property_readonly("file_bytes", &SafetensorsFile::file_bytes,
                             "Size of the file in bytes.")
      .def("names", &SafetensorsFile::names, "Names of the tensors, in the order of their bytes.")
      .def(
          "tensors", [](const SafetensorsFile& f) { return to_vector(f.tensors()); },
          "TensorInfo of every tensor, in the order of their bytes.")
      .def(
          "info", [](const SafetensorsFile& f, const std::string& name) { return f.info(name); },
          py::arg("name"), "TensorInfo of one tensor. Raises CheckpointError if it is not there.")
      .def("metadata", &SafetensorsFile::metadata, "The header's __metadata__ as dict[str, str].")
      .def("read_into", &read_into, py::arg("name"), py::arg("ptr"), py::arg("nbytes"),
           py::kw_only(), py::arg("offset") = py::none(), py::arg("drop_cache") = false,
           R"(Read a tensor's bytes to the address `ptr`, which must have room for `nbytes`.

Without `offset` the whole tensor is read and `nbytes` must be its size; with it, `nbytes` bytes
from that byte of the tensor on. `drop_cache` lets the system forget the pages that were read.

Raises CheckpointError if the tensor is not there or the file became shorter after it was opened,
ValueError if the sizes do not fit, OSError if the system cannot read.)")
      .def("__contains__",
           [](const SafetensorsFile& f, const std::string& name) { return f.contains(name); })
      .def("__len__", [](const SafetensorsFile& f) { return f.tensors().size(); })
      .def("__repr__", [](const SafetensorsFile& f) {
        return py::str("SafetensorsFile({!r}, {} tensors, {} bytes)")
            .format(py::str(py::cast(Path(f.path()))), f.tensors().size(), f.file_bytes());
      });
}

void bind_writer(py::module_& m) {
  py::class_<SafetensorsWriter>(m, "SafetensorsWriter",
                                R"(Writes a safetensors file tensor by tensor, or part by part.

`tensors` lists (name, dtype, shape) in the order that they get in the file; dtype is the format's
own name, such as "BF16". Disk space is reserved at once. Tensors may then be written in any order;
`commit()` puts the finished file in its place. Until then a file of that name stays as it was, and
leaving the writer (as a context manager, or by dropping it) without `commit()` leaves nothing
behind. Several threads may write at once.

Raises ValueError for names, dtypes or sizes that cannot be stored, and OSError, with the bytes
needed, where the system refuses.)")
      .def(py::init(&make_writer), py::arg("path"), py::arg("tensors"),
           py::arg("metadata") = py::none())
      .def_property_readonly("path", [](const SafetensorsWriter& w) { return Path(w.path()); })
      .def_property_readonly("file_bytes", &SafetensorsWriter::file_bytes,
                             "Size of the finished file in bytes.")
      .def_property_readonly("committed", &SafetensorsWriter::committed)
      .def(
          "tensors", [](const SafetensorsWriter& w) { return to_vector(w.tensors()); },
          "TensorInfo of every tensor, in the order of their bytes.")
      .def(
          "info", [](const SafetensorsWriter& w, const std::string& name) { return w.info(name); },
          py::arg("name"), "TensorInfo of one tensor. Raises ValueError if it was not declared.")
      .def(
          "write", &write, py::arg("name"), py::arg("ptr"), py::arg("nbytes"), py::kw_only(),
          py::arg("offset") = 0,
          R"(Write `nbytes` bytes from the address `ptr` to the tensor, from byte `offset` of it on.

Raises ValueError if they do not lie within the tensor or were written before, OSError if the
system refuses; the unfinished file is then gone and the writer takes no more.)")
      .def("commit", &SafetensorsWriter::commit, py::call_guard<py::gil_scoped_release>(),
           R"(Flush the file to the disk and rename it to its place.

Raises ValueError naming a tensor that is not complete, OSError if the system refuses.)")
      .def("discard", &SafetensorsWriter::discard, py::call_guard<py::gil_scoped_release>(),
           "Give up and remove the unfinished file. Does nothing after commit().")
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__",
           [](SafetensorsWriter& w, const py::args&) {
             const py::gil_scoped_release unlocked;
             w.discard();
           })
      .def("__repr__", [](const SafetensorsWriter& w) {
        return py::str("SafetensorsWriter({!r}, {} tensors, {} bytes)")
            .format(py::str(py::cast(Path(w.path()))), w.tensors().size(), w.file_bytes());
      });
}

}  // namespace

void bind_checkpoint(py::module_& m) {
  py::class_<TensorInfo>(m, "TensorInfo",
                         "One tensor of a safetensors file: name, dtype (the format's own name), "
                         "shape, nbytes, and begin and end as byte offsets in the file.")
      .def_readonly("name", &TensorInfo::name)
      .def_readonly("dtype", &TensorInfo::dtype)
      .def_readonly("shape", &TensorInfo::shape)
      .def_property_readonly("nbytes", &TensorInfo::bytes)
      .def_readonly("begin", &TensorInfo::begin)
      .def_readonly("end", &TensorInfo::end)
      .def("__repr__", [](const TensorInfo& t) {
        return py::str("TensorInfo(name={!r}, dtype={!r}, shape={!r}, nbytes={}, begin={}, end={})")
            .format(t.name, t.dtype, t.shape, t.bytes(), t.begin, t.end);
      });
  bind_reader(m);
  bind_writer(m);
  m.def(
      "safetensors_dtypes",
      [] {
        py::dict bits;
        for (const auto& [name, width] : safetensors_dtypes()) bits[py::str(name)] = width;
        return bits;
      },
      "Bits of an element by the format's dtype name.");
  m.def(
      "safetensors_bytes",
      [](const std::string& dtype, const std::vector<std::int64_t>& shape) {
        return vramkit::safetensors_bytes(dtype, shape);
      },
      py::arg("dtype"), py::arg("shape"),
      "Bytes of a tensor. Raises ValueError for an unknown dtype or an impossible shape.");
}

}  // namespace vramkit::bindings
