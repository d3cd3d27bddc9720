// exp, sigmoid, tanh and the fused activations as the CPU's vector units have them
// (csrc/cpu/vector_math.hpp says how they are made and how exact they are): the same operations in
// the same order, each rounded once, so that a GPU gives those units' bits. NaN gives some NaN.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/portable.hpp"
#include "cpu/int8.hpp"
#include "cuda/decode.hpp"

namespace vramkit::cuda::int8 {

VRAMKIT_ANYWHERE inline float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// To the nearest integer, ties to even, for what an int holds; NaN gives any number.
VRAMKIT_ANYWHERE inline std::int32_t nearest(float x) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x);
#else
  return is_nan(x) ? 0 : static_cast<std::int32_t>(std::nearbyint(x));
#endif
}

// The second one where either is NaN, as vector instructions of x86 have it.
VRAMKIT_ANYWHERE inline float larger(float a, float b) { return a > b ? a : b; }
VRAMKIT_ANYWHERE inline float smaller(float a, float b) { return a < b ? a : b; }

template <int count>
VRAMKIT_ANYWHERE inline float horner(float x, const float (&c)[count]) {  // highest power first
  float y = c[0];
  VRAMKIT_UNROLLED
  for (int i = 1; i < count; ++i) y = fused(y, x, c[i]);
  return y;
}

VRAMKIT_ANYWHERE inline float two_to(std::int32_t n) {
  return float_of(static_cast<std::uint32_t>(n + 127) << 23);
}

VRAMKIT_ANYWHERE inline float exp_less_one(float r) {
  constexpr float c[] = {1.978926592e-04f, 1.394575287e-03f, 8.333503751e-03f,
                         4.166628032e-02f, 1.666666582e-01f, 0.5f};
  return fused(r * r, horner(r, c), r);
}

// x less n times ln 2, in two parts.
VRAMKIT_ANYWHERE inline float reduced(float x, std::int32_t n) {
  const auto k = static_cast<float>(n);
  return fused(k, 2.12194440e-4f, fused(k, -0.693359375f, x));
}

VRAMKIT_ANYWHERE inline float exp(float x) {
  x = larger(-105.0f, smaller(90.0f, x));
  const std::int32_t n = nearest(x * 1.44269504f);
  const float p = exp_less_one(reduced(x, n)) + 1.0f;
  const std::int32_t half = n >> 1;
  return p * two_to(half) * two_to(n - half);
}

VRAMKIT_ANYWHERE inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

VRAMKIT_ANYWHERE inline float tanh(float x) {
  const std::uint32_t sign = bits_of(x) & 0x80000000u;
  const float a = float_of(bits_of(x) & 0x7fffffffu);
  const float z = larger(-40.0f, a * -2.0f);
  const std::int32_t n = nearest(z * 1.44269504f);
  const float scale = two_to(n);
  const float e = fused(scale, exp_less_one(reduced(z, n)), scale - 1.0f);
  return float_of(bits_of(-e / (2.0f + e)) | sign);
}

VRAMKIT_ANYWHERE inline float gelu(float x) {
  const float a = float_of(bits_of(x) & 0x7fffffffu);
  const float z = a * 0.707106781f;
  const float t = 1.0f / fused(z, 0.5f, 1.0f);
  constexpr float c[] = {-0.126550825f, 0.882468406f, -2.559873574f, 3.905368011f,
                         -3.24539881f,  1.481192596f, -0.636541898f, 0.205632416f,
                         0.357903111f,  1.001359383f, -1.265558809f};
  const float lower = 0.5f * t * exp(fused(a * -0.5f, a, horner(t, c)));
  const float phi = x < 0.0f ? lower : 1.0f - lower;
  return larger(-1e30f, x) * phi;
}

VRAMKIT_ANYWHERE inline float gelu_tanh(float x) {
  const float limited = larger(-1e12f, x);
  const float u = limited * fused(limited * limited, 0.044715f, 1.0f);
  return limited * sigmoid(u * 1.595769122f);
}

VRAMKIT_ANYWHERE inline float silu(float x) { return larger(-1e30f, x) * sigmoid(x); }

VRAMKIT_ANYWHERE inline float activate(cpu::Activation activation, float v) {
  switch (activation) {
    case cpu::Activation::gelu:
      return gelu(v);
    case cpu::Activation::gelu_tanh:
      return gelu_tanh(v);
    case cpu::Activation::silu:
      return silu(v);
    default:
      return v;
  }
}

}  // namespace vramkit::cuda::int8
