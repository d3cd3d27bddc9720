// CPU implementations of the kernels' operators, on LibTorch's stable ABI.
//
// Arguments are checked and outputs allocated in Python, because an exception that leaves an
// operator has another Python type in each release of torch. The checks here guard the memory.
#include <cstring>

#include "ops/feedback.hpp"
#include "ops/schema.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

// Elements that one thread should have at least, so that waking it is worth while: some 15 us of
// decoding, which keeps small layers on one thread, and as much of encoding with its searches.
constexpr std::int64_t kDecodedPerTask = 1 << 17;
constexpr std::int64_t kEncodedPerTask = 1 << 13;

std::int64_t rows_per_task(std::int64_t cols, std::int64_t elements = kDecodedPerTask) {
  return std::max<std::int64_t>(1, elements / std::max<std::int64_t>(1, cols));
}

char* row_pointer(void* base, cpu::DType type, std::int64_t element) {
  return static_cast<char*>(base) + element * cpu::size_of(type);
}

void quantize_out(const Tensor& x, std::optional<Tensor> table, std::vector<std::int64_t> spec,
                  Tensor& codes, Tensor& scales, Tensor& extra) {
  check_matrix(x, "x");
  const Format format = format_of(spec, table);
  STD_TORCH_CHECK(format.scale != ScaleType::nested,
                  "vramkit: nested scales are quantized by a second call");
  const std::int64_t rows = x.size(0), cols = x.size(1);
  const std::int64_t shape[] = {rows, cols};
  const PartBytes size = format.bytes(shape);
  STD_TORCH_CHECK(codes.numel() == size.codes && scales.numel() == size.scales &&
                      extra.numel() == size.extra && codes.is_contiguous() &&
                      scales.is_contiguous() && extra.is_contiguous(),
                  "vramkit: codes, scales or extra do not have the format's size");
  const cpu::SortedTable sorted =
      format.encoder == Encoder::midpoint ? cpu::sort_table(format.table) : cpu::SortedTable{};
  const cpu::Kernels& kernels = cpu::active_kernels();
  const cpu::DType type = dtype_of(x);
  const cpu::Parts out{static_cast<std::uint8_t*>(codes.data_ptr()),
                       static_cast<std::uint8_t*>(scales.data_ptr()),
                       static_cast<std::uint8_t*>(extra.data_ptr())};
  auto run = [&](const Layout& at, void* data, std::int64_t stride, cpu::Parts parts) {
    const std::int64_t grain = rows_per_task(at.cols, kEncodedPerTask);
    ts::parallel_for(0, at.rows, grain, [&](std::int64_t begin, std::int64_t end) {
      kernels.quantize(format, sorted, at, data, type, stride, parts, begin, end);
    });
  };
  if (format.row_separable(cols)) {
    run(format.layout(rows, cols), x.data_ptr(), x.stride(0), out);
    return;
  }
  STD_TORCH_CHECK(x.is_contiguous(), "vramkit: x must be contiguous where blocks cross rows");
  std::int64_t first = 0;
  for (const Layout& at : flat_layouts(format, rows * cols)) {
    cpu::Parts parts = out;
    parts.codes += first * format.bits / 8;
    parts.scales += first / format.block * 4;
    run(at, row_pointer(x.data_ptr(), type, first), at.cols, parts);
    first += at.rows * at.cols;
  }
}

void dequantize_out(const Tensor& codes, const Tensor& scales, std::optional<Tensor> extra,
                    std::optional<Tensor> table, std::vector<std::int64_t> spec, std::int64_t rows,
                    std::int64_t cols, std::int64_t first_row, Tensor& out) {
  check_matrix(out, "out");
  const StoredWeight weight(spec, codes, scales, extra, table, rows, cols);
  const std::int64_t count = out.size(0);
  STD_TORCH_CHECK(out.size(1) == cols && first_row >= 0 && first_row + count <= rows,
                  "vramkit: out does not match the rows asked for");
  const cpu::Kernels& kernels = cpu::active_kernels();
  const cpu::DType type = dtype_of(out);
  auto run = [&](const cpu::Weight& piece, std::int64_t from, std::int64_t to, char* data,
                 std::int64_t stride) {
    ts::parallel_for(
        from, to, rows_per_task(piece.at.cols), [&](std::int64_t begin, std::int64_t end) {
          kernels.dequantize(piece, begin, end, row_pointer(data, type, (begin - from) * stride),
                             type, stride);
        });
  };
  auto* data = static_cast<char*>(out.data_ptr());
  if (weight.row_separable()) {
    run(weight.matrix(), first_row, first_row + count, data, out.stride(0));
    return;
  }
  STD_TORCH_CHECK(count == rows && out.is_contiguous(),
                  "vramkit: blocks that cross rows are decoded whole");
  for (const auto& [first, piece] : weight.pieces()) {
    run(piece, 0, piece.at.rows, row_pointer(data, type, first), piece.at.cols);
  }
}

void linear_out(const Tensor& x, const Tensor& codes, const Tensor& scales,
                std::optional<Tensor> extra, std::optional<Tensor> table,
                std::optional<Tensor> bias, std::vector<std::int64_t> spec, Tensor& out) {
  check_matrix(x, "x");
  check_matrix(out, "out");
  const std::int64_t rows = out.size(1), cols = x.size(1);
  const StoredWeight weight(spec, codes, scales, extra, table, rows, cols);
  STD_TORCH_CHECK(weight.row_separable(), "vramkit: this weight is decoded before its product");
  STD_TORCH_CHECK(x.size(0) == out.size(0) && x.scalar_type() == out.scalar_type(),
                  "vramkit: x and out do not match");
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == rows, "vramkit: bias does not match");
  const float* bias_data = float_data(bias);
  const cpu::Kernels& kernels = cpu::active_kernels();
  const cpu::DType type = dtype_of(x);
  const std::int64_t grain = rows_per_task(cols * std::max<std::int64_t>(1, x.size(0)));
  ts::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
    kernels.linear(weight.matrix(), x.data_ptr(), type, x.size(0), x.stride(0), bias_data,
                   out.data_ptr(), out.stride(0), begin, end);
  });
}

void embedding_out(const Tensor& indices, const Tensor& codes, const Tensor& scales,
                   std::optional<Tensor> extra, std::optional<Tensor> table,
                   std::vector<std::int64_t> spec, std::int64_t rows, Tensor& out) {
  check_matrix(out, "out");
  STD_TORCH_CHECK(indices.dim() == 1 && indices.is_contiguous() &&
                      indices.scalar_type() == ScalarType::Long && indices.size(0) == out.size(0),
                  "vramkit: indices must be 1-D contiguous int64, one per row of out");
  const StoredWeight weight(spec, codes, scales, extra, table, rows, out.size(1));
  STD_TORCH_CHECK(weight.row_separable(), "vramkit: this weight is decoded before it is indexed");
  const auto* index = static_cast<const std::int64_t*>(indices.data_ptr());
  for (std::int64_t i = 0; i < indices.size(0); ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < rows, "vramkit: index out of range");
  }
  const cpu::Kernels& kernels = cpu::active_kernels();
  const cpu::DType type = dtype_of(out);
  auto* data = static_cast<char*>(out.data_ptr());
  ts::parallel_for(
      0, out.size(0), rows_per_task(out.size(1)), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          kernels.dequantize(weight.matrix(), index[i], index[i] + 1,
                             row_pointer(data, type, i * out.stride(0)), type, out.stride(0));
        }
      });
}

Tensor squared_error(const Tensor& x, const Tensor& codes, const Tensor& scales,
                     std::optional<Tensor> extra, std::optional<Tensor> table,
                     std::optional<Tensor> importance, std::vector<std::int64_t> spec) {
  check_matrix(x, "x");
  const std::int64_t rows = x.size(0), cols = x.size(1);
  const StoredWeight weight(spec, codes, scales, extra, table, rows, cols);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "vramkit: x must be contiguous float32");
  STD_TORCH_CHECK(!importance.has_value() || importance->numel() == cols,
                  "vramkit: importance has one entry per column");
  const float* column_weight = float_data(importance);
  const auto* values = static_cast<const float*>(x.data_ptr());
  const cpu::Kernels& kernels = cpu::active_kernels();
  // One row of results per row of the piece, summed in order: the same for any number of threads.
  double error = 0.0, power = 0.0;
  auto run = [&](const cpu::Weight& piece, std::int64_t first) {
    const std::int64_t width = piece.at.cols;
    std::vector<double> row_error(piece.at.rows), row_power(piece.at.rows);
    ts::parallel_for(
        0, piece.at.rows, rows_per_task(width), [&](std::int64_t begin, std::int64_t end) {
          std::vector<float> decoded(width);
          for (std::int64_t r = begin; r < end; ++r) {
            kernels.dequantize(piece, r, r + 1, decoded.data(), cpu::DType::f32, width);
            const std::int64_t at = first + r * width;
            for (std::int64_t k = 0; k < width; ++k) {
              const double w = values[at + k], miss = w - decoded[k];
              const double importance_k = column_weight ? column_weight[(at + k) % cols] : 1.0;
              row_error[r] += miss * miss * importance_k;
              row_power[r] += w * w * importance_k;
            }
          }
        });
    for (std::int64_t r = 0; r < piece.at.rows; ++r) {
      error += row_error[r];
      power += row_power[r];
    }
  };
  if (weight.row_separable()) {
    run(weight.matrix(), 0);
  } else {
    for (const auto& [first, piece] : weight.pieces()) run(piece, first);
  }
  Tensor result = ts::empty({2}, ScalarType::Double);
  auto* sums = static_cast<double*>(result.data_ptr());
  sums[0] = error;
  sums[1] = power;
  return result;
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY(vramkit, m) {
  for (const char* schema : vramkit::ops::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_quantize_out", TORCH_BOX(&vramkit::ops::quantize_out));
  m.impl("_dequantize_out", TORCH_BOX(&vramkit::ops::dequantize_out));
  m.impl("_linear_out", TORCH_BOX(&vramkit::ops::linear_out));
  m.impl("_embedding_out", TORCH_BOX(&vramkit::ops::embedding_out));
  m.impl("_feedback_out", TORCH_BOX(&vramkit::ops::feedback_out));
  m.impl("_squared_error", TORCH_BOX(&vramkit::ops::squared_error));
}
