// Lower bounds for a node of the placement search.
#pragma once
#include <vector>

#include "core/placement_model.hpp"

namespace vramkit::placement {

// The least priced sum of every group, less what the prices allow: a lower bound for any prices
// that are 0 or more (Lagrangian relaxation). `picks` gets the group's item that was the least.
double priced_bound(const Model& model, const Node& node, const Prices& prices,
                    std::vector<std::size_t>& picks);

// The price of one item of phase p.
double price_of(const Model& model, const Prices& prices, std::size_t p, const Item& item);

// Prices for which the bound is nearly the best: column generation over whole plans (Dantzig and
// Wolfe 1960), its small linear program solved by the simplex method. Sets the node's bound (never
// lowers it) and prices. Returns the picks of the last plans priced, for rounding.
std::vector<std::vector<std::size_t>> improve_bound(const Model& model, Node& node, int rounds);

// Drops the items that no plan with an objective up to `ceiling` can have.
void drop_items(const Model& model, Node& node, double ceiling);

}  // namespace vramkit::placement
