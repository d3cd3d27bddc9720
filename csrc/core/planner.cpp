// Solves the planner's knapsack exactly, in four steps:
//
//  1. Choices that another choice of the group beats in size and cost are dropped.
//  2. The relaxation in which a group may mix its choices is solved over the groups' lower convex
//     hulls (Sinha & Zoltners 1979, Dyer 1984): it gives a lower bound and a first plan.
//  3. For a guess of how far the optimum lies above that bound, choices whose reduced cost alone
//     exceeds the guess are dropped, which fixes most groups.
//  4. What remains is built group by group as lists of partial plans, none of which is both larger
//     and costlier than another; those whose relaxed completion exceeds the guess are dropped.
//     A plan at the end is the optimum. None proves that the bound lies higher: the guess doubles.
//
// Groups are taken from the largest to the smallest: what is left can then be filled nearly as well
// as the relaxation believes. No state is dropped that leads to an optimal plan, so walking back
// through the lists finds all tied plans, and the first of them in the caller's order.
#include "core/planner.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "core/error.hpp"
#include "core/planner_search.hpp"

namespace vramkit {
namespace {

using namespace planner;

constexpr int kCostBits = 120;  // the sum of all groups' largest costs lies below 2^kCostBits
// A narrow pass may keep this fraction of the state limit, or 16 states a group if that is more.
constexpr std::int64_t kNarrowShare = 8;

std::int64_t checked_add(std::int64_t a, std::int64_t b, const char* what) {
  std::int64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) {
    throw InvalidArgument(std::string("planner: the sum of ") + what +
                          " exceeds 2^63 - 1 bytes; check that the sizes are in bytes");
  }
  return sum;
}

struct Totals {
  std::int64_t smallest = 0;  // bytes of the smallest choices
  double cost = 0;            // of the costliest choices
};

Totals check(std::span<const PlannerGroup> groups) {
  Totals totals;
  std::int64_t largest = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const std::string where = "planner: group " + std::to_string(g);
    if (groups[g].empty()) {
      throw InvalidArgument(where + " has no choices; every group needs at least one");
    }
    std::int64_t low = std::numeric_limits<std::int64_t>::max(), high = 0;
    double cost = 0;
    for (std::size_t c = 0; c < groups[g].size(); ++c) {
      const PlannerChoice& choice = groups[g][c];
      if (choice.bytes < 0) {
        throw InvalidArgument(where + ", choice " + std::to_string(c) + " has " +
                              std::to_string(choice.bytes) + " bytes; sizes are 0 or more");
      }
      if (!std::isfinite(choice.cost) || choice.cost < 0) {
        throw InvalidArgument(where + ", choice " + std::to_string(c) + " has the cost " +
                              std::to_string(choice.cost) + "; costs are finite and 0 or more");
      }
      low = std::min(low, choice.bytes);
      high = std::max(high, choice.bytes);
      cost = std::max(cost, choice.cost);
    }
    totals.smallest = checked_add(totals.smallest, low, "the groups' smallest sizes");
    largest = checked_add(largest, high, "the groups' largest sizes");
    totals.cost += cost;
  }
  if (!std::isfinite(totals.cost)) {
    throw InvalidArgument(
        "planner: the sum of the groups' largest costs exceeds the range of a double; scale the "
        "costs down");
  }
  return totals;
}

// Choices in rising size and strictly falling cost; of equal ones the first.
Items undominated(const PlannerGroup& group, int shift) {
  std::vector<std::size_t> order(group.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  // By the costs as given: fixed point may not tell the tiniest apart.
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return group[a].bytes != group[b].bytes ? group[a].bytes < group[b].bytes
                                            : group[a].cost < group[b].cost;
  });
  Items items;
  for (std::size_t c : order) {
    items.push_back({group[c].bytes,
                     static_cast<Int128>(std::nearbyint(std::ldexp(group[c].cost, shift))),
                     static_cast<std::int64_t>(c)});
  }
  std::size_t kept = 0;
  for (const Item& item : items) {
    if (kept == 0 || item.cost < items[kept - 1].cost) items[kept++] = item;
  }
  items.erase(items.begin() + static_cast<std::ptrdiff_t>(kept), items.end());
  return items;
}

double slope_between(const Item& a, const Item& b) {
  return static_cast<double>(a.cost - b.cost) / static_cast<double>(b.bytes - a.bytes);
}

void append_hull(const Items& items, std::size_t group, std::vector<Segment>& out) {
  std::vector<std::size_t> hull;
  for (std::size_t i = 0; i < items.size(); ++i) {
    while (hull.size() >= 2 && slope_between(items[hull[hull.size() - 2]], items[hull.back()]) <=
                                   slope_between(items[hull.back()], items[i])) {
      hull.pop_back();
    }
    hull.push_back(i);
  }
  double previous = std::numeric_limits<double>::infinity();
  for (std::size_t h = 1; h < hull.size(); ++h) {
    const Item &a = items[hull[h - 1]], &b = items[hull[h]];
    // Rounding must not let a group's later edge come before its earlier one.
    previous = std::min(previous, slope_between(a, b));
    out.push_back({previous, b.bytes - a.bytes, a.cost - b.cost, group});
  }
}

void build_segments(Core& core) {
  core.segments.clear();
  for (std::size_t g = 0; g < core.groups.size(); ++g) {
    append_hull(core.groups[g], g, core.segments);
  }
  std::stable_sort(core.segments.begin(), core.segments.end(),
                   [](const Segment& a, const Segment& b) { return a.slope > b.slope; });
}

void add_group(Core& core, std::size_t id, Items items) {
  if (items.size() == 1) {
    core.base.cost += items[0].cost;
    core.base.bytes += items[0].bytes;
    core.closed[id] = items[0].index;
    return;
  }
  core.groups.push_back(std::move(items));
  core.ids.push_back(id);
}

void sort_groups(Core& core) {
  std::vector<std::size_t> order(core.groups.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const Items &x = core.groups[a], &y = core.groups[b];
    return x.back().bytes - x.front().bytes > y.back().bytes - y.front().bytes;
  });
  std::vector<Items> groups;
  std::vector<std::size_t> ids;
  for (std::size_t i : order) {
    groups.push_back(std::move(core.groups[i]));
    ids.push_back(core.ids[i]);
  }
  core.groups = std::move(groups);
  core.ids = std::move(ids);
}

// The relaxation's value, and the plan that rounding it down and filling up gives.
struct Relaxation {
  Int128 bound;
  double slope;  // of the edge that the budget cuts; 0 if all fit
  Int128 plan_cost;
  std::vector<std::size_t> plan;  // item of each open group
};

Relaxation relax(const Core& core, std::int64_t budget) {
  const State low = smallest(core);
  std::int64_t left = budget - low.bytes;
  Relaxation out{low.cost, 0, low.cost, std::vector<std::size_t>(core.groups.size(), 0)};
  bool cut = false;
  std::vector<char> stopped(core.groups.size(), 0);
  for (const Segment& segment : core.segments) {
    if (!cut && segment.bytes > left) {
      cut = true;
      out.slope = segment.slope;
      out.bound = out.plan_cost -
                  static_cast<Int128>(segment.slope * static_cast<double>(left) * (1 + 1e-15)) - 1;
    }
    if (segment.bytes > left || stopped[segment.group]) {
      stopped[segment.group] = 1;
      continue;
    }
    left -= segment.bytes;
    out.plan_cost -= segment.saving;
    const Items& items = core.groups[segment.group];
    std::size_t& at = out.plan[segment.group];
    const std::int64_t bytes = items[at].bytes + segment.bytes;
    while (items[at].bytes != bytes) ++at;
  }
  if (!cut) out.bound = out.plan_cost;
  // Rounded slopes may have put edges in the wrong order if they are near ties of the one cut.
  double tied = 0;
  for (const Segment& segment : core.segments) {
    if (std::abs(segment.slope - out.slope) <= 1e-12 * out.slope) {
      tied += static_cast<double>(segment.saving);
    }
  }
  out.bound -= static_cast<Int128>(tied * 1e-14);
  return out;
}

// The core without the choices that cannot be in a plan that costs `slack` above the bound: by the
// Lagrangian at `slope`, taking one adds at least its reduced cost to the bound.
Core reduced(const Core& core, double slope, Int128 slack) {
  Core out;
  out.base = core.base;
  out.closed = core.closed;
  const double limit = static_cast<double>(slack);
  for (std::size_t g = 0; g < core.groups.size(); ++g) {
    const Items& items = core.groups[g];
    auto priced = [&](const Item& item, const Item& from) {
      const auto cost = static_cast<double>(item.cost - from.cost);
      const auto bytes = slope * static_cast<double>(item.bytes - from.bytes);
      return std::pair{cost + bytes, std::abs(cost) + std::abs(bytes)};
    };
    const Item* best = items.data();
    for (const Item& item : items) {
      if (priced(item, *best).first < 0) best = &item;
    }
    Items kept;
    for (const Item& item : items) {
      // From the best item, so that rounding is relative to the difference of the two.
      const auto [added, scale] = priced(item, *best);
      if (added <= limit * (1 + 1e-12) + scale * 1e-14) kept.push_back(item);
    }
    add_group(out, core.ids[g], std::move(kept));
  }
  sort_groups(out);
  build_segments(out);
  return out;
}

// All sizes of a plan are the smallest plan's plus a multiple of what the differences have in
// common: the rest of the budget cannot be used, and without it the bound is tighter.
std::int64_t usable_budget(const Core& core, std::int64_t budget) {
  std::int64_t common = 0;
  for (const Items& items : core.groups) {
    for (const Item& item : items) common = std::gcd(common, item.bytes - items[0].bytes);
  }
  const std::int64_t low = smallest(core).bytes;
  return common == 0 ? low : low + (budget - low) / common * common;
}

}  // namespace

PlannerResult plan_choices(std::span<const PlannerGroup> groups, std::int64_t budget,
                           const PlannerOptions& options) {
  if (options.state_limit < 1) {
    throw InvalidArgument("planner: state_limit is " + std::to_string(options.state_limit) +
                          "; it must be at least 1");
  }
  const Totals totals = check(groups);
  if (totals.smallest > budget) {
    throw BudgetError("the budget of " + std::to_string(budget) +
                          " bytes cannot hold the smallest choices; the least that would do is " +
                          std::to_string(totals.smallest) + " bytes",
                      totals.smallest);
  }
  // Two bits to spare: for the rounding of the total, and of each cost.
  const int shift = totals.cost > 0 ? kCostBits - 2 - std::ilogb(totals.cost) : 0;

  Core core;
  core.closed.assign(groups.size(), -1);
  for (std::size_t g = 0; g < groups.size(); ++g) add_group(core, g, undominated(groups[g], shift));
  build_segments(core);
  budget = usable_budget(core, budget);

  const Relaxation root = relax(core, budget);
  PlannerResult result;
  result.choices = core.closed;
  for (std::size_t g = 0; g < core.groups.size(); ++g) {
    result.choices[core.ids[g]] = core.groups[g][root.plan[g]].index;
  }
  Int128 best = root.plan_cost, bound = root.bound;

  // Exact passes until one finds a plan; from the one that runs out of room on, narrow ones.
  Int128 slack = std::max<Int128>((best - bound) / 1024, 1);
  bool narrow = false, done = false;
  while (!done) {
    const Int128 ceiling = std::min(best, root.bound + slack);
    const Core small = reduced(core, root.slope, ceiling - root.bound);
    std::optional<std::size_t> width;
    if (narrow) {
      const auto lists = static_cast<std::int64_t>(small.groups.size()) + 1;
      width = static_cast<std::size_t>(
          std::max<std::int64_t>(16, options.state_limit / kNarrowShare / lists));
    }
    Search search(small, budget, ceiling, options.state_limit - result.states, width);
    const Ended ended = search.run();
    result.states += search.kept();
    if (ended == Ended::found) {
      best = search.cost();
      result.choices = search.choices();
      result.optimal = !narrow;
    } else if (ended == Ended::none && !narrow) {
      bound = ceiling;
    }
    done = ended == Ended::found || (ended == Ended::none && ceiling == best);
    if (ended == Ended::full) {
      narrow = true;
    } else {
      slack = 2 * (ceiling - root.bound);
    }
  }

  for (std::size_t g = 0; g < groups.size(); ++g) {
    const PlannerChoice& taken = groups[g][static_cast<std::size_t>(result.choices[g])];
    result.bytes += taken.bytes;
    result.cost += taken.cost;
  }
  result.lower_bound = result.cost;
  if (!result.optimal) {
    const double low = std::ldexp(static_cast<double>(bound), -shift) * (1 - 1e-15);
    result.lower_bound = std::clamp(low, 0.0, result.cost);
  }
  return result;
}

}  // namespace vramkit
