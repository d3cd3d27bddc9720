// Storage formats as data: how one weight lies in memory, and exactly how many bytes that takes.
//
// A weight of any rank is seen as a matrix [rows, cols]: rows = shape[0], cols = the product of the
// rest. It is stored as up to three plain byte arrays:
//
//   codes   the quantized elements, row by row. Two 4-bit codes share a byte, the first element in
//           the high nibble; an odd row ends with half a byte unused.
//   scales  what multiplies the decoded codes, one per row, group or block (float32, float16, or
//           an 8-bit code when scales are themselves quantized).
//   extra   int4: a uint8 zero point per group. Nested scales: float32 absmax per 256 scales, and
//           the float32 offset as the last entry. Empty elsewhere.
//
// A value is code_value * scale for codebooks, (code - zero) * scale for affine codes.
// docs/formats.md holds the same facts for readers of files.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace vramkit {

enum class Family : std::int64_t {
  cast = 0,      // the element itself in a 16-bit float type, no scale
  codebook = 1,  // the code indexes a table of 16 or 256 floats
  affine = 2,    // the code is an integer
};

// Which elements share one scale.
enum class Grain : std::int64_t {
  none = 0,
  row = 1,    // one scale per row
  group = 2,  // `block` consecutive elements of one row; a row's last group may be short
  flat = 3,   // `block` consecutive elements of the flattened tensor (bitsandbytes' blocks)
};

enum class ScaleType : std::int64_t { none = 0, f32 = 1, f16 = 2, nested = 3 };

// How a number becomes a code.
enum class Encoder : std::int64_t {
  midpoint = 0,  // number of midpoints between sorted neighbours below x: a tie takes the lower
  e4m3 = 1,      // to nearest even, saturating
  e5m2 = 2,
  fp16 = 3,  // to nearest even
  bf16 = 4,
  symmetric = 5,  // rint(x * (127 / absmax))
  searched = 6,   // scale, and zero point of 4 bits, that minimize the squared error of the group
};

inline constexpr std::int64_t kNestedBlock = 256;  // scales that share one nested absmax

struct Layout {
  std::int64_t rows = 0, cols = 0;
  std::int64_t group = 0;           // elements that share a scale, within a row
  std::int64_t groups_per_row = 0;  // 0 without scales
  std::int64_t row_code_bytes = 0;
};

struct PartBytes {
  std::int64_t codes = 0, scales = 0, extra = 0;
  std::int64_t total() const { return codes + scales + extra; }
};

struct Format {
  Family family = Family::cast;
  std::int64_t bits = 16;
  Grain grain = Grain::none;
  std::int64_t block = 0;
  ScaleType scale = ScaleType::none;
  Encoder encoder = Encoder::fp16;
  bool zero_point = false;
  std::vector<float> table;  // codebooks: value by code, largest magnitude 1 (FP8: its own values)

  // Throws InvalidArgument if the fields contradict each other.
  void validate() const;
  // Exact bytes of each part for a weight of this shape. Throws InvalidArgument for a negative
  // dimension or a size past 2^63.
  PartBytes bytes(std::span<const std::int64_t> shape) const;
  // Do rows start at a byte and at a block of their own, so that the parts are [rows, …] arrays
  // and can be sharded or gathered by row? Only flat blocks that cross rows say no.
  bool row_separable(std::int64_t cols) const;
  // Where a row's codes and scales lie. Only for row_separable(cols); flat blocks that cross rows
  // are handled as a [blocks, block] matrix and a short last row (csrc/ops/weight.hpp).
  Layout layout(std::int64_t rows, std::int64_t cols) const;
};

// A format as the seven integers that Python and the operators pass around: family, bits, grain,
// block, scale type, encoder, zero point. Throws InvalidArgument for any other number of them, and
// for fields that contradict each other.
Format format_from_spec(std::span<const std::int64_t> spec, std::vector<float> table);
std::vector<std::int64_t> spec_of(const Format& format);

struct NamedFormat {
  std::string name;
  Format format;
};

// The formats that are always there, by name: fp16 bf16 fp8 fp8_e5m2 int8 int4 int4_g96 int4_g64
// int4_g32 int4_g16 nf4 nf4_dq fp4.
std::span<const NamedFormat> builtin_formats();
const Format& builtin_format(const std::string& name);  // throws InvalidArgument

// NF4 values (QLoRA, appendix E) and bitsandbytes' FP4 values, by code.
extern const std::array<float, 16> kNf4Table;
extern const std::array<float, 16> kFp4Table;
// The signed 8-bit dynamic map that quantizes nested scales (Dettmers et al., 8-bit optimizers).
const std::array<float, 256>& dynamic_map();
// Its unsigned twin, for the second moments of 8-bit optimizer state.
const std::array<float, 256>& unsigned_dynamic_map();

// rows and cols of a shape; a scalar or vector is one row. Throws InvalidArgument.
struct Matrix {
  std::int64_t rows, cols;
};
Matrix as_matrix(std::span<const std::int64_t> shape);

}  // namespace vramkit
