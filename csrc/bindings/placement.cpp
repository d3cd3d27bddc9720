// Python's view of the planner with places: tuples in, a PlacementResult out.
#include "core/placement.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

using Choice = std::tuple<std::int64_t, std::int64_t, std::int64_t, bool, double, double, double,
                          double, double>;
using Group = std::pair<std::int64_t, std::vector<Choice>>;
using Phase = std::pair<std::int64_t, double>;

PlacementProblem problem_of(const std::vector<Phase>& phases, const std::vector<Group>& groups) {
  PlacementProblem out;
  for (const auto& [reserved, seconds] : phases) out.phases.push_back({reserved, seconds});
  out.groups.reserve(groups.size());
  for (const auto& [phase, choices] : groups) {
    PlacedGroup& group = out.groups.emplace_back();
    group.phase = phase;
    group.choices.reserve(choices.size());
    for (const auto& [resident, streamed, host, staged, loss, compute, link, disk, turn] :
         choices) {
      group.choices.push_back({resident, streamed, host, staged, loss, compute, link, disk, turn});
    }
  }
  return out;
}

}  // namespace

void bind_placement(py::module_& m) {
  py::class_<PlacementResult>(m, "PlacementResult",
                              "A format and a place for every layer, and what is proven about it.")
      .def_readonly("found", &PlacementResult::found,
                    "False: no plan is known; with `optimal`, none exists")
      .def_readonly("choices", &PlacementResult::choices, "index of the choice taken, by group")
      .def_readonly("loss", &PlacementResult::loss)
      .def_readonly("seconds", &PlacementResult::seconds)
      .def_readonly("device_bytes", &PlacementResult::device_bytes,
                    "by phase: what is reserved, residents, slots")
      .def_readonly("slot_bytes", &PlacementResult::slot_bytes, "by phase: one slot")
      .def_readonly("host_bytes", &PlacementResult::host_bytes, "with staging slots")
      .def_readonly("objective", &PlacementResult::objective,
                    "the weighted sum; without weights, the loss")
      .def_readonly("lower_bound", &PlacementResult::lower_bound, "no plan has a smaller objective")
      .def_readonly("seconds_lower_bound", &PlacementResult::seconds_lower_bound,
                    "without weights: no plan that loses no more is faster")
      .def_readonly("optimal", &PlacementResult::optimal, "whether the search was completed")
      .def_readonly("states", &PlacementResult::states, "partial plans kept")
      .def_readonly("nodes", &PlacementResult::nodes, "parts of the problem that were bounded")
      .def("__repr__", [](const PlacementResult& r) {
        return std::string("PlacementResult(found=") + (r.found ? "True" : "False") +
               ", loss=" + py::repr(py::float_(r.loss)).cast<std::string>() +
               ", seconds=" + py::repr(py::float_(r.seconds)).cast<std::string>() +
               ", optimal=" + (r.optimal ? "True" : "False") + ")";
      });

  m.def(
      "place",
      [](const std::vector<Phase>& phases, const std::vector<Group>& groups,
         std::int64_t device_limit, std::optional<std::int64_t> host_limit, std::int64_t slots,
         std::optional<double> loss_limit, std::optional<std::pair<double, double>> weights,
         std::int64_t state_limit, std::int64_t node_limit) {
        PlacementProblem problem = problem_of(phases, groups);
        problem.device_limit = device_limit;
        if (host_limit) problem.host_limit = *host_limit;
        problem.slots = slots;
        if (loss_limit) problem.loss_limit = *loss_limit;
        if (weights) {
          problem.preference = Preference::weighted;
          problem.loss_weight = weights->first;
          problem.time_weight = weights->second;
        }
        problem.state_limit = state_limit;
        problem.node_limit = node_limit;
        py::gil_scoped_release release;
        return place(problem);
      },
      py::arg("phases"), py::arg("groups"), py::arg("device_limit"), py::kw_only(),
      py::arg("host_limit") = py::none(), py::arg("slots") = 2, py::arg("loss_limit") = py::none(),
      py::arg("weights") = py::none(), py::arg("state_limit") = kPlacementStates,
      py::arg("node_limit") = kPlacementNodes,
      R"(Takes one choice per group within the limits: the least loss, then the least seconds.

phases: (reserved device bytes, seconds of arithmetic that is no layer's) for each, taking turns.
groups: (phase, choices) for each layer; a choice is (resident bytes, bytes a slot must hold, host
bytes, whether it is staged from disk, loss, seconds of arithmetic, of the link, of the disk, and
of its turn). A phase takes the longest of its arithmetic, link and disk, plus its turn.
weights: (a, b) minimizes a * loss + b * seconds instead. No limit is None. state_limit and
node_limit bound the search by counts. Raises ValueError for malformed input.)");

  m.def(
      "least_device_bytes",
      [](const std::vector<Phase>& phases, const std::vector<Group>& groups, std::int64_t slots) {
        PlacementProblem problem = problem_of(phases, groups);
        problem.slots = slots;
        std::vector<std::pair<std::int64_t, std::int64_t>> out;
        for (const PhaseNeed& need : least_device_bytes(problem)) {
          out.emplace_back(need.bytes, need.slot);
        }
        return out;
      },
      py::arg("phases"), py::arg("groups"), py::kw_only(), py::arg("slots") = 2,
      "By phase (bytes, slot): the least device bytes that hold it, and the size of its slots.");
}

}  // namespace vramkit::bindings
