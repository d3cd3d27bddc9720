// What int8.cu and recurrent.cu share: the tensor cores' instruction, and a block's sums.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/int8_tile.hpp"

namespace vramkit::cuda::int8 {
namespace {

// sums += weight rows x (x rows)^T over 32 columns; before capability 8.0 by four smaller ones.
struct Mma {
  __device__ void operator()(std::int32_t (&c)[4], std::uint32_t a0, std::uint32_t a1,
                             std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                             std::uint32_t b1) const {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    const auto small = [](std::int32_t& low, std::int32_t& high, std::uint32_t a, std::uint32_t b) {
      asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                   : "+r"(low), "+r"(high)
                   : "r"(a), "r"(b));
    };
    small(c[0], c[1], a0, b0);
    small(c[0], c[1], a2, b1);
    small(c[2], c[3], a1, b0);
    small(c[2], c[3], a3, b1);
#endif
  }
};

// The tile's sums, each warp's own, to shared memory.
template <bool Whole, bool Gates, int MT, int NT>
__device__ void sum_tile(const Operands& job, const Tile& tile, SharedSums<MT, NT>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Sums<MT, NT> sums = {};
  multiply_tile<Whole, Gates>(job, tile, warp, lane, sums, Mma{});
  store_sums(sums, shared, warp, lane);
}

// Blocks that a multiprocessor should have at a time at least: registers are shared out by it.
constexpr int blocks_at_once(int MT, int NT) { return MT == 1 && NT <= 2 ? 2 : 1; }

// Blocks of the grid, or 0 if a grid cannot have so many.
inline unsigned grid_of(std::int64_t blocks) {
  return blocks > 0x7fffffff ? 0 : static_cast<unsigned>(blocks);
}

}  // namespace
}  // namespace vramkit::cuda::int8
