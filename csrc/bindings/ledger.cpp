// Python's view of the ledger. The calls that may wait release the GIL and come back every tenth of
// a second to let Python handle signals, so that Ctrl-C ends a wait.
#include "core/ledger.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

constexpr double kSignalSeconds = 0.1;

// Calls attempt(seconds) in short slices until `done` likes the result or the time is over.
template <typename Attempt, typename Done>
auto in_slices(const std::optional<double>& timeout, Attempt attempt, Done done) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  while (true) {
    std::optional<double> left;
    if (timeout) {
      left = *timeout - std::chrono::duration<double>(Clock::now() - start).count();
    }
    auto result = [&] {
      py::gil_scoped_release release;
      return attempt(left ? std::min(*left, kSignalSeconds) : kSignalSeconds);
    }();
    if (done(result) || (left && *left <= kSignalSeconds)) return result;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

}  // namespace

void bind_ledger(py::module_& m) {
  py::enum_<LedgerState>(m, "LedgerState")
      .value("absent", LedgerState::absent)
      .value("loading", LedgerState::loading)
      .value("ready", LedgerState::ready)
      .value("leased", LedgerState::leased)
      .value("evicting", LedgerState::evicting);

  py::class_<LedgerEntry>(m, "LedgerEntry", "What a ledger knows of one id.")
      .def_readonly("id", &LedgerEntry::id)
      .def_readonly("state", &LedgerEntry::state)
      .def_readonly("bytes", &LedgerEntry::bytes)
      .def_readonly("expected", &LedgerEntry::expected)
      .def_readonly("leases", &LedgerEntry::leases)
      .def_readonly("generation", &LedgerEntry::generation)
      .def_readonly("last_use", &LedgerEntry::last_use)
      .def("__repr__", [](const LedgerEntry& e) {
        return "LedgerEntry(id=" + std::to_string(e.id) + ", state=" + to_string(e.state) +
               ", bytes=" + std::to_string(e.bytes) + ", leases=" + std::to_string(e.leases) + ")";
      });

  py::enum_<Admission::Action>(m, "AdmissionAction")
      .value("ready", Admission::ready)
      .value("load", Admission::load)
      .value("timed_out", Admission::timed_out);
  py::class_<Admission>(m, "Admission", "What begin_load decided.")
      .def_readonly("action", &Admission::action)
      .def_readonly("generation", &Admission::generation)
      .def_readonly("victims", &Admission::victims);
  py::class_<Placement>(m, "Placement", "What finish_load decided.")
      .def_readonly("kept", &Placement::kept)
      .def_readonly("generation", &Placement::generation)
      .def_readonly("victims", &Placement::victims);

  py::class_<Ledger> ledger(m, "Ledger",
                            "States, sizes, leases and order of use of models, by integer id. "
                            "Holds no models and calls nothing; all calls are thread-safe.");
  py::enum_<Ledger::Eviction>(ledger, "Eviction")
      .value("started", Ledger::Eviction::started)
      .value("absent", Ledger::Eviction::absent)
      .value("timed_out", Ledger::Eviction::timed_out);
  ledger
      .def(py::init<std::optional<std::int64_t>, std::int64_t>(), py::arg("budget") = py::none(),
           py::arg("max_resident") = 1)
      .def("add", &Ledger::add, py::arg("id"), py::arg("expected_bytes") = 0)
      .def("set_expected", &Ledger::set_expected, py::arg("id"), py::arg("bytes"))
      .def("remove", &Ledger::remove, py::arg("id"))
      .def(
          "begin_load",
          [](Ledger& self, std::int64_t id, std::optional<double> timeout) {
            return in_slices(
                timeout, [&](double seconds) { return self.begin_load(id, seconds); },
                [](const Admission& a) { return a.action != Admission::timed_out; });
          },
          py::arg("id"), py::arg("timeout") = py::none(),
          "Asks for an id to be in memory; may wait, at most `timeout` seconds. After "
          "AdmissionAction.load drop each victim (finish_evict), load, then call finish_load or "
          "fail_load.")
      .def("finish_load", &Ledger::finish_load, py::arg("id"), py::arg("bytes"))
      .def("fail_load", &Ledger::fail_load, py::arg("id"))
      .def("acquire", &Ledger::acquire, py::arg("id"), py::arg("generation"))
      .def("release", &Ledger::release, py::arg("id"))
      .def("touch", &Ledger::touch, py::arg("id"))
      .def(
          "begin_evict",
          [](Ledger& self, std::int64_t id, std::optional<double> timeout,
             std::uint64_t generation) {
            return in_slices(
                timeout, [&](double seconds) { return self.begin_evict(id, seconds, generation); },
                [](Ledger::Eviction e) { return e != Ledger::Eviction::timed_out; });
          },
          py::arg("id"), py::arg("timeout") = py::none(), py::arg("generation") = 0,
          "Asks for an id to go, once its load and its leases have ended. After "
          "Eviction.started drop the object and call finish_evict.")
      .def("finish_evict", &Ledger::finish_evict, py::arg("id"))
      .def("set_limits", &Ledger::set_limits, py::arg("budget"), py::arg("max_resident"))
      .def_property_readonly("budget", &Ledger::budget)
      .def_property_readonly("max_resident", &Ledger::max_resident)
      .def("entry", &Ledger::entry, py::arg("id"))
      .def("state", &Ledger::state, py::arg("id"))
      .def("total_bytes", &Ledger::total_bytes)
      .def("snapshot", &Ledger::snapshot)
      .def("check", &Ledger::check, "Raises an error that names the first broken invariant.");
}

}  // namespace vramkit::bindings
