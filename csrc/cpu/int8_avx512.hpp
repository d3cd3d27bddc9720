// Dot products of int8 with VNNI: vpdpbusd multiplies unsigned by signed bytes, so the weight's
// sign bit is flipped (w + 128) and 128 times the sum of x is taken off in the end. Its sums wrap,
// so nothing is lost on the way.
#pragma once

namespace vramkit::cpu {
namespace {

struct Dot {
  static constexpr int rows = 4;
  static constexpr std::int64_t step = 64;
  static constexpr std::int32_t bias = 128;
  using V = __m512i;
  using X = __m512i;
  using W = __m512i;
  using I = Simd::I;

  static X load_x(const std::int8_t* p) { return _mm512_loadu_si512(p); }
  static W load_w(const std::int8_t* p) { return flip(_mm512_loadu_si512(p)); }
  static X load_x_part(const std::int8_t* p, std::int64_t n) {
    return _mm512_maskz_loadu_epi8((1ull << n) - 1, p);
  }
  static W load_w_part(const std::int8_t* p, std::int64_t n) { return flip(load_x_part(p, n)); }
  // Not the intrinsic: GCC 12 copies every sum to another register around each of those.
  static V dot(V sum, W w, X x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }

  static V plus(V a, V b) { return _mm512_add_epi32(a, b); }

  // sums[m][n] (+)= the lanes of acc[m][n]; four sums to a row.
  template <int M>
  static void reduce(const V (&acc)[M][4], bool add, std::int32_t* sums) {
    V row[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) row[m] = quads(acc[m]);
    if constexpr (M == 4) {
      V all = lanes(row);
      if (add) all = _mm512_add_epi32(all, _mm512_loadu_si512(sums));
      _mm512_storeu_si512(sums, all);
    } else {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256i half =
            _mm256_add_epi32(_mm512_castsi512_si256(row[m]), _mm512_extracti64x4_epi64(row[m], 1));
        __m128i four =
            _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        auto target = reinterpret_cast<__m128i*>(sums + m * 4);
        if (add) four = _mm_add_epi32(four, _mm_loadu_si128(target));
        _mm_storeu_si128(target, four);
      }
    }
  }

  // Sixteen neighbouring sums: four, from each of four tiles `stride` apart.
  static I gather(const std::int32_t* p, std::int64_t stride) {
    auto four = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * stride));
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(four(0)), four(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(four(2)), four(3), 1);
    return (I)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

 private:
  static V flip(V w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
  // a's lanes outside `mask` and b's within it, each with its partner under `swap` added. Blends
  // and one shuffle: two shuffles (unpack low, high) would compete with the dot products for a
  // port.
  template <class Swap>
  static V merge(V a, V b, __mmask16 mask, const Swap& swap) {
    return _mm512_add_epi32(_mm512_mask_mov_epi32(a, mask, b),
                            swap(_mm512_mask_mov_epi32(b, mask, a)));
  }
  // Four vectors to one whose every 128-bit lane holds a partial sum of each.
  static V quads(const V (&a)[4]) {
    const auto one = [](V v) { return _mm512_shuffle_epi32(v, _MM_PERM_CDAB); };
    const auto two = [](V v) { return _mm512_shuffle_epi32(v, _MM_PERM_BADC); };
    return merge(merge(a[0], a[1], 0xaaaa, one), merge(a[2], a[3], 0xaaaa, one), 0xcccc, two);
  }
  // The sums of four such vectors, lane by lane.
  static V lanes(const V (&row)[4]) {
    const auto one = [](V v) { return _mm512_shuffle_i64x2(v, v, 0xb1); };
    const auto two = [](V v) { return _mm512_shuffle_i64x2(v, v, 0x4e); };
    return merge(merge(row[0], row[1], 0xf0f0, one), merge(row[2], row[3], 0xf0f0, one), 0xff00,
                 two);
  }
};

}  // namespace
}  // namespace vramkit::cpu
