// Elementwise work over lists of tensors, one chunk of one tensor a call: norms, scaling, casts and
// optimizer steps. All of it is bound by memory, and every unit gives the same bits.
#pragma once
#include <cstdint>

namespace vramkit::cpu {

enum class DType : std::int64_t;

// Elements of a chunk. Sums are per chunk, so that they do not depend on the number of threads.
inline constexpr std::int64_t kMultiChunk = 1 << 15;
// Running sums of a chunk: element i goes to sum i % kSumLanes.
inline constexpr int kSumLanes = 16;
// Elements that share a scale in 8-bit optimizer state.
inline constexpr std::int64_t kStateBlock = 256;

// 8-bit state: a codebook of 256 values, ascending, the 255 midpoints between them, and what one
// tensor has of codes and scales.
struct ByteState {
  const float* values = nullptr;
  const float* bounds = nullptr;
  std::uint8_t* codes = nullptr;
  float* absmax = nullptr;  // one per kStateBlock elements
};

// AdamW (Loshchilov and Hutter 2019, decoupled weight decay) over `count` elements, in float32:
//   w = w * decay; m = m + (g - m) * (1 - beta1); v = v * beta2 + g * g * (1 - beta2)
//   w = w - step_size * m / (sqrt(v) / root_correction + epsilon)
// with g the gradient times `factor`. The numbers are rounded one by one, in this order.
struct AdamwStep {
  // The parameters. With `second` of the same 16-bit type: w is their sum, kept in two halves. With
  // `second` of another type: w is the parameter, and `second` a copy of it.
  void* parameter = nullptr;
  DType parameter_type{};
  void* second = nullptr;
  DType second_type{};
  const void* gradient = nullptr;
  DType gradient_type{};
  float* average = nullptr;         // m; or null, with `average_bytes`
  float* average_square = nullptr;  // v
  ByteState average_bytes, square_bytes;
  std::int64_t count = 0;
  float factor = 1.0f;
  float decay = 1.0f;
  float beta1 = 0.0f, beta2 = 0.0f;
  float less_beta1 = 1.0f, less_beta2 = 1.0f;  // 1 - beta, rounded from float64
  float epsilon = 0.0f;
  float step_size = 0.0f;        // learning rate / (1 - beta1^t)
  float root_correction = 1.0f;  // sqrt(1 - beta2^t)
};

struct MultiKernels {
  // Sum of squares; infinite or NaN if and only if an element is (squares of float32 and their
  // sums do not overflow in float64).
  double (*square_sum)(const void* x, DType type, std::int64_t count);
  // x = x * factor, rounded once.
  void (*scale)(void* x, DType type, std::int64_t count, float factor);
  void (*cast)(const void* x, DType from, void* out, DType to, std::int64_t count);
  void (*adamw)(const AdamwStep& step);
};

}  // namespace vramkit::cpu
