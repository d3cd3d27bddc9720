// One direction of one recurrent layer with int8 weights and quantized inputs and states (schema in
// schema.hpp; python/vramkit/_recurrent.py checks arguments and allocates).
//
// All time steps of x are multiplied at once. Then each step quantizes the state, and a task
// multiplies it for the gates of its units and goes on to their new state, while the sums are in
// its cache.
#include "cpu/recurrent.hpp"

#include <algorithm>

#include "ops/int8.hpp"
#include "ops/steps.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

constexpr std::int64_t kUnits = cpu::kInt8ChunkCols;  // that a task takes at least
// Few rows take more units at a time, so that each gate's weight is read in long runs: as many sums
// as this many rows of kUnits are.
constexpr std::int64_t kRowsAtOnce = 16;

std::int64_t aligned(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Sizes {
  std::int64_t rows, features, batch, units, state, gates;  // `state`: projected, or the units
  bool outliers;

  // Where the parts of the workspace begin, in bytes.
  std::int64_t from_h() const { return aligned(rows * gates * units * 4); }
  std::int64_t full() const { return from_h() + aligned(batch * gates * units * 4); }
  std::int64_t quantized() const {
    return full() + (state < units || outliers ? aligned(batch * units * 4) : 0);
  }
  std::int64_t bytes() const {
    return quantized() + std::max(int8_workspace(rows, features, outliers),
                                  int8_workspace(batch, std::max(units, state), outliers));
  }
};

void check_floats(const Tensor& tensor, std::int64_t rows, std::int64_t cols, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                      tensor.size(0) == rows && tensor.size(1) == cols &&
                      (cols <= 1 || tensor.stride(1) == 1),
                  "vramkit: ", name, " must be float32 [", rows, ", ", cols,
                  "] with consecutive elements in a row");
}

void recurrent_int8_out(const Tensor& x, std::optional<Tensor> steps, const Tensor& ih_codes,
                        const Tensor& ih_scales, const Tensor& hh_codes, const Tensor& hh_scales,
                        std::optional<Tensor> hr_codes, std::optional<Tensor> hr_scales,
                        std::optional<Tensor> ih_bias, std::optional<Tensor> hh_bias,
                        std::int64_t mode, double threshold, bool reverse, Tensor& h, Tensor& c,
                        Tensor& workspace, Tensor& out) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 3, "vramkit: no such recurrence");
  STD_TORCH_CHECK(x.dim() == 2 && h.dim() == 2 && ih_codes.dim() == 2,
                  "vramkit: x, states and codes must be matrices");
  const auto kind = static_cast<cpu::Recurrence>(mode);
  const std::int64_t gates = cpu::gates_of(kind);
  const Sizes size{x.size(0), x.size(1), h.size(0),      ih_codes.size(0) / gates,
                   h.size(1), gates,     threshold > 0.0};
  check_floats(x, size.rows, size.features, "x");
  check_floats(h, size.batch, size.state, "the state");
  check_floats(out, size.rows, size.state, "out");
  STD_TORCH_CHECK(h.is_contiguous(), "vramkit: the state must be contiguous");
  const Int8Weight from_x(ih_codes, ih_scales, ih_bias, gates * size.units, size.features);
  const Int8Weight from_h(hh_codes, hh_scales, hh_bias, gates * size.units, size.state);
  const bool projects = hr_codes.has_value() && hr_scales.has_value();
  STD_TORCH_CHECK(projects || size.state == size.units, "vramkit: the state must have all units");
  STD_TORCH_CHECK(!projects || size.state <= size.units,
                  "vramkit: a projected state must be narrower than the units");
  const std::optional<Int8Weight> project =
      projects ? std::optional<Int8Weight>(std::in_place, *hr_codes, *hr_scales, std::nullopt,
                                           size.state, size.units)
               : std::nullopt;
  const bool has_cell = kind == cpu::Recurrence::lstm;
  if (has_cell) {
    check_floats(c, size.batch, size.units, "the cell state");
    STD_TORCH_CHECK(c.is_contiguous(), "vramkit: the cell state must be contiguous");
  }
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.is_contiguous() &&
                      workspace.numel() >= size.bytes(),
                  "vramkit: the workspace is too small");
  const std::vector<std::int64_t> sizes = step_sizes(steps, size.rows, size.batch);
  if (!size.rows || !size.units) return;

  auto* memory = static_cast<std::uint8_t*>(workspace.data_ptr());
  auto* x_gates = reinterpret_cast<float*>(memory);
  auto* h_gates = reinterpret_cast<float*>(memory + size.from_h());
  auto* full = reinterpret_cast<float*>(memory + size.full());
  std::uint8_t* rows_memory = memory + size.quantized();
  const std::int64_t width = gates * size.units;
  const auto limit = static_cast<float>(threshold);
  std::vector<std::int64_t> outliers;
  cpu::Int8Product job = quantized_product(
      {x.data_ptr(), cpu::DType::f32, size.rows, size.features, x.stride(0), limit}, from_x,
      rows_memory, outliers);
  job.out = x_gates;
  job.out_stride = width;
  run_product(job, size.rows, width);

  const cpu::Kernels& kernels = cpu::active_kernels();
  auto* state = static_cast<float*>(h.data_ptr());
  cpu::RecurrentStep step{};
  step.kind = kind;
  step.units = size.units;
  step.from_h = h_gates;
  step.x_stride = step.h_stride = width;
  step.cell = has_cell ? static_cast<float*>(c.data_ptr()) : nullptr;
  step.before = state;
  step.after = projects ? full : state;
  step.before_stride = size.state;
  step.after_stride = size.units;
  step.out_stride = out.stride(0);
  const auto count = static_cast<std::int64_t>(sizes.size());
  std::int64_t row = reverse ? size.rows : 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t batch = sizes[static_cast<std::size_t>(reverse ? count - 1 - i : i)];
    if (reverse) row -= batch;
    auto* target = static_cast<float*>(out.data_ptr()) + row * step.out_stride;
    job = quantized_product({state, cpu::DType::f32, batch, size.state, size.state, limit}, from_h,
                            rows_memory, outliers);
    if (job.outlier_count && !projects) {
      // Units that are done are replaced while others still multiply the outlier columns.
      std::copy_n(state, batch * size.state, full);
      job.values = full;
    }
    job.out = h_gates;
    job.out_stride = width;
    step.from_x = x_gates + row * width;
    step.out = projects ? nullptr : target;
    const std::int64_t chunks = (size.units + kUnits - 1) / kUnits;
    const std::int64_t grain = product_grain(batch, gates * kUnits, size.state);
    ts::parallel_for(0, chunks, grain, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t each =
          kUnits * std::max<std::int64_t>(1, kRowsAtOnce / std::max<std::int64_t>(1, batch));
      const std::int64_t stop = std::min(end * kUnits, size.units);
      for (std::int64_t first = begin * kUnits; first < stop; first += each) {
        const std::int64_t last = std::min(first + each, stop);
        for (std::int64_t gate = 0; gate < gates; ++gate) {
          kernels.int8.product(job, 0, batch, gate * size.units + first, gate * size.units + last);
        }
        kernels.recur(step, batch, first, last);
      }
    });
    if (projects) {
      job = quantized_product({full, cpu::DType::f32, batch, size.units, size.units, limit},
                              *project, rows_memory, outliers);
      job.out = state;
      job.out_stride = size.state;
      run_product(job, batch, size.state);
      for (std::int64_t r = 0; r < batch; ++r) {
        std::copy_n(state + r * size.state, size.state, target + r * step.out_stride);
      }
    }
    if (!reverse) row += batch;
  }
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_recurrent_int8_out", TORCH_BOX(&vramkit::ops::recurrent_int8_out));
}
