// What each file of the Python module _core adds to it.
#pragma once
#include <pybind11/pybind11.h>

namespace vramkit::bindings {

void bind_allocator(pybind11::module_& m);
void bind_checkpoint(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_loading(pybind11::module_& m);
void bind_placement(pybind11::module_& m);
void bind_planner(pybind11::module_& m);
void bind_host_pool(pybind11::module_& m);
void bind_ledger(pybind11::module_& m);

}  // namespace vramkit::bindings
