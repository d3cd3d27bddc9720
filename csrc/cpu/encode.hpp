// Arithmetic of the encoders that every instruction-set unit shares, so that all of them write the
// same bits. Everything here has internal linkage: each unit compiles its own copy under its own
// flags. No operation may be contracted or reordered (the build passes -ffp-contract=off).
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/half.hpp"

namespace vramkit::cpu {
namespace {

// What multiplies x before rounding, for the group's absmax and the largest code value.
[[maybe_unused]] inline float encode_factor(float absmax, float most) {
  // bitsandbytes' own clamp: its codes for (nearly) empty blocks depend on it.
  if (most == 1.0f) return 1.0f / (absmax < 1e-38f ? 1e-38f : absmax);
  const float factor = most / (absmax < FLT_MIN ? FLT_MIN : absmax);
  return factor > FLT_MAX ? FLT_MAX : factor;
}

// What divides by a stored scale. Where that is (nearly) zero all codes mean zero: take zero's.
[[maybe_unused]] inline float inverse_scale(float scale) {
  return scale < FLT_MIN ? 0.0f : 1.0f / scale;
}

// Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. Unlike
// nearbyint, compilers vectorize it without giving up strict arithmetic.
[[maybe_unused]] inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Zero point and scale of one int4 group: value = (code - zero) * scale.
struct Affine4 {
  std::uint16_t scale = 0;  // float16 bits
  std::uint8_t zero = 0;
  float factor = 0.0f;  // 1 / scale
};

[[maybe_unused]] inline float affine4_level(float x, float factor, float zero) {
  const float limited = std::min(std::max(x * factor, -512.0f), 512.0f);
  return std::min(std::max(round_even(limited) + zero, 0.0f), 15.0f);
}

[[maybe_unused]] inline std::uint32_t affine4_code(float x, const Affine4& fit) {
  return static_cast<std::uint32_t>(affine4_level(x, fit.factor, static_cast<float>(fit.zero)));
}

struct Affine4Score {
  float error = 0.0f;    // sum of squared errors
  float product = 0.0f;  // sum of x * (code - zero)
  float power = 0.0f;    // sum of (code - zero)^2
};

// Sums run in 16 lanes that are added in a fixed order, whatever the vector width.
[[maybe_unused]] inline Affine4Score score_affine4(const float* x, std::int64_t count, float scale,
                                                   float factor, float zero) {
  constexpr int lanes = 16;
  float error[lanes] = {}, product[lanes] = {}, power[lanes] = {};
  auto add = [&](std::int64_t i, int lane) {
    const float level = affine4_level(x[i], factor, zero) - zero;
    const float miss = x[i] - level * scale;
    error[lane] += miss * miss;
    product[lane] += x[i] * level;
    power[lane] += level * level;
  };
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) add(i, lane);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      error[lane] += error[lane + half];
      product[lane] += product[lane + half];
      power[lane] += power[lane + half];
    }
  }
  return {error[0], product[0], power[0]};
}

// Minimizes the squared error of a group of finite values between `low` and `high`: clips the range
// in steps, takes the best, then alternates between the least-squares scale for fixed codes and new
// codes, with the neighbouring zero points tried. score(scale, factor, zero) is score_affine4 of
// the group, or the same sums in the same order by other instructions.
template <class Score>
Affine4 search_affine4(float low, float high, const Score& score_of) {
  constexpr int clip_steps = 13;
  constexpr float clip_step = 0.025f;
  Affine4 best{.scale = 0x3c00, .zero = 0, .factor = 1.0f};
  float least = -1.0f;
  Affine4Score best_score;
  auto attempt = [&](float wanted_scale, float zero) {
    const std::uint16_t bits = float_to_fp16(wanted_scale);
    const float scale = fp16_to_float(bits);
    if (!(scale > 0.0f) || std::isinf(scale)) return;
    const float factor = 1.0f / scale;
    zero = std::min(std::max(zero, 0.0f), 255.0f);
    const Affine4Score score = score_of(scale, factor, zero);
    if (least >= 0.0f && score.error >= least) return;
    least = score.error;
    best_score = score;
    best = {.scale = bits, .zero = static_cast<std::uint8_t>(zero), .factor = factor};
  };
  // Zero must be representable: the zero point is an integer from 0 to 255.
  const float from = std::min(low, 0.0f), to = std::max(high, 0.0f);
  if (from == to) return best;
  // Past what a float16 scale can hold: reported like an infinite weight.
  if ((to - from) / 15.0f > 65504.0f) return {.scale = 0x7e00, .zero = 0, .factor = 0.0f};
  for (int step = 0; step < clip_steps; ++step) {
    const float keep = 1.0f - clip_step * static_cast<float>(step);
    // The smallest float16 above zero keeps very small groups from losing their scale.
    const float scale = std::max((to - from) * keep / 15.0f, 5.9604645e-8f);
    attempt(scale, round_even(std::min(-from * keep / scale, 255.0f)));
  }
  for (int round = 0; round < 2 && best_score.power > 0.0f; ++round) {
    const float scale = best_score.product / best_score.power;
    const auto zero = static_cast<float>(best.zero);
    for (const float shift : {0.0f, -1.0f, 1.0f}) attempt(scale, zero + shift);
  }
  return best;
}

}  // namespace
}  // namespace vramkit::cpu
