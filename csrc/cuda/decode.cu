// The kernels around decode.hpp: launch bounds, shared memory, and the choice among them.
#include <cuda_runtime_api.h>

#include "cuda/launch.hpp"

namespace vramkit::cuda {
namespace {

template <Codes C, Element E>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const __grid_constant__ DecodeJob job, const __grid_constant__ NestedMap nested) {
  __shared__ DecodeTables shared;
  fill_tables<C>(job, nested, shared, static_cast<int>(threadIdx.x));
  __syncthreads();
  decode_block<C, E>(job, shared, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <Element From, Codes To>
__global__ void __launch_bounds__(kThreads) cast_kernel(const __grid_constant__ CastJob job) {
  cast_block<From, To>(job, blockIdx.x, static_cast<int>(threadIdx.x));
}

// Blocks of the grid, or 0 if a grid cannot have so many.
unsigned grid_for(std::int64_t rows, std::int64_t cols) {
  const std::int64_t blocks = blocks_for(rows, cols);
  return blocks > 0x7fffffff ? 0 : static_cast<unsigned>(blocks);
}

// Only the launch's own outcome: what other work left behind is for others to find.
int outcome() { return cudaGetLastError(); }

template <Codes C>
int decode(const DecodeJob& job, Element out, const NestedMap& nested, unsigned grid,
           cudaStream_t stream) {
  switch (out) {
    case Element::f32:
      decode_kernel<C, Element::f32><<<grid, kThreads, 0, stream>>>(job, nested);
      break;
    case Element::bf16:
      decode_kernel<C, Element::bf16><<<grid, kThreads, 0, stream>>>(job, nested);
      break;
    case Element::f16:
      decode_kernel<C, Element::f16><<<grid, kThreads, 0, stream>>>(job, nested);
      break;
  }
  return outcome();
}

template <Codes To>
int cast(const CastJob& job, Element from, unsigned grid, cudaStream_t stream) {
  switch (from) {
    case Element::f32:
      cast_kernel<Element::f32, To><<<grid, kThreads, 0, stream>>>(job);
      break;
    case Element::bf16:
      cast_kernel<Element::bf16, To><<<grid, kThreads, 0, stream>>>(job);
      break;
    case Element::f16:
      cast_kernel<Element::f16, To><<<grid, kThreads, 0, stream>>>(job);
      break;
  }
  return outcome();
}

}  // namespace

int launch_decode(const DecodeJob& job, Codes codes, Element out, const NestedMap& nested,
                  void* stream) {
  if (job.rows == 0 || job.cols == 0) return cudaSuccess;
  const unsigned grid = grid_for(job.rows, job.cols);
  if (grid == 0) return cudaErrorInvalidConfiguration;
  auto* on = static_cast<cudaStream_t>(stream);
  switch (codes) {
    case Codes::fp16:
      return decode<Codes::fp16>(job, out, nested, grid, on);
    case Codes::bf16:
      return decode<Codes::bf16>(job, out, nested, grid, on);
    case Codes::table4:
      return decode<Codes::table4>(job, out, nested, grid, on);
    case Codes::table8:
      return decode<Codes::table8>(job, out, nested, grid, on);
    case Codes::integer8:
      return decode<Codes::integer8>(job, out, nested, grid, on);
    case Codes::affine4:
      return decode<Codes::affine4>(job, out, nested, grid, on);
  }
  return cudaErrorInvalidValue;
}

int launch_cast(const CastJob& job, Element from, Codes to, void* stream) {
  if (job.rows == 0 || job.cols == 0) return cudaSuccess;
  const unsigned grid = grid_for(job.rows, job.cols);
  if (grid == 0) return cudaErrorInvalidConfiguration;
  auto* on = static_cast<cudaStream_t>(stream);
  return to == Codes::bf16 ? cast<Codes::bf16>(job, from, grid, on)
                           : cast<Codes::fp16>(job, from, grid, on);
}

const char* describe_error(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace vramkit::cuda
