// Facts about encoding, products and dispatch that need no reference kernel to compare with, on
// every instruction-set unit that this processor runs.
#include <gtest/gtest.h>

#include <algorithm>
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
std::vector<int> codes_of(const Kernels& kernels, const std::string& name,
                          const std::vector<float>& x) {
  const Format& format = builtin_format(name);
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
    codes = codes_of(*kernels, "int8", {127.0f, 0.5f, 1.5f, -2.5f, -127.0f});
    EXPECT_EQ(codes, (std::vector<int>{127, 0, 2, 0xfe, 0x81}));
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

// The search must do at least as well as the plain choice: the group's range over fifteen steps.
TEST(Encoders, SearchedInt4BeatsTheRangeScale) {
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  const Format& format = builtin_format("int4");
  for (const Kernels* kernels : available_kernels()) {
    for (int trial = 0; trial < 50; ++trial) {
      std::vector<float> x(128), back(128);
      for (float& value : x) value = static_cast<float>(normal(random) * 0.02);
      Encoded to(format, 1, 128, 0);
      kernels->quantize(format, {}, to.at, x.data(), DType::f32, 128,
                        {to.codes.data(), to.scales.data(), to.extra.data()}, 0, 1);
      const Weight weight{.format = &format,
                          .at = to.at,
                          .codes = to.codes.data(),
                          .scales = to.scales.data(),
                          .extra = to.extra.data()};
      kernels->dequantize(weight, 0, 1, back.data(), DType::f32, 128);
      const auto [low, high] = std::minmax_element(x.begin(), x.end());
      const double step = (*high - *low) / 15.0;
      const double zero = std::round(-*low / step);
      double searched = 0.0, plain = 0.0;
      for (int i = 0; i < 128; ++i) {
        const double code = std::clamp(std::round(x[i] / step) + zero, 0.0, 15.0);
        searched += std::pow(x[i] - back[i], 2);
        plain += std::pow(x[i] - (code - zero) * step, 2);
      }
      EXPECT_LE(searched, plain * 1.001) << kernels->name;  // the scale is stored as float16
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
