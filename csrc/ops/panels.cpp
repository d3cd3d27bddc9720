// Products with many rows of x: the weight is decoded panel by panel for torch's own matrix
// product.
//
// Each thread decodes panels of its own and multiplies them alone. Were all threads to multiply one
// panel, most of it would have to cross from the caches of those that decoded it.
#include <array>

#include "ops/schema.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

constexpr std::int64_t kRowsTogether = 16;  // what tiles of products like to begin at

// A matrix over memory that outlives it. Threads of a parallel region know nothing of inference
// mode, in which the caller's own tensors may have been made.
Tensor matrix_at(void* data, std::array<std::int64_t, 2> size, std::array<std::int64_t, 2> stride,
                 ScalarType type) {
  return ts::from_blob(data, size, stride,
                       torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

void multiply(const Tensor& left, const Tensor& right, const Tensor& out) {
  std::array<StableIValue, 3> stack{ts::detail::from(left), ts::detail::from(right),
                                    ts::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  ts::detail::to<Tensor>(stack[0]);
}

// out = x W^T. `workspace` is [tasks, bytes]: a task's decoded panel, and its products where these
// are wider than `out`.
void panel_product_out(const Tensor& x, const Tensor& codes, const Tensor& scales,
                       std::optional<Tensor> extra, std::optional<Tensor> table,
                       std::vector<std::int64_t> spec, Tensor& workspace, Tensor& out) {
  check_matrix(x, "x");
  check_matrix(out, "out");
  const std::int64_t rows = out.size(1), count = x.size(0), cols = x.size(1);
  const StoredWeight weight(spec, codes, scales, extra, table, rows, cols);
  STD_TORCH_CHECK(weight.row_separable(), "vramkit: this weight is decoded before its product");
  STD_TORCH_CHECK(out.size(0) == count, "vramkit: x and out do not match");
  STD_TORCH_CHECK(workspace.dim() == 2 && workspace.is_contiguous() &&
                      workspace.scalar_type() == ScalarType::Byte && workspace.size(0) > 0,
                  "vramkit: the workspace must be contiguous uint8 [tasks, bytes]");
  const cpu::DType type = dtype_of(x);
  const ScalarType wide = x.scalar_type(), narrow = out.scalar_type();
  const std::int64_t size = cpu::size_of(type), out_size = cpu::size_of(dtype_of(out));
  const std::int64_t tasks = workspace.size(0), bytes = workspace.size(1);
  const std::int64_t each = (cols + (wide == narrow ? 0 : count)) * size;
  const std::int64_t step = each > 0 ? bytes / each : rows;
  STD_TORCH_CHECK(step > 0, "vramkit: the workspace holds no row of the weight");
  const cpu::Kernels& kernels = cpu::active_kernels();
  auto* memory = static_cast<char*>(workspace.data_ptr());
  auto* results = static_cast<char*>(out.data_ptr());

  auto run = [&](std::int64_t task) {
    char* panel = memory + task * bytes;
    const auto bound = [&](std::int64_t t) {
      return t == tasks ? rows : rows * t / tasks / kRowsTogether * kRowsTogether;
    };
    const std::int64_t last = bound(task + 1);
    for (std::int64_t first = bound(task); first < last; first += step) {
      const std::int64_t n = std::min(step, last - first);
      kernels.dequantize(weight.matrix(), first, first + n, panel, type, cols);
      const Tensor left = matrix_at(x.data_ptr(), {count, cols}, {x.stride(0), 1}, wide);
      const Tensor right = matrix_at(panel, {cols, n}, {1, cols}, wide);
      Tensor target = matrix_at(results + first * out_size, {count, n}, {out.stride(0), 1}, narrow);
      if (wide == narrow) {
        multiply(left, right, target);
      } else {
        const Tensor products = matrix_at(panel + step * cols * size, {count, n}, {n, 1}, wide);
        multiply(left, right, products);
        ts::copy_(target, products);
      }
    }
  };
  ts::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) run(task);
  });
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_panel_product_out", TORCH_BOX(&vramkit::ops::panel_product_out));
}
