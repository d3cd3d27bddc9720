// The scalar reference of multi.hpp; reference.cpp includes it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

double square_sum(const void* x, DType type, std::int64_t count) {
  double sums[kSumLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = load(x, type, i);
    sums[i % kSumLanes] += value * value;
  }
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

void scale_values(void* x, DType type, std::int64_t count, float factor) {
  for (std::int64_t i = 0; i < count; ++i) store(x, type, i, load(x, type, i) * factor);
}

void cast_values(const void* x, DType from, void* out, DType to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) store(out, to, i, load(x, from, i));
}

void read_state(const ByteState& state, std::int64_t block, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = state.values[state.codes[block * kStateBlock + i]] * state.absmax[block];
  }
}

void write_state(const ByteState& state, std::int64_t block, std::int64_t count, const float* in) {
  float most = 0.0f;
  bool nan = false;
  for (std::int64_t i = 0; i < count; ++i) {
    most = std::max(most, std::fabs(in[i]));
    nan = nan || std::isnan(in[i]);
  }
  if (nan) most = std::numeric_limits<float>::quiet_NaN();  // and so is all that is read from it
  state.absmax[block] = most;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = most > 0.0f ? in[i] / most : 0.0f;
    int code = 0;
    while (code < 255 && value > state.bounds[code]) ++code;
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
      const float g = load(s.gradient, s.gradient_type, first + i) * s.factor;
      float w = load(s.parameter, s.parameter_type, first + i);
      if (halves) w = w + load(s.second, s.second_type, first + i);
      w = w * s.decay;
      m[i] = m[i] + (g - m[i]) * s.less_beta1;
      v[i] = v[i] * s.beta2 + g * g * s.less_beta2;
      const float divisor = std::sqrt(v[i]) / s.root_correction + s.epsilon;
      w = w - s.step_size * m[i] / divisor;
      store(s.parameter, s.parameter_type, first + i, w);
      if (halves) w = w - load(s.parameter, s.parameter_type, first + i);
      if (s.second) store(s.second, s.second_type, first + i, w);
    }
    if (!s.average) {
      write_state(s.average_bytes, block, n, average);
      write_state(s.square_bytes, block, n, square);
    }
  }
}

}  // namespace
}  // namespace vramkit::cpu
