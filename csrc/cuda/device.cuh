// The Context of kernel bodies on a GPU: what a block is, and the instructions that C++ lacks.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace vramkit::cuda {

extern __shared__ __align__(16) std::uint8_t dynamic_shared[];

struct DeviceContext {
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ int block_x() const { return static_cast<int>(blockIdx.x); }
  __device__ int block_y() const { return static_cast<int>(blockIdx.y); }
  __device__ int block_z() const { return static_cast<int>(blockIdx.z); }
  __device__ std::uint8_t* shared() const { return dynamic_shared; }
  __device__ void sync() const { __syncthreads(); }

  // Keeps an address in registers, where the compiler would work it out again for every use.
  __device__ static void pin(const std::uint8_t*& address) { asm volatile("" : "+l"(address)); }

  // What is read once, past the first cache: it would only drive out what is read again.
  template <int N>
  __device__ void load_once(const std::uint8_t* from, std::uint32_t* to) const {
    static_assert(N == 8 || N == 16);
    if constexpr (N == 8) {
      asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                   : "=r"(to[0]), "=r"(to[1])
                   : "l"(from));
    } else {
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "l"(from));
    }
  }
  template <int N>
  __device__ void load_often(const std::uint8_t* from, std::uint32_t* to) const {
    static_assert(N == 16);
    const uint4 vector = __ldg(reinterpret_cast<const uint4*>(from));
    to[0] = vector.x, to[1] = vector.y, to[2] = vector.z, to[3] = vector.w;
  }

  // Sixteen bytes, `bytes` of them from memory and zeros behind those.
  __device__ void copy_async(std::uint8_t* to, const std::uint8_t* from, int bytes) const {
#if __CUDA_ARCH__ >= 800
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(bytes)
                 : "memory");
#endif
  }
  __device__ void commit() const {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  // Until at most N groups of this thread's copies are under way.
  template <int N>
  __device__ void wait() const {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
  }

  // sum += A B for 16 x 16 and 16 x 8 16-bit floats, in float32.
  template <bool kHalf>
  __device__ void mma(float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                      std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) const {
#if __CUDA_ARCH__ >= 800
    if constexpr (kHalf) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
#else
    if constexpr (kHalf) {  // two instructions of 8 elements each
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
          "{%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a0), "r"(a1), "r"(b0));
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
          "{%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a2), "r"(a3), "r"(b1));
    }
#endif
  }
};

}  // namespace vramkit::cuda
