// The Python module vramkit._core: formats here, the rest in files of its own, exceptions last.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "core/error.hpp"
#include "core/format.hpp"
#include "cpu/kernels.hpp"

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

Format make_format(const std::vector<std::int64_t>& spec, std::vector<float> table) {
  return format_from_spec(spec, std::move(table));
}

void bind_formats(py::module_& m) {
  py::class_<PartBytes>(m, "PartBytes", "Exact bytes of each part of one stored weight.")
      .def_readonly("codes", &PartBytes::codes)
      .def_readonly("scales", &PartBytes::scales)
      .def_readonly("extra", &PartBytes::extra)
      .def_property_readonly("total", &PartBytes::total);
  py::class_<Format>(m, "Format", "A storage format as data; see docs/formats.md.")
      .def(py::init(&make_format), py::arg("spec"), py::arg("table") = std::vector<float>{})
      .def_property_readonly("spec", &spec_of)
      .def_readonly("table", &Format::table)
      .def("row_separable", &Format::row_separable, py::arg("cols"),
           "Whether every row of `cols` elements has blocks and bytes of its own.")
      .def(
          "bytes",
          [](const Format& format, const std::vector<std::int64_t>& shape) {
            return format.bytes(shape);
          },
          py::arg("shape"), "Exact bytes of a weight of this shape.");
  m.def(
      "builtin_formats",
      [] {
        py::list all;
        for (const auto& named : builtin_formats())
          all.append(py::make_tuple(named.name, named.format));
        return all;
      },
      "(name, Format) of every format that is always there.");
  m.def(
      "dynamic_map", [] { return std::vector<float>(dynamic_map().begin(), dynamic_map().end()); },
      "The 256 values that 8-bit nested scales take.");
  m.def(
      "active_isa", [] { return cpu::active_kernels().name; },
      "Name of the instruction-set unit in use; VRAMKIT_ISA forces one.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (const auto* kernels : cpu::available_kernels()) names.emplace_back(kernels->name);
        return names;
      },
      "Names of the units that this processor can run, best last.");
}

// Our exceptions become the package's own, looked up where they are defined.
void raise(const char* name, const Error& error, std::int64_t detail = -1) {
  py::object type = py::module_::import("vramkit.errors").attr(name);
  py::object instance = detail < 0 ? type(error.what()) : type(error.what(), detail);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const BudgetError& error) {
    raise("BudgetError", error, error.needed());
  } catch (const EventError& error) {
    raise("EventError", error, error.event());
  } catch (const CheckpointError& error) {
    raise("CheckpointError", error);
  } catch (const FileChangedError& error) {
    raise("FileChangedError", error);
  } catch (const DeviceMemoryError& error) {
    raise("DeviceMemoryError", error, error.bytes());
  } catch (const OutOfMemoryError& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const SystemError& error) {
    py::object args = py::make_tuple(error.code(), error.what());
    PyErr_SetObject(PyExc_OSError, args.ptr());
  } catch (const InvalidArgument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const Error& error) {
    raise("VramkitError", error);
  }
}

}  // namespace
}  // namespace vramkit::bindings

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "vramkit's native core: formats, files, planner, allocator simulator, ledger, "
      "memory, offload engine.";
  vramkit::bindings::bind_formats(m);
  vramkit::bindings::bind_checkpoint(m);
  vramkit::bindings::bind_placement(m);
  vramkit::bindings::bind_planner(m);
  vramkit::bindings::bind_allocator(m);
  vramkit::bindings::bind_host_pool(m);
  vramkit::bindings::bind_ledger(m);
  vramkit::bindings::bind_cuda(m);
  vramkit::bindings::bind_engine(m);
  vramkit::bindings::bind_loading(m);
  py::register_local_exception_translator(&vramkit::bindings::translate);
}
