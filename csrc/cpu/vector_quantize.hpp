// The vector encoders: the same codes, scales and zero points, bit for bit, as the scalar
// reference. See vector_common.hpp for how units include this.
//
// Codes are made one byte per element; four-bit ones are packed a row at a time.
#pragma once
#include "cpu/vector_common.hpp"

namespace vramkit::cpu {
namespace {

// Each lane's bits where the mask (all ones or all zeros) says so.
I where(I mask, int bits) { return mask & bits; }

// Number of bounds, out of fifteen sorted ones, that lie below y: a binary search in registers.
class Search16 {
 public:
  // The step of size s looks at bounds[index + s - 1].
  explicit Search16(const float* bounds)  // fifteen, then infinity
      : middle_(Simd::set1(bounds[7])),
        by4_(from(bounds, 3)),
        by2_(from(bounds, 1)),
        by1_(from(bounds, 0)) {}
  I index(F y) const {
    I found = where(y > middle_, 8);
    found += where(y > Simd::lookup(by4_, found), 4);
    found += where(y > Simd::lookup(by2_, found), 2);
    found += where(y > Simd::lookup(by1_, found), 1);
    return found;
  }

 private:
  static Simd::Table16 from(const float* bounds, int offset) {
    float shifted[16];
    for (int i = 0; i < 16; ++i) shifted[i] = bounds[i + offset < 15 ? i + offset : 15];
    return Simd::table(shifted);
  }
  F middle_;
  Simd::Table16 by4_, by2_, by1_;
};

// Encoders: what a vector of x * factor becomes, one code in the low byte of each lane.

class Midpoint4 {
 public:
  explicit Midpoint4(const SortedTable& sorted)
      : search_(Bounds(sorted).all), codes_(Simd::table(Codes(sorted).all)) {}
  I operator()(F y) const {
    y = Simd::min(Simd::max(y, Simd::set1(-1.0f)), Simd::set1(1.0f));
    return (I)Simd::lookup(codes_, search_.index(y));
  }

 private:
  struct Bounds {
    float all[16];
    explicit Bounds(const SortedTable& sorted) {
      for (int i = 0; i < 15; ++i) all[i] = sorted.bounds.data()[i];
      all[15] = __builtin_inff();
    }
  };
  struct Codes {  // the bits of integers, in floats
    float all[16];
    explicit Codes(const SortedTable& sorted) {
      for (int i = 0; i < 16; ++i) {
        const std::int32_t code = sorted.code_of.data()[i];
        std::memcpy(&all[i], &code, sizeof(code));
      }
    }
  };
  Search16 search_;
  Simd::Table16 codes_;
};

// 255 bounds: every sixteenth in registers, then the sixteen between two of those from memory.
class Midpoint8 {
 public:
  explicit Midpoint8(const SortedTable& sorted) : coarse_(Coarse(sorted).all) {
    for (int i = 0; i < 256; ++i) {
      bounds_[i] = i < 255 ? sorted.bounds.data()[i] : __builtin_inff();
      const std::int32_t code = sorted.code_of.data()[i];
      std::memcpy(&codes_[i], &code, sizeof(code));
    }
  }
  I operator()(F y) const {
    y = Simd::min(Simd::max(y, Simd::set1(-1.0f)), Simd::set1(1.0f));
    I found = coarse_.index(y) * 16;
    for (int step = 8; step > 0; step /= 2) {
      found += where(y > Simd::gather(bounds_ + step - 1, found), step);
    }
    return (I)Simd::gather(codes_, found);
  }

 private:
  struct Coarse {
    float all[16];
    explicit Coarse(const SortedTable& sorted) {
      for (int i = 0; i < 15; ++i) all[i] = sorted.bounds.data()[16 * i + 15];
      all[15] = __builtin_inff();
    }
  };
  Search16 coarse_;
  float bounds_[256];
  float codes_[256];  // the bits of integers
};

// A float of one byte with M mantissa bits and exponent bias `bias`; `largest` is the code of its
// largest number. For finite input.
template <int M, int bias, int largest>
struct Small {
  I operator()(F y) const {
    constexpr int drop = 23 - M;
    constexpr int smallest_normal = (127 + 1 - bias) << 23;
    const I bits = (I)y;
    const I magnitude = bits & 0x7fffffff;
    const I rounded = magnitude + ((1 << (drop - 1)) - 1) + (magnitude >> drop & 1);
    const I normal = (rounded >> drop) - ((127 - bias) << M);
    // Below the normal numbers codes count multiples of the smallest one, 2^(1 - bias - M).
    constexpr float per_step = static_cast<float>(1 << (bias + M - 1));
    const I subnormal = Simd::to_int_even((F)magnitude * Simd::set1(per_step));
    const I code = magnitude < smallest_normal ? subnormal : normal;
    return Simd::min(code, I{} + largest) | (bits >> 24 & 0x80);
  }
};

struct Symmetric {
  I operator()(F y) const {
    return Simd::min(Simd::max(Simd::to_int_even(y), I{} - 127), I{} + 127);
  }
};

F round_even(F v) { return (v + 12582912.0f) - 12582912.0f; }

// affine4_level of encode.hpp.
F affine4_level(F x, F factor, F zero) {
  const F limited = Simd::min(Simd::max(x * factor, Simd::set1(-512.0f)), Simd::set1(512.0f));
  const F level = round_even(limited) + zero;
  return Simd::min(Simd::max(level, Simd::set1(0.0f)), Simd::set1(15.0f));
}

class Affine4Encoder {
 public:
  explicit Affine4Encoder(const Affine4& fit)
      : factor_(Simd::set1(fit.factor)), zero_(Simd::set1(static_cast<float>(fit.zero))) {}
  I operator()(F x) const { return Simd::to_int_even(affine4_level(x, factor_, zero_)); }

 private:
  F factor_, zero_;
};

F level_of(F y, F low, F high) { return round_even(Simd::min(Simd::max(y, low), high)); }

// LevelScorer of encode.hpp, its sixteen lanes in one or two vectors. Zeros pad a short last one:
// they lie on a level, and add nothing.
class VectorScorer {
 public:
  VectorScorer(const float* x, std::int64_t count) : x_(x), count_(count) {}

  template <int C>
  void misses(const LevelGrid<C>& grid, float* out) const {
    F sums[C][kParts];
    for (int c = 0; c < C; ++c) {
      for (F& part : sums[c]) part = Simd::set1(0.0f);
    }
    each([&](F x, int part) {
      for (int c = 0; c < C; ++c) {
        const F y = x * Simd::set1(grid.factor[c]);
        const F miss = y - level_of(y, Simd::set1(grid.low[c]), Simd::set1(grid.high[c]));
        sums[c][part] += miss * miss;
      }
    });
    for (int c = 0; c < C; ++c) out[c] = total(sums[c]);
  }

  float refit(const LevelGrid<1>& at) const {
    F product[kParts], power[kParts];
    for (int p = 0; p < kParts; ++p) product[p] = power[p] = Simd::set1(0.0f);
    each([&](F x, int part) {
      const F y = x * Simd::set1(at.factor[0]);
      const F level = level_of(y, Simd::set1(at.low[0]), Simd::set1(at.high[0]));
      product[part] += y * level;
      power[part] += level * level;
    });
    return total(product) / total(power);
  }

 private:
  static constexpr int kParts = 16 / kLanes;

  template <class Add>
  void each(const Add& add) const {
    std::int64_t i = 0;
    for (; i + 16 <= count_; i += 16) {
      for (int p = 0; p < kParts; ++p) add(Simd::load(x_ + i + p * kLanes), p);
    }
    for (int p = 0; p < kParts && i < count_; ++p, i += kLanes) {
      add(load_part<DType::f32>(x_ + i, smaller(kLanes, count_ - i)), p);
    }
  }
  static float total(const F* sums) {
    return Simd::sum(kParts == 2 ? sums[0] + sums[kParts - 1] : sums[0]);
  }

  const float* x_;
  std::int64_t count_;
};

// The largest magnitude, or NaN if there is anything but finite numbers. Magnitudes order as their
// bits do, with infinity and NaN above all numbers.
float absmax_of(const float* x, std::int64_t count) {
  I most{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    most = Simd::max(most, (I)Simd::load(x + i) & 0x7fffffff);
  }
  if (i < count) {
    most = Simd::max(most, (I)load_part<DType::f32>(x + i, count - i) & 0x7fffffff);
  }
  const std::int32_t bits = Simd::most(most);
  float absmax;
  std::memcpy(&absmax, &bits, sizeof(bits));
  return bits < 0x7f800000 ? absmax : __builtin_nanf("");
}

// The least and the largest of count >= 1 finite numbers.
struct Range {
  float low, high;
};
Range range_of(const float* x, std::int64_t count) {
  F low = Simd::set1(x[0]), high = low;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F v = Simd::load(x + i);
    low = Simd::min(low, v);
    high = Simd::max(high, v);
  }
  Range range{Simd::least(low), Simd::most(high)};
  for (; i < count; ++i) {
    range.low = x[i] < range.low ? x[i] : range.low;
    range.high = x[i] > range.high ? x[i] : range.high;
  }
  return range;
}

template <class Encode>
void encode_group(const Encode& encode, const float* x, float factor, std::int64_t count,
                  std::uint8_t* codes) {
  const F factors = Simd::set1(factor);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Simd::store_bytes(codes + i, encode(Simd::load(x + i) * factors));
  }
  if (i == count) return;
  std::uint8_t staged[kLanes];
  Simd::store_bytes(staged, encode(load_part<DType::f32>(x + i, count - i) * factors));
  std::memcpy(codes + i, staged, static_cast<std::size_t>(count - i));
}

// Packs codes two to a byte, the first in the high nibble.
void pack_nibbles(const std::uint8_t* codes, std::int64_t count, std::uint8_t* out) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const __m128i words = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x0110));  // 16 * even + odd
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i / 2), _mm_packus_epi16(words, words));
  }
  for (; i < count; i += 2) {
    const int low = i + 1 < count ? codes[i + 1] : 0;
    out[i / 2] = static_cast<std::uint8_t>(codes[i] << 4 | low);
  }
}

// What one quantize call works on.
struct Job {
  const Format& format;
  const Layout& at;
  const void* x;
  DType type;
  std::int64_t stride;
  Parts out;
  std::int64_t begin, end;
};

// Runs group(x, count, codes, index) over all groups, `codes` being one byte per element.
template <class Group>
void each_group(const Job& job, const Group& group) {
  const Layout& at = job.at;
  const bool packed = job.format.bits == 4;
  const Scratch<float> floats(job.type == DType::f32 ? 0 : at.cols);
  const Scratch<std::uint8_t> unpacked(packed ? at.cols : 0);
  for (std::int64_t r = job.begin; r < job.end; ++r) {
    const float* x = float_row(job.x, job.type, r * job.stride, at.cols, floats.get());
    std::uint8_t* target = job.out.codes + r * at.row_code_bytes;
    std::uint8_t* codes = packed ? unpacked.get() : target;
    for (std::int64_t g = 0; g < at.groups_per_row; ++g) {
      const std::int64_t first = g * at.group;
      group(x + first, smaller(at.group, at.cols - first), codes + first,
            r * at.groups_per_row + g);
    }
    if (packed) pack_nibbles(codes, at.cols, target);
  }
}

// absmax / `most` is the scale of a group.
template <class Encode>
void quantize_scaled(const Job& job, const Encode& encode, float most) {
  each_group(job, [&](const float* x, std::int64_t count, std::uint8_t* codes, std::int64_t index) {
    const float absmax = absmax_of(x, count);
    if (absmax != absmax) {
      write<float>(job.out.scales, index, absmax);
      std::memset(codes, 0, static_cast<std::size_t>(count));
      return;
    }
    write<float>(job.out.scales, index, most == 1.0f ? absmax : absmax / most);
    encode_group(encode, x, encode_factor(absmax, most), count, codes);
  });
}

void quantize_searched4(const Job& job) {
  each_group(job, [&](const float* x, std::int64_t count, std::uint8_t* codes, std::int64_t index) {
    const float absmax = absmax_of(x, count);
    if (absmax != absmax) {
      write<std::uint16_t>(job.out.scales, index, 0x7e00);
      job.out.extra[index] = 0;
      std::memset(codes, 0, static_cast<std::size_t>(count));
      return;
    }
    const Range range = range_of(x, count);
    const Affine4 fit = search_affine4(range.low, range.high, VectorScorer(x, count));
    write<std::uint16_t>(job.out.scales, index, fit.scale);
    job.out.extra[index] = fit.zero;
    encode_group(Affine4Encoder(fit), x, 1.0f, count, codes);
  });
}

void quantize_searched8(const Job& job) {
  each_group(job, [&](const float* x, std::int64_t count, std::uint8_t* codes, std::int64_t index) {
    const float absmax = absmax_of(x, count);
    if (absmax != absmax) {
      write<float>(job.out.scales, index, absmax);
      std::memset(codes, 0, static_cast<std::size_t>(count));
      return;
    }
    const Scale8 fit = search_scale8(absmax, VectorScorer(x, count));
    write<float>(job.out.scales, index, fit.scale);
    encode_group(Symmetric{}, x, fit.factor, count, codes);
  });
}

void quantize_cast(const Job& job) {
  with_type(job.type, [&]<DType from>() {
    for (std::int64_t r = job.begin; r < job.end; ++r) {
      auto source = static_cast<const std::uint8_t*>(job.x) + r * job.stride * bytes_of(from);
      std::uint8_t* target = job.out.codes + r * job.at.row_code_bytes;
      if (job.format.encoder == Encoder::fp16) {
        convert<from, DType::f16>(source, target, job.at.cols);
      } else {
        convert<from, DType::bf16>(source, target, job.at.cols);
      }
    }
  });
}

void quantize(const Format& format, const SortedTable& sorted, const Layout& at, const void* x,
              DType type, std::int64_t stride, Parts out, std::int64_t begin, std::int64_t end) {
  const Job job{format, at, x, type, stride, out, begin, end};
  switch (format.encoder) {
    case Encoder::midpoint:
      if (format.bits == 4) return quantize_scaled(job, Midpoint4(sorted), 1.0f);
      return quantize_scaled(job, Midpoint8(sorted), 1.0f);
    case Encoder::e4m3:
      return quantize_scaled(job, Small<3, 7, 0x7e>{}, 448.0f);
    case Encoder::e5m2:
      return quantize_scaled(job, Small<2, 15, 0x7b>{}, 57344.0f);
    case Encoder::symmetric:
      return quantize_scaled(job, Symmetric{}, 127.0f);
    case Encoder::searched:
      return format.bits == 4 ? quantize_searched4(job) : quantize_searched8(job);
    case Encoder::fp16:
    case Encoder::bf16:
      return quantize_cast(job);
  }
}

}  // namespace
}  // namespace vramkit::cpu
