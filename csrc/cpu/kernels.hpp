// What every instruction-set unit provides: the kernels over one weight, on raw pointers.
//
// A unit (reference.cpp, avx2.cpp, avx512.cpp) is compiled with its own ISA flags, keeps everything
// in an anonymous namespace, and exports only the function that returns its table. dispatch.cpp
// chooses one at run time.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/format.hpp"
#include "cpu/int8.hpp"
#include "cpu/multi.hpp"
#include "cpu/recurrent.hpp"

namespace vramkit::cpu {

enum class DType : std::int64_t { f32 = 0, bf16 = 1, f16 = 2 };

inline std::int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// A row-separable weight (Format::layout describes its rows). Kernels only read plain data from it.
struct Weight {
  const Format* format = nullptr;
  Layout at;
  const std::uint8_t* codes = nullptr;
  const std::uint8_t* scales = nullptr;
  const std::uint8_t* extra = nullptr;
  const float* table = nullptr;  // 2^bits values, by code
  // Nested scales: the index of this weight's first scale within the tensor (its blocks of 256
  // count from the tensor's start), and where the offset lies (a float32).
  std::int64_t first_scale = 0;
  const std::uint8_t* nested_offset = nullptr;
};

struct Parts {
  std::uint8_t* codes = nullptr;
  std::uint8_t* scales = nullptr;
  std::uint8_t* extra = nullptr;
};

// A codebook sorted by value, for encoding: code_of[k] is the code of the k-th smallest value and
// bounds[k] the float32 midpoint of values k and k + 1.
struct SortedTable {
  std::vector<float> bounds;
  std::vector<std::uint8_t> code_of;
};
SortedTable sort_table(const std::vector<float>& table);

// Columns whose errors are fed to one another one by one; those outside the block come first, in
// one sum. All units share it, because the order of the additions is part of the result.
inline constexpr std::int64_t kFeedbackBlock = 32;

// Rounding with feedback: each column is encoded after a multiple of the errors of the others has
// been added to it. With t_k = x_k + sum_j coefficients[k][j] (x_j - value_j), j being positions in
// `order`, column order[k] takes the code whose value lies nearest to t_k. Two uses
// (python/vramkit/ _rounding.py makes the coefficients): from nothing, with j < k, and `resume`,
// with all j != k.
struct Feedback {
  const Format* format = nullptr;
  const SortedTable* sorted = nullptr;
  std::int64_t cols = 0;
  std::int64_t group = 0, groups = 0;   // columns that share a scale, and how often per row
  const float* x = nullptr;             // [rows, cols]
  const float* scales = nullptr;        // [rows, groups]
  const float* zeros = nullptr;         // [rows, groups], or null without zero points
  const float* coefficients = nullptr;  // [cols, cols]
  const std::int64_t* order = nullptr;  // column by position
  bool resume = false;                  // errors start as those of the codes that are there
  std::uint8_t* codes = nullptr;        // [rows, cols], one byte each
};

struct Kernels {
  const char* name;
  // Encodes rows [begin, end) of x, a row-major [rows, cols] matrix with `stride` elements from
  // row to row. Writes codes, scales and zero points (nested scales are written as float32: the
  // caller quantizes them). A group that holds NaN or infinity gets a NaN scale; casts keep NaN.
  void (*quantize)(const Format& format, const SortedTable& sorted, const Layout& at, const void* x,
                   DType type, std::int64_t stride, Parts out, std::int64_t begin,
                   std::int64_t end);
  // Decodes rows [begin, end) to `out`, where row `begin` goes first and rows are `stride`
  // elements apart. value = code_value * scale in float32, then rounded to `type`.
  void (*dequantize)(const Weight& weight, std::int64_t begin, std::int64_t end, void* out,
                     DType type, std::int64_t stride);
  // out[i, n] = sum_k x[i, k] * W[n, k] + bias[n] for all `count` rows of x and output columns
  // [begin, end); accumulated in float32 over unrounded products, rounded once to `type`. x and out
  // are of `type` with strides in elements; bias is float32 or null. Meant for few rows of x.
  void (*linear)(const Weight& weight, const void* x, DType type, std::int64_t count,
                 std::int64_t x_stride, const float* bias, void* out, std::int64_t out_stride,
                 std::int64_t begin, std::int64_t end);
  Int8Kernels int8;
  // Rounding with feedback, rows [begin, end). Every unit gives the same codes.
  void (*feedback)(const Feedback& job, std::int64_t begin, std::int64_t end);
  // Units [begin, end) of the first `rows` rows.
  void (*recur)(const RecurrentStep& step, std::int64_t rows, std::int64_t begin, std::int64_t end);
  MultiKernels multi;
  // Multiplies and adds operands of `type` that stay in registers, for the benchmarks' limit.
  // Returns how many products `rounds` rounds are.
  std::int64_t (*spin)(DType type, std::int64_t rounds);
};

const Kernels& reference_kernels();
const Kernels* avx2_kernels();    // null where not compiled in
const Kernels* avx512_kernels();  // null where not compiled in

// The best unit that this processor runs. VRAMKIT_ISA=scalar|avx2|avx512 forces one; a unit that
// the processor lacks, or an unknown name, throws InvalidArgument that lists what there is.
const Kernels& active_kernels();
// The units that this processor can run, best last, always beginning with "scalar".
std::vector<const Kernels*> available_kernels();

// Splits [0, count) into chunks of at least `grain` and runs them, possibly in parallel.
using ParallelFor = std::function<void(std::int64_t count, std::int64_t grain,
                                       const std::function<void(std::int64_t, std::int64_t)>&)>;

}  // namespace vramkit::cpu
