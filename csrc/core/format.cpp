#include "core/format.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/error.hpp"
#include "core/half.hpp"

namespace vramkit {
namespace {

std::int64_t multiply(std::int64_t a, std::int64_t b) {
  std::int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw InvalidArgument("shape is too large: its size does not fit into 63 bits");
  }
  return product;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

std::int64_t scale_bytes(ScaleType type) {
  switch (type) {
    case ScaleType::none:
      return 0;
    case ScaleType::f32:
      return 4;
    case ScaleType::f16:
      return 2;
    case ScaleType::nested:
      return 1;
  }
  throw InvalidArgument("unknown scale type");
}

std::vector<float> small_float_table(float (*decode)(std::uint8_t)) {
  std::vector<float> table(256);
  for (int code = 0; code < 256; ++code) table[code] = decode(static_cast<std::uint8_t>(code));
  return table;
}

std::vector<NamedFormat> make_builtin() {
  std::vector<NamedFormat> all;
  auto cast = [&](const char* name, Encoder encoder) {
    all.push_back({name, {.family = Family::cast, .bits = 16, .encoder = encoder}});
  };
  auto rows8 = [&](const char* name, Family family, Encoder encoder, std::vector<float> table) {
    all.push_back({name,
                   {.family = family,
                    .bits = 8,
                    .grain = Grain::row,
                    .scale = ScaleType::f32,
                    .encoder = encoder,
                    .table = std::move(table)}});
  };
  auto int4 = [&](const char* name, std::int64_t group) {
    all.push_back({name,
                   {.family = Family::affine,
                    .bits = 4,
                    .grain = Grain::group,
                    .block = group,
                    .scale = ScaleType::f16,
                    .encoder = Encoder::searched,
                    .zero_point = true}});
  };
  auto table4 = [&](const char* name, ScaleType scale, const std::array<float, 16>& table) {
    all.push_back({name,
                   {.family = Family::codebook,
                    .bits = 4,
                    .grain = Grain::flat,
                    .block = 64,
                    .scale = scale,
                    .encoder = Encoder::midpoint,
                    .table = {table.begin(), table.end()}}});
  };
  cast("fp16", Encoder::fp16);
  cast("bf16", Encoder::bf16);
  rows8("fp8", Family::codebook, Encoder::e4m3, small_float_table(e4m3_to_float));
  rows8("fp8_e5m2", Family::codebook, Encoder::e5m2, small_float_table(e5m2_to_float));
  rows8("int8", Family::affine, Encoder::searched, {});
  int4("int4", 128);
  int4("int4_g96", 96);
  int4("int4_g64", 64);
  int4("int4_g32", 32);
  int4("int4_g16", 16);
  table4("nf4", ScaleType::f32, kNf4Table);
  table4("nf4_dq", ScaleType::nested, kNf4Table);
  table4("fp4", ScaleType::f32, kFp4Table);
  for (const auto& named : all) named.format.validate();
  return all;
}

// torch.linspace in float32: from both ends towards the middle, the product not rounded.
std::vector<float> linspace(float start, float end, int steps) {
  std::vector<float> values(steps);
  const float step = (end - start) / static_cast<float>(steps - 1);
  for (int i = 0; i < steps; ++i) {
    values[i] = i < steps / 2 ? std::fma(step, static_cast<float>(i), start)
                              : std::fma(-step, static_cast<float>(steps - 1 - i), end);
  }
  return values;
}

std::array<float, 256> make_dynamic_map(bool with_sign) {
  std::vector<float> values{0.0f, 1.0f};
  for (int i = 0; i < 7; ++i) {
    const auto bounds = linspace(0.1f, 1.0f, (1 << (with_sign ? i : i + 1)) + 1);
    const auto power = static_cast<float>(std::pow(10.0, i - 6));
    for (std::size_t k = 0; k + 1 < bounds.size(); ++k) {
      const float value = power * ((bounds[k] + bounds[k + 1]) / 2.0f);
      values.push_back(value);
      if (with_sign) values.push_back(-value);
    }
  }
  std::sort(values.begin(), values.end());
  std::array<float, 256> map;
  std::copy(values.begin(), values.end(), map.begin());
  return map;
}

}  // namespace

const std::array<float, 16> kNf4Table = {-1.0f,
                                         -0.6961928009986877f,
                                         -0.5250730514526367f,
                                         -0.39491748809814453f,
                                         -0.28444138169288635f,
                                         -0.18477343022823334f,
                                         -0.09105003625154495f,
                                         0.0f,
                                         0.07958029955625534f,
                                         0.16093020141124725f,
                                         0.24611230194568634f,
                                         0.33791524171829224f,
                                         0.44070982933044434f,
                                         0.5626170039176941f,
                                         0.7229568362236023f,
                                         1.0f};
// Code 8 is bitsandbytes' negative zero; its table holds +0 there.
const std::array<float, 16> kFp4Table = {
    0.0f, 1.0f / 192,  2.0f / 3,  1.0f,  1.0f / 3,  0.5f,  1.0f / 6,  0.25f,
    0.0f, -1.0f / 192, -2.0f / 3, -1.0f, -1.0f / 3, -0.5f, -1.0f / 6, -0.25f};

const std::array<float, 256>& dynamic_map() {
  static const std::array<float, 256> map = make_dynamic_map(true);
  return map;
}

const std::array<float, 256>& unsigned_dynamic_map() {
  static const std::array<float, 256> map = make_dynamic_map(false);
  return map;
}

void Format::validate() const {
  auto require = [](bool condition, const char* what) {
    if (!condition) throw InvalidArgument(std::string("storage format: ") + what);
  };
  const bool has_scale = scale != ScaleType::none;
  require(has_scale == (grain != Grain::none), "scales and what shares them go together");
  require((grain == Grain::group || grain == Grain::flat) == (block > 0),
          "block is the size of a group or flat block, and 0 elsewhere");
  switch (family) {
    case Family::cast:
      require(bits == 16 && !has_scale && (encoder == Encoder::fp16 || encoder == Encoder::bf16),
              "a cast stores float16 or bfloat16 without scales");
      break;
    case Family::codebook:
      require(bits == 4 || bits == 8, "a codebook has codes of 4 or 8 bits");
      if (table.size() != std::size_t{1} << bits) {
        throw InvalidArgument("storage format: a codebook of " + std::to_string(bits) +
                              "-bit codes needs a table of " + std::to_string(1 << bits) +
                              " values, got " + std::to_string(table.size()));
      }
      require(has_scale, "a codebook needs scales");
      require(encoder == Encoder::midpoint ||
                  (bits == 8 && (encoder == Encoder::e4m3 || encoder == Encoder::e5m2)),
              "a codebook is encoded by midpoints, an FP8 one by rounding to nearest even");
      if (encoder == Encoder::midpoint) {
        for (const float value : table) {
          require(std::isfinite(value) && std::fabs(value) <= 1.0f,
                  "codebook values are finite and between -1 and 1");
        }
      }
      break;
    case Family::affine:
      require(bits == 4 || bits == 8, "affine codes have 4 or 8 bits");
      require(has_scale, "affine codes need scales");
      require(encoder == Encoder::searched || (bits == 8 && encoder == Encoder::symmetric),
              "affine scales are searched, 8-bit ones may be those of the largest magnitude");
      require(zero_point == (bits == 4), "4-bit affine codes have a zero point, 8-bit ones none");
      break;
  }
  require(grain != Grain::flat || block % 2 == 0, "flat blocks have an even size");
  require(scale != ScaleType::nested || grain == Grain::flat,
          "nested scales belong to flat blocks");
}

bool Format::row_separable(std::int64_t cols) const {
  return grain != Grain::flat || cols % block == 0;
}

Layout Format::layout(std::int64_t rows, std::int64_t cols) const {
  if (!row_separable(cols)) {
    throw InvalidArgument("rows of " + std::to_string(cols) + " elements share blocks of " +
                          std::to_string(block));
  }
  Layout at{.rows = rows, .cols = cols};
  at.row_code_bytes = ceil_div(multiply(cols, bits), 8);
  if (grain == Grain::row) {
    at.group = cols;
    at.groups_per_row = 1;
  } else if (grain != Grain::none) {
    at.group = block;
    at.groups_per_row = ceil_div(cols, block);
  }
  return at;
}

PartBytes Format::bytes(std::span<const std::int64_t> shape) const {
  const Matrix matrix = as_matrix(shape);
  const std::int64_t count = multiply(matrix.rows, matrix.cols);
  PartBytes size;
  std::int64_t groups = 0;
  if (grain == Grain::flat) {
    size.codes = ceil_div(multiply(count, bits), 8);
    groups = ceil_div(count, block);
  } else {
    const Layout at = layout(matrix.rows, matrix.cols);
    size.codes = multiply(at.rows, at.row_code_bytes);
    groups = multiply(at.rows, at.groups_per_row);
  }
  size.scales = multiply(groups, scale_bytes(scale));
  if (zero_point) size.extra = groups;
  if (scale == ScaleType::nested) size.extra = 4 * (ceil_div(groups, kNestedBlock) + 1);
  return size;
}

Format format_from_spec(std::span<const std::int64_t> spec, std::vector<float> table) {
  if (spec.size() != 7) {
    throw InvalidArgument("a format's spec has 7 numbers, got " + std::to_string(spec.size()));
  }
  Format format{.family = static_cast<Family>(spec[0]),
                .bits = spec[1],
                .grain = static_cast<Grain>(spec[2]),
                .block = spec[3],
                .scale = static_cast<ScaleType>(spec[4]),
                .encoder = static_cast<Encoder>(spec[5]),
                .zero_point = spec[6] != 0,
                .table = std::move(table)};
  format.validate();
  return format;
}

std::vector<std::int64_t> spec_of(const Format& format) {
  return {static_cast<std::int64_t>(format.family),
          format.bits,
          static_cast<std::int64_t>(format.grain),
          format.block,
          static_cast<std::int64_t>(format.scale),
          static_cast<std::int64_t>(format.encoder),
          format.zero_point ? 1 : 0};
}

std::span<const NamedFormat> builtin_formats() {
  static const std::vector<NamedFormat> all = make_builtin();
  return all;
}

const Format& builtin_format(const std::string& name) {
  for (const auto& named : builtin_formats()) {
    if (named.name == name) return named.format;
  }
  throw InvalidArgument("unknown storage format '" + name + "'");
}

Matrix as_matrix(std::span<const std::int64_t> shape) {
  std::int64_t cols = 1;
  for (const std::int64_t size : shape) {
    if (size < 0) throw InvalidArgument("shape has a negative dimension");
  }
  for (std::size_t i = shape.size() > 1 ? 1 : 0; i < shape.size(); ++i) {
    cols = multiply(cols, shape[i]);
  }
  return {shape.size() > 1 ? shape[0] : 1, cols};
}

}  // namespace vramkit
