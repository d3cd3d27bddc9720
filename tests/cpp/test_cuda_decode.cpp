// The bodies of the CUDA kernels that decode and cast (csrc/cuda/decode.hpp), run on the host
// thread by thread over a launch's grid, against the scalar reference: bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <vector>

#include "core/format.hpp"
#include "cpu/kernels.hpp"
#include "cuda/decode.hpp"

namespace vramkit::testing {
namespace {

using cuda::Codes;
using cuda::Element;

// As a launch runs: all threads of a block through the first step, then all through the second.
// Blocks and threads in an order that no kernel may depend on.
template <class First, class Second>
void launch(std::int64_t blocks, First first, Second second) {
  for (std::int64_t block = blocks - 1; block >= 0; --block) {
    cuda::DecodeTables shared;
    std::memset(&shared, 0xFF, sizeof(shared));
    for (int thread = cuda::kThreads - 1; thread >= 0; --thread) first(shared, thread);
    for (int thread = cuda::kThreads - 1; thread >= 0; --thread) second(shared, block, thread);
  }
}

template <Codes C, Element E>
void emulate(const cuda::DecodeJob& job, const cuda::NestedMap& nested) {
  launch(
      cuda::blocks_for(job.rows, job.cols),
      [&](cuda::DecodeTables& shared, int thread) {
        cuda::fill_tables<C>(job, nested, shared, thread);
      },
      [&](const cuda::DecodeTables& shared, std::int64_t block, int thread) {
        cuda::decode_block<C, E>(job, shared, block, thread);
      });
}

template <Codes C>
void emulate(const cuda::DecodeJob& job, Element out, const cuda::NestedMap& nested) {
  if (out == Element::f32) return emulate<C, Element::f32>(job, nested);
  if (out == Element::bf16) return emulate<C, Element::bf16>(job, nested);
  emulate<C, Element::f16>(job, nested);
}

void emulate(const cuda::DecodeJob& job, Codes codes, Element out, const cuda::NestedMap& nested) {
  switch (codes) {
    case Codes::fp16:
      return emulate<Codes::fp16>(job, out, nested);
    case Codes::bf16:
      return emulate<Codes::bf16>(job, out, nested);
    case Codes::table4:
      return emulate<Codes::table4>(job, out, nested);
    case Codes::table8:
      return emulate<Codes::table8>(job, out, nested);
    case Codes::integer8:
      return emulate<Codes::integer8>(job, out, nested);
    case Codes::affine4:
      return emulate<Codes::affine4>(job, out, nested);
  }
}

// Every bit pattern of codes is legal; scales are any floats, some of them not finite.
struct Stored {
  std::vector<std::uint8_t> codes, scales, extra;
};

Stored random_weight(const Format& format, const PartBytes& size, std::mt19937& random,
                     std::size_t shift) {
  Stored w;
  w.codes.resize(static_cast<std::size_t>(size.codes) + shift);
  w.scales.resize(static_cast<std::size_t>(size.scales) + shift);
  w.extra.resize(static_cast<std::size_t>(size.extra) + shift);
  for (auto* part : {&w.codes, &w.scales, &w.extra}) {
    for (std::uint8_t& byte : *part) byte = static_cast<std::uint8_t>(random());
  }
  // Of two NaN that are multiplied, either may come out: the compiler orders the factors.
  const bool nan_codes = std::any_of(format.table.begin(), format.table.end(),
                                     [](float value) { return std::isnan(value); });
  const auto floats = [&](std::vector<std::uint8_t>& part) {
    std::uniform_real_distribution<float> usual(-3.0f, 3.0f);
    constexpr float kOdd[] = {0.0f,
                              -0.0f,
                              1e-45f,
                              3e38f,
                              std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::quiet_NaN()};
    for (std::size_t at = shift; at + 4 <= part.size(); at += 4) {
      float value = random() % 8 == 0 ? kOdd[random() % (nan_codes ? 5 : 6)] : usual(random);
      if (random() % 64 == 0 && !nan_codes)
        value = std::bit_cast<float>(0xffc12345u);  // a NaN with a payload
      std::memcpy(part.data() + at, &value, 4);
    }
  };
  if (format.scale == ScaleType::f32) floats(w.scales);
  if (format.scale == ScaleType::nested) floats(w.extra);
  return w;
}

std::vector<Format> formats() {
  std::vector<Format> all;
  for (const NamedFormat& named : builtin_formats()) all.push_back(named.format);
  // Groups that end within a thread's eight elements, and blocks that a row is a multiple of.
  Format odd = builtin_format("int4");
  odd.block = 5;
  all.push_back(odd);
  odd = builtin_format("nf4");
  odd.block = 6;
  all.push_back(odd);
  Format groups = builtin_format("int8");
  groups.grain = Grain::group;
  groups.block = 12;
  all.push_back(groups);
  return all;
}

Codes codes_of(const Format& format) {
  if (format.family == Family::cast) {
    return format.encoder == Encoder::fp16 ? Codes::fp16 : Codes::bf16;
  }
  if (format.family == Family::codebook) return format.bits == 4 ? Codes::table4 : Codes::table8;
  return format.bits == 4 ? Codes::affine4 : Codes::integer8;
}

cpu::DType dtype_of(Element element) {
  if (element == Element::f32) return cpu::DType::f32;
  return element == Element::bf16 ? cpu::DType::bf16 : cpu::DType::f16;
}

TEST(CudaDecode, EveryFormatHasTheReferencesBits) {
  cuda::NestedMap nested;
  std::copy(dynamic_map().begin(), dynamic_map().end(), nested.value);
  std::mt19937 random(11);
  for (const Format& format : formats()) {
    for (const std::int64_t wanted : {1, 7, 64, 384, 1000}) {
      // Whole blocks, where they are not to cross rows.
      const std::int64_t cols = format.grain == Grain::flat
                                    ? (wanted + format.block - 1) / format.block * format.block
                                    : wanted;
      const std::int64_t rows = 1 + static_cast<std::int64_t>(random() % 37);
      const std::int64_t shape[] = {rows, cols};
      for (const std::size_t shift : {std::size_t{0}, std::size_t{3}}) {  // of all addresses
        const Stored w = random_weight(format, format.bytes(shape), random, shift);
        cpu::Weight weight;
        weight.format = &format;
        weight.at = format.layout(rows, cols);
        weight.codes = w.codes.data() + shift;
        weight.scales = w.scales.data() + shift;
        weight.extra = w.extra.data() + shift;
        weight.table = format.table.data();
        if (format.scale == ScaleType::nested) {
          weight.nested_offset = w.extra.data() + w.extra.size() - 4;
        }
        const std::int64_t first = static_cast<std::int64_t>(random() % rows), count = rows - first;
        for (const Element element : {Element::f32, Element::bf16, Element::f16}) {
          const std::int64_t bytes = cpu::size_of(dtype_of(element));
          const std::int64_t stride = cols + static_cast<std::int64_t>(shift);
          std::vector<std::uint8_t> want(static_cast<std::size_t>(count * stride * bytes), 0xAB);
          std::vector<std::uint8_t> got = want;
          cpu::reference_kernels().dequantize(weight, first, rows, want.data(), dtype_of(element),
                                              stride);
          cuda::DecodeJob job;
          job.codes = weight.codes;
          job.scales = weight.scales;
          job.extra = weight.extra;
          job.table = weight.table;
          job.nested_offset = weight.nested_offset;
          job.rows = count;
          job.cols = cols;
          job.first_row = first;
          job.row_code_bytes = weight.at.row_code_bytes;
          job.group = std::max<std::int64_t>(1, weight.at.group);
          job.groups_per_row = weight.at.groups_per_row;
          job.scale = format.scale;
          job.out = got.data();
          job.out_stride = stride;
          emulate(job, codes_of(format), element, nested);
          EXPECT_EQ(want, got) << spec_of(format)[0] << ' ' << format.bits << ' ' << rows << " x "
                               << cols << " shift " << shift << " to " << static_cast<int>(element);
        }
      }
    }
  }
}

TEST(CudaDecode, EveryCodeAndEveryHalf) {
  // All 65536 bit patterns of 16-bit weights, to each type.
  std::vector<std::uint16_t> halves(1 << 16);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  for (const char* name : {"fp16", "bf16"}) {
    const Format& format = builtin_format(name);
    cpu::Weight weight;
    weight.format = &format;
    weight.at = format.layout(256, 256);
    weight.codes = reinterpret_cast<const std::uint8_t*>(halves.data());
    for (const Element element : {Element::f32, Element::bf16, Element::f16}) {
      const auto bytes = static_cast<std::size_t>(cpu::size_of(dtype_of(element)));
      std::vector<std::uint8_t> want(halves.size() * bytes), got(want.size());
      cpu::reference_kernels().dequantize(weight, 0, 256, want.data(), dtype_of(element), 256);
      cuda::DecodeJob job;
      job.codes = weight.codes;
      job.rows = job.cols = job.out_stride = 256;
      job.row_code_bytes = 512;
      job.out = got.data();
      emulate(job, codes_of(format), element, {});
      EXPECT_EQ(want, got) << name << ' ' << static_cast<int>(element);
    }
  }
}

template <Element From, Codes To>
void emulate(const cuda::CastJob& job) {
  launch(
      cuda::blocks_for(job.rows, job.cols), [](cuda::DecodeTables&, int) {},
      [&](const cuda::DecodeTables&, std::int64_t block, int thread) {
        cuda::cast_block<From, To>(job, block, thread);
      });
}

template <Element From>
void check_cast(std::span<const std::uint8_t> x, std::int64_t rows, std::int64_t cols,
                std::int64_t stride) {
  for (const char* name : {"fp16", "bf16"}) {
    const Format& format = builtin_format(name);
    std::vector<std::uint8_t> want(static_cast<std::size_t>(2 * rows * cols)), got(want.size());
    cpu::reference_kernels().quantize(format, {}, format.layout(rows, cols), x.data(),
                                      dtype_of(From), stride, {want.data(), nullptr, nullptr}, 0,
                                      rows);
    const cuda::CastJob job{x.data(), rows, cols, stride, got.data()};
    if (format.encoder == Encoder::fp16) {
      emulate<From, Codes::fp16>(job);
    } else {
      emulate<From, Codes::bf16>(job);
    }
    EXPECT_EQ(want, got) << name << " from " << static_cast<int>(From);
  }
}

TEST(CudaDecode, CastsHaveTheReferencesBits) {
  std::mt19937 random(3);
  // Any bit pattern: subnormals, overflows, NaN with payloads, ties.
  std::vector<std::uint32_t> floats(3 * 10'007);
  for (std::uint32_t& bits : floats) {
    bits = static_cast<std::uint32_t>(random());
    if (random() % 2 == 0) bits &= 0xfffff000u;                        // ties are frequent then
    if (random() % 4 == 0) bits = (bits & 0x83ffffffu) | 0x38000000u;  // about float16's smallest
  }
  const std::span<const std::uint8_t> bytes(reinterpret_cast<const std::uint8_t*>(floats.data()),
                                            4 * floats.size());
  check_cast<Element::f32>(bytes, 3, 10'007, 10'007);
  check_cast<Element::f32>(bytes, 3, 9'001, 10'007);
  std::vector<std::uint16_t> halves(1 << 16);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  const std::span<const std::uint8_t> all(reinterpret_cast<const std::uint8_t*>(halves.data()),
                                          2 * halves.size());
  check_cast<Element::f16>(all, 256, 256, 256);
  check_cast<Element::bf16>(all, 256, 256, 256);
  check_cast<Element::bf16>(all.subspan(2), 255, 251, 256);  // no address that vectors like
}

TEST(CudaDecode, GridsCoverAllAndPlacesAreRight) {
  for (const std::int64_t cols : {1, 8, 9, 4096}) {
    for (const std::int64_t rows : {1, 3, 1000}) {
      const std::int64_t chunks = rows * cuda::chunks_per_row(cols);
      const std::int64_t each = std::int64_t{cuda::kThreads} * cuda::kRounds;
      EXPECT_GE(cuda::blocks_for(rows, cols) * each, chunks);
      EXPECT_LT((cuda::blocks_for(rows, cols) - 1) * each, chunks);
    }
  }
  // Past 32 bits too.
  for (const std::int64_t chunk : {std::int64_t{0}, std::int64_t{12'345}, std::int64_t{1} << 33}) {
    for (const std::int64_t per_row :
         {std::int64_t{1}, std::int64_t{7}, (std::int64_t{1} << 32) + 1}) {
      const cuda::ChunkPlace at = cuda::place_of(chunk, per_row);
      EXPECT_EQ(at.row, chunk / per_row);
      EXPECT_EQ(at.col, chunk % per_row * cuda::kChunk);
    }
  }
}

}  // namespace
}  // namespace vramkit::testing
