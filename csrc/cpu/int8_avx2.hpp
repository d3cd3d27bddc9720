// Dot products of int8 without VNNI: both sides widened to 16 bits, where vpmaddwd is exact.
// (vpmaddubsw would saturate: 2 * 255 * 127 is more than 16 bits hold.)
#pragma once

namespace vramkit::cpu {
namespace {

struct Dot {
  static constexpr int rows = 2;
  static constexpr std::int64_t step = 16;
  static constexpr std::int32_t bias = 0;
  using V = __m256i;
  using X = __m256i;
  using W = __m256i;

  static X load_x(const std::int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static W load_w(const std::int8_t* p) { return load_x(p); }
  static X load_x_part(const std::int8_t* p, std::int64_t n) {
    alignas(16) std::int8_t staged[16] = {};
    std::memcpy(staged, p, static_cast<std::size_t>(n));
    return load_x(staged);
  }
  static W load_w_part(const std::int8_t* p, std::int64_t n) { return load_x_part(p, n); }
  static V dot(V sum, W w, X x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }

  static V plus(V a, V b) { return _mm256_add_epi32(a, b); }

  template <int M>
  static void reduce(const V (&acc)[M][4], bool add, std::int32_t* sums) {
    for (int m = 0; m < M; ++m) {
      const V all = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[m][0], acc[m][1]),
                                      _mm256_hadd_epi32(acc[m][2], acc[m][3]));
      __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
      auto target = reinterpret_cast<__m128i*>(sums + m * 4);
      if (add) four = _mm_add_epi32(four, _mm_loadu_si128(target));
      _mm_storeu_si128(target, four);
    }
  }

  // Eight neighbouring sums: four, from each of two tiles `stride` apart.
  static Simd::I gather(const std::int32_t* p, std::int64_t stride) {
    return (Simd::I)_mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + stride)),
                                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

struct Packing {
  static constexpr bool exists = false;  // the weight is multiplied where it lies
};

}  // namespace
}  // namespace vramkit::cpu
