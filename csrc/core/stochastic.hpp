// Stochastic rounding: up or down at random, so that the mean of many roundings is the number
// itself. For the 16-bit floats, the 8-bit floats and integers.
//
// Random words come from a counter, not from a state: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Element (row, col) of a matrix has word
// col % 4 of the counter (col / 4, row), low words first, under the seed as the key: the same on
// every device and for any number of threads.
//
// With u = word / 2^32, cut to as many bits as are compared, a number rounds up (away from zero)
// where the fraction that to-zero would drop, in steps of the target, and u make 1 or more.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "core/portable.hpp"

namespace vramkit {

struct PhiloxWords {
  std::uint32_t word[4];
};

VRAMKIT_ANYWHERE inline PhiloxWords philox(PhiloxWords counter, std::uint64_t key) {
  constexpr std::uint64_t kFirst = 0xD2511F53u, kSecond = 0xCD9E8D57u;
  constexpr std::uint32_t kStepLow = 0x9E3779B9u, kStepHigh = 0xBB67AE85u;
  constexpr int kTurns = 10;
  auto low = static_cast<std::uint32_t>(key), high = static_cast<std::uint32_t>(key >> 32);
  std::uint32_t a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
  VRAMKIT_UNROLLED
  for (int turn = 0; turn < kTurns; ++turn) {
    const std::uint64_t first = kFirst * a, second = kSecond * c;
    a = static_cast<std::uint32_t>(second >> 32) ^ b ^ low;
    c = static_cast<std::uint32_t>(first >> 32) ^ d ^ high;
    b = static_cast<std::uint32_t>(second);
    d = static_cast<std::uint32_t>(first);
    low += kStepLow;
    high += kStepHigh;
  }
  return {{a, b, c, d}};
}

// The words of columns 4 * quad .. 4 * quad + 3 of a row.
VRAMKIT_ANYWHERE inline PhiloxWords words_of(std::uint64_t seed, std::int64_t row,
                                             std::int64_t quad) {
  const auto r = static_cast<std::uint64_t>(row), q = static_cast<std::uint64_t>(quad);
  return philox({{static_cast<std::uint32_t>(q), static_cast<std::uint32_t>(q >> 32),
                  static_cast<std::uint32_t>(r), static_cast<std::uint32_t>(r >> 32)}},
                seed);
}

// `steps` >= 0, of which the fraction rounds at random (to 24 bits of it).
VRAMKIT_ANYWHERE inline std::uint32_t round_steps(float steps, std::uint32_t word) {
  const auto whole = static_cast<std::uint32_t>(steps);
  const float fraction = (steps - static_cast<float>(whole)) * 16777216.0f;
  return whole + ((static_cast<std::uint32_t>(fraction) + (word >> 8)) >> 24);
}

// Magnitude bits of a finite float -> those of a float with E exponent and M mantissa bits, which
// may be past its largest. In the normal range all bits that are dropped count.
template <int E, int M>
VRAMKIT_ANYWHERE inline std::uint32_t round_magnitude(std::uint32_t magnitude, std::uint32_t word) {
  constexpr int bias = (1 << (E - 1)) - 1, drop = 23 - M;
  constexpr std::uint32_t smallest_normal = static_cast<std::uint32_t>(127 + 1 - bias) << 23;
  constexpr auto per_step = static_cast<float>(1 << (bias + M - 1));
  if (magnitude < smallest_normal) {
    return round_steps(std::bit_cast<float>(magnitude) * per_step, word);
  }
  return ((magnitude + (word >> (32 - drop))) >> drop) -
         (static_cast<std::uint32_t>(127 - bias) << M);
}

// NaN stays NaN, infinity infinity. Past the largest finite number lies infinity, as one step more.
VRAMKIT_ANYWHERE inline std::uint16_t stochastic_bf16(float x, std::uint32_t word) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + (word >> 16)) >> 16);
}
VRAMKIT_ANYWHERE inline std::uint16_t stochastic_fp16(float x, std::uint32_t word) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) {
    return static_cast<std::uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  }
  std::uint32_t code = magnitude == 0x7f800000u ? 0x7c00u : round_magnitude<5, 10>(magnitude, word);
  if (code > 0x7c00u) code = 0x7c00u;
  return static_cast<std::uint16_t>(sign | code);
}

// Of finite numbers that have been divided by their scale; saturating.
template <int E, int M>
VRAMKIT_ANYWHERE inline std::uint32_t stochastic_small(float y, std::uint32_t word,
                                                       std::uint32_t largest) {
  const auto bits = std::bit_cast<std::uint32_t>(y);
  const std::uint32_t code = round_magnitude<E, M>(bits & 0x7fffffffu, word);
  return (code < largest ? code : largest) | (bits >> 24 & 0x80u);
}
VRAMKIT_ANYWHERE inline std::uint32_t stochastic_e4m3(float y, std::uint32_t word) {
  return stochastic_small<4, 3>(y, word, 0x7e);
}
VRAMKIT_ANYWHERE inline std::uint32_t stochastic_e5m2(float y, std::uint32_t word) {
  return stochastic_small<5, 2>(y, word, 0x7b);
}
VRAMKIT_ANYWHERE inline std::uint32_t stochastic_int8(float y, std::uint32_t word) {
  const std::uint32_t steps = round_steps(std::fabs(y), word);
  const std::uint32_t level = steps < 127u ? steps : 127u;
  return (y < 0.0f ? 0u - level : level) & 0xffu;
}

}  // namespace vramkit
