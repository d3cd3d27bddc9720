// Decoding stored weights, and the casts: what one thread of a GPU does, as functions that the host
// compiles too, so that tests run these very bodies, thread by thread, against the scalar reference
// (csrc/cpu/reference.cpp). The kernels around them are in decode.cu.
//
// Every result has the reference's bits, NaN included: products and sums are rounded one by one
// (nvcc is told -fmad=false), and a NaN is the operand's, as on a processor, where a GPU would
// make its own.
//
//   a row     | 0 .. 7 | 8 .. 15 | … | the last may be short |     a thread has 8 elements
//   a block   kThreads threads, kRounds times: what the tables cost is shared by as many
//
// Codes may lie at any address: eight elements are read at once where the address allows it.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/format.hpp"
#include "core/half.hpp"
#include "core/portable.hpp"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace vramkit::cuda {

enum class Element : std::int32_t { f32 = 0, bf16 = 1, f16 = 2 };
// What a code is.
enum class Codes : std::int32_t { fp16, bf16, table4, table8, integer8, affine4 };

inline constexpr int kThreads = 256;
inline constexpr int kRounds = 4;
inline constexpr int kChunk = 8;  // elements of one thread

// Plain data, passed to the kernel by value. Rows [first_row, first_row + rows) of a row-separable
// weight (cpu::Weight says what the fields are).
struct DecodeJob {
  const std::uint8_t* codes = nullptr;
  const std::uint8_t* scales = nullptr;
  const std::uint8_t* extra = nullptr;
  const float* table = nullptr;
  const std::uint8_t* nested_offset = nullptr;
  std::int64_t first_scale = 0;
  std::int64_t rows = 0, cols = 0, first_row = 0;
  std::int64_t row_code_bytes = 0, group = 1, groups_per_row = 0;
  ScaleType scale = ScaleType::none;
  void* out = nullptr;
  std::int64_t out_stride = 0;  // elements
};

// The values of nested scales' codes.
struct NestedMap {
  float value[256];
};

// Shared by the threads of a block.
struct DecodeTables {
  float table[256];
  float nested[256];
};

// x (any Element) to 16-bit floats in rows of 2 * cols bytes.
struct CastJob {
  const void* x = nullptr;
  std::int64_t rows = 0, cols = 0, stride = 0;  // elements
  std::uint8_t* codes = nullptr;
};

constexpr std::int64_t chunks_per_row(std::int64_t cols) { return (cols + kChunk - 1) / kChunk; }
constexpr std::int64_t blocks_for(std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t each = std::int64_t{kThreads} * kRounds;
  return (rows * chunks_per_row(cols) + each - 1) / each;
}

VRAMKIT_ANYWHERE inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
VRAMKIT_ANYWHERE inline float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
VRAMKIT_ANYWHERE inline bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }

// The NaN that a processor makes of these operands: the first one's, made quiet, else its own.
VRAMKIT_ANYWHERE inline float nan_of(float a, float b) {
  if (is_nan(a)) return float_of(bits_of(a) | 0x400000u);
  if (is_nan(b)) return float_of(bits_of(b) | 0x400000u);
  return float_of(0xffc00000u);
}
VRAMKIT_ANYWHERE inline float product_of(float a, float b) {
  const float product = a * b;
  return is_nan(product) ? nan_of(a, b) : product;
}
VRAMKIT_ANYWHERE inline float sum_of(float a, float b) {
  const float sum = a + b;
  return is_nan(sum) ? nan_of(a, b) : sum;
}

// As core/half.hpp, by the GPU's own conversion where that gives the same: not for NaN.
VRAMKIT_ANYWHERE inline float half_to_float(std::uint16_t h) {
#if defined(__CUDA_ARCH__)
  if ((h & 0x7c00u) != 0x7c00u) return __half2float(__ushort_as_half(h));
#endif
  return fp16_to_float(h);
}
VRAMKIT_ANYWHERE inline std::uint16_t float_to_half(float x) {
#if defined(__CUDA_ARCH__)
  if (!is_nan(x)) return __half_as_ushort(__float2half_rn(x));
#endif
  return float_to_fp16(x);
}

// `N` bytes, a power of two up to 16, of which `count` are there: at once if they may be.
template <int N>
VRAMKIT_ANYWHERE inline void load_bytes(const std::uint8_t* from, int count, std::uint8_t* to) {
  if (count == N && (reinterpret_cast<std::uintptr_t>(from) & (N - 1)) == 0) {
    memcpy(to, __builtin_assume_aligned(from, N), N);
    return;
  }
  VRAMKIT_UNROLLED
  for (int i = 0; i < N; ++i) to[i] = i < count ? from[i] : std::uint8_t{0};
}
template <int N>
VRAMKIT_ANYWHERE inline void store_bytes(std::uint8_t* to, int count, const std::uint8_t* from) {
  if (count == N && (reinterpret_cast<std::uintptr_t>(to) & (N - 1)) == 0) {
    memcpy(__builtin_assume_aligned(to, N), from, N);
    return;
  }
  VRAMKIT_UNROLLED
  for (int i = 0; i < N; ++i) {
    if (i < count) to[i] = from[i];
  }
}

template <class T>
VRAMKIT_ANYWHERE inline T read_at(const std::uint8_t* bytes, std::int64_t index) {
  std::uint8_t raw[sizeof(T)];
  load_bytes<sizeof(T)>(bytes + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T), raw);
  T value;
  memcpy(&value, raw, sizeof(T));
  return value;
}

// a / b for a >= 0 and b > 0. 64-bit divisions are slow on a GPU, and seldom needed.
VRAMKIT_ANYWHERE inline std::int64_t quotient(std::int64_t a, std::int64_t b) {
  if (a <= 0xffffffffll && b <= 0xffffffffll) {
    return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  }
  return a / b;
}

// Row and first element of a chunk.
struct ChunkPlace {
  std::int64_t row, col;
};
VRAMKIT_ANYWHERE inline ChunkPlace place_of(std::int64_t chunk, std::int64_t per_row) {
  const std::int64_t row = quotient(chunk, per_row);
  return {row, (chunk - row * per_row) * kChunk};
}

VRAMKIT_ANYWHERE inline float scale_at(const DecodeJob& job, const DecodeTables& shared,
                                       std::int64_t index) {
  switch (job.scale) {
    case ScaleType::f32:
      return read_at<float>(job.scales, index);
    case ScaleType::f16:
      return half_to_float(read_at<std::uint16_t>(job.scales, index));
    case ScaleType::nested: {
      const std::int64_t outer = (job.first_scale + index) / kNestedBlock;
      const float product =
          product_of(shared.nested[job.scales[index]], read_at<float>(job.extra, outer));
      return sum_of(product, read_at<float>(job.nested_offset, 0));
    }
    default:
      return 1.0f;
  }
}

template <Element E>
VRAMKIT_ANYWHERE inline void store_chunk(void* out, std::int64_t at, int count,
                                         const float (&value)[kChunk]) {
  if constexpr (E == Element::f32) {
    auto* to = reinterpret_cast<std::uint8_t*>(static_cast<float*>(out) + at);
    std::uint8_t raw[4 * kChunk];
    memcpy(raw, value, sizeof(raw));
    VRAMKIT_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const int left = count - 4 * half;
      store_bytes<16>(to + 16 * half, left >= 4 ? 16 : (left > 0 ? 4 * left : 0), raw + 16 * half);
    }
  } else {
    auto* to = reinterpret_cast<std::uint8_t*>(static_cast<std::uint16_t*>(out) + at);
    std::uint16_t rounded[kChunk];
    VRAMKIT_UNROLLED
    for (int i = 0; i < kChunk; ++i) {
      rounded[i] = E == Element::bf16 ? float_to_bf16(value[i]) : float_to_half(value[i]);
    }
    std::uint8_t raw[2 * kChunk];
    memcpy(raw, rounded, sizeof(raw));
    store_bytes<2 * kChunk>(to, 2 * count, raw);
  }
}

// First step of a block; the second begins when all of its threads are through with it.
template <Codes C>
VRAMKIT_ANYWHERE inline void fill_tables(const DecodeJob& job, const NestedMap& nested,
                                         DecodeTables& shared, int thread) {
  constexpr int entries = C == Codes::table4 ? 16 : (C == Codes::table8 ? 256 : 0);
  if (thread < entries) shared.table[thread] = job.table[thread];
  if (job.scale == ScaleType::nested) shared.nested[thread] = nested.value[thread];
}

// Columns [col, col + count) of one row, count being at most eight and col a multiple of it.
template <Codes C>
VRAMKIT_ANYWHERE inline void decode_values(const DecodeJob& job, const DecodeTables& shared,
                                           std::int64_t row, std::int64_t col, int count,
                                           float (&value)[kChunk]) {
  const std::uint8_t* codes = job.codes + row * job.row_code_bytes;
  if constexpr (C == Codes::fp16 || C == Codes::bf16) {
    std::uint8_t raw[2 * kChunk];
    load_bytes<2 * kChunk>(codes + 2 * col, 2 * count, raw);
    std::uint16_t half[kChunk];
    memcpy(half, raw, sizeof(raw));
    VRAMKIT_UNROLLED
    for (int i = 0; i < kChunk; ++i) {
      value[i] = C == Codes::fp16 ? half_to_float(half[i]) : bf16_to_float(half[i]);
    }
  } else {
    constexpr bool nibbles = C == Codes::table4 || C == Codes::affine4;
    constexpr int bytes = nibbles ? kChunk / 2 : kChunk;
    std::uint8_t raw[bytes];
    load_bytes<bytes>(codes + (nibbles ? col / 2 : col), nibbles ? (count + 1) / 2 : count, raw);
    const std::int64_t in_row = quotient(col, job.group);
    std::int64_t group = row * job.groups_per_row + in_row;
    std::int64_t next = (in_row + 1) * job.group;  // where the next group begins
    float scale = scale_at(job, shared, group);
    [[maybe_unused]] int zero = 0;
    if constexpr (C == Codes::affine4) zero = job.extra[group];
    VRAMKIT_UNROLLED
    for (int i = 0; i < kChunk; ++i) {
      if (i < count && col + i >= next) {
        ++group;
        next += job.group;
        scale = scale_at(job, shared, group);
        if constexpr (C == Codes::affine4) zero = job.extra[group];
      }
      const int code = nibbles ? (i % 2 == 0 ? raw[i / 2] >> 4 : raw[i / 2] & 15) : raw[i];
      float plain;
      if constexpr (C == Codes::table4 || C == Codes::table8) {
        plain = shared.table[code];
      } else if constexpr (C == Codes::integer8) {
        plain = static_cast<float>(static_cast<std::int8_t>(code));
      } else {
        plain = static_cast<float>(code - zero);
      }
      value[i] = product_of(plain, scale);
    }
  }
}

template <Codes C, Element E>
VRAMKIT_ANYWHERE inline void decode_chunk(const DecodeJob& job, const DecodeTables& shared,
                                          std::int64_t chunk) {
  const ChunkPlace at = place_of(chunk, (job.cols + kChunk - 1) / kChunk);
  const std::int64_t left = job.cols - at.col;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  float value[kChunk];
  decode_values<C>(job, shared, job.first_row + at.row, at.col, count, value);
  store_chunk<E>(job.out, at.row * job.out_stride + at.col, count, value);
}

// Second step.
template <Codes C, Element E>
VRAMKIT_ANYWHERE inline void decode_block(const DecodeJob& job, const DecodeTables& shared,
                                          std::int64_t block, int thread) {
  const std::int64_t chunks = job.rows * ((job.cols + kChunk - 1) / kChunk);
  for (int round = 0; round < kRounds; ++round) {
    const std::int64_t chunk = (block * kRounds + round) * kThreads + thread;
    if (chunk < chunks) decode_chunk<C, E>(job, shared, chunk);
  }
}

template <Element From, Codes To>
VRAMKIT_ANYWHERE inline void cast_chunk(const CastJob& job, std::int64_t chunk) {
  const ChunkPlace at = place_of(chunk, (job.cols + kChunk - 1) / kChunk);
  const std::int64_t left = job.cols - at.col;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  const std::int64_t first = at.row * job.stride + at.col;
  float value[kChunk];
  if constexpr (From == Element::f32) {
    const auto* from =
        reinterpret_cast<const std::uint8_t*>(static_cast<const float*>(job.x) + first);
    std::uint8_t raw[4 * kChunk];
    VRAMKIT_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const int rest = count - 4 * half;
      load_bytes<16>(from + 16 * half, rest >= 4 ? 16 : (rest > 0 ? 4 * rest : 0), raw + 16 * half);
    }
    memcpy(value, raw, sizeof(raw));
  } else {
    const auto* from =
        reinterpret_cast<const std::uint8_t*>(static_cast<const std::uint16_t*>(job.x) + first);
    std::uint8_t raw[2 * kChunk];
    load_bytes<2 * kChunk>(from, 2 * count, raw);
    std::uint16_t half[kChunk];
    memcpy(half, raw, sizeof(raw));
    VRAMKIT_UNROLLED
    for (int i = 0; i < kChunk; ++i) {
      value[i] = From == Element::bf16 ? bf16_to_float(half[i]) : half_to_float(half[i]);
    }
  }
  constexpr Element to = To == Codes::bf16 ? Element::bf16 : Element::f16;
  store_chunk<to>(job.codes, at.row * job.cols + at.col, count, value);
}

template <Element From, Codes To>
VRAMKIT_ANYWHERE inline void cast_block(const CastJob& job, std::int64_t block, int thread) {
  const std::int64_t chunks = job.rows * ((job.cols + kChunk - 1) / kChunk);
  for (int round = 0; round < kRounds; ++round) {
    const std::int64_t chunk = (block * kRounds + round) * kThreads + thread;
    if (chunk < chunks) cast_chunk<From, To>(job, chunk);
  }
}

}  // namespace vramkit::cuda
