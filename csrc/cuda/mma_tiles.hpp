// Products for up to some hundred rows of x: tiles that share what they load.
//
//   a block    64 features x 8 * NT columns of x, and one split of the elements
//   a stage    128 elements: codes of the 64 features and the columns of x, copied to shared memory
//              asynchronously, two stages ahead of the one in use
//   a warp     16 of the features, all columns, and one half of each stage's elements
//
//              elements 0 … 63   elements 64 … 127
//   rows  0 …      warp 0             warp 4
//   rows 16 …      warp 1             warp 5        the two halves are added at the end,
//   rows 32 …      warp 2             warp 6        and splits by a second kernel
//   rows 48 …      warp 3             warp 7
//
// Each code is decoded once for all columns. Scales lie beside the stage, in float32; a group's sum
// is multiplied after 16, 32 or 64 elements, whichever its size is a multiple of.
#pragma once
#include "cuda/fragments.hpp"

namespace vramkit::cuda {

inline constexpr int kTileTableBytes = 8 << 10;

template <Codes C, Operand O, int NT>
struct TileShape {
  static constexpr int kColumns = 8 * NT;
  // Rows in shared memory are so long that a warp's accesses fall into different banks.
  static constexpr int kXBytes = 2 * kTileSpan + 32;
  static constexpr int kSpanBytes = kTileSpan * kCodeBits<C> / 8;
  static constexpr int kCodeBytes = kSpanBytes + 16;
  static constexpr int kStageBytes = kColumns * kXBytes + kTileRows * kCodeBytes;
  static constexpr int kUnits = 8;  // groups of a stage, at most
  // Tables, nested values, two stages' scales and zero points; then the stages, where tables are
  // made and sums are gathered.
  static constexpr int kNestedAt = kHasTable<C> ? kTileTableBytes : 0;
  static constexpr int kScalesAt = kNestedAt + 1024;
  static constexpr int kZerosAt = kScalesAt + 2 * kUnits * kTileRows * 4;
  static constexpr int kStagesAt =
      kZerosAt + (C == Codes::affine4 ? 2 * kUnits * kTileRows * 4 : 0);
  static constexpr int kSumRow = kTileRows + 4;
  static constexpr int kSharedBytes = kStagesAt + kTileStages * kStageBytes;
  static_assert(kTileStages * kStageBytes >= kColumns * kSumRow * 4);
  static_assert(kTileStages * kStageBytes >= 256 * kEntryBytes<C, O>);
};

// Elements after which a group's sum is scaled.
VRAMKIT_ANYWHERE inline int unit_of(const DecodeJob& weight) {
  if (weight.groups_per_row <= 1 || weight.group % 64 == 0) return 64;
  return weight.group % 32 == 0 ? 32 : 16;
}

// Sixteen bytes to shared memory, `there` of them from memory and zeros behind those.
template <class Context>
VRAMKIT_ANYWHERE inline void stage_vector(const Context& context, std::uint8_t* to,
                                          const std::uint8_t* from, std::int64_t there,
                                          bool aligned) {
  const int bytes = there >= 16 ? 16 : (there > 0 ? static_cast<int>(there) : 0);
  if (aligned) {
    context.copy_async(to, from, bytes);
    return;
  }
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int i = 0; i < 16; ++i) to[i] = i < bytes ? from[i] : std::uint8_t{0};
}

template <Codes C, Operand O, int NT, class Context>
VRAMKIT_ANYWHERE inline void tile_block(Context& context, const ProductJob& job,
                                        const NestedMap& nested) {
  using Shape = TileShape<C, O, NT>;
  constexpr int threads = 32 * kTileWarps, parts = kValueParts<C, O>;
  const DecodeJob& weight = job.weight;
  const int thread = context.thread(), lane = thread & 31, warp = thread >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int warp_row = (warp & 3) * 16, warp_half = warp >> 2;
  std::uint8_t* const shared = context.shared();
  auto* const nested_values = reinterpret_cast<float*>(shared + Shape::kNestedAt);
  auto* const scales = reinterpret_cast<float*>(shared + Shape::kScalesAt);
  auto* const zeros = reinterpret_cast<std::uint32_t*>(shared + Shape::kZerosAt);
  std::uint8_t* const stages = shared + Shape::kStagesAt;

  const std::int64_t first_row = std::int64_t{context.block_x()} * kTileRows;
  const int width = whole_columns(Shape::kColumns, job.parts);
  const std::int64_t first_column = std::int64_t{context.block_y()} * width;
  const std::int64_t columns_left = std::int64_t{job.rows} * job.parts - first_column;
  const int columns = columns_left < width ? static_cast<int>(columns_left) : width;

  const std::int64_t count = (weight.cols + kTileSpan - 1) / kTileSpan;
  const auto begin = static_cast<int>(quotient(count * context.block_z(), job.splits));
  const auto end = static_cast<int>(quotient(count * (context.block_z() + 1), job.splits));

  const bool codes_aligned = ((reinterpret_cast<std::uintptr_t>(weight.codes) |
                               static_cast<std::uintptr_t>(weight.row_code_bytes)) &
                              15) == 0;
  const bool x_aligned =
      ((reinterpret_cast<std::uintptr_t>(job.x) | static_cast<std::uintptr_t>(2 * job.x_stride)) &
       15) == 0;
  const int unit = unit_of(weight), units = kTileSpan / unit;

  const auto load_stage = [&](int index) {
    std::uint8_t* const to = stages + index % kTileStages * Shape::kStageBytes;
    const std::int64_t first = std::int64_t{index} * kTileSpan;
    VRAMKIT_UNROLLED
    for (int v = 0; v < Shape::kColumns * kTileSpan / 8 / threads; ++v) {
      const int at = v * threads + thread;
      const int column = at / (kTileSpan / 8), piece = at % (kTileSpan / 8);
      const std::int64_t k = first + 8 * piece;
      const bool inside = column < columns && k < weight.cols;
      const std::uint16_t* const from =
          inside ? job.x + (first_column + column) * job.x_stride + k : job.x;
      stage_vector(context, to + column * Shape::kXBytes + 16 * piece,
                   reinterpret_cast<const std::uint8_t*>(from), inside ? 2 * (weight.cols - k) : 0,
                   x_aligned);
    }
    std::uint8_t* const codes = to + Shape::kColumns * Shape::kXBytes;
    constexpr int pieces = Shape::kSpanBytes / 16;
    VRAMKIT_UNROLLED
    for (int v = 0; v < kTileRows * pieces / threads; ++v) {
      const int at = v * threads + thread;
      std::int64_t row = first_row + at / pieces;  // past the last: as the last, and not written
      if (row >= weight.rows) row = weight.rows - 1;
      const std::int64_t byte = first * kCodeBits<C> / 8 + 16 * (at % pieces);
      const std::int64_t there = weight.row_code_bytes - byte;
      stage_vector(context, codes + at / pieces * Shape::kCodeBytes + 16 * (at % pieces),
                   weight.codes + (there > 0 ? row * weight.row_code_bytes + byte : 0), there,
                   codes_aligned);
    }
    context.commit();
  };

  // Scales of a stage: asked for one stage before, finished when that has been multiplied.
  struct RawScale {
    std::uint32_t scale = 0, zero = 0;
    std::int64_t index = -1;
  };
  const auto load_scales = [&](int index, RawScale(&raw)[2]) {
    VRAMKIT_UNROLLED
    for (int i = 0; i < 2; ++i) {
      const int at = i * threads + thread;
      const std::int64_t k = std::int64_t{index} * kTileSpan + at / kTileRows * unit;
      raw[i].index = -1;
      if (index >= end || at >= units * kTileRows || k >= weight.cols) continue;
      std::int64_t row = first_row + at % kTileRows;
      if (row >= weight.rows) row = weight.rows - 1;
      const std::int64_t group = weight.groups_per_row <= 1 ? 0 : quotient(k, weight.group);
      raw[i].index = row * weight.groups_per_row + group;
      raw[i].scale = raw_scale(weight, raw[i].index);
      if constexpr (C == Codes::affine4) raw[i].zero = weight.extra[raw[i].index];
    }
  };
  const auto store_scales = [&](int index, const RawScale(&raw)[2]) {
    VRAMKIT_UNROLLED
    for (int i = 0; i < 2; ++i) {
      const int at = i * threads + thread;
      if (at >= units * kTileRows) continue;
      const int to = index % 2 * Shape::kUnits * kTileRows + at;
      const bool there = raw[i].index >= 0;
      scales[to] = there ? finish_scale(weight, raw[i].scale, raw[i].index, nested_values) : 0.0f;
      if constexpr (C == Codes::affine4) zeros[to] = zero_pair<O>(there ? raw[i].zero : 0);
    }
  };

  for (int i = thread; i < 256; i += threads) nested_values[i] = nested.value[i];
  if constexpr (kHasTable<C>) {
    auto* const once = reinterpret_cast<std::uint32_t*>(stages);
    fill_entries<C, O>(weight.table, once, thread, threads);
    context.sync();
    copy_entries<C, O, kTileTableBytes>(once, reinterpret_cast<FourWords*>(shared), thread,
                                        threads);
  }
  context.sync();

  RawScale raw[2];
  load_scales(begin, raw);
  VRAMKIT_UNROLLED
  for (int s = 0; s < kTileStages - 1; ++s) {
    if (begin + s < end) {
      load_stage(begin + s);
    } else {
      context.commit();
    }
  }
  store_scales(begin, raw);

  const auto table = TableCopy < C, O, kHasTable<C> ? kTileTableBytes : 0 > ::of(shared, lane);
  float total[NT][4] = {};
  for (int index = begin; index < end; ++index) {
    context.template wait<kTileStages - 2>();
    context.sync();  // this stage is there for all, and nobody is at the one before
    if (index + kTileStages - 1 < end) {
      load_stage(index + kTileStages - 1);
    } else {
      context.commit();
    }
    load_scales(index + 1, raw);

    const std::uint8_t* const stage = stages + index % kTileStages * Shape::kStageBytes;
    const std::uint8_t* const x = stage + g * Shape::kXBytes + 2 * (64 * warp_half + 4 * t);
    const std::uint8_t* const codes = stage + Shape::kColumns * Shape::kXBytes +
                                      (warp_row + g) * Shape::kCodeBytes +
                                      (64 * warp_half + 4 * t) * kCodeBits<C> / 8;
    const int first_scale = index % 2 * Shape::kUnits * kTileRows + warp_row + g;
    float sum[NT][4] = {};
    VRAMKIT_UNROLLED
    for (int step = 0; step < 4; ++step) {
      const int scale_at = first_scale + (64 * warp_half + 16 * step) / unit * kTileRows;
      std::uint32_t a[2][parts][2];
      VRAMKIT_UNROLLED
      for (int half = 0; half < 2; ++half) {
        const std::uint8_t* const from = codes + 8 * half * Shape::kCodeBytes;
        std::uint32_t code, zero = 0;
        if constexpr (kCodeBits<C> == 4) {
          code = *reinterpret_cast<const std::uint16_t*>(from + 8 * step);
        } else {
          code = *reinterpret_cast<const std::uint32_t*>(from + 16 * step);
        }
        if constexpr (C == Codes::affine4) zero = zeros[scale_at + 8 * half];
        decode_four<C, O>(code, 0, zero, table, a[half]);
      }
      VRAMKIT_UNROLLED
      for (int n = 0; n < NT; ++n) {
        const auto b = *reinterpret_cast<const TwoWords*>(x + 8 * n * Shape::kXBytes + 32 * step);
        VRAMKIT_UNROLLED
        for (int p = 0; p < parts; ++p) {
          context.template mma<kIsHalf<O>>(sum[n], a[0][p][0], a[1][p][0], a[0][p][1], a[1][p][1],
                                           b.word[0], b.word[1]);
        }
      }
      if ((16 * (step + 1)) % unit == 0) {
        const float low = scales[scale_at], high = scales[scale_at + 8];
        VRAMKIT_UNROLLED
        for (int n = 0; n < NT; ++n) {
          VRAMKIT_UNROLLED
          for (int i = 0; i < 4; ++i) {
            total[n][i] = multiply_add(sum[n][i], i < 2 ? low : high, total[n][i]);
            sum[n][i] = 0.0f;
          }
        }
      }
    }
    store_scales(index + 1, raw);
  }

  // [column][feature]; the second half of the warps first.
  context.template wait<0>();
  context.sync();
  auto* const sums = reinterpret_cast<float*>(stages);
  const auto place = [&](int n, int i) {
    return (8 * n + 2 * t + i % 2) * Shape::kSumRow + warp_row + g + 8 * (i / 2);
  };
  if (warp_half == 1) {
    VRAMKIT_UNROLLED
    for (int n = 0; n < NT; ++n) {
      VRAMKIT_UNROLLED
      for (int i = 0; i < 4; ++i) sums[place(n, i)] = total[n][i];
    }
  }
  context.sync();
  if (warp_half == 0) {
    VRAMKIT_UNROLLED
    for (int n = 0; n < NT; ++n) {
      VRAMKIT_UNROLLED
      for (int i = 0; i < 4; ++i) sums[place(n, i)] += total[n][i];
    }
  }
  context.sync();
  const int rows_each = width / job.parts;
  for (int i = thread; i < columns / job.parts * kTileRows; i += threads) {
    const int row = i / kTileRows;
    const std::int64_t n = first_row + i % kTileRows;
    if (n >= weight.rows) continue;
    float sum = 0.0f;
    for (int p = 0; p < job.parts; ++p) {
      sum += sums[(row * job.parts + p) * Shape::kSumRow + i % kTileRows];
    }
    finish_output(job, std::int64_t{context.block_y()} * rows_each + row, n, context.block_z(),
                  sum);
  }
}

}  // namespace vramkit::cuda
