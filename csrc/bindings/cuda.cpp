// Python's view of CUDA in the core: what this build has, what this machine has, pinned memory.
#include "bindings/cuda.hpp"

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "bindings/bindings.hpp"
#include "core/engine/cuda_memory.hpp"
#include "core/error.hpp"
#ifdef VRAMKIT_WITH_CUDA
#include "cuda/runtime_calls.hpp"
#endif

namespace py = pybind11;

namespace vramkit::bindings {
namespace {

constexpr const char* kWithoutCuda =
    "this package was built without CUDA: build it with nvcc on PATH, or with VRAMKIT_CUDA=wheels";

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

// A Python object's memory, pinned. The object's buffer is let go of after the registration.
struct PinnedBuffer {
  py::buffer_info memory;
  std::unique_ptr<PinnedRange> range;
};

std::unique_ptr<PinnedBuffer> pin(const py::buffer& buffer, const std::string& device) {
  const int index = device_index(device);
  if (index < 0) throw InvalidArgument("memory is pinned for a GPU, not for 'cpu'");
  auto pinned = std::make_unique<PinnedBuffer>();
  pinned->memory = buffer.request(true);
  auto calls = cuda_calls();
  if (calls == nullptr) throw InvalidArgument(kWithoutCuda);
  auto* start = static_cast<std::byte*>(pinned->memory.ptr);
  const std::int64_t bytes = pinned->memory.size * pinned->memory.itemsize;
  const py::gil_scoped_release release;
  pinned->range = std::make_unique<PinnedRange>(
      std::make_shared<CudaDevice>(std::move(calls), index), start, bytes);
  return pinned;
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
  if (calls == nullptr) throw InvalidArgument(kWithoutCuda);
  return std::make_shared<CudaBackend>(std::move(calls), device, granularity);
}

void bind_cuda(py::module_& m) {
  // A function, so that the module's stub is the same however it was built.
  m.def(
      "built_with_cuda", [] { return cuda_calls() != nullptr; },
      "Whether this package has the engine's calls to CUDA.");
  py::class_<PinnedBuffer>(m, "PinnedBuffer",
                           "A writable buffer, registered with a GPU so that it copies from it by "
                           "itself, for as long as this lives.")
      .def(py::init(&pin), py::arg("memory"), py::arg("device"));
  m.def("cuda_devices", &cuda_devices,
        "(count, reason): CUDA devices that this process sees, and why where there are none.");
}

}  // namespace vramkit::bindings
