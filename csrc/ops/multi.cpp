// Operators over lists of tensors (cpu/multi.hpp): one call for all of a model's gradients or
// parameters, in chunks that threads share whatever the tensors' sizes.
#include "cpu/multi.hpp"

#include <algorithm>
#include <optional>
#include <vector>

#include "ops/lists.hpp"
#include "ops/schema.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

// What a chunk costs beside its elements, in elements: a call, and lines of the cache in part.
constexpr std::int64_t kChunkCost = 256;

// work(index, chunk) for all of them. Threads share elements, not chunks: small tensors are chunks
// of their own.
template <class Work>
void for_chunks(const std::vector<Chunk>& chunks, const Work& work) {
  std::vector<std::int64_t> before{0};  // the cost of the chunks before each, and of all
  before.reserve(chunks.size() + 1);
  for (const Chunk& chunk : chunks) before.push_back(before.back() + chunk.count + kChunkCost);
  const auto chunk_at = [&](std::int64_t cost) {
    return std::lower_bound(before.begin(), before.end(), cost) - before.begin();
  };
  ts::parallel_for(0, before.back(), cpu::kMultiChunk, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = chunk_at(begin), last = chunk_at(end); i < last; ++i) work(i, chunks[i]);
  });
}

Tensor multi_square_sum(Tensors tensors) {
  const std::vector<Chunk> chunks = chunks_of(tensors);
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  std::vector<double> sums(chunks.size());
  for_chunks(chunks, [&](std::int64_t i, const Chunk& c) {
    const Tensor& tensor = tensors[c.tensor];
    sums[i] = kernels.square_sum(element_of_list(tensor, c.first), dtype_of(tensor), c.count);
  });
  Tensor result = ts::empty({}, ScalarType::Double);
  *static_cast<double*>(result.data_ptr()) =
      cpu::total_of(sums.data(), static_cast<std::int64_t>(sums.size()));
  return result;
}

void multi_scale(Tensors tensors, double factor) {
  const auto by = static_cast<float>(factor);
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  for_chunks(chunks_of(tensors), [&](std::int64_t, const Chunk& c) {
    const Tensor& tensor = tensors[c.tensor];
    kernels.scale(element_of_list(tensor, c.first), dtype_of(tensor), c.count, by);
  });
}

void multi_cast_out(Tensors sources, Tensors targets, std::optional<std::int64_t> seed) {
  check_partners(sources, targets, "targets");
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  for_chunks(chunks_of(sources), [&](std::int64_t, const Chunk& c) {
    const Tensor& from = sources[c.tensor];
    const Tensor& to = targets[c.tensor];
    const cpu::Dice dice{seed.has_value(), static_cast<std::uint64_t>(seed.value_or(0)),
                         static_cast<std::int64_t>(c.tensor), c.first};
    kernels.cast(element_of_list(from, c.first), dtype_of(from), element_of_list(to, c.first),
                 dtype_of(to), c.count, dice);
  });
}

// Steps of all chunks, each of which `set_state` completes.
template <class SetState>
void run_steps(const AdamwLists& lists, const SetState& set_state) {
  const cpu::MultiKernels& kernels = cpu::active_kernels().multi;
  std::vector<cpu::AdamwStep> shared(lists.parameters.size());
  for (std::size_t t = 0; t < shared.size(); ++t) {
    cpu::AdamwStep& step = shared[t];
    step.numbers = lists.numbers(t);
    step.dice = lists.dice(t);
    step.parameter_type = dtype_of(lists.parameters[t]);
    step.gradient_type = dtype_of(lists.gradients[t]);
    if (!lists.seconds.empty()) step.second_type = dtype_of(lists.seconds[t]);
  }
  for_chunks(chunks_of(lists.parameters), [&](std::int64_t, const Chunk& c) {
    cpu::AdamwStep step = shared[c.tensor];
    step.parameter = element_of_list(lists.parameters[c.tensor], c.first);
    step.gradient = element_of_list(lists.gradients[c.tensor], c.first);
    if (!lists.seconds.empty()) {
      step.second = element_of_list(lists.seconds[c.tensor], c.first);
    }
    step.count = c.count;
    step.dice.first = c.first;
    set_state(step, c);
    kernels.adamw(step);
  });
}

void multi_adamw(Tensors parameters, Tensors gradients, Tensors averages, Tensors squares,
                 Tensors largest, Tensors seconds, double factor, double lr, double beta1,
                 double beta2, double epsilon, double weight_decay, Integers steps, Integers rows,
                 std::optional<std::int64_t> seed) {
  const AdamwLists lists{parameters, gradients, seconds,      factor, lr,   beta1,
                         beta2,      epsilon,   weight_decay, steps,  rows, seed};
  lists.check();
  lists.check_state(averages, squares, largest);
  const auto floats = [](const Tensors& list, const Chunk& c) {
    return static_cast<float*>(element_of_list(list[c.tensor], c.first));
  };
  run_steps(lists, [&](cpu::AdamwStep& step, const Chunk& c) {
    step.average = floats(averages, c);
    step.average_square = floats(squares, c);
    if (!largest.empty()) step.largest = floats(largest, c);
  });
}

void multi_adamw8(Tensors parameters, Tensors gradients, Tensors average_codes,
                  Tensors average_scales, Tensors square_codes, Tensors square_scales,
                  Tensors seconds, double factor, double lr, double beta1, double beta2,
                  double epsilon, double weight_decay, Integers steps, Integers rows,
                  std::optional<std::int64_t> seed) {
  const AdamwLists lists{parameters, gradients, seconds,      factor, lr,   beta1,
                         beta2,      epsilon,   weight_decay, steps,  rows, seed};
  lists.check();
  lists.check_bytes({&average_codes, &average_scales, &square_codes, &square_scales});
  const cpu::StateTable &averages = cpu::signed_state(), &squares = cpu::unsigned_state();
  const auto state = [](const cpu::StateTable& table, const Tensor& codes, const Tensor& scales,
                        std::int64_t first) {
    return cpu::ByteState{&table, static_cast<std::uint8_t*>(codes.data_ptr()) + first,
                          static_cast<float*>(scales.data_ptr()) + first / cpu::kStateBlock};
  };
  run_steps(lists, [&](cpu::AdamwStep& step, const Chunk& c) {
    const std::size_t t = c.tensor;
    step.average_bytes = state(averages, average_codes[t], average_scales[t], c.first);
    step.square_bytes = state(squares, square_codes[t], square_scales[t], c.first);
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
