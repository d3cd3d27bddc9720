// What the bfloat16 products of AVX-512 take a weight's codes for: decoders that turn 64 codes into
// two vectors of bfloat16 values, in registers.
//
// Rounding: integer codes are exact in bfloat16 and their scale is applied in float32; codebook
// values are rounded to bfloat16 once, either as the table's entry (few rows: the scale is applied
// in float32) or as entry times scale (more rows), as when a decoded weight is cast.
#pragma once
#include "cpu/vector_common.hpp"

namespace vramkit::cpu {
namespace {

// Before loops over registers: left rolled, they would keep their arrays in memory. For the same
// reason sums never pass through a lambda's captures.
#define VRAMKIT_UNROLL _Pragma("GCC unroll 32")

constexpr std::int64_t kChunk = 64;

// Which elements of a chunk come first: the even ones, or eight of each sixteen.
enum class Order { natural, even_odd, eights };

struct Pair {  // 64 elements
  __m512bh first, second;
};

// The compiler would load a vector anew for each of its uses: a cycle each.
[[gnu::always_inline]] inline __m512i in_register(__m512i v) {
  asm("" : "+v"(v));
  return v;
}

__m512i load_bytes64(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
__m256i load_bytes32(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// When a group's scale enters the product.
enum class Scaling { none, table, group, row };

// The bfloat16 of sixteen floats, twice, as a table whose fifth index bit does not matter.
__m512i doubled_table(F values) {
  const auto narrow = (__m256i)_mm512_cvtneps_pbh(values);
  return _mm512_broadcast_i64x4(narrow);
}

// Four-bit decoders give high nibbles, then low ones.

// A codebook whose scale goes into its table, group by group.
class ScaledCodebook4 {
 public:
  static constexpr Order order = Order::even_odd;
  static constexpr int bits = 4;
  static constexpr Scaling scaling = Scaling::table;
  explicit ScaledCodebook4(const Weight& weight) : values_(_mm512_loadu_ps(weight.table)) {}
  struct Row {
    __m512i table;
  };
  void group(Row& row, std::int64_t, const std::uint8_t* scales, std::int64_t g) const {
    row.table = doubled_table(values_ * _mm512_set1_ps(read<float>(scales, g)));
  }
  Pair decode(const Row& row, const std::uint8_t* p) const {
    const __m512i words = _mm512_cvtepu8_epi16(load_bytes32(p));
    return {(__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), row.table),
            (__m512bh)_mm512_permutexvar_epi16(words, row.table)};
  }

 private:
  F values_;
};

// The same with the scale left to the sums.
class Codebook4Values {
 public:
  static constexpr Order order = Order::even_odd;
  static constexpr int bits = 4;
  static constexpr Scaling scaling = Scaling::group;
  explicit Codebook4Values(const Weight& weight)
      : table_(doubled_table(_mm512_loadu_ps(weight.table))) {}
  struct Row {};
  void group(Row&, std::int64_t, const std::uint8_t*, std::int64_t) const {}
  Pair decode(const Row&, const std::uint8_t* p) const {
    const __m512i words = _mm512_cvtepu8_epi16(load_bytes32(p));
    return {(__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table_),
            (__m512bh)_mm512_permutexvar_epi16(words, table_)};
  }

 private:
  __m512i table_;
};

// code - zero as bfloat16 for each zero point and code: exact, as both have eight bits.
struct ShiftedCodes {
  alignas(64) std::uint16_t by_zero[256][16] = {};
  constexpr ShiftedCodes() {
    for (int zero = 0; zero < 256; ++zero) {
      for (int code = 0; code < 16; ++code) {
        const auto bits = __builtin_bit_cast(std::uint32_t, static_cast<float>(code - zero));
        by_zero[zero][code] = static_cast<std::uint16_t>(bits >> 16);
      }
    }
  }
};
// Made by the compiler: code that runs as the library loads must not need this unit's processor.
constexpr ShiftedCodes shifted_codes;

// Four-bit integers with a zero point for every group of 64 / groups elements or more.
template <int groups>
class Integer4Values {
 public:
  static constexpr Order order = Order::even_odd;
  static constexpr int bits = 4;
  static constexpr Scaling scaling = Scaling::group;
  explicit Integer4Values(const Weight& weight) : zeros_(weight.extra) {}
  struct Row {
    __m512i low, high;
  };
  // `index` is that of the first of the groups.
  void group(Row& row, std::int64_t index, const std::uint8_t*, std::int64_t) const {
    if constexpr (groups == 1) row.low = _mm512_broadcast_i64x4(codes(index));
    if constexpr (groups >= 2) row.low = joined(index);
    if constexpr (groups == 4) row.high = joined(index + 2);
  }
  static Pair decode(const Row& row, const std::uint8_t* p) {
    const __m512i words = _mm512_cvtepu8_epi16(load_bytes32(p));
    return {lookup(row, _mm512_srli_epi16(words, 4)), lookup(row, words)};
  }

 private:
  __m256i codes(std::int64_t index) const {
    return _mm256_load_si256(
        reinterpret_cast<const __m256i*>(shifted_codes.by_zero[zeros_[index]]));
  }
  __m512i joined(std::int64_t index) const {
    return _mm512_inserti64x4(_mm512_castsi256_si512(codes(index)), codes(index + 1), 1);
  }
  static __m512bh lookup(const Row& row, __m512i index) {
    if constexpr (groups == 1) return (__m512bh)_mm512_permutexvar_epi16(index, row.low);
    // The group of a lane stands in the bits above the code: (index & 15) | (lane's group << 4).
    const __m512i halves = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const __m512i quarters =
        _mm512_set_epi64(0x0030003000300030, 0x0030003000300030, 0x0020002000200020,
                         0x0020002000200020, 0x0010001000100010, 0x0010001000100010, 0, 0);
    const __m512i mask = _mm512_set1_epi16(15);
    constexpr int and_or = 0xea;  // (index & mask) | lane
    if constexpr (groups == 2) {
      const __m512i full = _mm512_ternarylogic_epi64(index, mask, halves, and_or);
      return (__m512bh)_mm512_permutexvar_epi16(full, row.low);
    } else {
      const __m512i full = _mm512_ternarylogic_epi64(index, mask, quarters, and_or);
      return (__m512bh)_mm512_permutex2var_epi16(row.low, full, row.high);
    }
  }
  const std::uint8_t* zeros_;
};

// The same with scales in the tables.
template <int groups>
class ScaledInteger4 {
 public:
  static constexpr Order order = Order::even_odd;
  static constexpr int bits = 4;
  static constexpr Scaling scaling = Scaling::table;
  explicit ScaledInteger4(const Weight& weight) : zeros_(weight.extra) {}
  using Row = typename Integer4Values<groups>::Row;
  void group(Row& row, std::int64_t index, const std::uint8_t* scales, std::int64_t g) const {
    if constexpr (groups == 1) row.low = doubled_table(values(index, scales, g));
    if constexpr (groups >= 2) row.low = joined(index, scales, g);
    if constexpr (groups == 4) row.high = joined(index + 2, scales, g + 2);
  }
  Pair decode(const Row& row, const std::uint8_t* p) const {
    return Integer4Values<groups>::decode(row, p);
  }

 private:
  F values(std::int64_t index, const std::uint8_t* scales, std::int64_t g) const {
    const F counting = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (counting - static_cast<float>(zeros_[index])) * read<float>(scales, g);
  }
  __m512i joined(std::int64_t index, const std::uint8_t* scales, std::int64_t g) const {
    return (__m512i)_mm512_cvtne2ps_pbh(values(index + 1, scales, g + 1), values(index, scales, g));
  }
  const std::uint8_t* zeros_;
};

// Eight-bit decoders look up the two bytes of a value apart, 64 codes at a time, and bring them
// together eight by eight.
template <class Value, Scaling how>
class Bytes {
 public:
  static constexpr Order order = Order::eights;
  static constexpr int bits = 8;
  static constexpr Scaling scaling = how;
  explicit Bytes(const Weight& weight) : value_(weight) {}
  struct Row {};
  void group(Row&, std::int64_t, const std::uint8_t*, std::int64_t) const {}
  Pair decode(const Row&, const std::uint8_t* p) const {
    const auto [low, high] = value_(in_register(_mm512_loadu_si512(p)));
    return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
  }

 private:
  Value value_;
};

struct BytePair {
  __m512i low, high;
};

// The bfloat16 of 128 floats, as a table of low bytes and one of high bytes.
class ByteTable {
 public:
  explicit ByteTable(const float* values) {
    alignas(64) std::uint8_t low[128], high[128];
    for (int i = 0; i < 128; i += 16) {
      const __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + i));
      _mm_store_si128(reinterpret_cast<__m128i*>(low + i), _mm256_cvtepi16_epi8(halves));
      _mm_store_si128(reinterpret_cast<__m128i*>(high + i),
                      _mm256_cvtepi16_epi8(_mm256_srli_epi16(halves, 8)));
    }
    for (int i = 0; i < 2; ++i) {
      low_[i] = _mm512_load_si512(low + 64 * i);
      high_[i] = _mm512_load_si512(high + 64 * i);
    }
  }
  // By the low seven bits of each byte.
  BytePair operator()(__m512i index) const {
    return {_mm512_permutex2var_epi8(low_[0], index, low_[1]),
            _mm512_permutex2var_epi8(high_[0], index, high_[1])};
  }

 private:
  __m512i low_[2], high_[2];
};

constexpr int kOrAnd = 0xf8;   // a | (b & c)
constexpr int kXorAnd = 0x78;  // a ^ (b & c)

struct Counting128 {
  float values[128];
  constexpr Counting128() : values() {
    for (int i = 0; i < 128; ++i) values[i] = static_cast<float>(i);
  }
};
constexpr Counting128 counting128;

class Integer8Values {
 public:
  explicit Integer8Values(const Weight&) : magnitude_(counting128.values) {}
  BytePair operator()(__m512i codes) const {
    const __m512i magnitude = _mm512_abs_epi8(codes);
    BytePair value = magnitude_(magnitude);
    value.high = _mm512_ternarylogic_epi64(value.high, codes, _mm512_set1_epi8(-128), kOrAnd);
    // -128 alone has no magnitude in the table: 0xc300.
    const __mmask64 least = _mm512_movepi8_mask(magnitude);
    value.high = _mm512_mask_mov_epi8(value.high, least, _mm512_set1_epi8(-61));  // 0xc3
    return value;
  }

 private:
  ByteTable magnitude_;
};

// A table of 256 floats whose upper half is the lower one negated, as FP8's.
class SignedTable {
 public:
  explicit SignedTable(const Weight& weight) : magnitude_(weight.table) {}
  BytePair operator()(__m512i codes) const {
    BytePair value = magnitude_(codes);
    // The codes below 128 may be the negative ones.
    value.high = _mm512_ternarylogic_epi64(value.high, codes, _mm512_set1_epi8(-128), kXorAnd);
    return value;
  }
  static bool fits(const float* table) {
    for (int i = 0; i < 128; ++i) {
      std::uint32_t low, high;
      std::memcpy(&low, table + i, sizeof(low));
      std::memcpy(&high, table + 128 + i, sizeof(high));
      if ((low ^ high) != 0x80000000u) return false;
    }
    return true;
  }

 private:
  ByteTable magnitude_;
};

// Any table of 256 floats.
class FullTable {
 public:
  explicit FullTable(const Weight& weight) : lower_(weight.table), upper_(weight.table + 128) {}
  BytePair operator()(__m512i codes) const {
    const BytePair lower = lower_(codes), upper = upper_(codes);
    const __mmask64 is_upper = _mm512_movepi8_mask(codes);
    return {_mm512_mask_blend_epi8(is_upper, lower.low, upper.low),
            _mm512_mask_blend_epi8(is_upper, lower.high, upper.high)};
  }

 private:
  ByteTable lower_, upper_;
};

template <DType type>
class Halves {
 public:
  static constexpr Order order = Order::natural;
  static constexpr int bits = 16;
  static constexpr Scaling scaling = Scaling::none;
  explicit Halves(const Weight&) {}
  struct Row {};
  void group(Row&, std::int64_t, const std::uint8_t*, std::int64_t) const {}
  Pair decode(const Row&, const std::uint8_t* p) const { return {half(p), half(p + 64)}; }

 private:
  static __m512bh half(const std::uint8_t* p) {
    if constexpr (type == DType::bf16) return (__m512bh)load_bytes64(p);
    return _mm512_cvtne2ps_pbh(Simd::load_f16(p + 32), Simd::load_f16(p));
  }
};

}  // namespace
}  // namespace vramkit::cpu
