// The encoders' kernels as functions of the host, as launch.hpp's are.
#pragma once
#include "cuda/quantize.hpp"

namespace vramkit::cuda {

// `table` or `bounds` -> *sorted, all in the device's memory, for a job that is launched next.
int launch_sort(const float* table, int entries, SortedCodes* sorted, void* stream);
int launch_bounds(const float* bounds, SortedCodes* sorted, void* stream);
int launch_quantize(const QuantizeJob& job, Element from, bool stochastic, void* stream);
int launch_stochastic_cast(const StochasticCast& job, Element from, Codes to, void* stream);

}  // namespace vramkit::cuda
