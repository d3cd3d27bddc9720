#include "ops/feedback.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

#include "core/half.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

// The scale of one group, or of one block, as a float.
float scale_at(const cpu::Weight& weight, std::int64_t index) {
  if (weight.format->scale == ScaleType::f16) {
    std::uint16_t half;
    std::memcpy(&half, weight.scales + index * 2, sizeof(half));
    return fp16_to_float(half);
  }
  auto read = [](const std::uint8_t* bytes, std::int64_t i) {
    float value;
    std::memcpy(&value, bytes + i * 4, sizeof(value));
    return value;
  };
  if (weight.format->scale == ScaleType::f32) return read(weight.scales, index);
  const float product =
      dynamic_map()[weight.scales[index]] * read(weight.extra, index / kNestedBlock);
  return product + read(weight.nested_offset, 0);
}

// Codes as they are stored, from and to one byte each.
void unpack(const Format& format, const std::uint8_t* packed, std::uint8_t* codes,
            std::int64_t count) {
  if (format.bits == 8) {
    std::memcpy(codes, packed, static_cast<std::size_t>(count));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<std::uint8_t>(i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15);
  }
}

void pack(const Format& format, const std::uint8_t* codes, std::uint8_t* packed,
          std::int64_t count) {
  if (format.bits == 8) {
    std::memcpy(packed, codes, static_cast<std::size_t>(count));
    return;
  }
  for (std::int64_t i = 0; i < count; i += 2) {
    const int low = i + 1 < count ? codes[i + 1] : 0;
    packed[i / 2] = static_cast<std::uint8_t>(codes[i] << 4 | low);
  }
}

}  // namespace

void feedback_out(const Tensor& x, const Tensor& coefficients, const Tensor& order,
                  const Tensor& scales, std::optional<Tensor> extra, std::optional<Tensor> table,
                  std::vector<std::int64_t> spec, bool resume, Tensor& codes) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
                  "vramkit: x must be contiguous float32 [rows, cols]");
  const std::int64_t rows = x.size(0), cols = x.size(1);
  STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(0) == cols &&
                      coefficients.size(1) == cols && coefficients.is_contiguous() &&
                      coefficients.scalar_type() == ScalarType::Float,
                  "vramkit: coefficients must be contiguous float32 [cols, cols]");
  STD_TORCH_CHECK(order.dim() == 1 && order.size(0) == cols && order.is_contiguous() &&
                      order.scalar_type() == ScalarType::Long,
                  "vramkit: order must be contiguous int64 [cols]");
  const StoredWeight weight(spec, codes, scales, extra, table, rows, cols);
  const Format& format = *weight.matrix().format;
  STD_TORCH_CHECK(format.family != Family::cast, "vramkit: cast formats round to nearest");
  const auto* positions = static_cast<const std::int64_t*>(order.data_ptr());
  std::vector<bool> seen(cols);
  for (std::int64_t k = 0; k < cols; ++k) {
    STD_TORCH_CHECK(positions[k] >= 0 && positions[k] < cols && !seen[positions[k]],
                    "vramkit: order must be a permutation of the columns");
    seen[positions[k]] = true;
  }
  // Blocks that cross rows: every element is a group of its own to the kernel.
  const bool separable = weight.row_separable();
  const Layout at = separable ? format.layout(rows, cols) : Layout{.group = 1};
  const std::int64_t groups = separable ? at.groups_per_row : cols;
  std::vector<float> scale_values(rows * groups), zero_values;
  for (std::int64_t i = 0; i < rows * groups; ++i) {
    scale_values[i] = scale_at(weight.matrix(), separable ? i : i / format.block);
  }
  if (format.zero_point) {
    zero_values.assign(weight.matrix().extra, weight.matrix().extra + rows * groups);
  }
  const std::unique_ptr<std::uint8_t[]> unpacked(new std::uint8_t[rows * cols]);
  auto* packed = static_cast<std::uint8_t*>(codes.data_ptr());
  // Rows that begin at a byte of their own, or the whole as one run.
  const std::int64_t runs = separable ? rows : 1, run = separable ? cols : rows * cols;
  const std::int64_t run_bytes = (run * format.bits + 7) / 8;
  for (std::int64_t r = 0; resume && r < runs; ++r) {
    unpack(format, packed + r * run_bytes, unpacked.get() + r * run, run);
  }
  const cpu::SortedTable sorted =
      format.encoder == Encoder::midpoint ? cpu::sort_table(format.table) : cpu::SortedTable{};
  const cpu::Feedback job{
      .format = &format,
      .sorted = &sorted,
      .cols = cols,
      .group = at.group,
      .groups = groups,
      .x = static_cast<const float*>(x.data_ptr()),
      .scales = scale_values.data(),
      .zeros = zero_values.empty() ? nullptr : zero_values.data(),
      .coefficients = static_cast<const float*>(coefficients.data_ptr()),
      .order = positions,
      .resume = resume,
      .codes = unpacked.get(),
  };
  const cpu::Kernels& kernels = cpu::active_kernels();
  // Whole tiles of rows (64 is a multiple of every unit's), enough of them to pay for a thread.
  constexpr std::int64_t tile = 64;
  ts::parallel_for(0, (rows + tile - 1) / tile, 1, [&](std::int64_t begin, std::int64_t end) {
    kernels.feedback(job, begin * tile, std::min(end * tile, rows));
  });
  for (std::int64_t r = 0; r < runs; ++r) {
    pack(format, unpacked.get() + r * run, packed + r * run_bytes, run);
  }
}

}  // namespace vramkit::ops
