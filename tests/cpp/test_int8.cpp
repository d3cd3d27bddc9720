// The int8 kernels of every unit: quantized rows bit for bit as the reference, sums exact against
// 64-bit arithmetic, scaled outputs bit for bit where only exact steps and single roundings are on
// the way, and by an error bound where outliers or an activation come in.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.hpp"
#include "kernel_cases.hpp"

namespace vramkit::cpu {
namespace {

class Int8Test : public testing::TestWithParam<const Kernels*> {
 protected:
  const Int8Kernels& kernels() const { return GetParam()->int8; }
  std::mt19937 random{4321};
};

struct Quantized {
  std::int64_t rows, cols, stride, block;
  Buffer codes;
  std::vector<float> absmax;
  std::vector<std::int32_t> sums;
  std::vector<std::uint8_t> columns;
  Quantized(std::int64_t r, std::int64_t c)
      : rows(r),
        cols(c),
        stride(int8_row_stride(c)),
        block(r * stride),
        codes(std::max<std::int64_t>(1, int8_blocks(c)) * block, 1),
        absmax(r),
        sums(r),
        columns(c) {}
  Int8Rows rows_of() {
    return {reinterpret_cast<std::int8_t*>(codes.data()), stride, block, absmax.data(),
            sums.data()};
  }
  std::int8_t code(std::int64_t r, std::int64_t k) const {
    return static_cast<std::int8_t>(
        codes.data()[r * stride + k / kInt8Depth * block + k % kInt8Depth]);
  }
};

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

TEST_P(Int8Test, QuantizedRowsAreTheReferences) {
  const std::int64_t lengths[] = {0, 1, 7, 16, 31, 63, 65, 384, 2047, 2048, 2049, 4100};
  for (const std::int64_t cols : lengths) {
    for (const DType type : kTypes) {
      for (const float threshold : {0.0f, 2.0f, 1e-3f}) {
        const std::int64_t rows = 5, stride = cols + 3;
        Buffer x(rows * stride * size_of(type), size_of(type));
        for (std::int64_t i = 0; i < rows * stride; ++i) {
          float v = std::normal_distribution<float>()(random);
          const std::int64_t row = i / stride;
          if (row == 1) v = 0.0f;
          if (row == 2 && i % 7 == 3) v = i % 2 ? kInf : -kInf;
          if (row == 3 && i % 11 == 5) v = std::nanf("");
          if (row == 4) v *= 1e-39f;
          write(x.data(), type, i, v);
        }
        Quantized expected(rows, cols), got(rows, cols);
        const auto run = [&](const Int8Kernels& k, Quantized& to, int begin, int end) {
          k.quantize(x.data(), type, cols, stride, threshold, to.columns.data(), to.rows_of(),
                     begin, end);
        };
        run(reference_kernels().int8, expected, 0, 5);
        run(kernels(), got, 2, 5);
        run(kernels(), got, 0, 2);
        const std::string at = "cols " + std::to_string(cols) + " type " +
                               std::to_string(static_cast<int>(type)) + " threshold " +
                               std::to_string(threshold);
        ASSERT_TRUE(expected.codes == got.codes) << at;
        ASSERT_TRUE(got.codes.intact()) << at;
        ASSERT_EQ(expected.sums, got.sums) << at;
        ASSERT_EQ(expected.columns, got.columns) << at;
        for (std::int64_t r = 0; r < rows; ++r) {
          ASSERT_TRUE(same(expected.absmax[r], got.absmax[r])) << at << " row " << r;
        }
      }
    }
  }
}

// Random bytes; or the extremes, whose pairs of products leave 16 bits.
std::vector<std::int8_t> bytes(std::int64_t count, int kind, std::mt19937& random) {
  std::vector<std::int8_t> all(count);
  for (auto& b : all) {
    b = kind == 0   ? static_cast<std::int8_t>(random())
        : kind == 1 ? std::int8_t{-128}
        : kind == 2 ? std::int8_t{127}
                    : static_cast<std::int8_t>(random() % 2 ? -128 : 127);
  }
  return all;
}

TEST_P(Int8Test, SumsAreExact) {
  struct Shape {
    std::int64_t m, n, k;
  };
  const Shape shapes[] = {{1, 1, 1},
                          {1, 5, 7},
                          {2, 4, 31},
                          {3, 3, 63},
                          {4, 65, 64},
                          {5, 6, 65},
                          {7, 130, 129},
                          {9, 17, 384},
                          {130, 9, 70},
                          {131, 67, 100},
                          {1, 9, 2100},
                          {2, 7, 4161},
                          {6, 10, 4161},
                          {1, 3, 0},
                          {3, 2, 0},
                          {1, 2, (1 << 17) - 1},
                          // Panels of 16, 48 and 64 rows, tiles of every height, odd ends of k.
                          {25, 70, 66},
                          {27, 48, 65},
                          {33, 33, 67},
                          {128, 65, 1609}};
  for (const auto& [m, n, k] : shapes) {
    for (int kind = 0; kind < 4; ++kind) {
      const std::int64_t a_stride = k + 5, b_stride = k + 2, out_stride = n + 1;
      const auto a = bytes(m * a_stride + 1, kind, random);
      const auto b = bytes(n * b_stride + 3, kind == 2 ? 1 : kind, random);
      std::vector<std::int32_t> sums(m), out(m * out_stride, -7);
      Int8Product job;
      job.x = a.data() + 1;
      job.x_stride = a_stride;
      job.x_block = kInt8Depth;
      job.x_sums = sums.data();
      job.weight = b.data() + 3;
      job.weight_stride = b_stride;
      job.cols = k;
      job.out = out.data();
      job.out_stride = out_stride;
      job.exact = true;
      kernels().sums(job.x, k, a_stride, sums.data(), 0, m);
      const std::int64_t half = n / 2;
      kernels().product(job, 0, m, half, n);
      kernels().product(job, 0, m, 0, half);
      for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          std::int64_t expected = 0;
          for (std::int64_t c = 0; c < k; ++c) {
            expected += std::int64_t{job.x[i * a_stride + c]} * job.weight[j * b_stride + c];
          }
          ASSERT_EQ(expected, out[i * out_stride + j])
              << m << "x" << n << "x" << k << " kind " << kind << " at " << i << "," << j;
        }
        ASSERT_EQ(out[i * out_stride + n], -7);
      }
    }
  }
}

TEST_P(Int8Test, ProductsAreTheReferences) {
  struct Shape {
    std::int64_t m, n, k;
  };
  const Shape shapes[] = {{1, 70, 100}, {2, 33, 1100}, {5, 17, 65}, {130, 66, 384}, {3, 9, 2200}};
  for (const auto& [m, n, k] : shapes) {
    for (const DType type : kTypes) {
      for (int kind = 0; kind < 6; ++kind) {
        const bool with_bias = kind % 2, with_outliers = kind == 2;
        Quantized rows(m, k);
        Buffer x(m * k * size_of(type), size_of(type));
        for (std::int64_t i = 0; i < m * k; ++i) {
          write(x.data(), type, i, std::normal_distribution<float>()(random));
        }
        if (m > 1) write(x.data(), type, k + k / 2, std::nanf(""));
        kernels().quantize(x.data(), type, k, k, 0.0f, nullptr, rows.rows_of(), 0, m);
        const auto weight = bytes(n * k, 0, random);
        Buffer scales(n * 4, 3);
        for (std::int64_t j = 0; j < n; ++j) write(scales.data(), DType::f32, j, 0.001f * (j + 1));
        std::vector<float> bias(n);
        for (float& b : bias) b = std::normal_distribution<float>()(random);
        std::vector<std::int64_t> outliers;
        if (with_outliers) {
          for (std::int64_t c = 1; c < k; c += 1 + k / 80) outliers.push_back(c);
        }
        Int8Product job;
        job.x = rows.rows_of().codes;
        job.x_stride = rows.stride;
        job.x_block = rows.block;
        job.x_absmax = rows.absmax.data();
        job.x_sums = rows.sums.data();
        job.weight = weight.data();
        job.weight_stride = k;
        job.weight_scales = scales.data();
        job.cols = k;
        job.bias = with_bias ? bias.data() : nullptr;
        job.values = x.data();
        job.values_stride = k;
        job.outliers = outliers.data();
        job.outlier_count = static_cast<std::int64_t>(outliers.size());
        job.activation = static_cast<Activation>(kind > 2 ? kind - 2 : 0);
        job.type = type;
        job.out_stride = n;
        Buffer expected(m * n * size_of(type)), got(m * n * size_of(type), size_of(type));
        job.out = expected.data();
        reference_kernels().int8.product(job, 0, m, 0, n);
        job.out = got.data();
        kernels().product(job, 0, m, n / 3, n);
        kernels().product(job, 0, m, 0, n / 3);
        ASSERT_TRUE(got.intact());
        // Half an ulp of rounding to the type; an activation's few ulp in float32 before it.
        const float ulp = type == DType::f32 ? 0x1p-23f : type == DType::bf16 ? 0x1p-8f : 0x1p-11f;
        for (std::int64_t i = 0; i < m * n; ++i) {
          const float a = read(expected.data(), type, i), b = read(got.data(), type, i);
          const std::string at = std::to_string(k) + " kind " + std::to_string(kind) + " type " +
                                 std::to_string(static_cast<int>(type)) + " element " +
                                 std::to_string(i);
          if (kind < 2 || std::isnan(a) || std::isinf(a)) {
            ASSERT_TRUE(same(a, b)) << at << ": " << a << " and " << b;
          } else if (with_outliers) {
            // Sums of some 80 products in another order: 80 * 4 * 127 * scale * 2^-24 each.
            const float room = 80.0f * 80.0f * 4.0f * 127.0f * 0.001f * (n + 1) * 0x1p-24f;
            ASSERT_NEAR(a, b, room + 2 * ulp * std::fabs(a)) << at;
          } else {
            ASSERT_NEAR(a, b, 0x1p-20f * std::fabs(a) + 2 * ulp * std::fabs(a) + 1e-7f) << at;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Units, Int8Test, testing::ValuesIn(available_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace vramkit::cpu
