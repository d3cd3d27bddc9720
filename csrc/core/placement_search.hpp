// Plans for a node of the placement search: good ones quickly, or the best one with proof.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/placement_model.hpp"

namespace vramkit::placement {

// Starts from the items that `picks` names, moves single layers until all limits hold, then single
// layers and pairs while that lowers the objective. Slots count at the node's largest size. The
// plan is not `found` if no plan within the limits was reached.
Plan polish(const Model& model, const Node& node, std::vector<std::size_t> picks);

enum class Ended { found, none, full };

// Builds plans group by group, as lists of partial plans: none is kept that another one beats in
// everything, that no rest can bring within the limits, or that no rest can bring below `ceiling`
// by the node's prices. Ended::found: `plan` is the best of the node. Ended::none: no plan of the
// node has an objective below `ceiling`. Ended::full: more than `room` partial plans.
//
// With a `width`, each list keeps its `width` most promising partial plans only, and neither
// answer is a proof.
struct Found {
  Ended ended = Ended::none;
  Plan plan;
  std::int64_t states = 0;
};
Found search(const Model& model, const Node& node, double ceiling, std::int64_t room,
             std::optional<std::size_t> width);

}  // namespace vramkit::placement
