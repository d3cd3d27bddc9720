// Good plans quickly: rounding the bound's picks, then single moves and pairs of moves.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/placement_bound.hpp"
#include "core/placement_search.hpp"

namespace vramkit::placement {
namespace {

constexpr std::size_t kPairMoves = 100;  // the moves that are tried in pairs
constexpr int kRepairs = 40;
constexpr int kSingles = 200, kPairs = 24;  // improvements, at most

struct Move {
  std::size_t group, item;
  double price;  // what it adds to the bound
};

// A plan's sums, with slots and staging at the node's largest.
class Sums {
 public:
  Sums(const Model& model, const Node& node) : model_(model), node_(node) {
    by_phase_.assign(model.phases, {});
    std::int64_t staging = 0;
    for (std::size_t p = 0; p < model.phases; ++p) {
      by_phase_[p][kCompute] = model.base[p];
      device_room_.push_back(model.room[p] - model.slots * node.high[p]);
      if (node.disk[p] != FromDisk::no) staging = std::max(staging, node.high[p]);
    }
    host_room_ = model.host_room - model.slots * staging;
  }

  void add(std::size_t g, const Item& item, std::int64_t sign) {
    std::array<std::int64_t, kRows>& sums = by_phase_[model_.phase[g]];
    for (std::size_t r = 0; r < kRows; ++r) sums[r] += sign * item.values[r];
    host_ += sign * item[kHost];
    loss_ += sign * item[kLoss];
  }
  void move(std::size_t g, std::vector<std::size_t>& items, std::size_t to) {
    add(g, node_.groups[g][items[g]], -1);
    items[g] = to;
    add(g, node_.groups[g][to], 1);
  }

  // By how much the limits are missed, each as a share of itself; 0 if all hold.
  double excess() const {
    double out = 0;
    auto over = [&](std::int64_t used, std::int64_t room) {
      if (used > room) {
        out += static_cast<double>(used - room) / (1 + std::abs(static_cast<double>(room)));
      }
    };
    for (std::size_t p = 0; p < by_phase_.size(); ++p) over(by_phase_[p][kDevice], device_room_[p]);
    over(host_, host_room_);
    over(loss_, model_.loss_room);
    return out;
  }
  std::int64_t time() const {
    std::int64_t out = 0;
    for (const auto& sums : by_phase_) {
      out += sums[kTurn] + std::max({sums[kCompute], sums[kLink], sums[kDisk]});
    }
    return out;
  }
  std::int64_t loss() const { return loss_; }
  double objective() const { return model_.objective(loss_, time()); }

 private:
  const Model& model_;
  const Node& node_;
  std::vector<std::array<std::int64_t, kRows>> by_phase_;
  std::vector<std::int64_t> device_room_;
  std::int64_t host_room_ = 0, host_ = 0, loss_ = 0;
};

// Every other item of each group by what it adds to the bound, the least first.
std::vector<Move> moves_of(const Model& model, const Node& node) {
  std::vector<Move> out;
  const Prices& prices = node.prices.front();
  for (std::size_t g = 0; g < node.groups.size(); ++g) {
    const std::size_t p = model.phase[g];
    double least = std::numeric_limits<double>::infinity();
    for (const Item& item : node.groups[g]) {
      least = std::min(least, price_of(model, prices, p, item));
    }
    for (std::size_t i = 0; i < node.groups[g].size(); ++i) {
      out.push_back({g, i, price_of(model, prices, p, node.groups[g][i]) - least});
    }
  }
  std::stable_sort(out.begin(), out.end(),
                   [](const Move& a, const Move& b) { return a.price < b.price; });
  return out;
}

// Moves in the order of their price for each share of the excess that they remove, all of a list
// before the rates are taken anew.
bool repair(const std::vector<Move>& moves, double floor, Sums& sums,
            std::vector<std::size_t>& items) {
  std::vector<std::pair<double, const Move*>> helpful;
  auto excess_with = [&](const Move& move) {
    const std::size_t was = items[move.group];
    sums.move(move.group, items, move.item);
    const double now = sums.excess();
    sums.move(move.group, items, was);
    return now;
  };
  double excess = sums.excess();
  for (int round = 0; excess > 0 && round < kRepairs; ++round) {
    helpful.clear();
    for (const Move& move : moves) {
      if (items[move.group] == move.item) continue;
      const double removed = excess - excess_with(move);
      if (removed > 0) helpful.emplace_back((move.price + floor) / removed, &move);
    }
    std::stable_sort(helpful.begin(), helpful.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    const double before = excess;
    std::vector<char> moved(items.size(), 0);
    for (const auto& [rate, move] : helpful) {
      if (excess <= 0) break;
      if (moved[move->group] || excess_with(*move) >= excess) continue;
      moved[move->group] = 1;
      sums.move(move->group, items, move->item);
      excess = sums.excess();
    }
    if (excess >= before) return false;
  }
  return excess <= 0;
}

bool improve_singly(const std::vector<Move>& moves, Sums& sums, std::vector<std::size_t>& items) {
  const double before = sums.objective();
  double least = before;
  const Move* best = nullptr;
  for (const Move& move : moves) {
    const std::size_t was = items[move.group];
    if (was == move.item) continue;
    sums.move(move.group, items, move.item);
    const double now = sums.objective();
    if (now < least && sums.excess() <= 0) {
      least = now;
      best = &move;
    }
    sums.move(move.group, items, was);
  }
  if (best == nullptr) return false;
  sums.move(best->group, items, best->item);
  return true;
}

bool improve_in_pairs(const std::vector<Move>& moves, Sums& sums, std::vector<std::size_t>& items) {
  std::vector<const Move*> near;
  for (const Move& move : moves) {
    if (items[move.group] != move.item) near.push_back(&move);
    if (near.size() == kPairMoves) break;
  }
  double least = sums.objective();
  std::pair<const Move*, const Move*> best{nullptr, nullptr};
  for (std::size_t i = 0; i < near.size(); ++i) {
    const Move& a = *near[i];
    const std::size_t was_a = items[a.group];
    sums.move(a.group, items, a.item);
    for (std::size_t j = i + 1; j < near.size(); ++j) {
      const Move& b = *near[j];
      if (b.group == a.group) continue;
      const std::size_t was_b = items[b.group];
      sums.move(b.group, items, b.item);
      const double now = sums.objective();
      if (now < least && sums.excess() <= 0) {
        least = now;
        best = {&a, &b};
      }
      sums.move(b.group, items, was_b);
    }
    sums.move(a.group, items, was_a);
  }
  if (best.first == nullptr) return false;
  sums.move(best.first->group, items, best.first->item);
  sums.move(best.second->group, items, best.second->item);
  return true;
}

}  // namespace

Plan polish(const Model& model, const Node& node, std::vector<std::size_t> picks) {
  Plan out;
  std::vector<Move> moves = moves_of(model, node);
  const std::size_t most = std::max<std::size_t>(4 * node.groups.size(), 400);
  if (moves.size() > most) moves.resize(most);
  Sums sums(model, node);
  for (std::size_t g = 0; g < node.groups.size(); ++g) sums.add(g, node.groups[g][picks[g]], 1);
  // Moves that cost nothing by price differ in how far they go: a small floor tells them apart.
  const double floor =
      moves.empty() ? 0 : moves[moves.size() / 2].price * 1e-3 + std::abs(node.bound) * 1e-12;
  if (!repair(moves, floor, sums, picks)) return out;
  int singles = 0, pairs = 0;
  while (true) {
    if (singles < kSingles && improve_singly(moves, sums, picks)) {
      ++singles;
    } else if (pairs < kPairs && improve_in_pairs(moves, sums, picks)) {
      ++pairs;
    } else {
      break;
    }
  }
  out.found = true;
  out.loss = sums.loss();
  out.time = sums.time();
  out.objective = sums.objective();
  for (std::size_t g = 0; g < node.groups.size(); ++g) {
    out.items.push_back(static_cast<std::size_t>(node.groups[g][picks[g]].index));
  }
  return out;
}

}  // namespace vramkit::placement
