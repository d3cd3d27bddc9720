// The bodies of the CUDA kernels of dynamic INT8 and LLM.int8 (csrc/cuda/int8.hpp, int8_tile.hpp)
// over an emulated grid: rounded rows and sums bit for bit as the scalar reference, outputs bit for
// bit as the CPU's vector units.
#include <algorithm>

#include "int8_grid.hpp"

namespace vramkit::testing {
namespace {

using cpu::Buffer;

constexpr Element kElements[] = {Element::f32, Element::bf16, Element::f16};

Buffer random_rows(std::int64_t rows, std::int64_t cols, std::int64_t stride, Element type,
                   bool odd_values, std::mt19937& random) {
  const cpu::DType dtype = dtype_of(type);
  Buffer x(std::max<std::int64_t>(1, rows * stride) * cpu::size_of(dtype), cpu::size_of(dtype));
  for (std::int64_t i = 0; i < rows * stride; ++i) {
    float v = std::normal_distribution<float>()(random);
    const std::int64_t row = i / stride, k = i % stride;
    if (odd_values && row == 1) v = 0.0f;
    if (odd_values && row == 2 && k % 7 == 3) v = i % 2 ? cpu::kInf : -cpu::kInf;
    if (odd_values && row == 3 && k % 11 == 5) v = std::nanf("");
    if (odd_values && row == 4) v *= 1e-39f;
    if (k >= cols) v = std::nanf("");  // between rows, for nobody to read
    cpu::write(x.data(), dtype, i, v);
  }
  return x;
}

TEST(CudaInt8, RoundedRowsAreTheReferences) {
  std::mt19937 random(1);
  struct Width {
    std::int64_t cols;
    bool by_warp;
  };
  const Width widths[] = {{0, true},     {1, true},     {7, false},   {8, true},
                          {63, true},    {384, true},   {1030, true}, {2050, false},
                          {4099, false}, {8200, false}, {9001, false}};
  for (const auto& [cols, by_warp] : widths) {
    for (const Element type : kElements) {
      for (const float threshold : {0.0f, 2.0f, 1e-3f}) {
        const std::int64_t rows = 5, stride = cols + 3;
        const Buffer x = random_rows(rows, cols, stride, type, true, random);
        CpuRows expected(cpu::reference_kernels(), x.data(), dtype_of(type), rows, cols, stride,
                         threshold);
        for (const std::int64_t code_stride : {cols, (cols + 15) / 16 * 16}) {
          GpuRows got(rows, cols, code_stride);
          got.run(x.data(), type, stride, threshold, by_warp);
          const std::string at = std::to_string(cols) + " cols, type " +
                                 std::to_string(static_cast<int>(type)) + ", threshold " +
                                 std::to_string(threshold);
          ASSERT_TRUE(got.codes.intact() && got.marks.intact()) << at;
          for (std::int64_t r = 0; r < rows; ++r) {
            const auto row = static_cast<std::size_t>(r);
            ASSERT_TRUE(same(expected.absmax[row], got.absmax[row])) << at << " row " << r;
            for (std::int64_t k = 0; k < code_stride; ++k) {
              const int want = k < cols ? expected.at(r, k) : 0;
              const int found = static_cast<std::int8_t>(got.codes.data()[r * code_stride + k]);
              ASSERT_EQ(want, found) << at << " row " << r << " column " << k;
            }
          }
          for (std::int64_t k = 0; k < cols; ++k) {
            ASSERT_EQ(expected.marks[static_cast<std::size_t>(k)], got.marks.data()[k]) << at;
          }
          if (threshold == 0.0f || cols == 0) continue;
          const std::vector<std::int64_t> listed(got.list.begin(), got.list.begin() + got.count);
          ASSERT_EQ(expected.outliers, listed) << at;
        }
      }
    }
  }
}

// The list alone: none, all, and the ends of what threads and rounds have.
TEST(CudaInt8, OutlierColumnsAreListedInOrder) {
  std::mt19937 random(2);
  for (const std::int64_t cols : {1, 15, 16, 17, 4095, 4096, 4097, 9000}) {
    for (int kind = 0; kind < 4; ++kind) {
      std::vector<std::uint8_t> marks(static_cast<std::size_t>(cols));
      std::vector<std::int32_t> expected, list(static_cast<std::size_t>(cols), -1);
      for (std::int64_t k = 0; k < cols; ++k) {
        const bool marked = kind == 1 || (kind == 2 && random() % 50 == 0) ||
                            (kind == 3 && (k == 0 || k == cols - 1 || k == 4096));
        marks[static_cast<std::size_t>(k)] = marked;
        if (marked) expected.push_back(static_cast<std::int32_t>(k));
      }
      std::int32_t count = -1;
      emulate_settle({marks.data(), cols, list.data(), &count, nullptr, 0, cols});
      ASSERT_EQ(count, static_cast<std::int32_t>(expected.size()));
      list.resize(expected.size());
      ASSERT_EQ(list, expected);
    }
  }
}

struct Shape {
  std::int64_t rows, weight_rows, cols;
};

template <int MT, int NT>
void check_sums(const Shape& shape, int kind, bool odd, std::mt19937& random) {
  const auto& [m, n, k] = shape;
  Int8Stored weight(n, k, odd, random), x(m, k, false, random);
  if (kind) {
    std::fill_n(weight.codes, n * k, std::int8_t{-128});
    std::fill_n(x.codes, m * k, static_cast<std::int8_t>(kind == 1 ? -128 : 127));
  }
  const std::int64_t stride = n + 1;
  std::vector<std::int32_t> got(static_cast<std::size_t>(m * stride), -7);
  gpu::ProductJob job;
  job.from = {x.codes, m, k, k, weight.codes, n, k, k};
  job.to.exact = true;
  job.to.out = got.data();
  job.to.out_stride = stride;
  emulate_product<MT, NT>(job);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j <= n; ++j) {
      std::int64_t sum = j < n ? 0 : -7;
      for (std::int64_t c = 0; c < k && j < n; ++c) {
        sum += std::int64_t{x.codes[i * k + c]} * weight.codes[j * k + c];
      }
      ASSERT_EQ(sum, got[static_cast<std::size_t>(i * stride + j)])
          << m << 'x' << n << 'x' << k << " MT " << MT << " NT " << NT << " at " << i << ", " << j;
    }
  }
}

TEST(CudaInt8, SumsAreExact) {
  std::mt19937 random(3);
  const Shape shapes[] = {{1, 1, 1},     {1, 5, 7},     {2, 16, 64},   {8, 17, 63},
                          {9, 33, 65},   {16, 31, 128}, {17, 32, 129}, {33, 40, 144},
                          {3, 20, 1100}, {1, 2, 4161},  {5, 9, 4096},  {3, 2, 0}};
  for (const Shape& shape : shapes) {
    for (const bool odd : {false, true}) {
      check_sums<1, 1>(shape, 0, odd, random);
      check_sums<1, 2>(shape, 0, odd, random);
      check_sums<2, 4>(shape, 0, odd, random);
    }
    check_sums<1, 1>(shape, 1, false, random);
    check_sums<2, 4>(shape, 2, true, random);
  }
}

// Output i, n of the type, as float.
float output(const Buffer& out, Element type, std::int64_t at) {
  return cpu::read(out.data(), dtype_of(type), at);
}

template <Element E>
void emulate_scale(const gpu::ScaleJob& job) {
  const std::int64_t blocks = gpu::scale_blocks(job.rows, job.cols);
  for (std::int64_t block = blocks - 1; block >= 0; --block) {
    const gpu::TilePlace at = gpu::scale_place(job, block);
    std::vector<gpu::ScaleSums> sums(kThreads, gpu::ScaleSums{});
    gpu::ScaleTile tile;
    std::memset(&tile, 0xff, sizeof(tile));
    const std::int32_t count = job.to.outliers ? *job.to.outlier_count : 0;
    const auto each = [&](auto step) {
      for (int thread = kThreads - 1; thread >= 0; --thread) step(thread);
    };
    for (std::int32_t first = 0; first < count; first += gpu::kOutliers) {
      each([&](int t) { gpu::scale_stage(job, at, first, count, tile, t); });
      each(
          [&](int t) { gpu::scale_add(first, count, tile, sums[static_cast<std::size_t>(t)], t); });
    }
    each([&](int t) {
      gpu::scale_finish<E>(job, at, count > 0, sums[static_cast<std::size_t>(t)], t);
    });
  }
}

void emulate_scale(const gpu::ScaleJob& job) {
  if (job.to.type == Element::f32) return emulate_scale<Element::f32>(job);
  if (job.to.type == Element::bf16) return emulate_scale<Element::bf16>(job);
  emulate_scale<Element::f16>(job);
}

struct LinearCase {
  Shape shape;
  Element type;
  float threshold;
  cpu::Activation activation;
  bool bias, odd;
};

// The product kernel, and torch's sums with the scaling kernel, against every vector unit.
void check_linear(const LinearCase& c, std::mt19937& random) {
  const auto& [rows, weight_rows, cols] = c.shape;
  const std::int64_t stride = cols + 5, out_stride = weight_rows + 2;
  const cpu::DType dtype = dtype_of(c.type);
  const Int8Stored weight(weight_rows, cols, c.odd, random);
  const Buffer x = random_rows(rows, cols, stride, c.type, false, random);
  if (rows > 2) cpu::write(x.data(), dtype, stride, std::nanf(""));
  if (rows > 5) cpu::write(x.data(), dtype, 4 * stride + cols / 2, cpu::kInf);
  GpuRows rounded(rows, cols, (cols + 15) / 16 * 16);
  rounded.run(x.data(), c.type, stride, c.threshold, cols % 2 == 0);
  const std::int64_t bytes = rows * out_stride * cpu::size_of(dtype);
  Buffer direct(bytes, 2 * cpu::size_of(dtype)), scaled(bytes, 2 * cpu::size_of(dtype));
  gpu::ProductJob job;
  job.from = {reinterpret_cast<const std::int8_t*>(rounded.codes.data()),
              rows,
              rounded.stride,
              rounded.stride,
              weight.codes,
              weight_rows,
              cols,
              cols};
  job.to.absmax = rounded.absmax.data();
  job.to.scales = weight.scale_bytes();
  job.to.bias = c.bias ? weight.bias.data() : nullptr;
  job.to.values = x.data();
  job.to.values_stride = stride;
  job.to.weight = weight.codes;
  job.to.weight_stride = cols;
  job.to.outliers = c.threshold > 0.0f ? rounded.list.data() : nullptr;
  job.to.outlier_count = c.threshold > 0.0f ? &rounded.count : nullptr;
  job.to.activation = c.activation;
  job.to.type = c.type;
  job.to.out = direct.data();
  job.to.out_stride = out_stride;
  if (rows <= 8) {
    emulate_product<1, 1>(job);
  } else if (rows <= 16) {
    emulate_product<1, 2>(job);
  } else {
    emulate_product<2, 4>(job);
  }
  ASSERT_TRUE(direct.intact());
  const bool even = weight_rows % 2 == 0;
  if (even) {
    std::vector<std::int32_t> sums(static_cast<std::size_t>(rows * weight_rows));
    gpu::ProductJob exact = job;
    exact.to.exact = true;
    exact.to.out = sums.data();
    exact.to.out_stride = weight_rows;
    emulate_product<2, 4>(exact);
    gpu::ScaleJob scale;
    scale.to = job.to;
    scale.to.out = scaled.data();
    scale.cols = weight_rows;
    // In two pieces, as a long input comes.
    const std::int64_t half = rows / 2;
    for (const auto& [first, count] : {std::pair{half, rows - half}, {std::int64_t{0}, half}}) {
      scale.sums = sums.data() + first * weight_rows;
      scale.first_row = first;
      scale.rows = count;
      emulate_scale(scale);
    }
    ASSERT_TRUE(scaled.intact());
  }
  for (const cpu::Kernels* unit : vector_units()) {
    const CpuRows theirs(*unit, x.data(), dtype, rows, cols, stride, c.threshold);
    Buffer expected(bytes, cpu::size_of(dtype));
    cpu::Int8Product product = theirs.job();
    product.weight = weight.codes;
    product.weight_stride = cols;
    product.weight_scales = weight.scale_bytes();
    product.bias = c.bias ? weight.bias.data() : nullptr;
    product.values = x.data();
    product.values_stride = stride;
    product.activation = c.activation;
    product.type = dtype;
    product.out = expected.data();
    product.out_stride = out_stride;
    unit->int8.product(product, 0, rows, 0, weight_rows);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t n = 0; n < weight_rows; ++n) {
        const std::int64_t at = i * out_stride + n;
        const float want = output(expected, c.type, at);
        ASSERT_TRUE(same(want, output(direct, c.type, at)))
            << unit->name << " row " << i << " column " << n << ": " << want << ", "
            << output(direct, c.type, at);
        if (even) {
          ASSERT_TRUE(same(want, output(scaled, c.type, at)))
              << unit->name << " scaled, row " << i << " column " << n;
        }
      }
    }
  }
}

TEST(CudaInt8, OutputsHaveTheVectorUnitsBits) {
  if (vector_units().empty()) GTEST_SKIP() << "this processor has no vector unit of ours";
  std::mt19937 random(4);
  const Shape shapes[] = {{1, 1, 1},     {1, 64, 64},   {3, 7, 63},     {8, 34, 65},
                          {9, 130, 200}, {17, 20, 384}, {40, 132, 100}, {2, 6, 4100}};
  for (const Shape& shape : shapes) {
    for (const Element type : kElements) {
      // 0.5: most columns are outliers, more than a tile takes at a time.
      for (const float threshold : {0.0f, 2.5f, 0.5f}) {
        check_linear({shape, type, threshold, cpu::Activation::none, true, false}, random);
      }
      check_linear({shape, type, 0.0f, cpu::Activation::none, false, true}, random);
      for (int activation = 1; activation < 4; ++activation) {
        check_linear({shape, type, 0.0f, static_cast<cpu::Activation>(activation), true, true},
                     random);
      }
    }
  }
}

// Floats of all sizes, against float64 (outputs above, and recurrent steps, hold them against the
// vector units).
TEST(CudaInt8, FunctionsAreWithinUlps) {
  std::mt19937 random(5);
  for (int i = 0; i < 200'000; ++i) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isnan(x)) continue;
    const double wide = x;
    const auto within = [&](double want, float got, double ulp) {
      const double room = std::max(ulp * std::fabs(want) * 0x1p-23, 0x1p-148);
      ASSERT_NEAR(want, got, room) << "of " << x;
    };
    within(std::tanh(wide), gpu::tanh(x), 4);
    if (x > -87.0f) within(1.0 / (1.0 + std::exp(-wide)), gpu::sigmoid(x), 4);
    if (x < 88.0f) within(std::exp(wide), gpu::exp(x), 2);
  }
  EXPECT_TRUE(std::isnan(gpu::exp(std::nanf(""))));
  EXPECT_TRUE(std::isnan(gpu::tanh(std::nanf(""))));
  EXPECT_TRUE(std::isnan(gpu::sigmoid(std::nanf(""))));
  EXPECT_EQ(gpu::sigmoid(cpu::kInf), 1.0f);
  EXPECT_EQ(gpu::tanh(-cpu::kInf), -1.0f);
}

TEST(CudaInt8, GridsCoverAll) {
  for (const std::int64_t rows : {1, 8, 9, 33}) {
    for (const std::int64_t weight_rows : {1, 16, 33, 100}) {
      std::vector<int> seen(static_cast<std::size_t>(rows * weight_rows));
      const gpu::Operands job{nullptr, rows, 0, 0, nullptr, weight_rows, 0, 0};
      for (std::int64_t b = 0; b < gpu::product_blocks<2, 4>(rows, weight_rows); ++b) {
        const gpu::Tile tile = gpu::product_tile<2, 4>(job, b);
        ASSERT_GT(tile.valid, 0);
        for (std::int64_t i = tile.row; i < std::min(tile.row + 32, rows); ++i) {
          for (std::int64_t n = tile.first; n < tile.first + tile.valid; ++n) {
            ++seen[static_cast<std::size_t>(i * weight_rows + n)];
          }
        }
      }
      ASSERT_EQ(std::count(seen.begin(), seen.end(), 1), rows * weight_rows);
    }
  }
}

}  // namespace
}  // namespace vramkit::testing
