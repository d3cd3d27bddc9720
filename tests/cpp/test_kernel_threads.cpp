// Kernels on several threads at once, as the operators call them: ranges of rows share codes'
// bytes, scales and cache lines with their neighbours, and the bits are those of one thread. Under
// ThreadSanitizer this shows that no two ranges write the same byte.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "core/format.hpp"
#include "cpu/kernels.hpp"
#include "kernel_cases.hpp"

namespace vramkit::cpu {
namespace {

constexpr std::int64_t kThreads = 4, kRows = 21;

// work(begin, end) for kThreads ranges of [0, count) at the same time.
template <class Work>
void in_parallel(std::int64_t count, const Work& work) {
  std::vector<std::thread> threads;
  for (std::int64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&work, begin = count * t / kThreads, end = count * (t + 1) / kThreads] {
      work(begin, end);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

class KernelThreads : public testing::TestWithParam<std::tuple<const Kernels*, NamedFormat>> {
 protected:
  const Kernels& kernels() const { return *std::get<0>(GetParam()); }
  const Format& format() const { return std::get<1>(GetParam()).format; }
  std::vector<std::int64_t> all_cols() const {
    std::vector<std::int64_t> all;
    for (const std::int64_t cols : {1, 33, 64, 65, 192}) {
      if (format().row_separable(cols)) all.push_back(cols);
    }
    return all;
  }
  std::mt19937 random{7};
};

TEST_P(KernelThreads, EncodeTheSameBits) {
  const SortedTable sorted = sorted_of(format());
  for (const std::int64_t cols : all_cols()) {
    const Matrix m = make_matrix(Content::normal, format(), kRows, cols, DType::bf16, 1, random);
    Encoded expected(format(), kRows, cols, 0), got(format(), kRows, cols, 1);
    encode(kernels(), format(), sorted, m, expected, 0, kRows);
    in_parallel(kRows, [&](std::int64_t begin, std::int64_t end) {
      encode(kernels(), format(), sorted, m, got, begin, end);
    });
    EXPECT_TRUE(expected.codes == got.codes) << cols;
    EXPECT_TRUE(expected.scales == got.scales) << cols;
    EXPECT_TRUE(expected.extra == got.extra) << cols;
  }
}

TEST_P(KernelThreads, DecodeAndMultiplyToTheSameBits) {
  for (const std::int64_t cols : all_cols()) {
    Stored stored(format(), kRows, cols, random);
    keep_finite(stored);
    for (const DType type : kTypes) {
      const std::int64_t size = size_of(type);
      Buffer expected(kRows * cols * size), got(kRows * cols * size);
      kernels().dequantize(stored.weight, 0, kRows, expected.data(), type, cols);
      in_parallel(kRows, [&](std::int64_t begin, std::int64_t end) {
        kernels().dequantize(stored.weight, begin, end, got.data() + begin * cols * size, type,
                             cols);
      });
      EXPECT_TRUE(expected == got) << cols;
      for (const std::int64_t count : {1, 5, 11}) {
        const Matrix x = make_matrix(Content::normal, format(), count, cols, type, 0, random);
        Buffer sums(count * kRows * size), apart(count * kRows * size);
        const auto multiply = [&](const Buffer& out, std::int64_t begin, std::int64_t end) {
          kernels().linear(stored.weight, x.bytes.data(), type, count, cols, nullptr, out.data(),
                           kRows, begin, end);
        };
        multiply(sums, 0, kRows);
        in_parallel(kRows,
                    [&](std::int64_t begin, std::int64_t end) { multiply(apart, begin, end); });
        EXPECT_TRUE(sums == apart) << cols << " columns, " << count << " rows of x";
      }
    }
  }
}

TEST_P(KernelThreads, RoundWithFeedbackToTheSameCodes) {
  if (format().family == Family::cast) return;
  const std::int64_t cols = 40;
  const SortedTable sorted = sorted_of(format());
  std::normal_distribution<float> normal;
  const auto numbers = [&](std::int64_t count) {
    std::vector<float> all(count);
    for (float& value : all) value = normal(random) * 0.1f;
    return all;
  };
  const std::vector<float> x = numbers(kRows * cols), coefficients = numbers(cols * cols),
                           zeros(kRows, 8.0f), scales(kRows, 0.05f);
  std::vector<std::int64_t> order(cols);
  std::iota(order.begin(), order.end(), 0);
  const auto run = [&](std::vector<std::uint8_t>& codes, bool parallel) {
    Feedback job{.format = &format(), .sorted = &sorted, .cols = cols, .group = cols, .groups = 1};
    job.x = x.data();
    job.scales = scales.data();
    job.zeros = format().zero_point ? zeros.data() : nullptr;
    job.coefficients = coefficients.data();
    job.order = order.data();
    job.codes = codes.data();
    if (!parallel) return kernels().feedback(job, 0, kRows);
    in_parallel(kRows,
                [&](std::int64_t begin, std::int64_t end) { kernels().feedback(job, begin, end); });
  };
  std::vector<std::uint8_t> expected(kRows * cols), got(kRows * cols);
  run(expected, false);
  run(got, true);
  EXPECT_EQ(expected, got);
}

INSTANTIATE_TEST_SUITE_P(AllUnits, KernelThreads,
                         testing::Combine(testing::ValuesIn(available_kernels()),
                                          testing::ValuesIn(all_formats())),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)->name) + "_" +
                                  std::get<1>(info.param).name;
                         });

class Int8Threads : public testing::TestWithParam<const Kernels*> {};

// Activations by rows, where all threads mark outlier columns in one array; then the product by
// rows of the weight.
TEST_P(Int8Threads, QuantizeAndMultiplyToTheSameBits) {
  const Int8Kernels& kernels = GetParam()->int8;
  const std::int64_t cols = 100;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * cols), scales(kRows, 0.01f);
  for (float& value : x) value = normal(random);
  std::vector<std::int8_t> weight(kRows * cols);
  for (auto& code : weight) code = static_cast<std::int8_t>(random());
  struct Result {
    std::vector<std::int8_t> codes;
    std::vector<float> absmax, out;
    std::vector<std::int32_t> sums;
    std::vector<std::uint8_t> columns;
    bool operator==(const Result&) const = default;
  };
  const auto run = [&](const auto& each) {
    const std::int64_t stride = int8_row_stride(cols);
    Result r{.codes = std::vector<std::int8_t>(kRows * stride),
             .absmax = std::vector<float>(kRows),
             .out = std::vector<float>(kRows * kRows),
             .sums = std::vector<std::int32_t>(kRows),
             .columns = std::vector<std::uint8_t>(cols)};
    const Int8Rows rows{r.codes.data(), stride, kRows * stride, r.absmax.data(), r.sums.data()};
    each(kRows, [&](std::int64_t begin, std::int64_t end) {
      kernels.quantize(x.data(), DType::f32, cols, cols, 1.5f, r.columns.data(), rows, begin, end);
    });
    Int8Product job;
    job.x = rows.codes;
    job.x_stride = stride;
    job.x_block = rows.block;
    job.x_absmax = rows.absmax;
    job.x_sums = rows.sums;
    job.weight = weight.data();
    job.weight_stride = cols;
    job.weight_scales = reinterpret_cast<const std::uint8_t*>(scales.data());
    job.cols = cols;
    job.values = x.data();
    job.values_stride = cols;
    std::vector<std::int64_t> outliers;
    for (std::int64_t k = 0; k < cols; ++k) {
      if (r.columns[k]) outliers.push_back(k);
    }
    job.outliers = outliers.data();
    job.outlier_count = static_cast<std::int64_t>(outliers.size());
    job.out = r.out.data();
    job.out_stride = kRows;
    job.type = DType::f32;
    each(kRows,
         [&](std::int64_t begin, std::int64_t end) { kernels.product(job, 0, kRows, begin, end); });
    return r;
  };
  const Result expected = run([](std::int64_t count, const auto& work) { work(0, count); });
  const Result got = run([](std::int64_t count, const auto& work) { in_parallel(count, work); });
  EXPECT_NE(0, std::count(expected.columns.begin(), expected.columns.end(), 1));
  EXPECT_TRUE(expected == got);
}

INSTANTIATE_TEST_SUITE_P(AllUnits, Int8Threads, testing::ValuesIn(available_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace vramkit::cpu
