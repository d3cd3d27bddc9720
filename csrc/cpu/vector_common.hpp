// What the vector kernels share: element types, partial vectors, scratch memory, scales.
//
// Included by each instruction-set unit after it has defined `Simd`, its vocabulary of vector
// operations, inside an anonymous namespace. So every unit compiles its own private copy, and no
// symbol built for one processor can be linked into code that runs on another. For the same reason
// nothing here instantiates templates of the standard library that could leave such symbols.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "cpu/encode.hpp"
#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

using F = Simd::F;
using I = Simd::I;
using U = Simd::U;
constexpr int kLanes = Simd::lanes;

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr int bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Uninitialized memory for `count` elements of T, aligned to a line of the cache.
template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t count)
      : data_(static_cast<T*>(
            ::operator new (static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete (data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// To nearest even; NaN stays NaN, quiet. Not the processor's own conversion: that one takes
// subnormal numbers for zero.
I bf16_bits(F v) {
  const U u = (U)v;
  const I rounded = (I)((u + 0x7fff + (u >> 16 & 1)) >> 16);
  const I quiet = (I)(u >> 16 | 0x40);
  return ((I)v & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
}

template <DType type>
F load(const void* p) {
  if constexpr (type == DType::f32) return Simd::load(p);
  if constexpr (type == DType::bf16) return Simd::load_bf16(p);
  if constexpr (type == DType::f16) return Simd::load_f16(p);
}

template <DType type>
void store(void* p, F v) {
  if constexpr (type == DType::f32) Simd::store(p, v);
  if constexpr (type == DType::bf16) Simd::store_halves(p, bf16_bits(v));
  if constexpr (type == DType::f16) Simd::store_f16(p, v);
}

// The first n elements; zero in the other lanes. Reads nothing past them.
template <DType type>
F load_part(const void* p, std::int64_t n) {
  alignas(64) std::uint8_t staged[kLanes * 4] = {};
  std::memcpy(staged, p, static_cast<std::size_t>(n * bytes_of(type)));
  return load<type>(staged);
}

template <DType type>
void store_part(void* p, F v, std::int64_t n) {
  alignas(64) std::uint8_t staged[kLanes * 4];
  store<type>(staged, v);
  std::memcpy(p, staged, static_cast<std::size_t>(n * bytes_of(type)));
}

template <DType from, DType to>
void convert(const void* in, void* out, std::int64_t count) {
  auto source = static_cast<const std::uint8_t*>(in);
  auto target = static_cast<std::uint8_t*>(out);
  std::int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    store<to>(target + k * bytes_of(to), load<from>(source + k * bytes_of(from)));
  }
  if (k == count) return;
  store_part<to>(target + k * bytes_of(to), load_part<from>(source + k * bytes_of(from), count - k),
                 count - k);
}

// Calls run with the type as a template argument: run.template operator()<type>().
template <class Run>
void with_type(DType type, const Run& run) {
  switch (type) {
    case DType::f32:
      return run.template operator()<DType::f32>();
    case DType::bf16:
      return run.template operator()<DType::bf16>();
    case DType::f16:
      return run.template operator()<DType::f16>();
  }
}

// Row r of a matrix as floats: in place, or converted into `buffer`.
const float* float_row(const void* x, DType type, std::int64_t at, std::int64_t cols,
                       float* buffer) {
  if (type == DType::f32) return static_cast<const float*>(x) + at;
  const auto halves = static_cast<const std::uint16_t*>(x) + at;
  if (type == DType::bf16) {
    convert<DType::bf16, DType::f32>(halves, buffer, cols);
  } else {
    convert<DType::f16, DType::f32>(halves, buffer, cols);
  }
  return buffer;
}

template <class T>
T read(const std::uint8_t* bytes, std::int64_t i) {
  T value;
  std::memcpy(&value, bytes + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void write(std::uint8_t* bytes, std::int64_t i, T value) {
  std::memcpy(bytes + i * static_cast<std::int64_t>(sizeof(T)), &value, sizeof(T));
}

// The scales of row r as floats, one per group; 1 where the format has none.
void row_scales(const Weight& weight, std::int64_t r, float* out) {
  const std::int64_t count = weight.at.groups_per_row, first = r * count;
  switch (weight.format->scale) {
    case ScaleType::f32:
      std::memcpy(out, weight.scales + first * 4, static_cast<std::size_t>(count) * 4);
      break;
    case ScaleType::f16:
      convert<DType::f16, DType::f32>(weight.scales + first * 2, out, count);
      break;
    case ScaleType::nested: {
      const float* map = dynamic_map().data();
      const float offset = read<float>(weight.nested_offset, 0);
      const std::int64_t start = weight.first_scale + first;
      std::int64_t g = 0;
      while (g < count) {  // runs of scales that share an outer one
        const std::int64_t outer = (start + g) / kNestedBlock;
        const std::int64_t last = smaller(count, (outer + 1) * kNestedBlock - start);
        const float by = read<float>(weight.extra, outer);
        // Two roundings, as bitsandbytes does it: no fused multiply-add.
        for (; g + kLanes <= last; g += kLanes) {
          const F inner = Simd::gather(map, Simd::bytes(weight.scales + first + g));
          Simd::store(out + g, inner * Simd::set1(by) + Simd::set1(offset));
        }
        for (; g < last; ++g) {
          const float product = map[weight.scales[first + g]] * by;
          out[g] = product + offset;
        }
      }
      break;
    }
    case ScaleType::none:
      out[0] = 1.0f;
      break;
  }
}

// The scales of one row at a time.
class Scales {
 public:
  explicit Scales(const Weight& weight) : weight_(weight), row_(weight.at.groups_per_row + 1) {}

  // One per group, valid until the next call.
  const float* row(std::int64_t r) const {
    row_scales(weight_, r, row_.get());
    return row_.get();
  }

 private:
  const Weight& weight_;
  Scratch<float> row_;
};

}  // namespace
}  // namespace vramkit::cpu
