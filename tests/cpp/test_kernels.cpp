// Every instruction-set unit that this processor runs, against the scalar reference: codes, scales
// and decoded values bit for bit, products within an error bound. The reference itself takes part
// in the product tests, whose oracle is arithmetic in double.
//
// A new unit is found by available_kernels(), a new format is added in kernel_cases.hpp.
#include <gtest/gtest.h>

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "core/format.hpp"
#include "cpu/kernels.hpp"
#include "kernel_cases.hpp"

namespace vramkit::cpu {
namespace {

class KernelTest : public testing::TestWithParam<std::tuple<const Kernels*, NamedFormat>> {
 protected:
  const Kernels& kernels() const { return *std::get<0>(GetParam()); }
  const Format& format() const { return std::get<1>(GetParam()).format; }
  std::vector<std::int64_t> all_cols() const {
    std::vector<std::int64_t> all;
    for (const std::int64_t cols : kCols) {
      if (format().row_separable(cols)) all.push_back(cols);
    }
    return all;
  }
  std::mt19937 random{12345};
};

TEST_P(KernelTest, QuantizeWritesTheReferencesBits) {
  const SortedTable sorted = sorted_of(format());
  for (const std::int64_t cols : all_cols()) {
    for (const DType type : kTypes) {
      for (const Content content : kContents) {
        const std::int64_t rows = static_cast<std::int64_t>(random() % 5) + 1;
        const Matrix m = make_matrix(content, format(), rows, cols, type, random() % 4, random);
        Encoded expected(format(), rows, cols, 0), got(format(), rows, cols, 1);
        encode(reference_kernels(), format(), sorted, m, expected, 0, rows);
        // In two calls, so that a range that does not begin at zero is tested too.
        encode(kernels(), format(), sorted, m, got, rows / 2, rows);
        encode(kernels(), format(), sorted, m, got, 0, rows / 2);
        const std::string at = "cols " + std::to_string(cols) + " type " +
                               std::to_string(static_cast<int>(type)) + " content " +
                               std::to_string(static_cast<int>(content));
        ASSERT_TRUE(expected.codes == got.codes) << at;
        ASSERT_TRUE(expected.scales == got.scales) << at;
        ASSERT_TRUE(expected.extra == got.extra) << at;
        ASSERT_TRUE(got.codes.intact() && got.scales.intact() && got.extra.intact()) << at;
      }
    }
  }
}

TEST_P(KernelTest, EmptyWeights) {
  const SortedTable sorted = sorted_of(format());
  for (const auto& [rows, cols] : {std::pair{0, 64}, {0, 0}, {3, 0}}) {
    const Matrix m = make_matrix(Content::normal, format(), rows, cols, DType::f16, 0, random);
    Encoded expected(format(), rows, cols, 0), got(format(), rows, cols, 0);
    encode(reference_kernels(), format(), sorted, m, expected, 0, rows);
    encode(kernels(), format(), sorted, m, got, 0, rows);
    EXPECT_TRUE(expected.scales == got.scales);
    Stored stored(format(), rows, cols, random);
    Buffer out(0), sums(rows * 2 * 4);
    kernels().dequantize(stored.weight, 0, rows, out.data(), DType::f32, cols);
    EXPECT_TRUE(out.intact());
    const std::vector<float> bias{1.5f, -2.0f, 0.0f};
    kernels().linear(stored.weight, m.bytes.data(), DType::f32, 2, 0, bias.data(), sums.data(),
                     rows, 0, rows);
    for (std::int64_t n = 0; n < 2 * rows; ++n) {  // an empty sum and the bias
      EXPECT_EQ(read(sums.data(), DType::f32, n), bias[n % rows]);
    }
    EXPECT_TRUE(sums.intact());
  }
}

// Equal bits, or both NaN: which NaN a product of two gives depends on their order.
void expect_same(const Buffer& expected, const Buffer& got, DType type, const std::string& at) {
  ASSERT_EQ(expected.size(), got.size());
  for (std::int64_t i = 0; i < got.size() / size_of(type); ++i) {
    const float a = read(expected.data(), type, i), b = read(got.data(), type, i);
    if (std::isnan(a) && std::isnan(b)) continue;
    ASSERT_EQ(std::bit_cast<std::uint32_t>(a), std::bit_cast<std::uint32_t>(b))
        << at << " element " << i << ": " << a << " and " << b;
  }
}

TEST_P(KernelTest, DequantizeWritesTheReferencesBits) {
  for (const std::int64_t cols : all_cols()) {
    for (std::int64_t rows = 0; rows <= 5; ++rows) {
      const Stored stored(format(), rows, cols, random);
      for (const DType type : kTypes) {
        const std::int64_t begin = rows / 3,
                           stride = cols + static_cast<std::int64_t>(random() % 4);
        const std::int64_t size = (rows - begin) * stride * size_of(type);
        Buffer expected(size), got(size);
        reference_kernels().dequantize(stored.weight, begin, rows, expected.data(), type, stride);
        kernels().dequantize(stored.weight, begin, rows, got.data(), type, stride);
        expect_same(expected, got, type, "cols " + std::to_string(cols));
        ASSERT_TRUE(got.intact());
      }
    }
  }
}

// All bit patterns as codes (of casts too: NaN, infinity, subnormals), under scales from the
// smallest to the largest, infinite and NaN: rounding to 16 bits meets overflow and subnormals.
TEST_P(KernelTest, DequantizeOfEveryCodeUnderExtremeScales) {
  const std::int64_t cols = 65536 * 8 / std::max<std::int64_t>(format().bits * 8, 64);
  const std::int64_t rows = 12;
  Stored stored(format(), rows, cols, random);
  std::int64_t i = 0;
  for (; i + 1 < stored.codes.size(); i += 2) {
    const auto pattern = static_cast<std::uint16_t>(i / 2);
    std::memcpy(stored.codes.data() + i, &pattern, 2);
  }
  const float scales[] = {0.0f,  1e-45f, 1e-40f, 1e-38f,  3e-9f, 1e-6f,
                          0.37f, 1.0f,   250.0f, 1.3e38f, kInf,  std::nanf("")};
  const std::int64_t groups = rows * stored.weight.at.groups_per_row;
  for (std::int64_t g = 0; g < groups; ++g) {
    const float scale = scales[g * std::size(scales) / groups];
    if (format().scale == ScaleType::f32) write(stored.scales.data(), DType::f32, g, scale);
    if (format().scale == ScaleType::f16) write(stored.scales.data(), DType::f16, g, scale);
  }
  for (const DType type : kTypes) {
    const std::int64_t size = rows * cols * size_of(type);
    Buffer expected(size), got(size);
    reference_kernels().dequantize(stored.weight, 0, rows, expected.data(), type, cols);
    kernels().dequantize(stored.weight, 0, rows, got.data(), type, cols);
    expect_same(expected, got, type, "");
  }
}

// out = x W^T + bias in double from the decoded values, and what the products' magnitudes sum to.
struct Product {
  double sum, magnitude;
};
Product exact_product(const std::vector<float>& w, std::int64_t row, std::int64_t cols,
                      const Matrix& x, std::int64_t i, float bias) {
  Product product{bias, std::fabs(bias)};
  for (std::int64_t k = 0; k < cols; ++k) {
    const double term = double{w[row * cols + k]} * read(x.bytes.data(), x.type, i * x.stride + k);
    product.sum += term;
    product.magnitude += std::fabs(term);
  }
  return product;
}

std::vector<float> decoded(const Weight& weight) {
  std::vector<float> w(weight.at.rows * weight.at.cols + 1);
  reference_kernels().dequantize(weight, 0, weight.at.rows, w.data(), DType::f32, weight.at.cols);
  return w;
}

// How far a sum may lie from the exact one. Let u = 2^-24 be float32's rounding error. A vector
// unit adds at most K / 8 terms to a lane, then lanes, scale and bias: an error below (K / 8 + 10)
// * u * sum|x w|, and decoding a weight with a scale per row at the end adds one u. For the K <=
// 1000 tested here 4 * sqrt(K) * 2^-23 is above that: the bound holds always, not by luck. The
// scalar reference adds K terms to one sum; its roundings are random enough to stay below too. The
// result is rounded once to the output's type: half a unit in the last place. A product of bfloat16
// rows may take the decoded weight rounded to bfloat16: 2^-8 of each term.
double allowed_error(const Product& exact, std::int64_t cols, DType type) {
  const double weight = type == DType::bf16 ? std::ldexp(1.0, -8) : 0.0;
  const double arithmetic =
      (4.0 * std::sqrt(static_cast<double>(cols)) * FLT_EPSILON + weight) * exact.magnitude;
  const double largest = std::fabs(exact.sum) + arithmetic;
  const double rounding = type == DType::f32    ? std::ldexp(largest, -24)
                          : type == DType::bf16 ? std::ldexp(largest, -8)
                                                : std::ldexp(largest, -11) + std::ldexp(1.0, -25);
  return arithmetic + rounding;
}

TEST_P(KernelTest, LinearStaysWithinItsErrorBound) {
  const std::int64_t counts[] = {1, 2, 3, 4, 7, 8, 15, 16, 0};
  std::size_t round = 0;
  for (const std::int64_t cols : all_cols()) {
    for (std::int64_t rows = 0; rows <= 5; ++rows) {
      Stored stored(format(), rows, cols, random);
      keep_finite(stored);
      const std::vector<float> w = decoded(stored.weight);
      const std::vector<float> bias{0.5f, -0.25f, 3.0f, 0.0f, -1.0f};
      for (const DType type : kTypes) {
        const std::int64_t count = counts[round++ % std::size(counts)];
        const bool with_bias = round % 3 != 0;
        const std::int64_t begin = rows / 3,
                           out_stride = rows + static_cast<std::int64_t>(round % 3);
        Matrix x = make_matrix(Content::normal, format(), count, cols, type, random() % 4, random);
        Buffer out(count * out_stride * size_of(type));
        const Buffer before(out.size());
        kernels().linear(stored.weight, x.bytes.data(), type, count, x.stride,
                         with_bias ? bias.data() : nullptr, out.data(), out_stride, begin, rows);
        ASSERT_TRUE(out.intact());
        for (std::int64_t i = 0; i < count; ++i) {
          for (std::int64_t n = 0; n < out_stride; ++n) {
            const std::int64_t at = i * out_stride + n;
            if (n < begin || n >= rows) {  // not asked for, so not touched
              ASSERT_EQ(0, std::memcmp(out.data() + at * size_of(type),
                                       before.data() + at * size_of(type), size_of(type)));
              continue;
            }
            const Product exact = exact_product(w, n, cols, x, i, with_bias ? bias[n] : 0.0f);
            ASSERT_LE(std::fabs(read(out.data(), type, at) - exact.sum),
                      allowed_error(exact, cols, type))
                << "cols " << cols << " row " << n << " x " << i << " of " << count << " type "
                << static_cast<int>(type);
          }
        }
      }
    }
  }
}

// One element of x that is NaN or infinite: its row's outputs are what double arithmetic gives
// (infinity times a weight of zero is NaN), and the other rows' are finite.
TEST_P(KernelTest, LinearPropagatesNanAndInfinity) {
  const std::int64_t rows = 3, count = 5;
  for (const std::int64_t cols : all_cols()) {
    Stored stored(format(), rows, cols, random);
    keep_finite(stored);
    const std::vector<float> w = decoded(stored.weight);
    for (const DType type : kTypes) {
      for (const std::int64_t k : {std::int64_t{0}, cols / 2, cols - 1}) {
        for (const float poison : {std::nanf(""), kInf, -kInf}) {
          Matrix x = make_matrix(Content::normal, format(), count, cols, type, 1, random);
          const std::int64_t bad = static_cast<std::int64_t>(random() % count);
          write(x.bytes.data(), type, bad * x.stride + k, poison);
          Buffer out(count * rows * size_of(type));
          kernels().linear(stored.weight, x.bytes.data(), type, count, x.stride, nullptr,
                           out.data(), rows, 0, rows);
          for (std::int64_t i = 0; i < count; ++i) {
            for (std::int64_t n = 0; n < rows; ++n) {
              const float got = read(out.data(), type, i * rows + n);
              const double exact = exact_product(w, n, cols, x, i, 0.0f).sum;
              if (i != bad) {
                ASSERT_TRUE(std::isfinite(got)) << "cols " << cols;
              } else if (std::isnan(exact)) {
                ASSERT_TRUE(std::isnan(got)) << "cols " << cols;
              } else {
                ASSERT_EQ(got, static_cast<float>(exact)) << "cols " << cols;
              }
            }
          }
        }
      }
    }
  }
}

std::string parameter_name(
    const testing::TestParamInfo<std::tuple<const Kernels*, NamedFormat>>& info) {
  return std::string(std::get<0>(info.param)->name) + "_" + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(AllUnits, KernelTest,
                         testing::Combine(testing::ValuesIn(available_kernels()),
                                          testing::ValuesIn(all_formats())),
                         parameter_name);

}  // namespace
}  // namespace vramkit::cpu
