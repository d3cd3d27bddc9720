// See placement_input.hpp; and the least bytes that a problem needs, which take no search.
#include "core/placement_input.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/error.hpp"

namespace vramkit {
namespace placement {
namespace {

std::int64_t added(std::int64_t a, std::int64_t b) {
  std::int64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) {
    throw InvalidArgument(
        "placement: sizes add up to more than 2^63 - 1 bytes; check that they are in bytes");
  }
  return sum;
}

std::int64_t times(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw InvalidArgument("placement: the slots take more than 2^63 - 1 bytes");
  }
  return product;
}

void check_figure(double value, const std::string& where, const char* what) {
  if (!std::isfinite(value) || value < 0) {
    throw InvalidArgument(where + " has " + what + " " + std::to_string(value) +
                          "; it must be finite and 0 or more");
  }
}

bool covers(const Item& a, const Item& b) {
  for (std::size_t r = 0; r < kRows; ++r) {
    if (a.values[r] > b.values[r]) return false;
  }
  return a.slot <= b.slot && a.staged <= b.staged;
}

}  // namespace

Totals check(const PlacementProblem& problem) {
  Totals totals;
  if (problem.phases.empty()) throw InvalidArgument("placement: there is no phase");
  if (problem.phases.size() > 16) throw InvalidArgument("placement: more than 16 phases");
  if (problem.slots < 1 || problem.slots > 64) {
    throw InvalidArgument("placement: slots is " + std::to_string(problem.slots) +
                          "; it must be 1 to 64");
  }
  if (problem.state_limit < 1 || problem.node_limit < 1) {
    throw InvalidArgument("placement: state_limit and node_limit must be at least 1");
  }
  if (std::isnan(problem.loss_limit) || problem.loss_limit < 0) {
    throw InvalidArgument("placement: the limit of the loss must be 0 or more");
  }
  check_figure(problem.loss_weight, "placement: the problem", "the weight of losses");
  check_figure(problem.time_weight, "placement: the problem", "the weight of seconds");
  std::int64_t bytes = 0;
  for (std::size_t p = 0; p < problem.phases.size(); ++p) {
    const std::string where = "placement: phase " + std::to_string(p);
    check_figure(problem.phases[p].compute_seconds, where, "seconds");
    if (problem.phases[p].reserved < 0) throw InvalidArgument(where + " reserves negative bytes");
    bytes = added(bytes, problem.phases[p].reserved);
    totals.seconds += problem.phases[p].compute_seconds;
  }
  for (std::size_t g = 0; g < problem.groups.size(); ++g) {
    const PlacedGroup& group = problem.groups[g];
    const std::string where = "placement: group " + std::to_string(g);
    if (group.choices.empty()) throw InvalidArgument(where + " has no choices");
    if (group.phase < 0 || group.phase >= static_cast<std::int64_t>(problem.phases.size())) {
      throw InvalidArgument(where + " names phase " + std::to_string(group.phase) + " of " +
                            std::to_string(problem.phases.size()));
    }
    std::int64_t most = 0;
    double loss = 0, seconds = 0;
    for (const PlacedChoice& c : group.choices) {
      if (c.resident < 0 || c.streamed < 0 || c.host < 0) {
        throw InvalidArgument(where + " has a choice of negative size");
      }
      check_figure(c.loss, where, "a loss of");
      for (double s : {c.compute_seconds, c.link_seconds, c.disk_seconds, c.turn_seconds}) {
        check_figure(s, where, "seconds");
      }
      // Two to the sixth slots at most: no later sum of sizes overflows either.
      most = std::max(most, added(added(c.resident, c.host), times(c.streamed, 128)));
      loss = std::max(loss, c.loss);
      seconds =
          std::max(seconds, c.compute_seconds + c.link_seconds + c.disk_seconds + c.turn_seconds);
    }
    bytes = added(bytes, most);
    totals.loss += loss;
    totals.seconds += seconds;
  }
  if (!std::isfinite(totals.loss) || !std::isfinite(totals.seconds)) {
    throw InvalidArgument("placement: losses or seconds add up past the range of a double");
  }
  return totals;
}

Items undominated(const Items& items) {
  Items out;
  for (std::size_t i = 0; i < items.size(); ++i) {
    bool beaten = false;
    for (std::size_t j = 0; j < items.size() && !beaten; ++j) {
      beaten = j != i && covers(items[j], items[i]) && (j < i || !covers(items[i], items[j]));
    }
    if (!beaten) out.push_back(items[i]);
  }
  return out;
}

}  // namespace placement

std::vector<PhaseNeed> least_device_bytes(const PlacementProblem& problem) {
  placement::check(problem);
  std::vector<PhaseNeed> out;
  for (std::size_t p = 0; p < problem.phases.size(); ++p) {
    struct Option {
      std::int64_t slot, resident;
      std::size_t group;
    };
    std::vector<Option> options;
    std::size_t groups = 0;
    for (const PlacedGroup& group : problem.groups) {
      if (group.phase != static_cast<std::int64_t>(p)) continue;
      for (const PlacedChoice& c : group.choices)
        options.push_back({c.streamed, c.resident, groups});
      ++groups;
    }
    std::stable_sort(options.begin(), options.end(),
                     [](const Option& a, const Option& b) { return a.slot < b.slot; });
    // As the slot grows, each group has more choices and takes the one with the fewest residents.
    std::vector<std::int64_t> least(groups, kUnlimited);
    std::size_t ready = 0;
    std::int64_t resident = 0;
    PhaseNeed need{groups == 0 ? problem.phases[p].reserved : kUnlimited, 0};
    for (std::size_t i = 0; i < options.size(); ++i) {
      std::int64_t& now = least[options[i].group];
      if (now == kUnlimited) {
        ++ready;
        now = options[i].resident;
        resident += now;
      } else if (options[i].resident < now) {
        resident -= now - options[i].resident;
        now = options[i].resident;
      }
      if (ready < groups) continue;
      const std::int64_t bytes =
          problem.phases[p].reserved + resident + problem.slots * options[i].slot;
      if (bytes < need.bytes) need = {bytes, options[i].slot};
    }
    out.push_back(need);
  }
  return out;
}

}  // namespace vramkit
