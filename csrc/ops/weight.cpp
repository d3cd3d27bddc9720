#include "ops/weight.hpp"

namespace vramkit::ops {
namespace {

const std::uint8_t* bytes_of(const Tensor& tensor, std::int64_t expected, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.is_contiguous(),
                  "vramkit: ", name, " must be contiguous uint8");
  STD_TORCH_CHECK(tensor.numel() == expected, "vramkit: ", name, " holds ", tensor.numel(),
                  " bytes where the format needs ", expected);
  return static_cast<const std::uint8_t*>(tensor.data_ptr());
}

}  // namespace

Format format_of(const std::vector<std::int64_t>& spec, const std::optional<Tensor>& table) {
  std::vector<float> values;
  if (table.has_value()) {
    const float* data = float_data(table);
    values.assign(data, data + table->numel());
  }
  return format_from_spec(spec, std::move(values));
}

cpu::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cpu::DType::f32;
    case ScalarType::BFloat16:
      return cpu::DType::bf16;
    case ScalarType::Half:
      return cpu::DType::f16;
    default:
      STD_TORCH_CHECK(false, "vramkit: expected float32, bfloat16 or float16");
  }
}

void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1),
                  "vramkit: ", name, " must be 2-D with consecutive elements in a row");
}

const float* float_data(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(),
                  "vramkit: table, bias and importance must be contiguous float32");
  return static_cast<const float*>(tensor->data_ptr());
}

std::vector<Layout> flat_layouts(const Format& format, std::int64_t count) {
  std::vector<Layout> all{format.layout(count / format.block, format.block)};
  if (const std::int64_t rest = count % format.block) {
    // The last block alone: one row, one scale.
    Layout tail{.rows = 1, .cols = rest, .group = rest, .groups_per_row = 1};
    tail.row_code_bytes = (rest * format.bits + 7) / 8;
    all.push_back(tail);
  }
  return all;
}

StoredWeight::StoredWeight(const std::vector<std::int64_t>& spec, const Tensor& codes,
                           const Tensor& scales, const std::optional<Tensor>& extra,
                           const std::optional<Tensor>& table, std::int64_t rows, std::int64_t cols)
    : format_(format_of(spec, table)) {
  const std::int64_t shape[] = {rows, cols};
  const PartBytes size = format_.bytes(shape);
  matrix_.format = &format_;
  matrix_.table = format_.table.data();
  matrix_.codes = bytes_of(codes, size.codes, "codes");
  matrix_.scales = bytes_of(scales, size.scales, "scales");
  if (size.extra) {
    STD_TORCH_CHECK(extra.has_value(), "vramkit: this format has a third part");
    matrix_.extra = bytes_of(*extra, size.extra, "extra");
    if (format_.scale == ScaleType::nested) matrix_.nested_offset = matrix_.extra + size.extra - 4;
  }
  if (format_.row_separable(cols)) {
    matrix_.at = format_.layout(rows, cols);
    return;
  }
  std::int64_t first = 0;
  for (const Layout& at : flat_layouts(format_, rows * cols)) {
    cpu::Weight piece = matrix_;
    piece.at = at;
    piece.codes += first * format_.bits / 8;
    const std::int64_t groups = first / format_.block;
    piece.scales += groups * (format_.scale == ScaleType::nested ? 1 : 4);
    piece.first_scale = groups;
    pieces_.emplace_back(first, piece);
    first += at.rows * at.cols;
  }
}

}  // namespace vramkit::ops
