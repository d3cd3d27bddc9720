// What recurrent layers compute between their products: gates, and from them the new state.
//
// The gates of a row lie `units` apart, in torch's order: of an LSTM input, forget, cell, output;
// of a GRU reset, update, new. All arithmetic is in float32.
#pragma once
#include <cstdint>

namespace vramkit::cpu {

enum class Recurrence : std::int64_t { lstm = 0, gru = 1, rnn_tanh = 2, rnn_relu = 3 };

constexpr std::int64_t gates_of(Recurrence kind) {
  return kind == Recurrence::lstm ? 4 : kind == Recurrence::gru ? 3 : 1;
}

// One step of one direction. Strides are in elements, from row to row.
struct RecurrentStep {
  Recurrence kind{};
  std::int64_t units = 0;
  const float* from_x = nullptr;  // W_ih x + b_ih
  std::int64_t x_stride = 0;
  const float* from_h = nullptr;  // W_hh h + b_hh
  std::int64_t h_stride = 0;
  float* cell = nullptr;  // of an LSTM, [rows, units]: read and replaced
  // The old state, which a GRU reads element by element, and the new one; they may be in one place.
  const float* before = nullptr;
  std::int64_t before_stride = 0;
  float* after = nullptr;
  std::int64_t after_stride = 0;
  float* out = nullptr;  // a second place for it, or null
  std::int64_t out_stride = 0;
};

}  // namespace vramkit::cpu
