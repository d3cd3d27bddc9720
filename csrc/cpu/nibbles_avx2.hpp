// Products of a few rows with weights of four-bit codes, on AVX2.
//
// A table of sixteen floats is split into its bytes, each of which a byte shuffle looks up for
// thirty-two codes at a time; interleaving puts the floats together. Values that are bfloat16
// numbers need their upper two bytes only: integers less a zero point always are, and a codebook's
// are rounded to it where x is bfloat16, as when a decoded weight is cast. Scales stay float32.
//
// A row is walked in chunks of 64 elements, which come out in an order of the shuffles' making; x
// is rearranged into that order once per call, with zeros past the last column. Columns are taken
// in blocks whose x fits the first-level cache, rows in tiles whose partial sums do.
#pragma once
#include "cpu/vector_common.hpp"

namespace vramkit::cpu {
namespace {

constexpr std::int64_t kNibbleChunk = 64;        // elements
constexpr std::int64_t kNibbleTile = 32;         // rows of the weight
constexpr std::int64_t kNibbleBlock = 32 << 10;  // bytes of x
constexpr int kNibbleVectors = 8;                // of a chunk

// One byte of each of sixteen floats, the most significant first.
template <int count>
struct ByteTables {
  __m256i byte[count];
};

// 32 codes, one in each byte, as four vectors of floats.
void look_up(const ByteTables<2>& table, __m256i codes, F* out) {
  const __m256i high = _mm256_shuffle_epi8(table.byte[0], codes);
  const __m256i low = _mm256_shuffle_epi8(table.byte[1], codes);
  const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
    out[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(words[i], upper));
  }
}

void look_up(const ByteTables<4>& table, __m256i codes, F* out) {
  __m256i byte[4];
  for (int i = 0; i < 4; ++i) byte[i] = _mm256_shuffle_epi8(table.byte[i], codes);
  const __m256i upper[2] = {_mm256_unpacklo_epi8(byte[1], byte[0]),
                            _mm256_unpackhi_epi8(byte[1], byte[0])};
  const __m256i lower[2] = {_mm256_unpacklo_epi8(byte[3], byte[2]),
                            _mm256_unpackhi_epi8(byte[3], byte[2])};
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower[i], upper[i]));
    out[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower[i], upper[i]));
  }
}

// Which byte of 32 lies in lane `lane` of vector `vector` (of four) of look_up's.
template <int count>
constexpr int byte_at(int vector, int lane) {
  const int start = 16 * (lane / 4) + 8 * (vector / 2), i = lane % 4;
  return count == 2 ? start + 2 * i + vector % 2 : start + 4 * (vector % 2) + i;
}

// A codebook: the same tables for all groups.
template <int count>
class NibbleCodebook {
 public:
  static constexpr int bytes = count;
  explicit NibbleCodebook(const Weight& weight) {
    alignas(16) std::uint8_t split[count][16];
    for (int code = 0; code < 16; ++code) {
      std::uint32_t bits = 0;
      if constexpr (count == 2) {
        bits = std::uint32_t{float_to_bf16(weight.table[code])} << 16;
      } else {
        std::memcpy(&bits, weight.table + code, sizeof(bits));
      }
      for (int b = 0; b < count; ++b) {
        split[b][code] = static_cast<std::uint8_t>(bits >> (24 - 8 * b));
      }
    }
    for (int b = 0; b < count; ++b) {
      tables_.byte[b] =
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(split[b])));
    }
  }
  void groups(std::int64_t, std::int64_t) {}
  const ByteTables<count>& tables() const { return tables_; }

 private:
  ByteTables<count> tables_;
};

// The bytes of code - zero for each zero point and code.
struct ShiftedNibbles {
  alignas(16) std::uint8_t byte[256][2][16] = {};
  constexpr ShiftedNibbles() {
    for (int zero = 0; zero < 256; ++zero) {
      for (int code = 0; code < 16; ++code) {
        const auto bits = __builtin_bit_cast(std::uint32_t, static_cast<float>(code - zero));
        byte[zero][0][code] = static_cast<std::uint8_t>(bits >> 24);
        byte[zero][1][code] = static_cast<std::uint8_t>(bits >> 16);
      }
    }
  }
};
// Made by the compiler: code that runs as the library loads must not need this unit's processor.
constexpr ShiftedNibbles shifted_nibbles;

class NibbleIntegers {
 public:
  static constexpr int bytes = 2;
  explicit NibbleIntegers(const Weight& weight) : zeros_(weight.extra) {}
  // The groups of the chunk's first and second half.
  void groups(std::int64_t first, std::int64_t second) {
    for (int b = 0; b < 2; ++b) {
      tables_.byte[b] = _mm256_set_m128i(table(second, b), table(first, b));
    }
  }
  const ByteTables<2>& tables() const { return tables_; }

 private:
  __m128i table(std::int64_t group, int b) const {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(shifted_nibbles.byte[zeros_[group]][b]));
  }
  const std::uint8_t* zeros_;
  ByteTables<2> tables_;
};

// What one call works on.
struct NibbleJob {
  const Weight& weight;
  const float* x;      // rearranged: [chunks][T][vectors][lanes]
  const float* valid;  // the last chunk's elements: 1, or 0 past the last column
  const float* bias;
  std::uint8_t* out;
  DType type;
  std::int64_t out_stride, begin, end;
};

// The elements of a chunk in a decoder's order.
template <int bytes>
void arrange_chunk(const float* chunk, float* out) {
#pragma GCC unroll 8
  for (int v = 0; v < kNibbleVectors; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) {
      out[v * kLanes + lane] =
          chunk[2 * byte_at<bytes>(v % 4, lane) + v / 4];  // high nibbles first
    }
  }
}

// Rearranges T rows of x, and fills `valid`.
template <int T, int bytes>
void arrange_nibbles(const void* x, DType type, std::int64_t stride, std::int64_t cols, float* out,
                     float* valid) {
  const Scratch<float> buffer(cols);
  for (int t = 0; t < T; ++t) {
    const float* row = float_row(x, type, t * stride, cols, buffer.get());
    float* target = out + t * kNibbleChunk;
    std::int64_t k = 0;
    for (; k + kNibbleChunk <= cols; k += kNibbleChunk, target += T * kNibbleChunk) {
      arrange_chunk<bytes>(row + k, target);
    }
    if (k == cols) continue;
    float staged[2][kNibbleChunk] = {};
    for (std::int64_t i = 0; i < cols - k; ++i) {
      staged[0][i] = row[k + i];
      staged[1][i] = 1.0f;
    }
    arrange_chunk<bytes>(staged[0], target);
    arrange_chunk<bytes>(staged[1], valid);
  }
}

// Sums for each row of x: at least eight in all hide the latency of an FMA.
template <int T>
constexpr int kNibbleChains = T == 4 ? 2 : 1;

// Adds the products of one chunk to total[kNibbleChains<T> * T].
template <int T, class Decoder>
[[gnu::always_inline]] inline void nibble_chunk(const Decoder& decoder, const std::uint8_t* codes,
                                                const float* x, F scales, F* total) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i nibbles[2] = {_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low),
                              _mm256_and_si256(bytes, low)};
  if constexpr (T <= 2) {  // one multiplication by the scale for each row of x
    F part[T][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      F values[4];
      look_up(decoder.tables(), nibbles[half], values);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
          const F at_x = Simd::load(x + (t * kNibbleVectors + half * 4 + v) * kLanes);
          part[t][half] = v == 0 ? at_x * values[v] : Simd::fma(at_x, values[v], part[t][half]);
        }
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      total[t] = Simd::fma(part[t][0] + part[t][1], scales, total[t]);
    }
  } else {  // one for each value
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      F values[4];
      look_up(decoder.tables(), nibbles[half], values);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const F value = values[v] * scales;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const F at_x = Simd::load(x + (t * kNibbleVectors + half * 4 + v) * kLanes);
          F& sum = total[kNibbleChains<T> == 2 ? half * T + t : t];
          sum = Simd::fma(at_x, value, sum);
        }
      }
    }
  }
}

// The same for a chunk that the row ends in: past its end no product is made, as an infinite scale
// would make it NaN.
template <int T, class Decoder>
void nibble_part(const Decoder& decoder, const std::uint8_t* codes, const float* x,
                 const float* valid, F scales, F* total) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i low = _mm256_set1_epi8(15);
  F values[kNibbleVectors];
  look_up(decoder.tables(), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), values);
  look_up(decoder.tables(), _mm256_and_si256(bytes, low), values + 4);
  for (int v = 0; v < kNibbleVectors; ++v) {
    const F inside = (F)(Simd::load(valid + v * kLanes) > Simd::set1(0.5f));
    const F value = _mm256_and_ps(values[v] * scales, inside);
    for (int t = 0; t < T; ++t) {
      total[t] = Simd::fma(Simd::load(x + (t * kNibbleVectors + v) * kLanes), value, total[t]);
    }
  }
}

// Adds the products of chunks [first, last) of one row of the weight to sums[T]. `scale`: of the
// row's groups, `per_chunk` of which make a chunk; 0 where a group is of several chunks.
template <int T, int per_chunk, class Decoder>
void nibble_row(Decoder& decoder, const NibbleJob& job, std::int64_t row, const float* scale,
                std::int64_t first, std::int64_t last, F* sums) {
  const Layout& at = job.weight.at;
  const std::uint8_t* codes = job.weight.codes + row * at.row_code_bytes;
  const float* x = job.x + first * T * kNibbleChunk;
  const std::int64_t whole = smaller(last, at.cols / kNibbleChunk);
  const std::int64_t zero = row * at.groups_per_row;
  F total[kNibbleChains<T> * T];
#pragma GCC unroll 8
  for (int t = 0; t < kNibbleChains<T> * T; ++t) total[t] = t < T ? sums[t] : Simd::set1(0.0f);
  F scales = Simd::set1(0.0f);
  auto enter = [&](std::int64_t g, std::int64_t h) __attribute__((always_inline)) {
    decoder.groups(zero + g, zero + h);
    scales = _mm256_set_m128(_mm_set1_ps(scale[h]), _mm_set1_ps(scale[g]));
  };
  std::int64_t c = first;
  if constexpr (per_chunk > 0) {
    for (; c < whole; ++c, x += T * kNibbleChunk) {
      enter(c * per_chunk, c * per_chunk + per_chunk - 1);
      nibble_chunk<T>(decoder, codes + c * (kNibbleChunk / 2), x, scales, total);
    }
  } else {
    std::int64_t g = c * kNibbleChunk / at.group;
    while (c < whole) {
      enter(g, g);
      ++g;
      const std::int64_t end = smaller(g * at.group / kNibbleChunk, whole);
      for (; c < end; ++c, x += T * kNibbleChunk) {
        nibble_chunk<T>(decoder, codes + c * (kNibbleChunk / 2), x, scales, total);
      }
    }
  }
  if (c < last) {  // the row ends within this chunk
    const std::int64_t k = c * kNibbleChunk;
    enter(k / at.group, smaller((k + kNibbleChunk / 2) / at.group, at.groups_per_row - 1));
    alignas(32) std::uint8_t staged[kNibbleChunk / 2] = {};
    std::memcpy(staged, codes + k / 2, static_cast<std::size_t>((at.cols - k + 1) / 2));
    nibble_part<T>(decoder, staged, x, job.valid, scales, total);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    sums[t] = kNibbleChains<T> == 2 ? total[t] + total[(kNibbleChains<T> - 1) * T + t] : total[t];
  }
}

// Blocks of a row lie too far apart for the hardware to see them coming.
void prefetch_codes(const std::uint8_t* codes, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + i, 0, 2);
}

template <int T, class Decoder>
void nibble_rows(Decoder decoder, const NibbleJob& job) {
  const Layout& at = job.weight.at;
  const std::int64_t chunks = (at.cols + kNibbleChunk - 1) / kNibbleChunk;
  const std::int64_t block = kNibbleBlock / (T * kNibbleChunk * sizeof(float));
  const Scratch<float> scales(kNibbleTile * at.groups_per_row);
  F sums[kNibbleTile][T];
  for (std::int64_t top = job.begin; top < job.end; top += kNibbleTile) {
    const std::int64_t rows = smaller(kNibbleTile, job.end - top);
    for (std::int64_t r = 0; r < rows; ++r) {
      row_scales(job.weight, top + r, scales.get() + r * at.groups_per_row);
      for (int t = 0; t < T; ++t) sums[r][t] = Simd::set1(0.0f);
    }
    for (std::int64_t first = 0; first < chunks; first += block) {
      const std::int64_t last = smaller(first + block, chunks);
      for (std::int64_t r = 0; r < rows; ++r) {
        // What this row's turn is next: its next block, or the first one of the next tile's row.
        const std::int64_t next = last < chunks ? r : r + kNibbleTile;
        if (top + next < job.end) {
          const std::uint8_t* codes = job.weight.codes + (top + next) * at.row_code_bytes;
          const std::int64_t from = last < chunks ? last : 0;
          prefetch_codes(
              codes + from * (kNibbleChunk / 2),
              smaller(block * (kNibbleChunk / 2), at.row_code_bytes - from * (kNibbleChunk / 2)));
        }
        const float* scale = scales.get() + r * at.groups_per_row;
        auto add = [&]<int per_chunk>() {
          nibble_row<T, per_chunk>(decoder, job, top + r, scale, first, last, sums[r]);
        };
        if (at.group == kNibbleChunk / 2) {
          add.template operator()<2>();
        } else if (at.group == kNibbleChunk) {
          add.template operator()<1>();
        } else {
          add.template operator()<0>();
        }
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      for (int t = 0; t < T; ++t) {
        const float sum = Simd::sum(sums[r][t]) + (job.bias ? job.bias[top + r] : 0.0f);
        std::uint8_t* target = job.out + (t * job.out_stride + top + r) * bytes_of(job.type);
        with_type(job.type, [&]<DType to>() { store_part<to>(target, Simd::set1(sum), 1); });
      }
    }
  }
}

template <class Decoder>
void linear_nibbles(const Weight& weight, const void* x, DType type, std::int64_t count,
                    std::int64_t x_stride, const float* bias, void* out, std::int64_t out_stride,
                    std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t most_rows = 8;
  const std::int64_t padded = (weight.at.cols + kNibbleChunk - 1) / kNibbleChunk * kNibbleChunk;
  const Scratch<float> arranged(smaller(count, most_rows) * padded);
  alignas(32) float valid[kNibbleChunk];
  const Decoder decoder(weight);
  std::int64_t i = 0;
  while (i < count) {
    const std::int64_t left = count - i;
    const std::int64_t rows = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto source = static_cast<const std::uint8_t*>(x) + i * x_stride * bytes_of(type);
    auto target = static_cast<std::uint8_t*>(out) + i * out_stride * bytes_of(type);
    const NibbleJob job{weight, arranged.get(), valid, bias, target, type, out_stride, begin, end};
    auto run = [&]<int T>() {
      arrange_nibbles<T, Decoder::bytes>(source, type, x_stride, weight.at.cols, arranged.get(),
                                         valid);
      nibble_rows<T>(decoder, job);
    };
    if (rows == 8) run.template operator()<8>();
    if (rows == 4) run.template operator()<4>();
    if (rows == 2) run.template operator()<2>();
    if (rows == 1) run.template operator()<1>();
    i += rows;
  }
}

// Kernels::linear of the AVX2 unit.
void linear_avx2(const Weight& weight, const void* x, DType type, std::int64_t count,
                 std::int64_t x_stride, const float* bias, void* out, std::int64_t out_stride,
                 std::int64_t begin, std::int64_t end) {
  if (count == 0 || begin >= end) return;
  const Layout& at = weight.at;
  // A chunk is of one group, or each half of it of one.
  const bool chunked =
      at.groups_per_row == 1 || at.group % kNibbleChunk == 0 || at.group == kNibbleChunk / 2;
  auto run = [&]<class Decoder>() {
    linear_nibbles<Decoder>(weight, x, type, count, x_stride, bias, out, out_stride, begin, end);
  };
  if (weight.format->bits != 4 || !chunked || at.groups_per_row == 0) {
    linear(weight, x, type, count, x_stride, bias, out, out_stride, begin, end);
  } else if (weight.format->family == Family::affine) {
    run.template operator()<NibbleIntegers>();
  } else if (type == DType::bf16) {
    run.template operator()<NibbleCodebook<2>>();
  } else {
    run.template operator()<NibbleCodebook<4>>();
  }
}

}  // namespace
}  // namespace vramkit::cpu
