// The kernels around multi.hpp.
#include <cuda_runtime_api.h>

#include "cuda/launch_multi.hpp"

namespace vramkit::cuda {
namespace {

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ SumJob job) {
  __shared__ SumScratch scratch;
  const auto block = static_cast<std::int32_t>(blockIdx.x);
  const auto thread = static_cast<int>(threadIdx.x);
  sum_lanes(job, block, thread, scratch);
  __syncthreads();
  if (thread < kPieces) sum_piece(thread, scratch);
  __syncthreads();
  if (thread == 0) job.sums[block] = sum_chunk(scratch);
}

__global__ void __launch_bounds__(cpu::kTotalLanes)
    total_kernel(const double* sums, std::int64_t count, double* total) {
  __shared__ double lanes[cpu::kTotalLanes];
  lanes[threadIdx.x] = total_lane(sums, count, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) *total = total_of_lanes(lanes);
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyJob job) {
  copy_thread(job, static_cast<std::int32_t>(blockIdx.x), static_cast<int>(threadIdx.x));
}

__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ FloatStepJob job) {
  step_thread(job, static_cast<std::int32_t>(blockIdx.x), static_cast<int>(threadIdx.x));
}

__global__ void __launch_bounds__(kThreads)
    byte_step_kernel(const __grid_constant__ ByteStepJob job,
                     const __grid_constant__ StateMaps maps) {
  __shared__ StateTables tables;
  fill_tables(maps, tables, static_cast<int>(threadIdx.x));
  __syncthreads();
  WarpTeam team(32);
  for (int state = static_cast<int>(threadIdx.x) / 32; state < kStatesPerBlock;
       state += kThreads / 32) {
    step_states(job, tables, static_cast<std::int32_t>(blockIdx.x), state, team);
  }
}

constexpr std::int64_t kLargestGrid = 0x7fffffff;

// Launches a kernel of one block per block of the job.
template <class... Arguments>
int launch(void (*kernel)(Arguments...), std::int64_t blocks, int threads, void* stream,
           const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > kLargestGrid) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace

int launch_square_sums(const SumJob& job, std::int64_t blocks, void* stream) {
  return launch(sum_kernel, blocks, kSumThreads, stream, job);
}

int launch_total(const double* sums, std::int64_t count, double* total, void* stream) {
  total_kernel<<<1, cpu::kTotalLanes, 0, static_cast<cudaStream_t>(stream)>>>(sums, count, total);
  return cudaGetLastError();
}

int launch_copies(const CopyJob& job, std::int64_t blocks, void* stream) {
  return launch(copy_kernel, blocks, kThreads, stream, job);
}

int launch_steps(const FloatStepJob& job, std::int64_t blocks, void* stream) {
  return launch(step_kernel, blocks, kThreads, stream, job);
}

int launch_steps(const ByteStepJob& job, const StateMaps& maps, std::int64_t blocks, void* stream) {
  return launch(byte_step_kernel, blocks, kThreads, stream, job, maps);
}

}  // namespace vramkit::cuda
