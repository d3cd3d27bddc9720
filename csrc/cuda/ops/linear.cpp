// Products with stored weights on CUDA (csrc/cuda/products.hpp), as python/vramkit/_routes.py asks
// for them. On the current stream; nothing waits and nothing is allocated: the workspace comes from
// the caller.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/ops/common.hpp"
#include "cuda/products.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

cuda::NestedMap nested_values() {
  cuda::NestedMap map;
  std::copy(dynamic_map().begin(), dynamic_map().end(), map.value);
  return map;
}

// What the kernels have room for: their indices of rows, columns and splits are ints.
constexpr std::int64_t kMostRows = 1 << 20;

void linear_packed_out(const Tensor& x, const Tensor& codes, const Tensor& scales,
                       std::optional<Tensor> extra, std::optional<Tensor> table,
                       std::optional<Tensor> bias, std::vector<std::int64_t> spec,
                       std::vector<std::int64_t> shape, Tensor& workspace, Tensor& out) {
  check_matrix(x, "x");
  check_matrix(out, "out");
  check_same_device(x, out, "x");
  check_same_device(codes, out, "codes");
  check_same_device(scales, out, "scales");
  check_same_device(workspace, out, "workspace");
  if (extra.has_value()) check_same_device(*extra, out, "extra");
  const std::optional<Tensor> zeros = table_for_checks(spec);
  STD_TORCH_CHECK(zeros.has_value() == table.has_value(), "vramkit: table does not match spec");
  if (table.has_value()) {
    check_same_device(*table, out, "table");
    STD_TORCH_CHECK(table->numel() == zeros->numel(), "vramkit: table has the wrong size");
  }
  const std::int64_t rows = x.size(0), cols = x.size(1), features = out.size(1);
  STD_TORCH_CHECK(out.size(0) == rows && out.scalar_type() == x.scalar_type(),
                  "vramkit: out must have x's rows and dtype");
  if (bias.has_value()) {
    check_same_device(*bias, out, "bias");
    STD_TORCH_CHECK(bias->numel() == features, "vramkit: bias must have one element a feature");
  }
  STD_TORCH_CHECK(shape.size() == 3 && (shape[0] == 0 || shape[0] == 1) && shape[1] > 0 &&
                      shape[1] <= cuda::kFewWarps && shape[2] > 0 && shape[2] <= 1024,
                  "vramkit: shape is [kernel, warps, splits]");
  STD_TORCH_CHECK(rows <= kMostRows, "vramkit: the packed product takes ", kMostRows,
                  " rows at most");
  const StoredWeight weight(spec, codes, scales, extra, zeros, features, cols);
  STD_TORCH_CHECK(weight.row_separable(),
                  "vramkit: blocks cross rows of this weight: decode it first");
  if (rows == 0 || features == 0) return;
  const cpu::Weight& stored = weight.matrix();
  const bool few = shape[0] == 0;
  const std::int64_t grain = few ? cuda::kFewSpan : 16;
  STD_TORCH_CHECK(stored.at.groups_per_row <= 1 || stored.at.group % grain == 0,
                  "vramkit: groups of ", stored.at.group,
                  " elements: this kernel takes multiples of ", grain);

  cuda::ProductJob job;
  job.weight.codes = stored.codes;
  job.weight.scales = stored.scales;
  job.weight.extra = stored.extra;
  job.weight.table = float_data(table);
  job.weight.nested_offset = stored.nested_offset;
  job.weight.rows = features;
  job.weight.cols = cols;
  job.weight.row_code_bytes = stored.at.row_code_bytes;
  job.weight.group = std::max<std::int64_t>(1, stored.at.group);
  job.weight.groups_per_row = stored.at.groups_per_row;
  job.weight.scale = stored.format->scale;
  job.rows = static_cast<int>(rows);
  job.bias = float_data(bias);
  job.out = out.data_ptr();
  job.element = element_of(out);
  job.out_stride = out.stride(0);
  job.splits = static_cast<int>(shape[2]);

  const bool split = job.element == cuda::Element::f32;
  const std::int64_t partial = job.splits > 1 ? 4 * job.splits * rows * features : 0;
  const std::int64_t split_stride = (cols + 7) / 8 * 8;
  const std::int64_t parts = split ? 2 * cuda::kSplitParts * rows * split_stride : 0;
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.is_contiguous() &&
                      workspace.numel() >= partial + parts,
                  "vramkit: the workspace has ", workspace.numel(), " bytes of ", partial + parts);
  auto* const room = static_cast<std::uint8_t*>(workspace.data_ptr());
  const ts::accelerator::DeviceGuard guard(out.get_device_index());
  void* const stream = current_stream(out);
  auto operand = cuda::Operand::split;
  if (split) {  // first, where torch's allocations are aligned best
    cuda::SplitJob job_x;
    job_x.x = static_cast<const float*>(x.data_ptr());
    job_x.stride = x.stride(0);
    job_x.rows = rows;
    job_x.cols = cols;
    job_x.out = reinterpret_cast<std::uint16_t*>(room);
    job_x.out_stride = split_stride;
    check_launch(cuda::launch_split(job_x, stream), "splitting x");
    job.x = job_x.out;
    job.x_stride = split_stride;
    job.parts = cuda::kSplitParts;
  } else {
    operand = job.element == cuda::Element::bf16 ? cuda::Operand::bf16 : cuda::Operand::f16;
    job.x = static_cast<const std::uint16_t*>(x.data_ptr());
    job.x_stride = x.stride(0);
  }
  if (partial != 0) job.partial = reinterpret_cast<float*>(room + parts);
  static const cuda::NestedMap nested = nested_values();
  const cuda::Codes kind = codes_of(*stored.format);
  const int status =
      few ? cuda::launch_few(job, kind, operand, nested, static_cast<int>(shape[1]), stream)
          : cuda::launch_tiles(job, kind, operand, nested, stream);
  check_launch(status, "a product");
  if (partial != 0) check_launch(cuda::launch_reduce(job, stream), "a sum of splits");
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CUDA, m) {
  m.impl("_linear_packed_out", TORCH_BOX(&vramkit::ops::linear_packed_out));
}
