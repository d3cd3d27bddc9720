// int8 x int8 -> int32 on the tensor cores, both operands as they lie in memory: a block has a tile
// of MT x 16 rows of the weight and NT x 8 rows of x, its kWarps warps share out the columns, and
// their sums meet in shared memory. Few rows of x read the weight once, at the memory's rate.
//
// The instruction (mma.m16n8k32) wants four bytes of a row from each of four lanes, twice. Which
// columns those are does not matter to a sum, as long as both operands agree. So a lane reads 16
// bytes in a row, and gives them to two instructions, eight bytes each:
//
//   lane    = 4 g + t, g = 0 .. 7, t = 0 .. 3
//   reads     columns 64 s + 16 t .. + 15 of rows g and g + 8 of the weight, and of row g of x
//   sums      of weight rows g (0, 1) and g + 8 (2, 3) with rows 2 t (0, 2) and 2 t + 1 (1, 3) of x
//
// One or two slabs of 64 columns of the weight (a unit) are read at a time, the next ones while
// these are multiplied; x comes from a cache.
#pragma once
#include <cstdint>

#include "cuda/int8.hpp"

namespace vramkit::cuda::int8 {

inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kSlab = 64;
// Slabs of a unit: as many as registers hold twice.
constexpr int slabs_of(int MT) { return MT > 2 ? 1 : 2; }
constexpr std::int64_t unit_cols(int MT) { return std::int64_t{kSlab} * slabs_of(MT); }
constexpr std::int64_t units_in(int MT, std::int64_t cols) {
  return (cols + unit_cols(MT) - 1) / unit_cols(MT);
}

// The operands. Codes of x past `cols` may be anything up to `x_cols`, if the weight ends there.
struct Operands {
  const std::int8_t* x = nullptr;
  std::int64_t rows = 0, x_cols = 0, x_stride = 0;
  const std::int8_t* weight = nullptr;
  std::int64_t weight_rows = 0, cols = 0, weight_stride = 0;
};

// Whether all of both comes in pieces of 16 bytes, at multiples of 16 bytes.
inline bool whole(const Operands& job) {
  const auto pieces = [](const void* at, std::int64_t stride, std::int64_t cols) {
    return (reinterpret_cast<std::uintptr_t>(at) | static_cast<std::uintptr_t>(stride | cols)) %
               16 ==
           0;
  };
  return pieces(job.x, job.x_stride, job.x_cols) && pieces(job.weight, job.weight_stride, job.cols);
}

// What a block multiplies: MT x 16 rows of the weight from `first` on, `valid` of them there. For
// gates, 16 units from `first` on of each of MT gates, `step` rows apart, `valid` units there.
struct Tile {
  std::int64_t first = 0, step = 0;
  int valid = 0;
  std::int64_t row = 0;  // of x
};

template <int MT, bool Gates>
VRAMKIT_ANYWHERE inline std::int64_t weight_row(const Tile& tile, int m, int i) {
  const int at = Gates ? i : 16 * m + i;
  return tile.first + (Gates ? m * tile.step : 0) + (at < tile.valid ? at : tile.valid - 1);
}

template <int MT>
struct WeightUnit {
  std::uint32_t of[slabs_of(MT)][MT][2][4];  // rows g and g + 8
};
template <int NT>
struct RowsSlab {
  std::uint32_t of[NT][4];
};
template <int MT, int NT>
struct Sums {
  std::int32_t of[MT][NT][4];
};

// 16 bytes of a row from column `at` on; what is not there is zero. `Whole`: as above.
template <bool Whole>
VRAMKIT_ANYWHERE inline void load_piece(const std::int8_t* row, std::int64_t at, std::int64_t cols,
                                        std::uint32_t (&to)[4]) {
  const std::int64_t left = cols - at;
  const auto* from = reinterpret_cast<const std::uint8_t*>(row + at);
  if constexpr (Whole) {
    VRAMKIT_UNROLLED
    for (int i = 0; i < 4; ++i) to[i] = 0;
    if (left <= 0) return;
#if defined(__CUDA_ARCH__)
    const uint4 all = __ldg(reinterpret_cast<const uint4*>(from));
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
#else
    memcpy(to, from, 16);
#endif
    return;
  }
  if (left >= 16 && (reinterpret_cast<std::uintptr_t>(from) & 3) == 0) {
    VRAMKIT_UNROLLED
    for (int i = 0; i < 4; ++i) memcpy(&to[i], __builtin_assume_aligned(from + 4 * i, 4), 4);
    return;
  }
  std::uint8_t raw[16];
  VRAMKIT_UNROLLED
  for (int i = 0; i < 16; ++i) raw[i] = i < left ? from[i] : std::uint8_t{0};
  memcpy(to, raw, 16);
}

template <bool Whole, bool Gates, int MT>
VRAMKIT_ANYWHERE inline void load_weight(const Operands& job, const Tile& tile, std::int64_t unit,
                                         int lane, WeightUnit<MT>& to) {
  const int g = lane / 4, t = lane % 4;
  VRAMKIT_UNROLLED
  for (int u = 0; u < slabs_of(MT); ++u) {
    const std::int64_t at = unit * unit_cols(MT) + u * kSlab + 16 * t;
    VRAMKIT_UNROLLED
    for (int m = 0; m < MT; ++m) {
      VRAMKIT_UNROLLED
      for (int half = 0; half < 2; ++half) {
        const std::int64_t row = weight_row<MT, Gates>(tile, m, g + 8 * half);
        load_piece<Whole>(job.weight + row * job.weight_stride, at, job.cols, to.of[u][m][half]);
      }
    }
  }
}

// Slab `u` of a unit, of x.
template <bool Whole, int MT, int NT>
VRAMKIT_ANYWHERE inline void load_rows(const Operands& job, const Tile& tile, std::int64_t unit,
                                       int u, int lane, RowsSlab<NT>& to) {
  const std::int64_t at = unit * unit_cols(MT) + u * kSlab + 16 * (lane % 4);
  VRAMKIT_UNROLLED
  for (int n = 0; n < NT; ++n) {
    const std::int64_t row = tile.row + 8 * n + lane / 4;
    load_piece<Whole>(job.x + (row < job.rows ? row : job.rows - 1) * job.x_stride, at, job.x_cols,
                      to.of[n]);
  }
}

// All products of slab `u`. `mma(sums, weight a, b, c, d, x a, b)` is the instruction, for a lane
// on the device; tests hand in one that all lanes of a warp meet in.
template <int MT, int NT, class Mma>
VRAMKIT_ANYWHERE inline void multiply_slab(const WeightUnit<MT>& weight, int u,
                                           const RowsSlab<NT>& x, Sums<MT, NT>& sums,
                                           const Mma& mma) {
  VRAMKIT_UNROLLED
  for (int half = 0; half < 4; half += 2) {
    VRAMKIT_UNROLLED
    for (int m = 0; m < MT; ++m) {
      const auto& low = weight.of[u][m][0];
      const auto& high = weight.of[u][m][1];
      VRAMKIT_UNROLLED
      for (int n = 0; n < NT; ++n) {
        mma(sums.of[m][n], low[half], high[half], low[half + 1], high[half + 1], x.of[n][half],
            x.of[n][half + 1]);
      }
    }
  }
}

// A warp's share of the tile: every kWarps-th unit.
template <bool Whole, bool Gates, int MT, int NT, class Mma>
VRAMKIT_ANYWHERE inline void multiply_tile(const Operands& job, const Tile& tile, int warp,
                                           int lane, Sums<MT, NT>& sums, const Mma& mma) {
  const std::int64_t units = units_in(MT, job.cols);
  const auto multiply = [&](const WeightUnit<MT>& weight, std::int64_t unit) {
    VRAMKIT_UNROLLED
    for (int u = 0; u < slabs_of(MT); ++u) {
      RowsSlab<NT> x;
      load_rows<Whole, MT>(job, tile, unit, u, lane, x);
      multiply_slab(weight, u, x, sums, mma);
    }
  };
  if (warp >= units) return;
  WeightUnit<MT> now;
  load_weight<Whole, Gates>(job, tile, warp, lane, now);
  for (std::int64_t next = warp + kWarps; next < units; next += kWarps) {
    WeightUnit<MT> ahead;
    load_weight<Whole, Gates>(job, tile, next, lane, ahead);
    multiply(now, next - kWarps);
    now = ahead;
  }
  multiply(now, warp + (units - 1 - warp) / kWarps * kWarps);
}

// The warps' sums: rows of the weight beside each other, padded so that the lanes of a store meet
// different banks.
template <int MT, int NT>
struct SharedSums {
  static constexpr int kStride = 16 * MT + 4;
  std::int32_t of[kWarps][8 * NT][kStride];
};

template <int MT, int NT>
VRAMKIT_ANYWHERE inline void store_sums(const Sums<MT, NT>& sums, SharedSums<MT, NT>& shared,
                                        int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  VRAMKIT_UNROLLED
  for (int m = 0; m < MT; ++m) {
    VRAMKIT_UNROLLED
    for (int n = 0; n < NT; ++n) {
      VRAMKIT_UNROLLED
      for (int i = 0; i < 4; ++i) {
        shared.of[warp][8 * n + 2 * t + i % 2][16 * m + g + i / 2 * 8] = sums.of[m][n][i];
      }
    }
  }
}

template <int MT, int NT>
VRAMKIT_ANYWHERE inline std::int32_t sum_of_warps(const SharedSums<MT, NT>& shared, int col,
                                                  int row) {
  std::int32_t sum = 0;
  VRAMKIT_UNROLLED
  for (int warp = 0; warp < kWarps; ++warp) sum += shared.of[warp][col][row];
  return sum;
}

// A linear layer's product, or the bare sums.
struct ProductJob {
  Operands from;
  Output to;
};

template <int MT, int NT>
constexpr std::int64_t product_blocks(std::int64_t rows, std::int64_t weight_rows) {
  return (rows + 8 * NT - 1) / (8 * NT) * ((weight_rows + 16 * MT - 1) / (16 * MT));
}

// Blocks in turn have the same rows of the weight and other ones of x.
template <int MT, int NT>
VRAMKIT_ANYWHERE inline Tile product_tile(const Operands& job, std::int64_t block) {
  const std::int64_t down = (job.rows + 8 * NT - 1) / (8 * NT);
  const std::int64_t across = quotient(block, down);
  Tile tile;
  tile.first = across * 16 * MT;
  const std::int64_t left = job.weight_rows - tile.first;
  tile.valid = left < 16 * MT ? static_cast<int>(left) : 16 * MT;
  tile.row = (block - across * down) * 8 * NT;
  return tile;
}

template <int MT, int NT>
VRAMKIT_ANYWHERE inline void finish_product(const ProductJob& job, const Tile& tile,
                                            const SharedSums<MT, NT>& shared, int thread) {
  const Output& to = job.to;
  for (int at = thread; at < 16 * MT * 8 * NT; at += kThreads) {
    const int row = at % (16 * MT), col = at / (16 * MT);
    const std::int64_t i = tile.row + col, n = tile.first + row;
    if (row >= tile.valid || i >= job.from.rows) continue;
    const std::int32_t sum = sum_of_warps(shared, col, row);
    if (to.exact) {
      static_cast<std::int32_t*>(to.out)[i * to.out_stride + n] = sum;
      continue;
    }
    const float value = activate(to.activation, scaled(to, sum, i, n));
    store_element(to.out, to.type, i * to.out_stride + n, value);
    if (to.again) to.again[i * to.again_stride + n] = value;
  }
}

}  // namespace vramkit::cuda::int8
