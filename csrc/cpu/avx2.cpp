// The AVX2 unit (with FMA and F16C): eight floats at a time. A table of sixteen floats lies in two
// registers, each permuted by the code's low three bits; bit 3 chooses between them.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

struct Simd {
  static constexpr int lanes = 8;
  static constexpr const char* name = "avx2";
  using F = __m256;
  using I [[gnu::vector_size(32)]] = std::int32_t;
  using U [[gnu::vector_size(32)]] = std::uint32_t;
  using D = __m256d;
  struct Table16 {
    F low, high;
  };

  static F set1(float value) { return _mm256_set1_ps(value); }
  static F load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static void store(void* p, F v) { _mm256_storeu_ps(static_cast<float*>(p), v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static I max(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
  static I min(I a, I b) { return (I)_mm256_min_epi32((__m256i)a, (__m256i)b); }
  static F to_float(I v) { return _mm256_cvtepi32_ps((__m256i)v); }
  static I to_int_even(F v) { return (I)_mm256_cvtps_epi32(v); }
  static I to_int(F v) { return (I)_mm256_cvttps_epi32(v); }

  // The lower and the upper lanes' squares, added to `low` and `high`.
  static void add_squares(F v, D& low, D& high) {
    const D a = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const D b = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    low = _mm256_fmadd_pd(a, a, low);
    high = _mm256_fmadd_pd(b, b, high);
  }
  // The 64-bit products of each lane and a number.
  static void multiply_wide(U a, std::uint32_t by, U& high, U& low) {
    const __m256i factor = _mm256_set1_epi64x(by);
    const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    high = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  // Four lanes by four within each 128 bits: v[k] gets what lane k of each had.
  static void transpose4(U (&v)[4]) {
    const __m256i a = _mm256_unpacklo_epi32((__m256i)v[0], (__m256i)v[1]);
    const __m256i b = _mm256_unpackhi_epi32((__m256i)v[0], (__m256i)v[1]);
    const __m256i c = _mm256_unpacklo_epi32((__m256i)v[2], (__m256i)v[3]);
    const __m256i d = _mm256_unpackhi_epi32((__m256i)v[2], (__m256i)v[3]);
    v[0] = (U)_mm256_unpacklo_epi64(a, c);
    v[1] = (U)_mm256_unpackhi_epi64(a, c);
    v[2] = (U)_mm256_unpacklo_epi64(b, d);
    v[3] = (U)_mm256_unpackhi_epi64(b, d);
  }

  // Lane i with lane i + 4, then with i + 2, …: the order that encode.hpp prescribes.
  static float sum(F v) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  static float least(F v) {
    __m128 q = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_min_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_min_ss(q, _mm_movehdup_ps(q)));
  }
  static float most(F v) {
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
  static std::int32_t most(I v) {
    __m128i q =
        _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
  }

  // The first n lanes, zero in the others.
  static F first(F v, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    return _mm256_and_ps(v, _mm256_castsi256_ps(keep));
  }

  static F load_bf16(const void* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_f16(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static void store_halves(void* p, I v) {  // values below 2^16
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v),
                                           _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), words);
  }
  static void store_f16(void* p, F v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bytes(void* p, I v) {  // the low byte of each
    const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xff));
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }

  static Table16 table(const float* values) {
    return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
  }
  static Table16 scaled(Table16 t, float scale) {
    return {t.low * set1(scale), t.high * set1(scale)};
  }
  static Table16 shifted(Table16 t, float by) { return {t.low - set1(by), t.high - set1(by)}; }
  // By the low four bits of each index; the others are ignored.
  static F lookup(Table16 t, I index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, (__m256i)index),
                            _mm256_permutevar8x32_ps(t.high, (__m256i)index),
                            _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)index, 28)));
  }
  static F gather(const float* values, I index) {
    return _mm256_i32gather_ps(values, (__m256i)index, 4);
  }

  // Eight 4-bit codes from four bytes, the high nibble first; bits above the low four are junk.
  static I nibbles(const std::uint8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, sizeof(four));
    return (I)_mm256_srlv_epi32(_mm256_set1_epi32(four),
                                _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
  }
  static I bytes(const std::uint8_t* p) { return (I)_mm256_cvtepu8_epi32(load_codes(p)); }
  static F int8(const std::uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_codes(p)));
  }
  // e5m2 is the upper byte of a float16.
  static F e5m2(const std::uint8_t* p) {
    return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), load_codes(p)));
  }
  // e4m3 put into a float16's fields is the value times 2^-8, subnormals included. Only NaN, all
  // ones, has to be made one.
  static F e4m3(const std::uint8_t* p) {
    const __m128i wide = _mm_cvtepi8_epi16(load_codes(p));
    const __m128i magnitude = _mm_set1_epi16(0x7f);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(wide, magnitude), magnitude);
    __m128i half = _mm_slli_epi16(wide, 7);
    half = _mm_and_si128(half, _mm_set1_epi16(static_cast<short>(0xbfff)));
    half = _mm_or_si128(half, _mm_srli_epi16(nan, 1));
    return _mm256_cvtph_ps(half) * set1(256.0f);
  }

 private:
  static __m128i load_codes(const std::uint8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }
};

}  // namespace
}  // namespace vramkit::cpu

#include "cpu/int8_avx2.hpp"
#include "cpu/int8_vector.hpp"
#include "cpu/vector_kernels.hpp"
#include "cpu/vector_multi.hpp"
#include "cpu/vector_recurrent.hpp"
// After the kernels that it falls back on.
#include "cpu/nibbles_avx2.hpp"

namespace vramkit::cpu {
namespace {
constexpr Kernels kernels{
    Simd::name,   quantize, dequantize, linear_avx2,
    int8_kernels, feedback, recur,      {square_sum, scale_values, cast_values, adamw},
    spin};
}  // namespace
const Kernels* avx2_kernels() { return &kernels; }
}  // namespace vramkit::cpu

#else
#include "cpu/kernels.hpp"

namespace vramkit::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace vramkit::cpu
#endif
