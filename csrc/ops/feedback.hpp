// The operator of rounding with feedback: from a stored weight's parts to better codes.
#pragma once
#include "ops/weight.hpp"

namespace vramkit::ops {

void feedback_out(const Tensor& x, const Tensor& coefficients, const Tensor& order,
                  const Tensor& scales, std::optional<Tensor> extra, std::optional<Tensor> table,
                  std::vector<std::int64_t> spec, bool resume, Tensor& codes);

}  // namespace vramkit::ops
