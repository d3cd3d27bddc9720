// CUDA implementations of the operators of dynamic INT8 and LLM.int8 (schemas in
// csrc/ops/schema.hpp; python/vramkit/_operators_int8.py checks arguments, allocates, and leaves
// many rows to torch's own product of the codes). On the current stream; nothing waits and nothing
// is allocated.
#include "cuda/ops/int8.hpp"

#include "cpu/int8.hpp"

namespace vramkit::ops {

namespace ts = torch::stable;

DeviceInt8::DeviceInt8(const Tensor& code_bytes, const Tensor& scale_bytes,
                       const std::optional<Tensor>& added, std::int64_t row_count,
                       std::int64_t col_count, const Tensor& like)
    : rows(row_count), cols(col_count) {
  STD_TORCH_CHECK(cols <= cpu::kInt8Longest, "vramkit: rows are too long for int32 sums");
  check_same_device(code_bytes, like, "codes");
  check_same_device(scale_bytes, like, "scales");
  STD_TORCH_CHECK(code_bytes.scalar_type() == ScalarType::Byte && code_bytes.is_contiguous() &&
                      code_bytes.numel() == rows * cols &&
                      scale_bytes.scalar_type() == ScalarType::Byte &&
                      scale_bytes.is_contiguous() && scale_bytes.numel() == rows * 4,
                  "vramkit: codes and scales do not have the size of an int8 weight");
  if (added.has_value()) {
    check_same_device(*added, like, "bias");
    STD_TORCH_CHECK(added->numel() == rows && added->is_contiguous(),
                    "vramkit: bias does not match");
    dtype_of(*added);
    bias = added->data_ptr();
    bias_type = element_of(*added);
  }
  codes = static_cast<const std::int8_t*>(code_bytes.data_ptr());
  scales = static_cast<const std::uint8_t*>(scale_bytes.data_ptr());
}

void check_rows(const Tensor& tensor, ScalarType type, const Tensor& like, const char* name) {
  check_same_device(tensor, like, name);
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1) &&
                      tensor.scalar_type() == type,
                  "vramkit: ", name, " must be 2-D of its type with consecutive elements in a row");
}

void check_workspace(const Tensor& workspace, std::int64_t bytes, const Tensor& like) {
  check_same_device(workspace, like, "workspace");
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.is_contiguous() &&
                      workspace.numel() >= bytes &&
                      reinterpret_cast<std::uintptr_t>(workspace.data_ptr()) % 16 == 0,
                  "vramkit: the workspace is too small, or not aligned to 16 bytes");
}

void round_rows(const FloatRows& x, double threshold, const RoundedRows& to, void* stream) {
  cuda::int8::RowsJob job;
  job.x = x.data;
  job.rows = x.rows;
  job.cols = x.cols;
  job.stride = x.stride;
  job.threshold = static_cast<float>(threshold);
  job.codes = to.codes;
  job.code_stride = to.stride;
  job.absmax = to.absmax;
  job.columns = to.columns;
  check_launch(cuda::launch_round_rows(job, x.type, to.list, to.count, stream),
               "rounding rows to int8");
}

cuda::int8::ProductJob product_job(const FloatRows& x, const RoundedRows& rounded,
                                   const DeviceInt8& weight) {
  cuda::int8::ProductJob job;
  job.from.x = rounded.codes;
  job.from.rows = x.rows;
  job.from.x_cols = job.from.x_stride = rounded.stride;
  job.from.weight = weight.codes;
  job.from.weight_rows = weight.rows;
  job.from.cols = job.from.weight_stride = weight.cols;
  job.to.absmax = rounded.absmax;
  job.to.scales = weight.scales;
  job.to.bias = weight.bias;
  job.to.bias_type = weight.bias_type;
  job.to.values = x.data;
  job.to.values_stride = x.stride;
  job.to.weight = weight.codes;
  job.to.weight_stride = weight.cols;
  job.to.outliers = rounded.list;
  job.to.outlier_count = rounded.count;
  job.to.type = x.type;
  return job;
}

namespace {

FloatRows rows_of(const Tensor& x) {
  dtype_of(x);  // refuses what is no float of ours
  check_rows(x, x.scalar_type(), x, "x");
  return {x.data_ptr(), element_of(x), x.size(0), x.size(1), x.stride(0)};
}

cpu::Activation activation_of(std::int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index <= 3, "vramkit: no such activation");
  return static_cast<cpu::Activation>(index);
}

void linear_int8_out(const Tensor& x, const Tensor& codes, const Tensor& scales,
                     std::optional<Tensor> bias, double threshold, std::int64_t activation,
                     Tensor& workspace, Tensor& out) {
  const FloatRows rows = rows_of(x);
  check_rows(out, x.scalar_type(), x, "out");
  STD_TORCH_CHECK(out.size(0) == rows.rows, "vramkit: x and out do not match");
  const DeviceInt8 weight(codes, scales, bias, out.size(1), rows.cols, x);
  const bool outliers = threshold > 0.0;
  const cpu::Activation activate = activation_of(activation);
  check_workspace(workspace, RoundedRows::bytes(rows.rows, rows.cols, outliers), x);
  if (!rows.rows || !weight.rows) return;
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  void* const stream = current_stream(x);
  const RoundedRows rounded(workspace.data_ptr(), rows.rows, rows.cols, outliers);
  round_rows(rows, threshold, rounded, stream);
  cuda::int8::ProductJob job = product_job(rows, rounded, weight);
  job.to.activation = activate;
  job.to.out = out.data_ptr();
  job.to.out_stride = out.stride(0);
  check_launch(cuda::launch_product(job, stream), "an int8 product");
}

void round_int8_out(const Tensor& x, double threshold, Tensor& workspace) {
  const FloatRows rows = rows_of(x);
  const bool outliers = threshold > 0.0;
  check_workspace(workspace, RoundedRows::bytes(rows.rows, rows.cols, outliers), x);
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  round_rows(rows, threshold, RoundedRows(workspace.data_ptr(), rows.rows, rows.cols, outliers),
             current_stream(x));
}

void scale_int8_out(const Tensor& sums, const Tensor& x, std::int64_t first, const Tensor& codes,
                    const Tensor& scales, std::optional<Tensor> bias, double threshold,
                    std::int64_t activation, const Tensor& workspace, Tensor& out) {
  const FloatRows rows = rows_of(x);
  check_rows(out, x.scalar_type(), x, "out");
  check_rows(sums, ScalarType::Int, x, "sums");
  const bool outliers = threshold > 0.0;
  check_workspace(workspace, RoundedRows::bytes(rows.rows, rows.cols, outliers), x);
  STD_TORCH_CHECK(out.size(0) == rows.rows && sums.is_contiguous() && sums.size(1) == out.size(1) &&
                      sums.size(1) % 2 == 0 && first >= 0 && first + sums.size(0) <= rows.rows,
                  "vramkit: sums, x and out do not match");
  const DeviceInt8 weight(codes, scales, bias, out.size(1), rows.cols, x);
  const RoundedRows rounded(workspace.data_ptr(), rows.rows, rows.cols, outliers);
  cuda::int8::ScaleJob job;
  job.sums = static_cast<const std::int32_t*>(sums.data_ptr());
  job.rows = sums.size(0);
  job.cols = sums.size(1);
  job.first_row = first;
  job.to = product_job(rows, rounded, weight).to;
  job.to.activation = activation_of(activation);
  job.to.out = out.data_ptr();
  job.to.out_stride = out.stride(0);
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(cuda::launch_scale(job, current_stream(x)), "scaling an int8 product");
}

void quantize_rows_out(const Tensor& x, double threshold, Tensor& codes, Tensor& absmax,
                       Tensor& columns) {
  const FloatRows rows = rows_of(x);
  for (const Tensor* tensor : {&codes, &absmax, &columns}) {
    check_same_device(*tensor, x, "codes, absmax or columns");
  }
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.is_contiguous() &&
                      codes.numel() == rows.rows * rows.cols &&
                      absmax.scalar_type() == ScalarType::Float && absmax.is_contiguous() &&
                      absmax.numel() == rows.rows && columns.scalar_type() == ScalarType::Byte &&
                      columns.is_contiguous() && columns.numel() == rows.cols,
                  "vramkit: codes, absmax or columns do not match x");
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  cuda::int8::RowsJob job;
  job.x = rows.data;
  job.rows = rows.rows;
  job.cols = job.code_stride = rows.cols;
  job.stride = rows.stride;
  job.threshold = static_cast<float>(threshold);
  job.codes = static_cast<std::int8_t*>(codes.data_ptr());
  job.absmax = static_cast<float*>(absmax.data_ptr());
  job.columns = static_cast<std::uint8_t*>(columns.data_ptr());
  check_launch(cuda::launch_round_rows(job, rows.type, nullptr, nullptr, current_stream(x)),
               "rounding rows to int8");
}

void int8_mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  check_rows(a, ScalarType::Char, a, "a");
  check_rows(b, ScalarType::Char, a, "b");
  check_rows(out, ScalarType::Int, a, "out");
  const std::int64_t rows = a.size(0), cols = a.size(1), weight_rows = b.size(0);
  STD_TORCH_CHECK(b.size(1) == cols && out.size(0) == rows && out.size(1) == weight_rows &&
                      cols < cpu::kInt8Longest,
                  "vramkit: a, b and out do not match, or rows are too long for int32 sums");
  cuda::int8::ProductJob job;
  job.from.x = static_cast<const std::int8_t*>(a.data_ptr());
  job.from.rows = rows;
  job.from.x_cols = job.from.cols = cols;
  job.from.x_stride = a.stride(0);
  job.from.weight = static_cast<const std::int8_t*>(b.data_ptr());
  job.from.weight_rows = weight_rows;
  job.from.weight_stride = b.stride(0);
  job.to.exact = true;
  job.to.out = out.data_ptr();
  job.to.out_stride = out.stride(0);
  const ts::accelerator::DeviceGuard guard(a.get_device_index());
  check_launch(cuda::launch_product(job, current_stream(a)), "an int8 product");
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CUDA, m) {
  m.impl("_linear_int8_out", TORCH_BOX(&vramkit::ops::linear_int8_out));
  m.impl("_round_int8_out", TORCH_BOX(&vramkit::ops::round_int8_out));
  m.impl("_scale_int8_out", TORCH_BOX(&vramkit::ops::scale_int8_out));
  m.impl("_quantize_rows_out", TORCH_BOX(&vramkit::ops::quantize_rows_out));
  m.impl("_int8_mm_out", TORCH_BOX(&vramkit::ops::int8_mm_out));
}
