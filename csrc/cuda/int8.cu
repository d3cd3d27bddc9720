// The kernels around int8.hpp and int8_tile.hpp: launch bounds, shared memory, what threads of a
// block tell one another, and the choice among kernels.
#include <algorithm>

#include "cuda/int8_kernel.cuh"
#include "cuda/int8_launch.hpp"

namespace vramkit::cuda {
namespace int8 {
namespace {

// The largest of a warp's.
__device__ std::uint32_t largest(std::uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
  for (int by = kWarp / 2; by > 0; by /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, by));
  }
  return value;
#endif
}

// A block for each row, or a warp.
template <Element E, int Threads>
__global__ void __launch_bounds__(kThreads) round_kernel(const __grid_constant__ RowsJob job) {
  const int thread = static_cast<int>(threadIdx.x) % Threads;
  const std::int64_t row =
      std::int64_t{blockIdx.x} * (kThreads / Threads) + static_cast<int>(threadIdx.x) / Threads;
  if (row >= job.rows) return;  // whole warps; and of a block with one row nobody
  HeldRow held;
  std::uint32_t most = largest(look<E, Threads>(job, row, thread, held));
  if constexpr (Threads > kWarp) {
    __shared__ std::uint32_t of_warp[kWarps];
    if (thread % kWarp == 0) of_warp[thread / kWarp] = most;
    __syncthreads();
    VRAMKIT_UNROLLED
    for (int warp = 0; warp < kWarps; ++warp) most = max(most, of_warp[warp]);
  }
  round_row<E, Threads>(job, row, thread, most, held);
}

__global__ void __launch_bounds__(kThreads, 2)
    settle_kernel(const __grid_constant__ SettleJob job) {
  const int thread = static_cast<int>(threadIdx.x);
  if (blockIdx.x > 0) {
    take_out(job, blockIdx.x, thread);
    return;
  }
  if (!job.list) return;
  __shared__ ListCounts counts;
  std::int32_t before = 0;
  for (std::int64_t first = 0; first < job.cols; first += kListCols) {
    const std::uint32_t marks = marks_of(job, first, thread);
    list_count(marks, counts, thread);
    __syncthreads();
    list_groups(counts, thread);
    __syncthreads();
    before = list_write(job, first, before, marks, counts, thread);
    __syncthreads();
  }
}

template <int MT, int NT, bool Whole>
__global__ void __launch_bounds__(kThreads, blocks_at_once(MT, NT))
    product_kernel(const __grid_constant__ ProductJob job) {
  __shared__ SharedSums<MT, NT> shared;
  const Tile tile = product_tile<MT, NT>(job.from, blockIdx.x);
  sum_tile<Whole, false>(job.from, tile, shared);
  __syncthreads();
  finish_product(job, tile, shared, static_cast<int>(threadIdx.x));
}

template <Element E, bool Outliers>
__global__ void __launch_bounds__(kThreads, 2) scale_kernel(const __grid_constant__ ScaleJob job) {
  const int thread = static_cast<int>(threadIdx.x);
  const TilePlace at = scale_place(job, blockIdx.x);
  ScaleSums sums = {};
  std::int32_t count = 0;
  if constexpr (Outliers) {
    __shared__ ScaleTile tile;
    count = *job.to.outlier_count;
    for (std::int32_t first = 0; first < count; first += kOutliers) {
      scale_stage(job, at, first, count, tile, thread);
      __syncthreads();
      scale_add(first, count, tile, sums, thread);
      __syncthreads();
    }
  }
  scale_finish<E>(job, at, count > 0, sums, thread);
}

template <Element E>
void round(const RowsJob& job, unsigned grid, bool by_warp, cudaStream_t stream) {
  if (by_warp) {
    round_kernel<E, kWarp><<<grid, kThreads, 0, stream>>>(job);
  } else {
    round_kernel<E, kThreads><<<grid, kThreads, 0, stream>>>(job);
  }
}

template <int MT, int NT>
int product(const ProductJob& job, cudaStream_t stream) {
  const unsigned grid = grid_of(product_blocks<MT, NT>(job.from.rows, job.from.weight_rows));
  if (grid == 0) return cudaErrorInvalidConfiguration;
  if (whole(job.from)) {
    product_kernel<MT, NT, true><<<grid, kThreads, 0, stream>>>(job);
  } else {
    product_kernel<MT, NT, false><<<grid, kThreads, 0, stream>>>(job);
  }
  return cudaGetLastError();
}

template <Element E>
void scale(const ScaleJob& job, unsigned grid, cudaStream_t stream) {
  if (job.to.outliers) {
    scale_kernel<E, true><<<grid, kThreads, 0, stream>>>(job);
  } else {
    scale_kernel<E, false><<<grid, kThreads, 0, stream>>>(job);
  }
}

}  // namespace
}  // namespace int8

int launch_round_rows(const int8::RowsJob& job, Element type, std::int32_t* list,
                      std::int32_t* count, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  const bool outliers = job.threshold > 0.0f;
  if (job.columns && job.cols > 0) {
    cudaMemsetAsync(job.columns, 0, static_cast<std::size_t>(job.cols), on);
  }
  if (count) cudaMemsetAsync(count, 0, sizeof(*count), on);
  if (job.rows == 0) return cudaGetLastError();
  const bool by_warp = job.cols <= int8::kWarpCols;
  const std::int64_t each = by_warp ? kThreads / int8::kWarp : 1;
  const unsigned grid = int8::grid_of((job.rows + each - 1) / each);
  if (grid == 0) return cudaErrorInvalidConfiguration;
  switch (type) {
    case Element::f32:
      int8::round<Element::f32>(job, grid, by_warp, on);
      break;
    case Element::bf16:
      int8::round<Element::bf16>(job, grid, by_warp, on);
      break;
    case Element::f16:
      int8::round<Element::f16>(job, grid, by_warp, on);
      break;
  }
  if (outliers && job.cols > 0) {
    const int8::SettleJob settle{job.columns, job.cols, list,           count,
                                 job.codes,   job.rows, job.code_stride};
    const unsigned blocks = int8::grid_of(int8::settle_blocks(job.rows));
    int8::settle_kernel<<<blocks, kThreads, 0, on>>>(settle);
  }
  return cudaGetLastError();
}

// Rows of x in a tile, and of the weight: about as many bytes of both.
int launch_product(const int8::ProductJob& job, void* stream) {
  if (job.from.rows == 0 || job.from.weight_rows == 0) return cudaSuccess;
  auto* on = static_cast<cudaStream_t>(stream);
  if (job.from.rows <= 8) return int8::product<1, 1>(job, on);
  if (job.from.rows <= 16) return int8::product<1, 2>(job, on);
  return int8::product<2, 4>(job, on);
}

int launch_scale(const int8::ScaleJob& job, void* stream) {
  if (job.rows == 0 || job.cols == 0) return cudaSuccess;
  const unsigned grid = int8::grid_of(int8::scale_blocks(job.rows, job.cols));
  if (grid == 0) return cudaErrorInvalidConfiguration;
  auto* on = static_cast<cudaStream_t>(stream);
  switch (job.to.type) {
    case Element::f32:
      int8::scale<Element::f32>(job, grid, on);
      break;
    case Element::bf16:
      int8::scale<Element::bf16>(job, grid, on);
      break;
    case Element::f16:
      int8::scale<Element::f16>(job, grid, on);
      break;
  }
  return cudaGetLastError();
}

int launch_copy(void* to, const void* from, std::int64_t bytes, void* stream) {
  cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice,
                  static_cast<cudaStream_t>(stream));
  return cudaGetLastError();
}

}  // namespace vramkit::cuda
