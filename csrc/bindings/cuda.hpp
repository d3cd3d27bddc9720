// Where the bindings get CUDA backends from: one way for packages built with CUDA and without.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "core/engine/cuda_backend.hpp"

namespace vramkit::bindings {

// The index in "cuda" or "cuda:1"; -1 for "cpu". Throws InvalidArgument for anything else.
int device_index(const std::string& device);
// Throws InvalidArgument where the package has no CUDA, or there is no such device; DeviceError
// where there is no driver.
std::shared_ptr<CudaBackend> cuda_backend(int device, std::int64_t granularity);

}  // namespace vramkit::bindings
