// What the CUDA operators' files share: torch's tensors, streams and errors seen from kernels.
#pragma once
#define USE_CUDA  // the C shim's functions of streams
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "cuda/launch.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {

inline cuda::Element element_of(const Tensor& tensor) {
  switch (dtype_of(tensor)) {
    case cpu::DType::bf16:
      return cuda::Element::bf16;
    case cpu::DType::f16:
      return cuda::Element::f16;
    default:
      return cuda::Element::f32;
  }
}

inline cuda::Codes codes_of(const Format& format) {
  switch (format.family) {
    case Family::codebook:
      return format.bits == 4 ? cuda::Codes::table4 : cuda::Codes::table8;
    case Family::affine:
      return format.bits == 4 ? cuda::Codes::affine4 : cuda::Codes::integer8;
    default:
      return format.encoder == Encoder::fp16 ? cuda::Codes::fp16 : cuda::Codes::bf16;
  }
}

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline void check_launch(int status, const char* what) {
  STD_TORCH_CHECK(status == 0, "vramkit: ", what, " on CUDA failed: ", cuda::describe_error(status),
                  " (", status, ")");
}

inline void check_same_device(const Tensor& tensor, const Tensor& out, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == out.get_device_index(),
                  "vramkit: ", name, " is not on the device of the output");
}

// The table's values stay on the device; what checks a format reads zeros of the host instead.
inline std::optional<Tensor> table_for_checks(const std::vector<std::int64_t>& spec) {
  if (spec.size() < 2 || spec[0] != static_cast<std::int64_t>(Family::codebook) ||
      (spec[1] != 4 && spec[1] != 8)) {
    return std::nullopt;
  }
  const std::int64_t entries = std::int64_t{1} << spec[1];
  Tensor zeros = torch::stable::empty({entries}, ScalarType::Float);
  std::memset(zeros.data_ptr(), 0, static_cast<std::size_t>(entries) * sizeof(float));
  return zeros;
}

}  // namespace vramkit::ops
