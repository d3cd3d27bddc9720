// Operators of dynamic INT8 and LLM.int8 (schemas in schema.hpp; arguments are checked and memory
// is allocated in python/vramkit/_operators_int8.py).
#include "ops/int8.hpp"

#include <algorithm>
#include <cstring>

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

using cpu::kInt8ChunkCols;
using cpu::kInt8ChunkRows;
// Work that waking a thread is worth: about 15 us of reading the weight, or of products.
constexpr std::int64_t kBytesPerTask = std::int64_t{1} << 19;
constexpr std::int64_t kProductsPerTask = std::int64_t{1} << 21;
constexpr std::int64_t kQuantizedPerTask = std::int64_t{1} << 15;

std::int64_t up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check_rows(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1) &&
                      tensor.scalar_type() == type,
                  "vramkit: ", name, " must be 2-D of its type with consecutive elements in a row");
}

// The quantized rows in a workspace: codes, scales, sums.
cpu::Int8Rows rows_in(std::uint8_t* memory, std::int64_t rows, std::int64_t cols) {
  const std::int64_t stride = cpu::int8_row_stride(cols);
  const std::int64_t codes = rows * stride * std::max<std::int64_t>(1, cpu::int8_blocks(cols));
  return {reinterpret_cast<std::int8_t*>(memory), stride, rows * stride,
          reinterpret_cast<float*>(memory + codes),
          reinterpret_cast<std::int32_t*>(memory + codes + rows * 4)};
}

// Columns that are multiplied unquantized: their codes become zero.
std::vector<std::int64_t> take_out(const std::uint8_t* columns, std::int64_t cols,
                                   const cpu::Int8Rows& to, std::int64_t rows) {
  std::vector<std::int64_t> found;
  for (std::int64_t k = 0; k < cols; ++k) {
    if (columns[k]) found.push_back(k);
  }
  if (found.empty()) return found;
  const auto count = static_cast<std::int64_t>(found.size());
  ts::parallel_for(
      0, rows, up(kQuantizedPerTask, count), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
          for (const std::int64_t k : found) {
            std::int8_t& code =
                to.codes[r * to.stride + k / cpu::kInt8Depth * to.block + k % cpu::kInt8Depth];
            to.sums[r] -= code;
            code = 0;
          }
        }
      });
  return found;
}

}  // namespace

std::int64_t int8_workspace(std::int64_t rows, std::int64_t cols, bool outliers) {
  return rows *
             (cpu::int8_row_stride(cols) * std::max<std::int64_t>(1, cpu::int8_blocks(cols)) + 8) +
         (outliers ? cols : 0);
}

Int8Weight::Int8Weight(const Tensor& code_bytes, const Tensor& scale_bytes,
                       const std::optional<Tensor>& added, std::int64_t row_count,
                       std::int64_t col_count)
    : rows(row_count), cols(col_count) {
  STD_TORCH_CHECK(cols <= cpu::kInt8Longest, "vramkit: rows are too long for int32 sums");
  STD_TORCH_CHECK(code_bytes.scalar_type() == ScalarType::Byte && code_bytes.is_contiguous() &&
                      code_bytes.numel() == rows * cols &&
                      scale_bytes.scalar_type() == ScalarType::Byte &&
                      scale_bytes.is_contiguous() && scale_bytes.numel() == rows * 4,
                  "vramkit: codes and scales do not have the size of an int8 weight");
  STD_TORCH_CHECK(!added.has_value() || added->numel() == rows, "vramkit: bias does not match");
  codes = static_cast<const std::int8_t*>(code_bytes.data_ptr());
  scales = static_cast<const std::uint8_t*>(scale_bytes.data_ptr());
  bias = float_data(added);
}

cpu::Int8Product quantized_product(const Int8Input& x, const Int8Weight& weight,
                                   std::uint8_t* memory, std::vector<std::int64_t>& outliers) {
  const cpu::Int8Rows quantized = rows_in(memory, x.rows, x.cols);
  std::uint8_t* columns = nullptr;
  if (x.threshold > 0.0f) {
    columns = memory + int8_workspace(x.rows, x.cols, false);
    std::memset(columns, 0, static_cast<std::size_t>(x.cols));
  }
  const auto quantize = cpu::active_kernels().int8.quantize;
  const std::int64_t grain =
      std::max<std::int64_t>(1, kQuantizedPerTask / std::max<std::int64_t>(1, x.cols));
  ts::parallel_for(0, x.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    quantize(x.data, x.type, x.cols, x.stride, x.threshold, columns, quantized, begin, end);
  });
  outliers.clear();
  if (columns) outliers = take_out(columns, x.cols, quantized, x.rows);
  cpu::Int8Product job;
  job.x = quantized.codes;
  job.x_stride = quantized.stride;
  job.x_block = quantized.block;
  job.x_absmax = quantized.absmax;
  job.x_sums = quantized.sums;
  job.weight = weight.codes;
  job.weight_stride = weight.cols;
  job.weight_scales = weight.scales;
  job.cols = x.cols;
  job.bias = weight.bias;
  job.values = x.data;
  job.values_stride = x.stride;
  job.outliers = outliers.data();
  job.outlier_count = static_cast<std::int64_t>(outliers.size());
  job.type = x.type;
  return job;
}

std::int64_t product_grain(std::int64_t rows, std::int64_t cols_each, std::int64_t cols) {
  const std::int64_t bytes = std::max<std::int64_t>(1, cols_each * cols);
  const std::int64_t products = std::max<std::int64_t>(1, rows * bytes);
  return std::max<std::int64_t>(1, std::min(kBytesPerTask / bytes, kProductsPerTask / products));
}

// Columns of the weight are dealt out first, so that each of its bytes is read by one thread.
void run_product(const cpu::Int8Product& job, std::int64_t rows, std::int64_t weight_rows) {
  const auto product = cpu::active_kernels().int8.product;
  const std::int64_t chunks = up(weight_rows, kInt8ChunkCols), blocks = up(rows, kInt8ChunkRows);
  const std::int64_t grain =
      product_grain(std::min(rows, kInt8ChunkRows), kInt8ChunkCols, job.cols);
  ts::parallel_for(0, chunks * blocks, grain, [&](std::int64_t begin, std::int64_t end) {
    if (blocks == 1) {
      product(job, 0, rows, begin * kInt8ChunkCols, std::min(end * kInt8ChunkCols, weight_rows));
      return;
    }
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t col = task / blocks * kInt8ChunkCols, row = task % blocks * kInt8ChunkRows;
      product(job, row, std::min(row + kInt8ChunkRows, rows), col,
              std::min(col + kInt8ChunkCols, weight_rows));
    }
  });
}

namespace {

void linear_int8_out(const Tensor& x, const Tensor& codes, const Tensor& scales,
                     std::optional<Tensor> bias, double threshold, std::int64_t activation,
                     Tensor& workspace, Tensor& out) {
  const cpu::DType type = dtype_of(x);
  check_rows(x, x.scalar_type(), "x");
  check_rows(out, x.scalar_type(), "out");
  const std::int64_t rows = x.size(0), cols = x.size(1), weight_rows = out.size(1);
  STD_TORCH_CHECK(out.size(0) == rows, "vramkit: x and out do not match");
  const Int8Weight weight(codes, scales, bias, weight_rows, cols);
  STD_TORCH_CHECK(activation >= 0 && activation <= 3, "vramkit: no such activation");
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.is_contiguous() &&
                      workspace.numel() >= int8_workspace(rows, cols, threshold > 0.0),
                  "vramkit: the workspace is too small");
  if (!rows || !weight_rows) return;
  std::vector<std::int64_t> outliers;
  const Int8Input input{x.data_ptr(), type, rows, cols, x.stride(0), static_cast<float>(threshold)};
  cpu::Int8Product job =
      quantized_product(input, weight, static_cast<std::uint8_t*>(workspace.data_ptr()), outliers);
  job.activation = static_cast<cpu::Activation>(activation);
  job.out = out.data_ptr();
  job.out_stride = out.stride(0);
  run_product(job, rows, weight_rows);
}

void quantize_rows_out(const Tensor& x, double threshold, Tensor& codes, Tensor& absmax,
                       Tensor& columns) {
  const cpu::DType type = dtype_of(x);
  check_rows(x, x.scalar_type(), "x");
  const std::int64_t rows = x.size(0), cols = x.size(1);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.is_contiguous() &&
                      codes.numel() == rows * cols && absmax.scalar_type() == ScalarType::Float &&
                      absmax.is_contiguous() && absmax.numel() == rows &&
                      columns.scalar_type() == ScalarType::Byte && columns.is_contiguous() &&
                      columns.numel() == cols,
                  "vramkit: codes, absmax or columns do not match x");
  const cpu::Int8Kernels& kernels = cpu::active_kernels().int8;
  std::vector<std::int32_t> sums(static_cast<std::size_t>(rows));
  auto* marks = static_cast<std::uint8_t*>(columns.data_ptr());
  std::memset(marks, 0, static_cast<std::size_t>(cols));
  const cpu::Int8Rows to{static_cast<std::int8_t*>(codes.data_ptr()), cols, cpu::kInt8Depth,
                         static_cast<float*>(absmax.data_ptr()), sums.data()};
  const std::int64_t grain =
      std::max<std::int64_t>(1, kQuantizedPerTask / std::max<std::int64_t>(1, cols));
  ts::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
    kernels.quantize(x.data_ptr(), type, cols, x.stride(0), static_cast<float>(threshold), marks,
                     to, begin, end);
  });
  take_out(marks, cols, to, rows);
}

void int8_mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  check_rows(a, ScalarType::Char, "a");
  check_rows(b, ScalarType::Char, "b");
  check_rows(out, ScalarType::Int, "out");
  const std::int64_t rows = a.size(0), cols = a.size(1), weight_rows = b.size(0);
  STD_TORCH_CHECK(b.size(1) == cols && out.size(0) == rows && out.size(1) == weight_rows &&
                      cols < cpu::kInt8Longest,
                  "vramkit: a, b and out do not match, or rows are too long for int32 sums");
  if (!rows || !weight_rows) return;
  cpu::Int8Product job;
  std::vector<std::int32_t> sums(static_cast<std::size_t>(rows));
  job.x = static_cast<const std::int8_t*>(a.data_ptr());
  job.x_stride = a.stride(0);
  job.x_block = cpu::kInt8Depth;
  job.x_sums = sums.data();
  job.weight = static_cast<const std::int8_t*>(b.data_ptr());
  job.weight_stride = b.stride(0);
  job.cols = cols;
  job.out = out.data_ptr();
  job.out_stride = out.stride(0);
  job.exact = true;
  const std::int64_t grain =
      std::max<std::int64_t>(1, kQuantizedPerTask / std::max<std::int64_t>(1, cols));
  ts::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
    cpu::active_kernels().int8.sums(job.x, cols, job.x_stride, sums.data(), begin, end);
  });
  run_product(job, rows, weight_rows);
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_linear_int8_out", TORCH_BOX(&vramkit::ops::linear_int8_out));
  m.impl("_quantize_rows_out", TORCH_BOX(&vramkit::ops::quantize_rows_out));
  m.impl("_int8_mm_out", TORCH_BOX(&vramkit::ops::int8_mm_out));
}
