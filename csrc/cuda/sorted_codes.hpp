// A codebook in ascending order, in the device's memory, and how its threads sort one
// (quantize.hpp says who reads it).
#pragma once
#include <cstdint>

#include "cuda/decode.hpp"

namespace vramkit::cuda {

// A codebook sorted by value (cpu::SortedTable), in the device's memory.
struct SortedCodes {
  float bound[256];  // the last is unused
  std::uint8_t code[256];
};

// Sorting a codebook, by one thread for each of its 2^bits codes: first the rank of each value,
// equal ones in the order of their codes, then the midpoints.
struct SortScratch {
  float value[256];
};
VRAMKIT_ANYWHERE inline void sort_rank(const float* table, int entries, SortScratch& scratch,
                                       SortedCodes& sorted, int thread) {
  if (thread >= entries) return;
  const float mine = table[thread];
  int rank = 0;
  for (int other = 0; other < entries; ++other) {
    const float value = table[other];
    if (value < mine || (value == mine && other < thread)) ++rank;
  }
  scratch.value[rank] = mine;
  sorted.code[rank] = static_cast<std::uint8_t>(thread);
}
VRAMKIT_ANYWHERE inline void sort_bound(int entries, const SortScratch& scratch,
                                        SortedCodes& sorted, int thread) {
  if (thread + 1 < entries) {
    sorted.bound[thread] = (scratch.value[thread] + scratch.value[thread + 1]) / 2.0f;
  } else {
    sorted.bound[thread] = 0.0f;
    if (thread >= entries) sorted.code[thread] = 0;
  }
}
// The same of 255 given bounds between codes that ascend.
VRAMKIT_ANYWHERE inline void take_bound(const float* bounds, SortedCodes& sorted, int thread) {
  sorted.bound[thread] = thread < 255 ? bounds[thread] : 0.0f;
  sorted.code[thread] = static_cast<std::uint8_t>(thread);
}

}  // namespace vramkit::cuda
