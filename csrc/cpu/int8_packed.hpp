// The int8 product for many rows with AVX-512: 64 rows of the weight are transposed, four bytes at
// a time, into a panel that the second-level cache holds, and every row of x meets it there.
//
// In the panel a vector holds four consecutive k of sixteen rows of the weight, so that four bytes
// of x, spread over a vector, give sixteen sums at once and nothing is added across lanes. That
// pays for short rows (Packing::pays); of long ones those additions are a small part. Bytes lie in
// the panel as vpdpbusd takes them: w + 128, and 0 past the end of k.
#pragma once
#include "cpu/vector_common.hpp"

namespace vramkit::cpu {
namespace {

constexpr std::int64_t kPanelCols = kInt8ChunkCols;

struct Int8Panel {
  alignas(64) std::uint8_t bytes[kInt8Depth * kPanelCols];
};

// Bytes [first, first + 16) of rows r, r + 4, r + 8 and r + 12, a row to each 128-bit lane.
inline __m512i pack_lanes(const std::int8_t* const* rows, int r, std::int64_t first) {
  const auto sixteen = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + first));
  };
  __m512i all = _mm512_castsi128_si512(sixteen(r));
  all = _mm512_mask_broadcast_i32x4(all, 0x00f0, sixteen(r + 4));
  all = _mm512_mask_broadcast_i32x4(all, 0x0f00, sixteen(r + 8));
  return _mm512_mask_broadcast_i32x4(all, 0xf000, sixteen(r + 12));
}

// Sixteen rows of the weight, 16 columns from `first` on, to four vectors kPanelCols * 4 bytes
// apart: dwords of four rows are transposed within 128-bit lanes.
inline void pack_square(const std::int8_t* const* rows, std::int64_t first, std::uint8_t* out) {
  const __m512i flip = _mm512_set1_epi8(-128);
  const __m512i a = pack_lanes(rows, 0, first), b = pack_lanes(rows, 1, first);
  const __m512i c = pack_lanes(rows, 2, first), d = pack_lanes(rows, 3, first);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), AB = _mm512_unpackhi_epi32(a, b);
  const __m512i cd = _mm512_unpacklo_epi32(c, d), CD = _mm512_unpackhi_epi32(c, d);
  const auto put = [&](int i, __m512i v) {
    _mm512_store_si512(out + i * kPanelCols * 4, _mm512_xor_si512(v, flip));
  };
  put(0, _mm512_unpacklo_epi64(ab, cd));
  put(1, _mm512_unpackhi_epi64(ab, cd));
  put(2, _mm512_unpacklo_epi64(AB, CD));
  put(3, _mm512_unpackhi_epi64(AB, CD));
}

// `cols` rows of the weight over `depth` columns, from `w` on. Vectors of sixteen rows are written
// whole: rows from `cols` on repeat the last one. Steps of four columns too, zero past the end.
void pack_panel(const std::int8_t* w, std::int64_t w_stride, std::int64_t cols, std::int64_t depth,
                Int8Panel& panel) {
  for (std::int64_t n = 0; n < cols; n += 16) {
    const std::int8_t* rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = w + smaller(n + i, cols - 1) * w_stride;
    std::uint8_t* out = panel.bytes + n * 4;
    std::int64_t k = 0;
    for (; k + 16 <= depth; k += 16) pack_square(rows, k, out + k * kPanelCols);
    if (k == depth) continue;
    // Codes of -128 become zero when they are flipped.
    alignas(16) std::int8_t staged[16][16];
    const std::int8_t* last[16];
    std::memset(staged, -128, sizeof(staged));
    for (int i = 0; i < 16; ++i) {
      std::memcpy(staged[i], rows[i] + k, static_cast<std::size_t>(depth - k));
      last[i] = staged[i];
    }
    pack_square(last, 0, out + k * kPanelCols);
  }
}

// M rows of x times N vectors of the panel: sums[m][n] = x[m] . w[n], in row-major order.
template <int M, int N>
[[gnu::noinline]] void int8_packed_tile(const std::int8_t* x, std::int64_t x_stride,
                                        const std::uint8_t* panel, std::int64_t depth,
                                        std::int32_t* sums) {
  __m512i acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      acc[m][n] = _mm512_setzero_si512();
    }
  }
  const auto step = [&](const std::uint8_t* w, auto four) __attribute__((always_inline)) {
    __m512i columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) columns[n] = _mm512_load_si512(w + n * 64);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512i row = _mm512_set1_epi32(four(x + m * x_stride));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = Dot::dot(acc[m][n], columns[n], row);
    }
  };
  std::int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    step(panel + k * kPanelCols, [&](const std::int8_t* row) {
      std::int32_t four;
      std::memcpy(&four, row + k, sizeof(four));
      return four;
    });
  }
  if (k < depth) {
    step(panel + k * kPanelCols, [&](const std::int8_t* row) {
      std::int32_t four = 0;
      std::memcpy(&four, row + k, static_cast<std::size_t>(depth - k));
      return four;
    });
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      _mm512_storeu_si512(sums + m * kPanelCols + n * 16, acc[m][n]);
    }
  }
}

template <int N>
void int8_packed_rows(const std::int8_t* x, std::int64_t x_stride, std::int64_t rows,
                      const std::uint8_t* panel, std::int64_t depth, std::int32_t* sums) {
  const auto tile = [&]<int M>() {
    int8_packed_tile<M, N>(x, x_stride, panel, depth, sums);
    x += M * x_stride;
    sums += M * kPanelCols;
    rows -= M;
  };
  while (rows >= 12) tile.template operator()<6>();
  // What is left, in two tiles that are about even.
  if (rows == 11) tile.template operator()<6>();
  if (rows == 9 || rows == 10) tile.template operator()<5>();
  if (rows == 7 || rows == 8) tile.template operator()<4>();
  switch (rows) {
    case 6:
      return tile.template operator()<6>();
    case 5:
      return tile.template operator()<5>();
    case 4:
      return tile.template operator()<4>();
    case 3:
      return tile.template operator()<3>();
    case 2:
      return tile.template operator()<2>();
    case 1:
      return tile.template operator()<1>();
    default:
      return;
  }
}

struct Packing {
  static constexpr bool exists = true;
  using Panel = Int8Panel;

  // Whether it is faster than products in place. Measured, in units of the bare products: that
  // takes 1 + 184 / cols of them, this 1.03 + 43 / cols + 7.3 / rows. A panel is never too short
  // for such rows: kInt8ChunkRows of them pay up to 1615 columns.
  static bool pays(std::int64_t rows, std::int64_t cols) {
    return cols <= kInt8Depth && rows * (4700 - cols) > 243 * cols;
  }

  // sums[i][n] of rows [row, row + rows) of x and rows [col, col + cols) of the weight, kPanelCols
  // to a row, without the correction by Dot::bias.
  static void sums(const Int8Product& job, std::int64_t row, std::int64_t rows, std::int64_t col,
                   std::int64_t cols, Panel& panel, std::int32_t* sums) {
    pack_panel(job.weight + col * job.weight_stride, job.weight_stride, cols, job.cols, panel);
    const std::int8_t* x = job.x + row * job.x_stride;
    const auto run = [&]<int N>() {
      int8_packed_rows<N>(x, job.x_stride, rows, panel.bytes, job.cols, sums);
    };
    switch ((cols + 15) / 16) {
      case 1:
        return run.template operator()<1>();
      case 2:
        return run.template operator()<2>();
      case 3:
        return run.template operator()<3>();
      default:
        return run.template operator()<4>();
    }
  }
};

}  // namespace
}  // namespace vramkit::cpu
