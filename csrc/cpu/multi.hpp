// Elementwise work over lists of tensors, one chunk of one tensor a call: norms, scaling, casts and
// optimizer steps. All of it is bound by memory, and every unit gives the same bits.
#pragma once
#include <cstdint>

#include "cpu/multi_math.hpp"

namespace vramkit::cpu {

enum class DType : std::int64_t;

// Stochastic rounding (core/stochastic.hpp) of 16-bit results: element i of a chunk has the random
// word of element (row, first + i) of a matrix. `first` is a multiple of 64.
struct Dice {
  bool on = false;
  std::uint64_t seed = 0;
  std::int64_t row = 0;
  std::int64_t first = 0;
};

// 8-bit state: a codebook, and what one tensor has of codes and scales.
struct ByteState {
  const StateTable* table = nullptr;
  std::uint8_t* codes = nullptr;
  float* absmax = nullptr;  // one per kStateBlock elements
};

// One step of AdamW (multi_math.hpp) over `count` elements.
struct AdamwStep {
  AdamwNumbers numbers;
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
  float* largest = nullptr;         // of AMSGrad, beside `average`; or null
  ByteState average_bytes, square_bytes;
  std::int64_t count = 0;
  Dice dice;  // for 16-bit parameters that have no `second`
};

struct MultiKernels {
  // Sum of squares (kSumPiece says in which order); infinite or NaN if and only if an element is:
  // squares of float32 and their sums do not overflow in float64.
  double (*square_sum)(const void* x, DType type, std::int64_t count);
  // x = x * factor, rounded once.
  void (*scale)(void* x, DType type, std::int64_t count, float factor);
  void (*cast)(const void* x, DType from, void* out, DType to, std::int64_t count,
               const Dice& dice);
  void (*adamw)(const AdamwStep& step);
};

}  // namespace vramkit::cpu
