// Ctrl-C during calls that take long: they run without the GIL and ask now and then.
#pragma once
#include <pybind11/pybind11.h>

#include "core/error.hpp"

namespace vramkit::bindings {

// True if a signal's handler has raised: the exception stays set for with_signals().
inline bool signalled() {
  const pybind11::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Runs work() without the GIL; an interrupted wait becomes what the handler raised.
template <typename Work>
auto with_signals(Work work) {
  try {
    const pybind11::gil_scoped_release release;
    return work();
  } catch (const Interrupted&) {
    if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    throw;
  }
}

}  // namespace vramkit::bindings
