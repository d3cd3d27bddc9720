// The kernels around embedding.hpp.
#undef NDEBUG  // an index out of range stops the device, as torch's own embedding does
#include <cuda_runtime_api.h>

#include <cassert>

#include "cuda/launch_embedding.hpp"

namespace vramkit::cuda {
namespace {

template <Codes C, Element E>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ GatherJob job, const __grid_constant__ NestedMap nested) {
  __shared__ DecodeTables shared;
  fill_tables<C>(job.weight, nested, shared, static_cast<int>(threadIdx.x));
  __syncthreads();
  const bool indices_in_range =
      gather_block<C, E>(job, shared, blockIdx.x, static_cast<int>(threadIdx.x));
  assert(indices_in_range);
}

template <Codes C, Element E>
__global__ void __launch_bounds__(kThreads, 4)
    taps_kernel(const __grid_constant__ TapsJob job, const __grid_constant__ NestedMap nested) {
  __shared__ DecodeTables shared;
  __shared__ TapsTile tile;
  fill_tables<C>(job.weight, nested, shared, static_cast<int>(threadIdx.x));
  __syncthreads();
  fetch_tile<C>(job, shared, tile, blockIdx.x, static_cast<int>(threadIdx.x));
  __syncthreads();
  store_tile<E>(job, tile, blockIdx.x, static_cast<int>(threadIdx.x));
}

// Calls run<codes, out>().
template <Codes C, class Run>
void with_element(Element out, const Run& run) {
  if (out == Element::f32) {
    run.template operator()<C, Element::f32>();
  } else if (out == Element::bf16) {
    run.template operator()<C, Element::bf16>();
  } else {
    run.template operator()<C, Element::f16>();
  }
}
template <class Run>
void with_types(Codes codes, Element out, const Run& run) {
  switch (codes) {
    case Codes::fp16:
      return with_element<Codes::fp16>(out, run);
    case Codes::bf16:
      return with_element<Codes::bf16>(out, run);
    case Codes::table4:
      return with_element<Codes::table4>(out, run);
    case Codes::table8:
      return with_element<Codes::table8>(out, run);
    case Codes::integer8:
      return with_element<Codes::integer8>(out, run);
    case Codes::affine4:
      return with_element<Codes::affine4>(out, run);
  }
}

constexpr std::int64_t kLargestGrid = 0x7fffffff;

}  // namespace

int launch_gather(const GatherJob& job, Codes codes, Element out, const NestedMap& nested,
                  void* stream) {
  if (job.count == 0 || job.weight.cols == 0) return cudaSuccess;
  const std::int64_t blocks = blocks_for(job.count, job.weight.cols);
  if (blocks > kLargestGrid) return cudaErrorInvalidConfiguration;
  with_types(codes, out, [&]<Codes C, Element E>() {
    gather_kernel<C, E>
        <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(job,
                                                                                            nested);
  });
  return cudaGetLastError();
}

int launch_taps(const TapsJob& job, Codes codes, Element out, const NestedMap& nested,
                void* stream) {
  if (job.weight.rows == 0 || job.weight.cols == 0) return cudaSuccess;
  const std::int64_t blocks = job.weight.rows * tiles_per_row(job.weight.cols);
  if (blocks > kLargestGrid) return cudaErrorInvalidConfiguration;
  with_types(codes, out, [&]<Codes C, Element E>() {
    taps_kernel<C, E>
        <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(job,
                                                                                            nested);
  });
  return cudaGetLastError();
}

}  // namespace vramkit::cuda
