// Memory of the engine as Python sees it: a buffer where it is the host's, and DLPack (version 0,
// which everybody reads) wherever it is.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "core/error.hpp"

namespace vramkit::bindings {

// DLPack's own layout, https://dmlc.github.io/dlpack; all of it that is used here.
namespace dlpack {
inline constexpr std::int32_t kCpu = 1, kCuda = 2;
inline constexpr std::uint8_t kUnsigned = 1;
struct Device {
  std::int32_t type, index;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
}  // namespace dlpack

// Memory that a source in memory or a tensor views, alive for as long as anything refers to it.
class View {
 public:
  // `device`: that of CUDA, or -1 for the host.
  View(std::shared_ptr<const void> keeper, std::byte* start, std::int64_t bytes, int device = -1)
      : keeper_(std::move(keeper)), start_(start), bytes_(bytes), device_(device) {}

  pybind11::buffer_info buffer() const {
    if (device_ >= 0) throw InvalidArgument("memory of a GPU is no buffer: use torch.from_dlpack");
    return {reinterpret_cast<std::uint8_t*>(start_), static_cast<pybind11::ssize_t>(bytes_)};
  }
  dlpack::Device device() const {
    return device_ < 0 ? dlpack::Device{dlpack::kCpu, 0} : dlpack::Device{dlpack::kCuda, device_};
  }
  // A capsule with one dimension of bytes.
  pybind11::capsule capsule() const {
    struct Held {
      std::shared_ptr<const void> keeper;
      std::int64_t shape, stride;
      dlpack::ManagedTensor managed;
    };
    auto held = std::make_unique<Held>();
    held->keeper = keeper_;
    held->shape = bytes_;
    held->stride = 1;
    held->managed = {
        {start_, device(), 1, {dlpack::kUnsigned, 8, 1}, &held->shape, &held->stride, 0},
        held.get(),
        [](dlpack::ManagedTensor* managed) { delete static_cast<Held*>(managed->context); }};
    PyObject* made = PyCapsule_New(&held->managed, "dltensor", [](PyObject* object) {
      // Renamed by whoever took it: then it is theirs to delete.
      if (PyCapsule_IsValid(object, "dltensor") == 0) return;
      auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
      managed->deleter(managed);
    });
    if (made == nullptr) throw pybind11::error_already_set();
    static_cast<void>(held.release());
    return pybind11::reinterpret_steal<pybind11::capsule>(made);
  }

 private:
  std::shared_ptr<const void> keeper_;
  std::byte* start_;
  std::int64_t bytes_;
  int device_;
};

}  // namespace vramkit::bindings
