// Arithmetic of the encoders that every instruction-set unit and the CUDA kernels share, so that
// all of them write the same bits. Everything here has internal linkage: each unit compiles its own
// copy under its own flags. No operation may be contracted or reordered (the build passes
// -ffp-contract=off, and -fmad=false to nvcc). Loops of few rounds are unrolled on a GPU, where
// what they index would lie in slow memory.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/half.hpp"
#include "core/portable.hpp"

namespace vramkit::cpu {
namespace {

// What multiplies x before rounding, for the group's absmax and the largest code value.
[[maybe_unused]] VRAMKIT_ANYWHERE inline float encode_factor(float absmax, float most) {
  // bitsandbytes' own clamp: its codes for (nearly) empty blocks depend on it.
  if (most == 1.0f) return 1.0f / (absmax < 1e-38f ? 1e-38f : absmax);
  const float factor = most / (absmax < FLT_MIN ? FLT_MIN : absmax);
  return factor > FLT_MAX ? FLT_MAX : factor;
}

// What divides by a stored scale. Where that is (nearly) zero all codes mean zero: take zero's.
[[maybe_unused]] VRAMKIT_ANYWHERE inline float inverse_scale(float scale) {
  return scale < FLT_MIN ? 0.0f : 1.0f / scale;
}

// What the searches for scales try. More of it gains little (docs/calibration.md).
inline constexpr int kAffine4Steps = 14, kAffine4Refits = 3;
inline constexpr float kAffine4Step = 0.03f;

// Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. Unlike
// nearbyint, compilers vectorize it without giving up strict arithmetic.
[[maybe_unused]] VRAMKIT_ANYWHERE inline float round_even(float x) {
  return (x + 12582912.0f) - 12582912.0f;
}

// Zero point and scale of one int4 group: value = (code - zero) * scale.
struct Affine4 {
  std::uint16_t scale = 0;  // float16 bits
  std::uint8_t zero = 0;
  float factor = 0.0f;  // 1 / scale
};

[[maybe_unused]] VRAMKIT_ANYWHERE inline float affine4_level(float x, float factor, float zero) {
  const float limited = std::min(std::max(x * factor, -512.0f), 512.0f);
  return std::min(std::max(round_even(limited) + zero, 0.0f), 15.0f);
}

[[maybe_unused]] VRAMKIT_ANYWHERE inline std::uint32_t affine4_code(float x, const Affine4& fit) {
  return static_cast<std::uint32_t>(affine4_level(x, fit.factor, static_cast<float>(fit.zero)));
}

// Scales to try: x * factor is rounded to the levels, the integers from `low` to `high`, zero being
// one of them.
template <int C>
struct LevelGrid {
  float factor[C], low[C], high[C];
};

[[maybe_unused]] VRAMKIT_ANYWHERE inline float level_of(float y, float low, float high) {
  return round_even(std::min(std::max(y, low), high));
}

// What the searches below ask of a group of numbers. Sums run in 16 lanes that are added in a fixed
// order, whatever the vector width; units have the same sums by other instructions.
class LevelScorer {
 public:
  LevelScorer(const float* x, std::int64_t count) : x_(x), count_(count) {}

  // The squared distances from the levels, in units of the scale, for each choice of the grid.
  template <int C>
  void misses(const LevelGrid<C>& grid, float* out) const {
    for (int c = 0; c < C; ++c) {
      out[c] = sum([&](float x) {
        const float y = x * grid.factor[c];
        const float miss = y - level_of(y, grid.low[c], grid.high[c]);
        return miss * miss;
      });
    }
  }

  // The scale that fits the levels of this choice best, by least squares, in units of its own.
  float refit(const LevelGrid<1>& at) const {
    const auto level = [&](float y) { return level_of(y, at.low[0], at.high[0]); };
    const float product = sum([&](float x) {
      const float y = x * at.factor[0];
      return y * level(y);
    });
    const float power = sum([&](float x) {
      const float found = level(x * at.factor[0]);
      return found * found;
    });
    return product / power;
  }

 private:
  template <class Term>
  float sum(const Term& term) const {
    constexpr int lanes = 16;
    float sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= count_; i += lanes) {
      for (int lane = 0; lane < lanes; ++lane) sums[lane] += term(x_[i + lane]);
    }
    for (int lane = 0; i < count_; ++i, ++lane) sums[lane] += term(x_[i]);
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    return sums[0];
  }

  const float* x_;
  std::int64_t count_;
};

// Minimizes the squared error of a group of finite values between `low` and `high`: the full range
// is narrowed in steps, each with three zero points; the best choice is then refined by turns of
// the least-squares scale for its codes, and new codes under that scale. Scorer: LevelScorer, or
// the same sums by other instructions.
template <class Scorer>
VRAMKIT_ANYWHERE Affine4 search_affine4(float low, float high, const Scorer& scorer) {
  constexpr int steps = kAffine4Steps;
  constexpr float step_size = kAffine4Step;
  constexpr float smallest = 5.9604645e-8f;  // float16's: it keeps tiny groups from losing theirs
  Affine4 best{.scale = 0x3c00, .zero = 0, .factor = 1.0f};
  // Zero must be representable: the zero point is one of the levels.
  const float from = std::min(low, 0.0f), to = std::max(high, 0.0f);
  if (from == to) return best;
  // Past what a float16 scale can hold: reported like an infinite weight.
  if ((to - from) / 15.0f > 65504.0f) return {.scale = 0x7e00, .zero = 0, .factor = 0.0f};
  const float widest = std::max((to - from) / 15.0f, smallest);
  float least = -1.0f;
  // Zero points `middle` and its neighbours; returns whether one of them is better.
  auto attempt = [&](float wanted_scale, float middle) {
    const std::uint16_t bits = float_to_fp16(wanted_scale);
    const float scale = fp16_to_float(bits);
    if (!(scale > 0.0f) || std::isinf(scale)) return false;
    const float factor = 1.0f / scale;
    LevelGrid<3> grid;
    VRAMKIT_UNROLLED
    for (int c = 0; c < 3; ++c) {
      const float zero = middle + static_cast<float>(c - 1);
      grid.factor[c] = factor;
      grid.low[c] = -zero;
      grid.high[c] = 15.0f - zero;
    }
    float misses[3];
    scorer.misses(grid, misses);
    bool better = false;
    constexpr int order[] = {1, 0, 2};
    VRAMKIT_UNROLLED
    for (int i = 0; i < 3; ++i) {
      const int c = order[i];
      const float error = scale * scale * misses[c];
      if (grid.low[c] > 0.0f || grid.high[c] < 0.0f || (least >= 0.0f && error >= least)) continue;
      least = error;
      best = {.scale = bits, .zero = static_cast<std::uint8_t>(-grid.low[c]), .factor = factor};
      better = true;
    }
    return better;
  };
  const float middle = round_even(-from / widest);
  for (int step = 0; step < steps; ++step) {
    attempt(widest * (1.0f - step_size * static_cast<float>(step)), middle);
  }
  for (int round = 0; round < kAffine4Refits; ++round) {
    const auto zero = static_cast<float>(best.zero);
    const float ratio = scorer.refit({{best.factor}, {-zero}, {15.0f - zero}});
    if (!attempt(fp16_to_float(best.scale) * ratio, zero)) break;
  }
  return best;
}

// Scale of one int8 row, value = code * scale.
struct Scale8 {
  float scale = 0.0f, factor = 0.0f;
};

// Minimizes the squared error of finite values with the largest magnitude `absmax`: scales around
// the one that just holds it, then the least-squares scale for the best one's codes.
template <class Scorer>
VRAMKIT_ANYWHERE Scale8 search_scale8(float absmax, const Scorer& scorer) {
  const Scale8 plain{.scale = absmax / 127.0f, .factor = encode_factor(absmax, 127.0f)};
  if (absmax < 1e-30f) return plain;  // zeros, or scales that have lost bits
  Scale8 best = plain;
  float least = -1.0f;
  const auto attempt = [&]<int C>(const float(&ratios)[C]) {
    LevelGrid<C> grid;
    float scales[C], misses[C];
    VRAMKIT_UNROLLED
    for (int c = 0; c < C; ++c) {
      scales[c] = plain.scale * ratios[c];
      grid.factor[c] = ratios[c] == 1.0f ? plain.factor : 1.0f / scales[c];
      grid.low[c] = -127.0f;
      grid.high[c] = 127.0f;
    }
    scorer.misses(grid, misses);
    VRAMKIT_UNROLLED
    for (int c = 0; c < C; ++c) {
      const float error = ratios[c] * ratios[c] * misses[c];
      if (least >= 0.0f && error >= least) continue;
      least = error;
      best = {.scale = scales[c], .factor = grid.factor[c]};
    }
  };
  attempt({1.0f, 0.995f, 0.99f, 0.985f});
  attempt({0.98f, 0.975f, 1.005f, 1.01f});
  const float ratio = best.scale / plain.scale * scorer.refit({{best.factor}, {-127.0f}, {127.0f}});
  attempt({ratio});
  return best;
}

}  // namespace
}  // namespace vramkit::cpu
