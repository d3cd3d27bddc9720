// Rounding with feedback (Feedback in kernels.hpp): the same codes, bit for bit, as the scalar
// reference. See vector_common.hpp for how units include this.
//
// A tile of rows is held transposed, columns in the order of their encoding, so that one vector is
// one column of neighbouring rows: encoding and the sums run over rows, and no sum is ever split.
#pragma once
#include "cpu/vector_common.hpp"
#include "cpu/vector_quantize.hpp"

namespace vramkit::cpu {
namespace {

constexpr int kTileVectors = 4;
constexpr std::int64_t kTileRows = kTileVectors * kLanes;
// Columns whose sums are formed together: with four vectors of rows each they fill half of the
// registers of AVX-512, and those of AVX2.
constexpr int kSumColumns = kLanes == 16 ? 4 : 2;

// Encoders with their decoders: code(target, factor, zero), value(code, scale, zero).

struct FeedbackAffine4 {
  I code(F target, F factor, F zero) const {
    return Simd::to_int_even(affine4_level(target, factor, zero));
  }
  F value(I code, F scale, F zero) const { return (Simd::to_float(code) - zero) * scale; }
};

struct FeedbackInt8 {
  Symmetric encode;
  I code(F target, F factor, F) const { return encode(target * factor); }
  F value(I code, F scale, F) const { return Simd::to_float(code) * scale; }
};

struct FeedbackCodebook4 {
  Midpoint4 encode;
  Simd::Table16 table;
  I code(F target, F factor, F) const { return encode(target * factor); }
  F value(I code, F scale, F) const { return Simd::lookup(table, code) * scale; }
};

template <class Encode>
struct FeedbackCodebook8 {
  Encode encode;
  const float* table;
  I code(F target, F factor, F) const { return encode(target * factor); }
  F value(I code, F scale, F) const { return Simd::gather(table, code) * scale; }
};

template <class Coder>
class FeedbackTile {
 public:
  FeedbackTile(const Feedback& job, const Coder& coder)
      : job_(job),
        coder_(coder),
        x_(job.cols * kTileRows),
        error_(job.cols * kTileRows),
        scale_(job.groups * kTileRows),
        factor_(job.groups * kTileRows),
        zero_(job.groups * kTileRows) {}

  void run(std::int64_t begin, std::int64_t rows) {
    fetch(begin, rows);
    for (std::int64_t first = 0; first < job_.cols; first += kFeedbackBlock) {
      const std::int64_t last = smaller(first + kFeedbackBlock, job_.cols);
      std::int64_t k = first;
      for (; k + kSumColumns <= last; k += kSumColumns) add_outside<kSumColumns>(k, first, last);
      for (; k < last; ++k) add_outside<1>(k, first, last);
      for (k = first; k < last; ++k) encode(k, first, last, begin, rows);
    }
  }

 private:
  static float* at(const Scratch<float>& all, std::int64_t row) {
    return all.get() + row * kTileRows;
  }
  std::int64_t group_of(std::int64_t k) const { return job_.order[k] / job_.group; }

  // Rows past the end of the matrix are zeros with a scale of one.
  void fetch(std::int64_t begin, std::int64_t rows) {
    const std::int64_t cols = job_.cols;
    for (std::int64_t g = 0; g < job_.groups; ++g) {
      for (std::int64_t r = 0; r < kTileRows; ++r) {
        const std::int64_t from = (begin + r) * job_.groups + g;
        at(scale_, g)[r] = r < rows ? job_.scales[from] : 1.0f;
        at(factor_, g)[r] = inverse_scale(at(scale_, g)[r]);
        at(zero_, g)[r] = r < rows && job_.zeros ? job_.zeros[from] : 0.0f;
      }
    }
    for (std::int64_t k = 0; k < cols; ++k) {
      const std::int64_t col = job_.order[k];
      for (std::int64_t r = 0; r < kTileRows; ++r) {
        at(x_, k)[r] = r < rows ? job_.x[(begin + r) * cols + col] : 0.0f;
      }
      const float* scale = at(scale_, group_of(k));
      const float* zero = at(zero_, group_of(k));
      for (std::int64_t r = 0; r < kTileRows; r += kLanes) {
        F error = Simd::set1(0.0f);
        if (job_.resume) {
          alignas(64) std::int32_t codes[kLanes] = {};
          for (std::int64_t i = 0; i < kLanes && r + i < rows; ++i) {
            const std::uint8_t code = job_.codes[(begin + r + i) * cols + col];
            codes[i] = job_.format->family == Family::affine && job_.format->bits == 8
                           ? static_cast<std::int8_t>(code)
                           : code;
          }
          I code;
          std::memcpy(&code, codes, sizeof(code));
          error = Simd::load(at(x_, k) + r) -
                  coder_.value(code, Simd::load(scale + r), Simd::load(zero + r));
        }
        Simd::store(at(error_, k) + r, error);
      }
    }
  }

  // target_ of C columns from k: x and what the columns outside the block [first, last) add to it.
  template <int C>
  void add_outside(std::int64_t k, std::int64_t first, std::int64_t last) {
    F sum[C][kTileVectors];
    for (int c = 0; c < C; ++c) {
      for (int v = 0; v < kTileVectors; ++v) sum[c][v] = Simd::load(at(x_, k + c) + v * kLanes);
    }
    const float* coefficients = job_.coefficients + k * job_.cols;
    auto add = [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t j = from; j < to; ++j) {
        F error[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) error[v] = Simd::load(at(error_, j) + v * kLanes);
        for (int c = 0; c < C; ++c) {
          const F coefficient = Simd::set1(coefficients[c * job_.cols + j]);
          for (int v = 0; v < kTileVectors; ++v) {
            sum[c][v] = Simd::fma(coefficient, error[v], sum[c][v]);
          }
        }
      }
    };
    add(0, first);
    if (job_.resume) add(last, job_.cols);
    for (int c = 0; c < C; ++c) {
      for (int v = 0; v < kTileVectors; ++v) {
        Simd::store(target_ + (k + c - first) * kTileRows + v * kLanes, sum[c][v]);
      }
    }
  }

  void encode(std::int64_t k, std::int64_t first, std::int64_t last, std::int64_t begin,
              std::int64_t rows) {
    const float* coefficients = job_.coefficients + k * job_.cols;
    const std::int64_t group = group_of(k);
    std::uint8_t codes[kTileRows];
    for (int v = 0; v < kTileVectors; ++v) {
      F target = Simd::load(target_ + (k - first) * kTileRows + v * kLanes);
      auto add = [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t j = from; j < to; ++j) {
          target = Simd::fma(Simd::set1(coefficients[j]), Simd::load(at(error_, j) + v * kLanes),
                             target);
        }
      };
      add(first, k);
      if (job_.resume) add(k + 1, last);
      const F zero = Simd::load(at(zero_, group) + v * kLanes);
      const I code = coder_.code(target, Simd::load(at(factor_, group) + v * kLanes), zero);
      const F value = coder_.value(code, Simd::load(at(scale_, group) + v * kLanes), zero);
      Simd::store(at(error_, k) + v * kLanes, Simd::load(at(x_, k) + v * kLanes) - value);
      Simd::store_bytes(codes + v * kLanes, code);
    }
    const std::int64_t col = job_.order[k];
    for (std::int64_t r = 0; r < rows; ++r) job_.codes[(begin + r) * job_.cols + col] = codes[r];
  }

  const Feedback& job_;
  const Coder& coder_;
  Scratch<float> x_, error_;              // [cols][kTileRows], columns in order
  Scratch<float> scale_, factor_, zero_;  // [groups][kTileRows]
  float target_[kFeedbackBlock * kTileRows];
};

template <class Coder>
void run_feedback(const Feedback& job, const Coder& coder, std::int64_t begin, std::int64_t end) {
  FeedbackTile<Coder> tile(job, coder);
  for (std::int64_t r = begin; r < end; r += kTileRows) {
    tile.run(r, smaller(kTileRows, end - r));
  }
}

void feedback(const Feedback& job, std::int64_t begin, std::int64_t end) {
  const Format& format = *job.format;
  const float* table = format.table.data();
  switch (format.encoder) {
    case Encoder::midpoint:
      if (format.bits == 4) {
        return run_feedback(job, FeedbackCodebook4{Midpoint4(*job.sorted), Simd::table(table)},
                            begin, end);
      }
      return run_feedback(job, FeedbackCodebook8<Midpoint8>{Midpoint8(*job.sorted), table}, begin,
                          end);
    case Encoder::e4m3:
      return run_feedback(job, FeedbackCodebook8<Small<3, 7, 0x7e>>{{}, table}, begin, end);
    case Encoder::e5m2:
      return run_feedback(job, FeedbackCodebook8<Small<2, 15, 0x7b>>{{}, table}, begin, end);
    case Encoder::symmetric:
      return run_feedback(job, FeedbackInt8{}, begin, end);
    case Encoder::searched:
      if (format.bits == 8) return run_feedback(job, FeedbackInt8{}, begin, end);
      return run_feedback(job, FeedbackAffine4{}, begin, end);
    case Encoder::fp16:
    case Encoder::bf16:
      return;  // no scale and no grid worth it: the operator refuses them
  }
}

}  // namespace
}  // namespace vramkit::cpu
