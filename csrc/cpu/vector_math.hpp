// exp, sigmoid, tanh and the error function's complement on vectors, and the activations made of
// them. Polynomials are minimax fits; errors (against float64) are what the tests allow.
#pragma once
#include "cpu/vector_common.hpp"

namespace vramkit::cpu {
namespace {

template <int count>
F horner(F x, const float (&c)[count]) {  // the highest power first
  F y = Simd::set1(c[0]);
  for (int i = 1; i < count; ++i) y = Simd::fma(y, x, Simd::set1(c[i]));
  return y;
}

inline F two_to(I n) { return (F)((n + 127) << 23); }

// exp(r) - 1 for |r| <= ln(2) / 2.
inline F exp_less_one(F r) {
  constexpr float c[] = {1.978926592e-04f, 1.394575287e-03f, 8.333503751e-03f,
                         4.166628032e-02f, 1.666666582e-01f, 0.5f};
  return Simd::fma(r * r, horner(r, c), r);
}

// exp(x), within 1.5 ulp; infinity above 88.72, 0 far below, subnormal results included.
[[maybe_unused]] inline F exp(F x) {
  x = Simd::max(Simd::set1(-105.0f), Simd::min(Simd::set1(90.0f), x));  // NaN stays
  const I n = Simd::to_int_even(x * Simd::set1(1.44269504f));
  const F k = Simd::to_float(n);
  F r = Simd::fma(k, Simd::set1(-0.693359375f), x);  // ln 2 in two parts, the first one exact
  r = Simd::fma(k, Simd::set1(2.12194440e-4f), r);
  const F p = exp_less_one(r) + Simd::set1(1.0f);
  const I half = n >> 1;
  return p * two_to(half) * two_to(n - half);
}

// 1 / (1 + exp(-x)), within 3 ulp down to x = -87.
[[maybe_unused]] inline F sigmoid(F x) {
  const F one = Simd::set1(1.0f);
  return one / (one + exp(-x));
}

// tanh(x) = -e / (2 + e) with e = exp(-2 |x|) - 1, x's sign put back: within 4 ulp, near zero too,
// because the 1 is taken from the power of two before exp's polynomial is added.
[[maybe_unused]] inline F tanh(F x) {
  const I sign = (I)x & static_cast<std::int32_t>(0x80000000u);
  const F a = (F)((I)x & 0x7fffffff);
  const F z = Simd::max(Simd::set1(-40.0f), a * Simd::set1(-2.0f));  // NaN stays
  const I n = Simd::to_int_even(z * Simd::set1(1.44269504f));
  const F k = Simd::to_float(n);
  F r = Simd::fma(k, Simd::set1(-0.693359375f), z);
  r = Simd::fma(k, Simd::set1(2.12194440e-4f), r);
  const F scale = two_to(n);
  const F e = Simd::fma(scale, exp_less_one(r), scale - Simd::set1(1.0f));
  return (F)((I)(-e / (Simd::set1(2.0f) + e)) | sign);
}

// x Phi(x) with Phi(x) = erfc(-x / sqrt 2) / 2: no cancellation for negative x. erfc(z) is
// t exp(-z^2 + P(t)) with t = 1 / (1 + z / 2), P fitted to 1e-8 for z < 11.
[[maybe_unused]] inline F gelu(F x) {
  const F a = (F)((I)x & 0x7fffffff);
  const F one = Simd::set1(1.0f);
  const F z = a * Simd::set1(0.707106781f);
  const F t = one / Simd::fma(z, Simd::set1(0.5f), one);
  constexpr float c[] = {-0.126550825f, 0.882468406f, -2.559873574f, 3.905368011f,
                         -3.24539881f,  1.481192596f, -0.636541898f, 0.205632416f,
                         0.357903111f,  1.001359383f, -1.265558809f};
  const F lower = Simd::set1(0.5f) * t * exp(Simd::fma(a * Simd::set1(-0.5f), a, horner(t, c)));
  const F phi = x < 0.0f ? lower : one - lower;
  // Not -inf * 0 for -inf: the limit, as from below.
  const F limited = Simd::max(Simd::set1(-1e30f), x);
  return limited * phi;
}

[[maybe_unused]] inline F gelu_tanh(F x) {
  const F limited = Simd::max(Simd::set1(-1e12f), x);
  const F u = limited * Simd::fma(limited * limited, Simd::set1(0.044715f), Simd::set1(1.0f));
  return limited * sigmoid(u * Simd::set1(1.595769122f));
}

[[maybe_unused]] inline F silu(F x) { return Simd::max(Simd::set1(-1e30f), x) * sigmoid(x); }

}  // namespace
}  // namespace vramkit::cpu
