#include "ops/lists.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace vramkit::ops {
namespace {

bool dense(const Tensor& tensor) {
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (std::int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) return true;
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  std::int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool partners(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim() && a.get_device_index() == b.get_device_index();
  for (std::int64_t d = 0; same && d < a.dim(); ++d) {
    same = a.size(d) == b.size(d) && (a.size(d) <= 1 || a.stride(d) == b.stride(d));
  }
  return same;
}

void check_length(const Tensors& all, const Tensors& others, const char* name) {
  STD_TORCH_CHECK(others.size() == all.size(), "vramkit: ", name, " has ", others.size(),
                  " tensors where there are ", all.size());
}

}  // namespace

std::vector<Chunk> chunks_of(const Tensors& tensors) {
  std::vector<Chunk> all;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    STD_TORCH_CHECK(dense(tensors[t]), "vramkit: tensors of a list must be dense in memory");
    const std::int64_t count = tensors[t].numel();
    for (std::int64_t first = 0; first < count; first += cpu::kMultiChunk) {
      all.push_back({t, first, std::min(cpu::kMultiChunk, count - first)});
    }
  }
  return all;
}

void* element_of_list(const Tensor& tensor, std::int64_t element) {
  return static_cast<char*>(tensor.data_ptr()) + element * cpu::size_of(dtype_of(tensor));
}

void check_partners(const Tensors& all, const Tensors& others, const char* name) {
  check_length(all, others, name);
  for (std::size_t t = 0; t < all.size(); ++t) {
    STD_TORCH_CHECK(partners(all[t], others[t]), "vramkit: ", name,
                    " must have their partners' sizes, strides and device");
  }
}

void AdamwLists::check() const {
  check_partners(parameters, gradients, "gradients");
  if (!seconds.empty()) check_partners(parameters, seconds, "seconds");
  STD_TORCH_CHECK(steps.size() == parameters.size(), "vramkit: one step count per parameter");
  STD_TORCH_CHECK(!seed.has_value() || rows.size() == parameters.size(),
                  "vramkit: one row of random words per parameter");
  for (std::size_t t = 0; t < parameters.size(); ++t) {
    STD_TORCH_CHECK(steps[t] >= 1, "vramkit: steps are counted from 1");
    if (seconds.empty()) continue;
    const cpu::DType first = dtype_of(parameters[t]), second = dtype_of(seconds[t]);
    STD_TORCH_CHECK((first == cpu::DType::f32) == (second != first),
                    "vramkit: second is a 16-bit copy of a float32 parameter, or the other half "
                    "of a 16-bit one");
  }
}

void AdamwLists::check_state(const Tensors& averages, const Tensors& squares,
                             const Tensors& largest) const {
  for (const Tensors* list : {&averages, &squares, &largest}) {
    if (list == &largest && largest.empty()) continue;
    check_partners(parameters, *list, "state");
    for (const Tensor& tensor : *list) {
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "vramkit: state is float32");
    }
  }
}

void AdamwLists::check_bytes(const Tensors* const (&lists)[4]) const {
  for (int k = 0; k < 4; ++k) {
    const bool codes = k % 2 == 0;
    check_length(parameters, *lists[k], "state");
    for (std::size_t t = 0; t < parameters.size(); ++t) {
      const Tensor& tensor = (*lists[k])[t];
      const std::int64_t count = parameters[t].numel();
      const std::int64_t blocks = (count + cpu::kStateBlock - 1) / cpu::kStateBlock;
      STD_TORCH_CHECK(tensor.scalar_type() == (codes ? ScalarType::Byte : ScalarType::Float) &&
                          tensor.is_contiguous() && tensor.numel() == (codes ? count : blocks) &&
                          tensor.get_device_index() == parameters[t].get_device_index(),
                      "vramkit: codes of state are contiguous uint8, one per element; scales "
                      "contiguous float32, one per ",
                      cpu::kStateBlock, " elements");
    }
  }
}

cpu::AdamwNumbers AdamwLists::numbers(std::size_t tensor) const {
  const auto t = static_cast<double>(steps[tensor]);
  cpu::AdamwNumbers n;
  n.factor = static_cast<float>(factor);
  n.decay = static_cast<float>(1.0 - lr * weight_decay);
  n.beta2 = static_cast<float>(beta2);
  n.less_beta1 = static_cast<float>(1.0 - beta1);
  n.less_beta2 = static_cast<float>(1.0 - beta2);
  n.epsilon = static_cast<float>(epsilon);
  n.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, t)));
  n.root_correction = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, t)));
  return n;
}

cpu::Dice AdamwLists::dice(std::size_t tensor) const {
  if (!seed.has_value()) return {};
  return {true, static_cast<std::uint64_t>(*seed), rows[tensor], 0};
}

}  // namespace vramkit::ops
