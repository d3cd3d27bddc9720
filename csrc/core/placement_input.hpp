// What the placement search does with a problem before it searches.
#pragma once
#include "core/placement.hpp"
#include "core/placement_model.hpp"

namespace vramkit::placement {

// Of the groups' largest choices.
struct Totals {
  double loss = 0, seconds = 0;
};

// Throws InvalidArgument for what `place` refuses.
Totals check(const PlacementProblem& problem);

// Without the items that another equals or beats in everything; of equal ones the first stays.
Items undominated(const Items& items);

}  // namespace vramkit::placement
