// Gathering rows of stored weights, and convolutions' weights in their input's order, on CUDA: as
// decode.cpp says. An index that is out of range stops the device, as in torch's own embedding:
// looking first would make the host wait.
#include <optional>
#include <vector>

#include "cuda/launch_embedding.hpp"
#include "cuda/ops/stored.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

void embedding_out(const Tensor& indices, const Tensor& codes, const Tensor& scales,
                   std::optional<Tensor> extra, std::optional<Tensor> table,
                   std::vector<std::int64_t> spec, std::int64_t rows, Tensor& out) {
  check_matrix(out, "out");
  check_same_device(indices, out, "indices");
  STD_TORCH_CHECK(indices.dim() == 1 && indices.is_contiguous() &&
                      indices.scalar_type() == ScalarType::Long && indices.size(0) == out.size(0),
                  "vramkit: indices must be 1-D contiguous int64, one per row of out");
  const StoredWeight weight = stored_on(out, spec, codes, scales, extra, table, rows, out.size(1));
  STD_TORCH_CHECK(weight.row_separable(), "vramkit: this weight is decoded before it is indexed");
  const ts::accelerator::DeviceGuard guard(out.get_device_index());
  cuda::GatherJob job;
  job.weight = job_of(weight.matrix(), float_data(table));
  job.weight.out = out.data_ptr();
  job.weight.out_stride = out.stride(0);
  job.index = static_cast<const std::int64_t*>(indices.data_ptr());
  job.count = indices.size(0);
  check_launch(cuda::launch_gather(job, codes_of(*weight.matrix().format), element_of(out),
                                   nested_map(), current_stream(out)),
               "an embedding");
}

void dequantize_taps_out(const Tensor& codes, const Tensor& scales, std::optional<Tensor> extra,
                         std::optional<Tensor> table, std::vector<std::int64_t> spec,
                         std::int64_t rows, std::int64_t cols, std::int64_t first_row,
                         Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 3 && out.is_contiguous(),
                  "vramkit: out must be contiguous [rows, taps, channels]");
  const std::int64_t count = out.size(0), taps = out.size(1), channels = out.size(2);
  STD_TORCH_CHECK(taps * channels == cols && first_row >= 0 && first_row + count <= rows,
                  "vramkit: out does not match the rows asked for");
  const StoredWeight weight = stored_on(out, spec, codes, scales, extra, table, rows, cols);
  STD_TORCH_CHECK(weight.row_separable(), "vramkit: blocks that cross rows are decoded whole");
  const ts::accelerator::DeviceGuard guard(out.get_device_index());
  cuda::TapsJob job;
  job.weight = job_of(weight.matrix(), float_data(table));
  job.weight.first_row = first_row;
  job.weight.rows = count;
  job.weight.out = out.data_ptr();
  job.taps = taps;
  job.channels = channels;
  check_launch(cuda::launch_taps(job, codes_of(*weight.matrix().format), element_of(out),
                                 nested_map(), current_stream(out)),
               "decoding");
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CUDA, m) {
  m.impl("_embedding_out", TORCH_BOX(&vramkit::ops::embedding_out));
  m.impl("_dequantize_taps_out", TORCH_BOX(&vramkit::ops::dequantize_taps_out));
}
