// Products for a few rows of x: as fast as the packed weight can be read.
//
//   a block     16 features, up to 8 columns of x, and one split of the elements
//   a warp      the 16 features, and a share of the split: chunks of 64 elements
//   a lane      rows g and g + 8, elements 16 t … 16 t + 15 of a chunk, in vector loads
//
// Loads go straight to registers, several chunks ahead. A chunk's sum is multiplied by its group's
// scale and added; groups are a multiple of 64 elements, or a whole row. The warps' sums meet in
// shared memory, in the order of the warps.
#pragma once
#include "cuda/fragments.hpp"

namespace vramkit::cuda {

inline constexpr int kFewTableBytes = 32 << 10;

template <Codes C, Operand O>
struct FewShape {
  static constexpr int kRowBytes = 16 * kCodeBits<C> / 8;  // of a lane's elements in a chunk
  static constexpr int kVector = kRowBytes < 16 ? kRowBytes : 16;
  static constexpr int kDepth = kCodeBits<C> == 4 ? 4 : 2;  // chunks on their way
  // Shared memory: copies of the table, nested values, and sums (before them, one table).
  static constexpr int kTables = kHasTable<C> ? kFewTableBytes : 0;
  static constexpr int kNestedAt = kTables;
  static constexpr int kSumsAt = kNestedAt + 1024;
  static constexpr int shared_bytes(int warps) {
    const int sums = warps * kFewRows * kFewColumns * 4;
    const int once = 256 * kEntryBytes<C, O>;
    return kSumsAt + (sums > once ? sums : once);
  }
};

// `N` bytes to words; where not `whole`, those that are there, byte by byte. Codes are read `once`,
// and need not stay in the first cache.
template <int N, bool kOnce, class Context>
VRAMKIT_ANYWHERE inline void fetch(const Context& context, const std::uint8_t* from,
                                   std::int64_t there, bool whole, std::uint32_t* to) {
  constexpr int vector = N < 16 ? N : 16;
  if (whole) {
    VRAMKIT_UNROLLED
    for (int v = 0; v < N / vector; ++v) {
      if constexpr (kOnce) {
        context.template load_once<vector>(from + v * vector, to + v * vector / 4);
      } else {
        context.template load_often<vector>(from + v * vector, to + v * vector / 4);
      }
    }
    return;
  }
  VRAMKIT_UNROLLED
  for (int w = 0; w < N / 4; ++w) {
    std::uint32_t word = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int b = 0; b < 4; ++b) {
      if (4 * w + b < there) word |= static_cast<std::uint32_t>(from[4 * w + b]) << (8 * b);
    }
    to[w] = word;
  }
}

template <Codes C, Operand O, class Context>
VRAMKIT_ANYWHERE inline void few_block(Context& context, const ProductJob& job,
                                       const NestedMap& nested) {
  using Shape = FewShape<C, O>;
  constexpr int words = Shape::kRowBytes / 4, depth = Shape::kDepth;
  const DecodeJob& weight = job.weight;
  const int thread = context.thread(), lane = thread & 31, warp = thread >> 5;
  const int warps = context.threads() >> 5;
  const int g = lane >> 2, t = lane & 3;
  std::uint8_t* const shared = context.shared();
  auto* const nested_values = reinterpret_cast<float*>(shared + Shape::kNestedAt);
  auto* const sums = reinterpret_cast<float*>(shared + Shape::kSumsAt);

  // This warp's chunks, of all splits' and warps'.
  const std::int64_t chunks = (weight.cols + kFewSpan - 1) / kFewSpan;
  const std::int64_t part = std::int64_t{context.block_z()} * warps + warp;
  const std::int64_t of = std::int64_t{job.splits} * warps;
  const auto begin = static_cast<int>(quotient(chunks * part, of));
  const auto end = static_cast<int>(quotient(chunks * (part + 1), of));

  // Rows past the last are read as the last, and not written.
  const std::int64_t first_row = std::int64_t{context.block_x()} * kFewRows;
  const std::uint8_t* codes[2];
  std::int64_t scale_row[2];
  VRAMKIT_UNROLLED
  for (int half = 0; half < 2; ++half) {
    std::int64_t row = first_row + g + 8 * half;
    if (row >= weight.rows) row = weight.rows - 1;
    codes[half] = weight.codes + row * weight.row_code_bytes + t * Shape::kRowBytes;
    scale_row[half] = row * weight.groups_per_row;
  }
  const bool codes_aligned = ((reinterpret_cast<std::uintptr_t>(weight.codes) |
                               static_cast<std::uintptr_t>(weight.row_code_bytes)) &
                              (Shape::kVector - 1)) == 0;
  const int scale_size = scale_bytes(weight.scale);
  const bool wide_scale = scale_size == 4;
  const bool scales_aligned =
      scale_size < 2 || (reinterpret_cast<std::uintptr_t>(weight.scales) & (scale_size - 1)) == 0;
  const int width = whole_columns(kFewColumns, job.parts);
  const std::int64_t first_column = std::int64_t{context.block_y()} * width;
  const bool has_column = g < width && first_column + g < std::int64_t{job.rows} * job.parts;
  const std::uint16_t* const x = job.x + (has_column ? first_column + g : 0) * job.x_stride;
  const bool x_aligned =
      ((reinterpret_cast<std::uintptr_t>(job.x) | static_cast<std::uintptr_t>(2 * job.x_stride)) &
       15) == 0;
  // Chunks of a group, and where the next load is among them.
  const bool whole_row = weight.groups_per_row <= 1;
  const int group_chunks = whole_row ? 0x7fffffff : static_cast<int>(weight.group / kFewSpan);
  int group = whole_row ? 0 : begin / group_chunks;
  int left = whole_row ? 0x7fffffff : (group + 1) * group_chunks - begin;

  struct Chunk {
    std::uint32_t code[2][words];
    std::uint32_t x[8];
    std::uint32_t scale[2];
    std::uint32_t zero[2];
    int group;
  };
  Chunk held[depth] = {};
  // Chunks before this one have all of their elements, at addresses that vector loads take. The
  // usual way must be short: at the memory's rate a four-bit weight may cost five instructions.
  const std::int64_t full =
      codes_aligned && x_aligned && scales_aligned ? weight.cols / kFewSpan : 0;
  const int usual = full < end ? static_cast<int>(full) : end;
  const std::uint8_t* scale_at[2];
  VRAMKIT_UNROLLED
  for (int half = 0; half < 2; ++half) {
    scale_at[half] = weight.scales + scale_row[half] * scale_size;
  }
  const std::uint8_t* x_at = reinterpret_cast<const std::uint8_t*>(x + 16 * t);
  if constexpr (kValueParts<C, O> < 3) {  // else registers are short
    VRAMKIT_UNROLLED
    for (int half = 0; half < 2; ++half) {
      context.pin(codes[half]);
      context.pin(scale_at[half]);
    }
    context.pin(x_at);
  }
  const auto load = [&](Chunk& chunk, int index) {
    const std::int64_t first = std::int64_t{index} * kFewSpan;
    const std::int64_t at = std::int64_t{index} * (4 * Shape::kRowBytes);
    if (index < usual) {
      VRAMKIT_UNROLLED
      for (int half = 0; half < 2; ++half) {
        fetch<Shape::kRowBytes, true>(context, codes[half] + at, 0, true, chunk.code[half]);
        const std::uint8_t* const scale = scale_at[half] + std::int64_t{group} * scale_size;
        if (wide_scale) {
          chunk.scale[half] = *reinterpret_cast<const std::uint32_t*>(scale);
        } else if (scale_size == 2) {
          chunk.scale[half] = *reinterpret_cast<const std::uint16_t*>(scale);
        } else if (scale_size == 1) {
          chunk.scale[half] = *scale;
        }
      }
      if (has_column) fetch<32, false>(context, x_at + 2 * first, 0, true, chunk.x);
    } else {
      const bool inside = first + kFewSpan <= weight.cols;
      VRAMKIT_UNROLLED
      for (int half = 0; half < 2; ++half) {
        fetch<Shape::kRowBytes, true>(context, codes[half] + at,
                                      weight.row_code_bytes - at - t * Shape::kRowBytes,
                                      codes_aligned && inside, chunk.code[half]);
        chunk.scale[half] = raw_scale(weight, scale_row[half] + group);
      }
      if (has_column) {
        fetch<32, false>(context, x_at + 2 * first, 2 * (weight.cols - first - 16 * t),
                         x_aligned && inside, chunk.x);
      }
    }
    if constexpr (C == Codes::affine4) {
      VRAMKIT_UNROLLED
      for (int half = 0; half < 2; ++half) {
        chunk.zero[half] = weight.extra[scale_row[half] + group];
      }
    }
    chunk.group = group;
    if (--left == 0) {
      ++group;
      left = group_chunks;
    }
  };

  const auto table = TableCopy<C, O, Shape::kTables>::of(shared, lane);
  float total[4] = {};
  const auto multiply = [&](const Chunk& chunk) {
    float sum[4] = {};
    std::uint32_t zero[2] = {};
    if constexpr (C == Codes::affine4) {
      zero[0] = zero_pair<O>(chunk.zero[0]);
      zero[1] = zero_pair<O>(chunk.zero[1]);
    }
    VRAMKIT_UNROLLED
    for (int step = 0; step < 4; ++step) {
      std::uint32_t a[2][kValueParts<C, O>][2];
      VRAMKIT_UNROLLED
      for (int half = 0; half < 2; ++half) {
        std::uint32_t code, more = 0;
        if constexpr (kCodeBits<C> == 4) {
          code = (chunk.code[half][step / 2] >> (16 * (step % 2))) & 0xffffu;
        } else if constexpr (kCodeBits<C> == 8) {
          code = chunk.code[half][step];
        } else {
          code = chunk.code[half][2 * step];
          more = chunk.code[half][2 * step + 1];
        }
        decode_four<C, O>(code, more, zero[half], table, a[half]);
      }
      VRAMKIT_UNROLLED
      for (int p = 0; p < kValueParts<C, O>; ++p) {
        context.template mma<kIsHalf<O>>(sum, a[0][p][0], a[1][p][0], a[0][p][1], a[1][p][1],
                                         chunk.x[2 * step], chunk.x[2 * step + 1]);
      }
    }
    VRAMKIT_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const float scale = wide_scale ? float_of(chunk.scale[half])
                                     : finish_scale(weight, chunk.scale[half],
                                                    scale_row[half] + chunk.group, nested_values);
      total[2 * half] = multiply_add(sum[2 * half], scale, total[2 * half]);
      total[2 * half + 1] = multiply_add(sum[2 * half + 1], scale, total[2 * half + 1]);
    }
  };

  // The first round only loads; the tables are filled while that is under way.
  for (int index = begin - depth; index < end; index += depth) {
    VRAMKIT_UNROLLED
    for (int d = 0; d < depth; ++d) {
      if (index + d >= begin && index + d < end) multiply(held[d]);
      if (index + d + depth < end) load(held[d], index + d + depth);
    }
    if (index < begin) {
      for (int i = thread; i < 256; i += context.threads()) nested_values[i] = nested.value[i];
      if constexpr (kHasTable<C>) {
        auto* const once = reinterpret_cast<std::uint32_t*>(sums);
        fill_entries<C, O>(weight.table, once, thread, context.threads());
        context.sync();
        copy_entries<C, O, kFewTableBytes>(once, reinterpret_cast<FourWords*>(shared), thread,
                                           context.threads());
      }
      context.sync();
    }
  }

  // [warp][column][feature]
  VRAMKIT_UNROLLED
  for (int i = 0; i < 4; ++i) {
    sums[(warp * kFewColumns + 2 * t + i % 2) * kFewRows + g + 8 * (i / 2)] = total[i];
  }
  context.sync();
  const int rows_here = width / job.parts;
  for (int i = thread; i < rows_here * kFewRows; i += context.threads()) {
    const std::int64_t m = std::int64_t{context.block_y()} * rows_here + i / kFewRows;
    const std::int64_t n = first_row + i % kFewRows;
    if (m >= job.rows || n >= weight.rows) continue;
    float sum = 0.0f;
    for (int p = 0; p < job.parts; ++p) {
      const int column = i / kFewRows * job.parts + p;
      for (int w = 0; w < warps; ++w) {
        sum += sums[(w * kFewColumns + column) * kFewRows + i % kFewRows];
      }
    }
    finish_output(job, m, n, context.block_z(), sum);
  }
}

}  // namespace vramkit::cuda
