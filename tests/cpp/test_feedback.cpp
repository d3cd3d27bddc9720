// Rounding with feedback: every instruction-set unit against the scalar reference, code by code.
// (That the reference is right is tested against float64 in tests/python/test_calibration.py.)
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/format.hpp"
#include "cpu/kernels.hpp"
#include "kernel_cases.hpp"

namespace vramkit::cpu {
namespace {

// One problem: matrices that the kernels read, and codes to begin with.
struct Problem {
  std::int64_t rows, cols, groups;
  SortedTable sorted;
  std::vector<float> x, scales, zeros, coefficients;
  std::vector<std::int64_t> order;
  std::vector<std::uint8_t> codes;
  Feedback job;

  Problem(const Format& format, std::int64_t rows_, std::int64_t cols_, std::int64_t group,
          bool resume)
      : rows(rows_), cols(cols_), groups((cols_ + group - 1) / group) {
    std::mt19937 random(static_cast<unsigned>(rows * 1000 + cols));
    std::normal_distribution<float> normal;
    sorted = sorted_of(format);
    auto fill = [&](std::vector<float>& all, std::int64_t count, float scale) {
      all.resize(count);
      for (float& value : all) value = normal(random) * scale;
    };
    fill(x, rows * cols, 0.1f);
    fill(coefficients, cols * cols, 0.3f);
    fill(scales, rows * groups, 1.0f);
    // Around what fits x; some zero, as those of empty blocks are.
    const float most = format.encoder == Encoder::e4m3                       ? 448.0f
                       : format.encoder == Encoder::e5m2                     ? 57344.0f
                       : format.bits == 8 && format.family == Family::affine ? 127.0f
                       : format.zero_point                                   ? 7.0f
                                                                             : 1.0f;
    for (float& scale : scales) scale = std::abs(scale) * 0.3f / most;
    for (std::size_t i = 0; i < scales.size(); i += 17) scales[i] = 0.0f;
    zeros.resize(scales.size());
    for (float& zero : zeros) zero = static_cast<float>(random() % 16);
    order.resize(cols);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    codes.resize(rows * cols);
    // Codes that the format has: FP8's largest magnitudes are NaN.
    for (auto& code : codes)
      code = static_cast<std::uint8_t>(random() % (format.bits == 4 ? 16 : 120));
    job = {.format = &format,
           .sorted = &sorted,
           .cols = cols,
           .group = group,
           .groups = groups,
           .x = x.data(),
           .scales = scales.data(),
           .zeros = format.zero_point ? zeros.data() : nullptr,
           .coefficients = coefficients.data(),
           .order = order.data(),
           .resume = resume,
           .codes = codes.data()};
  }

  std::vector<std::uint8_t> run(const Kernels& kernels, std::int64_t step) const {
    std::vector<std::uint8_t> out = codes;
    Feedback own = job;
    own.codes = out.data();
    for (std::int64_t r = 0; r < rows; r += step) {
      kernels.feedback(own, r, std::min(r + step, rows));
    }
    return out;
  }
};

TEST(Feedback, UnitsAgreeBitForBit) {
  for (const NamedFormat& named : all_formats()) {
    if (named.format.family == Family::cast) continue;
    for (const std::int64_t cols : {1, 7, 31, 32, 33, 65, 130}) {
      for (const std::int64_t rows : {1, 5, 64, 71}) {
        for (const std::int64_t group : {std::int64_t{1}, std::int64_t{5}, cols}) {
          for (const bool resume : {false, true}) {
            const Problem problem(named.format, rows, cols, group, resume);
            const auto expected = problem.run(reference_kernels(), rows);
            for (const Kernels* kernels : available_kernels()) {
              SCOPED_TRACE(named.name + " " + kernels->name + " " + std::to_string(rows) + "x" +
                           std::to_string(cols) + " group " + std::to_string(group));
              ASSERT_EQ(problem.run(*kernels, rows), expected);
            }
          }
        }
      }
    }
  }
}

TEST(Feedback, RowsAreIndependent) {
  const Problem problem(builtin_format("int4"), 71, 130, 128, false);
  for (const Kernels* kernels : available_kernels()) {
    const auto whole = problem.run(*kernels, 71);
    for (const std::int64_t step : {1, 16, 33}) EXPECT_EQ(problem.run(*kernels, step), whole);
  }
}

TEST(Feedback, WithoutCoefficientsItIsRoundingToNearest) {
  Problem problem(builtin_format("int8"), 3, 40, 40, false);
  std::fill(problem.coefficients.begin(), problem.coefficients.end(), 0.0f);
  std::fill(problem.scales.begin(), problem.scales.end(), 0.25f);
  problem.x[0] = 0.3f;
  problem.x[1] = -100.0f;
  for (const Kernels* kernels : available_kernels()) {
    const auto codes = problem.run(*kernels, 3);
    EXPECT_EQ(static_cast<std::int8_t>(codes[0]), 1);
    EXPECT_EQ(static_cast<std::int8_t>(codes[1]), -127);
  }
}

}  // namespace
}  // namespace vramkit::cpu
