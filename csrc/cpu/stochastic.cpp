#include "cpu/stochastic.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/half.hpp"
#include "core/stochastic.hpp"
#include "cpu/encode.hpp"

namespace vramkit::cpu {
namespace {

constexpr std::int64_t kQuads = 16;  // counters that are stirred side by side

// The random words of a row's columns, `out` being a multiple of 4 * kQuads long. Counter by
// counter within an array, so that compilers take vectors for it.
void fill_row(std::uint64_t seed, std::int64_t row, std::vector<std::uint32_t>& out) {
  for (std::int64_t first = 0; first < static_cast<std::int64_t>(out.size()) / 4; first += kQuads) {
    PhiloxWords words[kQuads];
    for (std::int64_t i = 0; i < kQuads; ++i) words[i] = words_of(seed, row, first + i);
    std::memcpy(out.data() + 4 * first, words, sizeof(words));
  }
}

float load(const void* base, DType type, std::int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(base)[i];
  const std::uint16_t half = static_cast<const std::uint16_t*>(base)[i];
  return type == DType::bf16 ? bf16_to_float(half) : fp16_to_float(half);
}

float largest_code(const Format& format) {
  if (format.encoder == Encoder::e4m3) return 448.0f;
  return format.encoder == Encoder::e5m2 ? 57344.0f : 127.0f;
}

std::uint8_t code_of(const Format& format, float y, std::uint32_t word) {
  switch (format.encoder) {
    case Encoder::e4m3:
      return static_cast<std::uint8_t>(stochastic_e4m3(y, word));
    case Encoder::e5m2:
      return static_cast<std::uint8_t>(stochastic_e5m2(y, word));
    default:
      return static_cast<std::uint8_t>(stochastic_int8(y, word));
  }
}

void encode_group(const Format& format, const float* x, const std::uint32_t* words,
                  std::int64_t count, std::uint8_t* codes, std::uint8_t* scale_at) {
  float absmax = 0.0f;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(x[i]);
    absmax = std::max(absmax, std::fabs(x[i]));
  }
  const float most = largest_code(format);
  const float scale = finite ? absmax / most : std::nanf("");
  std::memcpy(scale_at, &scale, sizeof(scale));
  const float factor = encode_factor(absmax, most);
  for (std::int64_t i = 0; i < count; ++i) {
    codes[i] = finite ? code_of(format, x[i] * factor, words[i]) : std::uint8_t{0};
  }
}

}  // namespace

bool rounds_stochastically(const Format& format) {
  if (format.family == Family::cast) return true;
  return format.bits == 8 && format.encoder != Encoder::midpoint;
}

void quantize_stochastic(const Format& format, const Layout& at, const void* x, DType type,
                         std::int64_t stride, Parts out, std::uint64_t seed, std::int64_t begin,
                         std::int64_t end) {
  constexpr std::int64_t step = 4 * kQuads;
  std::vector<std::uint32_t> words((at.cols + step - 1) / step * step);
  std::vector<float> row(at.cols);
  for (std::int64_t r = begin; r < end; ++r) {
    fill_row(seed, r, words);
    for (std::int64_t k = 0; k < at.cols; ++k) row[k] = load(x, type, r * stride + k);
    std::uint8_t* codes = out.codes + r * at.row_code_bytes;
    if (format.family == Family::cast) {
      for (std::int64_t k = 0; k < at.cols; ++k) {
        const std::uint16_t half = format.encoder == Encoder::fp16
                                       ? stochastic_fp16(row[k], words[k])
                                       : stochastic_bf16(row[k], words[k]);
        std::memcpy(codes + 2 * k, &half, sizeof(half));
      }
      continue;
    }
    for (std::int64_t g = 0; g < at.groups_per_row; ++g) {
      const std::int64_t first = g * at.group;
      encode_group(format, row.data() + first, words.data() + first,
                   std::min(at.group, at.cols - first), codes + first,
                   out.scales + 4 * (r * at.groups_per_row + g));
    }
  }
}

}  // namespace vramkit::cpu
