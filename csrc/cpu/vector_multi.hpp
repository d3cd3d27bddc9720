// multi.hpp on vectors, in the reference's order of roundings.
#pragma once
#include "cpu/vector_common.hpp"

namespace vramkit::cpu {
namespace {

template <DType type>
double square_sum_of(const void* x, std::int64_t count) {
  auto bytes = static_cast<const std::uint8_t*>(x);
  double sums[kSumLanes] = {};
  alignas(64) float values[kSumLanes];
  std::int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int k = 0; k < kSumLanes; k += kLanes) {
      Simd::store(values + k, load<type>(bytes + (i + k) * bytes_of(type)));
    }
    for (int k = 0; k < kSumLanes; ++k) {
      const double value = values[k];
      sums[k] += value * value;
    }
  }
  for (int k = 0; i < count; ++i, ++k) {
    Simd::store(values, load_part<type>(bytes + i * bytes_of(type), 1));
    const double value = values[0];
    sums[k] += value * value;
  }
  double total = 0.0;
  for (const double sum : sums) total += sum;
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

void cast_values(const void* x, DType from, void* out, DType to, std::int64_t count) {
  with_type(from,
            [&]<DType f>() { with_type(to, [&]<DType t>() { convert<f, t>(x, out, count); }); });
}

void read_state(const ByteState& state, std::int64_t block, float* out) {
  const std::uint8_t* codes = state.codes + block * kStateBlock;
  const F by = Simd::set1(state.absmax[block]);
  for (std::int64_t i = 0; i < kStateBlock; i += kLanes) {
    Simd::store(out + i, Simd::gather(state.values, Simd::bytes(codes + i)) * by);
  }
}

void write_state(const ByteState& state, std::int64_t block, const float* in) {
  F most = Simd::set1(0.0f);
  I nan = {};
  for (std::int64_t i = 0; i < kStateBlock; i += kLanes) {
    const F value = Simd::load(in + i);
    most = Simd::max((F)((I)value & 0x7fffffff), most);  // NaN is passed over here
    nan |= (I)(value != value) & 1;
  }
  const float absmax = Simd::most(nan) ? __builtin_nanf("") : Simd::most(most);
  state.absmax[block] = absmax;
  const F by = Simd::set1(absmax);
  for (std::int64_t i = 0; i < kStateBlock; i += kLanes) {
    const F value = absmax > 0.0f ? Simd::load(in + i) / by : Simd::set1(0.0f);
    I code = {};
    // How many bounds lie below: the code's bits from the highest down.
    for (std::int32_t step = 128; step > 0; step /= 2) {
      const F bound = Simd::gather(state.bounds, code + (step - 1));
      code += (I)(value > bound) & step;
    }
    Simd::store_bytes(state.codes + block * kStateBlock + i, code);
  }
}

// What is the same for all elements.
struct AdamwNumbers {
  F factor, decay, beta2, less_beta1, less_beta2, epsilon, step_size, root_correction;
  explicit AdamwNumbers(const AdamwStep& s)
      : factor(Simd::set1(s.factor)),
        decay(Simd::set1(s.decay)),
        beta2(Simd::set1(s.beta2)),
        less_beta1(Simd::set1(s.less_beta1)),
        less_beta2(Simd::set1(s.less_beta2)),
        epsilon(Simd::set1(s.epsilon)),
        step_size(Simd::set1(s.step_size)),
        root_correction(Simd::set1(s.root_correction)) {}
};

[[gnu::always_inline]] inline F adamw_update(const AdamwNumbers& n, F g, F w, F& m, F& v) {
  g = g * n.factor;
  w = w * n.decay;
  m = m + (g - m) * n.less_beta1;
  v = v * n.beta2 + g * g * n.less_beta2;
  return w - n.step_size * m / (Simd::sqrt(v) / n.root_correction + n.epsilon);
}

enum class Second { none, half, copy };

// One vector at element i, or what is there of it (n < kLanes).
template <DType P, DType G, DType S, Second second, bool whole>
[[gnu::always_inline]] inline void adamw_at(const AdamwStep& s, const AdamwNumbers& numbers,
                                            std::int64_t i, float* m, float* v, std::int64_t n) {
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
  w = adamw_update(numbers, get.template operator()<G>(s.gradient, i), w, average, square);
  put.template operator()<DType::f32>(m, 0, average);
  put.template operator()<DType::f32>(v, 0, square);
  put.template operator()<P>(s.parameter, i, w);
  if constexpr (second == Second::half) {
    put.template operator()<P>(s.second, i, w - get.template operator()<P>(s.parameter, i));
  }
  if constexpr (second == Second::copy) put.template operator()<S>(s.second, i, w);
}

template <DType P, DType G, DType S, Second second>
void adamw_typed(const AdamwStep& s) {
  const AdamwNumbers numbers(s);
  std::int64_t i = 0;
  if (s.average) {
    for (; i + kLanes <= s.count; i += kLanes) {
      adamw_at<P, G, S, second, true>(s, numbers, i, s.average + i, s.average_square + i, kLanes);
    }
    if (i < s.count) {
      adamw_at<P, G, S, second, false>(s, numbers, i, s.average + i, s.average_square + i,
                                       s.count - i);
    }
    return;
  }
  alignas(64) float m[kStateBlock], v[kStateBlock];
  for (; i + kStateBlock <= s.count; i += kStateBlock) {
    read_state(s.average_bytes, i / kStateBlock, m);
    read_state(s.square_bytes, i / kStateBlock, v);
    for (std::int64_t k = 0; k < kStateBlock; k += kLanes) {
      adamw_at<P, G, S, second, true>(s, numbers, i + k, m + k, v + k, kLanes);
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
    adamw_at<P, G, S, second, false>(s, numbers, i + k, m + k, v + k, smaller(kLanes, rest - k));
  }
  for (int k = 0; k < 2; ++k) {
    write_state(parts[k], 0, k ? v : m);
    std::memcpy((k ? s.square_bytes : s.average_bytes).codes + i, codes[k],
                static_cast<std::size_t>(rest));
  }
}

void adamw(const AdamwStep& s) {
  with_type(s.gradient_type, [&]<DType G>() {
    if (s.parameter_type == DType::f32) {
      if (!s.second) return adamw_typed<DType::f32, G, DType::f32, Second::none>(s);
      if (s.second_type == DType::bf16) {
        return adamw_typed<DType::f32, G, DType::bf16, Second::copy>(s);
      }
      return adamw_typed<DType::f32, G, DType::f16, Second::copy>(s);
    }
    if (s.parameter_type == DType::bf16) {
      if (!s.second) return adamw_typed<DType::bf16, G, DType::bf16, Second::none>(s);
      return adamw_typed<DType::bf16, G, DType::bf16, Second::half>(s);
    }
    if (!s.second) return adamw_typed<DType::f16, G, DType::f16, Second::none>(s);
    return adamw_typed<DType::f16, G, DType::f16, Second::half>(s);
  });
}

}  // namespace
}  // namespace vramkit::cpu
