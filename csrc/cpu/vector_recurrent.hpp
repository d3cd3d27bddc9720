// A recurrent step on vectors: units [begin, end) of every row.
#pragma once
#include "cpu/recurrent.hpp"
#include "cpu/vector_common.hpp"
#include "cpu/vector_math.hpp"

namespace vramkit::cpu {
namespace {

// The new state of up to a vector of units; `at(p)` loads one, `put(p, v)` stores one.
template <Recurrence kind, class At, class Put>
[[gnu::always_inline]] inline F recur_units(const RecurrentStep& step, std::int64_t r,
                                            std::int64_t j, const At& at, const Put& put) {
  const float* from_x = step.from_x + r * step.x_stride + j;
  const float* from_h = step.from_h + r * step.h_stride + j;
  const auto x = [&](int gate) { return at(from_x + gate * step.units); };
  const auto h = [&](int gate) { return at(from_h + gate * step.units); };
  if constexpr (kind == Recurrence::lstm) {
    float* cell = step.cell + r * step.units + j;
    const F entered = sigmoid(x(0) + h(0)) * tanh(x(2) + h(2));
    const F now = sigmoid(x(1) + h(1)) * at(cell) + entered;
    put(cell, now);
    return sigmoid(x(3) + h(3)) * tanh(now);
  } else if constexpr (kind == Recurrence::gru) {
    const F fresh = tanh(x(2) + sigmoid(x(0) + h(0)) * h(2));
    const F old = at(step.before + r * step.before_stride + j);
    return fresh + sigmoid(x(1) + h(1)) * (old - fresh);
  } else if constexpr (kind == Recurrence::rnn_tanh) {
    return tanh(x(0) + h(0));
  } else {
    return Simd::max(Simd::set1(0.0f), x(0) + h(0));  // NaN stays: it is the second operand
  }
}

template <Recurrence kind>
void recur_rows(const RecurrentStep& step, std::int64_t rows, std::int64_t begin,
                std::int64_t end) {
  for (std::int64_t r = 0; r < rows; ++r) {
    float* after = step.after + r * step.after_stride;
    float* out = step.out ? step.out + r * step.out_stride : nullptr;
    std::int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      const F value = recur_units<kind>(
          step, r, j, [](const float* p) { return Simd::load(p); },
          [](float* p, F v) { Simd::store(p, v); });
      Simd::store(after + j, value);
      if (out) Simd::store(out + j, value);
    }
    if (j == end) continue;
    const std::int64_t n = end - j;
    const F value = recur_units<kind>(
        step, r, j, [n](const float* p) { return load_part<DType::f32>(p, n); },
        [n](float* p, F v) { store_part<DType::f32>(p, v, n); });
    store_part<DType::f32>(after + j, value, n);
    if (out) store_part<DType::f32>(out + j, value, n);
  }
}

void recur(const RecurrentStep& step, std::int64_t rows, std::int64_t begin, std::int64_t end) {
  switch (step.kind) {
    case Recurrence::lstm:
      return recur_rows<Recurrence::lstm>(step, rows, begin, end);
    case Recurrence::gru:
      return recur_rows<Recurrence::gru>(step, rows, begin, end);
    case Recurrence::rnn_tanh:
      return recur_rows<Recurrence::rnn_tanh>(step, rows, begin, end);
    case Recurrence::rnn_relu:
      return recur_rows<Recurrence::rnn_relu>(step, rows, begin, end);
  }
}

}  // namespace
}  // namespace vramkit::cpu
