// Encoding with stochastic rounding, on the CPU (vramkit::_quantize_stochastic_out).
#include "cpu/stochastic.hpp"

#include "ops/schema.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

constexpr std::int64_t kElementsPerTask = 1 << 13;  // as quantize_out's

void quantize_stochastic_out(const Tensor& x, std::optional<Tensor> table,
                             std::vector<std::int64_t> spec, std::int64_t seed, Tensor& codes,
                             Tensor& scales) {
  check_matrix(x, "x");
  const Format format = format_of(spec, table);
  STD_TORCH_CHECK(cpu::rounds_stochastically(format),
                  "vramkit: stochastic rounding is for casts, 8-bit floats and 8-bit integers");
  const std::int64_t rows = x.size(0), cols = x.size(1);
  const std::int64_t shape[] = {rows, cols};
  const PartBytes size = format.bytes(shape);
  STD_TORCH_CHECK(codes.numel() == size.codes && scales.numel() == size.scales &&
                      codes.is_contiguous() && scales.is_contiguous(),
                  "vramkit: codes or scales do not have the format's size");
  STD_TORCH_CHECK(format.row_separable(cols), "vramkit: blocks cross rows of this weight");
  const Layout at = format.layout(rows, cols);
  const cpu::DType type = dtype_of(x);
  const cpu::Parts out{static_cast<std::uint8_t*>(codes.data_ptr()),
                       static_cast<std::uint8_t*>(scales.data_ptr()), nullptr};
  const std::int64_t grain =
      std::max<std::int64_t>(1, kElementsPerTask / std::max<std::int64_t>(1, cols));
  ts::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
    cpu::quantize_stochastic(format, at, x.data_ptr(), type, x.stride(0), out,
                             static_cast<std::uint64_t>(seed), begin, end);
  });
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_quantize_stochastic_out", TORCH_BOX(&vramkit::ops::quantize_stochastic_out));
}
