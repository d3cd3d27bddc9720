// The kernels as functions of the host, without CUDA's headers. `stream` is a cudaStream_t; the
// result is CUDA's own number of the launch's outcome, whose error has been cleared. Nothing is
// waited for, and nothing allocated: all of it may be captured in a graph.
#pragma once
#include "cuda/decode.hpp"

namespace vramkit::cuda {

int launch_decode(const DecodeJob& job, Codes codes, Element out, const NestedMap& nested,
                  void* stream);
int launch_cast(const CastJob& job, Element from, Codes to, void* stream);
const char* describe_error(int status);

}  // namespace vramkit::cuda
