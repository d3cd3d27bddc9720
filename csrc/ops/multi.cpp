// Operators over lists of tensors (cpu/multi.hpp): one call for all of a model's gradients or
// parameters, in chunks that threads share whatever the tensors' sizes.
//
// Elements are taken in the order of memory: every tensor is dense (its elements fill one run of
// addresses), and those that belong together have the same strides.
#include "cpu/multi.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "ops/schema.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

using Tensors = std::vector<Tensor>;

struct Chunk {
  std::size_t tensor;
  std::int64_t first, count;
};

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

void check_pair(const Tensor& a, const Tensor& b, const char* name) {
  bool same = a.dim() == b.dim();
  for (std::int64_t d = 0; same && d < a.dim(); ++d) {
    same = a.size(d) == b.size(d) && (a.size(d) <= 1 || a.stride(d) == b.stride(d));
  }
  STD_TORCH_CHECK(same, "vramkit: ", name, " must have their partners' sizes and strides");
}

void check_lists(const Tensors& all, const Tensors& others, const char* name) {
  STD_TORCH_CHECK(others.size() == all.size(), "vramkit: ", name, " has ", others.size(),
                  " tensors where there are ", all.size());
}

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

void* at(const Tensor& tensor, std::int64_t element) {
  return static_cast<char*>(tensor.data_ptr()) + element * cpu::size_of(dtype_of(tensor));
}

template <class Work>
void for_chunks(const std::vector<Chunk>& chunks, const Work& work) {
  // Small tensors are chunks of their own: some of them to a task.
  const auto count = static_cast<std::int64_t>(chunks.size());
  std::int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.count;
  const std::int64_t tasks = std::max<std::int64_t>(1, elements / cpu::kMultiChunk);
  ts::parallel_for(0, count, (count + tasks - 1) / tasks,
                   [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t i = begin; i < end; ++i) work(i, chunks[i]);
                   });
}

Tensor multi_square_sum(Tensors tensors) {
  const std::vector<Chunk> chunks = chunks_of(tensors);
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  std::vector<double> sums(chunks.size());
  for_chunks(chunks, [&](std::int64_t i, const Chunk& c) {
    const Tensor& tensor = tensors[c.tensor];
    sums[i] = kernels.square_sum(at(tensor, c.first), dtype_of(tensor), c.count);
  });
  Tensor result = ts::empty({}, ScalarType::Double);
  double total = 0.0;
  for (const double sum : sums) total += sum;
  *static_cast<double*>(result.data_ptr()) = total;
  return result;
}

float number_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Float,
                  "vramkit: ", name, " must be one float32");
  return *static_cast<const float*>(tensor.data_ptr());
}

void multi_scale(Tensors tensors, const Tensor& factor) {
  const std::vector<Chunk> chunks = chunks_of(tensors);
  const float by = number_of(factor, "factor");
  if (by == 1.0f) return;
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  for_chunks(chunks, [&](std::int64_t, const Chunk& c) {
    const Tensor& tensor = tensors[c.tensor];
    kernels.scale(at(tensor, c.first), dtype_of(tensor), c.count, by);
  });
}

void multi_cast_out(Tensors sources, Tensors targets) {
  check_lists(sources, targets, "targets");
  for (std::size_t t = 0; t < sources.size(); ++t) check_pair(sources[t], targets[t], "targets");
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  for_chunks(chunks_of(sources), [&](std::int64_t, const Chunk& c) {
    const Tensor& from = sources[c.tensor];
    const Tensor& to = targets[c.tensor];
    kernels.cast(at(from, c.first), dtype_of(from), at(to, c.first), dtype_of(to), c.count);
  });
}

// What is the same for all parameters of a step, from the operators' numbers in float64.
cpu::AdamwStep numbers(const Tensor& factor, double lr, double beta1, double beta2, double epsilon,
                       double weight_decay) {
  cpu::AdamwStep step;
  step.factor = number_of(factor, "factor");
  step.decay = static_cast<float>(1.0 - lr * weight_decay);
  step.beta1 = static_cast<float>(beta1);
  step.beta2 = static_cast<float>(beta2);
  step.less_beta1 = static_cast<float>(1.0 - beta1);
  step.less_beta2 = static_cast<float>(1.0 - beta2);
  step.epsilon = static_cast<float>(epsilon);
  return step;
}

void set_parts(cpu::AdamwStep& step, const Chunk& c, const Tensor& parameter,
               const Tensor& gradient, const Tensors& seconds, double lr, double beta1,
               double beta2, std::int64_t count) {
  step.parameter = at(parameter, c.first);
  step.parameter_type = dtype_of(parameter);
  step.gradient = at(gradient, c.first);
  step.gradient_type = dtype_of(gradient);
  step.count = c.count;
  if (!seconds.empty()) {
    step.second = at(seconds[c.tensor], c.first);
    step.second_type = dtype_of(seconds[c.tensor]);
  }
  const auto t = static_cast<double>(count);
  step.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, t)));
  step.root_correction = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, t)));
}

void check_step(const Tensors& parameters, const Tensors& gradients, const Tensors& seconds,
                const std::vector<std::int64_t>& steps) {
  check_lists(parameters, gradients, "gradients");
  if (!seconds.empty()) check_lists(parameters, seconds, "seconds");
  STD_TORCH_CHECK(steps.size() == parameters.size(), "vramkit: one step count per parameter");
  for (std::size_t t = 0; t < parameters.size(); ++t) {
    check_pair(parameters[t], gradients[t], "gradients");
    STD_TORCH_CHECK(steps[t] >= 1, "vramkit: steps are counted from 1");
    if (seconds.empty()) continue;
    check_pair(parameters[t], seconds[t], "seconds");
    const cpu::DType first = dtype_of(parameters[t]), second = dtype_of(seconds[t]);
    STD_TORCH_CHECK((first == cpu::DType::f32) == (second != first),
                    "vramkit: second is a 16-bit copy of a float32 parameter, or the other half "
                    "of a 16-bit one");
  }
}

void multi_adamw(Tensors parameters, Tensors gradients, Tensors averages, Tensors squares,
                 Tensors seconds, const Tensor& factor, double lr, double beta1, double beta2,
                 double epsilon, double weight_decay, std::vector<std::int64_t> steps) {
  check_step(parameters, gradients, seconds, steps);
  check_lists(parameters, averages, "averages");
  check_lists(parameters, squares, "squares");
  for (std::size_t t = 0; t < parameters.size(); ++t) {
    check_pair(parameters[t], averages[t], "averages");
    check_pair(parameters[t], squares[t], "squares");
    STD_TORCH_CHECK(averages[t].scalar_type() == ScalarType::Float &&
                        squares[t].scalar_type() == ScalarType::Float,
                    "vramkit: averages and squares are float32");
  }
  const cpu::AdamwStep shared = numbers(factor, lr, beta1, beta2, epsilon, weight_decay);
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  for_chunks(chunks_of(parameters), [&](std::int64_t, const Chunk& c) {
    cpu::AdamwStep step = shared;
    set_parts(step, c, parameters[c.tensor], gradients[c.tensor], seconds, lr, beta1, beta2,
              steps[c.tensor]);
    step.average = static_cast<float*>(at(averages[c.tensor], c.first));
    step.average_square = static_cast<float*>(at(squares[c.tensor], c.first));
    kernels.adamw(step);
  });
}

// The codebooks of 8-bit state: values, then the midpoints between them.
struct StateTable {
  float values[256];
  float bounds[255];
  explicit StateTable(const std::array<float, 256>& map) {
    std::copy(map.begin(), map.end(), values);
    for (int k = 0; k < 255; ++k) bounds[k] = (map[k] + map[k + 1]) / 2.0f;
  }
};

std::uint8_t* codes_of(const Tensor& tensor) {
  return static_cast<std::uint8_t*>(tensor.data_ptr());
}

void multi_adamw8(Tensors parameters, Tensors gradients, Tensors average_codes,
                  Tensors average_scales, Tensors square_codes, Tensors square_scales,
                  Tensors seconds, const Tensor& factor, double lr, double beta1, double beta2,
                  double epsilon, double weight_decay, std::vector<std::int64_t> steps) {
  check_step(parameters, gradients, seconds, steps);
  for (const Tensors* list : {&average_codes, &average_scales, &square_codes, &square_scales}) {
    check_lists(parameters, *list, "state");
  }
  for (std::size_t t = 0; t < parameters.size(); ++t) {
    const std::int64_t count = parameters[t].numel();
    const std::int64_t blocks = (count + cpu::kStateBlock - 1) / cpu::kStateBlock;
    for (const Tensor* codes : {&average_codes[t], &square_codes[t]}) {
      STD_TORCH_CHECK(codes->scalar_type() == ScalarType::Byte && codes->is_contiguous() &&
                          codes->numel() == count,
                      "vramkit: codes of state are contiguous uint8, one per element");
    }
    for (const Tensor* scales : {&average_scales[t], &square_scales[t]}) {
      STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->is_contiguous() &&
                          scales->numel() == blocks,
                      "vramkit: scales of state are contiguous float32, one per ", cpu::kStateBlock,
                      " elements");
    }
  }
  static const StateTable signed_table(dynamic_map()), unsigned_table(unsigned_dynamic_map());
  const cpu::AdamwStep shared = numbers(factor, lr, beta1, beta2, epsilon, weight_decay);
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  const auto state = [](const StateTable& table, const Tensor& codes, const Tensor& scales,
                        std::int64_t first) {
    return cpu::ByteState{table.values, table.bounds, codes_of(codes) + first,
                          static_cast<float*>(scales.data_ptr()) + first / cpu::kStateBlock};
  };
  for_chunks(chunks_of(parameters), [&](std::int64_t, const Chunk& c) {
    cpu::AdamwStep step = shared;
    const std::size_t t = c.tensor;
    set_parts(step, c, parameters[t], gradients[t], seconds, lr, beta1, beta2, steps[t]);
    step.average_bytes = state(signed_table, average_codes[t], average_scales[t], c.first);
    step.square_bytes = state(unsigned_table, square_codes[t], square_scales[t], c.first);
    kernels.adamw(step);
  });
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_multi_square_sum", TORCH_BOX(&vramkit::ops::multi_square_sum));
  m.impl("_multi_scale_", TORCH_BOX(&vramkit::ops::multi_scale));
  m.impl("_multi_cast_out", TORCH_BOX(&vramkit::ops::multi_cast_out));
  m.impl("_multi_adamw_", TORCH_BOX(&vramkit::ops::multi_adamw));
  m.impl("_multi_adamw8_", TORCH_BOX(&vramkit::ops::multi_adamw8));
}
