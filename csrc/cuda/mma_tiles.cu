// The kernels around mma_tiles.hpp.
#include "cuda/device.cuh"
#include "cuda/mma_tiles.hpp"

namespace vramkit::cuda {
namespace {

// Blocks that shared memory has room for on a multiprocessor; a value's three parts cost registers.
// For 12.0 the 4-bit tables take one register more than two blocks leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr bool kTablesAreTight = true;
#else
constexpr bool kTablesAreTight = false;
#endif
template <Codes C, Operand O, int NT>
constexpr int kTileBlocks = kTablesAreTight&& C == Codes::table4&& NT == 8
                                ? 1
                                : (NT == 2 ? 3 : 2) - (O == Operand::split ? 1 : 0);

template <Codes C, Operand O, int NT>
__global__ void __launch_bounds__(32 * kTileWarps, kTileBlocks<C, O, NT>)
    tile_kernel(const __grid_constant__ ProductJob job, const __grid_constant__ NestedMap nested) {
#if __CUDA_ARCH__ >= 800  // asynchronous copies
  DeviceContext context;
  tile_block<C, O, NT>(context, job, nested);
#endif
}

template <Codes C, Operand O, int NT>
int tiles(const ProductJob& job, const NestedMap& nested, cudaStream_t stream) {
  using Shape = TileShape<C, O, NT>;
  const int width = whole_columns(Shape::kColumns, job.parts);
  const std::int64_t columns = std::int64_t{job.rows} * job.parts;
  const std::int64_t across = (job.weight.rows + kTileRows - 1) / kTileRows;
  const std::int64_t down = (columns + width - 1) / width;
  if (across > 0x7fffffff || down > 65535) return cudaErrorInvalidConfiguration;
  const auto kernel = tile_kernel<C, O, NT>;
  if constexpr (Shape::kSharedBytes > 48 << 10) {
    if (const int status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                Shape::kSharedBytes)) {
      cudaGetLastError();
      return status;
    }
  }
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down),
                  static_cast<unsigned>(job.splits));
  kernel<<<grid, 32 * kTileWarps, Shape::kSharedBytes, stream>>>(job, nested);
  return cudaGetLastError();
}

template <Codes C, Operand O>
int tiles(const ProductJob& job, const NestedMap& nested, cudaStream_t stream) {
  return std::int64_t{job.rows} * job.parts <= 16 ? tiles<C, O, 2>(job, nested, stream)
                                                  : tiles<C, O, 8>(job, nested, stream);
}

template <Operand O>
int tiles(const ProductJob& job, Codes codes, const NestedMap& nested, cudaStream_t stream) {
  constexpr Operand exact = O == Operand::split ? Operand::bf16 : O;  // for integers
  switch (codes) {
    case Codes::table4:
      return tiles<Codes::table4, O>(job, nested, stream);
    case Codes::table8:
      return tiles<Codes::table8, O>(job, nested, stream);
    case Codes::integer8:
      return tiles<Codes::integer8, exact>(job, nested, stream);
    case Codes::affine4:
      return tiles<Codes::affine4, exact>(job, nested, stream);
    default:  // 16-bit weights of another dtype than x: few rows, or decoded
      return cudaErrorNotSupported;
  }
}

}  // namespace

int launch_tiles(const ProductJob& job, Codes codes, Operand operand, const NestedMap& nested,
                 void* stream) {
  if (job.weight.rows == 0 || job.rows == 0) return cudaSuccess;
  if (job.splits < 1 || job.splits > 65535) return cudaErrorInvalidConfiguration;
  int device = 0, major = 0;
  if (const int status = cudaGetDevice(&device)) return status;
  if (const int status =
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) {
    return status;
  }
  if (major < 8) return cudaErrorNotSupported;
  auto* on = static_cast<cudaStream_t>(stream);
  switch (operand) {
    case Operand::bf16:
      return tiles<Operand::bf16>(job, codes, nested, on);
    case Operand::f16:
      return tiles<Operand::f16>(job, codes, nested, on);
    case Operand::split:
      return tiles<Operand::split>(job, codes, nested, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vramkit::cuda
