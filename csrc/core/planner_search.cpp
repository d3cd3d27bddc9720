// See planner_search.hpp.
#include "core/planner_search.hpp"

#include <algorithm>
#include <numeric>
#include <queue>
#include <string>
#include <utility>

#include "core/error.hpp"

namespace vramkit::planner {

State smallest(const Core& core) {
  State sum = core.base;
  for (const Items& items : core.groups) {
    sum.cost += items[0].cost;
    sum.bytes += items[0].bytes;
  }
  return sum;
}

Search::Search(const Core& core, std::int64_t budget, Int128 ceiling, std::int64_t room,
               std::optional<std::size_t> width)
    : core_(core), budget_(budget), ceiling_(ceiling), room_(room), width_(width) {
  double total = 0;
  for (const Segment& segment : core.segments) total += static_cast<double>(segment.saving);
  // What rounded slopes can hide when edges are near ties.
  margin_ = static_cast<Int128>(total * 1e-14) + 1;
}

Ended Search::run() {
  const std::size_t count = core_.groups.size();
  std::vector<char> open(count, 1);
  State rest = smallest(core_);  // of the groups not yet taken, at their smallest
  rest.cost -= core_.base.cost;
  rest.bytes -= core_.base.bytes;
  if (core_.base.bytes + rest.bytes > budget_) return Ended::none;
  layers_.assign(1, {core_.base});
  kept_ = 1;
  for (std::size_t g = 0; g < count; ++g) {
    open[g] = 0;
    rest.cost -= core_.groups[g][0].cost;
    rest.bytes -= core_.groups[g][0].bytes;
    segments_.clear();
    for (const Segment& segment : core_.segments) {
      if (open[segment.group]) segments_.push_back(&segment);
    }
    if (!extend(core_.groups[g], rest)) return Ended::full;
    if (layers_.back().empty()) return Ended::none;
  }
  return layers_.back().back().cost <= ceiling_ ? Ended::found : Ended::none;
}

// The choices of the best plan, by the caller's groups; of tied plans the first.
std::vector<std::int64_t> Search::choices() const {
  Edges edges = optimal_edges();
  std::vector<std::size_t> order(core_.groups.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return core_.ids[a] < core_.ids[b]; });
  std::vector<std::int64_t> out = core_.closed;
  for (std::size_t g : order) {
    const auto least =
        std::min_element(edges[g].begin(), edges[g].end(),
                         [](const Edge& a, const Edge& b) { return a.index < b.index; });
    if (least == edges[g].end()) throw Error("planner: a plan lost its path; please report this");
    out[core_.ids[g]] = least->index;
    keep_choice(edges, g, least->index);
  }
  return out;
}

// The steps of all plans that end in the best state, by group.
Search::Edges Search::optimal_edges() const {
  Edges edges(core_.groups.size());
  std::vector<std::size_t> reached{layers_.back().size() - 1};
  for (std::size_t g = core_.groups.size(); g-- > 0;) {
    const std::vector<State>& before = layers_[g];
    std::vector<std::size_t> origins;
    for (std::size_t to : reached) {
      const State& state = layers_[g + 1][to];
      for (const Item& item : core_.groups[g]) {
        const std::int64_t bytes = state.bytes - item.bytes;
        const auto found =
            std::lower_bound(before.begin(), before.end(), bytes,
                             [](const State& s, std::int64_t value) { return s.bytes < value; });
        if (found == before.end() || found->bytes != bytes ||
            found->cost != state.cost - item.cost) {
          continue;
        }
        origins.push_back(static_cast<std::size_t>(found - before.begin()));
        edges[g].push_back({origins.back(), to, item.index});
      }
    }
    std::sort(origins.begin(), origins.end());
    origins.erase(std::unique(origins.begin(), origins.end()), origins.end());
    reached = std::move(origins);
  }
  return edges;
}

// Drops group g's other choices, and the steps of other groups that only they led to.
void Search::keep_choice(Edges& edges, std::size_t g, std::int64_t index) {
  if (std::erase_if(edges[g], [&](const Edge& edge) { return edge.index != index; }) == 0) return;
  auto ends = [&](std::size_t at, std::size_t Edge::*end) {
    std::vector<std::size_t> out;
    for (const Edge& edge : edges[at]) out.push_back(edge.*end);
    std::sort(out.begin(), out.end());
    return out;
  };
  auto match = [&](std::size_t at, std::size_t Edge::*end, const std::vector<std::size_t>& live) {
    return std::erase_if(edges[at], [&](const Edge& edge) {
             return !std::binary_search(live.begin(), live.end(), edge.*end);
           }) > 0;
  };
  for (std::size_t at = g; at > 0 && match(at - 1, &Edge::to, ends(at, &Edge::from)); --at) {
  }
  for (std::size_t at = g + 1; at < edges.size() && match(at, &Edge::from, ends(at - 1, &Edge::to));
       ++at) {
  }
}

// Extends every state by every item. False if there is no room for the states.
bool Search::extend(const Items& items, const State& rest) {
  struct Head {
    std::int64_t bytes;
    Int128 cost;
    std::size_t item, state;
    bool operator<(const Head& other) const {  // a priority_queue puts the largest first
      return bytes != other.bytes ? bytes > other.bytes : cost > other.cost;
    }
  };
  const std::vector<State>& from = layers_.back();
  std::vector<State> to;
  std::vector<double> bounds;
  std::priority_queue<Head> heads;
  for (std::size_t i = 0; i < items.size(); ++i) {
    heads.push({from[0].bytes + items[i].bytes, from[0].cost + items[i].cost, i, 0});
  }
  // The relaxed completion of a state: everything left goes to the steepest edges. States come
  // with rising bytes, so the edge that is cut moves only backward.
  std::size_t cut = segments_.size();
  std::int64_t full_bytes = 0;
  Int128 full_saving = 0;
  for (const Segment* segment : segments_) {
    full_bytes += segment->bytes;
    full_saving += segment->saving;
  }
  while (!heads.empty()) {
    const Head head = heads.top();
    heads.pop();
    if (head.bytes > budget_ - rest.bytes) break;
    const std::size_t next = head.state + 1;
    if (next < from.size()) {
      const Item& item = items[head.item];
      heads.push({from[next].bytes + item.bytes, from[next].cost + item.cost, head.item, next});
    }
    if (!to.empty() && head.cost >= to.back().cost) continue;
    const std::int64_t left = budget_ - rest.bytes - head.bytes;
    while (full_bytes > left) {
      --cut;
      full_bytes -= segments_[cut]->bytes;
      full_saving -= segments_[cut]->saving;
    }
    const Int128 whole = head.cost + rest.cost - full_saving;
    double part = 0;
    if (cut < segments_.size()) {
      part = segments_[cut]->slope * static_cast<double>(left - full_bytes);
    }
    const Int128 over = whole - ceiling_ - margin_;
    if (over > 0 && static_cast<double>(over) > part * (1 + 1e-14)) continue;
    to.push_back({head.cost, head.bytes});
    if (width_) bounds.push_back(static_cast<double>(whole) - part);
    if (!width_ && ++kept_ > room_) return false;
  }
  if (width_) {
    narrow(to, bounds);
    kept_ += static_cast<std::int64_t>(to.size());
  }
  layers_.push_back(std::move(to));
  return true;
}

void Search::narrow(std::vector<State>& states, const std::vector<double>& bounds) const {
  if (states.size() <= *width_) return;
  std::vector<std::size_t> order(states.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(*width_), order.end(),
                   [&](std::size_t a, std::size_t b) {
                     return bounds[a] != bounds[b] ? bounds[a] < bounds[b] : a < b;
                   });
  order.resize(*width_);
  std::sort(order.begin(), order.end());
  std::vector<State> kept;
  kept.reserve(order.size());
  for (std::size_t i : order) kept.push_back(states[i]);
  states = std::move(kept);
}

}  // namespace vramkit::planner
