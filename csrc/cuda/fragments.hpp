// Codes to operands of mma.sync: four neighbouring elements of a row, in registers.
//
// Four-bit table codes are looked up two at a time: a table of 256 pairs, by the packed byte. Bytes
// that lanes look up are random, and lanes that meet in a bank of shared memory wait for each
// other, so that the table is there in as many copies as fit: of 32 KiB, each lane has its own.
//
//   entry          4-bit codes                       8-bit codes
//   bf16, f16      {first, second}                   {value, value}
//   split          {pair 1, pair 2, pair 3, 0}       {parts 1 and 2, part 3 and 0}
//
// Integers are put behind the exponent of a large power of two, which then is subtracted: exact.
#pragma once
#include <cmath>

#include "cuda/products.hpp"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#endif

namespace vramkit::cuda {

template <Codes C>
inline constexpr int kCodeBits = C == Codes::table4 || C == Codes::affine4    ? 4
                                 : C == Codes::table8 || C == Codes::integer8 ? 8
                                                                              : 16;
template <Codes C>
inline constexpr bool kHasTable = C == Codes::table4 || C == Codes::table8;
// 16-bit numbers that a value becomes.
template <Codes C, Operand O>
inline constexpr int kValueParts = O != Operand::split ? 1
                                   : kHasTable<C>      ? 3
                                   : C == Codes::fp16  ? 2
                                                       : 1;
template <Codes C, Operand O>
inline constexpr int kEntryBytes = !kHasTable<C>         ? 0
                                   : O != Operand::split ? 4
                                   : C == Codes::table4  ? 16
                                                         : 8;
template <Operand O>
inline constexpr bool kIsHalf = O == Operand::f16;  // else bfloat16

// Four bytes of the eight in `low` and `high`, one for each hexadecimal digit of `which`. As one
// instruction of a GPU: a shift, a mask and an addition would take its place in every look-up.
VRAMKIT_ANYWHERE inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high,
                                                    std::uint32_t which) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, which);
#else
  std::uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t from = (which >> (4 * i)) & 7u;
    word |= (((from < 4 ? low : high) >> (8 * (from & 3u))) & 255u) << (8 * i);
  }
  return word;
#endif
}
VRAMKIT_ANYWHERE inline std::uint32_t byte_of(std::uint32_t word, std::uint32_t which) {
  return permute_bytes(word, 0, 0x4440u + which);
}
VRAMKIT_ANYWHERE inline float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// A float rounded to 16 bits.
template <Operand O>
VRAMKIT_ANYWHERE inline std::uint32_t round16(float value) {
  return kIsHalf<O> ? float_to_half(value) : float_to_bf16(value);
}
// Two of them, the first in the low half.
template <Operand O>
VRAMKIT_ANYWHERE inline std::uint32_t round_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  if constexpr (kIsHalf<O>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
#else
  return round16<O>(first) | round16<O>(second) << 16;
#endif
}
template <Operand O>
VRAMKIT_ANYWHERE inline float widen16(std::uint32_t bits) {
  const auto half = static_cast<std::uint16_t>(bits);
  return kIsHalf<O> ? half_to_float(half) : bf16_to_float(half);
}

// a - b in both halves; only used where the result is exact.
template <Operand O>
VRAMKIT_ANYWHERE inline std::uint32_t subtract_pairs(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  if constexpr (kIsHalf<O>) {
    const __half2 pair =
        __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                        *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
#else
  return round_pair<O>(widen16<O>(a) - widen16<O>(b), widen16<O>(a >> 16) - widen16<O>(b >> 16));
#endif
}

// A zero point as what `decode_four` subtracts.
template <Operand O>
VRAMKIT_ANYWHERE inline std::uint32_t zero_pair(std::uint32_t zero) {
  // 1024 + zero has all of its bits in float16; bfloat16 takes the zero by itself.
  const std::uint32_t one = kIsHalf<O> ? 0x6400u + zero : round16<O>(static_cast<float>(zero));
  return one | one << 16;
}

// The entries for byte `code`.
template <Codes C, Operand O>
VRAMKIT_ANYWHERE inline void table_entry(const float* table, int code, std::uint32_t (&entry)[4]) {
  constexpr bool nibbles = C == Codes::table4;
  const float first = table[nibbles ? code >> 4 : code];
  const float second = table[nibbles ? code & 15 : code];
  if constexpr (O != Operand::split) {
    entry[0] = round16<O>(first) | round16<O>(second) << 16;
  } else {
    const SplitFloat a = split_float(first), b = split_float(second);
    if constexpr (nibbles) {
      VRAMKIT_UNROLLED
      for (int p = 0; p < kSplitParts; ++p) {
        entry[p] = a.part[p] | static_cast<std::uint32_t>(b.part[p]) << 16;
      }
    } else {
      entry[0] = a.part[0] | static_cast<std::uint32_t>(a.part[1]) << 16;
      entry[1] = a.part[2];
    }
  }
}

// Copies of the table in `kBytes` of shared memory, [256][copies]; two steps with a barrier between
// them. `once` has room for one copy.
template <Codes C, Operand O>
VRAMKIT_ANYWHERE inline void fill_entries(const float* table, std::uint32_t* once, int thread,
                                          int threads) {
  constexpr int words = kEntryBytes<C, O> / 4;
  for (int code = thread; code < 256; code += threads) {
    std::uint32_t entry[4] = {};
    table_entry<C, O>(table, code, entry);
    VRAMKIT_UNROLLED
    for (int w = 0; w < words; ++w) once[code * words + w] = entry[w];
  }
}
struct alignas(16) FourWords {
  std::uint32_t word[4];
};
template <Codes C, Operand O, int kBytes>
VRAMKIT_ANYWHERE inline void copy_entries(const std::uint32_t* once, FourWords* copies, int thread,
                                          int threads) {
  constexpr int words = kEntryBytes<C, O> / 4;
  constexpr int each = kBytes / 256 / 16;  // vectors of one code
  static_assert(each > 0);
  for (int i = thread; i < kBytes / 16; i += threads) {
    FourWords vector;
    VRAMKIT_UNROLLED
    for (int w = 0; w < 4; ++w) vector.word[w] = once[i / each * words + w % words];
    copies[i] = vector;
  }
}

// Which copy of a table a lane reads, and where a code's entry lies.
template <Codes C, Operand O, int kBytes>
struct TableCopy {
  static constexpr int kEntry = kEntryBytes<C, O>;
  static constexpr int kStride = kBytes / 256;  // bytes from code to code
  const std::uint8_t* mine = nullptr;
  VRAMKIT_ANYWHERE static TableCopy of(const std::uint8_t* shared, int lane) {
    if constexpr (kEntry == 0) {
      return {};
    } else {
      return {shared + lane % (kStride / kEntry) * kEntry};
    }
  }
  template <class T>
  VRAMKIT_ANYWHERE T at(std::uint32_t code) const {
    return *reinterpret_cast<const T*>(mine + code * kStride);
  }
};
struct alignas(8) TwoWords {
  std::uint32_t word[2];
};

// Four codes to pairs of 16-bit numbers: out[part][0] has elements 0 and 1, [1] has 2 and 3. The
// codes are in 16, 32 or 64 bits, as they lie in memory.
template <Codes C, Operand O, class Table>
VRAMKIT_ANYWHERE inline void decode_four(std::uint32_t codes, [[maybe_unused]] std::uint32_t more,
                                         [[maybe_unused]] std::uint32_t zero,
                                         [[maybe_unused]] const Table& table,
                                         std::uint32_t (&out)[kValueParts<C, O>][2]) {
  if constexpr (C == Codes::table4) {
    VRAMKIT_UNROLLED
    for (int pair = 0; pair < 2; ++pair) {
      const std::uint32_t code = byte_of(codes, static_cast<unsigned>(pair));
      if constexpr (O == Operand::split) {
        const auto entry = table.template at<FourWords>(code);
        VRAMKIT_UNROLLED
        for (int p = 0; p < kSplitParts; ++p) out[p][pair] = entry.word[p];
      } else {
        out[0][pair] = table.template at<std::uint32_t>(code);
      }
    }
  } else if constexpr (C == Codes::table8) {
    VRAMKIT_UNROLLED
    for (int pair = 0; pair < 2; ++pair) {
      const std::uint32_t first = byte_of(codes, static_cast<unsigned>(2 * pair));
      const std::uint32_t second = byte_of(codes, static_cast<unsigned>(2 * pair + 1));
      if constexpr (O == Operand::split) {
        const auto a = table.template at<TwoWords>(first), b = table.template at<TwoWords>(second);
        out[0][pair] = (a.word[0] & 0xffffu) | b.word[0] << 16;
        out[1][pair] = a.word[0] >> 16 | (b.word[0] & 0xffff0000u);
        out[2][pair] = (a.word[1] & 0xffffu) | b.word[1] << 16;
      } else {
        out[0][pair] = (table.template at<std::uint32_t>(first) & 0xffffu) |
                       (table.template at<std::uint32_t>(second) & 0xffff0000u);
      }
    }
  } else if constexpr (C == Codes::affine4) {
    VRAMKIT_UNROLLED
    for (int pair = 0; pair < 2; ++pair) {
      // The high nibble of byte `pair` to the low half, its low nibble to the high half.
      const std::uint32_t nibbles =
          permute_bytes(codes >> 4, codes, 0x4400u + 0x1111u * static_cast<unsigned>(pair)) &
          0x000f000fu;
      if constexpr (kIsHalf<O>) {
        out[0][pair] = subtract_pairs<O>(nibbles | 0x64006400u, zero);
      } else {
        const std::uint32_t plain = subtract_pairs<O>(nibbles | 0x43004300u, 0x43004300u);
        out[0][pair] = subtract_pairs<O>(plain, zero);
      }
    }
  } else if constexpr (C == Codes::integer8) {
    VRAMKIT_UNROLLED
    for (int pair = 0; pair < 2; ++pair) {
      const std::uint32_t two = codes >> (16 * pair);
      const std::uint32_t bytes = (two & 255u) | (two & 0xff00u) << 8;
      if constexpr (kIsHalf<O>) {
        // 1024 + (code + 128), less 1152.
        out[0][pair] = subtract_pairs<O>((bytes ^ 0x00800080u) | 0x64006400u, 0x64806480u);
      } else {
        // 128 + low seven bits, less 128 or, where the code is negative, 256.
        out[0][pair] = subtract_pairs<O>((bytes & 0x007f007fu) | 0x43004300u,
                                         (bytes & 0x00800080u) | 0x43004300u);
      }
    }
  } else {
    const std::uint32_t both[2] = {codes, more};
    VRAMKIT_UNROLLED
    for (int pair = 0; pair < 2; ++pair) {
      const std::uint32_t two = both[pair];
      if constexpr ((C == Codes::bf16 && !kIsHalf<O>) || (C == Codes::fp16 && kIsHalf<O>)) {
        out[0][pair] = two;
      } else if constexpr (C == Codes::bf16) {
        out[0][pair] = round_pair<O>(float_of(two << 16), float_of(two & 0xffff0000u));
      } else {
        const float first = half_to_float(static_cast<std::uint16_t>(two));
        const float second = half_to_float(static_cast<std::uint16_t>(two >> 16));
        if constexpr (O == Operand::split) {  // 11 bits: two parts
          const SplitFloat a = split_float(first), b = split_float(second);
          VRAMKIT_UNROLLED
          for (int p = 0; p < 2; ++p) {
            out[p][pair] = a.part[p] | static_cast<std::uint32_t>(b.part[p]) << 16;
          }
        } else {
          out[0][pair] = round_pair<O>(first, second);
        }
      }
    }
  }
}

// A number of 1, 2 or 4 bytes at any address. Byte by byte, in a loop that is kept small, where the
// address is odd.
VRAMKIT_ANYWHERE inline std::uint32_t small_word(const std::uint8_t* at, int bytes) {
  if ((reinterpret_cast<std::uintptr_t>(at) & 3) == 0 && bytes == 4) {
    return *reinterpret_cast<const std::uint32_t*>(at);
  }
  if ((reinterpret_cast<std::uintptr_t>(at) & 1) == 0 && bytes == 2) {
    return *reinterpret_cast<const std::uint16_t*>(at);
  }
  std::uint32_t word = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int i = 0; i < bytes; ++i) word |= static_cast<std::uint32_t>(at[i]) << (8 * i);
  return word;
}

// A scale as it is stored, so that it can be asked for long before it is used.
VRAMKIT_ANYWHERE inline int scale_bytes(ScaleType type) {
  if (type == ScaleType::f32) return 4;
  return type == ScaleType::f16 ? 2 : type == ScaleType::nested ? 1 : 0;
}
VRAMKIT_ANYWHERE inline std::uint32_t raw_scale(const DecodeJob& job, std::int64_t index) {
  const int bytes = scale_bytes(job.scale);
  return small_word(job.scales + bytes * index, bytes);
}
VRAMKIT_ANYWHERE inline float finish_scale(const DecodeJob& job, std::uint32_t raw,
                                           std::int64_t index, const float* nested) {
  switch (job.scale) {
    case ScaleType::f32:
      return float_of(raw);
    case ScaleType::f16:
      return half_to_float(static_cast<std::uint16_t>(raw));
    case ScaleType::nested: {
      const std::int64_t outer = (job.first_scale + index) / kNestedBlock;
      return nested[raw] * float_of(small_word(job.extra + 4 * outer, 4)) +
             float_of(small_word(job.nested_offset, 4));
    }
    default:
      return 1.0f;
  }
}

}  // namespace vramkit::cuda
