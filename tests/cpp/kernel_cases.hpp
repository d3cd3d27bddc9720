// What the tests of the kernels run on: formats (the built-in ones and others that reach every
// path), matrices whose content is hard to encode, stored weights of random bits, and guarded
// memory.
//
// To cover a new format, add it to all_formats().
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/format.hpp"
#include "core/half.hpp"
#include "cpu/kernels.hpp"

namespace vramkit::cpu {

inline constexpr std::int64_t kCols[] = {1,  2,   7,   31,  33,  63,  64,
                                         65, 127, 128, 129, 200, 384, 1000};
inline constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
inline constexpr float kInf = std::numeric_limits<float>::infinity();

inline std::vector<NamedFormat> all_formats() {
  std::vector<NamedFormat> all(builtin_formats().begin(), builtin_formats().end());
  const auto add = [&](const std::string& name, const std::string& like, auto change) {
    Format format = builtin_format(like);
    change(format);
    format.validate();
    all.push_back({name, format});
  };
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> table16(16), table256(256);
  for (float& value : table16) value = uniform(random);
  for (float& value : table256) value = uniform(random);
  // Unsorted, with equal values and with both ends of the range more than once.
  table16[3] = table16[9] = 1.0f;
  table16[4] = table16[11];
  table256[100] = table256[200] = -1.0f;
  table256[17] = table256[18] = table256[19];
  table256[255] = table256[254] = 1.0f;
  add("custom16", "nf4", [&](Format& f) { f.table = table16; });
  const auto bytes = [&](Format& f) {
    f.bits = 8;
    f.table = table256;
  };
  add("custom256", "nf4", bytes);
  // Groups that begin in the middle of a byte, and are shorter than a vector.
  add("custom16_g5", "nf4", [&](Format& f) {
    f.table = table16;
    f.grain = Grain::group;
    f.block = 5;
  });
  add("custom16_g27", "nf4", [&](Format& f) {
    f.table = table16;
    f.grain = Grain::group;
    f.block = 27;
  });
  add("custom256_row", "nf4", [&](Format& f) {
    bytes(f);
    f.grain = Grain::row;
    f.block = 0;
  });
  add("custom256_dq", "nf4_dq", bytes);
  add("nf4_row", "nf4", [](Format& f) {
    f.grain = Grain::row;
    f.block = 0;
  });
  add("int4_g3", "int4", [](Format& f) { f.block = 3; });
  add("int8_g48", "int8", [](Format& f) {
    f.grain = Grain::group;
    f.block = 48;
  });
  add("int8_absmax", "int8", [](Format& f) { f.encoder = Encoder::symmetric; });
  add("fp8_g32", "fp8", [](Format& f) {
    f.grain = Grain::group;
    f.block = 32;
  });
  return all;
}

// Memory of `size` bytes, `offset` bytes past an aligned address, between guards that `intact`
// looks at.
class Buffer {
 public:
  explicit Buffer(std::int64_t size, std::int64_t offset = 0)
      : size_(size), offset_(offset), data_(new std::uint8_t[size + offset + kGuard]) {
    std::fill_n(data_.get(), size + offset + kGuard, kFill);
  }
  std::uint8_t* data() const { return data_.get() + offset_; }
  std::int64_t size() const { return size_; }
  bool intact() const {
    const auto untouched = [](std::uint8_t byte) { return byte == kFill; };
    return std::all_of(data_.get(), data_.get() + offset_, untouched) &&
           std::all_of(data() + size_, data() + size_ + kGuard, untouched);
  }
  bool operator==(const Buffer& other) const {
    return size_ == other.size_ && std::equal(data(), data() + size_, other.data());
  }

 private:
  static constexpr std::int64_t kGuard = 64;
  static constexpr std::uint8_t kFill = 0xa5;
  std::int64_t size_, offset_;
  std::unique_ptr<std::uint8_t[]> data_;
};

inline float read(const std::uint8_t* p, DType type, std::int64_t i) {
  if (type == DType::f32) {
    float value;
    std::memcpy(&value, p + 4 * i, 4);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, p + 2 * i, 2);
  return type == DType::bf16 ? bf16_to_float(half) : fp16_to_float(half);
}

inline void write(std::uint8_t* p, DType type, std::int64_t i, float value) {
  if (type == DType::f32) {
    std::memcpy(p + 4 * i, &value, 4);
    return;
  }
  const std::uint16_t half = type == DType::bf16 ? float_to_bf16(value) : float_to_fp16(value);
  std::memcpy(p + 2 * i, &half, 2);
}

enum class Content { normal, ties, small, mixed, broken };
inline constexpr Content kContents[] = {Content::normal, Content::ties, Content::small,
                                        Content::mixed, Content::broken};

// One number of a weight. The kinds aim at what encoders get wrong: exact ties, subnormal numbers,
// groups of zeros, of one sign, of a constant, of huge numbers, and NaN or infinity.
inline float number(Content content, const Format& format, std::int64_t group,
                    std::mt19937& random) {
  const float normal = std::normal_distribution<float>(0.0f, 0.05f)(random);
  switch (content) {
    case Content::normal:
      return normal;
    case Content::ties: {
      if (!format.table.empty() && std::fabs(format.table[1]) <= 1.0f && random() % 2) {
        const auto& t = format.table;
        return (t[random() % t.size()] + t[random() % t.size()]) / 2.0f;
      }
      return static_cast<float>(static_cast<int>(random() % 511) - 255) / 2.0f;
    }
    case Content::small:
      return normal * (group % 2 == 0 ? 1e-37f : 1e-43f);
    case Content::mixed: {
      const float constants[] = {0.0f, -0.0f, 0.75f, -3.0f, 1e-45f};
      const std::int64_t kind = group % 9;
      if (kind < 5) return constants[kind];
      if (kind == 5) return std::fabs(normal);
      if (kind == 6) return -std::fabs(normal) - 1.0f;
      if (kind == 7) return random() % 50 == 0 ? 40.0f : normal;
      return normal * 2e38f * 10.0f;  // up to the largest floats, and some infinities
    }
    case Content::broken: {
      const float values[] = {std::nanf(""), -std::nanf(""), kInf, -kInf,
                              std::bit_cast<float>(0x7f812345u)};
      return random() % 97 == 0 ? values[random() % 5] : normal;
    }
  }
  return 0.0f;
}

struct Matrix {
  std::int64_t rows, cols, stride;
  DType type;
  Buffer bytes;
};

inline Matrix make_matrix(Content content, const Format& format, std::int64_t rows,
                          std::int64_t cols, DType type, std::int64_t padding,
                          std::mt19937& random) {
  const std::int64_t stride = cols + padding;
  Matrix m{rows, cols, stride, type,
           Buffer(std::max<std::int64_t>(rows * stride, 1) * size_of(type))};
  const std::int64_t group = format.block > 0 ? format.block : cols;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < cols; ++k) {
      write(m.bytes.data(), type, r * stride + k,
            number(content, format, r * 3 + (group ? k / group : 0), random));
    }
  }
  return m;
}

// The parts that a quantize call writes: nested scales come as float32.
struct Encoded {
  Layout at;
  Buffer codes, scales, extra;
  Encoded(const Format& format, std::int64_t rows, std::int64_t cols, std::int64_t offset)
      : at(format.layout(rows, cols)),
        codes(rows * at.row_code_bytes, offset),
        scales(rows * at.groups_per_row * (format.scale == ScaleType::f16 ? 2 : 4), offset),
        extra(format.zero_point ? rows * at.groups_per_row : 0, offset) {}
};

inline void encode(const Kernels& kernels, const Format& format, const SortedTable& sorted,
                   const Matrix& m, Encoded& to, std::int64_t begin, std::int64_t end) {
  kernels.quantize(format, sorted, to.at, m.bytes.data(), m.type, m.stride,
                   {to.codes.data(), to.scales.data(), to.extra.data()}, begin, end);
}

inline SortedTable sorted_of(const Format& format) {
  return format.encoder == Encoder::midpoint ? sort_table(format.table) : SortedTable{};
}

// A weight with random codes and scales: any bits that a checkpoint may hold.
struct Stored {
  const Format& format;
  Buffer codes, scales, extra, offset;
  Weight weight;
  Stored(const Format& f, std::int64_t rows, std::int64_t cols, std::mt19937& random)
      : format(f),
        codes(rows * f.layout(rows, cols).row_code_bytes, 1),
        scales(groups(rows, cols) * (f.scale == ScaleType::f32   ? 4
                                     : f.scale == ScaleType::f16 ? 2
                                                                 : 1),
               1),
        extra(f.zero_point                   ? groups(rows, cols)
              : f.scale == ScaleType::nested ? 4 * ((groups(rows, cols) + 700) / 256 + 1)
                                             : 0,
              3),
        offset(4, 1) {
    std::uniform_real_distribution<float> scale(0.001f, 0.1f);
    for (std::int64_t i = 0; i < codes.size(); ++i) codes.data()[i] = byte(random);
    if (f.family == Family::cast) {
      for (std::int64_t i = 0; i < codes.size() / 2; ++i) {
        write(codes.data(), f.encoder == Encoder::fp16 ? DType::f16 : DType::bf16, i,
              scale(random) * 20.0f - 1.0f);
      }
    }
    for (std::int64_t i = 0; i < groups(rows, cols); ++i) {
      if (f.scale == ScaleType::f32) write(scales.data(), DType::f32, i, scale(random));
      if (f.scale == ScaleType::f16) write(scales.data(), DType::f16, i, scale(random));
      if (f.scale == ScaleType::nested) scales.data()[i] = byte(random);
      if (f.zero_point) extra.data()[i] = i % 7 == 0 ? byte(random) : byte(random) & 15;
    }
    if (f.scale == ScaleType::nested) {
      for (std::int64_t i = 0; i < extra.size() / 4; ++i) {
        write(extra.data(), DType::f32, i, scale(random) * 0.1f);
      }
    }
    write(offset.data(), DType::f32, 0, 0.05f);
    weight = {.format = &format,
              .at = format.layout(rows, cols),
              .codes = codes.data(),
              .scales = scales.data(),
              .extra = extra.data(),
              .table = format.table.data(),
              .first_scale = f.scale == ScaleType::nested ? 253 : 0,
              .nested_offset = offset.data()};
  }
  Stored(const Stored&) = delete;

 private:
  static std::uint8_t byte(std::mt19937& random) { return static_cast<std::uint8_t>(random()); }
  std::int64_t groups(std::int64_t rows, std::int64_t cols) const {
    return rows * format.layout(rows, cols).groups_per_row;
  }
};

// FP8 codes of NaN and infinity, which checkpoints should not hold, spoil sums.
inline void keep_finite(Stored& stored) {
  const Format& f = stored.format;
  if (f.family != Family::codebook || f.bits != 8) return;
  for (std::int64_t i = 0; i < stored.codes.size(); ++i) {
    std::uint8_t& code = stored.codes.data()[i];
    if (!std::isfinite(f.table[code])) code ^= 0x60;
  }
}

}  // namespace vramkit::cpu
