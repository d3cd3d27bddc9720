// The kernels around gemv.hpp, the split of float32 and the sum of splits.
#include "cuda/device.cuh"
#include "cuda/gemv.hpp"

namespace vramkit::cuda {
namespace {

template <Codes C, Operand O>
__global__ void __launch_bounds__(32 * kFewWarps)
    few_kernel(const __grid_constant__ ProductJob job, const __grid_constant__ NestedMap nested) {
  // Before 8.0 tensor cores know float16 alone.
#if __CUDA_ARCH__ >= 800
  constexpr bool known = true;
#else
  constexpr bool known = kIsHalf<O>;
#endif
  if constexpr (known) {
    DeviceContext context;
    few_block<C, O>(context, job, nested);
  }
}

__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ ProductJob job) {
  reduce_splits(job, std::int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ SplitJob job) {
  split_element(job, std::int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

template <Codes C, Operand O>
int few(const ProductJob& job, const NestedMap& nested, int warps, cudaStream_t stream) {
  const int width = whole_columns(kFewColumns, job.parts);
  const std::int64_t columns = std::int64_t{job.rows} * job.parts;
  const std::int64_t across = (job.weight.rows + kFewRows - 1) / kFewRows;
  const std::int64_t down = (columns + width - 1) / width;
  if (across > 0x7fffffff || down > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down),
                  static_cast<unsigned>(job.splits));
  few_kernel<C, O><<<grid, 32 * warps, FewShape<C, O>::shared_bytes(warps), stream>>>(job, nested);
  return cudaGetLastError();
}

template <Operand O>
int few(const ProductJob& job, Codes codes, const NestedMap& nested, int warps,
        cudaStream_t stream) {
  switch (codes) {
    case Codes::table4:
      return few<Codes::table4, O>(job, nested, warps, stream);
    case Codes::table8:
      return few<Codes::table8, O>(job, nested, warps, stream);
    case Codes::fp16:
      if constexpr (O == Operand::f16) return cudaErrorNotSupported;  // torch's own product
      return few < Codes::fp16,
             O == Operand::f16 ? Operand::bf16 : O > (job, nested, warps, stream);
    case Codes::bf16:
      // Integers and bfloat16 are exact in bfloat16: float32's parts need no other kernel.
      return few < Codes::bf16,
             O == Operand::split ? Operand::bf16 : O > (job, nested, warps, stream);
    case Codes::integer8:
      return few < Codes::integer8,
             O == Operand::split ? Operand::bf16 : O > (job, nested, warps, stream);
    case Codes::affine4:
      return few < Codes::affine4,
             O == Operand::split ? Operand::bf16 : O > (job, nested, warps, stream);
  }
  return cudaErrorInvalidValue;
}

unsigned blocks_of(std::int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

}  // namespace

int launch_few(const ProductJob& job, Codes codes, Operand operand, const NestedMap& nested,
               int warps, void* stream) {
  if (job.weight.rows == 0 || job.rows == 0) return cudaSuccess;
  if (warps < 1 || warps > kFewWarps || job.splits < 1 || job.splits > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  int device = 0, major = 0;
  if (const int status = cudaGetDevice(&device)) return status;
  if (const int status =
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) {
    return status;
  }
  auto* on = static_cast<cudaStream_t>(stream);
  if (operand == Operand::f16) return few<Operand::f16>(job, codes, nested, warps, on);
  if (major < 8) return cudaErrorNotSupported;
  return operand == Operand::bf16 ? few<Operand::bf16>(job, codes, nested, warps, on)
                                  : few<Operand::split>(job, codes, nested, warps, on);
}

int launch_reduce(const ProductJob& job, void* stream) {
  const std::int64_t count = job.rows * job.weight.rows;
  reduce_kernel<<<blocks_of(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(job);
  return cudaGetLastError();
}

int launch_split(const SplitJob& job, void* stream) {
  const std::int64_t count = job.rows * job.cols;
  if (count == 0) return cudaSuccess;
  split_kernel<<<blocks_of(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(job);
  return cudaGetLastError();
}

}  // namespace vramkit::cuda
