// Products of many bfloat16 rows with a stored weight on AVX-512 BF16: a few weight rows at a time
// are decoded into memory that stays in the second-level cache, and multiplied with all rows of x.
//
// Both operands lie along the columns, so a tile of kProductRows x kProductCols sums needs no
// packing: each sum has a vector of partial sums that is added up over its lanes at the end. Per
// step of 32 columns a tile loads 10 vectors for 24 products.
//
//            kProductCols rows of the weight (decoded, a block of kProductBlock columns stays in
//            L1)
//   x rows   [ . . . . . . ]
//   of a     [ . . . . . . ]   kProductRows x kProductCols vectors of partial sums in registers
//   tile     [ . . . . . . ]
//            [ . . . . . . ]
#pragma once
#include "cpu/bf16_dequantize.hpp"
#include "cpu/bf16_linear.hpp"

namespace vramkit::cpu {
namespace {

constexpr int kProductRows = 4, kProductCols = 6, kProductTile = kProductRows * kProductCols;
constexpr std::int64_t kProductStep = 32;        // columns of one vector
constexpr std::int64_t kProductBlock = 2048;     // columns: kProductCols rows of them are 24 KiB
constexpr std::int64_t kProductHeight = 64;      // rows of x whose partial sums are kept
constexpr std::int64_t kPanelBytes = 256 << 10;  // decoded weight rows, in L2 beside x

// Adds products of columns [from, to) to the tile's sums, a vector each, which lie at `sums`; they
// begin at zero where from is 0. x and w point to the tile's rows.
void add_tile(float* sums, const std::uint16_t* const* x, const std::uint16_t* const* w,
              std::int64_t from, std::int64_t to) {
  F total[kProductTile];
  VRAMKIT_UNROLL for (int i = 0; i < kProductTile; ++i) {
    total[i] = from > 0 ? _mm512_loadu_ps(sums + 16 * i) : _mm512_setzero_ps();
  }
  std::int64_t k = from;
  for (; k + kProductStep <= to; k += kProductStep) {
    __m512bh right[kProductCols];
    VRAMKIT_UNROLL for (int n = 0; n < kProductCols; ++n) {
      right[n] = (__m512bh)_mm512_loadu_si512(w[n] + k);
    }
    VRAMKIT_UNROLL for (int m = 0; m < kProductRows; ++m) {
      const auto left = (__m512bh)_mm512_loadu_si512(x[m] + k);
      VRAMKIT_UNROLL for (int n = 0; n < kProductCols; ++n) {
        total[m * kProductCols + n] = _mm512_dpbf16_ps(total[m * kProductCols + n], left, right[n]);
      }
    }
  }
  VRAMKIT_UNROLL for (int i = 0; i < kProductTile; ++i) _mm512_storeu_ps(sums + 16 * i, total[i]);
  if (k == to) return;
  // The last columns: x ends here, the decoded rows go on with zeros.
  const __mmask32 keep = (1u << (to - k)) - 1u;
  for (int m = 0; m < kProductRows; ++m) {
    const auto left = (__m512bh)_mm512_maskz_loadu_epi16(keep, x[m] + k);
    for (int n = 0; n < kProductCols; ++n) {
      float* at = sums + 16 * (m * kProductCols + n);
      const auto right = (__m512bh)_mm512_loadu_si512(w[n] + k);
      _mm512_storeu_ps(at, _mm512_dpbf16_ps(_mm512_loadu_ps(at), left, right));
    }
  }
}

// Kernels::linear for bfloat16 and any number of rows.
void product_bf16(const Weight& weight, const void* x, std::int64_t count, std::int64_t x_stride,
                  const float* bias, void* out, std::int64_t out_stride, std::int64_t begin,
                  std::int64_t end) {
  const std::int64_t cols = weight.at.cols;
  // One vector more than needed: rows a power of two apart would share a few sets of the cache.
  const std::int64_t stride =
      (cols + kProductStep - 1) / kProductStep * kProductStep + kProductStep;
  const std::int64_t fitting = kPanelBytes / (2 * stride) / kProductCols * kProductCols;
  const std::int64_t panel_rows =
      smaller(fitting < kProductCols ? kProductCols : fitting, end - begin);
  const Scratch<std::uint16_t> panel(panel_rows * stride);
  const Scratch<float> partial(kProductHeight * kProductCols * 16);
  const auto* rows = static_cast<const std::uint16_t*>(x);
  auto* target = static_cast<std::uint16_t*>(out);

  auto finish = [&](const float* sums, std::int64_t m0, std::int64_t n0) {
    F lanes[kProductTile];
    VRAMKIT_UNROLL for (int i = 0; i < kProductTile; ++i) lanes[i] = _mm512_loadu_ps(sums + 16 * i);
    F all[2] = {add_lanes<16>(lanes), add_lanes<kProductTile - 16>(lanes + 16)};
    alignas(32) std::uint16_t halves[32];
    for (int part = 0; part < 2; ++part) {
      if (bias) {
        alignas(64) float add[16];
        for (int i = 0; i < 16; ++i) {
          add[i] = bias[smaller(n0 + (16 * part + i) % kProductCols, end - 1)];
        }
        all[part] += _mm512_load_ps(add);
      }
      Simd::store_halves(halves + 16 * part, bf16_bits(all[part]));
    }
    const std::int64_t width = smaller(kProductCols, end - n0);
    const std::int64_t height = smaller(kProductRows, count - m0);
    for (std::int64_t m = 0; m < height; ++m) {
      std::memcpy(target + (m0 + m) * out_stride + n0, halves + m * kProductCols,
                  static_cast<std::size_t>(width) * 2);
    }
  };

  for (std::int64_t first = begin; first < end; first += panel_rows) {
    const std::int64_t last = smaller(first + panel_rows, end);
    dequantize_avx512(weight, first, last, panel.get(), DType::bf16, stride);
    for (std::int64_t r = 0; r < last - first; ++r) {  // zero times nothing, not times NaN
      std::memset(panel.get() + r * stride + cols, 0, static_cast<std::size_t>(stride - cols) * 2);
    }
    for (std::int64_t top = 0; top < count; top += kProductHeight) {
      const std::int64_t bottom = smaller(top + kProductHeight, count);
      for (std::int64_t n = first; n < last; n += kProductCols) {
        const std::uint16_t* w[kProductCols];
        for (int i = 0; i < kProductCols; ++i) {
          w[i] = panel.get() + (smaller(n + i, last - 1) - first) * stride;
        }
        for (std::int64_t from = 0; from < cols; from += kProductBlock) {
          const std::int64_t to = smaller(from + kProductBlock, cols);
          float* kept = partial.get();
          for (std::int64_t m = top; m < bottom; m += kProductRows, kept += kProductTile * 16) {
            const std::uint16_t* left[kProductRows];
            for (int i = 0; i < kProductRows; ++i)
              left[i] = rows + smaller(m + i, count - 1) * x_stride;
            add_tile(kept, left, w, from, to);
            if (to == cols) finish(kept, m, n);
          }
        }
      }
    }
  }
}

// Kernels::linear of the AVX-512 unit.
void linear_avx512(const Weight& weight, const void* x, DType type, std::int64_t count,
                   std::int64_t x_stride, const float* bias, void* out, std::int64_t out_stride,
                   std::int64_t begin, std::int64_t end) {
  if (count == 0 || begin >= end) return;
  if (type == DType::bf16) {
    if (count > 8) {
      return product_bf16(weight, x, count, x_stride, bias, out, out_stride, begin, end);
    }
    if (linear_bf16(weight, x, count, x_stride, bias, out, out_stride, begin, end)) return;
  }
  linear(weight, x, type, count, x_stride, bias, out, out_stride, begin, end);
}

// Kernels::spin of the AVX-512 unit.
std::int64_t spin_avx512(DType type, std::int64_t rounds) {
  if (type != DType::bf16) return spin(type, rounds);
  constexpr int count = 12;
  __m512 sums[count];
  __m512i x = _mm512_setzero_si512();
  const __m512i w = _mm512_setzero_si512();
  VRAMKIT_UNROLL
  for (int i = 0; i < count; ++i) {
    sums[i] = _mm512_setzero_ps();
    asm volatile("" : "+v"(sums[i]));  // equal sums would be computed once
  }
  for (std::int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : "+v"(x));  // nothing to hoist
    VRAMKIT_UNROLL
    for (int i = 0; i < count; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)x, (__m512bh)w);
    }
  }
  VRAMKIT_UNROLL
  for (int i = 0; i < count; ++i) asm volatile("" : : "v"(sums[i]));
  return rounds * count * 32;
}

}  // namespace
}  // namespace vramkit::cpu
