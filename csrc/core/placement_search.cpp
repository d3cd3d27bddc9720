// See placement_search.hpp.
#include "core/placement_search.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "core/placement_bound.hpp"

namespace vramkit::placement {
namespace {

constexpr std::size_t kCompared = 32;  // how many neighbours a partial plan is compared with

// A partial plan. Device, slot and the three times are those of the phase at work.
struct State {
  std::int64_t device = 0, slot = 0, compute = 0, link = 0, disk = 0;
  std::int64_t host = 0, staging = 0, loss = 0;
  std::int64_t time = 0;  // turns, and the finished phases
  bool staged = false;
  std::uint32_t parent = 0, item = 0;
};

// The least that the groups not yet taken add.
struct Rest {
  // Of device, compute, link and disk: this phase's groups.
  std::array<std::int64_t, kRows> least{}, most{};
  std::int64_t later_time = 0;  // of the phases after this one
  std::vector<double> priced;   // by prices
};

class Lists {
 public:
  Lists(const Model& model, const Node& node, double ceiling, std::optional<std::size_t> width)
      : model_(model), node_(node), ceiling_(ceiling), width_(width) {
    order();
    sum_rests();
    loss_binds_ = rests_[0].most[kLoss] > model_.loss_room;
    for (std::size_t p = 0; p < model_.phases; ++p) {
      if (node_.disk[p] != FromDisk::no) staging_ = std::max(staging_, node_.high[p]);
    }
    staging_ *= model_.slots;
  }

  Found run(std::int64_t room) {
    Found out;
    State start;
    start.compute = model_.base[0];
    lists_.assign(1, {start});
    for (std::size_t k = 0; k < order_.size(); ++k) {
      std::vector<State> next;
      if (!extend(k, next, room - out.states)) {
        out.ended = Ended::full;
        return out;
      }
      out.states += static_cast<std::int64_t>(next.size());
      if (next.empty()) return out;
      lists_.push_back(std::move(next));
    }
    finish(out);
    return out;
  }

 private:
  std::size_t phase_of(std::size_t k) const { return model_.phase[order_[k]]; }

  // Phase by phase; within one, the groups that can change most by price come first, so that what
  // is left can be filled nearly as well as the bound believes.
  void order() {
    order_.resize(node_.groups.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    std::vector<std::int64_t> reach(order_.size(), 0);
    for (std::size_t g = 0; g < order_.size(); ++g) {
      const Items& items = node_.groups[g];
      for (Row row : {kDevice, kHost}) {
        auto [low, high] =
            std::minmax_element(items.begin(), items.end(),
                                [row](const Item& a, const Item& b) { return a[row] < b[row]; });
        reach[g] = std::max(reach[g], (*high)[row] - (*low)[row]);
      }
    }
    std::stable_sort(order_.begin(), order_.end(), [&](std::size_t a, std::size_t b) {
      if (model_.phase[a] != model_.phase[b]) return model_.phase[a] < model_.phase[b];
      return reach[a] > reach[b];
    });
  }

  void sum_rests() {
    rests_.resize(order_.size() + 1);
    rests_.back().priced.assign(node_.prices.size(), 0.0);
    for (std::size_t k = order_.size(); k-- > 0;) {
      const std::size_t p = phase_of(k);
      Rest rest = rests_[k + 1];
      if (k + 1 < order_.size() && phase_of(k + 1) != p) {
        const std::size_t later = phase_of(k + 1);
        rest.later_time += std::max(
            {rest.least[kCompute] + model_.base[later], rest.least[kLink], rest.least[kDisk]});
        for (Row row : {kDevice, kCompute, kLink, kDisk}) rest.least[row] = rest.most[row] = 0;
      }
      const Items& items = node_.groups[order_[k]];
      for (std::size_t r = 0; r < kRows; ++r) {
        std::int64_t least = std::numeric_limits<std::int64_t>::max(), most = 0;
        for (const Item& item : items) {
          least = std::min(least, item.values[r]);
          most = std::max(most, item.values[r]);
        }
        rest.least[r] += least;
        rest.most[r] += most;
      }
      for (std::size_t v = 0; v < node_.prices.size(); ++v) {
        double least = std::numeric_limits<double>::infinity();
        for (const Item& item : items) {
          least = std::min(least, price_of(model_, node_.prices[v], p, item));
        }
        rest.priced[v] += least;
      }
      rests_[k] = std::move(rest);
    }
    // What the prices allow for the limits from phase p on, and the size of all that is summed.
    for (const Prices& prices : node_.prices) {
      std::vector<double> allowed(model_.phases + 1, 0);
      double size = std::abs(rests_[0].priced[credits_.size()]);
      for (std::size_t p = model_.phases; p-- > 0;) {
        const double device = prices.device[p] * static_cast<double>(device_room(model_, node_, p));
        const double base = prices.time[p][0] * static_cast<double>(model_.base[p]);
        allowed[p] = allowed[p + 1] + device - base;
        size += std::abs(device) + base;
      }
      double fixed = 0;
      if (prices.host > 0) fixed += prices.host * static_cast<double>(host_room(model_, node_));
      if (prices.loss > 0) fixed += prices.loss * static_cast<double>(model_.loss_room);
      for (double& value : allowed) value += fixed;
      margins_.push_back((size + std::abs(fixed)) * 1e-15 *
                         static_cast<double>(order_.size() + 16));
      credits_.push_back(std::move(allowed));
    }
  }

  bool fits(const State& s, std::size_t p, const Rest& rest) const {
    const std::int64_t slots = model_.slots * std::max(s.slot, node_.low[p]);
    if (s.device + rest.least[kDevice] + slots > model_.room[p]) return false;
    if (s.loss + rest.least[kLoss] > model_.loss_room) return false;
    const std::int64_t staging =
        std::max(s.staging, s.staged ? std::max(s.slot, node_.low[p]) : std::int64_t{0});
    return s.host + rest.least[kHost] + model_.slots * staging <= model_.host_room;
  }

  // Raises what cannot matter any more to the most that would not: no completion takes longer or
  // fits less for it, bounds become tighter, and more partial plans beat each other.
  void forget(State& s, std::size_t p, const Rest& rest) const {
    const std::int64_t compute = s.compute + rest.least[kCompute];
    const std::int64_t link = s.link + rest.least[kLink];
    const std::int64_t disk = s.disk + rest.least[kDisk];
    s.compute = std::max(s.compute, std::max(link, disk) - rest.most[kCompute]);
    s.link = std::max(s.link, std::max(compute, disk) - rest.most[kLink]);
    s.disk = std::max(s.disk, std::max(compute, link) - rest.most[kDisk]);
    s.slot = std::max(s.slot, node_.low[p]);
    s.device = std::max(s.device, model_.room[p] - model_.slots * std::max(s.slot, node_.high[p]) -
                                      rest.most[kDevice]);
    s.host = std::max(s.host, model_.host_room - staging_ - rest.most[kHost]);
  }

  bool beats(const State& a, const State& b) const {
    if (a.device > b.device || a.slot > b.slot || a.compute > b.compute || a.link > b.link ||
        a.disk > b.disk || a.host > b.host || a.staging > b.staging || a.staged > b.staged) {
      return false;
    }
    if (a.loss <= b.loss && a.time <= b.time) return true;
    // Where the limit of the loss cannot be reached, only the sum counts.
    return !loss_binds_ && model_.objective(a.loss, a.time) < model_.objective(b.loss, b.time);
  }

  // No completion of `s` has a smaller objective.
  double bound(const State& s, std::size_t p, const Rest& rest) const {
    const std::int64_t longest = std::max(
        {s.compute + rest.least[kCompute], s.link + rest.least[kLink], s.disk + rest.least[kDisk]});
    double best = model_.objective(s.loss + rest.least[kLoss],
                                   s.time + rest.least[kTurn] + longest + rest.later_time);
    best -= 1e-15 * std::abs(best);
    for (std::size_t v = 0; v < node_.prices.size(); ++v) {
      const Prices& prices = node_.prices[v];
      const std::array<double, 3>& time = prices.time[p];
      // The room of this phase's device is dearer if the slot has grown.
      const auto grown =
          static_cast<double>(model_.slots * (std::max(s.slot, node_.low[p]) - node_.low[p]));
      const double own = static_cast<double>(model_.base[p]) * time[0];  // is in s.compute
      const double value =
          prices.device[p] * (static_cast<double>(s.device) + grown) +
          prices.host * static_cast<double>(s.host) +
          (model_.loss_weight + prices.loss) * static_cast<double>(s.loss) +
          model_.time_weight * static_cast<double>(s.time) +
          time[0] * static_cast<double>(s.compute) + time[1] * static_cast<double>(s.link) +
          time[2] * static_cast<double>(s.disk) - own + rest.priced[v] - credits_[v][p];
      best = std::max(best, value - margins_[v]);
    }
    return best;
  }

  State enter(State s, std::size_t from, std::size_t to) const {
    close(s, from);
    for (std::size_t p = from + 1; p < to; ++p) s.time += model_.base[p];  // no layers of its own
    s.compute = model_.base[to];
    return s;
  }

  void close(State& s, std::size_t p) const {
    s.time += std::max({s.compute, s.link, s.disk});
    if (s.staged) s.staging = std::max(s.staging, std::max(s.slot, node_.low[p]));
    s.device = s.slot = s.compute = s.link = s.disk = 0;
    s.staged = false;
  }

  bool extend(std::size_t k, std::vector<State>& out, std::int64_t room) {
    const std::vector<State>& from = lists_.back();
    const std::size_t p = phase_of(k), before = k == 0 ? 0 : phase_of(k - 1);
    const Items& items = node_.groups[order_[k]];
    const Rest& rest = rests_[k + 1];
    // The rest's device and times are this phase's only if the next group is in it too.
    Rest here = rest;
    if (k + 1 < order_.size() && phase_of(k + 1) != p) {
      const std::size_t next = phase_of(k + 1);
      here.later_time += std::max(
          {rest.least[kCompute] + model_.base[next], rest.least[kLink], rest.least[kDisk]});
      for (Row row : {kDevice, kCompute, kLink, kDisk}) here.least[row] = here.most[row] = 0;
    }
    std::vector<std::pair<double, State>> made;
    for (std::size_t i = 0; i < from.size(); ++i) {
      State at = from[i];
      if (p != before || k == 0) at = k == 0 ? enter_first(at, p) : enter(at, before, p);
      for (std::size_t c = 0; c < items.size(); ++c) {
        const Item& item = items[c];
        State s = at;
        s.device += item[kDevice];
        s.host += item[kHost];
        s.loss += item[kLoss];
        s.time += item[kTurn];
        s.compute += item[kCompute];
        s.link += item[kLink];
        s.disk += item[kDisk];
        s.slot = std::max(s.slot, item.slot);
        s.staged = s.staged || item.staged;
        s.parent = static_cast<std::uint32_t>(i);
        s.item = static_cast<std::uint32_t>(c);
        if (!fits(s, p, here)) continue;
        forget(s, p, here);
        const double least = bound(s, p, here);
        if (least > ceiling_) continue;
        made.emplace_back(least, s);
        if (!width_ && static_cast<std::int64_t>(made.size()) > 2 * room + 1024) {
          drop_beaten(made);
          if (static_cast<std::int64_t>(made.size()) > room) return false;
        }
      }
    }
    drop_beaten(made);
    if (width_ && made.size() > *width_) {
      std::nth_element(made.begin(), made.begin() + static_cast<std::ptrdiff_t>(*width_),
                       made.end(), [](const auto& a, const auto& b) {
                         return a.first != b.first ? a.first < b.first
                                                   : earlier(a.second, b.second);
                       });
      made.resize(*width_);
      std::sort(made.begin(), made.end(),
                [](const auto& a, const auto& b) { return earlier(a.second, b.second); });
    }
    if (!width_ && static_cast<std::int64_t>(made.size()) > room) return false;
    out.reserve(made.size());
    for (const auto& [least, s] : made) out.push_back(s);
    return true;
  }

  State enter_first(State s, std::size_t p) const { return p == 0 ? s : enter(s, 0, p); }

  static bool earlier(const State& a, const State& b) {
    return a.parent != b.parent ? a.parent < b.parent : a.item < b.item;
  }

  // Drops partial plans that a neighbour, in the order of their sizes, beats in everything. Not
  // all that could be dropped are found, which costs room and no correctness.
  void drop_beaten(std::vector<std::pair<double, State>>& made) const {
    std::sort(made.begin(), made.end(), [](const auto& x, const auto& y) {
      const State &a = x.second, &b = y.second;
      if (a.device != b.device) return a.device < b.device;
      if (a.link != b.link) return a.link < b.link;
      if (a.loss != b.loss) return a.loss < b.loss;
      if (a.compute != b.compute) return a.compute < b.compute;
      if (a.host != b.host) return a.host < b.host;
      if (a.disk != b.disk) return a.disk < b.disk;
      if (a.time != b.time) return a.time < b.time;
      if (a.slot != b.slot) return a.slot < b.slot;
      if (a.staging != b.staging) return a.staging < b.staging;
      if (a.staged != b.staged) return a.staged < b.staged;
      return earlier(a, b);
    });
    std::size_t kept = 0;
    for (std::size_t i = 0; i < made.size(); ++i) {
      bool beaten = false;
      for (std::size_t j = kept; j > 0 && kept - j < kCompared && !beaten; --j) {
        beaten = beats(made[j - 1].second, made[i].second);
      }
      if (!beaten) made[kept++] = made[i];
    }
    made.resize(kept);
  }

  void finish(Found& out) const {
    const std::vector<State>& last = lists_.back();
    const std::size_t count = order_.size();
    std::size_t best = last.size();
    double least = 0;
    State total;
    for (std::size_t i = 0; i < last.size(); ++i) {
      State s = last[i];
      const std::size_t at = count == 0 ? 0 : phase_of(count - 1);
      close(s, at);
      for (std::size_t p = at + 1; p < model_.phases; ++p) s.time += model_.base[p];
      const double objective = model_.objective(s.loss, s.time);
      if (objective <= ceiling_ && (best == last.size() || objective < least)) {
        best = i;
        least = objective;
        total = s;
      }
    }
    if (best == last.size()) return;
    out.ended = Ended::found;
    out.plan.found = true;
    out.plan.objective = least;
    out.plan.loss = total.loss;
    out.plan.time = total.time;
    out.plan.items.assign(count, 0);
    for (std::size_t k = count; k-- > 0;) {
      const State& s = lists_[k + 1][best];
      out.plan.items[order_[k]] = static_cast<std::size_t>(node_.groups[order_[k]][s.item].index);
      best = s.parent;
    }
  }

  const Model& model_;
  const Node& node_;
  const double ceiling_;
  const std::optional<std::size_t> width_;
  bool loss_binds_ = false;
  std::int64_t staging_ = 0;  // the most that staging can take
  std::vector<std::size_t> order_;
  std::vector<Rest> rests_;  // after 0, 1, … groups
  std::vector<std::vector<double>> credits_;
  std::vector<double> margins_;
  std::vector<std::vector<State>> lists_;
};

}  // namespace

Found search(const Model& model, const Node& node, double ceiling, std::int64_t room,
             std::optional<std::size_t> width) {
  return Lists(model, node, ceiling, width).run(room);
}

}  // namespace vramkit::placement
