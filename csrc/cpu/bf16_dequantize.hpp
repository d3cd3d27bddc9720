// Decoding to bfloat16 by tables of sixteen-bit values, 32 elements at a time, on AVX-512: the same
// bits as `dequantize`, for the formats and shapes where a table can be made per group or row.
#pragma once
#include <cmath>

#include "cpu/bf16_decoders.hpp"

namespace vramkit::cpu {
namespace {

// Sixteen values as bfloat16, exactly rounded, twice: the fifth bit of an index does not matter.
__m512i exact_table(F values) {
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16((__m512i)bf16_bits(values)));
}

// The 32 four-bit codes of sixteen bytes in the low bits of words, in order.
__m512i nibble_words(const std::uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  // Each quarter of four words takes its two bytes: codes begin at bits 4, 0, 12 and 8.
  const __m512i shifts = _mm512_set1_epi64(0x0008000c00000004);
  return _mm512_multishift_epi64_epi8(shifts, _mm512_cvtepu16_epi64(bytes));
}

// Row r of four-bit codes in groups of whole vectors.
void decode_nibbles(const Weight& weight, const float* scales, std::int64_t r, std::uint16_t* out) {
  const Layout& at = weight.at;
  const std::uint8_t* codes = weight.codes + r * at.row_code_bytes;
  const F counting = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const bool codebook = weight.format->family == Family::codebook;
  const F values = codebook ? _mm512_loadu_ps(weight.table) : counting;
  for (std::int64_t g = 0, k = 0; k < at.cols; ++g) {
    const float zero =
        codebook ? 0.0f : static_cast<float>(weight.extra[r * at.groups_per_row + g]);
    const __m512i table = exact_table((values - zero) * _mm512_set1_ps(scales[g]));
    for (const std::int64_t last = smaller(k + at.group, at.cols); k < last; k += 32) {
      const __m512i words = _mm512_permutexvar_epi16(nibble_words(codes + k / 2), table);
      _mm512_storeu_si512(out + k, words);
    }
  }
}

// The values of 32 codes by a table of 128 bfloat16 magnitudes, codes from 128 on being negative.
__m512i lookup_signed(const __m512i* part, __m256i codes) {
  const __m512i words = _mm512_cvtepu8_epi16(codes);
  const __mmask32 upper = _mm512_test_epi16_mask(words, _mm512_set1_epi16(64));
  const __m512i magnitude =
      _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(part[0], words, part[1]),
                              _mm512_permutex2var_epi16(part[2], words, part[3]));
  return _mm512_ternarylogic_epi64(magnitude, _mm512_slli_epi16(words, 8),
                                   _mm512_set1_epi16(INT16_MIN), kXorAnd);
}

// Row r of eight-bit codes, by a function from 32 codes to their bfloat16 values.
template <class Decode>
[[gnu::always_inline]] inline void decode_row(const Weight& weight, std::int64_t r,
                                              std::uint16_t* out, const Decode& decode) {
  const std::uint8_t* codes = weight.codes + r * weight.at.row_code_bytes;
  std::int64_t k = 0;
  for (; k + 32 <= weight.at.cols; k += 32) {
    _mm512_storeu_si512(out + k, decode(load_bytes32(codes + k)));
  }
  if (k == weight.at.cols) return;
  const __mmask32 keep = (1u << (weight.at.cols - k)) - 1u;
  _mm512_mask_storeu_epi16(out + k, keep, decode(_mm256_maskz_loadu_epi8(keep, codes + k)));
}

// Row r of eight-bit codes of a signed codebook with one scale.
void decode_signed(const Weight& weight, float scale, std::int64_t r, std::uint16_t* out) {
  __m512i part[4];
  for (int i = 0; i < 4; ++i) {
    const I low = bf16_bits(_mm512_loadu_ps(weight.table + 32 * i) * scale);
    const I high = bf16_bits(_mm512_loadu_ps(weight.table + 32 * i + 16) * scale);
    part[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)low)),
                                 _mm512_cvtepi32_epi16((__m512i)high), 1);
  }
  decode_row(
      weight, r, out, [&](__m256i bytes) __attribute__((always_inline)) {
        return lookup_signed(part, bytes);
      });
}

// Whether products of eight-bit integers and this scale are zero, normal or infinite: the
// processor's own rounding to bfloat16 takes denormal numbers for zero.
bool rounds_natively(float scale) { return std::isnormal(scale); }

// Row r of eight-bit integers with one scale.
void decode_integers(const Weight& weight, float scale, std::int64_t r, std::uint16_t* out) {
  const F by = _mm512_set1_ps(scale);
  auto half = [&](__m128i bytes) __attribute__((always_inline)) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), by);
  };
  decode_row(
      weight, r, out, [&](__m256i bytes) __attribute__((always_inline)) {
        return (__m512i)_mm512_cvtne2ps_pbh(half(_mm256_extracti128_si256(bytes, 1)),
                                            half(_mm256_castsi256_si128(bytes)));
      });
}

// Kernels::dequantize of the AVX-512 unit.
void dequantize_avx512(const Weight& weight, std::int64_t begin, std::int64_t end, void* out,
                       DType type, std::int64_t stride) {
  const Format& format = *weight.format;
  const Layout& at = weight.at;
  const bool nibbles =
      format.bits == 4 && at.cols % 32 == 0 && (at.groups_per_row == 1 || at.group % 32 == 0);
  const bool is_signed = format.bits == 8 && format.family == Family::codebook &&
                         at.groups_per_row == 1 && SignedTable::fits(weight.table);
  const bool integers =
      format.bits == 8 && format.family == Family::affine && at.groups_per_row == 1;
  if (type != DType::bf16 || !(nibbles || is_signed || integers)) {
    return dequantize(weight, begin, end, out, type, stride);
  }
  const Scales scales(weight);
  auto* target = static_cast<std::uint16_t*>(out);
  for (std::int64_t r = begin; r < end; ++r, target += stride) {
    const float* scale = scales.row(r);
    if (integers && !rounds_natively(scale[0])) {
      dequantize(weight, r, r + 1, target, type, stride);
    } else if (integers) {
      decode_integers(weight, scale[0], r, target);
    } else if (nibbles) {
      decode_nibbles(weight, scale, r, target);
    } else {
      decode_signed(weight, scale[0], r, target);
    }
  }
}

}  // namespace
}  // namespace vramkit::cpu
