// Storage formats: exact byte counts, layouts and refusals; and the conversions of half.hpp, tested
// on every code and on both sides of every rounding boundary against values computed in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "core/format.hpp"
#include "core/half.hpp"

namespace vramkit {
namespace {

using Shape = std::vector<std::int64_t>;
constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();

void expect_bytes(const std::string& name, const Shape& shape, std::int64_t codes,
                  std::int64_t scales, std::int64_t extra) {
  const PartBytes size = builtin_format(name).bytes(shape);
  EXPECT_EQ(size.codes, codes) << name;
  EXPECT_EQ(size.scales, scales) << name;
  EXPECT_EQ(size.extra, extra) << name;
  EXPECT_EQ(size.total(), codes + scales + extra) << name;
}

TEST(FormatBytes, KnownShapes) {
  expect_bytes("fp16", {3, 5}, 30, 0, 0);
  expect_bytes("bf16", {7}, 14, 0, 0);
  expect_bytes("fp8", {3, 5}, 15, 12, 0);
  expect_bytes("fp8_e5m2", {2, 3, 4}, 24, 8, 0);
  expect_bytes("int8", {4096, 4096}, 4096 * 4096, 4096 * 4, 0);
  // 4 + 24 * ceil(K / 128) / K bits per weight, in whole bytes per row.
  expect_bytes("int4", {10, 128}, 640, 20, 10);
  expect_bytes("int4", {10, 129}, 650, 40, 20);
  expect_bytes("int4_g64", {2, 65}, 66, 8, 4);
  expect_bytes("int4_g32", {1, 31}, 16, 2, 1);
  // Flat blocks run across rows: 3 * 33 elements are 50 bytes and two blocks.
  expect_bytes("nf4", {3, 33}, 50, 8, 0);
  expect_bytes("fp4", {64, 64}, 2048, 256, 0);
  // 257 blocks have two blocks of scales and the offset.
  expect_bytes("nf4_dq", {257, 64}, 257 * 32, 257, 12);
  expect_bytes("nf4_dq", {256, 64}, 256 * 32, 256, 8);
}

TEST(FormatBytes, EmptyAndScalarShapes) {
  for (const auto& [name, format] : builtin_formats()) {
    EXPECT_EQ(format.bytes(Shape{0, 8}).codes, 0) << name;
    EXPECT_EQ(format.bytes(Shape{8, 0}).codes, 0) << name;
    EXPECT_EQ(format.bytes(Shape{0}).codes, 0) << name;
    const std::int64_t one = format.bits == 16 ? 2 : 1;  // a scalar is one element
    EXPECT_EQ(format.bytes(Shape{}).codes, one) << name;
  }
  expect_bytes("int8", {5, 0}, 0, 20, 0);  // a row has its scale even without elements
  expect_bytes("nf4", {5, 0}, 0, 0, 0);
}

TEST(FormatBytes, NegativeDimensionsAreRefused) {
  for (const auto& [name, format] : builtin_formats()) {
    EXPECT_THROW(format.bytes(Shape{-1}), InvalidArgument) << name;
    EXPECT_THROW(format.bytes(Shape{4, -4}), InvalidArgument) << name;
    EXPECT_THROW(format.bytes(Shape{-4, 4}), InvalidArgument) << name;
    EXPECT_THROW(format.bytes(Shape{0, 3, -1}), InvalidArgument) << name;
  }
}

TEST(FormatBytes, SizesPast63BitsAreRefused) {
  for (const auto& [name, format] : builtin_formats()) {
    EXPECT_THROW(format.bytes(Shape{kLargest, 4}), InvalidArgument) << name;
    EXPECT_THROW(format.bytes(Shape{2, kLargest}), InvalidArgument) << name;
    EXPECT_THROW(format.bytes(Shape{1, kLargest, kLargest}), InvalidArgument) << name;
  }
  // The elements can be counted, their bytes cannot.
  EXPECT_THROW(builtin_format("fp16").bytes(Shape{kLargest / 4, 4}), InvalidArgument);
  EXPECT_THROW(builtin_format("int8").bytes(Shape{kLargest / 2, 1}), InvalidArgument);
}

TEST(FormatBytes, LayoutAgreesWithBytes) {
  for (const auto& [name, format] : builtin_formats()) {
    for (const std::int64_t cols : {1, 2, 31, 64, 65, 128, 200, 1000}) {
      if (!format.row_separable(cols)) {
        EXPECT_EQ(format.grain, Grain::flat) << name;
        EXPECT_THROW(format.layout(3, cols), InvalidArgument) << name;
        continue;
      }
      const Layout at = format.layout(3, cols);
      EXPECT_EQ(at.rows * at.row_code_bytes, format.bytes(Shape{3, cols}).codes) << name;
      if (format.zero_point) {
        EXPECT_EQ(3 * at.groups_per_row, format.bytes(Shape{3, cols}).extra) << name;
      }
      EXPECT_LE(at.groups_per_row * at.group, cols + std::max<std::int64_t>(at.group, 1)) << name;
    }
  }
}

TEST(Format, ContradictoryFieldsAreRefused) {
  const auto refused = [](const std::string& from, auto change) {
    Format format = builtin_format(from);
    EXPECT_NO_THROW(format.validate());
    change(format);
    EXPECT_THROW(format.validate(), InvalidArgument) << from;
  };
  refused("nf4", [](Format& f) { f.table.pop_back(); });
  refused("nf4", [](Format& f) { f.table[3] = std::nanf(""); });
  refused("nf4", [](Format& f) { f.table[3] = 1.5f; });
  refused("nf4", [](Format& f) { f.block = 0; });
  refused("nf4", [](Format& f) { f.block = 33; });
  refused("nf4", [](Format& f) { f.bits = 8; });
  refused("nf4", [](Format& f) { f.scale = ScaleType::none; });
  refused("int4", [](Format& f) { f.zero_point = false; });
  refused("int4", [](Format& f) { f.scale = ScaleType::nested; });
  refused("int8", [](Format& f) { f.encoder = Encoder::midpoint; });
  refused("int8", [](Format& f) { f.zero_point = true; });
  refused("int4", [](Format& f) { f.encoder = Encoder::symmetric; });
  refused("fp16", [](Format& f) { f.bits = 8; });
  refused("fp8", [](Format& f) { f.block = 64; });
  EXPECT_THROW(builtin_format("int3"), InvalidArgument);
}

// A binary float with E exponent and M mantissa bits.
template <int E, int M, bool finite_only>
struct Kind {
  static constexpr int codes = 1 << (E + M);  // without the sign
  static constexpr int sign = codes;
  static constexpr int infinity = ((1 << E) - 1) << M;
  // First code that is not a number.
  static constexpr int end = finite_only ? codes - 1 : infinity;

  static double value(int code) {
    const int bias = (1 << (E - 1)) - 1;
    const int exponent = code >> M;
    const double mantissa = code & ((1 << M) - 1);
    const double fraction = mantissa / (1 << M);
    if (exponent == 0) return fraction * std::pow(2.0, 1 - bias);
    return (1.0 + fraction) * std::pow(2.0, exponent - bias);
  }
};

// Every number converts to its code and back, and so do the floats around each midpoint between two
// neighbours: below it to the lower code, above to the upper, at it to the even one. `to` and
// `from` convert codes with sign; `over` is what numbers past the last midpoint become.
template <class K, class From, class To>
void check_conversions(From from, To to, int over) {
  for (const bool negative : {false, true}) {
    const int sign = negative ? K::sign : 0;
    const float flip = negative ? -1.0f : 1.0f;
    for (int code = 0; code < K::end; ++code) {
      const auto exact = static_cast<float>(K::value(code));
      ASSERT_EQ(static_cast<double>(exact), K::value(code));
      ASSERT_EQ(from(sign | code), flip * exact) << code;
      ASSERT_EQ(std::signbit(from(sign | code)), negative) << code;
      ASSERT_EQ(to(flip * exact), sign | code) << exact;
      const double next =
          code + 1 < K::end ? K::value(code + 1) : 2 * K::value(code) - K::value(code - 1);
      const auto middle = static_cast<float>((K::value(code) + next) / 2);
      if (std::isinf(middle)) continue;
      const int upper = code + 1 < K::end ? code + 1 : over;
      ASSERT_EQ(to(flip * middle), sign | (code % 2 == 0 ? code : upper)) << middle;
      ASSERT_EQ(to(flip * std::nextafter(middle, 0.0f)), sign | code) << middle;
      ASSERT_EQ(to(flip * std::nextafter(middle, std::numeric_limits<float>::infinity())),
                sign | upper)
          << middle;
    }
    EXPECT_EQ(to(flip * std::numeric_limits<float>::max()), sign | over);
    EXPECT_EQ(to(flip * std::numeric_limits<float>::infinity()), sign | over);
  }
}

using Fp16 = Kind<5, 10, false>;
using Bf16 = Kind<8, 7, false>;
using E4m3 = Kind<4, 3, true>;
using E5m2 = Kind<5, 2, false>;

std::uint16_t u16(int code) { return static_cast<std::uint16_t>(code); }
std::uint8_t u8(int code) { return static_cast<std::uint8_t>(code); }

TEST(Half, Fp16) {
  check_conversions<Fp16>([](int c) { return fp16_to_float(u16(c)); },
                          [](float f) { return int{float_to_fp16(f)}; }, Fp16::infinity);
}

TEST(Half, Bf16) {
  check_conversions<Bf16>([](int c) { return bf16_to_float(u16(c)); },
                          [](float f) { return int{float_to_bf16(f)}; }, Bf16::infinity);
}

TEST(Half, E4m3Saturates) {
  check_conversions<E4m3>([](int c) { return e4m3_to_float(u8(c)); },
                          [](float f) { return int{float_to_e4m3(f)}; }, 0x7e);
  EXPECT_EQ(e4m3_to_float(0x7e), 448.0f);
}

TEST(Half, E4m3OverflowsToNanWhenNotSaturating) {
  check_conversions<E4m3>([](int c) { return e4m3_to_float(u8(c)); },
                          [](float f) { return int{float_to_e4m3(f, false)}; }, 0x7f);
}

TEST(Half, E5m2Saturates) {
  check_conversions<E5m2>([](int c) { return e5m2_to_float(u8(c)); },
                          [](float f) { return int{float_to_e5m2(f)}; }, 0x7b);
  EXPECT_EQ(e5m2_to_float(0x7b), 57344.0f);
}

TEST(Half, E5m2OverflowsToInfinityWhenNotSaturating) {
  check_conversions<E5m2>([](int c) { return e5m2_to_float(u8(c)); },
                          [](float f) { return int{float_to_e5m2(f, false)}; }, 0x7c);
}

TEST(Half, InfinitiesAndNanKeepTheirKindAndSign) {
  for (int code = 0; code < 1 << 16; ++code) {
    const bool negative = code >> 15;
    const auto check = [&](float value, int infinity, std::uint16_t back) {
      const int magnitude = code & 0x7fff;
      if (magnitude < infinity) return;  // a number
      EXPECT_EQ(std::signbit(value), negative) << code;
      if (magnitude == infinity) {
        EXPECT_TRUE(std::isinf(value)) << code;
        EXPECT_EQ(back, code);
      } else {
        EXPECT_TRUE(std::isnan(value)) << code;
        // Quiet, and otherwise the same.
        const int quiet = infinity == Fp16::infinity ? 0x200 : 0x40;
        EXPECT_EQ(back, code | quiet);
      }
    };
    const float half = fp16_to_float(u16(code)), brain = bf16_to_float(u16(code));
    check(half, Fp16::infinity, float_to_fp16(half));
    check(brain, Bf16::infinity, float_to_bf16(brain));
  }
  for (const int sign : {0, 0x80}) {
    EXPECT_TRUE(std::isnan(e4m3_to_float(u8(sign | 0x7f))));
    EXPECT_EQ(float_to_e4m3(e4m3_to_float(u8(sign | 0x7f))), sign | 0x7f);
    EXPECT_TRUE(std::isinf(e5m2_to_float(u8(sign | 0x7c))));
    EXPECT_EQ(float_to_e5m2(e5m2_to_float(u8(sign | 0x7c)), false), sign | 0x7c);
    for (const int code : {0x7d, 0x7e, 0x7f}) {
      EXPECT_TRUE(std::isnan(e5m2_to_float(u8(sign | code))));
      EXPECT_TRUE(std::isnan(e5m2_to_float(float_to_e5m2(e5m2_to_float(u8(sign | code))))));
    }
  }
}

TEST(Tables, DynamicMapIsTheSignedMapOf256Values) {
  const auto& map = dynamic_map();
  for (std::size_t i = 0; i + 1 < map.size(); ++i) EXPECT_LT(map[i], map[i + 1]);
  EXPECT_EQ(map.back(), 1.0f);
  std::map<float, int> magnitudes;
  for (const float value : map) ++magnitudes[std::fabs(value)];
  int alone = 0;  // zero and one have no negative
  for (const auto& [magnitude, count] : magnitudes) alone += count == 1;
  EXPECT_EQ(alone, 2);
  EXPECT_EQ(magnitudes.size(), 129u);
}

}  // namespace
}  // namespace vramkit
