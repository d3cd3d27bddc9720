// A step of a recurrent layer on a GPU: the product of the rounded states with the gates of 16
// units (int8_tile.hpp), and their new state from it, in one kernel. Bits are those of the CPU's
// vector units (csrc/cpu/vector_recurrent.hpp).
//
// A unit's old state and cell are read by the thread that replaces them, and by no other: the
// product reads codes, and, of outlier columns, a copy.
#pragma once
#include <cstdint>

#include "cpu/recurrent.hpp"
#include "cuda/int8_tile.hpp"

namespace vramkit::cuda::int8 {

// Fields are cpu::RecurrentStep's; `h` says how the sums of the product become W_hh h + b_hh.
struct StepJob {
  Operands from;  // the states' codes, and W_hh: [gates * units, state]
  Output h;
  cpu::RecurrentStep step;
};

inline constexpr int kStepUnits = 16;

template <int NT>
constexpr std::int64_t step_blocks(std::int64_t rows, std::int64_t units) {
  return (rows + 8 * NT - 1) / (8 * NT) * ((units + kStepUnits - 1) / kStepUnits);
}

template <int NT>
VRAMKIT_ANYWHERE inline Tile step_tile(const StepJob& job, std::int64_t block) {
  const std::int64_t down = (job.from.rows + 8 * NT - 1) / (8 * NT);
  const std::int64_t across = quotient(block, down);
  Tile tile;
  tile.first = across * kStepUnits;
  tile.step = job.step.units;
  const std::int64_t left = job.step.units - tile.first;
  tile.valid = left < kStepUnits ? static_cast<int>(left) : kStepUnits;
  tile.row = (block - across * down) * 8 * NT;
  return tile;
}

// The new state of unit j of row r, from what x and h gave for its gates.
template <cpu::Recurrence kind, int gates>
VRAMKIT_ANYWHERE inline float new_state(const cpu::RecurrentStep& step, std::int64_t r,
                                        std::int64_t j, const float (&h)[gates]) {
  static_assert(gates == cpu::gates_of(kind));
  float x[gates];
  VRAMKIT_UNROLLED
  for (int gate = 0; gate < gates; ++gate) {
    x[gate] = step.from_x[r * step.x_stride + gate * step.units + j];
  }
  if constexpr (kind == cpu::Recurrence::lstm) {
    float* cell = step.cell + r * step.units + j;
    const float entered = sigmoid(x[0] + h[0]) * tanh(x[2] + h[2]);
    const float now = sigmoid(x[1] + h[1]) * *cell + entered;
    *cell = now;
    return sigmoid(x[3] + h[3]) * tanh(now);
  } else if constexpr (kind == cpu::Recurrence::gru) {
    const float fresh = tanh(x[2] + sigmoid(x[0] + h[0]) * h[2]);
    const float old = step.before[r * step.before_stride + j];
    return fresh + sigmoid(x[1] + h[1]) * (old - fresh);
  } else if constexpr (kind == cpu::Recurrence::rnn_tanh) {
    return tanh(x[0] + h[0]);
  } else {
    return larger(0.0f, x[0] + h[0]);  // NaN stays
  }
}

template <cpu::Recurrence kind, int gates, int NT>
VRAMKIT_ANYWHERE inline void finish_step(const StepJob& job, const Tile& tile,
                                         const SharedSums<gates, NT>& shared, int thread) {
  const cpu::RecurrentStep& step = job.step;
  for (int at = thread; at < kStepUnits * 8 * NT; at += kThreads) {
    const int unit = at % kStepUnits, col = at / kStepUnits;
    const std::int64_t r = tile.row + col, j = tile.first + unit;
    if (unit >= tile.valid || r >= job.from.rows) continue;
    float h[gates];
    VRAMKIT_UNROLLED
    for (int gate = 0; gate < gates; ++gate) {
      const std::int32_t sum = sum_of_warps(shared, col, 16 * gate + unit);
      h[gate] = scaled(job.h, sum, r, gate * step.units + j);
    }
    const float value = new_state<kind>(step, r, j, h);
    step.after[r * step.after_stride + j] = value;
    if (step.out) step.out[r * step.out_stride + j] = value;
  }
}

}  // namespace vramkit::cuda::int8
