// multi.hpp on vectors, in the reference's order of roundings.
#pragma once
#include "cpu/vector_common.hpp"

namespace vramkit::cpu {
namespace {

template <DType type>
double square_sum_of(const void* x, std::int64_t count) {
  static_assert(kSumLanes == 16);
  auto bytes = static_cast<const std::uint8_t*>(x);
  double total = 0.0;
  for (std::int64_t piece = 0; piece < count; piece += kSumPiece) {
    const std::int64_t n = smaller(kSumPiece, count - piece);
    const auto* from = bytes + piece * bytes_of(type);
    Simd::D lanes[kSumLanes / (kLanes / 2)] = {};  // of float64: half as many to a vector
    std::int64_t i = 0;
    for (; i + kSumLanes <= n; i += kSumLanes) {
      for (int k = 0; k < kSumLanes / kLanes; ++k) {
        const F v = load<type>(from + (i + k * kLanes) * bytes_of(type));
        // Squares of float32 are exact in float64: the sum alone rounds, fused or not.
        Simd::add_squares(v, lanes[2 * k], lanes[2 * k + 1]);
      }
    }
    alignas(64) double sums[kSumLanes];
    std::memcpy(sums, lanes, sizeof(sums));
    for (int k = 0; i < n; ++i, ++k) {
      alignas(64) float one[kLanes];
      Simd::store(one, load_part<type>(from + i * bytes_of(type), 1));
      const double value = one[0];
      sums[k] += value * value;
    }
    double sum = 0.0;
    for (const double lane : sums) sum += lane;
    total += sum;
  }
  return total;
}

double square_sum(const void* x, DType type, std::int64_t count) {
  double total = 0.0;
  with_type(type, [&]<DType t>() { total = square_sum_of<t>(x, count); });
  return total;
}

void scale_values(void* x, DType type, std::int64_t count, float factor) {
  with_type(type, [&]<DType t>() {
    auto bytes = static_cast<std::uint8_t*>(x);
    const F by = Simd::set1(factor);
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store<t>(bytes + i * bytes_of(t), load<t>(bytes + i * bytes_of(t)) * by);
    }
    if (i == count) return;
    store_part<t>(bytes + i * bytes_of(t), load_part<t>(bytes + i * bytes_of(t), count - i) * by,
                  count - i);
  });
}

// Stochastic rounding.

// Random words for four vectors of elements at a time.
constexpr std::int64_t kDiceStep = 4 * kLanes;

class DiceWords {
 public:
  explicit DiceWords(const Dice& dice) : dice_(dice) {}

  // Of the vector at element i, a multiple of kLanes; all of them, in order.
  U at(std::int64_t i) {
    if (i % kDiceStep == 0) roll(dice_.first + i);
    return words_[i / kLanes % 4];
  }

 private:
  // core/stochastic.hpp's philox, a counter to a lane: so that what Simd::transpose4 makes of the
  // words is in the order of the elements, neighbouring lanes have every kLanes / 4-th counter.
  void roll(std::int64_t first) {
    const auto quad = static_cast<std::uint64_t>(first) / 4, row = (std::uint64_t)dice_.row;
    U a;
    for (int p = 0; p < kLanes; ++p) {
      a[p] = static_cast<std::uint32_t>(quad) + (kLanes / 4) * (p % 4) + p / 4;
    }
    const U none = {};
    U b = none + static_cast<std::uint32_t>(quad >> 32);
    U c = none + static_cast<std::uint32_t>(row), d = none + static_cast<std::uint32_t>(row >> 32);
    auto low = static_cast<std::uint32_t>(dice_.seed);
    auto high = static_cast<std::uint32_t>(dice_.seed >> 32);
    for (int turn = 0; turn < 10; ++turn) {
      U a_high, a_low, c_high, c_low;
      Simd::multiply_wide(a, 0xD2511F53u, a_high, a_low);
      Simd::multiply_wide(c, 0xCD9E8D57u, c_high, c_low);
      a = c_high ^ b ^ low;
      c = a_high ^ d ^ high;
      b = c_low;
      d = a_low;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
    words_[0] = a, words_[1] = b, words_[2] = c, words_[3] = d;
    Simd::transpose4(words_);
  }

  Dice dice_;
  U words_[4];
};

// stochastic_bf16 and stochastic_fp16 of core/stochastic.hpp.
template <DType type>
I rounded_bits(F x, U word) {
  const U bits = (U)x, magnitude = bits & 0x7fffffffu;
  if constexpr (type == DType::bf16) {
    return (I)(magnitude > 0x7f800000u ? (bits >> 16 | 0x40u) : (bits + (word >> 16)) >> 16);
  } else {
    constexpr std::uint32_t smallest_normal = 113u << 23;
    const U sign = bits >> 16 & 0x8000u;
    const U normal = ((magnitude + (word >> 19)) >> 13) - (112u << 10);
    // Below it, in steps of 2^-24; other lanes' numbers may be anything.
    const F steps = (F)(magnitude < smallest_normal ? magnitude : (U){}) * Simd::set1(16777216.0f);
    const I whole = Simd::to_int(steps);
    const I fraction = Simd::to_int((steps - Simd::to_float(whole)) * Simd::set1(16777216.0f));
    const U small = (U)whole + (((U)fraction + (word >> 8)) >> 24);
    U code = magnitude < smallest_normal ? small : normal;
    code = code > 0x7c00u ? (U){} + 0x7c00u : code;
    const U nan = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    return (I)(sign | (magnitude > 0x7f800000u ? nan : code));
  }
}

template <DType from, DType to>
void cast_at_random(const void* x, void* out, std::int64_t count, const Dice& dice) {
  DiceWords words(dice);
  const auto* source = static_cast<const std::uint8_t*>(x);
  auto* target = static_cast<std::uint8_t*>(out);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F value = load<from>(source + i * bytes_of(from));
    Simd::store_halves(target + i * 2, rounded_bits<to>(value, words.at(i)));
  }
  if (i == count) return;
  alignas(64) std::uint16_t staged[kLanes];
  const F value = load_part<from>(source + i * bytes_of(from), count - i);
  Simd::store_halves(staged, rounded_bits<to>(value, words.at(i)));
  std::memcpy(target + i * 2, staged, static_cast<std::size_t>(count - i) * 2);
}

void cast_values(const void* x, DType from, void* out, DType to, std::int64_t count,
                 const Dice& dice) {
  with_type(from, [&]<DType f>() {
    with_type(to, [&]<DType t>() {
      if constexpr (t != DType::f32) {
        if (dice.on) return cast_at_random<f, t>(x, out, count, dice);
      }
      convert<f, t>(x, out, count);
    });
  });
}

// 8-bit state.

// out[i] = table[index[i]] for a block, element by element: on the processors in use that is faster
// than gathering, and than vectors that compilers put together of elements, which the barrier
// forbids.
template <class Index, class T>
void look_up(const Index* index, const T* table, T* out) {
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < kStateBlock; ++i) {
    out[i] = table[index[i]];
    asm volatile("" ::: "memory");
  }
}

void read_state(const ByteState& state, std::int64_t block, float* out) {
  const std::uint8_t* codes = state.codes + block * kStateBlock;
  look_up(codes, state.table->values, out);
  const F by = Simd::set1(state.absmax[block]);
  for (std::int64_t i = 0; i < kStateBlock; i += kLanes) {
    Simd::store(out + i, Simd::load(out + i) * by);
  }
}

void write_state(const ByteState& state, std::int64_t block, const float* in) {
  using Table = StateTable;
  constexpr auto first_key = static_cast<std::int32_t>(Table::kFirst);
  I most = {};  // magnitudes in the order of their bits: NaN above infinity above numbers
  for (std::int64_t i = 0; i < kStateBlock; i += kLanes) {
    most = Simd::max(most, (I)Simd::load(in + i) & 0x7fffffff);
  }
  const std::int32_t most_bits = Simd::most(most);
  float absmax = __builtin_nanf("");
  if (most_bits < 0x7f800000) std::memcpy(&absmax, &most_bits, sizeof(absmax));
  state.absmax[block] = absmax;
  alignas(64) float share[kStateBlock];
  alignas(64) std::uint32_t cell[kStateBlock];
  const F by = Simd::set1(absmax);
  for (std::int64_t i = 0; i < kStateBlock; i += kLanes) {
    const F value = absmax > 0.0f ? Simd::load(in + i) / by : Simd::set1(0.0f);
    const I key = ((I)value & 0x7fffffff) >> Table::kLowBits;
    const I negative = (I)value >> 31;  // all ones, or none
    const I place = Simd::max(key, I{} + first_key) - first_key;
    Simd::store(share + i, value);
    Simd::store(cell + i, (F)(place + (negative & static_cast<std::int32_t>(Table::kCells))));
  }
  look_up(cell, state.table->cells, cell);
  for (std::int64_t i = 0; i < kStateBlock; i += kLanes) {
    const I entry = (I)Simd::load(cell + i), bits = (I)Simd::load(share + i);
    const I magnitude = bits & 0x7fffffff;
    const I low = magnitude & static_cast<std::int32_t>(Table::kLowMask);
    const I past = (low > (entry & 0xffffff)) & (magnitude >> Table::kLowBits >= first_key);
    // Past the cell's bound: one code up (past is -1), or down where numbers are negative.
    Simd::store_bytes(state.codes + block * kStateBlock + i,
                      (I)((U)entry >> 24) + (past & (bits >> 31 | 1)));
  }
}

// What is the same for all elements.
struct VectorNumbers {
  F factor, decay, beta2, less_beta1, less_beta2, epsilon, step_size, root_correction;
  explicit VectorNumbers(const AdamwNumbers& n)
      : factor(Simd::set1(n.factor)),
        decay(Simd::set1(n.decay)),
        beta2(Simd::set1(n.beta2)),
        less_beta1(Simd::set1(n.less_beta1)),
        less_beta2(Simd::set1(n.less_beta2)),
        epsilon(Simd::set1(n.epsilon)),
        step_size(Simd::set1(n.step_size)),
        root_correction(Simd::set1(n.root_correction)) {}
};

enum class Second { none, half, copy, random };

// One vector at element i, or what is there of it (n < kLanes).
template <DType P, DType G, DType S, Second second, bool whole>
[[gnu::always_inline]] inline void adamw_at(const AdamwStep& s, const VectorNumbers& by,
                                            std::int64_t i, float* m, float* v, std::int64_t n,
                                            DiceWords* words) {
  const auto get = [n]<DType t>(const void* base, std::int64_t at) {
    const auto* p = static_cast<const std::uint8_t*>(base) + at * bytes_of(t);
    if constexpr (whole) return load<t>(p);
    return load_part<t>(p, n);
  };
  const auto put = [n]<DType t>(void* base, std::int64_t at, F value) {
    auto* p = static_cast<std::uint8_t*>(base) + at * bytes_of(t);
    if constexpr (whole) return store<t>(p, value);
    return store_part<t>(p, value, n);
  };
  F w = get.template operator()<P>(s.parameter, i);
  if constexpr (second == Second::half) w = w + get.template operator()<P>(s.second, i);
  F average = get.template operator()<DType::f32>(m, 0);
  F square = get.template operator()<DType::f32>(v, 0);
  const F g = get.template operator()<G>(s.gradient, i) * by.factor;
  w = w * by.decay;
  average = average + (g - average) * by.less_beta1;
  square = square * by.beta2 + g * g * by.less_beta2;
  F root = square;
  if (s.largest) {
    const F before = get.template operator()<DType::f32>(s.largest, i);
    root = square <= before ? before : square;
    put.template operator()<DType::f32>(s.largest, i, root);
  }
  w = w - by.step_size * average / (Simd::sqrt(root) / by.root_correction + by.epsilon);
  put.template operator()<DType::f32>(m, 0, average);
  put.template operator()<DType::f32>(v, 0, square);
  if constexpr (second == Second::random) {
    alignas(64) std::uint16_t staged[kLanes];
    auto* to = static_cast<std::uint16_t*>(s.parameter) + i;
    Simd::store_halves(whole ? to : staged, rounded_bits<P>(w, words->at(i)));
    if constexpr (!whole) std::memcpy(to, staged, static_cast<std::size_t>(n) * 2);
    return;
  }
  put.template operator()<P>(s.parameter, i, w);
  if constexpr (second == Second::half) {
    put.template operator()<P>(s.second, i, w - get.template operator()<P>(s.parameter, i));
  }
  if constexpr (second == Second::copy) put.template operator()<S>(s.second, i, w);
}

template <DType P, DType G, DType S, Second second>
void adamw_typed(const AdamwStep& s) {
  const VectorNumbers by(s.numbers);
  DiceWords words(s.dice);
  std::int64_t i = 0;
  if (s.average) {
    for (; i + kLanes <= s.count; i += kLanes) {
      adamw_at<P, G, S, second, true>(s, by, i, s.average + i, s.average_square + i, kLanes,
                                      &words);
    }
    if (i < s.count) {
      adamw_at<P, G, S, second, false>(s, by, i, s.average + i, s.average_square + i, s.count - i,
                                       &words);
    }
    return;
  }
  alignas(64) float m[kStateBlock], v[kStateBlock];
  for (; i + kStateBlock <= s.count; i += kStateBlock) {
    read_state(s.average_bytes, i / kStateBlock, m);
    read_state(s.square_bytes, i / kStateBlock, v);
    for (std::int64_t k = 0; k < kStateBlock; k += kLanes) {
      adamw_at<P, G, S, second, true>(s, by, i + k, m + k, v + k, kLanes, &words);
    }
    write_state(s.average_bytes, i / kStateBlock, m);
    write_state(s.square_bytes, i / kStateBlock, v);
  }
  if (i == s.count) return;
  // The short last block, on a whole block's copy of its state.
  const std::int64_t rest = s.count - i;
  std::uint8_t codes[2][kStateBlock] = {};
  ByteState parts[2] = {s.average_bytes, s.square_bytes};
  for (int k = 0; k < 2; ++k) {
    std::memcpy(codes[k], parts[k].codes + i, static_cast<std::size_t>(rest));
    parts[k].codes = codes[k];
    parts[k].absmax += i / kStateBlock;
    read_state(parts[k], 0, k ? v : m);
    std::memset((k ? v : m) + rest, 0, static_cast<std::size_t>(kStateBlock - rest) * 4);
  }
  for (std::int64_t k = 0; k < rest; k += kLanes) {
    adamw_at<P, G, S, second, false>(s, by, i + k, m + k, v + k, smaller(kLanes, rest - k), &words);
  }
  for (int k = 0; k < 2; ++k) {
    write_state(parts[k], 0, k ? v : m);
    std::memcpy((k ? s.square_bytes : s.average_bytes).codes + i, codes[k],
                static_cast<std::size_t>(rest));
  }
}

void adamw(const AdamwStep& s) {
  with_type(s.gradient_type, [&]<DType G>() {
    constexpr auto f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
    if (s.parameter_type == f32) {
      if (!s.second) return adamw_typed<f32, G, f32, Second::none>(s);
      if (s.second_type == bf16) return adamw_typed<f32, G, bf16, Second::copy>(s);
      return adamw_typed<f32, G, f16, Second::copy>(s);
    }
    if (s.parameter_type == bf16) {
      if (s.second) return adamw_typed<bf16, G, bf16, Second::half>(s);
      if (s.dice.on) return adamw_typed<bf16, G, bf16, Second::random>(s);
      return adamw_typed<bf16, G, bf16, Second::none>(s);
    }
    if (s.second) return adamw_typed<f16, G, f16, Second::half>(s);
    if (s.dice.on) return adamw_typed<f16, G, f16, Second::random>(s);
    return adamw_typed<f16, G, f16, Second::none>(s);
  });
}

}  // namespace
}  // namespace vramkit::cpu
