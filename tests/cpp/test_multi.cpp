// Elementwise work over lists, of every unit against the scalar reference, bit for bit: all element
// types, short tails, NaN, infinities and subnormals; and nothing written beside the elements.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/multi.hpp"
#include "kernel_cases.hpp"

namespace vramkit::cpu {
namespace {

constexpr std::int64_t kCounts[] = {0, 1, 3, 15, 16, 17, 31, 255, 256, 257, 511, 1000};
constexpr std::int64_t kGuard = 64;

class MultiTest : public testing::TestWithParam<const Kernels*> {};

std::vector<float> numbers(std::int64_t count, bool odd, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> all(static_cast<std::size_t>(count));
  for (float& x : all) x = normal(random) * std::exp2(8.0f * normal(random));
  if (odd && count > 2) {
    all[0] = std::numeric_limits<float>::quiet_NaN();
    all[static_cast<std::size_t>(count) - 1] = kInf;
    all[static_cast<std::size_t>(count) / 2] = 1e-42f;
  }
  return all;
}

// Elements of a type, with guards behind them.
std::vector<std::uint8_t> stored(const std::vector<float>& values, DType type) {
  std::vector<std::uint8_t> bytes(values.size() * size_of(type) + kGuard, 0xa5);
  reference_kernels().multi.cast(values.data(), DType::f32, bytes.data(), type,
                                 static_cast<std::int64_t>(values.size()));
  return bytes;
}

TEST_P(MultiTest, SumsOfSquares) {
  for (const DType type : kTypes) {
    for (const std::int64_t count : kCounts) {
      const auto x = stored(numbers(count, false, 1), type);
      const double expected = reference_kernels().multi.square_sum(x.data(), type, count);
      EXPECT_EQ(expected, GetParam()->multi.square_sum(x.data(), type, count));
      EXPECT_TRUE(std::isfinite(expected) || type == DType::f16);
      if (count > 2) {
        const auto odd = stored(numbers(count, true, 1), type);
        EXPECT_FALSE(std::isfinite(GetParam()->multi.square_sum(odd.data(), type, count)));
      }
    }
  }
  const std::vector<float> largest(1000, std::numeric_limits<float>::max());
  EXPECT_TRUE(std::isfinite(GetParam()->multi.square_sum(largest.data(), DType::f32, 1000)));
}

TEST_P(MultiTest, ScalesAndCasts) {
  for (const DType from : kTypes) {
    for (const std::int64_t count : kCounts) {
      const auto x = stored(numbers(count, true, 2), from);
      auto expected = x, got = x;
      reference_kernels().multi.scale(expected.data(), from, count, 0.37f);
      GetParam()->multi.scale(got.data(), from, count, 0.37f);
      EXPECT_EQ(expected, got);
      for (const DType to : kTypes) {
        std::vector<std::uint8_t> one(count * 4 + kGuard, 0xa5), two = one;
        reference_kernels().multi.cast(x.data(), from, one.data(), to, count);
        GetParam()->multi.cast(x.data(), from, two.data(), to, count);
        EXPECT_EQ(one, two);
      }
    }
  }
}

struct StepCase {
  std::int64_t count;
  std::vector<std::uint8_t> parameter, second, gradient, codes[2];
  std::vector<float> average, square, scales[2];
  DType type, second_type, gradient_type;
  bool has_second, bytes;

  StepCase(std::int64_t n, DType p, DType g, bool with_second, DType s, bool in_bytes, bool odd)
      : count(n),
        parameter(stored(numbers(n, false, 3), p)),
        second(stored(std::vector<float>(n, 0.0f), s)),
        gradient(stored(numbers(n, odd, 4), g)),
        average(numbers(n, false, 5)),
        square(numbers(n, false, 6)),
        type(p),
        second_type(s),
        gradient_type(g),
        has_second(with_second),
        bytes(in_bytes) {
    for (float& v : square) v = std::fabs(v);
    const std::int64_t blocks = (n + kStateBlock - 1) / kStateBlock;
    for (int k = 0; k < 2; ++k) {
      codes[k].assign(n + kGuard, static_cast<std::uint8_t>(k ? 0 : 127));
      scales[k].assign(blocks + 1, 0.0f);
    }
  }

  void run(const Kernels& kernels) {
    static const auto bounds = [](const std::array<float, 256>& map) {
      std::vector<float> all;
      for (int k = 0; k < 255; ++k) all.push_back((map[k] + map[k + 1]) / 2.0f);
      return all;
    };
    static const std::vector<float> first = bounds(dynamic_map());
    static const std::vector<float> other = bounds(unsigned_dynamic_map());
    AdamwStep step{};
    step.parameter = parameter.data();
    step.parameter_type = type;
    step.second = has_second ? second.data() : nullptr;
    step.second_type = second_type;
    step.gradient = gradient.data();
    step.gradient_type = gradient_type;
    step.count = count;
    if (bytes) {
      step.average_bytes = {dynamic_map().data(), first.data(), codes[0].data(), scales[0].data()};
      step.square_bytes = {unsigned_dynamic_map().data(), other.data(), codes[1].data(),
                           scales[1].data()};
    } else {
      step.average = average.data();
      step.average_square = square.data();
    }
    step.factor = 0.25f;
    step.decay = 0.999f;
    step.beta1 = 0.9f;
    step.beta2 = 0.999f;
    step.less_beta1 = 0.1f;
    step.less_beta2 = 0.001f;
    step.epsilon = 1e-8f;
    step.step_size = 0.01f;
    step.root_correction = 0.3f;
    kernels.multi.adamw(step);
  }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

TEST_P(MultiTest, AdamwHasTheReferencesBits) {
  struct Kind {
    DType type;
    bool has_second;
    DType second;
  };
  const Kind kinds[] = {{DType::f32, false, DType::f32},  {DType::f32, true, DType::bf16},
                        {DType::f32, true, DType::f16},   {DType::bf16, false, DType::bf16},
                        {DType::bf16, true, DType::bf16}, {DType::f16, false, DType::f16},
                        {DType::f16, true, DType::f16}};
  for (const Kind& kind : kinds) {
    for (const DType gradient : kTypes) {
      for (const bool bytes : {false, true}) {
        for (const std::int64_t count : {1, 16, 17, 256, 300, 1000}) {
          StepCase expected(count, kind.type, gradient, kind.has_second, kind.second, bytes, false);
          StepCase got = expected;
          for (int step = 0; step < 3; ++step) {
            expected.run(reference_kernels());
            got.run(*GetParam());
          }
          EXPECT_EQ(expected.parameter, got.parameter);
          EXPECT_EQ(expected.second, got.second);
          EXPECT_TRUE(same(expected.average, got.average));
          EXPECT_TRUE(same(expected.square, got.square));
          for (int k = 0; k < 2; ++k) {
            EXPECT_EQ(expected.codes[k], got.codes[k]);
            EXPECT_TRUE(same(expected.scales[k], got.scales[k]));
          }
        }
      }
    }
  }
}

TEST_P(MultiTest, StateOfEightBitsThatHoldsNanSaysSo) {
  StepCase step(600, DType::f32, DType::f32, false, DType::f32, true, true);
  step.run(*GetParam());  // NaN in the first block, infinity in the last
  EXPECT_TRUE(std::isnan(step.scales[0][0]));
  EXPECT_TRUE(std::isfinite(step.scales[0][1]));
  EXPECT_FALSE(std::isfinite(step.scales[0][2]));
}

TEST(MultiMaps, HaveTheirPublishedShape) {
  const auto& map = unsigned_dynamic_map();
  EXPECT_EQ(map.front(), 0.0f);
  EXPECT_EQ(map.back(), 1.0f);
  EXPECT_TRUE(std::is_sorted(map.begin(), map.end()));
  EXPECT_EQ(std::adjacent_find(map.begin(), map.end()), map.end());
  EXPECT_EQ(dynamic_map()[127], 0.0f);
}

INSTANTIATE_TEST_SUITE_P(Units, MultiTest, testing::ValuesIn(available_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace vramkit::cpu
