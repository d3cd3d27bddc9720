// CUDA implementations of the operators over lists of tensors (csrc/cuda/multi.hpp), on LibTorch's
// stable ABI. On the current stream; nothing waits. All tensors are on one device.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "cuda/launch_multi.hpp"
#include "cuda/ops/common.hpp"
#include "ops/lists.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

void check_device(const Tensors& tensors) {
  for (const Tensor& tensor : tensors) check_same_device(tensor, tensors.front(), "a tensor");
}

std::int64_t blocks_of(std::int64_t count, std::int64_t each) { return (count + each - 1) / each; }

// Fills the slots of jobs with the tensors that have elements, launching each full job: fill(slot,
// tensor) sets what a slot has of its own. A tensor too large for a launch's grid is an error of
// the launch.
template <class Job, class Fill, class Launch>
void launch_all(Job& job, const Tensors& tensors, std::int64_t each, const Fill& fill,
                const Launch& launch) {
  std::int64_t blocks = 0;
  const auto flush = [&] {
    if (job.slots) launch(blocks);
    job.slots = 0;
    blocks = 0;
  };
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const std::int64_t count = tensors[t].numel(), needed = blocks_of(count, each);
    if (count == 0) continue;
    if (job.slots == Job::kSlots || blocks + needed > 0x7fffffff) flush();
    auto& slot = job.slot[job.slots++];
    slot = std::decay_t<decltype(slot)>();
    slot.count = count;
    slot.first_block = static_cast<std::int32_t>(blocks);
    fill(slot, t);
    blocks += needed;
  }
  flush();
}

Tensor multi_square_sum(Tensors tensors) {
  check_device(tensors);
  const auto chunks = static_cast<std::int64_t>(chunks_of(tensors).size());
  const Tensor& like = tensors.front();
  const ts::accelerator::DeviceGuard guard(like.get_device_index());
  void* const stream = current_stream(like);
  Tensor total = ts::new_empty(like, {}, ScalarType::Double);
  Tensor sums = ts::new_empty(like, {chunks}, ScalarType::Double);
  cuda::SumJob job;
  job.sums = static_cast<double*>(sums.data_ptr());
  launch_all(
      job, tensors, cpu::kMultiChunk,
      [&](cuda::SumSlot& slot, std::size_t t) {
        slot.x = tensors[t].data_ptr();
        slot.type = element_of(tensors[t]);
      },
      [&](std::int64_t blocks) {
        check_launch(cuda::launch_square_sums(job, blocks, stream), "a sum of squares");
        job.sums += blocks;
      });
  check_launch(cuda::launch_total(static_cast<const double*>(sums.data_ptr()), chunks,
                                  static_cast<double*>(total.data_ptr()), stream),
               "a sum of squares");
  return total;
}

// tensor t of `sources` to `targets`.
void copy_all(cuda::CopyJob& job, const Tensors& sources, const Tensors& targets) {
  const Tensor& like = sources.front();
  const ts::accelerator::DeviceGuard guard(like.get_device_index());
  void* const stream = current_stream(like);
  launch_all(
      job, sources, cuda::kBlockElements,
      [&](cuda::CopySlot& slot, std::size_t t) {
        slot.from = sources[t].data_ptr();
        slot.to = targets[t].data_ptr();
        slot.from_type = element_of(sources[t]);
        slot.to_type = element_of(targets[t]);
        slot.row = static_cast<std::int64_t>(t);
      },
      [&](std::int64_t blocks) {
        check_launch(cuda::launch_copies(job, blocks, stream), "copying a list");
      });
}

void multi_scale(Tensors tensors, double factor) {
  check_device(tensors);
  chunks_of(tensors);  // refuses what is not dense
  cuda::CopyJob job;
  job.factor = static_cast<float>(factor);
  copy_all(job, tensors, tensors);
}

void multi_cast_out(Tensors sources, Tensors targets, std::optional<std::int64_t> seed) {
  check_partners(sources, targets, "targets");
  check_device(sources);
  chunks_of(sources);
  cuda::CopyJob job;
  job.random = seed.has_value();
  job.seed = static_cast<std::uint64_t>(seed.value_or(0));
  copy_all(job, sources, targets);
}

// Steps of all parameters; set_state(slot, tensor) gives the slots their state.
template <class Job, class SetState, class Launch>
void run_steps(const AdamwLists& lists, const SetState& set_state, const Launch& launch) {
  check_device(lists.parameters);
  chunks_of(lists.parameters);
  if (lists.parameters.empty()) return;
  const Tensor& like = lists.parameters.front();
  const ts::accelerator::DeviceGuard guard(like.get_device_index());
  void* const stream = current_stream(like);
  Job job;
  job.numbers = lists.numbers(0);
  job.random = lists.seed.has_value();
  job.seed = static_cast<std::uint64_t>(lists.seed.value_or(0));
  launch_all(
      job, lists.parameters, cuda::kBlockElements,
      [&](cuda::StepSlot& slot, std::size_t t) {
        const cpu::AdamwNumbers numbers = lists.numbers(t);
        slot.step_size = numbers.step_size;
        slot.root_correction = numbers.root_correction;
        slot.row = job.random ? lists.rows[t] : 0;
        slot.parameter = lists.parameters[t].data_ptr();
        slot.parameter_type = element_of(lists.parameters[t]);
        slot.gradient = lists.gradients[t].data_ptr();
        slot.gradient_type = element_of(lists.gradients[t]);
        if (!lists.seconds.empty()) {
          slot.second = lists.seconds[t].data_ptr();
          slot.second_type = element_of(lists.seconds[t]);
        }
        set_state(slot, t);
      },
      [&](std::int64_t blocks) { check_launch(launch(job, blocks, stream), "a step of AdamW"); });
}

void multi_adamw(Tensors parameters, Tensors gradients, Tensors averages, Tensors squares,
                 Tensors largest, Tensors seconds, double factor, double lr, double beta1,
                 double beta2, double epsilon, double weight_decay, Integers steps, Integers rows,
                 std::optional<std::int64_t> seed) {
  const AdamwLists lists{parameters, gradients, seconds,      factor, lr,   beta1,
                         beta2,      epsilon,   weight_decay, steps,  rows, seed};
  lists.check();
  lists.check_state(averages, squares, largest);
  run_steps<cuda::FloatStepJob>(
      lists,
      [&](cuda::StepSlot& slot, std::size_t t) {
        slot.state[0] = averages[t].data_ptr();
        slot.state[1] = squares[t].data_ptr();
        if (!largest.empty()) slot.state[2] = largest[t].data_ptr();
      },
      [](const cuda::FloatStepJob& job, std::int64_t blocks, void* stream) {
        return cuda::launch_steps(job, blocks, stream);
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
  cuda::StateMaps maps;
  std::copy_n(cpu::signed_state().values, 256, maps.value[0]);
  std::copy_n(cpu::unsigned_state().values, 256, maps.value[1]);
  const Tensors* const state[] = {&average_codes, &average_scales, &square_codes, &square_scales};
  run_steps<cuda::ByteStepJob>(
      lists,
      [&](cuda::StepSlot& slot, std::size_t t) {
        for (int k = 0; k < 4; ++k) slot.state[k] = (*state[k])[t].data_ptr();
      },
      [&](const cuda::ByteStepJob& job, std::int64_t blocks, void* stream) {
        return cuda::launch_steps(job, maps, blocks, stream);
      });
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CUDA, m) {
  m.impl("_multi_square_sum", TORCH_BOX(&vramkit::ops::multi_square_sum));
  m.impl("_multi_scale_", TORCH_BOX(&vramkit::ops::multi_scale));
  m.impl("_multi_cast_out", TORCH_BOX(&vramkit::ops::multi_cast_out));
  m.impl("_multi_adamw_", TORCH_BOX(&vramkit::ops::multi_adamw));
  m.impl("_multi_adamw8_", TORCH_BOX(&vramkit::ops::multi_adamw8));
}
