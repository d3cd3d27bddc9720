// Python's view of CUDA in the core: what this build has, what this machine has, pinned memory.
#include "bindings/cuda.hpp"

#include <pybind11/pybind11.h>

#include "bindings/bindings.hpp"
#include "core/error.hpp"
#ifdef VRAMKIT_WITH_CUDA
#include "cuda/runtime_calls.hpp"
#endif

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

std::shared_ptr<CudaCalls> cuda_calls() {
#ifdef VRAMKIT_WITH_CUDA
  return std::make_shared<cuda::RuntimeCalls>();
#else
  return nullptr;
#endif
}

// How many devices this process sees, and why it sees none.
py::tuple cuda_devices() {
  const auto calls = cuda_calls();
  if (calls == nullptr) return py::make_tuple(0, "this package was built without CUDA");
  int count = 0;
  const CudaStatus status = [&] {
    const py::gil_scoped_release release;
    return calls->device_count(&count);
  }();
  if (status == kCudaSuccess) return py::make_tuple(count, "");
  calls->clear_last_error();
  return py::make_tuple(0, calls->describe(status));
}

}  // namespace

int device_index(const std::string& device) {
  if (device == "cpu") return -1;
  if (device == "cuda") return 0;
  const std::string digits = device.rfind("cuda:", 0) == 0 ? device.substr(5) : "";
  if (digits.empty() || digits.size() > 3 ||
      digits.find_first_not_of("0123456789") != std::string::npos) {
    throw InvalidArgument("a device is 'cpu', 'cuda' or 'cuda:<index>', not '" + device + "'");
  }
  return std::stoi(digits);
}

std::shared_ptr<CudaBackend> cuda_backend(int device, std::int64_t granularity) {
  auto calls = cuda_calls();
  if (calls == nullptr) {
    throw InvalidArgument(
        "this package was built without CUDA: build it with nvcc on PATH, or with "
        "VRAMKIT_CUDA=wheels");
  }
  return std::make_shared<CudaBackend>(std::move(calls), device, granularity);
}

void bind_cuda(py::module_& m) {
  // A function, so that the module's stub is the same however it was built.
  m.def(
      "built_with_cuda", [] { return cuda_calls() != nullptr; },
      "Whether this package has the engine's calls to CUDA.");
  m.def("cuda_devices", &cuda_devices,
        "(count, reason): CUDA devices that this process sees, and why where there are none.");
}

}  // namespace vramkit::bindings
