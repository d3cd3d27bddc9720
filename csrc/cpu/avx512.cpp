// The AVX-512 unit (F, BW, DQ, VL, VBMI and F16C): sixteen floats at a time. Decoding four-bit
// codes takes one byte shuffle across bits (vpmultishiftqb) and one table permute.
#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__F16C__)
// GCC's headers make "any value" operands by reading a variable that nothing sets (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

struct Simd {
  static constexpr int lanes = 16;
  static constexpr const char* name = "avx512";
  using F = __m512;
  using I [[gnu::vector_size(64)]] = std::int32_t;
  using U [[gnu::vector_size(64)]] = std::uint32_t;
  using D = __m512d;
  struct Table16 {
    F all;
  };

  static F set1(float value) { return _mm512_set1_ps(value); }
  static F load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, F v) { _mm512_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I max(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
  static I min(I a, I b) { return (I)_mm512_min_epi32((__m512i)a, (__m512i)b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps((__m512i)v); }
  static I to_int_even(F v) { return (I)_mm512_cvtps_epi32(v); }
  static I to_int(F v) { return (I)_mm512_cvttps_epi32(v); }

  // The lower and the upper lanes' squares, added to `low` and `high`.
  static void add_squares(F v, D& low, D& high) {
    const D a = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const D b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  }
  // The 64-bit products of each lane and a number.
  static void multiply_wide(U a, std::uint32_t by, U& high, U& low) {
    const __m512i factor = _mm512_set1_epi64(by);
    const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    high = (U)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    low = (U)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  }
  // Four lanes by four within each 128 bits: v[k] gets what lane k of each had.
  static void transpose4(U (&v)[4]) {
    const __m512i a = _mm512_unpacklo_epi32((__m512i)v[0], (__m512i)v[1]);
    const __m512i b = _mm512_unpackhi_epi32((__m512i)v[0], (__m512i)v[1]);
    const __m512i c = _mm512_unpacklo_epi32((__m512i)v[2], (__m512i)v[3]);
    const __m512i d = _mm512_unpackhi_epi32((__m512i)v[2], (__m512i)v[3]);
    v[0] = (U)_mm512_unpacklo_epi64(a, c);
    v[1] = (U)_mm512_unpackhi_epi64(a, c);
    v[2] = (U)_mm512_unpacklo_epi64(b, d);
    v[3] = (U)_mm512_unpackhi_epi64(b, d);
  }

  // Lane i with lane i + 8, then with i + 4, …: the order that encode.hpp prescribes.
  static float sum(F v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  static float least(F v) { return _mm512_reduce_min_ps(v); }
  static float most(F v) { return _mm512_reduce_max_ps(v); }
  static std::int32_t most(I v) { return _mm512_reduce_max_epi32((__m512i)v); }

  // The first n lanes, zero in the others.
  static F first(F v, int n) {
    const auto keep = static_cast<__mmask16>(n <= 0 ? 0u : n >= lanes ? 0xffffu : (1u << n) - 1u);
    return _mm512_maskz_mov_ps(keep, v);
  }

  static F load_bf16(const void* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load_f16(const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static void store_halves(void* p, I v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)v));
  }
  static void store_f16(void* p, F v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_bytes(void* p, I v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
  }

  static Table16 table(const float* values) { return {_mm512_loadu_ps(values)}; }
  static Table16 scaled(Table16 t, float scale) { return {t.all * set1(scale)}; }
  static Table16 shifted(Table16 t, float by) { return {t.all - set1(by)}; }
  // By the low four bits of each index; the others are ignored.
  static F lookup(Table16 t, I index) { return _mm512_permutexvar_ps((__m512i)index, t.all); }
  static F gather(const float* values, I index) {
    return _mm512_i32gather_ps((__m512i)index, values, 4);
  }

  // Sixteen 4-bit codes from eight bytes, the high nibble first; bits above the low four are junk.
  static I nibbles(const std::uint8_t* p) {
    // Byte 0 of each dword takes the eight bits that begin at its code: 8j + 4 and 8j for byte j.
    const __m512i shifts =
        _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 36, 32, 44, 40, 52, 48, 60, 56);
    long long eight;
    std::memcpy(&eight, p, sizeof(eight));
    return (I)_mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(eight));
  }
  static I bytes(const std::uint8_t* p) { return (I)_mm512_cvtepu8_epi32(load_codes(p)); }
  static F int8(const std::uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_codes(p)));
  }
  // e5m2 is the upper byte of a float16.
  static F e5m2(const std::uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load_codes(p)), 8));
  }
  // e4m3 put into a float16's fields is the value times 2^-8, subnormals included. Only NaN, all
  // ones, has to be made one.
  static F e4m3(const std::uint8_t* p) {
    const __m256i wide = _mm256_cvtepi8_epi16(load_codes(p));
    const __m256i magnitude = _mm256_set1_epi16(0x7f);
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(wide, magnitude), magnitude);
    __m256i half = _mm256_slli_epi16(wide, 7);
    half = _mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0xbfff)));
    half = _mm256_or_si256(half, _mm256_maskz_set1_epi16(nan, 0x7fff));
    return _mm512_cvtph_ps(half) * set1(256.0f);
  }

 private:
  static __m128i load_codes(const std::uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
};

}  // namespace
}  // namespace vramkit::cpu

#include "cpu/int8_avx512.hpp"
#include "cpu/int8_packed.hpp"
// After what they are made of.
#include "cpu/int8_vector.hpp"
#include "cpu/vector_kernels.hpp"
#include "cpu/vector_multi.hpp"
#include "cpu/vector_recurrent.hpp"
// After the kernels that they build on.
#include "cpu/bf16_product.hpp"

namespace vramkit::cpu {
namespace {
constexpr Kernels kernels{Simd::name,
                          quantize,
                          dequantize_avx512,
                          linear_avx512,
                          int8_kernels,
                          feedback,
                          recur,
                          {square_sum, scale_values, cast_values, adamw},
                          spin_avx512};
}  // namespace
const Kernels* avx512_kernels() { return &kernels; }
}  // namespace vramkit::cpu

#else
#include "cpu/kernels.hpp"

namespace vramkit::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace vramkit::cpu
#endif
