// The planner against brute force, its promises about ties and bounds, bad input, and its scale.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "core/planner.hpp"

namespace vramkit {
namespace {

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

struct Answer {
  bool feasible = false;
  double cost = 0;
  std::int64_t bytes = 0;
  std::vector<std::int64_t> choices;
};

// Every combination, in the order of their choice indices, so that the first of equals wins. Costs
// in these tests are multiples of 2^-10 below 2^20: their sums are exact in any order.
Answer brute_force(const std::vector<PlannerGroup>& groups, std::int64_t budget) {
  Answer best;
  std::vector<std::int64_t> at(groups.size(), 0);
  while (true) {
    std::int64_t bytes = 0;
    double cost = 0;
    for (std::size_t g = 0; g < groups.size(); ++g) {
      const PlannerChoice& choice = groups[g][static_cast<std::size_t>(at[g])];
      bytes += choice.bytes;
      cost += choice.cost;
    }
    if (bytes <= budget &&
        (!best.feasible || cost < best.cost || (cost == best.cost && bytes < best.bytes))) {
      best = {true, cost, bytes, at};
    }
    std::size_t g = groups.size();
    while (g > 0 && ++at[g - 1] == static_cast<std::int64_t>(groups[g - 1].size())) at[--g] = 0;
    if (g == 0) return best;
  }
}

std::vector<PlannerGroup> random_groups(std::mt19937_64& random, std::size_t most_groups,
                                        std::size_t most_choices, std::int64_t sizes,
                                        std::int64_t costs) {
  std::vector<PlannerGroup> groups(1 + random() % most_groups);
  for (PlannerGroup& group : groups) {
    group.resize(1 + random() % most_choices);
    for (PlannerChoice& choice : group) {
      choice.bytes = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(sizes));
      choice.cost = static_cast<double>(random() % static_cast<std::uint64_t>(costs)) / 1024;
    }
  }
  return groups;
}

void expect_consistent(const std::vector<PlannerGroup>& groups, const PlannerResult& result) {
  ASSERT_EQ(result.choices.size(), groups.size());
  std::int64_t bytes = 0;
  double cost = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    ASSERT_GE(result.choices[g], 0);
    ASSERT_LT(result.choices[g], static_cast<std::int64_t>(groups[g].size()));
    bytes += groups[g][static_cast<std::size_t>(result.choices[g])].bytes;
    cost += groups[g][static_cast<std::size_t>(result.choices[g])].cost;
  }
  EXPECT_EQ(bytes, result.bytes);
  EXPECT_EQ(cost, result.cost);
  EXPECT_LE(result.lower_bound, result.cost);
}

// Layers of 10^5 to 10^8 weights in twelve formats, their sensitivities spread log-normally.
std::vector<PlannerGroup> realistic(std::size_t layers, std::uint64_t seed) {
  constexpr double kBits[] = {2.1, 3.1, 4.1, 4.25, 4.5, 5, 6, 8, 8.1, 10, 16, 32};
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform;
  std::normal_distribution<double> normal;
  std::vector<PlannerGroup> groups(layers);
  for (PlannerGroup& group : groups) {
    const double weights = std::floor(std::exp(11.5 + 7 * uniform(random)));
    const double sensitivity = std::exp(1.5 * normal(random));
    for (double bits : kBits) {
      group.push_back({static_cast<std::int64_t>(weights * bits / 8),
                       sensitivity * weights * std::exp(-1.386 * bits + 0.3 * normal(random))});
    }
  }
  return groups;
}

std::int64_t between(const std::vector<PlannerGroup>& groups, double part) {
  std::int64_t low = 0, high = 0;
  for (const PlannerGroup& group : groups) {
    low += group.front().bytes;
    high += group.back().bytes;
  }
  return low + static_cast<std::int64_t>(part * static_cast<double>(high - low));
}

TEST(Planner, MatchesBruteForceTiesIncluded) {
  std::mt19937_64 random(1);
  int solved = 0, refused = 0;
  // Small ranges of sizes and costs make ties and zero costs common; large ones make them rare.
  const std::int64_t ranges[][2] = {{4, 3}, {6, 2}, {10, 1000}, {1000, 5}, {100000, 1000000},
                                    {3, 1}};
  for (int round = 0; round < 1200; ++round) {
    const auto& range = ranges[round % 6];
    const auto groups = random_groups(random, 6, 4, range[0], range[1]);
    std::int64_t high = 0;
    for (const PlannerGroup& group : groups) {
      std::int64_t most = 0;
      for (const PlannerChoice& choice : group) most = std::max(most, choice.bytes);
      high += most;
    }
    const auto budget = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high + 1));
    const Answer expected = brute_force(groups, budget);
    if (!expected.feasible) {
      EXPECT_THROW(plan_choices(groups, budget), BudgetError);
      ++refused;
      continue;
    }
    const PlannerResult result = plan_choices(groups, budget);
    ASSERT_TRUE(result.optimal) << "round " << round;
    expect_consistent(groups, result);
    ASSERT_EQ(result.cost, expected.cost) << "round " << round;
    ASSERT_EQ(result.bytes, expected.bytes) << "round " << round;
    ASSERT_EQ(result.choices, expected.choices) << "round " << round;
    ASSERT_EQ(result.lower_bound, result.cost);
    ++solved;
  }
  EXPECT_GT(solved, 600);
  EXPECT_GT(refused, 100);
}

TEST(Planner, TiesAmongManyEqualLayersTakeTheFirstChoices) {
  // Four of twelve equal layers can take the larger choice: the last four, as index 0 is smaller.
  const std::vector<PlannerGroup> groups(12, {{10, 3.0}, {20, 1.0}, {10, 3.0}, {20, 1.0}});
  const PlannerResult result = plan_choices(groups, 165);
  EXPECT_TRUE(result.optimal);
  EXPECT_EQ(result.bytes, 160);
  EXPECT_EQ(result.choices, (std::vector<std::int64_t>{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1}));
}

TEST(Planner, LargeTiedProblemIsSolvedAndPathIsFirst) {
  // 120 layers of three kinds with whole costs: sizes share a factor, and many plans tie.
  std::vector<PlannerGroup> groups;
  for (int i = 0; i < 120; ++i) {
    const std::int64_t unit = 1000 * (1 + i % 3);
    groups.push_back({{unit, 9}, {2 * unit, 4}, {4 * unit, 1}, {8 * unit, 0}});
  }
  const PlannerResult result = plan_choices(groups, 700'000);
  ASSERT_TRUE(result.optimal);
  expect_consistent(groups, result);
  // Exchanging the choices of two layers of one kind changes neither sum, so in the first plan
  // the choices of each kind never fall.
  for (std::size_t g = 3; g < groups.size(); ++g) {
    EXPECT_LE(result.choices[g - 3], result.choices[g]) << g;
  }
}

TEST(Planner, MoreBudgetNeverCostsMore) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 40; ++round) {
    const auto groups = random_groups(random, 12, 5, 1000, 100000);
    std::int64_t least = 0;
    try {
      plan_choices(groups, -1);
      FAIL() << "a negative budget holds nothing";
    } catch (const BudgetError& error) {
      least = error.needed();
    }
    double before = std::numeric_limits<double>::infinity();
    for (std::int64_t budget = least; budget < least + 4000; budget += 97) {
      const PlannerResult result = plan_choices(groups, budget);
      ASSERT_TRUE(result.optimal);
      ASSERT_LE(result.bytes, budget);
      ASSERT_LE(result.cost, before);
      before = result.cost;
    }
  }
}

TEST(Planner, EmptyAndSingle) {
  const PlannerResult none = plan_choices({}, 0);
  EXPECT_TRUE(none.optimal);
  EXPECT_TRUE(none.choices.empty());
  EXPECT_EQ(none.cost, 0);
  const std::vector<PlannerGroup> one{{{kMax, 1e308}}};
  const PlannerResult result = plan_choices(one, kMax);
  EXPECT_EQ(result.bytes, kMax);
  EXPECT_EQ(result.cost, 1e308);
}

TEST(Planner, ExtremeMagnitudes) {
  // Costs of very different size in one problem, and sizes near the end of the range.
  const std::vector<PlannerGroup> groups{
      {{0, 1e300}, {kMax / 2, 0}}, {{0, 1e-300}, {1, 0}}, {{0, 2e290}, {kMax / 2, 1e290}}};
  const PlannerResult result = plan_choices(groups, kMax - 1);
  EXPECT_TRUE(result.optimal);
  EXPECT_EQ(result.choices[0], 1);
  EXPECT_EQ(result.choices[2], 1);
  const std::vector<PlannerGroup> tiny{{{2, 5e-324}, {1, 1e-323}}, {{5, 0}}};
  EXPECT_EQ(plan_choices(tiny, 7).choices[0], 0);
  EXPECT_EQ(plan_choices(tiny, 6).choices[0], 1);
}

TEST(Planner, TinyCostsOfEqualSizesAreToldApart) {
  const std::vector<PlannerGroup> groups{{{4, 1.0}, {4, 1e-178}, {4, 0.0}, {4, 0.0}}};
  EXPECT_EQ(plan_choices(groups, 4).choices[0], 2);
}

TEST(Planner, ImpossibleBudgetSaysWhatWouldDo) {
  const std::vector<PlannerGroup> groups{{{50, 1}, {30, 2}}, {{7, 0}, {9, 0}}};
  try {
    plan_choices(groups, 36);
    FAIL() << "36 bytes cannot hold 37";
  } catch (const BudgetError& error) {
    EXPECT_EQ(error.needed(), 37);
    EXPECT_NE(std::string(error.what()).find("37"), std::string::npos);
  }
  EXPECT_EQ(plan_choices(groups, 37).bytes, 37);
}

TEST(Planner, RefusesMalformedInput) {
  auto solve = [](std::vector<PlannerGroup> groups) { return plan_choices(groups, 100); };
  EXPECT_THROW(solve({{{1, 1}}, {}}), InvalidArgument);
  EXPECT_THROW(solve({{{-1, 1}}}), InvalidArgument);
  EXPECT_THROW(solve({{{1, -0.5}}}), InvalidArgument);
  EXPECT_THROW(solve({{{1, std::numeric_limits<double>::quiet_NaN()}}}), InvalidArgument);
  EXPECT_THROW(solve({{{1, std::numeric_limits<double>::infinity()}}}), InvalidArgument);
  EXPECT_THROW(solve({{{1, 0}, {kMax, 0}}, {{1, 0}, {1, 0}}}), InvalidArgument);
  EXPECT_THROW(solve({{{1, 1.7e308}}, {{1, 1.7e308}}}), InvalidArgument);
  const std::vector<PlannerGroup> fine{{{1, 1}}};
  EXPECT_THROW(plan_choices(fine, 100, {.state_limit = 0}), InvalidArgument);
}

TEST(Planner, StateLimitGivesAPlanWithABound) {
  // Costs that follow sizes exactly leave the bound no grip: a subset-sum problem.
  std::mt19937_64 random(3);
  std::vector<PlannerGroup> groups(60);
  for (PlannerGroup& group : groups) {
    for (int choice = 0; choice < 4; ++choice) {
      const auto bytes = static_cast<std::int64_t>(random() % 1'000'000'007);
      group.push_back({bytes, static_cast<double>(1'000'000'007 - bytes)});
    }
  }
  const std::int64_t budget = 30'000'000'000;
  const PlannerResult result = plan_choices(groups, budget, {.state_limit = 2000});
  EXPECT_FALSE(result.optimal);
  expect_consistent(groups, result);
  EXPECT_LE(result.bytes, budget);
  EXPECT_LT(result.cost - result.lower_bound, 1e-3 * result.cost);
  const PlannerResult again = plan_choices(groups, budget, {.state_limit = 2000});
  EXPECT_EQ(again.choices, result.choices);
  EXPECT_EQ(again.states, result.states);
  const PlannerResult deeper = plan_choices(groups, budget, {.state_limit = 200'000});
  EXPECT_LE(result.lower_bound, deeper.cost);
}

TEST(Planner, BoundHoldsWhenTheLimitIsHit) {
  std::mt19937_64 random(11);
  int limited = 0;
  for (int round = 0; round < 200; ++round) {
    const auto groups = random_groups(random, 14, 5, 100000, 1000000);
    std::int64_t least = 0;
    for (const PlannerGroup& group : groups) {
      std::int64_t low = kMax;
      for (const PlannerChoice& choice : group) low = std::min(low, choice.bytes);
      least += low;
    }
    const std::int64_t budget = least + static_cast<std::int64_t>(random() % 300000);
    const PlannerResult exact = plan_choices(groups, budget);
    const PlannerResult quick = plan_choices(groups, budget, {.state_limit = 5});
    ASSERT_TRUE(exact.optimal);
    ASSERT_LE(quick.lower_bound, exact.cost);
    ASSERT_GE(quick.cost, exact.cost);
    if (quick.optimal) {
      ASSERT_EQ(quick.choices, exact.choices);
    } else {
      ++limited;
    }
  }
  EXPECT_GT(limited, 20);
}

TEST(Planner, ThousandLayersOfTwelveFormats) {
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    const auto groups = realistic(1000, seed);
    for (double part : {0.1, 0.3, 0.6}) {
      const auto start = std::chrono::steady_clock::now();
      const PlannerResult result = plan_choices(groups, between(groups, part));
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      expect_consistent(groups, result);
      EXPECT_LE(result.cost - result.lower_bound, 1e-6 * result.cost);
      // Milliseconds in a plain build; the bound leaves room for sanitizers and busy machines.
      EXPECT_LT(seconds.count(), 20);
    }
  }
}

}  // namespace
}  // namespace vramkit
