// Solves the placement problem by branch and bound.
//
//  1. Choices that another choice of the layer equals or beats in everything are dropped.
//  2. A node fixes an interval for each phase's largest streamed layer, and whether the phase reads
//     from disk. Larger layers then cannot be streamed, and slots take at least the interval's
//     lower end: what is left is a multiple-choice knapsack with a few limits and the longest of
//     three times, for which prices on the limits give a lower bound (placement_bound.hpp).
//  3. From the prices a plan is rounded and polished (placement_polish.cpp), and choices that no
//     better plan can have are dropped.
//  4. The node of the least bound is searched exactly for plans below its ceiling
//     (placement_search.hpp); where that runs out of room, its widest interval is halved.
//
// The least of the bounds of the nodes left open is what is proven.
#include "core/placement.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "core/placement_bound.hpp"
#include "core/placement_input.hpp"
#include "core/placement_model.hpp"
#include "core/placement_search.hpp"

namespace vramkit {
namespace {

using namespace placement;

constexpr int kBits = 60;  // of the largest possible sum of losses, and of times
constexpr double kTie = 1e-12;
constexpr int kFirstRounds = 120, kLaterRounds = 40;  // of pricing
constexpr std::int64_t kShare = 24;  // a node that can still be halved may keep 1/24 of the states

class Solver {
 public:
  explicit Solver(const PlacementProblem& problem) : problem_(problem) {
    const Totals totals = check(problem);
    auto shift = [](double total) { return total > 0 ? kBits - 1 - std::ilogb(total) : 0; };
    loss_shift_ = shift(totals.loss);
    time_shift_ = shift(totals.seconds);
    build();
  }

  PlacementResult run() {
    PlacementResult result;
    if (problem_.preference == Preference::weighted) {
      weigh(problem_.loss_weight, problem_.time_weight);
      const double bound = solve(result);
      result.lower_bound = bound;
      result.optimal = closed_;
    } else {
      weigh(1, 0);
      result.lower_bound = solve(result);
      const bool loss_is_least = closed_;
      if (best_.found) {
        model_.loss_room = best_.loss;
        weigh(0, 1);
        complete(best_);
        result.seconds_lower_bound = solve(result);
      }
      result.optimal = loss_is_least && closed_;
    }
    if (best_.found) {
      fill(result);
    }
    return result;
  }

 private:
  std::int64_t fixed(double value, int shift) const {
    return static_cast<std::int64_t>(std::llround(std::ldexp(value, shift)));
  }

  void build() {
    model_.phases = problem_.phases.size();
    model_.slots = problem_.slots;
    model_.host_room = problem_.host_limit;
    model_.loss_room = kUnlimited;
    const double limit = std::ldexp(problem_.loss_limit, loss_shift_);
    if (limit < 0x1p62) {
      // Each loss may have been rounded up by half a unit.
      model_.loss_room = static_cast<std::int64_t>(limit) +
                         static_cast<std::int64_t>(problem_.groups.size() / 2 + 1);
    }
    for (const PlacedPhase& phase : problem_.phases) {
      model_.room.push_back(std::max<std::int64_t>(problem_.device_limit, 0) - phase.reserved);
      model_.base.push_back(fixed(phase.compute_seconds, time_shift_));
    }
    for (std::size_t p = 0; p < model_.phases; ++p) {
      for (std::size_t g = 0; g < problem_.groups.size(); ++g) {
        if (problem_.groups[g].phase != static_cast<std::int64_t>(p)) continue;
        Items items;
        for (const PlacedChoice& c : problem_.groups[g].choices) {
          Item item{};
          item.values = {c.resident,
                         c.host,
                         fixed(c.loss, loss_shift_),
                         fixed(c.turn_seconds, time_shift_),
                         fixed(c.compute_seconds, time_shift_),
                         fixed(c.link_seconds, time_shift_),
                         fixed(c.disk_seconds, time_shift_)};
          for (std::size_t r = 0; r < kRows; ++r) {
            item.weights[r] = static_cast<double>(item.values[r]);
          }
          item.slot = c.streamed;
          item.staged = c.staged;
          item.index = static_cast<std::int64_t>(items.size());
          items.push_back(item);
        }
        model_.phase.push_back(p);
        model_.ids.push_back(g);
        groups_.push_back(undominated(items));
      }
    }
    clamp_rooms();
  }

  // A limit past all that can be asked for does not bind, whatever its size.
  void clamp_rooms() {
    std::vector<std::int64_t> device(model_.phases, 0);
    std::int64_t host = 0, largest = 0, loss = 0;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      std::array<std::int64_t, kRows> most{};
      std::int64_t slot = 0;
      for (const Item& item : groups_[g]) {
        for (std::size_t r = 0; r < kRows; ++r) most[r] = std::max(most[r], item.values[r]);
        slot = std::max(slot, item.slot);
      }
      largest = std::max(largest, slot);
      device[model_.phase[g]] += most[kDevice];
      host += most[kHost];
      loss += most[kLoss];
      most_loss_ += most[kLoss];
      most_time_ += most[kTurn] + most[kCompute] + most[kLink] + most[kDisk];
    }
    for (std::size_t p = 0; p < model_.phases; ++p) {
      model_.room[p] = std::min(model_.room[p], device[p] + model_.slots * largest);
      most_time_ += model_.base[p];
    }
    model_.host_room = std::min(model_.host_room, host + model_.slots * largest);
    model_.loss_room = std::min(model_.loss_room, loss);
  }

  void weigh(double loss, double time) {
    model_.loss_weight = std::ldexp(loss, -loss_shift_);
    model_.time_weight = std::ldexp(time, -time_shift_);
    worst_ = model_.objective(most_loss_, most_time_) * (1 + 1e-9);
  }

  // Below what a plan is better than the best one known.
  double ceiling() const {
    if (!best_.found) return std::numeric_limits<double>::max();
    return best_.objective - kTie * std::abs(best_.objective);
  }
  bool beaten(double bound) const { return best_.found && bound >= ceiling(); }

  void take(const Plan& plan) {
    if (!plan.found) return;
    Plan whole = plan;
    complete(whole);
    if (!best_.found || whole.objective < best_.objective) best_ = std::move(whole);
  }

  // Drops what the node's interval and disk flags forbid, and narrows the interval to sizes that
  // occur. False if a group has nothing left or the room cannot do.
  bool restrict(Node& node) const {
    for (std::size_t g = 0; g < node.groups.size(); ++g) {
      const std::size_t p = model_.phase[g];
      std::erase_if(node.groups[g], [&](const Item& item) {
        return item.slot > node.high[p] || (item.staged && node.disk[p] == FromDisk::no);
      });
      if (node.groups[g].empty()) return false;
    }
    for (std::size_t p = 0; p < model_.phases; ++p) {
      std::int64_t least = 0, largest = 0;
      std::optional<std::int64_t> next;
      for (std::size_t g = 0; g < node.groups.size(); ++g) {
        if (model_.phase[g] != p) continue;
        std::int64_t smallest = kUnlimited;
        for (const Item& item : node.groups[g]) {
          smallest = std::min(smallest, item.slot);
          largest = std::max(largest, item.slot);
          if (item.slot >= node.low[p] && (!next || item.slot < *next)) next = item.slot;
        }
        least = std::max(least, smallest);  // this group alone needs that much
      }
      if (node.low[p] > largest) return false;  // the other half has these plans
      if (node.low[p] > 0 && next) node.low[p] = *next;
      node.low[p] = std::max(node.low[p], least);
      node.high[p] = largest;
      if (device_room(model_, node, p) < 0) return false;
    }
    return host_room(model_, node) >= 0;
  }

  void consider(Node node, int rounds) {
    if (!restrict(node)) return;
    ++nodes_;
    const std::vector<std::vector<std::size_t>> picks = improve_bound(model_, node, rounds);
    // A bound above the objective of any plan says that the limits cannot be met.
    if (beaten(node.bound) || node.bound > worst_) return;
    const std::size_t starts = rounds == kFirstRounds ? picks.size() : 1;
    for (std::size_t i = 0; i < starts; ++i) take(polish(model_, node, picks[i]));
    if (rounds == kFirstRounds && !best_.found) try_small_slots(node);
    if (beaten(node.bound)) return;
    if (best_.found) {
      drop_items(model_, node, ceiling());
      for (const Items& items : node.groups) {
        if (items.empty()) return;
      }
    }
    open_.push_back(std::move(node));
  }

  // A polished plan counts its slots at the node's largest: smaller ones leave more room.
  void try_small_slots(const Node& node) {
    std::vector<std::size_t> picks;
    Node small = node;
    for (int step = 0; step < 12 && !best_.found; ++step) {
      bool smaller = false;
      for (std::int64_t& high : small.high) {
        smaller = smaller || high > 0;
        high /= 2;
      }
      if (!smaller || !restrict(small)) return;
      priced_bound(model_, small, small.prices.front(), picks);
      take(polish(model_, small, picks));
    }
  }

  // The groups without figures that neither a limit nor the objective asks for: more choices are
  // then beaten by others.
  std::vector<Items> relevant_groups() const {
    std::int64_t host = 0, loss = 0, slot = 0;
    for (const Items& items : groups_) {
      std::int64_t most_host = 0, most_loss = 0;
      for (const Item& item : items) {
        most_host = std::max(most_host, item[kHost]);
        most_loss = std::max(most_loss, item[kLoss]);
        slot = std::max(slot, item.slot);
      }
      host += most_host;
      loss += most_loss;
    }
    const bool host_binds = host + model_.slots * slot > model_.host_room;
    const bool loss_counts = model_.loss_weight > 0 || loss > model_.loss_room;
    std::vector<Items> out;
    for (Items items : groups_) {
      auto clear = [&](Row row) {
        for (Item& item : items) item.values[row] = 0, item.weights[row] = 0;
      };
      if (!host_binds) {
        clear(kHost);
        for (Item& item : items) item.staged = false;
      }
      if (!loss_counts) clear(kLoss);
      if (model_.time_weight == 0) {
        for (Row row : {kTurn, kCompute, kLink, kDisk}) clear(row);
      }
      out.push_back(undominated(items));
    }
    return out;
  }

  // A plan's loss and time, whatever the search left out.
  void complete(Plan& plan) const {
    plan.loss = plan.time = 0;
    std::vector<std::array<std::int64_t, 3>> sums(model_.phases);
    for (std::size_t p = 0; p < model_.phases; ++p) sums[p] = {model_.base[p], 0, 0};
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      const auto item = std::find_if(groups_[g].begin(), groups_[g].end(), [&](const Item& i) {
        return i.index == static_cast<std::int64_t>(plan.items[g]);
      });
      plan.loss += (*item)[kLoss];
      plan.time += (*item)[kTurn];
      for (std::size_t j = 0; j < 3; ++j) {
        sums[model_.phase[g]][j] += item->values[kCompute + j];
      }
    }
    for (const auto& [compute, link, disk] : sums) plan.time += std::max({compute, link, disk});
    plan.objective = model_.objective(plan.loss, plan.time);
  }

  // Plans with and without disk differ in their staging: a node for each combination.
  void add_roots() {
    std::vector<std::size_t> choosy;
    Node root;
    root.groups = relevant_groups();
    for (std::size_t p = 0; p < model_.phases; ++p) {
      bool staged = false;
      std::int64_t largest = 0;
      for (std::size_t g = 0; g < groups_.size(); ++g) {
        if (model_.phase[g] != p) continue;
        for (const Item& item : root.groups[g]) {
          staged = staged || item.staged;
          largest = std::max(largest, item.slot);
        }
      }
      root.low.push_back(0);
      root.high.push_back(largest);
      root.disk.push_back(staged ? FromDisk::open : FromDisk::no);
      if (staged) choosy.push_back(p);
    }
    root.bound = 0;
    if (choosy.size() > 4) choosy.resize(4);  // further ones stay open: a weaker bound
    for (std::size_t bits = 0; bits < (std::size_t{1} << choosy.size()); ++bits) {
      Node node = root;
      for (std::size_t i = 0; i < choosy.size(); ++i) {
        node.disk[choosy[i]] = (bits >> i) & 1 ? FromDisk::yes : FromDisk::no;
      }
      consider(std::move(node), kFirstRounds);
    }
  }

  // The phase whose interval hides most of the objective.
  std::optional<std::size_t> widest(const Node& node) const {
    std::optional<std::size_t> out;
    double most = -1;
    for (std::size_t p = 0; p < model_.phases; ++p) {
      const auto width = static_cast<double>(node.high[p] - node.low[p]);
      if (width <= 0) continue;
      const double hidden =
          (node.prices.empty() ? 1.0 : node.prices.front().device[p] + 1e-30) * width;
      if (hidden > most) {
        most = hidden;
        out = p;
      }
    }
    return out;
  }

  void halve(Node node, std::size_t p) {
    const std::int64_t middle = node.low[p] + (node.high[p] - node.low[p]) / 2;
    std::int64_t below = node.low[p], above = node.high[p];
    for (std::size_t g = 0; g < node.groups.size(); ++g) {
      if (model_.phase[g] != p) continue;
      for (const Item& item : node.groups[g]) {
        if (item.slot <= middle) below = std::max(below, item.slot);
        if (item.slot > middle) above = std::min(above, item.slot);
      }
    }
    node.tried = false;
    Node low = node, high = std::move(node);
    low.high[p] = below;
    high.low[p] = above;
    consider(std::move(high), kLaterRounds);
    consider(std::move(low), kLaterRounds);
  }

  // Searches one node with ceilings that double above its bound. True if nothing better is left.
  bool finish_node(Node& node, std::int64_t room) {
    const double limit = ceiling();
    double slack = best_.found ? std::max((limit - node.bound) / 64, std::abs(limit) * 1e-9)
                               : std::numeric_limits<double>::max();
    while (true) {
      const double at = best_.found ? std::min(ceiling(), node.bound + slack) : ceiling();
      if (best_.found && node.bound > at) return true;
      Node small = node;
      if (best_.found) {
        drop_items(model_, small, at);
        for (const Items& items : small.groups) {
          if (!items.empty()) continue;
          small.groups.clear();
          break;
        }
      }
      Found found;
      if (small.groups.size() == node.groups.size()) {
        found = search(model_, small, at, room, std::nullopt);
      }
      states_ += found.states;
      room -= found.states;
      if (found.ended == Ended::found) {
        take(found.plan);
        return true;
      }
      if (found.ended == Ended::full || room <= 0) return false;
      if (at >= ceiling()) return true;
      node.bound = std::max(node.bound, at);
      slack *= 4;
    }
  }

  // Returns the proven bound; closed_ says whether it is met.
  double solve(PlacementResult& result) {
    open_.clear();
    states_ = nodes_ = 0;
    if (best_.found && model_.loss_weight == 0 && model_.time_weight == 0) {
      closed_ = true;
      return 0;
    }
    add_roots();
    double left = std::numeric_limits<double>::infinity();  // least bound of nodes given up
    bool squeezed = false;
    while (!open_.empty()) {
      const auto least =
          std::min_element(open_.begin(), open_.end(),
                           [](const Node& a, const Node& b) { return a.bound < b.bound; });
      Node node = std::move(*least);
      open_.erase(least);
      if (beaten(node.bound)) break;  // and with it all others
      const std::optional<std::size_t> phase = widest(node);
      const bool more = phase && nodes_ < problem_.node_limit;
      const std::int64_t rest = problem_.state_limit - states_;
      const std::int64_t share = problem_.state_limit / kShare;
      const std::int64_t room =
          std::max<std::int64_t>(1, std::min(rest, more ? std::min(share, rest / 4) : rest / 2));
      if (rest > 0 && finish_node(node, room)) continue;
      if (more) {
        halve(std::move(node), *phase);
        continue;
      }
      if (!squeezed || !best_.found) {  // the most promising nodes: any plan will do
        squeezed = true;
        const std::size_t width = std::max<std::size_t>(
            64, static_cast<std::size_t>(problem_.state_limit / 2) / (node.groups.size() + 1));
        const Found found = search(model_, node, ceiling(), 0, width);
        states_ += found.states;
        if (found.ended == Ended::found) take(found.plan);
        if (beaten(node.bound)) continue;
      }
      left = std::min(left, node.bound);
    }
    result.states += states_;
    result.nodes += nodes_;
    closed_ = left == std::numeric_limits<double>::infinity();
    if (closed_ || !best_.found) return best_.found ? best_.objective : 0;
    return std::clamp(left, 0.0, best_.objective);
  }

  void fill(PlacementResult& result) const {
    result.found = true;
    result.choices.assign(problem_.groups.size(), 0);
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      result.choices[model_.ids[g]] = static_cast<std::int64_t>(best_.items[g]);
    }
    struct Sum {
      double compute = 0, link = 0, disk = 0, turn = 0;
      std::int64_t resident = 0, slot = 0;
      bool staged = false;
    };
    std::vector<Sum> sums(problem_.phases.size());
    for (std::size_t g = 0; g < problem_.groups.size(); ++g) {
      const PlacedGroup& group = problem_.groups[g];
      const PlacedChoice& c = group.choices[static_cast<std::size_t>(result.choices[g])];
      Sum& sum = sums[static_cast<std::size_t>(group.phase)];
      sum.compute += c.compute_seconds;
      sum.link += c.link_seconds;
      sum.disk += c.disk_seconds;
      sum.turn += c.turn_seconds;
      sum.resident += c.resident;
      sum.slot = std::max(sum.slot, c.streamed);
      sum.staged = sum.staged || c.staged;
      result.loss += c.loss;
      result.host_bytes += c.host;
    }
    std::int64_t staging = 0;
    for (std::size_t p = 0; p < sums.size(); ++p) {
      const Sum& sum = sums[p];
      result.seconds += sum.turn + std::max({sum.compute + problem_.phases[p].compute_seconds,
                                             sum.link, sum.disk});
      result.device_bytes.push_back(problem_.phases[p].reserved + sum.resident +
                                    problem_.slots * sum.slot);
      result.slot_bytes.push_back(sum.slot);
      if (sum.staged) staging = std::max(staging, sum.slot);
    }
    result.host_bytes += problem_.slots * staging;
    const bool weighted = problem_.preference == Preference::weighted;
    result.objective =
        weighted ? problem_.loss_weight * result.loss + problem_.time_weight * result.seconds
                 : result.loss;
    // In fixed point the bound met the plan; as doubles they may differ in the last bits.
    if (result.optimal) {
      result.lower_bound = result.objective;
      result.seconds_lower_bound = weighted ? 0 : result.seconds;
    } else {
      result.lower_bound = std::min(result.lower_bound, result.objective);
      result.seconds_lower_bound = std::min(result.seconds_lower_bound, result.seconds);
    }
  }

  const PlacementProblem& problem_;
  Model model_;
  std::vector<Items> groups_;
  int loss_shift_ = 0, time_shift_ = 0;
  std::int64_t most_loss_ = 0, most_time_ = 0;
  double worst_ = 0;  // no plan has a larger objective
  Plan best_;
  std::vector<Node> open_;
  std::int64_t states_ = 0, nodes_ = 0;
  bool closed_ = false;
};

}  // namespace

PlacementResult place(const PlacementProblem& problem) { return Solver(problem).run(); }

}  // namespace vramkit
