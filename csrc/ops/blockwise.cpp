// Blockwise 8-bit quantization with bounds of the caller's own (vramkit::_quantize_bounds_out).
//
// A format's encoder takes the midpoints of its table as bounds. Other libraries' quantizers round
// their bounds in another way; given those, the same vector kernels write the same codes as they.
#include <cstring>
#include <numeric>

#include "ops/schema.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

constexpr std::int64_t kCodes = 256;
constexpr std::int64_t kElementsPerTask = 1 << 13;  // as quantize_out's

void quantize_bounds_out(const Tensor& x, const Tensor& bounds, std::int64_t block, Tensor& codes,
                         Tensor& absmax) {
  const std::int64_t count = x.numel();
  STD_TORCH_CHECK(block > 0, "vramkit: a block holds at least one element");
  STD_TORCH_CHECK(x.is_contiguous() && codes.is_contiguous() && absmax.is_contiguous() &&
                      codes.numel() == count && absmax.numel() == (count + block - 1) / block &&
                      codes.scalar_type() == ScalarType::Byte &&
                      absmax.scalar_type() == ScalarType::Float,
                  "vramkit: codes or absmax do not match x");
  STD_TORCH_CHECK(bounds.numel() == kCodes - 1, "vramkit: 256 codes have 255 bounds");
  Format format;
  format.family = Family::codebook;
  format.bits = 8;
  format.grain = Grain::flat;
  format.block = block;
  format.scale = ScaleType::f32;
  format.encoder = Encoder::midpoint;
  const float* bound = float_data(bounds);
  cpu::SortedTable sorted{.bounds = {bound, bound + kCodes - 1},
                          .code_of = std::vector<std::uint8_t>(kCodes)};
  std::iota(sorted.code_of.begin(), sorted.code_of.end(), std::uint8_t{0});
  const cpu::Kernels& kernels = cpu::active_kernels();
  const cpu::DType type = dtype_of(x);
  auto* code = static_cast<std::uint8_t*>(codes.data_ptr());
  auto* scale = static_cast<float*>(absmax.data_ptr());
  std::int64_t first = 0;
  for (const Layout& at : flat_layouts(format, count)) {
    const char* data = static_cast<const char*>(x.data_ptr()) + first * cpu::size_of(type);
    std::uint8_t* piece = code + first;
    float* largest = scale + first / block;
    const cpu::Parts out{piece, reinterpret_cast<std::uint8_t*>(largest), nullptr};
    const std::int64_t grain = std::max<std::int64_t>(1, kElementsPerTask / at.cols);
    ts::parallel_for(0, at.rows, grain, [&](std::int64_t begin, std::int64_t end) {
      kernels.quantize(format, sorted, at, data, type, at.cols, out, begin, end);
      for (std::int64_t r = begin; r < end; ++r) {
        // An empty block has code 0 everywhere, whatever the table holds there.
        if (largest[r] == 0.0f) {
          std::memset(piece + r * at.cols, 0, static_cast<std::size_t>(at.cols));
        }
      }
    });
    first += at.rows * at.cols;
  }
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_quantize_bounds_out", TORCH_BOX(&vramkit::ops::quantize_bounds_out));
}
