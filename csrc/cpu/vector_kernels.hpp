// The vector kernels over one weight, in terms of the unit's `Simd`: decoders, dequantize, linear,
// and the table that the unit exports. See vector_common.hpp for how units include this.
//
// A row is walked group by group. Within a group whole vectors are decoded straight from the codes;
// what is left, and groups that begin in the middle of a byte, goes through a small staged copy, so
// that nothing is read past the row.
#pragma once
#include "cpu/vector_common.hpp"
#include "cpu/vector_feedback.hpp"
#include "cpu/vector_quantize.hpp"

namespace vramkit::cpu {
namespace {

// Decoders. `group` prepares the scale of a group; `decode` turns the codes of kLanes elements,
// from a byte boundary, into values. With `scaled` false the values lack the row's scale.

// Four-bit codes: the scale goes into the table of sixteen values once per group, which gives the
// same bits as a product per element and costs no instruction per vector.
class Codebook4 {
 public:
  static constexpr int bits = 4;
  static constexpr bool scaled = true;
  explicit Codebook4(const Weight& weight) : values_(Simd::table(weight.table)) {}
  void group(std::int64_t, float scale) { table_ = Simd::scaled(values_, scale); }
  F decode(const std::uint8_t* p) const { return Simd::lookup(table_, Simd::nibbles(p)); }

 private:
  Simd::Table16 values_, table_;
};

class Integer4 {
 public:
  static constexpr int bits = 4;
  static constexpr bool scaled = true;
  explicit Integer4(const Weight& weight) : zeros_(weight.extra), values_(Simd::table(kCounting)) {}
  void group(std::int64_t index, float scale) {
    table_ = Simd::scaled(Simd::shifted(values_, static_cast<float>(zeros_[index])), scale);
  }
  F decode(const std::uint8_t* p) const { return Simd::lookup(table_, Simd::nibbles(p)); }

 private:
  static constexpr float kCounting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const std::uint8_t* zeros_;
  Simd::Table16 values_, table_;
};

// Eight-bit codes. Their values alone:
struct Integer8 {
  explicit Integer8(const Weight&) {}
  F value(const std::uint8_t* p) const { return Simd::int8(p); }
};
struct E4m3 {  // the encoder's name promises the table of that type, so it need not be read
  explicit E4m3(const Weight&) {}
  F value(const std::uint8_t* p) const { return Simd::e4m3(p); }
};
struct E5m2 {
  explicit E5m2(const Weight&) {}
  F value(const std::uint8_t* p) const { return Simd::e5m2(p); }
};
struct Codebook8 {
  explicit Codebook8(const Weight& weight) : table(weight.table) {}
  F value(const std::uint8_t* p) const { return Simd::gather(table, Simd::bytes(p)); }
  const float* table;
};

template <class Value, bool with_scale>
class Byte {
 public:
  static constexpr int bits = 8;
  static constexpr bool scaled = with_scale;
  explicit Byte(const Weight& weight) : value_(weight), scale_(Simd::set1(1.0f)) {}
  void group(std::int64_t, float scale) { scale_ = Simd::set1(scale); }
  F decode(const std::uint8_t* p) const {
    if constexpr (with_scale) return value_.value(p) * scale_;
    return value_.value(p);
  }

 private:
  Value value_;
  F scale_;
};

template <DType type>
struct Cast {
  static constexpr int bits = 16;
  static constexpr bool scaled = true;
  explicit Cast(const Weight&) {}
  void group(std::int64_t, float) {}
  F decode(const std::uint8_t* p) const { return load<type>(p); }
};

// Decodes n elements from element k of a row on, with zero in the other lanes.
template <class Decoder>
F decode_part(const Decoder& decoder, const std::uint8_t* row, std::int64_t k, std::int64_t n) {
  alignas(64) std::uint8_t staged[kLanes * 2] = {};
  if constexpr (Decoder::bits == 4) {
    if (k % 2 == 0) {
      std::memcpy(staged, row + k / 2, static_cast<std::size_t>((n + 1) / 2));
    } else {
      for (std::int64_t i = 0; i < n; ++i) {
        const int code = (k + i) % 2 == 0 ? row[(k + i) / 2] >> 4 : row[(k + i) / 2] & 15;
        staged[i / 2] = static_cast<std::uint8_t>(staged[i / 2] | code << (i % 2 == 0 ? 4 : 0));
      }
    }
  } else {
    constexpr int bytes = Decoder::bits / 8;
    std::memcpy(staged, row + k * bytes, static_cast<std::size_t>(n * bytes));
  }
  return Simd::first(decoder.decode(staged), static_cast<int>(n));
}

// The part of [first, last) in whole vectors that begin at a byte ends here.
template <class Decoder>
std::int64_t whole_end(std::int64_t first, std::int64_t last) {
  if (Decoder::bits == 4 && first % 2 != 0) return first;
  return first + (last - first) / kLanes * kLanes;
}

// Calls run with the weight's decoder. Where a row has one scale and `late_scale` is set, the
// decoder leaves it to the caller.
template <class Value, class Run>
void with_byte(const Weight& weight, bool late_scale, const Run& run) {
  if (late_scale && weight.at.groups_per_row == 1) return run(Byte<Value, false>(weight));
  run(Byte<Value, true>(weight));
}

template <class Run>
void with_decoder(const Weight& weight, bool late_scale, const Run& run) {
  const Format& format = *weight.format;
  if (format.family == Family::cast) {
    if (format.encoder == Encoder::fp16) return run(Cast<DType::f16>(weight));
    return run(Cast<DType::bf16>(weight));
  }
  if (format.bits == 4) {
    if (format.family == Family::codebook) return run(Codebook4(weight));
    return run(Integer4(weight));
  }
  if (format.family == Family::affine) return with_byte<Integer8>(weight, late_scale, run);
  if (format.encoder == Encoder::e4m3) return with_byte<E4m3>(weight, late_scale, run);
  if (format.encoder == Encoder::e5m2) return with_byte<E5m2>(weight, late_scale, run);
  with_byte<Codebook8>(weight, late_scale, run);
}

// Groups of a row as the loops see them: a row without scales is one group.
struct Groups {
  std::int64_t count, size;
  explicit Groups(const Layout& at)
      : count(at.groups_per_row > 0 ? at.groups_per_row : 1),
        size(at.groups_per_row > 0 ? at.group : at.cols) {}
};

template <DType type, class Decoder>
void dequantize_row(Decoder& decoder, const Weight& weight, const Scales& scales, std::int64_t row,
                    std::uint8_t* out) {
  constexpr int size = bytes_of(type);
  const std::uint8_t* codes = weight.codes + row * weight.at.row_code_bytes;
  const Groups groups(weight.at);
  const float* scale = scales.row(row);
  for (std::int64_t g = 0; g < groups.count; ++g) {
    decoder.group(row * groups.count + g, scale[g]);
    std::int64_t k = g * groups.size;
    const std::int64_t last = smaller(k + groups.size, weight.at.cols);
    for (const std::int64_t whole = whole_end<Decoder>(k, last); k < whole; k += kLanes) {
      store<type>(out + k * size, decoder.decode(codes + k * Decoder::bits / 8));
    }
    for (; k < last; k += kLanes) {
      const std::int64_t n = smaller(kLanes, last - k);
      store_part<type>(out + k * size, decode_part(decoder, codes, k, n), n);
    }
  }
}

void dequantize(const Weight& weight, std::int64_t begin, std::int64_t end, void* out, DType type,
                std::int64_t stride) {
  const Scales scales(weight);
  with_type(type, [&]<DType to>() {
    with_decoder(weight, false, [&](auto decoder) {
      auto target = static_cast<std::uint8_t*>(out);
      for (std::int64_t r = begin; r < end; ++r, target += stride * bytes_of(to)) {
        dequantize_row<to>(decoder, weight, scales, r, target);
      }
    });
  });
}

// Products of one row of the weight with T rows of x. U vectors are in flight per row of x: chains
// of dependent additions are what bounds this loop, and T * U of them, at most eight so that AVX2
// keeps them in registers, hide the latency of an FMA.
template <int T, class Decoder>
void dot_rows(Decoder& decoder, const Weight& weight, const Scales& scales, std::int64_t row,
              const float* x, std::int64_t x_stride, float* sums) {
  constexpr int U = T >= 8 ? 1 : T >= 4 ? 2 : 4;
  const std::uint8_t* codes = weight.codes + row * weight.at.row_code_bytes;
  const Groups groups(weight.at);
  const float* scale = scales.row(row);
  F total[T][U];
  for (int t = 0; t < T; ++t) {
    for (int u = 0; u < U; ++u) total[t][u] = Simd::set1(0.0f);
  }
  auto add_group = [&](std::int64_t g, int from) __attribute__((always_inline)) {
    if constexpr (Decoder::scaled) decoder.group(row * groups.count + g, scale[g]);
    std::int64_t k = g * groups.size;
    const std::int64_t last = smaller(k + groups.size, weight.at.cols);
    const std::int64_t whole = whole_end<Decoder>(k, last);
    auto add = [&](int u) __attribute__((always_inline)) {
      const F value = decoder.decode(codes + k * Decoder::bits / 8);
      for (int t = 0; t < T; ++t) {
        total[t][u] = Simd::fma(Simd::load(x + t * x_stride + k), value, total[t][u]);
      }
      k += kLanes;
    };
    while (k + U * kLanes <= whole) {
      for (int u = 0; u < U; ++u) add(u);
    }
    while (k + 2 * kLanes <= whole) {
      add(from);
      add((from + 1) % U);
    }
    if (k < whole) add(from);
    for (; k < last; k += kLanes) {
      const std::int64_t n = smaller(kLanes, last - k);
      const F value = decode_part(decoder, codes, k, n);
      for (int t = 0; t < T; ++t) {
        const F part = load_part<DType::f32>(x + t * x_stride + k, n);
        total[t][from] = Simd::fma(part, value, total[t][from]);
      }
    }
  };
  std::int64_t g = 0;
  if constexpr (U == 4) {
    // Neighbouring groups begin with different sums, so that short groups keep all of them busy.
    for (; g + 2 <= groups.count; g += 2) {
      add_group(g, 0);
      add_group(g + 1, 2);
    }
  }
  for (; g < groups.count; ++g) add_group(g, 0);
  for (int t = 0; t < T; ++t) {
    for (int u = U - 1; u > 0; --u) total[t][u / 2] = total[t][u / 2] + total[t][u];
    sums[t] = Simd::sum(total[t][0]);
    if constexpr (!Decoder::scaled) sums[t] *= scale[0];
  }
}

template <int T, class Decoder>
void linear_rows(Decoder decoder, const Weight& weight, const Scales& scales, const float* x,
                 std::int64_t x_stride, const float* bias, std::uint8_t* out, DType type,
                 std::int64_t out_stride, std::int64_t begin, std::int64_t end) {
  const int size = bytes_of(type);
  for (std::int64_t n = begin; n < end; ++n) {
    float sums[T];
    dot_rows<T>(decoder, weight, scales, n, x, x_stride, sums);
    for (int t = 0; t < T; ++t) {
      const F value = Simd::set1(sums[t] + (bias ? bias[n] : 0.0f));
      std::uint8_t* target = out + (t * out_stride + n) * size;
      with_type(type, [&]<DType to>() { store_part<to>(target, value, 1); });
    }
  }
}

void linear(const Weight& weight, const void* x, DType type, std::int64_t count,
            std::int64_t x_stride, const float* bias, void* out, std::int64_t out_stride,
            std::int64_t begin, std::int64_t end) {
  // x is widened once, not once per row of the weight.
  constexpr std::int64_t most_rows = 8;
  const std::int64_t cols = weight.at.cols;
  const Scratch<float> widened(type == DType::f32 ? 0 : smaller(count, most_rows) * cols);
  const Scales scales(weight);
  with_decoder(weight, true, [&](auto decoder) {
    std::int64_t i = 0;
    while (i < count) {
      const std::int64_t left = count - i;
      const std::int64_t rows = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const float* from = static_cast<const float*>(x) + i * x_stride;
      std::int64_t stride = x_stride;
      if (type != DType::f32) {
        for (std::int64_t t = 0; t < rows; ++t) {
          float_row(x, type, (i + t) * x_stride, cols, widened.get() + t * cols);
        }
        from = widened.get();
        stride = cols;
      }
      auto target = static_cast<std::uint8_t*>(out) + i * out_stride * bytes_of(type);
      auto run = [&]<int T>() {
        linear_rows<T>(decoder, weight, scales, from, stride, bias, target, type, out_stride, begin,
                       end);
      };
      if (rows == 8) run.template operator()<8>();
      if (rows == 4) run.template operator()<4>();
      if (rows == 2) run.template operator()<2>();
      if (rows == 1) run.template operator()<1>();
      i += rows;
    }
  });
}

// Kernels::spin: twelve sums hide the latency of an FMA on two ports.
std::int64_t spin(DType, std::int64_t rounds) {
  constexpr int count = 12;
  F sums[count], x = Simd::set1(0.0f);
  const F w = Simd::set1(0.0f);
#pragma GCC unroll 12
  for (int i = 0; i < count; ++i) {
    sums[i] = Simd::set1(0.0f);
    asm volatile("" : "+v"(sums[i]));  // equal sums would be computed once
  }
  for (std::int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : "+v"(x));  // nothing to hoist
#pragma GCC unroll 12
    for (int i = 0; i < count; ++i) sums[i] = Simd::fma(x, w, sums[i]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < count; ++i) asm volatile("" : : "v"(sums[i]));
  return rounds * count * kLanes;
}

}  // namespace
}  // namespace vramkit::cpu
