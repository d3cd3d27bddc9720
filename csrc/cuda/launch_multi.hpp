// The kernels of multi.hpp as functions of the host, as launch.hpp's are. `blocks`: as many as the
// job's slots together have.
#pragma once
#include "cuda/multi.hpp"

namespace vramkit::cuda {

int launch_square_sums(const SumJob& job, std::int64_t blocks, void* stream);
// *total = the sum of `count` sums.
int launch_total(const double* sums, std::int64_t count, double* total, void* stream);
int launch_copies(const CopyJob& job, std::int64_t blocks, void* stream);
int launch_steps(const FloatStepJob& job, std::int64_t blocks, void* stream);
int launch_steps(const ByteStepJob& job, const StateMaps& maps, std::int64_t blocks, void* stream);

}  // namespace vramkit::cuda
