// Products with quantized rows, as the operators of linear layers and of recurrent ones need them.
#pragma once
#include <optional>
#include <vector>

#include "cpu/int8.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {

// A stored int8 weight of [rows, cols], checked: codes, float32 scales as bytes, an optional bias.
struct Int8Weight {
  Int8Weight(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias,
             std::int64_t rows, std::int64_t cols);
  const std::int8_t* codes;
  const std::uint8_t* scales;
  const float* bias;
  std::int64_t rows, cols;
};

// Rows of x to multiply; `type` is that of the products as well.
struct Int8Input {
  const void* data = nullptr;
  cpu::DType type{};
  std::int64_t rows = 0, cols = 0, stride = 0;
  float threshold = 0.0f;  // of LLM.int8; 0 for none
};

// Bytes that quantized rows take, with their absmax and sums and, with a threshold, a mark for each
// column.
std::int64_t int8_workspace(std::int64_t rows, std::int64_t cols, bool outliers);

// Quantizes x into `memory` (int8_workspace bytes) and says how to multiply it with the weight;
// `out` and what follows it are still to be set. The list of outlier columns is kept in `outliers`.
cpu::Int8Product quantized_product(const Int8Input& x, const Int8Weight& weight,
                                   std::uint8_t* memory, std::vector<std::int64_t>& outliers);

// Runs `job` for `rows` rows of x and all `weight_rows` of the weight.
void run_product(const cpu::Int8Product& job, std::int64_t rows, std::int64_t weight_rows);

// How many tasks of `rows` rows times `cols_each` rows of the weight waking a thread is worth.
std::int64_t product_grain(std::int64_t rows, std::int64_t cols_each, std::int64_t cols);

}  // namespace vramkit::ops
