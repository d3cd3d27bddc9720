// CUDA implementations of operators of csrc/ops/schema.hpp, on LibTorch's stable ABI: decoding, and
// encoding by casts. Loaded beside a torch that has CUDA only; loading needs neither a GPU nor a
// driver. On the current stream; nothing waits, nothing is allocated on the device.
//
// Arguments are checked and outputs allocated in Python, as for the CPU. What fails here becomes a
// RuntimeError that names the call; the error is cleared, and the process goes on.
#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/ops/common.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

const cuda::NestedMap& nested_map() {
  static const cuda::NestedMap map = [] {
    cuda::NestedMap values;
    std::copy(dynamic_map().begin(), dynamic_map().end(), values.value);
    return values;
  }();
  return map;
}

cuda::DecodeJob job_of(const cpu::Weight& weight, const float* table) {
  cuda::DecodeJob job;
  job.codes = weight.codes;
  job.scales = weight.scales;
  job.extra = weight.extra;
  job.table = table;
  job.nested_offset = weight.nested_offset;
  job.first_scale = weight.first_scale;
  job.rows = weight.at.rows;
  job.cols = weight.at.cols;
  job.row_code_bytes = weight.at.row_code_bytes;
  job.group = std::max<std::int64_t>(1, weight.at.group);
  job.groups_per_row = weight.at.groups_per_row;
  job.scale = weight.format->scale;
  return job;
}

void dequantize_out(const Tensor& codes, const Tensor& scales, std::optional<Tensor> extra,
                    std::optional<Tensor> table, std::vector<std::int64_t> spec, std::int64_t rows,
                    std::int64_t cols, std::int64_t first_row, Tensor& out) {
  check_matrix(out, "out");
  check_same_device(codes, out, "codes");
  check_same_device(scales, out, "scales");
  if (extra.has_value()) check_same_device(*extra, out, "extra");
  const std::optional<Tensor> zeros = table_for_checks(spec);
  STD_TORCH_CHECK(zeros.has_value() == table.has_value(), "vramkit: table does not match spec");
  if (table.has_value()) {
    check_same_device(*table, out, "table");
    STD_TORCH_CHECK(table->numel() == zeros->numel(), "vramkit: table has the wrong size");
  }
  const StoredWeight weight(spec, codes, scales, extra, zeros, rows, cols);
  const std::int64_t count = out.size(0);
  STD_TORCH_CHECK(out.size(1) == cols && first_row >= 0 && first_row + count <= rows,
                  "vramkit: out does not match the rows asked for");
  const ts::accelerator::DeviceGuard guard(out.get_device_index());
  void* const stream = current_stream(out);
  const float* const values = float_data(table);
  const cuda::Element element = element_of(out);
  const auto run = [&](cuda::DecodeJob job) {
    check_launch(
        cuda::launch_decode(job, codes_of(*weight.matrix().format), element, nested_map(), stream),
        "decoding");
  };
  if (weight.row_separable()) {
    cuda::DecodeJob job = job_of(weight.matrix(), values);
    job.first_row = first_row;
    job.rows = count;
    job.out = out.data_ptr();
    job.out_stride = out.stride(0);
    run(job);
    return;
  }
  STD_TORCH_CHECK(count == rows && out.is_contiguous(),
                  "vramkit: blocks that cross rows are decoded whole");
  for (const auto& [first, piece] : weight.pieces()) {
    cuda::DecodeJob job = job_of(piece, values);
    job.out = static_cast<char*>(out.data_ptr()) + first * cpu::size_of(dtype_of(out));
    job.out_stride = piece.at.cols;
    run(job);
  }
}

// Casts alone so far: formats with scales are encoded on the CPU.
void quantize_out(const Tensor& x, std::optional<Tensor> table, std::vector<std::int64_t> spec,
                  Tensor& codes, Tensor&, Tensor&) {
  check_matrix(x, "x");
  const Format format = format_of(spec, table_for_checks(spec));
  STD_TORCH_CHECK(format.family == Family::cast && !table.has_value(),
                  "vramkit: weights of this format are quantized on the CPU and then moved: "
                  "quantize(x.cpu(), …)");
  check_same_device(codes, x, "codes");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() &&
                      codes.numel() == 2 * x.numel(),
                  "vramkit: codes do not have the format's size");
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  const cuda::CastJob job{x.data_ptr(), x.size(0), x.size(1), x.stride(0),
                          static_cast<std::uint8_t*>(codes.data_ptr())};
  check_launch(cuda::launch_cast(job, element_of(x), codes_of(format), current_stream(x)),
               "a cast");
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CUDA, m) {
  m.impl("_quantize_out", TORCH_BOX(&vramkit::ops::quantize_out));
  m.impl("_dequantize_out", TORCH_BOX(&vramkit::ops::dequantize_out));
}
