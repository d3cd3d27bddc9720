// The planner: which storage format each layer gets, so that everything fits and the loss is least.
//
// That is a multiple-choice knapsack. Every group (a layer) offers choices (its formats), each with
// a size and a cost; exactly one choice per group is taken, the sizes must not exceed the budget,
// the costs are minimized. Sizes are exact bytes and are never rounded. Costs are summed exactly,
// as fixed-point numbers with 120 bits below the largest possible sum, so that the answer depends
// on no order of summation; only a cost smaller than 2^-67 of that sum can lose bits at all.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace vramkit {

struct PlannerChoice {
  std::int64_t bytes = 0;  // >= 0
  double cost = 0;         // finite, >= 0
};

using PlannerGroup = std::vector<PlannerChoice>;

inline constexpr std::int64_t kPlannerStateLimit = 4'000'000;  // 32 bytes each

struct PlannerOptions {
  // The most states that the exact search keeps. Past it, a few narrow passes (of about an eighth
  // of that each) look for the best plan they can find. A count, not a clock: the same input gives
  // the same answer on every machine.
  std::int64_t state_limit = kPlannerStateLimit;
};

struct PlannerResult {
  std::vector<std::int64_t> choices;  // index of the choice taken, by group
  std::int64_t bytes = 0;
  double cost = 0;         // of the choices, added in group order
  double lower_bound = 0;  // no plan within the budget costs less; equals cost if optimal
  bool optimal = false;
  std::int64_t states = 0;  // kept during the search
};

// Solves the problem above. Among plans of equal cost the one with fewer bytes is taken, then the
// one whose choice indices come first in group order. If the state limit ends the search, the best
// plan found is returned with `optimal` false and the proven bound (that plan's ties may be settled
// otherwise).
//
// Throws BudgetError if even the smallest choices exceed the budget (needed() says their size), and
// InvalidArgument for a group without choices, a negative size, a cost that is negative or not
// finite, a sum that overflows, or a state limit below 1.
PlannerResult plan_choices(std::span<const PlannerGroup> groups, std::int64_t budget,
                           const PlannerOptions& options = {});

}  // namespace vramkit
