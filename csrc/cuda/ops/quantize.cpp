// Encoding on CUDA: operators of csrc/ops/schema.hpp that write stored weights, on LibTorch's
// stable ABI. As decode.cpp says; a codebook is sorted on the device, into 1280 bytes of torch's
// memory, before its first use.
#include <optional>
#include <vector>

#include "cpu/stochastic.hpp"
#include "cuda/launch_quantize.hpp"
#include "cuda/ops/common.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

cuda::Coder coder_of(const Format& format) {
  switch (format.encoder) {
    case Encoder::midpoint:
      return format.bits == 4 ? cuda::Coder::table4 : cuda::Coder::table8;
    case Encoder::e4m3:
      return cuda::Coder::e4m3;
    case Encoder::e5m2:
      return cuda::Coder::e5m2;
    default:
      return cuda::Coder::integer8;
  }
}

Tensor sorted_workspace(const Tensor& x) {
  return ts::new_empty(x, {static_cast<std::int64_t>(sizeof(cuda::SortedCodes))}, ScalarType::Byte);
}

cuda::SortedCodes* sorted_in(const Tensor& workspace) {
  return static_cast<cuda::SortedCodes*>(workspace.data_ptr());
}

std::uint8_t* bytes_of(const Tensor& part, const Tensor& x, std::int64_t size, const char* name) {
  check_same_device(part, x, name);
  STD_TORCH_CHECK(
      part.scalar_type() == ScalarType::Byte && part.is_contiguous() && part.numel() == size,
      "vramkit: ", name, " do not have the format's size");
  return static_cast<std::uint8_t*>(part.data_ptr());
}

// x and where its rows go, as far as the sizes tell.
cuda::QuantizeJob job_of(const Format& format, const Tensor& x) {
  cuda::QuantizeJob job;
  job.x = x.data_ptr();
  job.rows = x.size(0);
  job.cols = x.size(1);
  job.stride = x.stride(0);
  job.coder = coder_of(format);
  job.searched = format.encoder == Encoder::searched;
  job.zero_point = format.zero_point;
  if (format.row_separable(job.cols)) {
    const Layout at = format.layout(job.rows, job.cols);
    job.group = at.group;
    job.groups_per_row = at.groups_per_row;
    job.row_code_bytes = at.row_code_bytes;
    return job;
  }
  STD_TORCH_CHECK(x.is_contiguous(), "vramkit: x must be contiguous where blocks cross rows");
  job.cols = job.stride = job.rows * job.cols;
  job.rows = 1;
  job.group = format.block;
  job.groups_per_row = (job.cols + job.group - 1) / job.group;
  job.row_code_bytes = (job.cols * format.bits + 7) / 8;
  return job;
}

void quantize_out(const Tensor& x, std::optional<Tensor> table, std::vector<std::int64_t> spec,
                  Tensor& codes, Tensor& scales, Tensor& extra) {
  check_matrix(x, "x");
  const std::optional<Tensor> zeros = table_for_checks(spec);
  const Format format = format_of(spec, zeros);
  STD_TORCH_CHECK(format.scale != ScaleType::nested,
                  "vramkit: nested scales are quantized by a second call");
  STD_TORCH_CHECK(zeros.has_value() == table.has_value() &&
                      (!zeros.has_value() || table->numel() == zeros->numel()),
                  "vramkit: table does not match spec");
  const std::int64_t shape[] = {x.size(0), x.size(1)};
  const PartBytes size = format.bytes(shape);
  std::uint8_t* const to = bytes_of(codes, x, size.codes, "codes");
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  void* const stream = current_stream(x);
  if (format.family == Family::cast) {
    const cuda::CastJob job{x.data_ptr(), x.size(0), x.size(1), x.stride(0), to};
    check_launch(cuda::launch_cast(job, element_of(x), codes_of(format), stream), "a cast");
    return;
  }
  cuda::QuantizeJob job = job_of(format, x);
  job.codes = to;
  job.scales = bytes_of(scales, x, size.scales, "scales");
  job.extra = bytes_of(extra, x, size.extra, "zero points");
  std::optional<Tensor> workspace;
  if (format.encoder == Encoder::midpoint && x.numel() != 0) {
    check_same_device(*table, x, "table");
    workspace = sorted_workspace(x);
    job.sorted = sorted_in(*workspace);
    check_launch(cuda::launch_sort(float_data(table), static_cast<int>(table->numel()),
                                   sorted_in(*workspace), stream),
                 "sorting a codebook");
  }
  check_launch(cuda::launch_quantize(job, element_of(x), false, stream), "encoding");
}

void quantize_stochastic_out(const Tensor& x, std::optional<Tensor>, std::vector<std::int64_t> spec,
                             std::int64_t seed, Tensor& codes, Tensor& scales) {
  check_matrix(x, "x");
  const Format format = format_of(spec, table_for_checks(spec));
  STD_TORCH_CHECK(cpu::rounds_stochastically(format),
                  "vramkit: stochastic rounding is for casts, 8-bit floats and 8-bit integers");
  const std::int64_t shape[] = {x.size(0), x.size(1)};
  const PartBytes size = format.bytes(shape);
  STD_TORCH_CHECK(format.row_separable(x.size(1)), "vramkit: blocks cross rows of this weight");
  std::uint8_t* const to = bytes_of(codes, x, size.codes, "codes");
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  void* const stream = current_stream(x);
  const auto key = static_cast<std::uint64_t>(seed);
  if (format.family == Family::cast) {
    const cuda::StochasticCast job{{x.data_ptr(), x.size(0), x.size(1), x.stride(0), to}, key};
    check_launch(cuda::launch_stochastic_cast(job, element_of(x), codes_of(format), stream),
                 "a cast");
    return;
  }
  cuda::QuantizeJob job = job_of(format, x);
  job.codes = to;
  job.scales = bytes_of(scales, x, size.scales, "scales");
  job.searched = false;  // as on the CPU
  job.seed = key;
  check_launch(cuda::launch_quantize(job, element_of(x), true, stream), "encoding");
}

void quantize_bounds_out(const Tensor& x, const Tensor& bounds, std::int64_t block, Tensor& codes,
                         Tensor& absmax) {
  const std::int64_t count = x.numel();
  STD_TORCH_CHECK(block > 0, "vramkit: a block holds at least one element");
  const std::int64_t blocks = (count + block - 1) / block;
  STD_TORCH_CHECK(x.is_contiguous() && absmax.is_contiguous() && absmax.numel() == blocks &&
                      absmax.scalar_type() == ScalarType::Float,
                  "vramkit: codes or absmax do not match x");
  STD_TORCH_CHECK(bounds.numel() == 255, "vramkit: 256 codes have 255 bounds");
  check_same_device(bounds, x, "bounds");
  check_same_device(absmax, x, "absmax");
  cuda::QuantizeJob job;
  job.codes = bytes_of(codes, x, count, "codes");
  if (count == 0) return;
  const ts::accelerator::DeviceGuard guard(x.get_device_index());
  void* const stream = current_stream(x);
  const Tensor workspace = sorted_workspace(x);
  check_launch(cuda::launch_bounds(float_data(bounds), sorted_in(workspace), stream),
               "taking bounds");
  job.x = x.data_ptr();
  job.rows = 1;
  job.cols = job.stride = job.row_code_bytes = count;
  job.group = block;
  job.groups_per_row = blocks;
  job.scales = static_cast<std::uint8_t*>(absmax.data_ptr());
  job.sorted = sorted_in(workspace);
  job.coder = cuda::Coder::table8;
  job.clear_empty = true;
  check_launch(cuda::launch_quantize(job, element_of(x), false, stream), "encoding");
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CUDA, m) {
  m.impl("_quantize_out", TORCH_BOX(&vramkit::ops::quantize_out));
  m.impl("_quantize_stochastic_out", TORCH_BOX(&vramkit::ops::quantize_stochastic_out));
  m.impl("_quantize_bounds_out", TORCH_BOX(&vramkit::ops::quantize_bounds_out));
}
