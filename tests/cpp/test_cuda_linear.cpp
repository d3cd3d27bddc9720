// The bodies of the CUDA kernels that multiply by stored weights (csrc/cuda/gemv.hpp,
// mma_tiles.hpp), run on the host over an emulated grid against products in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/format.hpp"
#include "cpu/kernels.hpp"
#include "cuda/gemv.hpp"
#include "cuda/mma_tiles.hpp"
#include "emulated_grid.hpp"

namespace vramkit::testing {
namespace {

using cuda::Codes;
using cuda::Element;
using cuda::Operand;
using cuda::ProductJob;
using cuda::ProductKernel;

constexpr double kUnit32 = 0x1p-24;
constexpr double kUnit[] = {kUnit32, 0x1p-8, 0x1p-11};  // by Element

Codes codes_of(const Format& format) {
  if (format.family == Family::cast) {
    return format.encoder == Encoder::fp16 ? Codes::fp16 : Codes::bf16;
  }
  if (format.family == Family::codebook) return format.bits == 4 ? Codes::table4 : Codes::table8;
  return format.bits == 4 ? Codes::affine4 : Codes::integer8;
}

template <Codes C, Operand O>
void run_few(const ProductJob& job, const cuda::NestedMap& nested, int warps) {
  const int width = cuda::whole_columns(cuda::kFewColumns, job.parts);
  Grid grid;
  grid.x = static_cast<int>((job.weight.rows + cuda::kFewRows - 1) / cuda::kFewRows);
  grid.y = (job.rows * job.parts + width - 1) / width;
  grid.z = job.splits;
  grid.threads = 32 * warps;
  grid.shared_bytes = cuda::FewShape<C, O>::shared_bytes(warps);
  emulate(grid, [&](EmulatedContext& context) { cuda::few_block<C, O>(context, job, nested); });
}

template <Codes C, Operand O, int NT>
void run_tiles(const ProductJob& job, const cuda::NestedMap& nested) {
  const int width = cuda::whole_columns(8 * NT, job.parts);
  Grid grid;
  grid.x = static_cast<int>((job.weight.rows + cuda::kTileRows - 1) / cuda::kTileRows);
  grid.y = (job.rows * job.parts + width - 1) / width;
  grid.z = job.splits;
  grid.threads = 32 * cuda::kTileWarps;
  grid.shared_bytes = cuda::TileShape<C, O, NT>::kSharedBytes;
  emulate(grid,
          [&](EmulatedContext& context) { cuda::tile_block<C, O, NT>(context, job, nested); });
}

struct Launch {
  ProductKernel kernel = ProductKernel::few;
  int warps = 2;
};

template <Codes C, Operand O>
void run(const ProductJob& job, const cuda::NestedMap& nested, Launch launch) {
  if (launch.kernel == ProductKernel::few) {
    run_few<C, O>(job, nested, launch.warps);
  } else if constexpr (cuda::kCodeBits<C> < 16) {
    if (job.rows * job.parts <= 16) {
      run_tiles<C, O, 2>(job, nested);
    } else {
      run_tiles<C, O, 8>(job, nested);
    }
  }
}

template <Operand O>
void run(const ProductJob& job, Codes codes, const cuda::NestedMap& nested, Launch launch) {
  // As the launchers: integers are exact in bfloat16.
  constexpr Operand exact = O == Operand::split ? Operand::bf16 : O;
  switch (codes) {
    case Codes::table4:
      return run<Codes::table4, O>(job, nested, launch);
    case Codes::table8:
      return run<Codes::table8, O>(job, nested, launch);
    case Codes::fp16:
      return run<Codes::fp16, O>(job, nested, launch);
    case Codes::bf16:
      return run<Codes::bf16, exact>(job, nested, launch);
    case Codes::integer8:
      return run<Codes::integer8, exact>(job, nested, launch);
    case Codes::affine4:
      return run<Codes::affine4, exact>(job, nested, launch);
  }
}

float read_element(const std::uint8_t* data, Element element, std::int64_t at) {
  if (element == Element::f32) {
    float value;
    std::memcpy(&value, data + 4 * at, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, data + 2 * at, 2);
  return element == Element::bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

void write_element(std::uint8_t* data, Element element, std::int64_t at, float value) {
  if (element == Element::f32) {
    std::memcpy(data + 4 * at, &value, 4);
    return;
  }
  const std::uint16_t bits = element == Element::bf16 ? float_to_bf16(value) : float_to_fp16(value);
  std::memcpy(data + 2 * at, &bits, 2);
}

struct Case {
  Format format;
  Element element = Element::bf16;
  std::int64_t features = 20, cols = 256;
  int rows = 1;
  int splits = 1;
  Launch launch;
  bool bias = true;
  std::int64_t x_gap = 0;  // elements between rows of x
  std::size_t shift = 0;   // of the addresses of codes, scales and zero points
};

// One product: weights and x of random bits within reason, then what the kernel says against what
// double precision says of the values that the reference decodes.
class Product {
 public:
  explicit Product(const Case& c) : case_(c), at_(c.format.layout(c.features, c.cols)) {
    std::mt19937 random(static_cast<unsigned>(c.cols * 31 + c.features * 7 + c.rows));
    const std::int64_t shape[] = {c.features, c.cols};
    const PartBytes size = c.format.bytes(shape);
    std::normal_distribution<float> normal;
    codes_.resize(static_cast<std::size_t>(size.codes) + c.shift);
    scales_.resize(static_cast<std::size_t>(size.scales) + c.shift);
    extra_.resize(static_cast<std::size_t>(size.extra) + c.shift);
    for (std::uint8_t& byte : codes_) byte = static_cast<std::uint8_t>(random());
    if (c.format.family == Family::cast) {
      for (std::int64_t i = 0; i < c.features * c.cols; ++i) {
        const Element stored = c.format.encoder == Encoder::fp16 ? Element::f16 : Element::bf16;
        write_element(codes_.data() + c.shift, stored, i, normal(random));
      }
    } else if (c.format.encoder == Encoder::e4m3 || c.format.encoder == Encoder::e5m2) {
      // Neither NaN nor infinity: those have a test of their own.
      for (std::uint8_t& byte : codes_) {
        if (!std::isfinite(c.format.table[byte])) byte ^= 0x40;
        // float16 results have no room for sums of e5m2's larger values.
        if (c.format.encoder == Encoder::e5m2 && c.element == Element::f16) byte &= 0xBF;
      }
    }
    if (c.format.scale == ScaleType::nested || c.format.zero_point) {
      for (std::uint8_t& byte : scales_) byte = static_cast<std::uint8_t>(random());
      for (std::uint8_t& byte : extra_) byte = static_cast<std::uint8_t>(random());
    }
    const auto fill = [&](std::vector<std::uint8_t>& part, Element type, float around) {
      const std::size_t each = type == Element::f32 ? 4 : 2;
      for (std::size_t i = 0; c.shift + (i + 1) * each <= part.size(); ++i) {
        write_element(part.data() + c.shift, type, static_cast<std::int64_t>(i),
                      around + normal(random));
      }
    };
    if (c.format.scale == ScaleType::f32) fill(scales_, Element::f32, 0.0f);
    if (c.format.scale == ScaleType::f16) fill(scales_, Element::f16, 0.0f);
    if (c.format.scale == ScaleType::nested) fill(extra_, Element::f32, 3.0f);
    x_stride_ = c.cols + c.x_gap;
    const std::size_t bytes = c.element == Element::f32 ? 4 : 2;
    x_.resize(static_cast<std::size_t>(c.rows * x_stride_) * bytes);
    for (std::int64_t i = 0; i < c.rows * x_stride_; ++i) {
      write_element(x_.data(), c.element, i, normal(random));
    }
    bias_.resize(static_cast<std::size_t>(c.features));
    for (float& value : bias_) value = normal(random);
    weight_.format = &case_.format;
    weight_.at = at_;
    weight_.codes = codes_.data() + c.shift;
    weight_.scales = scales_.data() + c.shift;
    weight_.extra = extra_.data() + c.shift;
    weight_.table = case_.format.table.data();
    if (c.format.scale == ScaleType::nested) {
      weight_.nested_offset = extra_.data() + extra_.size() - 4;
    }
  }

  std::vector<std::uint8_t>& codes() { return codes_; }
  std::vector<std::uint8_t>& scales() { return scales_; }
  std::vector<std::uint8_t>& x() { return x_; }
  std::int64_t x_stride() const { return x_stride_; }

  // [rows, features], in the element's type; a stride of features + 3.
  std::vector<std::uint8_t> multiply() {
    const Case& c = case_;
    cuda::NestedMap nested;
    std::copy(dynamic_map().begin(), dynamic_map().end(), nested.value);
    ProductJob job;
    job.weight.codes = weight_.codes;
    job.weight.scales = weight_.scales;
    job.weight.extra = weight_.extra;
    job.weight.table = weight_.table;
    job.weight.nested_offset = weight_.nested_offset;
    job.weight.rows = c.features;
    job.weight.cols = c.cols;
    job.weight.row_code_bytes = at_.row_code_bytes;
    job.weight.group = std::max<std::int64_t>(1, at_.group);
    job.weight.groups_per_row = at_.groups_per_row;
    job.weight.scale = c.format.scale;
    std::vector<std::uint16_t> split;
    job.x = reinterpret_cast<const std::uint16_t*>(x_.data());
    job.x_stride = x_stride_;
    if (c.element == Element::f32) {
      cuda::SplitJob parts;
      parts.x = reinterpret_cast<const float*>(x_.data());
      parts.stride = x_stride_;
      parts.rows = c.rows;
      parts.cols = c.cols;
      parts.out_stride = (c.cols + 7) / 8 * 8;
      split.assign(static_cast<std::size_t>(3 * c.rows * parts.out_stride), 0x7fff);
      parts.out = split.data();
      for (std::int64_t i = 0; i < c.rows * c.cols + 5; ++i) cuda::split_element(parts, i);
      job.x = split.data();
      job.x_stride = parts.out_stride;
      job.parts = cuda::kSplitParts;
    }
    job.rows = c.rows;
    job.bias = c.bias ? bias_.data() : nullptr;
    job.element = c.element;
    job.out_stride = c.features + 3;
    const std::size_t bytes = c.element == Element::f32 ? 4 : 2;
    std::vector<std::uint8_t> out(static_cast<std::size_t>(c.rows * job.out_stride) * bytes, 0xEE);
    job.out = out.data();
    job.splits = c.splits;
    std::vector<float> partial;
    if (c.splits > 1) {
      partial.assign(static_cast<std::size_t>(c.splits * c.rows * c.features),
                     std::numeric_limits<float>::quiet_NaN());
      job.partial = partial.data();
    }
    const Codes codes = codes_of(c.format);
    if (c.element == Element::bf16) run<Operand::bf16>(job, codes, nested, c.launch);
    if (c.element == Element::f16) run<Operand::f16>(job, codes, nested, c.launch);
    if (c.element == Element::f32) run<Operand::split>(job, codes, nested, c.launch);
    if (c.splits > 1) {
      for (std::int64_t i = 0; i < c.rows * c.features + 3; ++i) cuda::reduce_splits(job, i);
    }
    return out;
  }

  float weight_at(std::int64_t row, std::int64_t col) {
    if (decoded_.empty()) {
      decoded_.resize(static_cast<std::size_t>(case_.features * case_.cols));
      cpu::reference_kernels().dequantize(weight_, 0, case_.features, decoded_.data(),
                                          cpu::DType::f32, case_.cols);
    }
    return decoded_[static_cast<std::size_t>(row * case_.cols + col)];
  }

  // Every element of `out` within its bound, and what lies between its rows untouched.
  void check(const std::vector<std::uint8_t>& out) {
    const Case& c = case_;
    const auto u = kUnit[static_cast<int>(c.element)];
    // Table values and 16-bit weights of another type are rounded to x's; integers are exact. A
    // sum of K products and a scale or two: (K + 8) roundings of float32 at most.
    const bool rounded = c.element != Element::f32 && c.format.family != Family::affine;
    const double sums = static_cast<double>(c.cols + 8 + c.splits) * kUnit32;
    const std::int64_t stride = c.features + 3;
    for (std::int64_t m = 0; m < c.rows; ++m) {
      for (std::int64_t n = 0; n < stride; ++n) {
        const std::int64_t at = m * stride + n;
        if (n >= c.features) {
          const std::size_t bytes = c.element == Element::f32 ? 4 : 2;
          EXPECT_EQ(out[static_cast<std::size_t>(at) * bytes], 0xEE) << "written past the row";
          continue;
        }
        double exact = 0, magnitude = 0;
        for (std::int64_t k = 0; k < c.cols; ++k) {
          const double product =
              double{read_element(x_.data(), c.element, m * x_stride_ + k)} * weight_at(n, k);
          exact += product;
          magnitude += std::fabs(product);
        }
        if (c.bias) exact += bias_[static_cast<std::size_t>(n)];
        const double bias = c.bias ? std::fabs(bias_[static_cast<std::size_t>(n)]) : 0.0;
        const double bound = (sums + (rounded ? u : 0.0)) * (magnitude + bias) * (1 + 2 * u) +
                             u * std::fabs(exact) + 0x1p-24;
        const double got = read_element(out.data(), c.element, at);
        ASSERT_LE(std::fabs(got - exact), bound)
            << "row " << m << ", feature " << n << ": " << got << " for " << exact;
      }
    }
  }

 private:
  Case case_;
  Layout at_;
  std::vector<std::uint8_t> codes_, scales_, extra_, x_;
  std::vector<float> bias_, decoded_;
  cpu::Weight weight_;
  std::int64_t x_stride_ = 0;
};

std::string name_of(const Case& c) {
  std::string name = "codes " + std::to_string(static_cast<int>(codes_of(c.format))) + " group " +
                     std::to_string(c.format.block) + " x " +
                     std::to_string(static_cast<int>(c.element));
  name += ": " + std::to_string(c.rows) + " x " + std::to_string(c.features) + " x " +
          std::to_string(c.cols);
  name += c.launch.kernel == ProductKernel::few ? " few" : " tiles";
  return name + ", splits " + std::to_string(c.splits) + ", shift " + std::to_string(c.shift);
}

void check(const Case& c) {
  SCOPED_TRACE(name_of(c));
  Product product(c);
  product.check(product.multiply());
}

Format grouped(const char* name, std::int64_t block) {
  Format format = builtin_format(name);
  format.block = block;
  return format;
}

constexpr Element kElements[] = {Element::f32, Element::bf16, Element::f16};

TEST(CudaProducts, EveryFormatAndTypeByTheFewRowsKernel) {
  for (const char* name :
       {"fp16", "bf16", "fp8", "fp8_e5m2", "int8", "int4", "int4_g64", "nf4", "nf4_dq", "fp4"}) {
    for (const Element element : kElements) {
      const Format& format = builtin_format(name);
      Case c{.format = format, .element = element, .features = 20, .cols = 320, .rows = 3};
      if (format.encoder == Encoder::fp16 && element == Element::f16) continue;  // torch's own
      check(c);
    }
  }
}

TEST(CudaProducts, EveryFormatAndTypeByTiles) {
  for (const char* name : {"fp8", "fp8_e5m2", "int8", "int4", "int4_g96", "int4_g64", "int4_g32",
                           "int4_g16", "nf4", "nf4_dq", "fp4"}) {
    for (const Element element : kElements) {
      Case c{.format = builtin_format(name), .element = element, .features = 70, .cols = 320};
      c.rows = 4;
      c.launch.kernel = ProductKernel::tiles;
      check(c);
    }
  }
}

TEST(CudaProducts, ManyRowsByTiles) {
  // More than one tile of columns; a float32 has 21 rows of three parts in one.
  const auto many = [](const char* name, Element element) {
    Case c{.format = builtin_format(name), .element = element, .features = 65, .cols = 192};
    c.rows = element == Element::f32 ? 22 : 66;
    c.launch.kernel = ProductKernel::tiles;
    check(c);
  };
  for (const Element element : kElements) many("nf4", element);
  many("int8", Element::f32);
  many("int4_g16", Element::bf16);
  many("fp8", Element::f16);
}

TEST(CudaProducts, TailsOddSizesAndAnyAddress) {
  // Elements that end within a chunk, a vector or a byte; rows of codes at odd addresses.
  for (const char* name : {"int8", "int4", "fp8", "bf16"}) {
    for (const std::int64_t cols : {1, 7, 63, 65, 129, 200}) {
      for (const std::size_t shift : {std::size_t{0}, std::size_t{3}}) {
        Case c{.format = builtin_format(name), .element = Element::f16, .features = 17};
        c.cols = cols;
        c.rows = 2;
        c.shift = shift;
        c.x_gap = static_cast<std::int64_t>(shift);  // x is not contiguous either
        check(c);
        if (c.format.bits == 16) continue;
        c.launch.kernel = ProductKernel::tiles;
        check(c);
      }
    }
  }
  for (const Element element : kElements) {
    Case c{.format = builtin_format("nf4"), .element = element, .features = 33, .cols = 192};
    c.rows = 2;
    c.shift = 5;
    c.x_gap = 1;
    check(c);
    c.launch.kernel = ProductKernel::tiles;
    check(c);
  }
}

TEST(CudaProducts, GroupsOfAnySizeThatAKernelTakes) {
  for (const std::int64_t block : {64, 128, 192, 448}) {
    Case c{.format = grouped("int4", block), .element = Element::bf16, .features = 16};
    c.cols = 456;  // the last group is short
    check(c);
    c.format = grouped("nf4", block);
    c.cols = 2 * block;
    check(c);
  }
  for (const std::int64_t block : {16, 32, 48, 80, 144, 160}) {
    Case c{.format = grouped("int4", block), .element = Element::bf16, .features = 16};
    c.cols = 456;
    c.launch.kernel = ProductKernel::tiles;
    check(c);
  }
}

TEST(CudaProducts, SplitsWarpsAndEmptyShares) {
  for (const char* name : {"nf4_dq", "int8"}) {
    for (const int splits : {1, 2, 3, 7}) {
      for (const std::int64_t cols : {64, 832}) {  // fewer chunks than warps, and more
        Case c{.format = builtin_format(name), .element = Element::bf16, .features = 33};
        c.cols = cols;
        c.rows = 2;
        c.splits = splits;
        c.bias = splits != 2;
        for (const int warps : {1, 4, 16}) {
          c.launch = {ProductKernel::few, warps};
          if (warps != 4 && splits > 2) continue;
          check(c);
        }
        c.launch.kernel = ProductKernel::tiles;
        check(c);
      }
    }
  }
  Case c{.format = builtin_format("int4"), .element = Element::f32, .features = 17, .cols = 300};
  c.rows = 3;
  c.splits = 2;
  check(c);
}

TEST(CudaProducts, NothingToSumIsTheBias) {
  for (const ProductKernel kernel : {ProductKernel::few, ProductKernel::tiles}) {
    Case c{.format = builtin_format("int8"), .element = Element::f32, .features = 5, .cols = 0};
    c.launch.kernel = kernel;
    check(c);
  }
}

TEST(CudaProducts, NanAndInfinityStayInTheirRows) {
  for (const ProductKernel kernel : {ProductKernel::few, ProductKernel::tiles}) {
    for (const Element element : {Element::bf16, Element::f16, Element::f32}) {
      for (const char* name : {"fp8", "int8", "nf4"}) {
        Case c{.format = builtin_format(name), .element = element, .features = 20, .cols = 192};
        c.rows = 3;
        c.launch.kernel = kernel;
        SCOPED_TRACE(name_of(c));
        Product product(c);
        // A NaN in row 1 of x, and in feature 4: its scale, or one of its codes.
        write_element(product.x().data(), element, product.x_stride() + 100,
                      std::numeric_limits<float>::quiet_NaN());
        if (c.format.encoder == Encoder::e4m3) {
          product.codes()[4 * 192 + 11] = 0x7f;
        } else {
          const std::int64_t scale = c.format.block != 0 ? 4 * 3 + 1 : 4;
          write_element(product.scales().data(), Element::f32, scale,
                        std::numeric_limits<float>::quiet_NaN());
        }
        const std::vector<std::uint8_t> out = product.multiply();
        for (std::int64_t m = 0; m < 3; ++m) {
          for (std::int64_t n = 0; n < 20; ++n) {
            const float got = read_element(out.data(), element, m * 23 + n);
            EXPECT_EQ(std::isnan(got), m == 1 || n == 4) << m << ' ' << n;
          }
        }
      }
    }
  }
}

TEST(CudaProducts, EveryCodeBecomesItsValue) {
  // One column of x that is 1 and all others 0: the result is the decoded weight, unscaled sums
  // and all, so that every code of every format is seen at every place of a fragment.
  for (const char* name : {"fp8", "fp8_e5m2", "int8", "nf4", "int4"}) {
    for (const Element element : {Element::f16, Element::bf16}) {
      Case c{.format = builtin_format(name), .element = element, .features = 64, .cols = 64};
      c.rows = 64;
      c.bias = false;
      c.launch.kernel = ProductKernel::tiles;
      SCOPED_TRACE(name_of(c));
      Product product(c);
      for (std::int64_t m = 0; m < 64; ++m) {
        for (std::int64_t k = 0; k < 64; ++k) {
          write_element(product.x().data(), element, m * 64 + k, m == k ? 1.0f : 0.0f);
        }
      }
      const std::vector<std::uint8_t> out = product.multiply();
      const double u = kUnit[static_cast<int>(element)];
      for (std::int64_t n = 0; n < 64; ++n) {
        for (std::int64_t k = 0; k < 64; ++k) {
          const double want = product.weight_at(n, k);
          const double got = read_element(out.data(), element, k * 67 + n);
          // The value is rounded where a table's is, and the result once.
          ASSERT_LE(std::fabs(got - want), 2.01 * u * std::fabs(want) + 0x1p-25) << n << ' ' << k;
        }
      }
    }
  }
}

TEST(CudaProducts, AFloat32IsThreeBfloat16) {
  std::mt19937 random(1);
  for (int i = 0; i < 20'000; ++i) {
    auto bits = static_cast<std::uint32_t>(random());
    const auto x = std::bit_cast<float>(bits);
    const cuda::SplitFloat split = cuda::split_float(x);
    if (!std::isfinite(x)) {
      const float first = bf16_to_float(split.part[0]);
      EXPECT_EQ(std::isnan(first), std::isnan(x));
      EXPECT_EQ(split.part[1] | split.part[2], 0);
      continue;
    }
    double sum = 0;
    for (const std::uint16_t part : split.part) sum += bf16_to_float(part);
    // What lies below bfloat16's smallest number is cut off.
    EXPECT_NEAR(sum, double{x}, std::fabs(x) < 0x1p-109f ? 0x1p-133 : 0.0);
  }
}

}  // namespace
}  // namespace vramkit::testing
