// The kernels around recurrent.hpp, one for each recurrence.
#include "cuda/int8_kernel.cuh"
#include "cuda/int8_launch.hpp"

namespace vramkit::cuda {
namespace int8 {
namespace {

constexpr int gates_of(int mode) { return cpu::gates_of(static_cast<cpu::Recurrence>(mode)); }

template <int mode, int NT, bool Whole>
__global__ void __launch_bounds__(kThreads, blocks_at_once(gates_of(mode), NT))
    step_kernel(const __grid_constant__ StepJob job) {
  constexpr auto kind = static_cast<cpu::Recurrence>(mode);
  constexpr int gates = gates_of(mode);
  __shared__ SharedSums<gates, NT> shared;
  const Tile tile = step_tile<NT>(job, blockIdx.x);
  sum_tile<Whole, true>(job.from, tile, shared);
  __syncthreads();
  finish_step<kind, gates, NT>(job, tile, shared, static_cast<int>(threadIdx.x));
}

template <cpu::Recurrence kind, int NT>
int step(const StepJob& job, cudaStream_t stream) {
  const unsigned grid = grid_of(step_blocks<NT>(job.from.rows, job.step.units));
  if (grid == 0) return cudaErrorInvalidConfiguration;
  constexpr int mode = static_cast<int>(kind);
  if (whole(job.from)) {
    step_kernel<mode, NT, true><<<grid, kThreads, 0, stream>>>(job);
  } else {
    step_kernel<mode, NT, false><<<grid, kThreads, 0, stream>>>(job);
  }
  return cudaGetLastError();
}

template <cpu::Recurrence kind>
int step(const StepJob& job, cudaStream_t stream) {
  return job.from.rows <= 8 ? step<kind, 1>(job, stream) : step<kind, 2>(job, stream);
}

}  // namespace
}  // namespace int8

int launch_step(const int8::StepJob& job, void* stream) {
  if (job.from.rows == 0 || job.step.units == 0) return cudaSuccess;
  auto* on = static_cast<cudaStream_t>(stream);
  switch (job.step.kind) {
    case cpu::Recurrence::lstm:
      return int8::step<cpu::Recurrence::lstm>(job, on);
    case cpu::Recurrence::gru:
      return int8::step<cpu::Recurrence::gru>(job, on);
    case cpu::Recurrence::rnn_tanh:
      return int8::step<cpu::Recurrence::rnn_tanh>(job, on);
    case cpu::Recurrence::rnn_relu:
      return int8::step<cpu::Recurrence::rnn_relu>(job, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vramkit::cuda
