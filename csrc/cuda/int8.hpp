// Dynamic INT8 and LLM.int8 on a GPU: what one thread does, as functions that the host compiles too
// (decode.hpp says why). Here: rounding rows of x, the list of outlier columns, and scaling what an
// int8 product gave. The product itself is in int8_tile.hpp, the kernels around both in int8.cu.
//
// Everything has the bits of the CPU's vector units (csrc/cpu/int8_vector.hpp): the same
// operations, in the same order. Sums of integers are exact in any order.
//
// Outlier columns are never counted on the host. A byte per column marks them while rows are
// rounded; `settle` turns the marks into an ascending list, as long as there are columns, and a
// count that later kernels read, and takes those columns' codes out. Nothing overflows, and all of
// it can be captured in a graph.
#pragma once
#include <cstdint>

#include "cpu/int8.hpp"
#include "cpu/int8_encode.hpp"
#include "cuda/decode.hpp"
#include "cuda/int8_math.hpp"

namespace vramkit::cuda::int8 {

// Rows of x to codes and absmax.
struct RowsJob {
  const void* x = nullptr;
  std::int64_t rows = 0, cols = 0, stride = 0;  // elements
  float threshold = 0.0f;                       // 0: none
  std::int8_t* codes = nullptr;
  std::int64_t code_stride = 0;  // from row to row; codes from `cols` on become zero
  float* absmax = nullptr;
  std::uint8_t* columns = nullptr;  // marks, zero before; set with a threshold alone
};

// Chunks of a row that a thread keeps in registers between the two passes: rows of up to
// kHeld * kChunk * (threads of a row) columns are read once.
inline constexpr int kHeld = 4;
struct HeldRow {
  float value[kHeld][kChunk];
};
// Rows this short are left to a warp each.
inline constexpr int kWarp = 32;
inline constexpr std::int64_t kWarpCols = std::int64_t{kWarp} * kHeld * kChunk;

template <Element E>
VRAMKIT_ANYWHERE inline float element_at(const void* x, std::int64_t at) {
  if constexpr (E == Element::f32) {
    return static_cast<const float*>(x)[at];
  } else {
    const std::uint16_t half = static_cast<const std::uint16_t*>(x)[at];
    return E == Element::bf16 ? bf16_to_float(half) : half_to_float(half);
  }
}

VRAMKIT_ANYWHERE inline float element_at(const void* x, Element type, std::int64_t at) {
  if (type == Element::f32) return element_at<Element::f32>(x, at);
  return type == Element::bf16 ? element_at<Element::bf16>(x, at) : element_at<Element::f16>(x, at);
}

VRAMKIT_ANYWHERE inline void store_element(void* out, Element type, std::int64_t at, float value) {
  if (type == Element::f32) {
    static_cast<float*>(out)[at] = value;
  } else {
    static_cast<std::uint16_t*>(out)[at] =
        type == Element::bf16 ? float_to_bf16(value) : float_to_half(value);
  }
}

// Eight elements from `first` on, of which `count` are there; the others are zero.
template <Element E>
VRAMKIT_ANYWHERE inline void load_chunk(const void* x, std::int64_t first, int count,
                                        float (&value)[kChunk]) {
  if constexpr (E == Element::f32) {
    const auto* from = reinterpret_cast<const std::uint8_t*>(static_cast<const float*>(x) + first);
    std::uint8_t raw[4 * kChunk];
    VRAMKIT_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const int rest = count - 4 * half;
      load_bytes<16>(from + 16 * half, rest >= 4 ? 16 : (rest > 0 ? 4 * rest : 0), raw + 16 * half);
    }
    memcpy(value, raw, sizeof(raw));
  } else {
    const auto* from =
        reinterpret_cast<const std::uint8_t*>(static_cast<const std::uint16_t*>(x) + first);
    std::uint8_t raw[2 * kChunk];
    load_bytes<2 * kChunk>(from, 2 * count, raw);
    std::uint16_t half[kChunk];
    memcpy(half, raw, sizeof(raw));
    VRAMKIT_UNROLLED
    for (int i = 0; i < kChunk; ++i) {
      value[i] = E == Element::bf16 ? bf16_to_float(half[i]) : half_to_float(half[i]);
    }
  }
}

VRAMKIT_ANYWHERE inline int elements_in(std::int64_t at, std::int64_t cols) {
  const std::int64_t left = cols - at;
  return left >= kChunk ? kChunk : (left > 0 ? static_cast<int>(left) : 0);
}

// A magnitude's bits from which on it is an outlier, NaN never.
VRAMKIT_ANYWHERE inline std::uint32_t outlier_bits(float threshold) {
  return threshold > 0.0f ? bits_of(threshold) : 0x7fffffffu;
}
VRAMKIT_ANYWHERE inline bool is_outlier(std::uint32_t magnitude, std::uint32_t limit) {
  return magnitude >= limit && magnitude <= 0x7f800000u;
}

inline constexpr std::uint32_t kNoAbsmax = 0x7fc00000u;  // NaN, above every magnitude's bits

// First step: the largest of this thread's magnitudes, as bits, which order as the numbers do. The
// row's is the largest of all threads'.
template <Element E, int Threads>
VRAMKIT_ANYWHERE inline std::uint32_t look(const RowsJob& job, std::int64_t row, int thread,
                                           HeldRow& held) {
  const std::uint32_t limit = outlier_bits(job.threshold);
  std::uint32_t most = 0;
  const auto look_at = [&](std::int64_t at, const float(&value)[kChunk]) {
    VRAMKIT_UNROLLED
    for (int i = 0; i < kChunk; ++i) {
      const std::uint32_t magnitude = bits_of(value[i]) & 0x7fffffffu;
      if (is_outlier(magnitude, limit)) {
        job.columns[at + i] = 1;  // whoever else stores, stores the same
        continue;
      }
      const std::uint32_t bits = magnitude >= 0x7f800000u ? kNoAbsmax : magnitude;
      most = bits > most ? bits : most;
    }
  };
  VRAMKIT_UNROLLED
  for (int i = 0; i < kHeld; ++i) {
    const std::int64_t at = (std::int64_t{i} * Threads + thread) * kChunk;
    load_chunk<E>(job.x, row * job.stride + at, elements_in(at, job.cols), held.value[i]);
    look_at(at, held.value[i]);
  }
  constexpr std::int64_t step = std::int64_t{Threads} * kChunk;
  for (std::int64_t at = kHeld * step + thread * kChunk; at < job.cols; at += step) {
    float value[kChunk];
    load_chunk<E>(job.x, row * job.stride + at, elements_in(at, job.cols), value);
    look_at(at, value);
  }
  return most;
}

// Second step, with the row's largest bits.
template <Element E, int Threads>
VRAMKIT_ANYWHERE inline void round_row(const RowsJob& job, std::int64_t row, int thread,
                                       std::uint32_t most, const HeldRow& held) {
  const bool broken = most >= kNoAbsmax;
  const float factor = broken ? 0.0f : cpu::int8_factor(float_of(most));
  const std::uint32_t limit = outlier_bits(job.threshold);
  if (thread == 0) job.absmax[row] = float_of(most);
  const auto round = [&](std::int64_t at, const float(&value)[kChunk]) {
    std::uint8_t code[kChunk];
    VRAMKIT_UNROLLED
    for (int i = 0; i < kChunk; ++i) {
      const bool out = broken || is_outlier(bits_of(value[i]) & 0x7fffffffu, limit);
      const float y = larger(-127.0f, smaller(127.0f, value[i] * factor));
      code[i] = static_cast<std::uint8_t>(out ? 0 : nearest(y));
    }
    const int count = elements_in(at, job.code_stride);
    auto* to = reinterpret_cast<std::uint8_t*>(job.codes + row * job.code_stride + at);
    if (count) store_bytes<kChunk>(to, count, code);
  };
  VRAMKIT_UNROLLED
  for (int i = 0; i < kHeld; ++i) {
    round((std::int64_t{i} * Threads + thread) * kChunk, held.value[i]);
  }
  constexpr std::int64_t step = std::int64_t{Threads} * kChunk;
  for (std::int64_t at = kHeld * step + thread * kChunk; at < job.code_stride; at += step) {
    float value[kChunk];
    load_chunk<E>(job.x, row * job.stride + at, elements_in(at, job.cols), value);
    round(at, value);
  }
}

// The marks become a list, and the marked columns' codes zero.
struct SettleJob {
  const std::uint8_t* columns = nullptr;
  std::int64_t cols = 0;
  std::int32_t* list = nullptr;   // [cols], ascending, or null where only codes are wanted
  std::int32_t* count = nullptr;  // one number
  std::int8_t* codes = nullptr;
  std::int64_t rows = 0, code_stride = 0;
};
inline constexpr std::int64_t kSettleRows = 32;  // that a block takes columns out of

// The first block makes the list; each of the others has kSettleRows rows.
constexpr std::int64_t settle_blocks(std::int64_t rows) {
  return 1 + (rows + kSettleRows - 1) / kSettleRows;
}

VRAMKIT_ANYWHERE inline void take_out(const SettleJob& job, std::int64_t block, int thread) {
  const std::int64_t first = (block - 1) * kSettleRows;
  const std::int64_t last = first + kSettleRows < job.rows ? first + kSettleRows : job.rows;
  for (std::int64_t at = thread * 16; at < job.cols; at += kThreads * 16) {
    const std::int64_t left = job.cols - at;
    std::uint8_t mark[16];
    load_bytes<16>(job.columns + at, left < 16 ? static_cast<int>(left) : 16, mark);
    VRAMKIT_UNROLLED
    for (int i = 0; i < 16; ++i) {
      if (!mark[i]) continue;
      for (std::int64_t row = first; row < last; ++row) {
        job.codes[row * job.code_stride + at + i] = 0;
      }
    }
  }
}

// The list, kThreads * 16 columns at a time, in three steps with all threads through between them.
inline constexpr std::int64_t kListCols = std::int64_t{kThreads} * 16;
inline constexpr int kListGroups = 16;
struct ListCounts {
  std::int32_t of_thread[kThreads];
  std::int32_t of_group[kListGroups];  // of kThreads / kListGroups threads each
};

VRAMKIT_ANYWHERE inline std::uint32_t marks_of(const SettleJob& job, std::int64_t first,
                                               int thread) {
  const std::int64_t at = first + thread * 16, left = job.cols - at;
  if (left <= 0) return 0;
  std::uint8_t mark[16];
  load_bytes<16>(job.columns + at, left < 16 ? static_cast<int>(left) : 16, mark);
  std::uint32_t bits = 0;
  VRAMKIT_UNROLLED
  for (int i = 0; i < 16; ++i) bits |= static_cast<std::uint32_t>(mark[i] != 0) << i;
  return bits;
}

VRAMKIT_ANYWHERE inline void list_count(std::uint32_t marks, ListCounts& counts, int thread) {
  std::int32_t found = 0;
  for (std::uint32_t rest = marks; rest; rest &= rest - 1) ++found;
  counts.of_thread[thread] = found;
}

VRAMKIT_ANYWHERE inline void list_groups(ListCounts& counts, int thread) {
  if (thread >= kListGroups) return;
  constexpr int each = kThreads / kListGroups;
  std::int32_t sum = 0;
  for (int i = 0; i < each; ++i) sum += counts.of_thread[thread * each + i];
  counts.of_group[thread] = sum;
}

// Returns how many columns are listed after this step; `before` it, as many as were.
VRAMKIT_ANYWHERE inline std::int32_t list_write(const SettleJob& job, std::int64_t first,
                                                std::int32_t before, std::uint32_t marks,
                                                const ListCounts& counts, int thread) {
  constexpr int each = kThreads / kListGroups;
  std::int32_t to = before, after = before;
  for (int i = 0; i < kListGroups; ++i) {
    if (i == thread / each) to = after;
    after += counts.of_group[i];
  }
  for (int i = thread / each * each; i < thread; ++i) to += counts.of_thread[i];
  VRAMKIT_UNROLLED
  for (int i = 0; i < 16; ++i) {
    if (marks >> i & 1u) job.list[to++] = static_cast<std::int32_t>(first + thread * 16 + i);
  }
  if (thread == 0 && first + kListCols >= job.cols) *job.count = after;
  return after;
}

// How sums become outputs, whoever made them.
struct Output {
  const float* absmax = nullptr;
  const std::uint8_t* scales = nullptr;  // of the weight's rows: bits of float32, at any address
  const void* bias = nullptr;
  Element bias_type = Element::f32;
  // LLM.int8: the unquantized x, the weight's codes, the list of columns and its length. Null: no.
  const void* values = nullptr;
  std::int64_t values_stride = 0;
  const std::int8_t* weight = nullptr;
  std::int64_t weight_stride = 0;
  const std::int32_t* outliers = nullptr;
  const std::int32_t* outlier_count = nullptr;
  cpu::Activation activation = cpu::Activation::none;
  Element type = Element::f32;  // of `out` and of `values`
  void* out = nullptr;
  std::int64_t out_stride = 0;
  float* again = nullptr;  // a second place, where `type` is float32
  std::int64_t again_stride = 0;
  bool exact = false;  // `out` is int32 and gets the sums
};

// The sum over the outlier columns, in their order.
VRAMKIT_ANYWHERE inline float outlier_sum(const Output& to, std::int64_t i, std::int64_t n) {
  float rest = 0.0f;
  const std::int32_t count = *to.outlier_count;
  for (std::int32_t j = 0; j < count; ++j) {
    const std::int64_t k = to.outliers[j];
    rest = fused(element_at(to.values, to.type, i * to.values_stride + k),
                 static_cast<float>(to.weight[n * to.weight_stride + k]), rest);
  }
  return rest;
}

// A product before bias and activation.
VRAMKIT_ANYWHERE inline float scaled(std::int32_t sum, float scale, float row_scale,
                                     bool has_outliers, float rest) {
  const float value = static_cast<float>(sum) * scale * row_scale;
  return has_outliers ? value + rest * scale : value;
}

// The product of row i of x and row n of the weight, before the activation.
VRAMKIT_ANYWHERE inline float scaled(const Output& to, std::int32_t sum, std::int64_t i,
                                     std::int64_t n) {
  const bool has_outliers = to.outliers && *to.outlier_count > 0;
  const float value = scaled(sum, read_at<float>(to.scales, n), to.absmax[i] / 127.0f, has_outliers,
                             has_outliers ? outlier_sum(to, i, n) : 0.0f);
  return to.bias ? value + element_at(to.bias, to.bias_type, n) : value;
}

// What torch's product of the codes gave, scaled: tiles of kScaleRows x kScaleCols, a thread two
// columns of some rows. Outlier columns come by shared memory, kOutliers at a time, so that the
// weight's bytes, a row apart, are gathered once per tile.
struct ScaleJob {
  const std::int32_t* sums = nullptr;  // [rows, cols], rows one after the other
  std::int64_t rows = 0, cols = 0;     // cols: of the output, even
  std::int64_t first_row = 0;          // of x and `out`, that the sums begin with
  Output to;
};
inline constexpr int kScaleRows = 32, kScaleCols = 128, kOutliers = 16;
inline constexpr int kScaleEach = kScaleRows * kScaleCols / 2 / kThreads;  // rows of a thread
struct ScaleTile {
  float weight[kOutliers][kScaleCols];
  float value[kOutliers][kScaleRows];
};
struct ScaleSums {
  float rest[kScaleEach][2];
};
struct TilePlace {
  std::int64_t row, col;
};

constexpr std::int64_t scale_blocks(std::int64_t rows, std::int64_t cols) {
  return (rows + kScaleRows - 1) / kScaleRows * ((cols + kScaleCols - 1) / kScaleCols);
}
VRAMKIT_ANYWHERE inline TilePlace scale_place(const ScaleJob& job, std::int64_t block) {
  const std::int64_t across = (job.cols + kScaleCols - 1) / kScaleCols;
  const std::int64_t down = quotient(block, across);
  return {down * kScaleRows, (block - down * across) * kScaleCols};
}

VRAMKIT_ANYWHERE inline void scale_stage(const ScaleJob& job, TilePlace at, std::int32_t first,
                                         std::int32_t count, ScaleTile& tile, int thread) {
  const Output& to = job.to;
  for (int i = thread; i < kOutliers * kScaleCols; i += kThreads) {
    const int j = i / kScaleCols;
    const std::int64_t n = at.col + i % kScaleCols;
    if (first + j < count && n < job.cols) {
      tile.weight[j][i % kScaleCols] =
          static_cast<float>(to.weight[n * to.weight_stride + to.outliers[first + j]]);
    }
  }
  for (int i = thread; i < kOutliers * kScaleRows; i += kThreads) {
    const int j = i / kScaleRows;
    const std::int64_t row = at.row + i % kScaleRows;
    if (first + j < count && row < job.rows) {
      tile.value[j][i % kScaleRows] = element_at(
          to.values, to.type, (job.first_row + row) * to.values_stride + to.outliers[first + j]);
    }
  }
}

VRAMKIT_ANYWHERE inline void scale_add(std::int32_t first, std::int32_t count,
                                       const ScaleTile& tile, ScaleSums& sums, int thread) {
  const int col = thread % (kScaleCols / 2) * 2, row = thread / (kScaleCols / 2) * kScaleEach;
  const int most = count - first < kOutliers ? count - first : kOutliers;
  for (int j = 0; j < most; ++j) {
    VRAMKIT_UNROLLED
    for (int i = 0; i < kScaleEach; ++i) {
      VRAMKIT_UNROLLED
      for (int c = 0; c < 2; ++c) {
        sums.rest[i][c] = fused(tile.value[j][row + i], tile.weight[j][col + c], sums.rest[i][c]);
      }
    }
  }
}

template <Element E>
VRAMKIT_ANYWHERE inline void scale_finish(const ScaleJob& job, TilePlace at, bool has_outliers,
                                          const ScaleSums& sums, int thread) {
  const Output& to = job.to;
  const std::int64_t n = at.col + thread % (kScaleCols / 2) * 2;
  if (n >= job.cols) return;
  const int first = thread / (kScaleCols / 2) * kScaleEach;
  const float scale[2] = {read_at<float>(to.scales, n), read_at<float>(to.scales, n + 1)};
  const float bias[2] = {to.bias ? element_at(to.bias, to.bias_type, n) : 0.0f,
                         to.bias ? element_at(to.bias, to.bias_type, n + 1) : 0.0f};
  VRAMKIT_UNROLLED
  for (int i = 0; i < kScaleEach; ++i) {
    const std::int64_t row = at.row + first + i;
    if (row >= job.rows) continue;
    const std::int64_t x = job.first_row + row;
    std::uint8_t raw[8];
    load_bytes<8>(reinterpret_cast<const std::uint8_t*>(job.sums + row * job.cols + n), 8, raw);
    std::int32_t sum[2];
    memcpy(sum, raw, 8);
    const float row_scale = to.absmax[x] / 127.0f;
    float value[2];
    VRAMKIT_UNROLLED
    for (int c = 0; c < 2; ++c) {
      value[c] = scaled(sum[c], scale[c], row_scale, has_outliers, sums.rest[i][c]);
      if (to.bias) value[c] = value[c] + bias[c];
      value[c] = activate(to.activation, value[c]);
    }
    if constexpr (E == Element::f32) {
      memcpy(raw, value, 8);
      auto* out = static_cast<float*>(to.out) + x * to.out_stride + n;
      store_bytes<8>(reinterpret_cast<std::uint8_t*>(out), 8, raw);
    } else {
      std::uint16_t half[2];
      VRAMKIT_UNROLLED
      for (int c = 0; c < 2; ++c) {
        half[c] = E == Element::bf16 ? float_to_bf16(value[c]) : float_to_half(value[c]);
      }
      memcpy(raw, half, 4);
      auto* out = static_cast<std::uint16_t*>(to.out) + x * to.out_stride + n;
      store_bytes<4>(reinterpret_cast<std::uint8_t*>(out), 4, raw);
    }
  }
}

}  // namespace vramkit::cuda::int8
