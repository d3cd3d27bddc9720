// The scalar reference: every kernel as plainly as it can be said. Vector units are tested against
// it, bit for bit where the result is codes and by an error bound where it is a sum.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/half.hpp"
#include "cpu/encode.hpp"
#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

float load(const void* base, DType type, std::int64_t i) {
  switch (type) {
    case DType::f32:
      return static_cast<const float*>(base)[i];
    case DType::bf16:
      return bf16_to_float(static_cast<const std::uint16_t*>(base)[i]);
    case DType::f16:
      return fp16_to_float(static_cast<const std::uint16_t*>(base)[i]);
  }
  return 0.0f;
}

void store(void* base, DType type, std::int64_t i, float value) {
  switch (type) {
    case DType::f32:
      static_cast<float*>(base)[i] = value;
      break;
    case DType::bf16:
      static_cast<std::uint16_t*>(base)[i] = float_to_bf16(value);
      break;
    case DType::f16:
      static_cast<std::uint16_t*>(base)[i] = float_to_fp16(value);
      break;
  }
}

template <class T>
T read(const std::uint8_t* bytes, std::int64_t i) {
  T value;
  std::memcpy(&value, bytes + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void write(std::uint8_t* bytes, std::int64_t i, T value) {
  std::memcpy(bytes + i * static_cast<std::int64_t>(sizeof(T)), &value, sizeof(T));
}

std::uint32_t read_code(const std::uint8_t* row, std::int64_t bits, std::int64_t i) {
  if (bits == 8) return row[i];
  return i % 2 == 0 ? row[i / 2] >> 4 : row[i / 2] & 15u;
}

void write_code(std::uint8_t* row, std::int64_t bits, std::int64_t i, std::uint32_t code) {
  if (bits == 8) {
    row[i] = static_cast<std::uint8_t>(code);
  } else if (i % 2 == 0) {
    row[i / 2] = static_cast<std::uint8_t>(code << 4);
  } else {
    row[i / 2] = static_cast<std::uint8_t>(row[i / 2] | code);
  }
}

float absmax_of(const float* x, std::int64_t count) {
  float most = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(x[i])) return std::nanf("");
    most = std::max(most, std::fabs(x[i]));
  }
  return most;
}

std::uint32_t nearest_code(const SortedTable& sorted, float y) {
  std::size_t k = 0;
  while (k < sorted.bounds.size() && y > sorted.bounds[k]) ++k;
  return sorted.code_of[k];
}

// Largest value of the code, so that absmax / it is the scale.
float code_max(const Format& format) {
  if (format.encoder == Encoder::e4m3) return 448.0f;
  if (format.encoder == Encoder::e5m2) return 57344.0f;
  return format.family == Family::affine ? 127.0f : 1.0f;
}

// The code of a number that has been divided by its scale, for all encoders but `searched`.
std::uint32_t scaled_code(const Format& format, const SortedTable& sorted, float y) {
  switch (format.encoder) {
    case Encoder::midpoint:
      return nearest_code(sorted, std::clamp(y, -1.0f, 1.0f));
    case Encoder::e4m3:
      return float_to_e4m3(y);
    case Encoder::e5m2:
      return float_to_e5m2(y);
    default: {
      const float q = std::clamp(std::nearbyintf(y), -127.0f, 127.0f);
      return static_cast<std::uint8_t>(static_cast<std::int8_t>(q));
    }
  }
}

// Encodes one group of `count` floats that starts at element `first` of the row. Returns the scale.
void encode_group(const Format& format, const SortedTable& sorted, const float* x,
                  std::int64_t count, std::uint8_t* codes, std::int64_t first, std::uint8_t* scales,
                  std::uint8_t* extra, std::int64_t group) {
  const float absmax = absmax_of(x, count);
  if (std::isnan(absmax)) {  // all of the group decodes to NaN, whatever its codes
    if (format.scale == ScaleType::f16) {
      write<std::uint16_t>(scales, group, 0x7e00);
    } else {
      write<float>(scales, group, absmax);
    }
    if (format.zero_point) extra[group] = 0;
    for (std::int64_t i = 0; i < count; ++i) write_code(codes, format.bits, first + i, 0);
    return;
  }
  if (format.encoder == Encoder::searched && format.bits == 4) {
    const auto [low, high] = std::minmax_element(x, x + count);
    const Affine4 fit = search_affine4(*low, *high, LevelScorer(x, count));
    write<std::uint16_t>(scales, group, fit.scale);
    extra[group] = fit.zero;
    for (std::int64_t i = 0; i < count; ++i) {
      write_code(codes, 4, first + i, affine4_code(x[i], fit));
    }
    return;
  }
  const float most = code_max(format);
  Scale8 fit{.scale = most == 1.0f ? absmax : absmax / most, .factor = encode_factor(absmax, most)};
  if (format.encoder == Encoder::searched) fit = search_scale8(absmax, LevelScorer(x, count));
  write<float>(scales, group, fit.scale);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t code = scaled_code(format, sorted, x[i] * fit.factor);
    write_code(codes, format.bits, first + i, code);
  }
}

void quantize(const Format& format, const SortedTable& sorted, const Layout& at, const void* x,
              DType type, std::int64_t stride, Parts out, std::int64_t begin, std::int64_t end) {
  std::vector<float> row(at.cols);
  const std::int64_t scale_bytes = format.scale == ScaleType::f16 ? 2 : 4;
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t k = 0; k < at.cols; ++k) row[k] = load(x, type, r * stride + k);
    std::uint8_t* codes = out.codes + r * at.row_code_bytes;
    if (format.family == Family::cast) {
      for (std::int64_t k = 0; k < at.cols; ++k) {
        write<std::uint16_t>(
            codes, k,
            format.encoder == Encoder::fp16 ? float_to_fp16(row[k]) : float_to_bf16(row[k]));
      }
      continue;
    }
    for (std::int64_t g = 0; g < at.groups_per_row; ++g) {
      const std::int64_t first = g * at.group;
      const std::int64_t row_group = r * at.groups_per_row;
      encode_group(format, sorted, row.data() + first, std::min(at.group, at.cols - first), codes,
                   first, out.scales + row_group * scale_bytes,
                   out.extra ? out.extra + row_group : nullptr, g);
    }
  }
}

float scale_of(const Weight& w, std::int64_t index) {
  switch (w.format->scale) {
    case ScaleType::f32:
      return read<float>(w.scales, index);
    case ScaleType::f16:
      return fp16_to_float(read<std::uint16_t>(w.scales, index));
    case ScaleType::nested: {
      const std::int64_t outer = (w.first_scale + index) / kNestedBlock;
      // Two roundings, as bitsandbytes does it: no contraction into a fused multiply-add.
      const float product = dynamic_map()[w.scales[index]] * read<float>(w.extra, outer);
      return product + read<float>(w.nested_offset, 0);
    }
    case ScaleType::none:
      break;
  }
  return 1.0f;
}

float value_of(const Weight& w, std::int64_t row, std::int64_t col) {
  const Format& format = *w.format;
  const std::uint8_t* codes = w.codes + row * w.at.row_code_bytes;
  if (format.family == Family::cast) {
    const auto half = read<std::uint16_t>(codes, col);
    return format.encoder == Encoder::fp16 ? fp16_to_float(half) : bf16_to_float(half);
  }
  const std::uint32_t code = read_code(codes, format.bits, col);
  const std::int64_t group = row * w.at.groups_per_row + col / w.at.group;
  const float scale = scale_of(w, group);
  if (format.family == Family::codebook) return w.table[code] * scale;
  if (format.bits == 8) return static_cast<float>(static_cast<std::int8_t>(code)) * scale;
  return static_cast<float>(static_cast<int>(code) - static_cast<int>(w.extra[group])) * scale;
}

void dequantize(const Weight& weight, std::int64_t begin, std::int64_t end, void* out, DType type,
                std::int64_t stride) {
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t k = 0; k < weight.at.cols; ++k) {
      store(out, type, (r - begin) * stride + k, value_of(weight, r, k));
    }
  }
}

void linear(const Weight& weight, const void* x, DType type, std::int64_t count,
            std::int64_t x_stride, const float* bias, void* out, std::int64_t out_stride,
            std::int64_t begin, std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) {
    for (std::int64_t i = 0; i < count; ++i) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < weight.at.cols; ++k) {
        sum += load(x, type, i * x_stride + k) * value_of(weight, n, k);
      }
      store(out, type, i * out_stride + n, sum + (bias ? bias[n] : 0.0f));
    }
  }
}

void feedback(const Feedback& job, std::int64_t begin, std::int64_t end) {
  const Format& format = *job.format;
  const std::int64_t cols = job.cols;
  std::vector<float> error(cols);
  for (std::int64_t r = begin; r < end; ++r) {
    const float* x = job.x + r * cols;
    std::uint8_t* codes = job.codes + r * cols;
    const auto at = [&](std::int64_t col) { return r * job.groups + col / job.group; };
    const auto value = [&](std::int64_t col) {
      const float scale = job.scales[at(col)];
      if (format.family == Family::codebook) return format.table[codes[col]] * scale;
      if (format.bits == 8) {
        return static_cast<float>(static_cast<std::int8_t>(codes[col])) * scale;
      }
      return (static_cast<float>(codes[col]) - job.zeros[at(col)]) * scale;
    };
    for (std::int64_t k = 0; k < cols; ++k) {
      const std::int64_t col = job.order[k];
      error[k] = job.resume ? x[col] - value(col) : 0.0f;
    }
    for (std::int64_t k = 0; k < cols; ++k) {
      const std::int64_t first = k / kFeedbackBlock * kFeedbackBlock;
      const std::int64_t last = std::min(first + kFeedbackBlock, cols);
      const std::int64_t col = job.order[k];
      float target = x[col];
      const auto add = [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t j = from; j < to; ++j) {
          target = std::fma(job.coefficients[k * cols + j], error[j], target);
        }
      };
      add(0, first);
      if (job.resume) add(last, cols);
      add(first, k);
      if (job.resume) add(k + 1, last);
      const float factor = inverse_scale(job.scales[at(col)]);
      if (format.zero_point) {
        codes[col] = static_cast<std::uint8_t>(affine4_level(target, factor, job.zeros[at(col)]));
      } else {
        codes[col] = static_cast<std::uint8_t>(scaled_code(format, *job.sorted, target * factor));
      }
      error[k] = x[col] - value(col);
    }
  }
}

std::int64_t spin(DType, std::int64_t rounds) {
  volatile float x = 0.0f;
  float sum = 0.0f;
  for (std::int64_t r = 0; r < rounds; ++r) sum += x * x;
  volatile float sink = sum;
  (void)sink;
  return rounds;
}

}  // namespace
}  // namespace vramkit::cpu

#include "cpu/int8_reference.hpp"
#include "cpu/multi_reference.hpp"
#include "cpu/recurrent_reference.hpp"

namespace vramkit::cpu {

SortedTable sort_table(const std::vector<float>& table) {
  std::vector<std::uint8_t> order(table.size());
  std::iota(order.begin(), order.end(), std::uint8_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::uint8_t a, std::uint8_t b) { return table[a] < table[b]; });
  SortedTable sorted{.bounds = {}, .code_of = order};
  for (std::size_t k = 0; k + 1 < table.size(); ++k) {
    sorted.bounds.push_back((table[order[k]] + table[order[k + 1]]) / 2.0f);
  }
  return sorted;
}

const Kernels& reference_kernels() {
  static const Kernels kernels{"scalar",
                               quantize,
                               dequantize,
                               linear,
                               {quantize_int8, sums_int8, product_int8, spin_int8},
                               feedback,
                               recur,
                               {square_sum, scale_values, cast_values, adamw},
                               spin};
  return kernels;
}

}  // namespace vramkit::cpu
