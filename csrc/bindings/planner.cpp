// Python's view of the planner: lists of (bytes, cost) pairs in, a PlannerResult out.
#include "core/planner.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace vramkit::bindings {

void bind_planner(py::module_& m) {
  py::class_<PlannerResult>(m, "PlannerResult",
                            "The planner's answer: which choice each group takes, and what is "
                            "proven about it.")
      .def_readonly("choices", &PlannerResult::choices,
                    "index of the choice taken, by group; a new list at each access")
      .def_readonly("bytes", &PlannerResult::bytes, "sum of the sizes taken")
      .def_readonly("cost", &PlannerResult::cost, "sum of the costs taken, in group order")
      .def_readonly("lower_bound", &PlannerResult::lower_bound,
                    "no plan within the budget costs less; equals cost if optimal")
      .def_readonly("optimal", &PlannerResult::optimal, "whether the search was completed")
      .def_readonly("states", &PlannerResult::states, "partial plans kept during the search")
      .def("__repr__", [](const PlannerResult& r) {
        return "PlannerResult(bytes=" + std::to_string(r.bytes) +
               ", cost=" + py::repr(py::float_(r.cost)).cast<std::string>() +
               ", optimal=" + (r.optimal ? "True" : "False") + ")";
      });

  m.def(
      "plan_choices",
      [](const std::vector<std::vector<std::pair<std::int64_t, double>>>& groups,
         std::int64_t budget, std::int64_t state_limit) {
        std::vector<PlannerGroup> native;
        native.reserve(groups.size());
        for (const auto& group : groups) {
          PlannerGroup& out = native.emplace_back();
          out.reserve(group.size());
          for (const auto& [bytes, cost] : group) out.push_back({bytes, cost});
        }
        py::gil_scoped_release release;
        return plan_choices(native, budget, {state_limit});
      },
      py::arg("groups"), py::arg("budget"), py::kw_only(),
      py::arg("state_limit") = kPlannerStateLimit,
      R"(Takes one choice per group so that the costs are least and the sizes fit the budget.

groups: for each group its choices as (bytes, cost) pairs, bytes >= 0, cost finite and >= 0.
budget: bytes. state_limit: partial plans that the exact search may keep (32 bytes each); past
it the best plan found is returned with optimal=False and a proven lower_bound.
Of plans of equal cost the one with fewer bytes is taken, then the first in choice order.
Raises BudgetError if even the smallest choices do not fit, ValueError for malformed input.)");
}

}  // namespace vramkit::bindings
