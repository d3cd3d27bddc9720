// Teams: threads of one block that work on the same numbers.
//
// A kernel's body is written once, for a team as a whole. What stands outside of a team's calls is
// the same for all of its threads; what they do each goes in as a function of the lane:
//
//   Kept<T>               something that each lane keeps; kept.of(lane)
//   team.each(body)       body(lane) by all lanes
//   team.largest(body)    the largest of the lanes' unsigned numbers
//   team.sums<C>(body)    C sums over sixteen lanes, in the order of cpu::LevelScorer
//
// On a GPU each thread calls for its own lane and numbers meet by shuffles or in shared memory; a
// host's team (tests/cpp/emulated_team.hpp) calls for all lanes in turn. Nothing orders what lanes
// wrote to memory before what others read: bodies must not depend on that.
#pragma once
#include <cstdint>

#include "core/portable.hpp"

namespace vramkit::cuda {

template <int C>
struct Sums {
  float value[C];
};

#if defined(__CUDACC__)

template <class T>
struct OwnThread {
  T mine;
  __host__ __device__ T& of(int) { return mine; }
};

// `width` neighbouring threads of a warp, a power of two.
class WarpTeam {
 public:
  template <class T>
  using Kept = OwnThread<T>;

  __device__ explicit WarpTeam(int width)
      : width_(width),
        lane_(static_cast<int>(threadIdx.x) & (width - 1)),
        mask_((width == 32 ? 0xffffffffu : (1u << width) - 1)
              << (threadIdx.x & 31u & ~static_cast<unsigned>(width - 1))) {}

  __host__ __device__ int size() const { return width_; }

  template <class Body>
  __host__ __device__ void each(const Body& body) const {
    body(lane_);
  }
  template <class Body>
  __host__ __device__ std::uint32_t largest(const Body& body) const {
    std::uint32_t most = body(lane_);
#if defined(__CUDA_ARCH__)
    for (int step = width_ / 2; step > 0; step /= 2) {
      const std::uint32_t other = __shfl_xor_sync(mask_, most, step);
      most = other > most ? other : most;
    }
#endif
    return most;
  }
  // Neighbours add the same two numbers, so that all lanes have the sum's very bits.
  template <int C, class Body>
  __host__ __device__ Sums<C> sums(const Body& body) const {
    Sums<C> sum = body(lane_);
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        sum.value[c] += __shfl_xor_sync(mask_, sum.value[c], step);
      }
    }
#endif
    return sum;
  }

 private:
  int width_, lane_;
  unsigned mask_;
};

// A whole block of 32 * Warps threads; `shared` holds one number per warp.
template <int Warps>
class BlockTeam {
 public:
  template <class T>
  using Kept = OwnThread<T>;

  __device__ explicit BlockTeam(std::uint32_t* shared)
      : shared_(shared), lane_(static_cast<int>(threadIdx.x)) {}

  __host__ __device__ constexpr int size() const { return 32 * Warps; }

  template <class Body>
  __host__ __device__ void each(const Body& body) const {
    body(lane_);
  }
  template <class Body>
  __host__ __device__ std::uint32_t largest(const Body& body) const {
    std::uint32_t most = body(lane_);
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const std::uint32_t other = __shfl_xor_sync(0xffffffffu, most, step);
      most = other > most ? other : most;
    }
    __syncthreads();  // what an earlier call left has been read
    if (lane_ % 32 == 0) shared_[lane_ / 32] = most;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < Warps; ++warp) {
      most = shared_[warp] > most ? shared_[warp] : most;
    }
#endif
    return most;
  }

 private:
  std::uint32_t* shared_;
  int lane_;
};

#endif

}  // namespace vramkit::cuda
