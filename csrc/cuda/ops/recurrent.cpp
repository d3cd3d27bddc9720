// One direction of one recurrent layer on CUDA, from what x gives for its gates (schema in
// csrc/ops/schema.hpp; python/vramkit/_recurrent.py multiplies x and allocates).
//
// A step is two kernels: the states' rows are rounded, then multiplied and turned into new states.
// A projection is two more. The host only launches, so that a sequence can be captured in a graph.
#include "cuda/ops/int8.hpp"
#include "ops/steps.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

void check_floats(const Tensor& tensor, std::int64_t rows, std::int64_t cols, const Tensor& like,
                  const char* name) {
  check_same_device(tensor, like, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                      tensor.size(0) == rows && tensor.size(1) == cols &&
                      (cols <= 1 || tensor.stride(1) == 1),
                  "vramkit: ", name, " must be float32 [", rows, ", ", cols,
                  "] with consecutive elements in a row");
}

void recurrent_int8_steps_out(const Tensor& from_x, std::optional<Tensor> steps,
                              const Tensor& hh_codes, const Tensor& hh_scales,
                              std::optional<Tensor> hr_codes, std::optional<Tensor> hr_scales,
                              std::optional<Tensor> hh_bias, std::int64_t mode, double threshold,
                              bool reverse, Tensor& h, Tensor& c, Tensor& workspace, Tensor& out) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 3, "vramkit: no such recurrence");
  STD_TORCH_CHECK(from_x.dim() == 2 && h.dim() == 2 && hh_codes.dim() == 2,
                  "vramkit: x, states and codes must be matrices");
  STD_TORCH_CHECK(!steps.has_value() || steps->is_cpu(),
                  "vramkit: sizes of steps must be in the host's memory");
  const auto kind = static_cast<cpu::Recurrence>(mode);
  const std::int64_t gates = cpu::gates_of(kind), width = hh_codes.size(0), units = width / gates;
  const std::int64_t rows = from_x.size(0), batch = h.size(0), state = h.size(1);
  check_floats(from_x, rows, width, from_x, "what x gives");
  check_floats(h, batch, state, from_x, "the state");
  check_floats(out, rows, state, from_x, "out");
  STD_TORCH_CHECK(width == units * gates && h.is_contiguous(),
                  "vramkit: the state must be contiguous, and codes have rows for every gate");
  const DeviceInt8 from_h(hh_codes, hh_scales, hh_bias, width, state, from_x);
  const bool projects = hr_codes.has_value() && hr_scales.has_value();
  STD_TORCH_CHECK(projects ? state <= units : state == units,
                  "vramkit: the state must have all units, or be projected to fewer");
  std::optional<DeviceInt8> project;
  if (projects) project.emplace(*hr_codes, *hr_scales, std::nullopt, state, units, from_x);
  const bool has_cell = kind == cpu::Recurrence::lstm, outliers = threshold > 0.0;
  if (has_cell) {
    check_floats(c, batch, units, from_x, "the cell state");
    STD_TORCH_CHECK(c.is_contiguous(), "vramkit: the cell state must be contiguous");
  }
  const std::int64_t full_bytes = projects || outliers ? up16(batch * units * 4) : 0;
  const std::int64_t widest = projects ? units : state;
  check_workspace(workspace, full_bytes + RoundedRows::bytes(batch, widest, outliers), from_x);
  const std::vector<std::int64_t> sizes = step_sizes(steps, rows, batch);
  if (!rows || !units) return;

  const ts::accelerator::DeviceGuard guard(from_x.get_device_index());
  void* const stream = current_stream(from_x);
  auto* memory = static_cast<std::uint8_t*>(workspace.data_ptr());
  auto* full = reinterpret_cast<float*>(memory);
  void* const rounded_memory = memory + full_bytes;
  auto* now = static_cast<float*>(h.data_ptr());
  cuda::int8::StepJob job;
  job.step.kind = kind;
  job.step.units = units;
  job.step.x_stride = from_x.stride(0);
  job.step.cell = has_cell ? static_cast<float*>(c.data_ptr()) : nullptr;
  job.step.before = now;
  job.step.before_stride = state;
  job.step.after = projects ? full : now;
  job.step.after_stride = units;
  job.step.out_stride = out.stride(0);
  const auto count = static_cast<std::int64_t>(sizes.size());
  std::int64_t row = reverse ? rows : 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t size = sizes[static_cast<std::size_t>(reverse ? count - 1 - i : i)];
    if (reverse) row -= size;
    if (!size) continue;
    auto* target = static_cast<float*>(out.data_ptr()) + row * job.step.out_stride;
    FloatRows states{now, cuda::Element::f32, size, state, state};
    const RoundedRows rounded(rounded_memory, size, state, outliers);
    round_rows(states, threshold, rounded, stream);
    if (outliers && !projects) {
      // Units that are done are replaced while others still multiply the outlier columns.
      check_launch(cuda::launch_copy(full, now, size * state * 4, stream), "copying states");
      states.data = full;
    }
    const cuda::int8::ProductJob product = product_job(states, rounded, from_h);
    job.from = product.from;
    job.h = product.to;
    job.step.from_x = static_cast<const float*>(from_x.data_ptr()) + row * job.step.x_stride;
    job.step.out = projects ? nullptr : target;
    check_launch(cuda::launch_step(job, stream), "a recurrent step");
    if (projects) {
      const FloatRows made{full, cuda::Element::f32, size, units, units};
      const RoundedRows wide(rounded_memory, size, units, outliers);
      round_rows(made, threshold, wide, stream);
      cuda::int8::ProductJob narrow = product_job(made, wide, *project);
      narrow.to.out = now;
      narrow.to.out_stride = state;
      narrow.to.again = target;
      narrow.to.again_stride = job.step.out_stride;
      check_launch(cuda::launch_product(narrow, stream), "a projection");
    }
    if (!reverse) row += size;
  }
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CUDA, m) {
  m.impl("_recurrent_int8_steps_out", TORCH_BOX(&vramkit::ops::recurrent_int8_steps_out));
}
