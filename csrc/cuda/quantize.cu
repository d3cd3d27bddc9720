// The kernels around quantize.hpp: launch bounds, shared memory, and the choice among them.
#include <cuda_runtime_api.h>

#include "cuda/launch_quantize.hpp"

namespace vramkit::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// Runs body(team, index) for a team's groups.
template <class Body>
__device__ void each_group(const QuantizePlan& plan, const Body& body) {
  WarpTeam team(plan.width);
  const int per_block = kThreads / plan.width;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * per_block * kGroupRounds +
                             static_cast<int>(threadIdx.x) / plan.width;
  for (int round = 0; round < kGroupRounds; ++round) {
    const std::int64_t index = first + round * per_block;
    if (index < plan.teams) body(team, index);
  }
}

template <Element E, int Kept, bool stochastic>
__global__ void __launch_bounds__(kThreads, Kept == 1 && !stochastic ? 4 : 2)
    group_kernel(const __grid_constant__ QuantizeJob job,
                 const __grid_constant__ QuantizePlan plan) {
  __shared__ SortedCodes sorted;
  fetch_sorted(job, sorted, static_cast<int>(threadIdx.x));
  __syncthreads();
  each_group(plan, [&](WarpTeam& team, std::int64_t index) {
    quantize_group<E, Kept, false, stochastic>(job, sorted, team, index);
  });
}

template <Element E, bool stochastic>
__global__ void __launch_bounds__(kThreads, stochastic ? 2 : 4)
    row_kernel(const __grid_constant__ QuantizeJob job) {
  __shared__ SortedCodes sorted;
  __shared__ std::uint32_t largest[kWarps];
  fetch_sorted(job, sorted, static_cast<int>(threadIdx.x));
  __syncthreads();
  BlockTeam<kWarps> team(largest);
  quantize_group<E, kBlockKept, true, stochastic>(job, sorted, team, blockIdx.x);
}

template <Element E, int Bits>
__global__ void __launch_bounds__(kThreads, 3)
    search_kernel(const __grid_constant__ QuantizeJob job,
                  const __grid_constant__ QuantizePlan plan) {
  each_group(plan,
             [&](WarpTeam& team, std::int64_t index) { search_group<E, Bits>(job, team, index); });
}

template <Element E>
__global__ void __launch_bounds__(kThreads, 2)
    pair_kernel(const __grid_constant__ QuantizeJob job,
                const __grid_constant__ QuantizePlan plan) {
  __shared__ SortedCodes sorted;
  fetch_sorted(job, sorted, static_cast<int>(threadIdx.x));
  __syncthreads();
  each_group(plan, [&](WarpTeam& team, std::int64_t index) {
    quantize_pair<E>(job, sorted, team, index);
  });
}

__global__ void __launch_bounds__(kThreads)
    sort_kernel(const float* table, int entries, SortedCodes* sorted) {
  __shared__ SortScratch scratch;
  sort_rank(table, entries, scratch, *sorted, static_cast<int>(threadIdx.x));
  __syncthreads();
  sort_bound(entries, scratch, *sorted, static_cast<int>(threadIdx.x));
}

__global__ void __launch_bounds__(kThreads)
    bounds_kernel(const float* bounds, SortedCodes* sorted) {
  take_bound(bounds, *sorted, static_cast<int>(threadIdx.x));
}

template <Element From, Codes To>
__global__ void __launch_bounds__(kThreads, 4)
    stochastic_cast_kernel(const __grid_constant__ StochasticCast job) {
  stochastic_block<From, To>(job, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <Element E, bool stochastic>
void launch_groups(const QuantizeJob& job, const QuantizePlan& plan, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(plan.blocks);
  switch (plan.kernel) {
    case QuantizeKernel::small:
      group_kernel<E, 1, stochastic><<<grid, kThreads, 0, stream>>>(job, plan);
      break;
    case QuantizeKernel::warp:
      group_kernel<E, kWarpKept, stochastic><<<grid, kThreads, 0, stream>>>(job, plan);
      break;
    default:
      row_kernel<E, stochastic><<<grid, kThreads, 0, stream>>>(job);
  }
}

template <Element E>
void launch_for(const QuantizeJob& job, const QuantizePlan& plan, bool stochastic,
                cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(plan.blocks);
  if (plan.kernel == QuantizeKernel::pair) {
    pair_kernel<E><<<grid, kThreads, 0, stream>>>(job, plan);
  } else if (plan.kernel == QuantizeKernel::search) {
    if (job.zero_point) {
      search_kernel<E, 4><<<grid, kThreads, 0, stream>>>(job, plan);
    } else {
      search_kernel<E, 8><<<grid, kThreads, 0, stream>>>(job, plan);
    }
  } else if (stochastic) {
    launch_groups<E, true>(job, plan, stream);
  } else {
    launch_groups<E, false>(job, plan, stream);
  }
}

template <Codes To>
void launch_cast_to(const StochasticCast& job, Element from, unsigned grid, cudaStream_t stream) {
  switch (from) {
    case Element::f32:
      stochastic_cast_kernel<Element::f32, To><<<grid, kThreads, 0, stream>>>(job);
      break;
    case Element::bf16:
      stochastic_cast_kernel<Element::bf16, To><<<grid, kThreads, 0, stream>>>(job);
      break;
    case Element::f16:
      stochastic_cast_kernel<Element::f16, To><<<grid, kThreads, 0, stream>>>(job);
      break;
  }
}

constexpr std::int64_t kLargestGrid = 0x7fffffff;

}  // namespace

int launch_sort(const float* table, int entries, SortedCodes* sorted, void* stream) {
  sort_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, entries, sorted);
  return cudaGetLastError();
}

int launch_bounds(const float* bounds, SortedCodes* sorted, void* stream) {
  bounds_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(bounds, sorted);
  return cudaGetLastError();
}

int launch_quantize(const QuantizeJob& job, Element from, bool stochastic, void* stream) {
  if (job.rows == 0 || job.cols == 0) return cudaSuccess;
  const QuantizePlan plan = plan_of(job);
  if (plan.blocks > kLargestGrid || job.group / kChunk > kLargestGrid / 2)
    return cudaErrorInvalidConfiguration;
  auto* on = static_cast<cudaStream_t>(stream);
  switch (from) {
    case Element::f32:
      launch_for<Element::f32>(job, plan, stochastic, on);
      break;
    case Element::bf16:
      launch_for<Element::bf16>(job, plan, stochastic, on);
      break;
    case Element::f16:
      launch_for<Element::f16>(job, plan, stochastic, on);
      break;
  }
  return cudaGetLastError();
}

int launch_stochastic_cast(const StochasticCast& job, Element from, Codes to, void* stream) {
  if (job.cast.rows == 0 || job.cast.cols == 0) return cudaSuccess;
  const std::int64_t blocks = blocks_for(job.cast.rows, job.cast.cols);
  if (blocks > kLargestGrid) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
  auto* on = static_cast<cudaStream_t>(stream);
  if (to == Codes::bf16) {
    launch_cast_to<Codes::bf16>(job, from, grid, on);
  } else {
    launch_cast_to<Codes::fp16>(job, from, grid, on);
  }
  return cudaGetLastError();
}

}  // namespace vramkit::cuda
