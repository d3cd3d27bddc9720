// Formats and places against brute force, what is promised about bounds, bad input, and scale.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/error.hpp"
#include "core/placement.hpp"

namespace vramkit {
namespace {

struct Taken {
  bool fits = false;
  double loss = 0, seconds = 0;
  std::vector<std::int64_t> device;
  std::int64_t host = 0;
};

// By the definition in placement.hpp alone. Losses and seconds in these tests are multiples of
// 2^-20: their sums are exact in any order.
Taken take(const PlacementProblem& problem, const std::vector<std::int64_t>& choices) {
  Taken out;
  std::int64_t staging = 0;
  bool fits = true;
  for (std::size_t p = 0; p < problem.phases.size(); ++p) {
    std::int64_t resident = problem.phases[p].reserved, slot = 0;
    double compute = problem.phases[p].compute_seconds, link = 0, disk = 0;
    bool staged = false;
    for (std::size_t g = 0; g < problem.groups.size(); ++g) {
      if (problem.groups[g].phase != static_cast<std::int64_t>(p)) continue;
      const PlacedChoice& c = problem.groups[g].choices[static_cast<std::size_t>(choices[g])];
      resident += c.resident;
      slot = std::max(slot, c.streamed);
      out.host += c.host;
      staged = staged || c.staged;
      out.loss += c.loss;
      out.seconds += c.turn_seconds;
      compute += c.compute_seconds;
      link += c.link_seconds;
      disk += c.disk_seconds;
    }
    out.seconds += std::max({compute, link, disk});
    out.device.push_back(resident + problem.slots * slot);
    fits = fits && out.device.back() <= problem.device_limit;
    if (staged) staging = std::max(staging, slot);
  }
  out.host += problem.slots * staging;
  out.fits = fits && out.host <= problem.host_limit && out.loss <= problem.loss_limit;
  return out;
}

template <class Visit>
void all_plans(const PlacementProblem& problem, Visit visit) {
  std::vector<std::int64_t> at(problem.groups.size(), 0);
  while (true) {
    visit(at);
    std::size_t g = at.size();
    while (g > 0 &&
           ++at[g - 1] == static_cast<std::int64_t>(problem.groups[g - 1].choices.size())) {
      at[--g] = 0;
    }
    if (g == 0) return;
  }
}

double figure(std::mt19937_64& random, int most) {
  return std::ldexp(static_cast<double>(random() % static_cast<unsigned>(most)), -20);
}

PlacementProblem random_problem(std::mt19937_64& random) {
  PlacementProblem problem;
  const std::size_t phases = 1 + random() % 2;
  for (std::size_t p = 0; p < phases; ++p) {
    problem.phases.push_back({static_cast<std::int64_t>(random() % 40), figure(random, 200)});
  }
  const std::size_t groups = 2 + random() % 4;
  for (std::size_t g = 0; g < groups; ++g) {
    PlacedGroup group{static_cast<std::int64_t>(random() % phases), {}};
    const std::size_t formats = 1 + random() % 3;
    for (std::size_t f = 0; f < formats; ++f) {
      const auto bytes = static_cast<std::int64_t>(1 + random() % 100);
      const double loss = figure(random, 1000), compute = figure(random, 300);
      const double link = figure(random, 600), disk = link * 4;
      group.choices.push_back(
          {bytes, 0, phases > 1 ? bytes : 0, false, loss, compute, 0, 0, phases > 1 ? link : 0});
      if (random() % 3)
        group.choices.push_back({0, bytes, bytes, false, loss, compute, link, 0, 0});
      if (random() % 3) group.choices.push_back({0, bytes, 0, true, loss, compute, link, disk, 0});
    }
    problem.groups.push_back(std::move(group));
  }
  problem.slots = 1 + static_cast<std::int64_t>(random() % 3);
  problem.device_limit = static_cast<std::int64_t>(random() % 500);
  problem.host_limit = random() % 2 ? kUnlimited : static_cast<std::int64_t>(random() % 400);
  if (random() % 3 == 0) problem.loss_limit = figure(random, 3000);
  if (random() % 2) {
    problem.preference = Preference::weighted;
    problem.loss_weight = static_cast<double>(random() % 3);
    problem.time_weight = static_cast<double>(random() % 3);
  }
  return problem;
}

TEST(Placement, NoPlanIsBetterThanTheOneFound) {
  std::mt19937_64 random(11);
  int found = 0;
  for (int round = 0; round < 500; ++round) {
    const PlacementProblem problem = random_problem(random);
    const bool weighted = problem.preference == Preference::weighted;
    bool any = false;
    double best = 0, second = 0;
    all_plans(problem, [&](const std::vector<std::int64_t>& choices) {
      const Taken plan = take(problem, choices);
      if (!plan.fits) return;
      const double first =
          weighted ? problem.loss_weight * plan.loss + problem.time_weight * plan.seconds
                   : plan.loss;
      const double then = weighted ? 0 : plan.seconds;
      if (!any || first < best || (first == best && then < second)) {
        any = true;
        best = first;
        second = then;
      }
    });
    const PlacementResult result = place(problem);
    ASSERT_EQ(result.found, any) << round;
    EXPECT_TRUE(result.optimal) << round;
    if (!any) continue;
    ++found;
    const Taken plan = take(problem, result.choices);
    EXPECT_TRUE(plan.fits) << round;
    EXPECT_EQ(result.loss, plan.loss) << round;
    EXPECT_EQ(result.seconds, plan.seconds) << round;
    EXPECT_EQ(result.device_bytes, plan.device) << round;
    EXPECT_EQ(result.host_bytes, plan.host) << round;
    EXPECT_EQ(result.objective, best) << round;
    EXPECT_EQ(result.lower_bound, best) << round;
    if (!weighted) {
      EXPECT_EQ(result.seconds, second) << round;
    }
  }
  EXPECT_GT(found, 150);
  EXPECT_LT(found, 450);
}

TEST(Placement, LeastDeviceBytesAreExact) {
  std::mt19937_64 random(12);
  for (int round = 0; round < 300; ++round) {
    PlacementProblem problem = random_problem(random);
    problem.host_limit = kUnlimited;
    problem.loss_limit = std::numeric_limits<double>::infinity();
    std::vector<std::int64_t> least(problem.phases.size(), kUnlimited);
    all_plans(problem, [&](const std::vector<std::int64_t>& choices) {
      const Taken plan = take(problem, choices);
      for (std::size_t p = 0; p < least.size(); ++p) least[p] = std::min(least[p], plan.device[p]);
    });
    const std::vector<PhaseNeed> needs = least_device_bytes(problem);
    for (std::size_t p = 0; p < least.size(); ++p) EXPECT_EQ(needs[p].bytes, least[p]) << round;
    problem.device_limit = *std::max_element(least.begin(), least.end());
    EXPECT_TRUE(place(problem).found) << round;
    --problem.device_limit;
    if (problem.device_limit >= 0) {
      EXPECT_FALSE(place(problem).found) << round;
    }
  }
}

// Sizes, losses and rates as real models have them.
PlacementProblem large_problem(std::size_t layers, std::uint64_t seed, bool alike) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::normal_distribution<double> normal(0, 1);
  PlacementProblem problem;
  problem.phases.push_back({100 << 20, 0.001});
  double plain = 0;
  for (std::size_t i = 0; i < layers; ++i) {
    const double few[] = {1 << 20, 4 << 20, 11 << 20, 3 << 19, 2 << 20};
    const double weights = alike ? few[i % 5] : std::floor(std::exp(11.5 + 7 * uniform(random)));
    const double sensitivity = weights * std::exp(1.5 * normal(random)) / 1e9;
    plain += 2 * weights;
    PlacedGroup group;
    for (double bits : {2.1, 3.1, 4.1, 4.25, 4.5, 5.0, 6.0, 8.0, 8.1, 10.0, 16.0, 32.0}) {
      const auto bytes = static_cast<std::int64_t>(weights * bits / 8);
      const auto size = static_cast<double>(bytes);
      const double loss = bits == 32 ? 0 : sensitivity * std::exp(-1.386 * bits);
      const double compute = size / 300e9 + weights * 1e-13;
      group.choices.push_back({bytes, 0, 0, false, loss, compute, 0, 0, 0});
      group.choices.push_back({0, bytes, bytes, false, loss, compute, size / 25e9, 0, 0});
      group.choices.push_back({0, bytes, 0, true, loss, compute, size / 25e9, size / 2e9, 0});
    }
    problem.groups.push_back(std::move(group));
  }
  problem.device_limit = static_cast<std::int64_t>(plain * 0.2) + (100 << 20);
  problem.host_limit = static_cast<std::int64_t>(plain * 0.4);
  return problem;
}

TEST(Placement, ThousandLayersOfTwelveFormatsAndThreePlaces) {
  for (bool alike : {false, true}) {
    PlacementProblem problem = large_problem(1000, 3, alike);
    problem.state_limit = 150'000;  // less than the default: sanitizers take their time
    const PlacementResult quality = place(problem);
    ASSERT_TRUE(quality.found);
    EXPECT_EQ(quality.loss, 0);  // the disk has room for all
    EXPECT_LE(quality.seconds - quality.seconds_lower_bound, 1e-3 * quality.seconds);
    problem.preference = Preference::weighted;
    problem.time_weight = 1;
    const PlacementResult both = place(problem);
    ASSERT_TRUE(both.found);
    EXPECT_TRUE(take(problem, both.choices).fits);
    EXPECT_LE(both.objective - both.lower_bound, 1e-3 * both.objective);
    EXPECT_LE(both.states, 2 * problem.state_limit);
  }
}

TEST(Placement, MoreRoomIsNeverWorseThanTheGap) {
  PlacementProblem problem = large_problem(60, 4, true);
  problem.state_limit = 60'000;
  problem.preference = Preference::weighted;
  problem.time_weight = 1;
  const std::int64_t full = problem.device_limit;
  PlacementResult before;
  for (int step = 2; step <= 12; ++step) {
    problem.device_limit = full * step / 8;
    const PlacementResult now = place(problem);
    if (before.found) {
      ASSERT_TRUE(now.found);
      EXPECT_LE(now.lower_bound, before.objective);
      if (now.optimal) {
        EXPECT_LE(now.objective, before.objective * (1 + 1e-11));
      }
    }
    before = now;
  }
  EXPECT_TRUE(before.found);
}

TEST(Placement, TheSameProblemGivesTheSameAnswer) {
  PlacementProblem problem = large_problem(80, 5, false);
  problem.state_limit = 60'000;
  const PlacementResult a = place(problem), b = place(problem);
  EXPECT_EQ(a.choices, b.choices);
  EXPECT_EQ(a.lower_bound, b.lower_bound);
  EXPECT_EQ(a.states, b.states);
}

TEST(Placement, TightSearchLimitsStateTheirGap) {
  PlacementProblem problem = large_problem(100, 6, false);
  problem.preference = Preference::weighted;
  problem.time_weight = 1;
  problem.state_limit = problem.node_limit = 1;
  const PlacementResult result = place(problem);
  ASSERT_TRUE(result.found);
  EXPECT_FALSE(result.optimal);
  EXPECT_LT(result.lower_bound, result.objective);
  EXPECT_GT(result.lower_bound, 0);
}

TEST(Placement, NoLayersAreAPlan) {
  PlacementProblem problem;
  problem.phases.push_back({100, 2.0});
  problem.device_limit = 100;
  const PlacementResult result = place(problem);
  EXPECT_TRUE(result.found && result.optimal);
  EXPECT_EQ(result.seconds, 2.0);
  EXPECT_EQ(result.device_bytes, std::vector<std::int64_t>{100});
  problem.device_limit = 99;
  EXPECT_FALSE(place(problem).found);
}

TEST(Placement, RefusesWhatCannotBeRight) {
  const PlacementProblem good = large_problem(3, 7, true);
  auto with = [&](auto change) {
    PlacementProblem problem = good;
    change(problem);
    return problem;
  };
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  using P = PlacementProblem;
  EXPECT_THROW(place(with([](P& p) { p.phases.clear(); })), InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.phases[0].reserved = -1; })), InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.groups[1].phase = 1; })), InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.groups[1].choices.clear(); })), InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.groups[0].choices[0].resident = -1; })), InvalidArgument);
  EXPECT_THROW(place(with([&](P& p) { p.groups[0].choices[0].loss = nan; })), InvalidArgument);
  EXPECT_THROW(place(with([&](P& p) { p.groups[0].choices[0].link_seconds = infinity; })),
               InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.groups[0].choices[0].compute_seconds = -1; })),
               InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.groups[0].choices[0].host = kUnlimited; })),
               InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.groups[0].choices[1].streamed = kUnlimited / 2; })),
               InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.slots = 0; })), InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.state_limit = 0; })), InvalidArgument);
  EXPECT_THROW(place(with([&](P& p) { p.loss_limit = nan; })), InvalidArgument);
  EXPECT_THROW(place(with([](P& p) { p.loss_weight = -1; })), InvalidArgument);
}

}  // namespace
}  // namespace vramkit
