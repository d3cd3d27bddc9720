// Products of 8-bit integers: what every instruction-set unit provides for dynamic INT8 and
// LLM.int8.
//
// Activations are quantized row by row (a row is a token), weights lie row-major as they are
// stored, and the sums are exact int32. A float comes out as
//   activate(sum * weight_scale * (absmax / 127) + outliers + bias), in float32, rounded once to
//   `type`.
#pragma once
#include <cstdint>

namespace vramkit::cpu {

enum class DType : std::int64_t;

enum class Activation : std::int64_t { none = 0, gelu = 1, gelu_tanh = 2, silu = 3 };

// Products this long cannot leave int32: 127 * 128 * 2^17 < 2^31.
inline constexpr std::int64_t kInt8Longest = std::int64_t{1} << 17;

// Codes of x lie in blocks of this many columns, so that the few rows and columns that are in use
// at a time do not compete for the same lines of the first-level cache: [blocks][rows][stride].
inline constexpr std::int64_t kInt8Depth = 2048;
// What one task of a product covers at least: rows of x, rows of the weight.
inline constexpr std::int64_t kInt8ChunkRows = 128, kInt8ChunkCols = 64;
// Distance between rows within a block.
constexpr std::int64_t int8_row_stride(std::int64_t cols) {
  return cols >= kInt8Depth ? kInt8Depth + 64 : (cols + 63) / 64 * 64 + (cols % 128 ? 0 : 64);
}
constexpr std::int64_t int8_blocks(std::int64_t cols) {
  return (cols + kInt8Depth - 1) / kInt8Depth;
}

// Rows quantized to int8: code = rint(x * int8_factor(absmax)). A row with NaN (or, without a
// threshold, infinity) has zero codes and a NaN absmax, so that everything computed from it is NaN.
struct Int8Rows {
  std::int8_t* codes = nullptr;
  std::int64_t stride = 0;  // between rows
  std::int64_t block = 0;   // between blocks of kInt8Depth columns
  float* absmax = nullptr;
  std::int32_t* sums = nullptr;  // of a row's codes
};

// out[i, n] for rows of x and rows n of the weight. Every row of codes is `cols` long.
struct Int8Product {
  const std::int8_t* x = nullptr;
  std::int64_t x_stride = 0;
  std::int64_t x_block = 0;
  const float* x_absmax = nullptr;
  const std::int32_t* x_sums = nullptr;
  const std::int8_t* weight = nullptr;
  std::int64_t weight_stride = 0;
  const std::uint8_t* weight_scales = nullptr;  // bits of float32, at any address
  std::int64_t cols = 0;
  const float* bias = nullptr;
  // LLM.int8: columns whose codes in x are zero, multiplied from `values` (the unquantized x) with
  // the decoded weight in float32.
  const void* values = nullptr;
  std::int64_t values_stride = 0;
  const std::int64_t* outliers = nullptr;
  std::int64_t outlier_count = 0;
  Activation activation = Activation::none;
  void* out = nullptr;  // int32 where `exact`, else of `type` (as `values` are)
  std::int64_t out_stride = 0;
  DType type{};
  bool exact = false;
};

struct Int8Kernels {
  // Quantizes rows [begin, end) of x. With a threshold > 0, elements of that magnitude or more are
  // left out of the absmax, become 0, and mark their column in `columns` (one byte each, only ever
  // set to 1; threads may share it).
  void (*quantize)(const void* x, DType type, std::int64_t cols, std::int64_t stride,
                   float threshold, std::uint8_t* columns, Int8Rows out, std::int64_t begin,
                   std::int64_t end);
  // sums[r] = the sum of row r, for rows [begin, end).
  void (*sums)(const std::int8_t* x, std::int64_t cols, std::int64_t stride, std::int32_t* sums,
               std::int64_t begin, std::int64_t end);
  // Rows [row, row_end) of x times rows [begin, end) of the weight.
  void (*product)(const Int8Product& job, std::int64_t row, std::int64_t row_end,
                  std::int64_t begin, std::int64_t end);
  // Multiplies operands that stay in registers, for the benchmarks' limit. Returns how many
  // products `rounds` rounds are.
  std::int64_t (*spin)(std::int64_t rounds);
};

}  // namespace vramkit::cpu
