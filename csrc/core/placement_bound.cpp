// See placement_bound.hpp.
#include "core/placement_bound.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace vramkit::placement {
namespace {

constexpr double kDearest = 1e4;  // bound on a price, in units of the normalized program
constexpr double kTolerance = 1e-10;

// min c x, A x = b, x >= 0 over the columns so far, from a basis that stays feasible. The programs
// have some ten to thirty rows, so the inverse is made anew at each pivot.
class Simplex {
 public:
  struct Column {
    double cost;
    std::vector<double> rows;
  };

  explicit Simplex(std::vector<double> limits) : limits_(std::move(limits)) {}

  std::size_t add(Column column) {
    columns_.push_back(std::move(column));
    return columns_.size() - 1;
  }
  void start(std::vector<std::size_t> basis) { basis_ = std::move(basis); }
  const std::vector<double>& duals() const { return duals_; }
  double value() const { return value_; }
  // Share of a column in the solution.
  double share(std::size_t column) const {
    for (std::size_t i = 0; i < basis_.size(); ++i) {
      if (basis_[i] == column) return solution_[i];
    }
    return 0;
  }
  double reduced_cost(const Column& column) const {
    double cost = column.cost;
    for (std::size_t i = 0; i < limits_.size(); ++i) cost -= duals_[i] * column.rows[i];
    return cost;
  }

  // False if the basis became singular to working precision: the duals are then of no use.
  bool solve(int pivots) {
    for (int step = 0; step <= pivots; ++step) {
      if (!factor()) return false;
      std::size_t enters = columns_.size();
      double least = -kTolerance;
      for (std::size_t c = 0; c < columns_.size(); ++c) {
        const double cost = reduced_cost(columns_[c]);
        if (cost < least) {
          least = cost;
          enters = c;
        }
      }
      if (enters == columns_.size()) return true;
      const std::vector<double> direction = times_inverse(columns_[enters].rows);
      std::size_t leaves = basis_.size();
      double ratio = std::numeric_limits<double>::infinity();
      for (std::size_t i = 0; i < basis_.size(); ++i) {
        if (direction[i] <= 1e-11) continue;
        const double at = std::max(0.0, solution_[i]) / direction[i];
        if (at < ratio || (at == ratio && basis_[i] < basis_[leaves])) {
          ratio = at;
          leaves = i;
        }
      }
      if (leaves == basis_.size()) return false;
      basis_[leaves] = enters;
    }
    return true;
  }

 private:
  std::vector<double> times_inverse(const std::vector<double>& v) const {
    const std::size_t m = limits_.size();
    std::vector<double> out(m, 0);
    for (std::size_t i = 0; i < m; ++i) {
      for (std::size_t j = 0; j < m; ++j) out[i] += inverse_[i * m + j] * v[j];
    }
    return out;
  }

  bool factor() {  // Gauss-Jordan with row pivoting
    const std::size_t m = limits_.size();
    std::vector<double> a(m * m);
    for (std::size_t j = 0; j < m; ++j) {
      for (std::size_t i = 0; i < m; ++i) a[i * m + j] = columns_[basis_[j]].rows[i];
    }
    inverse_.assign(m * m, 0);
    for (std::size_t i = 0; i < m; ++i) inverse_[i * m + i] = 1;
    for (std::size_t k = 0; k < m; ++k) {
      std::size_t pivot = k;
      for (std::size_t i = k + 1; i < m; ++i) {
        if (std::abs(a[i * m + k]) > std::abs(a[pivot * m + k])) pivot = i;
      }
      if (std::abs(a[pivot * m + k]) < 1e-13) return false;
      for (std::size_t j = 0; j < m; ++j) {
        std::swap(a[k * m + j], a[pivot * m + j]);
        std::swap(inverse_[k * m + j], inverse_[pivot * m + j]);
      }
      const double scale = 1 / a[k * m + k];
      for (std::size_t j = 0; j < m; ++j) {
        a[k * m + j] *= scale;
        inverse_[k * m + j] *= scale;
      }
      for (std::size_t i = 0; i < m; ++i) {
        const double factor = a[i * m + k];
        if (i == k || factor == 0) continue;
        for (std::size_t j = 0; j < m; ++j) {
          a[i * m + j] -= factor * a[k * m + j];
          inverse_[i * m + j] -= factor * inverse_[k * m + j];
        }
      }
    }
    solution_ = times_inverse(limits_);
    duals_.assign(m, 0);
    value_ = 0;
    for (std::size_t i = 0; i < m; ++i) {
      const double cost = columns_[basis_[i]].cost;
      value_ += cost * solution_[i];
      for (std::size_t j = 0; j < m; ++j) duals_[j] += cost * inverse_[i * m + j];
    }
    return true;
  }

  std::vector<double> limits_;
  std::vector<Column> columns_;
  std::vector<std::size_t> basis_;
  std::vector<double> inverse_, solution_, duals_;
  double value_ = 0;
};

// The rows of the normalized program: device by phase, host, loss, three times by phase, one plan
// by phase. What each is divided by, and the whole objective.
struct Scales {
  double objective = 1, time = 1, host = 1, loss = 1;
  std::vector<double> device;
  std::vector<double> limits;

  std::size_t phases() const { return device.size(); }
  std::size_t host_row() const { return phases(); }
  std::size_t loss_row() const { return phases() + 1; }
  std::size_t time_row(std::size_t p) const { return phases() + 2 + 3 * p; }
  std::size_t plan_row(std::size_t p) const { return 4 * phases() + 2 + p; }
};

Scales scales_of(const Model& model, const Node& node) {
  Scales out;
  double time = 0, loss = 0, host = 0;
  std::vector<double> device(model.phases, 0);
  for (std::size_t g = 0; g < node.groups.size(); ++g) {
    std::array<double, kRows> most{};
    for (const Item& item : node.groups[g]) {
      for (std::size_t r = 0; r < kRows; ++r) most[r] = std::max(most[r], item.weights[r]);
    }
    time += most[kTurn] + std::max({most[kCompute], most[kLink], most[kDisk]});
    loss += most[kLoss];
    host += most[kHost];
    device[model.phase[g]] += most[kDevice];
  }
  for (std::int64_t base : model.base) time += static_cast<double>(base);
  out.time = std::max(time, 1.0);
  out.objective = model.loss_weight * loss + model.time_weight * time;
  if (out.objective <= 0) out.objective = 1;
  auto scale = [](double room, double most) { return std::max({room, most * 1e-3, 1.0}); };
  for (std::size_t p = 0; p < model.phases; ++p) {
    // A limit that nothing can reach needs no larger figure in the program.
    const double room = std::min(static_cast<double>(device_room(model, node, p)), device[p]);
    out.device.push_back(scale(room, device[p]));
    out.limits.push_back(room / out.device[p]);
  }
  const double host_limit = std::min(static_cast<double>(host_room(model, node)), host);
  out.host = scale(host_limit, host);
  out.limits.push_back(host_limit / out.host);
  const double loss_limit = std::min(static_cast<double>(model.loss_room), loss);
  out.loss = scale(loss_limit, loss);
  out.limits.push_back(loss_limit / out.loss);
  out.limits.resize(4 * model.phases + 2, 0.0);
  out.limits.resize(5 * model.phases + 2, 1.0);
  return out;
}

Prices prices_of(const Scales& scales, const std::vector<double>& duals, double time_weight) {
  Prices out;
  auto price = [&](std::size_t row, double scale) {
    return std::max(0.0, -duals[row]) * scales.objective / scale;
  };
  for (std::size_t p = 0; p < scales.phases(); ++p) {
    out.device.push_back(price(p, scales.device[p]));
    std::array<double, 3> time{};
    double sum = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      time[j] = price(scales.time_row(p) + j, scales.time);
      sum += time[j];
    }
    // They split the weight of time exactly, else the bound would not hold.
    for (double& t : time) t = sum > 0 ? t / sum * time_weight : time_weight / 3;
    out.time.push_back(time);
  }
  out.host = price(scales.host_row(), scales.host);
  out.loss = price(scales.loss_row(), scales.loss);
  return out;
}

Prices mixed(const Prices& a, const Prices& b, double share) {
  auto mix = [&](double x, double y) { return share * x + (1 - share) * y; };
  Prices out = a;
  out.host = mix(a.host, b.host);
  out.loss = mix(a.loss, b.loss);
  for (std::size_t p = 0; p < a.device.size(); ++p) {
    out.device[p] = mix(a.device[p], b.device[p]);
    for (std::size_t j = 0; j < 3; ++j) out.time[p][j] = mix(a.time[p][j], b.time[p][j]);
  }
  return out;
}

// A phase's part of the plan that `picks` makes, as a column.
Simplex::Column column_of(const Model& model, const Node& node, const Scales& scales,
                          const std::vector<std::size_t>& picks, std::size_t p) {
  std::array<double, kRows> sums{};
  sums[kCompute] = static_cast<double>(model.base[p]);
  for (std::size_t g = 0; g < node.groups.size(); ++g) {
    if (model.phase[g] != p) continue;
    const Item& item = node.groups[g][picks[g]];
    for (std::size_t r = 0; r < kRows; ++r) sums[r] += item.weights[r];
  }
  Simplex::Column out{
      (model.loss_weight * sums[kLoss] + model.time_weight * sums[kTurn]) / scales.objective,
      std::vector<double>(scales.limits.size(), 0)};
  out.rows[p] = sums[kDevice] / scales.device[p];
  out.rows[scales.host_row()] = sums[kHost] / scales.host;
  out.rows[scales.loss_row()] = sums[kLoss] / scales.loss;
  for (std::size_t j = 0; j < 3; ++j) {
    out.rows[scales.time_row(p) + j] = sums[kCompute + j] / scales.time;
  }
  out.rows[scales.plan_row(p)] = 1;
  return out;
}

Simplex::Column unit(std::size_t rows, std::size_t row, double sign, double cost) {
  Simplex::Column out{cost, std::vector<double>(rows, 0)};
  out.rows[row] = sign;
  return out;
}

// The program with one plan by phase, at the basis that this plan gives.
Simplex first_program(const Model& model, const Node& node, const Scales& scales,
                      const std::vector<std::size_t>& picks) {
  Simplex out(scales.limits);
  const std::size_t rows = scales.limits.size();
  std::vector<std::size_t> basis;
  std::vector<double> used(rows, 0);
  for (std::size_t p = 0; p < model.phases; ++p) {
    Simplex::Column column = column_of(model, node, scales, picks, p);
    for (std::size_t i = 0; i < rows; ++i) used[i] += column.rows[i];
    basis.push_back(out.add(std::move(column)));
  }
  for (std::size_t row = 0; row < model.phases + 2; ++row) {
    const std::size_t slack = out.add(unit(rows, row, 1, 0));
    const std::size_t excess = out.add(unit(rows, row, -1, kDearest));
    basis.push_back(used[row] <= scales.limits[row] ? slack : excess);
  }
  for (std::size_t p = 0; p < model.phases; ++p) {
    const std::size_t first = scales.time_row(p);
    Simplex::Column time{model.time_weight * scales.time / scales.objective,
                         std::vector<double>(rows, 0)};
    std::size_t longest = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      time.rows[first + j] = -1;
      if (used[first + j] > used[first + longest]) longest = j;
    }
    basis.push_back(out.add(std::move(time)));
    for (std::size_t j = 0; j < 3; ++j) {
      const std::size_t slack = out.add(unit(rows, first + j, 1, 0));
      if (j != longest) basis.push_back(slack);
    }
  }
  out.start(std::move(basis));
  return out;
}

}  // namespace

double price_of(const Model& model, const Prices& prices, std::size_t p, const Item& item) {
  const std::array<double, kRows>& w = item.weights;
  const std::array<double, 3>& time = prices.time[p];
  return prices.device[p] * w[kDevice] + prices.host * w[kHost] +
         (model.loss_weight + prices.loss) * w[kLoss] + model.time_weight * w[kTurn] +
         time[0] * w[kCompute] + time[1] * w[kLink] + time[2] * w[kDisk];
}

double priced_bound(const Model& model, const Node& node, const Prices& prices,
                    std::vector<std::size_t>& picks) {
  double bound = 0, size = 0;
  auto add = [&](double value) {
    bound += value;
    size += std::abs(value);
  };
  picks.resize(node.groups.size());
  for (std::size_t g = 0; g < node.groups.size(); ++g) {
    const Items& items = node.groups[g];
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < items.size(); ++i) {
      const double price = price_of(model, prices, model.phase[g], items[i]);
      if (price < least) {
        least = price;
        picks[g] = i;
      }
    }
    add(least);
  }
  for (std::size_t p = 0; p < model.phases; ++p) {
    add(prices.time[p][0] * static_cast<double>(model.base[p]));
    add(-prices.device[p] * static_cast<double>(device_room(model, node, p)));
  }
  if (prices.host > 0) add(-prices.host * static_cast<double>(host_room(model, node)));
  if (prices.loss > 0) add(-prices.loss * static_cast<double>(model.loss_room));
  // Rounding of the sums above, and of the fixed-point figures as doubles.
  return bound - size * (1e-15 * static_cast<double>(node.groups.size() + 16));
}

std::vector<std::vector<std::size_t>> improve_bound(const Model& model, Node& node, int rounds) {
  const Scales scales = scales_of(model, node);
  std::vector<std::size_t> picks;
  std::vector<std::vector<std::size_t>> plans;
  Prices best;
  double best_bound = -std::numeric_limits<double>::infinity();
  std::vector<Prices> good;
  auto try_prices = [&](const Prices& prices) {
    const double bound = priced_bound(model, node, prices, picks);
    if (bound > best_bound) {
      best_bound = bound;
      best = prices;
      good.insert(good.begin(), prices);
      if (good.size() > 3) good.pop_back();
    }
  };
  Prices free_of_charge =
      prices_of(scales, std::vector<double>(scales.limits.size(), 0.0), model.time_weight);
  try_prices(node.prices.empty() ? free_of_charge : node.prices.front());
  Simplex program = first_program(model, node, scales, picks);
  std::vector<std::pair<std::size_t, std::size_t>> columns;  // (column of phase 0, plan)
  double share = node.prices.empty() ? 0.3 : 0.5;
  for (int round = 0; round < rounds && program.solve(200); ++round) {
    const Prices exact = prices_of(scales, program.duals(), model.time_weight);
    const double value = program.value() * scales.objective;
    if (value - best_bound <= 1e-9 * std::max(std::abs(value), std::abs(best_bound))) break;
    try_prices(mixed(best, exact, share));
    bool added = false;
    for (std::size_t p = 0; p < model.phases; ++p) {
      Simplex::Column column = column_of(model, node, scales, picks, p);
      if (program.reduced_cost(column) < -kTolerance) {
        const std::size_t at = program.add(std::move(column));
        if (p == 0) columns.emplace_back(at, plans.size());
        added = true;
      }
    }
    if (added) {
      plans.push_back(picks);
      share = std::min(0.5, share + 0.1);
    } else if (share == 0) {
      break;
    } else {
      share = share > 0.1 ? share / 2 : 0;  // the mix priced nothing new: nearer to the program's
    }
  }
  node.bound = std::max(node.bound, best_bound);
  node.prices = std::move(good);
  // The plan at the best prices, and those that the program mixes most.
  priced_bound(model, node, best, picks);
  std::stable_sort(columns.begin(), columns.end(), [&](const auto& a, const auto& b) {
    return program.share(a.first) > program.share(b.first);
  });
  std::vector<std::vector<std::size_t>> out{picks};
  for (std::size_t i = 0; i < std::min<std::size_t>(2, columns.size()); ++i) {
    out.push_back(plans[columns[i].second]);
  }
  return out;
}

void drop_items(const Model& model, Node& node, double ceiling) {
  if (node.prices.empty()) return;
  std::vector<std::size_t> picks;
  const Prices& prices = node.prices.front();
  const double bound = priced_bound(model, node, prices, picks);
  for (std::size_t g = 0; g < node.groups.size(); ++g) {
    const std::size_t p = model.phase[g];
    const double least = price_of(model, prices, p, node.groups[g][picks[g]]);
    std::erase_if(node.groups[g], [&](const Item& item) {
      const double price = price_of(model, prices, p, item);
      const double slip = 1e-14 * (std::abs(price) + std::abs(least));
      return bound + (price - least) - slip > ceiling;
    });
  }
}

}  // namespace vramkit::placement
