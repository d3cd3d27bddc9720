// What code needs to be compiled for the host and for a GPU alike.
#pragma once

#if defined(__CUDACC__)
#define VRAMKIT_ANYWHERE __host__ __device__
#else
#define VRAMKIT_ANYWHERE
#endif

// Before a loop of few rounds: what it indexes then stays in a GPU's registers.
#if defined(__CUDA_ARCH__)
#define VRAMKIT_UNROLLED _Pragma("unroll")
#else
#define VRAMKIT_UNROLLED
#endif
