// The int8 kernels as functions of the host, without CUDA's headers; launch.hpp says what holds for
// all of them. Jobs are checked where they are made (csrc/cuda/ops/int8.cpp, recurrent.cpp).
#pragma once
#include "cuda/int8.hpp"
#include "cuda/int8_tile.hpp"
#include "cuda/recurrent.hpp"

namespace vramkit::cuda {

// Rounds rows of x. With a threshold, marks columns (cleared first), takes them out, and, where
// `list` is not null, lists them in `list` and `count`.
int launch_round_rows(const int8::RowsJob& job, Element type, std::int32_t* list,
                      std::int32_t* count, void* stream);
int launch_product(const int8::ProductJob& job, void* stream);
int launch_scale(const int8::ScaleJob& job, void* stream);
int launch_step(const int8::StepJob& job, void* stream);
// Bytes from one place of the device to another.
int launch_copy(void* to, const void* from, std::int64_t bytes, void* stream);

}  // namespace vramkit::cuda
