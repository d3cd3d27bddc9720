// The scalar reference of multi.hpp; reference.cpp includes it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/stochastic.hpp"
#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

double square_sum(const void* x, DType type, std::int64_t count) {
  double total = 0.0;
  for (std::int64_t piece = 0; piece < count; piece += kSumPiece) {
    double lanes[kSumLanes] = {};
    for (std::int64_t i = piece; i < std::min(piece + kSumPiece, count); ++i) {
      const double value = load(x, type, i);
      lanes[i % kSumLanes] += value * value;
    }
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    total += sum;
  }
  return total;
}

void scale_values(void* x, DType type, std::int64_t count, float factor) {
  for (std::int64_t i = 0; i < count; ++i) store(x, type, i, load(x, type, i) * factor);
}

void store_rounded(void* base, DType type, std::int64_t i, float value, const Dice& dice) {
  if (!dice.on || type == DType::f32) return store(base, type, i, value);
  const std::int64_t col = dice.first + i;
  const std::uint32_t word = words_of(dice.seed, dice.row, col / 4).word[col % 4];
  static_cast<std::uint16_t*>(base)[i] =
      type == DType::bf16 ? stochastic_bf16(value, word) : stochastic_fp16(value, word);
}

void cast_values(const void* x, DType from, void* out, DType to, std::int64_t count,
                 const Dice& dice) {
  for (std::int64_t i = 0; i < count; ++i) store_rounded(out, to, i, load(x, from, i), dice);
}

void read_state(const ByteState& state, std::int64_t block, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = state.table->values[state.codes[block * kStateBlock + i]] * state.absmax[block];
  }
}

void write_state(const ByteState& state, std::int64_t block, std::int64_t count, const float* in) {
  float most = 0.0f;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    most = std::max(most, std::fabs(in[i]));
    finite = finite && std::isfinite(in[i]);
  }
  if (!finite) most = std::numeric_limits<float>::quiet_NaN();  // and so is all that is read
  state.absmax[block] = most;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = most > 0.0f ? in[i] / most : 0.0f;
    int code = 0;
    while (code < 255 && value > state.table->bounds[code]) ++code;
    state.codes[block * kStateBlock + i] = static_cast<std::uint8_t>(code);
  }
}

void adamw(const AdamwStep& s) {
  const bool halves = s.second && s.second_type == s.parameter_type;
  float average[kStateBlock], square[kStateBlock];
  for (std::int64_t first = 0; first < s.count; first += kStateBlock) {
    const std::int64_t n = std::min(kStateBlock, s.count - first), block = first / kStateBlock;
    float* m = s.average + first;
    float* v = s.average_square + first;
    if (!s.average) {
      read_state(s.average_bytes, block, n, m = average);
      read_state(s.square_bytes, block, n, v = square);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t at = first + i;
      AdamwElement e{load(s.parameter, s.parameter_type, at), m[i], v[i]};
      if (halves) e.w = e.w + load(s.second, s.second_type, at);
      if (s.largest) e.largest = s.largest[at];
      adamw_element(s.numbers, load(s.gradient, s.gradient_type, at), s.largest, e);
      m[i] = e.m;
      v[i] = e.v;
      if (s.largest) s.largest[at] = e.largest;
      if (!s.second) {
        store_rounded(s.parameter, s.parameter_type, at, e.w, s.dice);
        continue;
      }
      store(s.parameter, s.parameter_type, at, e.w);
      if (halves) e.w = e.w - load(s.parameter, s.parameter_type, at);
      store(s.second, s.second_type, at, e.w);
    }
    if (!s.average) {
      write_state(s.average_bytes, block, n, average);
      write_state(s.square_bytes, block, n, square);
    }
  }
}

}  // namespace
}  // namespace vramkit::cpu
