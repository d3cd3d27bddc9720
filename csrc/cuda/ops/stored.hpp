// Stored weights as the kernels that decode take them.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/ops/common.hpp"

namespace vramkit::ops {

inline const cuda::NestedMap& nested_map() {
  static const cuda::NestedMap map = [] {
    cuda::NestedMap values;
    std::copy(dynamic_map().begin(), dynamic_map().end(), values.value);
    return values;
  }();
  return map;
}

inline cuda::DecodeJob job_of(const cpu::Weight& weight, const float* table) {
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

// A stored weight whose parts have been checked to lie on the device of `out`.
inline StoredWeight stored_on(const Tensor& out, const std::vector<std::int64_t>& spec,
                              const Tensor& codes, const Tensor& scales,
                              const std::optional<Tensor>& extra,
                              const std::optional<Tensor>& table, std::int64_t rows,
                              std::int64_t cols) {
  check_same_device(codes, out, "codes");
  check_same_device(scales, out, "scales");
  if (extra.has_value()) check_same_device(*extra, out, "extra");
  const std::optional<Tensor> zeros = table_for_checks(spec);
  STD_TORCH_CHECK(zeros.has_value() == table.has_value(), "vramkit: table does not match spec");
  if (table.has_value()) {
    check_same_device(*table, out, "table");
    STD_TORCH_CHECK(table->numel() == zeros->numel(), "vramkit: table has the wrong size");
  }
  return {spec, codes, scales, extra, zeros, rows, cols};
}

}  // namespace vramkit::ops
