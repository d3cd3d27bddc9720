// Convolutions on a stored weight: the weight is decoded, in the order of its input, for torch's
// own.
//
// A stored row is [channels, taps]; torch wants [taps, channels] where the input is channels_last,
// and would copy the decoded weight for it in each call, element by element.
#include <algorithm>
#include <array>
#include <memory>
#include <string>

#include "ops/schema.hpp"
#include "ops/weight.hpp"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

// What one thread should decode at least (as in ops.cpp: waking another takes as long).
constexpr std::int64_t kDecodedPerTask = 1 << 17;
constexpr std::int64_t kTile = 8;

std::int64_t rows_per_task(std::int64_t cols) {
  return std::max<std::int64_t>(1, kDecodedPerTask / std::max<std::int64_t>(1, cols));
}

// to[t][c] = from[c][t] for channels [begin, end) and taps [first, last).
template <class T>
void transpose_each(const T* from, T* to, std::int64_t channels, std::int64_t taps,
                    std::int64_t begin, std::int64_t end, std::int64_t first, std::int64_t last) {
  for (std::int64_t t = first; t < last; ++t) {
    for (std::int64_t c = begin; c < end; ++c) to[t * channels + c] = from[c * taps + t];
  }
}

#if defined(__SSE2__)
// An 8 x 8 tile of 16-bit elements: three rounds of interleaving.
void transpose_tile(const std::uint16_t* from, std::int64_t taps, std::uint16_t* to,
                    std::int64_t channels) {
  __m128i a[kTile], b[kTile];
  for (int i = 0; i < kTile; ++i) {
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * taps));
  }
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
    a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < kTile; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * channels), b[i]);
  }
}
#endif

template <class T>
void transpose(const T* from, T* to, std::int64_t channels, std::int64_t taps) {
  std::int64_t whole = 0, wide = 0;
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 2) {
    whole = channels / kTile * kTile;
    wide = taps / kTile * kTile;
    for (std::int64_t c = 0; c < whole; c += kTile) {
      for (std::int64_t t = 0; t < wide; t += kTile) {
        transpose_tile(from + c * taps + t, taps, to + t * channels + c, channels);
      }
    }
  }
#endif
  transpose_each(from, to, channels, taps, 0, whole, wide, taps);
  transpose_each(from, to, channels, taps, whole, channels, 0, taps);
}

// Decodes `count` rows from first_row on to `data`, [count, taps, channels].
void decode_taps(const StoredWeight& weight, std::int64_t first_row, std::int64_t count,
                 std::int64_t taps, std::int64_t channels, cpu::DType type, char* data) {
  STD_TORCH_CHECK(weight.row_separable(), "vramkit: blocks that cross rows are decoded whole");
  const cpu::Kernels& kernels = cpu::active_kernels();
  const std::int64_t size = cpu::size_of(type), cols = taps * channels;
  ts::parallel_for(0, count, rows_per_task(cols), [&](std::int64_t begin, std::int64_t end) {
    const auto row = std::make_unique_for_overwrite<char[]>(static_cast<std::size_t>(cols * size));
    for (std::int64_t r = begin; r < end; ++r) {
      kernels.dequantize(weight.matrix(), first_row + r, first_row + r + 1, row.get(), type, cols);
      char* target = data + r * cols * size;
      if (size == 2) {
        transpose(reinterpret_cast<const std::uint16_t*>(row.get()),
                  reinterpret_cast<std::uint16_t*>(target), channels, taps);
      } else {
        transpose(reinterpret_cast<const std::uint32_t*>(row.get()),
                  reinterpret_cast<std::uint32_t*>(target), channels, taps);
      }
    }
  });
}

void dequantize_taps_out(const Tensor& codes, const Tensor& scales, std::optional<Tensor> extra,
                         std::optional<Tensor> table, std::vector<std::int64_t> spec,
                         std::int64_t rows, std::int64_t cols, std::int64_t first_row,
                         Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 3 && out.is_contiguous(),
                  "vramkit: out must be contiguous [rows, taps, channels]");
  const std::int64_t count = out.size(0), taps = out.size(1), channels = out.size(2);
  STD_TORCH_CHECK(taps * channels == cols && first_row >= 0 && first_row + count <= rows,
                  "vramkit: out does not match the rows asked for");
  const StoredWeight weight(spec, codes, scales, extra, table, rows, cols);
  decode_taps(weight, first_row, count, taps, channels, dtype_of(out),
              static_cast<char*>(out.data_ptr()));
}

std::string text(const std::vector<std::int64_t>& sizes) {
  std::string all;
  for (const std::int64_t size : sizes) all += (all.empty() ? "[" : ", ") + std::to_string(size);
  return all + "]";
}

// What torch's convolution is given: [batch, channels, ...], and options of as many entries as it
// has spatial dimensions.
struct Options {
  std::vector<std::int64_t> stride, padding, dilation;
  bool transposed;
  std::vector<std::int64_t> output_padding;
  std::int64_t groups;
};

void check_output(const Tensor& x, const std::vector<std::int64_t>& shape, const Options& o) {
  const std::size_t spatial = shape.size() - 2;
  STD_TORCH_CHECK(shape.size() > 2 && x.dim() == static_cast<std::int64_t>(shape.size()) &&
                      o.stride.size() == spatial && o.padding.size() == spatial &&
                      o.dilation.size() == spatial && o.output_padding.size() == spatial,
                  "vramkit: x, weight and options have different numbers of dimensions");
  std::vector<std::int64_t> input, output{x.size(0), o.transposed ? shape[1] * o.groups : shape[0]};
  for (std::int64_t i = 0; i < x.dim(); ++i) input.push_back(x.size(i));
  bool fits = true;
  for (std::size_t k = 0; k < spatial; ++k) {
    const std::int64_t reach = o.dilation[k] * (shape[2 + k] - 1), size = input[2 + k];
    const std::int64_t made =
        o.transposed ? (size - 1) * o.stride[k] - 2 * o.padding[k] + reach + o.output_padding[k] + 1
        : size + 2 * o.padding[k] - reach - 1 < 0
            ? 0
            : (size + 2 * o.padding[k] - reach - 1) / o.stride[k] + 1;
    fits = fits && made > 0;
    output.push_back(made);
  }
  STD_TORCH_CHECK(fits, "a convolution of input ", text(input), " with a weight ", text(shape),
                  " has output ", text(output));
}

// Whether x lies in channels_last order and in no other.
bool is_channels_last(const Tensor& x) {
  if (x.dim() < 4 || x.dim() > 5 || x.is_contiguous()) return false;
  std::int64_t expected = 1;
  const auto follows = [&](std::int64_t i) {
    const bool right = x.size(i) == 1 || x.stride(i) == expected;
    expected *= x.size(i);
    return right;
  };
  bool right = follows(1);
  for (std::int64_t i = x.dim() - 1; i >= 2; --i) right = right && follows(i);
  return right && follows(0);
}

// torch's convolution of x with the whole decoded weight, which is in x's order and dtype.
Tensor conv_whole(const Tensor& x, const Tensor& codes, const Tensor& scales,
                  std::optional<Tensor> extra, std::optional<Tensor> table,
                  std::optional<Tensor> bias, std::vector<std::int64_t> spec,
                  std::vector<std::int64_t> shape, std::vector<std::int64_t> stride,
                  std::vector<std::int64_t> padding, std::vector<std::int64_t> dilation,
                  bool transposed, std::vector<std::int64_t> output_padding, std::int64_t groups) {
  check_output(x, shape, {stride, padding, dilation, transposed, output_padding, groups});
  std::int64_t taps = 1;
  for (std::size_t k = 2; k < shape.size(); ++k) taps *= shape[k];
  const std::int64_t rows = shape[0], channels = shape[1], cols = channels * taps;
  const StoredWeight stored(spec, codes, scales, extra, table, rows, cols);
  STD_TORCH_CHECK(stored.row_separable(), "vramkit: blocks that cross rows are decoded whole");
  std::optional<torch::headeronly::MemoryFormat> order;
  if (is_channels_last(x)) {
    order = shape.size() == 4 ? torch::headeronly::MemoryFormat::ChannelsLast
                              : torch::headeronly::MemoryFormat::ChannelsLast3d;
  }
  const cpu::DType type = dtype_of(x);
  const Tensor weight =
      ts::empty(shape, x.scalar_type(), std::nullopt, std::nullopt, std::nullopt, order);
  auto* data = static_cast<char*>(weight.data_ptr());
  if (order.has_value() && channels > 1 && taps > 1) {
    decode_taps(stored, 0, rows, taps, channels, type, data);
  } else {
    const cpu::Kernels& kernels = cpu::active_kernels();
    ts::parallel_for(0, rows, rows_per_task(cols), [&](std::int64_t begin, std::int64_t end) {
      kernels.dequantize(stored.matrix(), begin, end, data + begin * cols * cpu::size_of(type),
                         type, cols);
    });
  }
  std::array<StableIValue, 9> stack{
      ts::detail::from(x),          ts::detail::from(weight),         ts::detail::from(bias),
      ts::detail::from(stride),     ts::detail::from(padding),        ts::detail::from(dilation),
      ts::detail::from(transposed), ts::detail::from(output_padding), ts::detail::from(groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return ts::detail::to<Tensor>(stack[0]);
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_dequantize_taps_out", TORCH_BOX(&vramkit::ops::dequantize_taps_out));
  m.impl("_conv_whole", TORCH_BOX(&vramkit::ops::conv_whole));
}
