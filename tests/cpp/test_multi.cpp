// Elementwise work over lists, of every unit against the scalar reference, bit for bit: all element
// types, short tails, NaN, infinities and subnormals; and nothing written beside the elements.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "cpu/multi.hpp"
#include "kernel_cases.hpp"

namespace vramkit::cpu {
namespace {

constexpr std::int64_t kCounts[] = {0, 1, 3, 15, 16, 17, 31, 63, 65, 255, 256, 257, 1000, 2500};
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
                                 static_cast<std::int64_t>(values.size()), {});
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
        const Dice far{true, 0x0123456789abcdefu, (std::int64_t{5} << 32) + 7,
                       (std::int64_t{1} << 34) - 64};  // where the counter's low word ends
        for (const Dice& dice : {Dice{}, Dice{true, 3, 1, 0}, far}) {
          std::vector<std::uint8_t> one(count * 4 + kGuard, 0xa5), two = one;
          reference_kernels().multi.cast(x.data(), from, one.data(), to, count, dice);
          GetParam()->multi.cast(x.data(), from, two.data(), to, count, dice);
          EXPECT_EQ(one, two) << count << " " << static_cast<int>(from) << static_cast<int>(to);
        }
      }
    }
  }
}

// Every exponent, so that float16's subnormal numbers and overflow are among them.
TEST_P(MultiTest, RoundsAnyNumberAtRandom) {
  std::mt19937 random(11);
  std::vector<std::uint32_t> bits(1 << 14);
  for (std::uint32_t& b : bits) b = static_cast<std::uint32_t>(random());
  for (std::size_t i = 0; i < bits.size(); i += 2) {  // half of them near float16's range
    bits[i] = (bits[i] & 0x807fffffu) | (96 + bits[i] % 50) << 23;
  }
  for (const DType to : {DType::bf16, DType::f16}) {
    std::vector<std::uint16_t> one(bits.size()), two = one;
    const auto count = static_cast<std::int64_t>(bits.size());
    reference_kernels().multi.cast(bits.data(), DType::f32, one.data(), to, count, {true, 1, 2, 0});
    GetParam()->multi.cast(bits.data(), DType::f32, two.data(), to, count, {true, 1, 2, 0});
    EXPECT_EQ(one, two);
  }
}

struct StepCase {
  std::int64_t count;
  std::vector<std::uint8_t> parameter, second, gradient, codes[2];
  std::vector<float> average, square, largest, scales[2];
  DType type, second_type, gradient_type;
  bool has_second, bytes, amsgrad = false;
  Dice dice;

  StepCase(std::int64_t n, DType p, DType g, bool with_second, DType s, bool in_bytes, bool odd)
      : count(n),
        parameter(stored(numbers(n, false, 3), p)),
        second(stored(std::vector<float>(n, 0.0f), s)),
        gradient(stored(numbers(n, odd, 4), g)),
        average(numbers(n, false, 5)),
        square(numbers(n, false, 6)),
        largest(numbers(n, false, 7)),
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
    AdamwStep step{};
    step.parameter = parameter.data();
    step.parameter_type = type;
    step.second = has_second ? second.data() : nullptr;
    step.second_type = second_type;
    step.gradient = gradient.data();
    step.gradient_type = gradient_type;
    step.count = count;
    if (bytes) {
      step.average_bytes = {&signed_state(), codes[0].data(), scales[0].data()};
      step.square_bytes = {&unsigned_state(), codes[1].data(), scales[1].data()};
    } else {
      step.average = average.data();
      step.average_square = square.data();
    }
    if (amsgrad) step.largest = largest.data();
    step.dice = dice;
    step.numbers.factor = 0.25f;
    step.numbers.decay = 0.999f;
    step.numbers.beta2 = 0.999f;
    step.numbers.less_beta1 = 0.1f;
    step.numbers.less_beta2 = 0.001f;
    step.numbers.epsilon = 1e-8f;
    step.numbers.step_size = 0.01f;
    step.numbers.root_correction = 0.3f;
    kernels.multi.adamw(step);
  }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// The same bits, or NaN both: which of two NaNs an operation hands on is not the same on every
// machine (an emulated one takes the other).
bool same_elements(DType type, const std::vector<std::uint8_t>& a,
                   const std::vector<std::uint8_t>& b) {
  const std::int64_t width = type == DType::f32 ? 4 : 2;
  const auto size = static_cast<std::int64_t>(a.size());
  if (a.size() != b.size() || size % width != 0) return false;
  for (std::int64_t i = 0; i < size / width; ++i) {
    if (std::memcmp(a.data() + i * width, b.data() + i * width, width) != 0 &&
        !(std::isnan(read(a.data(), type, i)) && std::isnan(read(b.data(), type, i)))) {
      return false;
    }
  }
  return true;
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
  const auto check = [&](StepCase expected, int steps) {
    StepCase got = expected;
    for (int step = 0; step < steps; ++step) {
      expected.dice.row = got.dice.row = step;
      expected.run(reference_kernels());
      got.run(*GetParam());
    }
    EXPECT_TRUE(same_elements(expected.type, expected.parameter, got.parameter));
    EXPECT_TRUE(same_elements(expected.second_type, expected.second, got.second));
    EXPECT_TRUE(same(expected.average, got.average));
    EXPECT_TRUE(same(expected.square, got.square));
    EXPECT_TRUE(same(expected.largest, got.largest));
    for (int k = 0; k < 2; ++k) {
      EXPECT_EQ(expected.codes[k], got.codes[k]);
      EXPECT_TRUE(same(expected.scales[k], got.scales[k]));
    }
  };
  for (const Kind& kind : kinds) {
    for (const DType gradient : kTypes) {
      for (const std::int64_t count : {1, 16, 17, 64, 256, 300, 1000}) {
        for (const bool bytes : {false, true}) {
          StepCase step(count, kind.type, gradient, kind.has_second, kind.second, bytes, false);
          check(step, 3);
          step.dice = {true, 77, 0, 1 << 15};
          check(step, 3);
        }
        StepCase step(count, kind.type, gradient, kind.has_second, kind.second, false, false);
        step.amsgrad = true;
        check(step, 3);
      }
    }
  }
}

TEST_P(MultiTest, StateOfEightBitsThatHoldsNanSaysSo) {
  StepCase step(600, DType::f32, DType::f32, false, DType::f32, true, true);
  step.run(*GetParam());  // NaN in the first block, infinity in the last
  EXPECT_TRUE(std::isnan(step.scales[0][0]));
  EXPECT_TRUE(std::isfinite(step.scales[0][1]));
  EXPECT_TRUE(std::isnan(step.scales[0][2]));
  EXPECT_EQ(step.codes[0][599], 127);
}

// The code of a number by definition, for each number next to a midpoint, those where the table's
// cells meet, and others of all magnitudes.
TEST_P(MultiTest, CodesOfStateAreTheirDefinitions) {
  std::mt19937 random(4);
  for (const StateTable* table : {&signed_state(), &unsigned_state()}) {
    std::vector<float> values{0.0f, -0.0f, 1e-45f, 1e-9f, 0x1p-24f};
    for (const float bound : table->bounds) {
      for (const float x : {std::nextafter(bound, -2.0f), bound, std::nextafter(bound, 2.0f)}) {
        values.push_back(x);
      }
    }
    for (std::uint32_t cell = 0; cell < StateTable::kCells; ++cell) {
      const std::uint32_t first = (cell + StateTable::kFirst) << StateTable::kLowBits;
      values.push_back(std::bit_cast<float>(first));
      values.push_back(std::bit_cast<float>(first - 1));
      const auto inside = static_cast<std::uint32_t>(random()) & StateTable::kLowMask;
      values.push_back(std::bit_cast<float>(first | inside));
    }
    if (table == &signed_state()) {
      const std::size_t half = values.size();
      for (std::size_t i = 0; i < half; ++i) values.push_back(-values[i]);
    }
    std::erase_if(values, [&](float x) { return std::fabs(x) > 1.0f; });
    if (table == &unsigned_state()) std::erase_if(values, [](float x) { return std::signbit(x); });
    std::shuffle(values.begin(), values.end(), random);
    // The state becomes its gradient, or the square: a block's largest is 1.
    while (values.size() % (kStateBlock - 1)) values.push_back(0.5f);
    std::vector<float> gradients, expected;
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (i % (kStateBlock - 1) == 0) gradients.push_back(1.0f), expected.push_back(1.0f);
      gradients.push_back(values[i]);
      expected.push_back(values[i]);
    }
    const bool squares = table == &unsigned_state();
    const auto count = static_cast<std::int64_t>(gradients.size());
    std::vector<float> weights(gradients.size(), 0.0f), scales[2];
    std::vector<std::uint8_t> codes[2];
    for (int k = 0; k < 2; ++k) {
      codes[k].assign(gradients.size(), static_cast<std::uint8_t>(k ? 0 : 127));
      scales[k].assign(gradients.size() / kStateBlock, 0.0f);
    }
    if (squares) {
      for (std::size_t i = 0; i < gradients.size(); ++i) {
        gradients[i] = std::sqrt(gradients[i]);
        expected[i] = gradients[i] * gradients[i];
      }
    }
    AdamwStep step;
    step.parameter = weights.data();
    step.gradient = gradients.data();
    step.count = count;
    step.average_bytes = {&signed_state(), codes[0].data(), scales[0].data()};
    step.square_bytes = {&unsigned_state(), codes[1].data(), scales[1].data()};
    step.numbers.epsilon = 1.0f;
    GetParam()->multi.adamw(step);
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      int code = 0;
      while (code < 255 && expected[i] > table->bounds[code]) ++code;
      ASSERT_EQ(codes[squares ? 1 : 0][i], code) << expected[i];
    }
  }
}

TEST(MultiMaps, HaveTheirPublishedShape) {
  const auto& map = unsigned_dynamic_map();
  EXPECT_EQ(map.front(), 0.0f);
  EXPECT_EQ(map.back(), 1.0f);
  EXPECT_TRUE(std::is_sorted(map.begin(), map.end()));
  EXPECT_EQ(std::adjacent_find(map.begin(), map.end()), map.end());
  EXPECT_EQ(dynamic_map()[127], 0.0f);
  std::vector<float> dense(256);  // even steps: many to a cell near zero
  for (int k = 0; k < 256; ++k) dense[k] = static_cast<float>(k) / 1e6f;
  EXPECT_THROW(StateTable(dense.data()), InvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(Units, MultiTest, testing::ValuesIn(available_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace vramkit::cpu
