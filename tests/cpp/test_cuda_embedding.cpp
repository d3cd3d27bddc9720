// The bodies of the CUDA kernels that gather rows and reorder convolutions' weights
// (csrc/cuda/embedding.hpp), run on the host thread by thread over a launch's grid, against the
// scalar reference's decoding: bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/format.hpp"
#include "cpu/kernels.hpp"
#include "cuda/embedding.hpp"
#include "kernel_cases.hpp"

namespace vramkit::testing {
namespace {

using cpu::DType;
using cuda::Codes;
using cuda::Element;

Codes codes_of(const Format& format) {
  if (format.family == Family::cast) {
    return format.encoder == Encoder::fp16 ? Codes::fp16 : Codes::bf16;
  }
  if (format.family == Family::codebook) return format.bits == 4 ? Codes::table4 : Codes::table8;
  return format.bits == 4 ? Codes::affine4 : Codes::integer8;
}

// Calls run<codes, element>().
template <Codes C, class Run>
void with_element(DType type, const Run& run) {
  if (type == DType::f32) return run.template operator()<C, Element::f32>();
  if (type == DType::bf16) return run.template operator()<C, Element::bf16>();
  run.template operator()<C, Element::f16>();
}
template <class Run>
void with_types(Codes codes, DType type, const Run& run) {
  switch (codes) {
    case Codes::fp16:
      return with_element<Codes::fp16>(type, run);
    case Codes::bf16:
      return with_element<Codes::bf16>(type, run);
    case Codes::table4:
      return with_element<Codes::table4>(type, run);
    case Codes::table8:
      return with_element<Codes::table8>(type, run);
    case Codes::integer8:
      return with_element<Codes::integer8>(type, run);
    case Codes::affine4:
      return with_element<Codes::affine4>(type, run);
  }
}

cuda::NestedMap nested_map() {
  cuda::NestedMap nested;
  std::copy(dynamic_map().begin(), dynamic_map().end(), nested.value);
  return nested;
}

cuda::DecodeJob job_of(const cpu::Stored& stored) {
  const cpu::Weight& weight = stored.weight;
  cuda::DecodeJob job;
  job.codes = weight.codes;
  job.scales = weight.scales;
  job.extra = weight.extra;
  job.table = weight.table;
  job.nested_offset = weight.nested_offset;
  job.first_scale = weight.first_scale;
  job.rows = weight.at.rows;
  job.cols = weight.at.cols;
  job.row_code_bytes = weight.at.row_code_bytes;
  job.group = std::max<std::int64_t>(1, weight.at.group);
  job.groups_per_row = weight.at.groups_per_row;
  job.scale = stored.format.scale;
  return job;
}

template <Codes C>
cuda::DecodeTables tables_of(const cuda::DecodeJob& job) {
  const cuda::NestedMap nested = nested_map();
  cuda::DecodeTables shared;
  std::memset(&shared, 0xFF, sizeof(shared));
  for (int t = cuda::kThreads - 1; t >= 0; --t) cuda::fill_tables<C>(job, nested, shared, t);
  return shared;
}

// Returns whether all indices were in range.
bool gather(const cuda::GatherJob& job, Codes codes, DType type) {
  bool valid = true;
  with_types(codes, type, [&]<Codes C, Element E>() {
    const cuda::DecodeTables shared = tables_of<C>(job.weight);
    for (std::int64_t block = cuda::blocks_for(job.count, job.weight.cols) - 1; block >= 0;
         --block) {
      for (int t = cuda::kThreads - 1; t >= 0; --t) {
        valid = cuda::gather_block<C, E>(job, shared, block, t) && valid;
      }
    }
  });
  return valid;
}

TEST(CudaEmbedding, RowsHaveTheReferencesBits) {
  std::mt19937 random(31);
  for (const auto& [name, format] : cpu::all_formats()) {
    for (const std::int64_t cols : {1, 64, 129, 1000, 1024}) {
      if (!format.row_separable(cols)) continue;
      constexpr std::int64_t rows = 19, count = 45;
      const cpu::Stored stored(format, rows, cols, random);
      std::vector<std::int64_t> index(count);
      for (std::int64_t& i : index) i = static_cast<std::int64_t>(random() % rows);
      for (const DType type : cpu::kTypes) {
        const std::int64_t stride = cols + static_cast<std::int64_t>(random() % 2);
        const std::int64_t size = cpu::size_of(type);
        cpu::Buffer want(count * stride * size), got(count * stride * size);
        for (std::int64_t i = 0; i < count; ++i) {
          cpu::reference_kernels().dequantize(stored.weight, index[i], index[i] + 1,
                                              want.data() + i * stride * size, type, stride);
        }
        cuda::GatherJob job{job_of(stored), index.data(), count};
        job.weight.out = got.data();
        job.weight.out_stride = stride;
        EXPECT_TRUE(gather(job, codes_of(format), type));
        EXPECT_TRUE(want == got && got.intact()) << name << " x " << cols;
      }
    }
  }
}

TEST(CudaEmbedding, IndicesOutOfRangeTouchNothing) {
  std::mt19937 random(32);
  const cpu::Stored stored(builtin_format("int8"), 4, 16, random);
  constexpr std::int64_t kHuge = std::int64_t{1} << 62;
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{4}, kHuge, -kHuge}) {
    const std::int64_t index[] = {3, bad, 0};
    cpu::Buffer want(3 * 16 * 4), got(3 * 16 * 4);
    for (const std::int64_t i : {0, 2}) {
      cpu::reference_kernels().dequantize(stored.weight, index[i], index[i] + 1,
                                          want.data() + i * 64, DType::f32, 16);
    }
    cuda::GatherJob job{job_of(stored), index, 3};
    job.weight.out = got.data();
    job.weight.out_stride = 16;
    EXPECT_FALSE(gather(job, Codes::integer8, DType::f32));
    EXPECT_TRUE(want == got && got.intact());
  }
}

TEST(CudaTaps, WeightsOfConvolutionsAreTransposed) {
  std::mt19937 random(33);
  struct Case {
    std::int64_t channels, taps;
  };
  for (const auto& [name, format] : cpu::all_formats()) {
    for (const auto& [channels, taps] :
         {Case{3, 9}, Case{64, 9}, Case{500, 9}, Case{1, 300}, Case{700, 7}, Case{2, 2049},
          Case{2, 2048}, Case{4096, 1}, Case{3, 4999}}) {
      const std::int64_t cols = channels * taps;
      if (!format.row_separable(cols)) continue;
      constexpr std::int64_t rows = 5, first = 2, count = rows - first;
      const cpu::Stored stored(format, rows, cols, random);
      const DType type = cpu::kTypes[random() % 3];
      const std::int64_t size = cpu::size_of(type);
      cpu::Buffer plain(count * cols * size), want(count * cols * size), got(count * cols * size);
      cpu::reference_kernels().dequantize(stored.weight, first, rows, plain.data(), type, cols);
      for (std::int64_t r = 0; r < count; ++r) {
        for (std::int64_t c = 0; c < channels; ++c) {
          for (std::int64_t t = 0; t < taps; ++t) {
            std::memcpy(want.data() + (r * cols + t * channels + c) * size,
                        plain.data() + (r * cols + c * taps + t) * size,
                        static_cast<std::size_t>(size));
          }
        }
      }
      cuda::TapsJob job{job_of(stored), taps, channels};
      job.weight.first_row = first;
      job.weight.rows = count;
      job.weight.out = got.data();
      with_types(codes_of(format), type, [&]<Codes C, Element E>() {
        const cuda::DecodeTables shared = tables_of<C>(job.weight);
        for (std::int64_t block = count * cuda::tiles_per_row(cols) - 1; block >= 0; --block) {
          cuda::TapsTile tile;
          std::memset(&tile, 0xFF, sizeof(tile));
          for (int t = cuda::kThreads - 1; t >= 0; --t) {
            cuda::fetch_tile<C>(job, shared, tile, block, t);
          }
          for (int t = cuda::kThreads - 1; t >= 0; --t) cuda::store_tile<E>(job, tile, block, t);
        }
      });
      EXPECT_TRUE(want == got && got.intact()) << name << " " << channels << " x " << taps;
    }
  }
}

}  // namespace
}  // namespace vramkit::testing
