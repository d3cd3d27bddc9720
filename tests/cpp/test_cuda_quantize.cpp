// The bodies of the CUDA kernels that encode (csrc/cuda/quantize.hpp), run on the host over a
// launch's grid with emulated teams, against the scalar reference: bit for bit. And stochastic
// rounding, against published numbers of its generator and on the CPU's own unit.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/format.hpp"
#include "core/stochastic.hpp"
#include "cpu/kernels.hpp"
#include "cpu/stochastic.hpp"
#include "cuda/quantize.hpp"
#include "emulated_team.hpp"
#include "kernel_cases.hpp"

namespace vramkit::testing {
namespace {

using cpu::Buffer;
using cpu::Content;
using cpu::DType;
using cpu::Encoded;
using cpu::Matrix;
using cuda::Element;
using cuda::QuantizeJob;
using cuda::QuantizeKernel;
using cuda::QuantizePlan;

cuda::Coder coder_of(const Format& format) {
  switch (format.encoder) {
    case Encoder::midpoint:
      return format.bits == 4 ? cuda::Coder::table4 : cuda::Coder::table8;
    case Encoder::e4m3:
      return cuda::Coder::e4m3;
    case Encoder::e5m2:
      return cuda::Coder::e5m2;
    default:
      return cuda::Coder::integer8;
  }
}

cuda::SortedCodes sorted_on_device(const std::vector<float>& table) {
  cuda::SortedCodes sorted;
  std::memset(&sorted, 0xFF, sizeof(sorted));
  cuda::SortScratch scratch;
  std::memset(&scratch, 0xFF, sizeof(scratch));
  const auto entries = static_cast<int>(table.size());
  for (int t = cuda::kThreads - 1; t >= 0; --t) {
    cuda::sort_rank(table.data(), entries, scratch, sorted, t);
  }
  for (int t = cuda::kThreads - 1; t >= 0; --t) cuda::sort_bound(entries, scratch, sorted, t);
  return sorted;
}

// One block after another, the last first, as quantize.cu does it; the blocks' own order of groups.
template <class Body>
void each_group(const QuantizePlan& plan, const Body& body) {
  if (plan.kernel == QuantizeKernel::block) {
    for (std::int64_t block = plan.blocks - 1; block >= 0; --block) {
      EmulatedTeam team(cuda::kThreads);
      body(team, block);
    }
    return;
  }
  const int per_block = cuda::kThreads / plan.width;
  for (std::int64_t block = plan.blocks - 1; block >= 0; --block) {
    for (int in_block = per_block - 1; in_block >= 0; --in_block) {
      EmulatedTeam team(plan.width);
      const std::int64_t first = block * per_block * cuda::kGroupRounds + in_block;
      for (int round = 0; round < cuda::kGroupRounds; ++round) {
        const std::int64_t index = first + static_cast<std::int64_t>(round) * per_block;
        if (index < plan.teams) body(team, index);
      }
    }
  }
}

template <Element E, bool stochastic>
void emulate(const QuantizeJob& job) {
  const QuantizePlan plan = cuda::plan_of(job);
  cuda::SortedCodes sorted;
  std::memset(&sorted, 0xFF, sizeof(sorted));
  for (int t = cuda::kThreads - 1; t >= 0; --t) cuda::fetch_sorted(job, sorted, t);
  each_group(plan, [&](EmulatedTeam& team, std::int64_t index) {
    switch (plan.kernel) {
      case QuantizeKernel::small:
        return cuda::quantize_group<E, 1, false, stochastic>(job, sorted, team, index);
      case QuantizeKernel::warp:
        return cuda::quantize_group<E, cuda::kWarpKept, false, stochastic>(job, sorted, team,
                                                                           index);
      case QuantizeKernel::block:
        return cuda::quantize_group<E, cuda::kBlockKept, true, stochastic>(job, sorted, team,
                                                                           index);
      case QuantizeKernel::search:
        if (job.zero_point) return cuda::search_group<E, 4>(job, team, index);
        return cuda::search_group<E, 8>(job, team, index);
      case QuantizeKernel::pair:
        return cuda::quantize_pair<E>(job, sorted, team, index);
    }
  });
}

template <bool stochastic = false>
void emulate(const QuantizeJob& job, DType type) {
  if (type == DType::f32) return emulate<Element::f32, stochastic>(job);
  if (type == DType::bf16) return emulate<Element::bf16, stochastic>(job);
  emulate<Element::f16, stochastic>(job);
}

QuantizeJob job_of(const Format& format, const Matrix& m, const Layout& at, Encoded& to,
                   const cuda::SortedCodes& sorted) {
  QuantizeJob job;
  job.x = m.bytes.data();
  job.rows = m.rows;
  job.cols = m.cols;
  job.stride = m.stride;
  job.group = at.group;
  job.groups_per_row = at.groups_per_row;
  job.row_code_bytes = at.row_code_bytes;
  job.codes = to.codes.data();
  job.scales = to.scales.data();
  job.extra = to.extra.data();
  job.sorted = format.encoder == Encoder::midpoint ? &sorted : nullptr;
  job.coder = coder_of(format);
  job.searched = format.encoder == Encoder::searched;
  job.zero_point = format.zero_point;
  return job;
}

// What the reference leaves to the caller: the scales of nested formats come as float32.
void expect_same(const Encoded& want, const Encoded& got, const std::string& what) {
  EXPECT_TRUE(want.codes == got.codes) << what << ": codes";
  EXPECT_TRUE(want.scales == got.scales) << what << ": scales";
  EXPECT_TRUE(want.extra == got.extra) << what << ": zero points";
  EXPECT_TRUE(got.codes.intact() && got.scales.intact() && got.extra.intact()) << what;
}

TEST(CudaQuantize, EveryFormatHasTheReferencesBits) {
  std::mt19937 random(23);
  std::vector<int> used(5);
  for (const auto& [name, format] : cpu::all_formats()) {
    if (format.family == Family::cast) continue;
    const cpu::SortedTable sorted = cpu::sorted_of(format);
    const cuda::SortedCodes on_device = sorted_on_device(
        format.encoder == Encoder::midpoint ? format.table : std::vector<float>(16));
    for (const std::int64_t cols : {1, 7, 31, 64, 129, 200, 384, 1000, 1537}) {
      if (!format.row_separable(cols)) continue;
      for (const Content content : cpu::kContents) {
        const DType type = cpu::kTypes[random() % 3];
        const std::int64_t rows = 1 + static_cast<std::int64_t>(random() % 9);
        const Matrix m = cpu::make_matrix(content, format, rows, cols, type, random() % 3, random);
        const std::int64_t offset = static_cast<std::int64_t>(random() % 2) * 3;
        Encoded want(format, rows, cols, offset), got(format, rows, cols, offset);
        cpu::encode(cpu::reference_kernels(), format, sorted, m, want, 0, rows);
        const QuantizeJob job = job_of(format, m, got.at, got, on_device);
        used[static_cast<std::size_t>(cuda::plan_of(job).kernel)]++;
        emulate(job, type);
        expect_same(want, got,
                    name + " " + std::to_string(rows) + " x " + std::to_string(cols) + " content " +
                        std::to_string(static_cast<int>(content)) + " type " +
                        std::to_string(static_cast<int>(type)));
      }
    }
  }
  for (const int count : used) EXPECT_GT(count, 0);
}

// Rows whose chunks do not all stay in registers.
TEST(CudaQuantize, LongRowsAreReadAgain) {
  std::mt19937 random(5);
  constexpr std::int64_t kept = std::int64_t{cuda::kThreads} * cuda::kChunk * cuda::kBlockKept;
  for (const char* name : {"fp8", "fp8_e5m2", "int8"}) {
    const Format& format = builtin_format(name);
    for (const std::int64_t cols : {kept - 1, kept, kept + 1, kept + 2500}) {
      const Matrix m = cpu::make_matrix(Content::normal, format, 2, cols, DType::bf16, 0, random);
      // The largest magnitude at the very end.
      cpu::write(m.bytes.data(), DType::bf16, 2 * cols - 1, -3.0f);
      Encoded want(format, 2, cols, 0), got(format, 2, cols, 0);
      cpu::encode(cpu::reference_kernels(), format, {}, m, want, 0, 2);
      emulate(job_of(format, m, got.at, got, {}), DType::bf16);
      expect_same(want, got, std::string(name) + " " + std::to_string(cols));
    }
  }
}

TEST(CudaQuantize, FlatBlocksAcrossRowsAreOneRow) {
  std::mt19937 random(6);
  for (const char* name : {"nf4", "fp4"}) {
    const Format& format = builtin_format(name);
    const cpu::SortedTable sorted = cpu::sorted_of(format);
    const cuda::SortedCodes on_device = sorted_on_device(format.table);
    for (const std::int64_t count : {1, 63, 64, 65, 1001}) {
      const Matrix m = cpu::make_matrix(Content::mixed, format, 1, count, DType::f32, 0, random);
      const std::int64_t whole = count / 64, rest = count % 64;
      Buffer want((count + 1) / 2), got((count + 1) / 2), scales(4 * ((count + 63) / 64)),
          mine(4 * ((count + 63) / 64));
      cpu::reference_kernels().quantize(format, sorted, format.layout(whole, 64), m.bytes.data(),
                                        DType::f32, 64, {want.data(), scales.data(), nullptr}, 0,
                                        whole);
      if (rest) {
        const Layout tail{
            .rows = 1, .cols = rest, .group = rest, .groups_per_row = 1, .row_code_bytes = 32};
        cpu::reference_kernels().quantize(
            format, sorted, tail, m.bytes.data() + 4 * 64 * whole, DType::f32, rest,
            {want.data() + 32 * whole, scales.data() + 4 * whole, nullptr}, 0, 1);
      }
      QuantizeJob job;
      job.x = m.bytes.data();
      job.rows = 1;
      job.cols = job.stride = count;
      job.group = 64;
      job.groups_per_row = (count + 63) / 64;
      job.row_code_bytes = got.size();
      job.codes = got.data();
      job.scales = mine.data();
      job.sorted = &on_device;
      emulate(job, DType::f32);
      EXPECT_TRUE(want == got && got.intact()) << name << " " << count;
      EXPECT_TRUE(scales == mine && mine.intact()) << name << " " << count;
    }
  }
}

TEST(CudaQuantize, TablesAreSortedAsOnTheCpu) {
  for (const auto& [name, format] : cpu::all_formats()) {
    if (format.encoder != Encoder::midpoint) continue;
    const cpu::SortedTable want = cpu::sort_table(format.table);
    const cuda::SortedCodes got = sorted_on_device(format.table);
    for (std::size_t k = 0; k < want.code_of.size(); ++k) {
      EXPECT_EQ(want.code_of[k], got.code[k]) << name << " " << k;
      if (k < want.bounds.size()) {
        EXPECT_EQ(std::bit_cast<std::uint32_t>(want.bounds[k]),
                  std::bit_cast<std::uint32_t>(got.bound[k]))
            << name << " " << k;
      }
    }
  }
}

// Bounds of the caller's own: how many lie below, and zeros for a block of zeros.
TEST(CudaQuantize, GivenBoundsAreCountedBelow) {
  std::mt19937 random(8);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> bounds(255);
  for (float& bound : bounds) bound = uniform(random);
  std::sort(bounds.begin(), bounds.end());
  bounds[40] = bounds[41];
  cuda::SortedCodes sorted;
  for (int t = 0; t < 256; ++t) cuda::take_bound(bounds.data(), sorted, t);
  constexpr std::int64_t block = 100, count = 1050;
  std::vector<float> x(count);
  for (float& value : x) value = uniform(random) * 3.0f;
  std::fill(x.begin() + 300, x.begin() + 400, 0.0f);
  Buffer codes(count), scales(4 * 11);
  QuantizeJob job;
  job.x = x.data();
  job.rows = 1;
  job.cols = job.stride = job.row_code_bytes = count;
  job.group = block;
  job.groups_per_row = 11;
  job.codes = codes.data();
  job.scales = scales.data();
  job.sorted = &sorted;
  job.coder = cuda::Coder::table8;
  job.clear_empty = true;
  emulate(job, DType::f32);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto from = x.begin() + i / block * block;
    const auto to = std::min(from + block, x.end());
    float absmax = 0.0f;
    for (auto it = from; it != to; ++it) absmax = std::max(absmax, std::fabs(*it));
    const float y = x[static_cast<std::size_t>(i)] * (1.0f / absmax);
    const auto below = std::count_if(bounds.begin(), bounds.end(), [&](float bound) {
      return std::clamp(y, -1.0f, 1.0f) > bound;
    });
    EXPECT_EQ(codes.data()[i], absmax == 0.0f ? 0 : below) << i;
    EXPECT_EQ(cpu::read(scales.data(), DType::f32, i / block), absmax);
  }
}

TEST(CudaQuantize, GridsCoverAllGroupsOnce) {
  for (const std::int64_t group : {2, 3, 64, 128, 300, 5000}) {
    for (const bool searched : {false, true}) {
      QuantizeJob job;
      job.rows = 37;
      job.cols = 10'007;
      job.group = group;
      job.groups_per_row = (job.cols + group - 1) / group;
      job.searched = job.zero_point = searched;
      const QuantizePlan plan = cuda::plan_of(job);
      std::vector<int> seen(static_cast<std::size_t>(plan.teams));
      each_group(plan, [&](EmulatedTeam&, std::int64_t index) {
        ++seen[static_cast<std::size_t>(index)];
      });
      EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
      const std::int64_t per_row =
          cuda::shares_bytes(job) ? cuda::pairs_per_row(job) : job.groups_per_row;
      EXPECT_EQ(plan.teams, job.rows * per_row);
      // Whole groups fit what a team keeps, unless a block works on them, which reads again.
      if (plan.kernel == QuantizeKernel::small) {
        EXPECT_LE(group, plan.width * cuda::kChunk);
      }
      if (plan.kernel == QuantizeKernel::warp) {
        EXPECT_LE(group, plan.width * cuda::kChunk * cuda::kWarpKept);
      }
    }
  }
}

// Known answers of Random123 1.14 (kat_vectors: philox4x32 10).
TEST(Stochastic, GeneratorIsPhilox) {
  const auto expect = [](PhiloxWords counter, std::uint64_t key, PhiloxWords want) {
    const PhiloxWords got = philox(counter, key);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(want.word[i], got.word[i]);
  };
  expect({{0, 0, 0, 0}}, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  expect({{~0u, ~0u, ~0u, ~0u}}, ~std::uint64_t{0},
         {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  expect({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822,
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(Stochastic, CudaHasTheCpusBits) {
  std::mt19937 random(9);
  std::vector<std::pair<std::string, Format>> formats;
  for (const char* name : {"fp8", "fp8_e5m2", "int8"}) {
    formats.emplace_back(name, builtin_format(name));
    Format groups = builtin_format(name);
    groups.grain = Grain::group;
    for (const std::int64_t block : {5, 48, 500}) {
      groups.block = block;
      formats.emplace_back(name + std::to_string(block), groups);
    }
  }
  for (const auto& [name, format] : formats) {
    for (const std::int64_t cols : {1, 7, 130, 1537}) {
      for (const Content content :
           {Content::normal, Content::small, Content::mixed, Content::broken}) {
        const DType type = cpu::kTypes[random() % 3];
        const std::uint64_t seed = random() * (std::uint64_t{1} << 40);
        const Matrix m = cpu::make_matrix(content, format, 5, cols, type, random() % 3, random);
        Encoded want(format, 5, cols, 0), got(format, 5, cols, 0);
        cpu::quantize_stochastic(format, want.at, m.bytes.data(), type, m.stride,
                                 {want.codes.data(), want.scales.data(), nullptr}, seed, 0, 5);
        QuantizeJob job = job_of(format, m, got.at, got, {});
        job.searched = false;
        job.seed = seed;
        emulate<true>(job, type);
        expect_same(want, got, name + " x " + std::to_string(cols));
      }
    }
  }
}

template <Element From, cuda::Codes To>
void run_cast(const cuda::StochasticCast& job) {
  for (std::int64_t block = cuda::blocks_for(job.cast.rows, job.cast.cols) - 1; block >= 0;
       --block) {
    for (int t = cuda::kThreads - 1; t >= 0; --t) cuda::stochastic_block<From, To>(job, block, t);
  }
}

TEST(Stochastic, CastsOnCudaHaveTheCpusBits) {
  std::mt19937 random(10);
  for (const char* name : {"fp16", "bf16"}) {
    const Format& format = builtin_format(name);
    for (const std::int64_t cols : {1, 7, 130, 4099}) {
      std::vector<std::uint32_t> x(static_cast<std::size_t>(3 * (cols + 1)));
      for (std::uint32_t& bits : x) {
        bits = static_cast<std::uint32_t>(random());
        if (random() % 2 == 0) bits = (bits & 0x83ffffffu) | 0x38000000u;
      }
      Buffer want(6 * cols), got(6 * cols);
      cpu::quantize_stochastic(format, format.layout(3, cols), x.data(), DType::f32, cols + 1,
                               {want.data(), nullptr, nullptr}, 77, 0, 3);
      const cuda::StochasticCast job{{x.data(), 3, cols, cols + 1, got.data()}, 77};
      if (format.encoder == Encoder::fp16) {
        run_cast<Element::f32, cuda::Codes::fp16>(job);
      } else {
        run_cast<Element::f32, cuda::Codes::bf16>(job);
      }
      EXPECT_TRUE(want == got && got.intact()) << name << " " << cols;
    }
  }
}

}  // namespace
}  // namespace vramkit::testing
