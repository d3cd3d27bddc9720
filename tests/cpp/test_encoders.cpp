// Facts about encoding, products and dispatch that need no reference kernel to compare with, on
// every instruction-set unit that this processor runs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/format.hpp"
#include "cpu/kernels.hpp"
#include "kernel_cases.hpp"

namespace vramkit::cpu {
namespace {

// Encodes one row of floats and returns its codes, a byte each.
std::vector<int> codes_of(const Kernels& kernels, const Format& format,
                          const std::vector<float>& x) {
  const auto cols = static_cast<std::int64_t>(x.size());
  Encoded to(format, 1, cols, 0);
  kernels.quantize(format, sorted_of(format), to.at, x.data(), DType::f32, cols,
                   {to.codes.data(), to.scales.data(), to.extra.data()}, 0, 1);
  std::vector<int> codes;
  for (std::int64_t i = 0; i < cols; ++i) {
    const int byte = to.codes.data()[format.bits == 4 ? i / 2 : i];
    codes.push_back(format.bits == 8 ? byte : i % 2 == 0 ? byte >> 4 : byte & 15);
  }
  return codes;
}

std::vector<int> codes_of(const Kernels& kernels, const std::string& name,
                          const std::vector<float>& x) {
  return codes_of(kernels, builtin_format(name), x);
}

Format int8_absmax() {
  Format format = builtin_format("int8");
  format.encoder = Encoder::symmetric;
  return format;
}

// Encodes one row and decodes it; the sum of squared errors in double.
double squared_error(const Kernels& kernels, const Format& format, const std::vector<float>& x) {
  const auto cols = static_cast<std::int64_t>(x.size());
  Encoded to(format, 1, cols, 0);
  kernels.quantize(format, sorted_of(format), to.at, x.data(), DType::f32, cols,
                   {to.codes.data(), to.scales.data(), to.extra.data()}, 0, 1);
  const Weight weight{.format = &format,
                      .at = to.at,
                      .codes = to.codes.data(),
                      .scales = to.scales.data(),
                      .extra = to.extra.data()};
  std::vector<float> back(x.size());
  kernels.dequantize(weight, 0, 1, back.data(), DType::f32, cols);
  double sum = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += std::pow(double{x[i]} - double{back[i]}, 2);
  return sum;
}

// Facts about the encoders that do not come from the reference's own code.
TEST(Encoders, KnownCodes) {
  for (const Kernels* kernels : available_kernels()) {
    SCOPED_TRACE(kernels->name);
    std::vector<float> block(64, 0.0f);
    block[0] = 1.0f;
    block[1] = -1.0f;
    block[2] = (kNf4Table[7] + kNf4Table[8]) / 2.0f;  // a tie: the lower code
    block[3] = std::nextafter(block[2], 1.0f);
    auto codes = codes_of(*kernels, "nf4", block);
    EXPECT_EQ((std::vector<int>{15, 0, 7, 8, 7}),
              std::vector<int>(codes.begin(), codes.begin() + 5));
    // A block of zeros has the code of zero everywhere.
    for (const int code : codes_of(*kernels, "nf4", std::vector<float>(64, 0.0f))) {
      EXPECT_EQ(code, 7);
    }
    // The scale is 1: halves go to the even integer.
    codes = codes_of(*kernels, int8_absmax(), {127.0f, 0.5f, 1.5f, -2.5f, -127.0f});
    EXPECT_EQ(codes, (std::vector<int>{127, 0, 2, 0xfe, 0x81}));
    // Nothing can be better than no error.
    codes = codes_of(*kernels, "int8", {127.0f, 1.0f, 0.0f, -2.0f, -127.0f});
    EXPECT_EQ(codes, (std::vector<int>{127, 1, 0, 0xfe, 0x81}));
    codes = codes_of(*kernels, "fp8", {448.0f, -448.0f, 1.0f, 0.0f, 0.001953125f});
    EXPECT_EQ(codes, (std::vector<int>{0x7e, 0xfe, 0x38, 0x00, 0x01}));
    codes = codes_of(*kernels, "fp8_e5m2", {57344.0f, -1.0f, 1.52587890625e-05f});
    EXPECT_EQ(codes, (std::vector<int>{0x7b, 0xbc, 0x01}));
    // Sixteen equally spaced values are represented without error: all codes, in order.
    std::vector<float> ramp(32);
    for (int i = 0; i < 32; ++i) ramp[i] = static_cast<float>(i % 16 - 5) * 0.25f;
    codes = codes_of(*kernels, "int4_g32", ramp);
    for (int i = 0; i < 32; ++i) EXPECT_EQ(codes[i], i % 16);
  }
}

// What pads a last vector must not turn a sum that is infinite into NaN.
TEST(Linear, InfiniteScaleInAPartialVectorGivesInfinity) {
  const Format& format = builtin_format("int4");
  const std::vector<std::uint8_t> codes(4, 0xff), scale{0x00, 0x7c}, zero{3};
  const std::vector<float> x(7, 0.5f);
  const Weight weight{.format = &format,
                      .at = format.layout(1, 7),
                      .codes = codes.data(),
                      .scales = scale.data(),
                      .extra = zero.data()};
  for (const Kernels* kernels : available_kernels()) {
    float out = 0.0f;
    kernels->linear(weight, x.data(), DType::f32, 1, 7, nullptr, &out, 1, 0, 1);
    EXPECT_EQ(out, kInf) << kernels->name;
  }
}

// The least error of a group in any scale and zero point, by brute force in double.
double least_int4_error(const std::vector<float>& x) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  const double widest = (*high - *low) / 15.0;
  double least = -1.0;
  for (int zero = 0; zero <= 15; ++zero) {
    for (int step = 0; step < 400; ++step) {
      const double scale = widest * (0.4 + 0.002 * step);
      double error = 0.0;
      for (const float v : x) {
        const double code = std::clamp(std::round(v / scale) + zero, 0.0, 15.0);
        error += std::pow(v - (code - zero) * scale, 2);
      }
      if (least < 0.0 || error < least) least = error;
    }
  }
  return least;
}

TEST(Encoders, SearchedInt4IsCloseToTheBestThereIs) {
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  for (const Kernels* kernels : available_kernels()) {
    double searched = 0.0, least = 0.0;
    for (int trial = 0; trial < 30; ++trial) {
      std::vector<float> x(128);
      for (float& value : x) value = static_cast<float>(normal(random) * 0.02 + 0.005);
      const double error = squared_error(*kernels, builtin_format("int4"), x);
      const double best = least_int4_error(x);
      EXPECT_LE(error, best * 1.1) << kernels->name;
      searched += error;
      least += best;
    }
    EXPECT_LE(searched, least * 1.02) << kernels->name;
  }
}

TEST(Encoders, SearchedInt8NeverErrsMoreThanTheRowsOwnRange) {
  std::mt19937 random(4);
  std::normal_distribution<double> normal;
  const Format absmax = int8_absmax();
  for (const Kernels* kernels : available_kernels()) {
    for (const int cols : {1, 15, 384, 4096}) {
      double searched = 0.0, plain = 0.0;
      for (int trial = 0; trial < 20; ++trial) {
        std::vector<float> x(cols);
        for (float& value : x) value = static_cast<float>(normal(random) * 0.02);
        const double error = squared_error(*kernels, builtin_format("int8"), x);
        const double before = squared_error(*kernels, absmax, x);
        // The search compares float32 sums of distances in steps of the scale.
        const float most = std::abs(*std::max_element(
            x.begin(), x.end(), [](float a, float b) { return std::abs(a) < std::abs(b); }));
        const double rounding = cols * std::pow(most * FLT_EPSILON, 2);
        EXPECT_LE(error, before * (1 + 1e-5) + rounding) << kernels->name;
        searched += error;
        plain += before;
      }
      if (cols >= 384) {
        EXPECT_LT(searched, 0.99 * plain) << kernels->name << " " << cols;
      }
    }
  }
}

TEST(Dispatch, UnitsAreNamedOnceAndTheScalarOneIsFirst) {
  const auto all = available_kernels();
  EXPECT_EQ(all.front(), &reference_kernels());
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) EXPECT_STRNE(all[i]->name, all[j]->name);
  }
  EXPECT_TRUE(std::count(all.begin(), all.end(), &active_kernels()) == 1);
}

TEST(SortTable, BoundsLieBetweenNeighbours) {
  for (const auto& [name, format] : all_formats()) {
    if (format.encoder != Encoder::midpoint) continue;
    const SortedTable sorted = sort_table(format.table);
    ASSERT_EQ(sorted.code_of.size(), format.table.size()) << name;
    ASSERT_EQ(sorted.bounds.size() + 1, format.table.size()) << name;
    for (std::size_t k = 0; k < sorted.bounds.size(); ++k) {
      EXPECT_LE(format.table[sorted.code_of[k]], sorted.bounds[k]) << name;
      EXPECT_GE(format.table[sorted.code_of[k + 1]], sorted.bounds[k]) << name;
    }
  }
}

}  // namespace
}  // namespace vramkit::cpu
