// From the tensors and integers that operators receive to what kernels read.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "core/format.hpp"
#include "cpu/kernels.hpp"

namespace vramkit::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The format that `spec` spells (schema.hpp); its table is read where it stands.
Format format_of(const std::vector<std::int64_t>& spec, const std::optional<Tensor>& table);

cpu::DType dtype_of(const Tensor& tensor);

void check_matrix(const Tensor& tensor, const char* name);

const float* float_data(const std::optional<Tensor>& tensor);

// One stored weight of [rows, cols]. Flat blocks that cross rows are seen as a matrix of blocks
// with a short last row of its own: up to two kernel calls instead of one.
class StoredWeight {
 public:
  StoredWeight(const std::vector<std::int64_t>& spec, const Tensor& codes, const Tensor& scales,
               const std::optional<Tensor>& extra, const std::optional<Tensor>& table,
               std::int64_t rows, std::int64_t cols);

  bool row_separable() const { return pieces_.empty(); }
  const cpu::Weight& matrix() const { return matrix_; }
  // {first element, weight} of each piece, for weights whose rows cannot be told apart.
  const std::vector<std::pair<std::int64_t, cpu::Weight>>& pieces() const { return pieces_; }

 private:
  Format format_;
  cpu::Weight matrix_;
  std::vector<std::pair<std::int64_t, cpu::Weight>> pieces_;
};

// The pieces [rows, cols] that `count` elements in flat blocks consist of: whole blocks, then the
// short last one.
std::vector<Layout> flat_layouts(const Format& format, std::int64_t count);

}  // namespace vramkit::ops
