// Weights and matrices of more than 2^32 elements: their last rows are the bits that those rows are
// as a matrix of their own. The memory is reserved only; a few pages of it are ever touched.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <tuple>

#include "core/format.hpp"
#include "cpu/kernels.hpp"
#include "kernel_cases.hpp"

namespace vramkit::cpu {
namespace {

// Zeros that take memory where they are touched.
class Sparse {
 public:
  explicit Sparse(std::int64_t size)
      : size_(static_cast<std::size_t>(std::max<std::int64_t>(1, size))),
        data_(mmap(nullptr, size_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  Sparse(const Sparse&) = delete;
  ~Sparse() {
    if (reserved()) munmap(data_, size_);
  }
  bool reserved() const { return data_ != MAP_FAILED; }
  std::uint8_t* data() const { return static_cast<std::uint8_t*>(data_); }

 private:
  std::size_t size_;
  void* data_;
};

// The rows before the last ones: 6.4 * 10^9 elements. A multiple of 256, so that blocks of nested
// scales begin with the last rows, as they do where those are alone.
constexpr std::int64_t kBefore = std::int64_t{1} << 25, kRows = 3, kColumns = 192;
constexpr std::int64_t kFarRow = (std::int64_t{1} << 31) + 64;  // elements from row to row
static_assert(kBefore * kColumns > std::int64_t{1} << 32);
static_assert(kBefore % kNestedBlock == 0);

class Offsets : public testing::TestWithParam<std::tuple<const Kernels*, NamedFormat>> {
 protected:
  const Kernels& kernels() const { return *std::get<0>(GetParam()); }
  const Format& format() const { return std::get<1>(GetParam()).format; }
  std::mt19937 random{99};
};

std::int64_t scale_size(const Format& format) {
  return format.scale == ScaleType::f32 ? 4 : format.scale == ScaleType::f16 ? 2 : 1;
}

// A weight of kBefore + kRows rows whose last ones are those of `last`.
struct Large {
  Layout at;
  Sparse codes, scales, extra;
  Weight weight;
  Large(const Format& format, const Stored& last)
      : at(format.layout(kBefore + kRows, kColumns)),
        codes(at.rows * at.row_code_bytes),
        scales(at.rows * at.groups_per_row * scale_size(format)),
        extra(at.rows * at.groups_per_row) {
    if (!ready()) return;
    const std::int64_t groups = kBefore * at.groups_per_row;
    const bool nested = format.scale == ScaleType::nested;
    const auto put = [](const Sparse& to, std::int64_t offset, const Buffer& from) {
      std::memcpy(to.data() + offset, from.data(), static_cast<std::size_t>(from.size()));
    };
    put(codes, kBefore * at.row_code_bytes, last.codes);
    put(scales, groups * scale_size(format), last.scales);
    put(extra, nested ? groups / kNestedBlock * 4 : groups, last.extra);
    weight = last.weight;
    weight.at = at;
    weight.codes = codes.data();
    weight.scales = scales.data();
    weight.extra = extra.data();
  }
  bool ready() const { return codes.reserved() && scales.reserved() && extra.reserved(); }
};

TEST_P(Offsets, DecodingTheLastRows) {
  const Stored last(format(), kRows, kColumns, random);
  const Large large(format(), last);
  const Sparse far((kRows - 1) * kFarRow * 4 + kColumns * 4);
  if (!large.ready() || !far.reserved()) GTEST_SKIP() << "this much memory cannot be reserved";
  for (const DType type : kTypes) {
    const std::int64_t row = kColumns * size_of(type);
    Buffer expected(kRows * row);
    kernels().dequantize(last.weight, 0, kRows, expected.data(), type, kColumns);
    kernels().dequantize(large.weight, kBefore, kBefore + kRows, far.data(), type, kFarRow);
    for (std::int64_t r = 0; r < kRows; ++r) {
      ASSERT_EQ(0, std::memcmp(expected.data() + r * row, far.data() + r * kFarRow * size_of(type),
                               static_cast<std::size_t>(row)))
          << "row " << r << " type " << static_cast<int>(type);
    }
  }
}

TEST_P(Offsets, ProductsWithTheLastRows) {
  Stored last(format(), kRows, kColumns, random);
  keep_finite(last);
  const Large large(format(), last);
  for (const std::int64_t count : {2, 11}) {  // from the packed bytes; by decoded panels
    const std::int64_t far_row = kFarRow / (count / 2);
    const Sparse x((count - 1) * far_row * 4 + kColumns * 4), out((count * far_row + kBefore) * 4);
    if (!large.ready() || !x.reserved() || !out.reserved()) {
      GTEST_SKIP() << "this much memory cannot be reserved";
    }
    for (const DType type : kTypes) {
      const std::int64_t size = size_of(type), row = kColumns * size;
      const Matrix near = make_matrix(Content::normal, format(), count, kColumns, type, 0, random);
      Buffer expected(count * kRows * size);
      kernels().linear(last.weight, near.bytes.data(), type, count, kColumns, nullptr,
                       expected.data(), kRows, 0, kRows);
      for (std::int64_t i = 0; i < count; ++i) {
        std::memcpy(x.data() + i * far_row * size, near.bytes.data() + i * row,
                    static_cast<std::size_t>(row));
      }
      kernels().linear(large.weight, x.data(), type, count, far_row, nullptr, out.data(), far_row,
                       kBefore, kBefore + kRows);
      for (std::int64_t i = 0; i < count; ++i) {
        ASSERT_EQ(0, std::memcmp(expected.data() + i * kRows * size,
                                 out.data() + (i * far_row + kBefore) * size,
                                 static_cast<std::size_t>(kRows * size)))
            << "x row " << i << " of " << count << " type " << static_cast<int>(type);
      }
    }
  }
}

TEST_P(Offsets, EncodingTheLastRows) {
  const SortedTable sorted = sorted_of(format());
  const Layout at = format().layout(kBefore + kRows, kColumns);
  const std::int64_t scale = format().scale == ScaleType::f16 ? 2 : 4;
  const std::int64_t groups = at.groups_per_row;
  const Sparse codes(at.rows * at.row_code_bytes), scales(at.rows * groups * scale),
      extra(at.rows * groups);
  const std::int64_t stride = kColumns + 1;
  const Sparse x(at.rows * stride * 4);
  if (!codes.reserved() || !scales.reserved() || !extra.reserved() || !x.reserved()) {
    GTEST_SKIP() << "this much memory cannot be reserved";
  }
  for (const DType type : kTypes) {
    const Matrix near = make_matrix(Content::normal, format(), kRows, kColumns, type, 1, random);
    Encoded expected(format(), kRows, kColumns, 0);
    encode(kernels(), format(), sorted, near, expected, 0, kRows);
    std::memcpy(x.data() + kBefore * stride * size_of(type), near.bytes.data(),
                static_cast<std::size_t>(near.bytes.size()));
    kernels().quantize(format(), sorted, at, x.data(), type, stride,
                       {codes.data(), scales.data(), extra.data()}, kBefore, kBefore + kRows);
    const auto same = [](const Buffer& part, const Sparse& whole, std::int64_t offset) {
      return std::equal(part.data(), part.data() + part.size(), whole.data() + offset);
    };
    ASSERT_TRUE(same(expected.codes, codes, kBefore * at.row_code_bytes));
    ASSERT_TRUE(same(expected.scales, scales, kBefore * groups * scale));
    ASSERT_TRUE(same(expected.extra, extra, kBefore * groups));
  }
}

INSTANTIATE_TEST_SUITE_P(AllUnits, Offsets,
                         testing::Combine(testing::ValuesIn(available_kernels()),
                                          testing::ValuesIn(all_formats())),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)->name) + "_" +
                                  std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace vramkit::cpu
