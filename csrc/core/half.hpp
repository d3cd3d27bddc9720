// Scalar conversions between float and the 16- and 8-bit floating types, rounding to nearest even.
// These are the reference that every vector kernel is tested against.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/portable.hpp"

namespace vramkit {

VRAMKIT_ANYWHERE inline float bf16_to_float(std::uint16_t h) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(h) << 16);
}

VRAMKIT_ANYWHERE inline std::uint16_t float_to_bf16(float f) {
  const auto u = std::bit_cast<std::uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// A small binary float with E exponent and M mantissa bits, decoded exactly.
// `finite_only`: no infinity, only the all-ones code is NaN (OCP e4m3fn).
template <int E, int M, bool finite_only>
VRAMKIT_ANYWHERE inline float small_to_float(std::uint32_t code) {
  constexpr int bias = (1 << (E - 1)) - 1;
  constexpr float smallest_subnormal = 1.0f / static_cast<float>(1 << (bias + M - 1));
  const std::uint32_t mantissa = code & ((1u << M) - 1);
  const std::uint32_t exponent = (code >> M) & ((1u << E) - 1);
  const bool negative = (code >> (E + M)) & 1u;
  float value;
  if (finite_only && exponent == (1u << E) - 1 && mantissa == (1u << M) - 1) {
    value = std::numeric_limits<float>::quiet_NaN();
  } else if (!finite_only && exponent == (1u << E) - 1) {
    // NaN keeps its payload and becomes quiet, as processors convert it.
    value = mantissa ? std::bit_cast<float>(0x7fc00000u | (mantissa << (23 - M)))
                     : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    value = static_cast<float>(mantissa) * smallest_subnormal;
  } else {
    value = std::bit_cast<float>((exponent + 127u - bias) << 23 | mantissa << (23 - M));
  }
  return negative ? -value : value;
}

// Rounds to nearest even. What overflows becomes: the largest finite value where `saturate`, else
// infinity (or NaN where the type has none). NaN stays NaN.
template <int E, int M, bool finite_only>
VRAMKIT_ANYWHERE inline std::uint32_t float_to_small(float f, bool saturate) {
  constexpr int bias = (1 << (E - 1)) - 1;
  constexpr std::uint32_t exponent_mask = ((1u << E) - 1) << M;
  constexpr std::uint32_t nan = exponent_mask | (finite_only ? (1u << M) - 1 : 1u << (M - 1));
  constexpr std::uint32_t largest = finite_only ? nan - 1 : exponent_mask - 1;
  constexpr float smallest_normal = 2.0f / static_cast<float>(1 << bias);
  constexpr auto per_subnormal = static_cast<float>(1 << (bias + M - 1));
  const auto bits = std::bit_cast<std::uint32_t>(f);
  const std::uint32_t sign = (bits >> 31) << (E + M);
  const float a = std::fabs(f);
  if (std::isnan(f)) return sign | nan | (finite_only ? 0u : (bits & 0x7fffffu) >> (23 - M));
  std::uint32_t code;
  if (std::isinf(f)) {
    code = largest + 1;
  } else if (a < smallest_normal) {  // subnormal: a multiple of 2^(1 - bias - M)
    code = static_cast<std::uint32_t>(std::nearbyint(a * per_subnormal));
  } else {
    std::uint32_t u = bits & 0x7fffffffu;
    constexpr int drop = 23 - M;
    u += (1u << (drop - 1)) - 1 + ((u >> drop) & 1u);
    code = (u >> drop) - (static_cast<std::uint32_t>(127 - bias) << M);
  }
  if (code > largest) code = saturate ? largest : (finite_only ? nan : exponent_mask);
  return sign | code;
}

VRAMKIT_ANYWHERE inline float fp16_to_float(std::uint16_t h) {
  return small_to_float<5, 10, false>(h);
}
VRAMKIT_ANYWHERE inline std::uint16_t float_to_fp16(float f) {
  return static_cast<std::uint16_t>(float_to_small<5, 10, false>(f, false));
}
VRAMKIT_ANYWHERE inline float e4m3_to_float(std::uint8_t c) {
  return small_to_float<4, 3, true>(c);
}
VRAMKIT_ANYWHERE inline float e5m2_to_float(std::uint8_t c) {
  return small_to_float<5, 2, false>(c);
}
VRAMKIT_ANYWHERE inline std::uint8_t float_to_e4m3(float f, bool saturate = true) {
  return static_cast<std::uint8_t>(float_to_small<4, 3, true>(f, saturate));
}
VRAMKIT_ANYWHERE inline std::uint8_t float_to_e5m2(float f, bool saturate = true) {
  return static_cast<std::uint8_t>(float_to_small<5, 2, false>(f, saturate));
}

}  // namespace vramkit
