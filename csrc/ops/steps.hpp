// The time steps of a recurrent layer's rows, on any device: their sizes are the host's to know.
#pragma once
#include <optional>
#include <vector>

#include "ops/weight.hpp"

namespace vramkit::ops {

// How many rows each time step has: `steps`, or the batch over and over.
inline std::vector<std::int64_t> step_sizes(const std::optional<Tensor>& steps, std::int64_t rows,
                                            std::int64_t batch) {
  if (!steps.has_value()) {
    STD_TORCH_CHECK(batch == 0 ? rows == 0 : rows % batch == 0,
                    "vramkit: rows of x are no multiple of the batch");
    return std::vector<std::int64_t>(static_cast<std::size_t>(batch ? rows / batch : 0), batch);
  }
  STD_TORCH_CHECK(steps->scalar_type() == ScalarType::Long && steps->is_contiguous(),
                  "vramkit: sizes of steps must be contiguous int64");
  const auto* data = static_cast<const std::int64_t*>(steps->data_ptr());
  std::vector<std::int64_t> sizes(data, data + steps->numel());
  std::int64_t total = 0, before = batch;
  for (const std::int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0 && size <= before, "vramkit: sizes of steps must not rise");
    total += before = size;
  }
  STD_TORCH_CHECK(total == rows, "vramkit: sizes of steps do not add up to the rows of x");
  return sizes;
}

}  // namespace vramkit::ops
