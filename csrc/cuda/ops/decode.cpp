// CUDA implementations of operators of csrc/ops/schema.hpp, on LibTorch's stable ABI: decoding.
// Loaded beside a torch that has CUDA only; loading needs neither a GPU nor a driver. On the
// current stream; nothing waits, nothing is allocated on the device.
//
// Arguments are checked and outputs allocated in Python, as for the CPU. What fails here becomes a
// RuntimeError that names the call; the error is cleared, and the process goes on.
#include <optional>
#include <vector>

#include "cuda/ops/stored.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

void dequantize_out(const Tensor& codes, const Tensor& scales, std::optional<Tensor> extra,
                    std::optional<Tensor> table, std::vector<std::int64_t> spec, std::int64_t rows,
                    std::int64_t cols, std::int64_t first_row, Tensor& out) {
  check_matrix(out, "out");
  const StoredWeight weight = stored_on(out, spec, codes, scales, extra, table, rows, cols);
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

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CUDA, m) {
  m.impl("_dequantize_out", TORCH_BOX(&vramkit::ops::dequantize_out));
}
