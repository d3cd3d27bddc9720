// The arithmetic of multi.hpp, for one element: the CPU's and the GPU's kernels share it.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/portable.hpp"

namespace vramkit::cpu {

// Elements of a chunk: sums are per chunk, so that they do not depend on the number of threads.
inline constexpr std::int64_t kMultiChunk = 1 << 15;
// A chunk's sum is that of its pieces, one after another; a piece's that of its running sums, to
// which element i has gone as i % kSumLanes; and the whole that of kTotalLanes running sums of
// chunks.
inline constexpr std::int64_t kSumPiece = 1024;
inline constexpr int kSumLanes = 16;
inline constexpr std::int64_t kTotalLanes = 256;
// Elements that share a scale in 8-bit optimizer state.
inline constexpr std::int64_t kStateBlock = 256;

// The sum of the chunks' sums.
double total_of(const double* sums, std::int64_t count);

// What the elements of a tensor share in a step of AdamW.
struct AdamwNumbers {
  float factor = 1.0f;  // of gradients; negative to maximize
  float decay = 1.0f;   // 1 - learning rate * weight decay
  float beta2 = 0.0f;
  float less_beta1 = 1.0f, less_beta2 = 1.0f;  // 1 - beta, rounded from float64
  float epsilon = 0.0f;
  float step_size = 0.0f;        // learning rate / (1 - beta1^t)
  float root_correction = 1.0f;  // sqrt(1 - beta2^t)
};

struct AdamwElement {
  float w = 0.0f, m = 0.0f, v = 0.0f, largest = 0.0f;
};

// AdamW (Loshchilov and Hutter 2019, decoupled weight decay) in float32, as torch's fused one:
//   w = w * decay; m = m + (g - m) * (1 - beta1); v = v * beta2 + g * g * (1 - beta2)
//   w = w - step_size * m / (sqrt(v) / root_correction + epsilon)
// with g the gradient times `factor`, and under AMSGrad (Reddi, Kale and Kumar 2018) the largest v
// so far in v's place below. Numbers are rounded one by one, in this order.
VRAMKIT_ANYWHERE inline void adamw_element(const AdamwNumbers& n, float gradient, bool amsgrad,
                                           AdamwElement& e) {
  const float g = gradient * n.factor;
  const float w = e.w * n.decay;
  e.m = e.m + (g - e.m) * n.less_beta1;
  e.v = e.v * n.beta2 + g * g * n.less_beta2;
  float root = e.v;
  if (amsgrad) root = e.largest = e.v <= e.largest ? e.largest : e.v;
  e.w = w - n.step_size * e.m / (std::sqrt(root) / n.root_correction + n.epsilon);
}

// A codebook of 256 values, ascending, for numbers in [-1, 1]: a number's code is how many of the
// 255 midpoints between the values lie below it.
//
// The dynamic map's values lie the closer the smaller they are, so that no two midpoints share the
// leading kKeyBits bits of the mantissa: a table by sign, exponent and these bits says the code of
// the cell's first number and where in the cell, if anywhere, it changes by one.
struct StateTable {
  static constexpr int kKeyBits = 7, kLowBits = 23 - kKeyBits;
  static constexpr std::uint32_t kLowMask = (1u << kLowBits) - 1;
  static constexpr std::uint32_t kOne = 0x3f800000u;
  static constexpr std::uint32_t kOctaves = 24;  // what is smaller shares the first cell
  static constexpr std::uint32_t kFirst = (kOne >> kLowBits) - (kOctaves << kKeyBits);
  static constexpr std::uint32_t kCells = (kOne >> kLowBits) - kFirst + 1;

  float values[256];
  float bounds[255];
  // By sign * kCells + cell: the first number's code in bits 24 and up, below it the largest low
  // bits of a number that has it.
  std::uint32_t cells[2 * kCells];

  // Throws InvalidArgument for values that two midpoints of a cell part.
  explicit StateTable(const float* map);
};

// The tables of 8-bit optimizer state: of m, and of v, which has no sign.
const StateTable& signed_state();
const StateTable& unsigned_state();

}  // namespace vramkit::cpu
