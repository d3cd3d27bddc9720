// What the operators of int8 products and of recurrent layers share on CUDA: checked arguments, and
// the rounded rows of x in a workspace.
#pragma once
#include <optional>

#include "cuda/int8_launch.hpp"
#include "cuda/ops/common.hpp"

namespace vramkit::ops {

constexpr std::int64_t up16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Rounded rows of [rows, cols] in memory, in this order: codes, absmax, and with a threshold the
// list of outlier columns with its length, and the marks. (python/vramkit/_operators_int8.py
// allocates as many bytes.)
struct RoundedRows {
  RoundedRows(void* memory, std::int64_t row_count, std::int64_t col_count, bool outliers)
      : rows(row_count), cols(col_count), stride(up16(col_count)) {
    auto* at = static_cast<std::uint8_t*>(memory);
    codes = reinterpret_cast<std::int8_t*>(at);
    at += rows * stride;
    absmax = reinterpret_cast<float*>(at);
    at += up16(rows * 4);
    if (!outliers) return;
    list = reinterpret_cast<std::int32_t*>(at);
    count = list + cols;
    at += up16(cols * 4 + 4);
    columns = at;
  }
  static std::int64_t bytes(std::int64_t rows, std::int64_t cols, bool outliers) {
    return rows * up16(cols) + up16(rows * 4) + (outliers ? up16(cols * 4 + 4) + cols : 0);
  }

  std::int64_t rows, cols, stride;
  std::int8_t* codes = nullptr;
  float* absmax = nullptr;
  std::int32_t *list = nullptr, *count = nullptr;
  std::uint8_t* columns = nullptr;
};

// Rows of x to multiply, as they are.
struct FloatRows {
  const void* data = nullptr;
  cuda::Element type = cuda::Element::f32;
  std::int64_t rows = 0, cols = 0, stride = 0;
};

// A stored int8 weight of [rows, cols], checked, on the device of `like`.
struct DeviceInt8 {
  DeviceInt8(const Tensor& code_bytes, const Tensor& scale_bytes,
             const std::optional<Tensor>& added, std::int64_t rows, std::int64_t cols,
             const Tensor& like);
  const std::int8_t* codes;
  const std::uint8_t* scales;
  const void* bias = nullptr;  // of `bias_type`
  cuda::Element bias_type = cuda::Element::f32;
  std::int64_t rows, cols;
};

void check_rows(const Tensor& tensor, ScalarType type, const Tensor& like, const char* name);
void check_workspace(const Tensor& workspace, std::int64_t bytes, const Tensor& like);

void round_rows(const FloatRows& x, double threshold, const RoundedRows& to, void* stream);

// The product of rounded rows with a weight; where it goes is still to be set.
cuda::int8::ProductJob product_job(const FloatRows& x, const RoundedRows& rounded,
                                   const DeviceInt8& weight);

}  // namespace vramkit::ops
