// The int8 kernels of the GPU on the host: their bodies thread by thread, step by step between
// barriers, in an order that no kernel may depend on. The tensor cores' instruction is carried out
// for the 32 lanes of a warp after each of them has said what it puts in.
#pragma once
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.hpp"
#include "cuda/int8_tile.hpp"
#include "kernel_cases.hpp"

namespace vramkit::testing {

namespace gpu = cuda::int8;
using cuda::Element;
using cuda::kThreads;

inline cpu::DType dtype_of(Element element) {
  if (element == Element::f32) return cpu::DType::f32;
  return element == Element::bf16 ? cpu::DType::bf16 : cpu::DType::f16;
}

inline bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

// The units whose bits the GPU's kernels have; the reference computes functions in float64.
inline std::vector<const cpu::Kernels*> vector_units() {
  std::vector<const cpu::Kernels*> units = cpu::available_kernels();
  std::erase(units, &cpu::reference_kernels());
  return units;
}

template <Element E, int Threads>
void emulate_rows(const gpu::RowsJob& job) {
  for (std::int64_t row = job.rows - 1; row >= 0; --row) {
    std::vector<gpu::HeldRow> held(Threads);
    std::uint32_t most = 0;
    for (int thread = Threads - 1; thread >= 0; --thread) {
      const auto t = static_cast<std::size_t>(thread);
      most = std::max(most, gpu::look<E, Threads>(job, row, thread, held[t]));
    }
    for (int thread = Threads - 1; thread >= 0; --thread) {
      const auto t = static_cast<std::size_t>(thread);
      gpu::round_row<E, Threads>(job, row, thread, most, held[t]);
    }
  }
}

inline void emulate_settle(const gpu::SettleJob& job) {
  for (std::int64_t block = gpu::settle_blocks(job.rows) - 1; block > 0; --block) {
    for (int thread = kThreads - 1; thread >= 0; --thread) gpu::take_out(job, block, thread);
  }
  if (!job.list) return;
  gpu::ListCounts counts;
  std::memset(&counts, 0xff, sizeof(counts));
  std::int32_t before = 0;
  for (std::int64_t first = 0; first < job.cols; first += gpu::kListCols) {
    const auto each = [&](auto step) {
      for (int thread = kThreads - 1; thread >= 0; --thread) step(thread);
    };
    each([&](int t) { gpu::list_count(gpu::marks_of(job, first, t), counts, t); });
    each([&](int t) { gpu::list_groups(counts, t); });
    std::int32_t after = 0;
    each([&](int t) {
      after = gpu::list_write(job, first, before, gpu::marks_of(job, first, t), counts, t);
    });
    before = after;
  }
}

// As csrc/cuda/int8.cu launches it.
inline void emulate_round(const gpu::RowsJob& job, Element type, bool by_warp, std::int32_t* list,
                          std::int32_t* count) {
  if (job.columns) std::memset(job.columns, 0, static_cast<std::size_t>(job.cols));
  if (count) *count = 0;
  const auto run = [&]<Element E>() {
    return by_warp ? emulate_rows<E, gpu::kWarp>(job) : emulate_rows<E, kThreads>(job);
  };
  if (type == Element::f32) run.template operator()<Element::f32>();
  if (type == Element::bf16) run.template operator()<Element::bf16>();
  if (type == Element::f16) run.template operator()<Element::f16>();
  if (job.threshold > 0.0f && job.cols) {
    emulate_settle({job.columns, job.cols, list, count, job.codes, job.rows, job.code_stride});
  }
}

// What a lane gives to one mma.m16n8k32, and to which of its sums.
struct MmaCall {
  std::ptrdiff_t sums;
  std::array<std::uint32_t, 4> a;
  std::array<std::uint32_t, 2> b;
};

inline int byte_of(std::uint32_t word, int i) {
  return static_cast<std::int8_t>(word >> (8 * i) & 255u);
}

// The instruction as PTX defines it: which element of A [16, 32], B [32, 8] and D [16, 8] each lane
// holds. Returns D by lane.
inline std::array<std::array<std::int32_t, 4>, 32> mma(const std::array<MmaCall, 32>& call) {
  std::array<std::array<int, 32>, 16> a{};
  std::array<std::array<int, 8>, 32> b{};
  for (int lane = 0; lane < 32; ++lane) {
    const MmaCall& mine = call[static_cast<std::size_t>(lane)];
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 16; ++i) {
      const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
      const int col = in_group * 4 + (i & 3) + (i < 8 ? 0 : 16);
      a[static_cast<std::size_t>(row)][static_cast<std::size_t>(col)] =
          byte_of(mine.a[static_cast<std::size_t>(i / 4)], i % 4);
    }
    for (int i = 0; i < 8; ++i) {
      const int row = in_group * 4 + (i & 3) + (i < 4 ? 0 : 16);
      b[static_cast<std::size_t>(row)][static_cast<std::size_t>(group)] =
          byte_of(mine.b[static_cast<std::size_t>(i / 4)], i % 4);
    }
  }
  std::array<std::array<std::int32_t, 4>, 32> d{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto row = static_cast<std::size_t>(i < 2 ? lane >> 2 : (lane >> 2) + 8);
      const auto col = static_cast<std::size_t>(lane % 4 * 2 + (i & 1));
      std::int32_t sum = 0;
      for (std::size_t k = 0; k < 32; ++k) sum += a[row][k] * b[k][col];
      d[static_cast<std::size_t>(lane)][static_cast<std::size_t>(i)] = sum;
    }
  }
  return d;
}

template <bool Whole, bool Gates, int MT, int NT>
void emulate_tile(const gpu::Operands& job, const gpu::Tile& tile,
                  gpu::SharedSums<MT, NT>& shared) {
  for (int warp = gpu::kWarps - 1; warp >= 0; --warp) {
    std::array<gpu::Sums<MT, NT>, 32> sums{};
    std::array<std::vector<MmaCall>, 32> calls;
    for (int lane = 31; lane >= 0; --lane) {
      const auto l = static_cast<std::size_t>(lane);
      std::int32_t* base = &sums[l].of[0][0][0];
      const auto record = [&](std::int32_t(&c)[4], std::uint32_t a0, std::uint32_t a1,
                              std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                              std::uint32_t b1) {
        calls[l].push_back({&c[0] - base, {a0, a1, a2, a3}, {b0, b1}});
      };
      gpu::multiply_tile<Whole, Gates>(job, tile, warp, lane, sums[l], record);
    }
    for (std::size_t i = 0; i < calls[0].size(); ++i) {
      std::array<MmaCall, 32> call;
      for (std::size_t l = 0; l < 32; ++l) {
        ASSERT_EQ(calls[l].size(), calls[0].size());
        ASSERT_EQ(calls[l][i].sums, calls[0][i].sums);
        call[l] = calls[l][i];
      }
      const auto d = mma(call);
      for (std::size_t l = 0; l < 32; ++l) {
        for (std::size_t j = 0; j < 4; ++j)
          (&sums[l].of[0][0][0])[call[l].sums + static_cast<std::ptrdiff_t>(j)] += d[l][j];
      }
    }
    for (int lane = 31; lane >= 0; --lane) {
      gpu::store_sums(sums[static_cast<std::size_t>(lane)], shared, warp, lane);
    }
  }
}

template <int MT, int NT>
void emulate_product(const gpu::ProductJob& job) {
  const std::int64_t blocks = gpu::product_blocks<MT, NT>(job.from.rows, job.from.weight_rows);
  for (std::int64_t block = blocks - 1; block >= 0; --block) {
    const auto shared = std::make_unique<gpu::SharedSums<MT, NT>>();
    std::memset(shared.get(), 0xa5, sizeof(*shared));
    const gpu::Tile tile = gpu::product_tile<MT, NT>(job.from, block);
    if (gpu::whole(job.from)) {
      emulate_tile<true, false>(job.from, tile, *shared);
    } else {
      emulate_tile<false, false>(job.from, tile, *shared);
    }
    for (int thread = kThreads - 1; thread >= 0; --thread) {
      gpu::finish_product(job, tile, *shared, thread);
    }
  }
}

// Rows of x rounded by the GPU's bodies, in guarded memory.
struct GpuRows {
  std::int64_t rows, cols, stride;
  cpu::Buffer codes, marks;
  std::vector<float> absmax;
  std::vector<std::int32_t> list;
  std::int32_t count = -1;
  GpuRows(std::int64_t r, std::int64_t c, std::int64_t code_stride)
      : rows(r),
        cols(c),
        stride(code_stride),
        codes(r * code_stride),
        marks(c),
        absmax(static_cast<std::size_t>(r)),
        list(static_cast<std::size_t>(c), -1) {}
  void run(const void* x, Element type, std::int64_t x_stride, float threshold, bool by_warp) {
    gpu::RowsJob job{x,        rows,          cols,
                     x_stride, threshold,     reinterpret_cast<std::int8_t*>(codes.data()),
                     stride,   absmax.data(), marks.data()};
    emulate_round(job, type, by_warp, threshold > 0.0f ? list.data() : nullptr,
                  threshold > 0.0f ? &count : nullptr);
  }
};

// The same on a CPU's unit, outlier columns taken out, as csrc/ops/int8.cpp does it.
struct CpuRows {
  std::int64_t rows, cols, stride, block;
  std::vector<std::int8_t> codes;
  std::vector<float> absmax;
  std::vector<std::int32_t> sums;
  std::vector<std::uint8_t> marks;
  std::vector<std::int64_t> outliers;
  CpuRows(const cpu::Kernels& kernels, const void* x, cpu::DType type, std::int64_t r,
          std::int64_t c, std::int64_t x_stride, float threshold)
      : rows(r),
        cols(c),
        stride(cpu::int8_row_stride(c)),
        block(r * stride),
        codes(static_cast<std::size_t>(std::max<std::int64_t>(1, cpu::int8_blocks(c)) * block)),
        absmax(static_cast<std::size_t>(r)),
        sums(static_cast<std::size_t>(r)),
        marks(static_cast<std::size_t>(c)) {
    kernels.int8.quantize(x, type, c, x_stride, threshold, marks.data(),
                          {codes.data(), stride, block, absmax.data(), sums.data()}, 0, r);
    for (std::int64_t k = 0; k < c; ++k) {
      if (!marks[static_cast<std::size_t>(k)]) continue;
      outliers.push_back(k);
      for (std::int64_t row = 0; row < r; ++row) {
        sums[static_cast<std::size_t>(row)] -= at(row, k);
        at(row, k) = 0;
      }
    }
  }
  std::int8_t& at(std::int64_t row, std::int64_t k) {
    return codes[static_cast<std::size_t>(row * stride + k / cpu::kInt8Depth * block +
                                          k % cpu::kInt8Depth)];
  }
  cpu::Int8Product job() const {
    cpu::Int8Product product;
    product.x = codes.data();
    product.x_stride = stride;
    product.x_block = block;
    product.x_absmax = absmax.data();
    product.x_sums = sums.data();
    product.cols = cols;
    product.outliers = outliers.data();
    product.outlier_count = static_cast<std::int64_t>(outliers.size());
    return product;
  }
};

// A stored weight: random codes and scales, at an odd address or at a multiple of 64 bytes.
struct Int8Stored {
  std::int64_t rows, cols;
  std::vector<std::uint8_t> memory;
  std::int8_t* codes;
  std::vector<float> scales, bias;
  Int8Stored(std::int64_t r, std::int64_t c, bool odd, std::mt19937& random)
      : rows(r),
        cols(c),
        memory(static_cast<std::size_t>(r * c + 128)),
        scales(static_cast<std::size_t>(r)),
        bias(static_cast<std::size_t>(r)) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    codes = reinterpret_cast<std::int8_t*>(memory.data() + (64 - address % 64) + (odd ? 3 : 0));
    for (std::int64_t i = 0; i < r * c; ++i) codes[i] = static_cast<std::int8_t>(random());
    std::uniform_real_distribution<float> scale(0.001f, 0.02f);
    for (float& s : scales) s = scale(random);
    for (float& b : bias) b = std::normal_distribution<float>()(random);
  }
  const std::uint8_t* scale_bytes() const {
    return reinterpret_cast<const std::uint8_t*>(scales.data());
  }
};

}  // namespace vramkit::testing
