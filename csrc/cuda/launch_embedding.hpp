// The kernels of embedding.hpp as functions of the host, as launch.hpp's are.
#pragma once
#include "cuda/embedding.hpp"

namespace vramkit::cuda {

int launch_gather(const GatherJob& job, Codes codes, Element out, const NestedMap& nested,
                  void* stream);
int launch_taps(const TapsJob& job, Codes codes, Element out, const NestedMap& nested,
                void* stream);

}  // namespace vramkit::cuda
