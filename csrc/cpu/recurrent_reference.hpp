// The scalar reference of a recurrent step, in float64 between float32 numbers; reference.cpp
// includes it.
#pragma once
#include <cmath>
#include <cstdint>

#include "cpu/recurrent.hpp"

namespace vramkit::cpu {
namespace {

void recur(const RecurrentStep& step, std::int64_t rows, std::int64_t begin, std::int64_t end) {
  const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t j = begin; j < end; ++j) {
      const auto x = [&](int gate) -> double {
        return step.from_x[r * step.x_stride + gate * step.units + j];
      };
      const auto h = [&](int gate) -> double {
        return step.from_h[r * step.h_stride + gate * step.units + j];
      };
      double value = 0.0;
      switch (step.kind) {
        case Recurrence::lstm: {
          float& cell = step.cell[r * step.units + j];
          const double kept = sigmoid(x(1) + h(1)) * cell;
          const double entered = sigmoid(x(0) + h(0)) * std::tanh(x(2) + h(2));
          cell = static_cast<float>(kept + entered);
          value = sigmoid(x(3) + h(3)) * std::tanh(static_cast<double>(cell));
          break;
        }
        case Recurrence::gru: {
          const double fresh = std::tanh(x(2) + sigmoid(x(0) + h(0)) * h(2));
          const double old = step.before[r * step.before_stride + j];
          value = fresh + sigmoid(x(1) + h(1)) * (old - fresh);
          break;
        }
        case Recurrence::rnn_tanh:
          value = std::tanh(x(0) + h(0));
          break;
        case Recurrence::rnn_relu:
          value = x(0) + h(0);
          if (value < 0.0) value = 0.0;  // NaN stays
          break;
      }
      step.after[r * step.after_stride + j] = static_cast<float>(value);
      if (step.out) step.out[r * step.out_stride + j] = static_cast<float>(value);
    }
  }
}

}  // namespace
}  // namespace vramkit::cpu
