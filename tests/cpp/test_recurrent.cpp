// A recurrent step of every unit against the scalar reference, which computes in float64: within
// some roundings of float32, for odd numbers of units, infinities and NaN, and nothing written
// beside the units asked for.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

class RecurrentTest : public testing::TestWithParam<const Kernels*> {};

struct Case {
  std::int64_t rows, units;
  std::vector<float> x, h, cell, state, out;
  Case(Recurrence kind, std::int64_t row_count, std::int64_t unit_count, float spread,
       std::mt19937& random)
      : rows(row_count), units(unit_count) {
    std::normal_distribution<float> normal(0.0f, spread);
    const auto fill = [&](std::vector<float>& v, std::int64_t count) {
      v.resize(static_cast<std::size_t>(count));
      for (float& f : v) f = normal(random);
    };
    const std::int64_t gates = gates_of(kind);
    fill(x, rows * (gates * units + 1));
    fill(h, rows * (gates * units + 2));
    fill(cell, rows * units);
    fill(state, rows * (units + 3));
    fill(out, rows * (units + 4));
  }
  void run(const Kernels& kernels, Recurrence kind, bool with_out, std::int64_t begin,
           std::int64_t end) {
    const std::int64_t gates = gates_of(kind);
    RecurrentStep step{};
    step.kind = kind;
    step.units = units;
    step.from_x = x.data();
    step.x_stride = gates * units + 1;
    step.from_h = h.data();
    step.h_stride = gates * units + 2;
    step.cell = cell.data();
    step.before = step.after = state.data();
    step.before_stride = step.after_stride = units + 3;
    step.out = with_out ? out.data() : nullptr;
    step.out_stride = units + 4;
    kernels.recur(step, rows, begin, end);
  }
};

void expect_near(const std::vector<float>& expected, const std::vector<float>& got, double size,
                 const std::string& at) {
  ASSERT_EQ(expected.size(), got.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(expected[i])) {
      ASSERT_TRUE(std::isnan(got[i])) << at << " element " << i;
    } else if (std::isinf(expected[i])) {
      ASSERT_EQ(expected[i], got[i]) << at << " element " << i;
    } else {
      // Sums and products of a handful of numbers up to `size`, and functions within 4 ulp.
      ASSERT_NEAR(expected[i], got[i], 16 * 0x1p-24 * (1 + size)) << at << " element " << i;
    }
  }
}

TEST_P(RecurrentTest, StepsAreTheReferences) {
  std::mt19937 random(77);
  for (int mode = 0; mode < 4; ++mode) {
    const auto kind = static_cast<Recurrence>(mode);
    for (const std::int64_t units : {1, 7, 8, 15, 16, 17, 33, 64, 100}) {
      for (const float spread : {1e-3f, 1.0f, 30.0f}) {
        Case expected(kind, 3, units, spread, random);
        if (units == 33) {
          expected.x[5] = std::nanf("");
          expected.x[9] = INFINITY;
          expected.h[60] = -INFINITY;
        }
        Case got = expected;
        const bool with_out = units % 2;
        expected.run(reference_kernels(), kind, with_out, 0, units);
        got.run(*GetParam(), kind, with_out, units / 3, units);
        got.run(*GetParam(), kind, with_out, 0, units / 3);
        const std::string at = "mode " + std::to_string(mode) + " units " + std::to_string(units) +
                               " spread " + std::to_string(spread);
        expect_near(expected.state, got.state, 6 * spread, at + " state");
        expect_near(expected.cell, got.cell, 6 * spread, at + " cell");
        expect_near(expected.out, got.out, 6 * spread, at + " out");
      }
    }
  }
}

// Small arguments keep their relative accuracy: tanh(x) is x there.
TEST_P(RecurrentTest, SmallStatesAreNotLost) {
  const std::int64_t units = 37;
  std::vector<float> x(units), h(units, 0.0f), state(units);
  for (std::int64_t j = 0; j < units; ++j) {
    x[j] = (j % 2 ? -1.0f : 1.0f) * std::ldexp(1.37f, static_cast<int>(4 - 3 * j));
  }
  RecurrentStep step{};
  step.kind = Recurrence::rnn_tanh;
  step.units = step.x_stride = step.h_stride = step.after_stride = units;
  step.from_x = x.data();
  step.from_h = h.data();
  step.after = state.data();
  GetParam()->recur(step, 1, 0, units);
  for (std::int64_t j = 0; j < units; ++j) {
    const double expected = std::tanh(static_cast<double>(x[j]));
    ASSERT_NEAR(state[j], expected, 4 * 0x1p-23 * std::fabs(expected)) << x[j];
  }
}

INSTANTIATE_TEST_SUITE_P(Units, RecurrentTest, testing::ValuesIn(available_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace vramkit::cpu
