// What int8 rows are multiplied with before rounding; shared by every unit, as encode.hpp is, and
// by the CUDA kernels.
#pragma once
#include <cfloat>

#include "core/portable.hpp"

namespace vramkit::cpu {
namespace {

// 127 * (1 / absmax), in this order: bitsandbytes' codes come from this product (torch divides a
// number by a tensor so), and differ by one from those of 127 / absmax now and then.
[[maybe_unused]] VRAMKIT_ANYWHERE inline float int8_factor(float absmax) {
  const float factor = 1.0f / (absmax < FLT_MIN ? FLT_MIN : absmax) * 127.0f;
  return factor > FLT_MAX ? FLT_MAX : factor;
}

}  // namespace
}  // namespace vramkit::cpu
