// Products with stored weights: what the two kernels (gemv.hpp, mma_tiles.hpp) share.
//
//   out[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Both multiply on tensor cores, 16 features x 16 elements x 8 columns at a time (mma.sync
// m16n8k16), because decoding leaves no room for a multiply-add on every weight. W is the
// instruction's first operand, and a sum over elements may take them in any order, so that a lane
// loads neighbouring elements and decodes them in registers: nothing is repacked, nothing is
// shuffled.
//
//   lane = 4 * g + t    has rows g and g + 8 of 16, and of each 16 elements 4 t … 4 t + 3
//                       has column g of x, the same elements
//                       gets rows g and g + 8 of columns 2 t and 2 t + 1 of the result
//
// Rounding: sums are float32 over unrounded products of codes' values. Integer codes (minus their
// zero) are exact in x's type; table values are rounded to it; the scale of a group is applied in
// float32 to the group's sum. A float32 x is the sum of three bfloat16, each a column of its own,
// and table values are three bfloat16 too: no bit is lost but by the sums. (An infinite float32 may
// so become NaN.)
//
// Bodies are written over a Context: blocks and threads, barriers, mma and asynchronous copies. The
// kernels' is in device.cuh, the tests' in tests/cpp/emulated_grid.hpp.
#pragma once
#include <cstdint>

#include "cuda/decode.hpp"

namespace vramkit::cuda {

// What codes become before the product: x's type, or the parts of a float32.
enum class Operand : std::int32_t { bf16 = 0, f16 = 1, split = 2 };

// python/vramkit/_routes.py names them by number.
enum class ProductKernel : std::int32_t { few = 0, tiles = 1 };

inline constexpr int kSplitParts = 3;  // a float32 is so many bfloat16

struct ProductJob {
  DecodeJob weight;                  // rows: features
  const std::uint16_t* x = nullptr;  // [columns, cols], 16-bit floats
  std::int64_t x_stride = 0;         // elements
  int rows = 0;                      // of the result
  int parts = 1;                     // columns that make up a row of x
  const float* bias = nullptr;
  void* out = nullptr;  // [rows, features]
  Element element = Element::f32;
  std::int64_t out_stride = 0;
  float* partial = nullptr;  // [splits, rows, features], where there is more than one split
  int splits = 1;
};

// float32 [rows, cols] to bfloat16 [3 * rows, out_stride].
struct SplitJob {
  const float* x = nullptr;
  std::int64_t stride = 0, rows = 0, cols = 0;
  std::uint16_t* out = nullptr;
  std::int64_t out_stride = 0;
};

// Features, columns and elements that a block of each kernel takes.
inline constexpr int kFewRows = 16, kFewColumns = 8, kFewSpan = 64, kFewWarps = 16;
inline constexpr int kTileRows = 64, kTileSpan = 128, kTileWarps = 8, kTileStages = 3;

// Columns of a tile, no row's parts being torn apart.
constexpr int whole_columns(int columns, int parts) { return columns / parts * parts; }

// One finished sum, to the result or to its split's.
VRAMKIT_ANYWHERE inline void finish_output(const ProductJob& job, std::int64_t m, std::int64_t n,
                                           int split, float sum) {
  if (job.splits > 1) {
    job.partial[(split * std::int64_t{job.rows} + m) * job.weight.rows + n] = sum;
    return;
  }
  if (job.bias != nullptr) sum += job.bias[n];
  const std::int64_t at = m * job.out_stride + n;
  switch (job.element) {
    case Element::f32:
      static_cast<float*>(job.out)[at] = sum;
      break;
    case Element::bf16:
      static_cast<std::uint16_t*>(job.out)[at] = float_to_bf16(sum);
      break;
    case Element::f16:
      static_cast<std::uint16_t*>(job.out)[at] = float_to_half(sum);
      break;
  }
}

// Second phase where there are splits: each output's sums, always in the same order.
VRAMKIT_ANYWHERE inline void reduce_splits(const ProductJob& job, std::int64_t index) {
  const std::int64_t features = job.weight.rows;
  if (index >= job.rows * features) return;
  float sum = 0.0f;
  for (int split = 0; split < job.splits; ++split) {
    sum += job.partial[split * job.rows * features + index];
  }
  const std::int64_t m = quotient(index, features);
  ProductJob whole = job;
  whole.splits = 1;
  finish_output(whole, m, index - m * features, 0, sum);
}

// A float32 as the sum of three bfloat16, by truncation: 8 bits each. What is not finite is the
// first part alone.
struct SplitFloat {
  std::uint16_t part[kSplitParts];
};
VRAMKIT_ANYWHERE inline SplitFloat split_float(float x) {
  const std::uint32_t bits = bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) {
    const std::uint32_t quiet = (bits & 0x7fffffu) != 0 ? 0x40u : 0u;
    return {{static_cast<std::uint16_t>((bits >> 16) | quiet), 0, 0}};
  }
  const float rest = x - float_of(bits & 0xffff0000u);
  const float last = rest - float_of(bits_of(rest) & 0xffff0000u);
  return {{static_cast<std::uint16_t>(bits >> 16), static_cast<std::uint16_t>(bits_of(rest) >> 16),
           static_cast<std::uint16_t>(bits_of(last) >> 16)}};
}

VRAMKIT_ANYWHERE inline void split_element(const SplitJob& job, std::int64_t index) {
  if (index >= job.rows * job.cols) return;
  const std::int64_t row = quotient(index, job.cols), col = index - row * job.cols;
  const SplitFloat split = split_float(job.x[row * job.stride + col]);
  VRAMKIT_UNROLLED
  for (int p = 0; p < kSplitParts; ++p) {
    job.out[(row * kSplitParts + p) * job.out_stride + col] = split.part[p];
  }
}

// As launch.hpp's. `warps` and job.splits shape the grid; cudaErrorNotSupported says that the GPU
// is too old for this kernel, this operand or these codes (python/vramkit/_routes.py knows).
int launch_few(const ProductJob& job, Codes codes, Operand operand, const NestedMap& nested,
               int warps, void* stream);
int launch_tiles(const ProductJob& job, Codes codes, Operand operand, const NestedMap& nested,
                 void* stream);
int launch_reduce(const ProductJob& job, void* stream);
int launch_split(const SplitJob& job, void* stream);

}  // namespace vramkit::cuda
