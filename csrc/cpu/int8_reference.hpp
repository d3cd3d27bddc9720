// The scalar reference of the int8 kernels; reference.cpp includes it where `load`, `store` and
// `read` are.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/int8_encode.hpp"
#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

void quantize_int8(const void* x, DType type, std::int64_t cols, std::int64_t stride,
                   float threshold, std::uint8_t* columns, Int8Rows out, std::int64_t begin,
                   std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const auto value = [&](std::int64_t k) { return load(x, type, r * stride + k); };
    const auto is_outlier = [&](float v) { return threshold > 0.0f && std::fabs(v) >= threshold; };
    float absmax = 0.0f;
    for (std::int64_t k = 0; k < cols; ++k) {
      const float v = value(k);
      if (is_outlier(v)) {
        __atomic_store_n(&columns[k], std::uint8_t{1}, __ATOMIC_RELAXED);
      } else if (!std::isfinite(v)) {
        absmax = std::numeric_limits<float>::quiet_NaN();
      } else if (std::fabs(v) > absmax) {  // never, once it is NaN
        absmax = std::fabs(v);
      }
    }
    const float factor = std::isnan(absmax) ? 0.0f : int8_factor(absmax);
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < cols; ++k) {
      const float v = value(k);
      float q = 0.0f;
      if (!std::isnan(absmax) && !is_outlier(v)) {
        q = std::min(std::max(std::nearbyintf(v * factor), -127.0f), 127.0f);
      }
      out.codes[r * out.stride + k / kInt8Depth * out.block + k % kInt8Depth] =
          static_cast<std::int8_t>(q);
      sum += static_cast<std::int32_t>(q);
    }
    out.absmax[r] = absmax;
    out.sums[r] = sum;
  }
}

void sums_int8(const std::int8_t* x, std::int64_t cols, std::int64_t stride, std::int32_t* sums,
               std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    sums[r] = 0;
    for (std::int64_t k = 0; k < cols; ++k) sums[r] += x[r * stride + k];
  }
}

float activate(Activation activation, float v) {
  const double x = v;
  switch (activation) {
    case Activation::none:
      break;
    case Activation::gelu:
      return static_cast<float>(0.5 * x * std::erfc(-x * 0.70710678118654752440));
    case Activation::gelu_tanh:
      return static_cast<float>(
          x / (1.0 + std::exp(-2.0 * 0.79788456080286535588 * (x + 0.044715 * x * x * x))));
    case Activation::silu:
      return static_cast<float>(x / (1.0 + std::exp(-x)));
  }
  return v;
}

void product_int8(const Int8Product& job, std::int64_t row, std::int64_t row_end,
                  std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = row; i < row_end; ++i) {
    const std::int8_t* row_codes = job.x + i * job.x_stride;
    const auto x = [&](std::int64_t k) {
      return std::int32_t{row_codes[k / kInt8Depth * job.x_block + k % kInt8Depth]};
    };
    for (std::int64_t n = begin; n < end; ++n) {
      const std::int8_t* w = job.weight + n * job.weight_stride;
      std::int32_t sum = 0;
      for (std::int64_t k = 0; k < job.cols; ++k) sum += x(k) * w[k];
      const std::int64_t at = i * job.out_stride + n;
      if (job.exact) {
        static_cast<std::int32_t*>(job.out)[at] = sum;
        continue;
      }
      const float scale = read<float>(job.weight_scales, n);
      float value = static_cast<float>(sum) * scale * (job.x_absmax[i] / 127.0f);
      if (job.outlier_count) {
        float rest = 0.0f;
        for (std::int64_t j = 0; j < job.outlier_count; ++j) {
          const std::int64_t k = job.outliers[j];
          rest += load(job.values, job.type, i * job.values_stride + k) * static_cast<float>(w[k]);
        }
        value += rest * scale;
      }
      if (job.bias) value += job.bias[n];
      store(job.out, job.type, at, activate(job.activation, value));
    }
  }
}

std::int64_t spin_int8(std::int64_t rounds) {
  volatile std::int8_t x = 3;
  std::int32_t sum = 0;
  for (std::int64_t r = 0; r < rounds; ++r) sum += std::int32_t{x} * x;
  volatile std::int32_t sink = sum;
  (void)sink;
  return rounds;
}

}  // namespace
}  // namespace vramkit::cpu
