// Products of bfloat16 rows with a stored weight on AVX-512 BF16, for up to eight rows at a time:
// weights are decoded in registers (bf16_decoders.hpp), straight from their bytes, to pairs of
// bfloat16 vectors that vdpbf16ps multiplies with x and adds up in float32.
//
// A row is walked in chunks of 64 elements. x is rearranged once per call into the order in which a
// decoder gives a chunk's elements, chunk by chunk for all rows, with zeros past the last column.
#pragma once
#include "cpu/bf16_decoders.hpp"

namespace vramkit::cpu {
namespace {

// x in chunks: [chunk][row][64], rows past `count` and columns past the last being zero.
class Chunks {
 public:
  Chunks(const void* x, std::int64_t count, std::int64_t stride, std::int64_t cols, int rows,
         Order order)
      : all_((cols + kChunk - 1) / kChunk * rows * kChunk) {
    alignas(64) std::uint16_t index[kChunk];  // where element i of a chunk comes from
    for (int i = 0; i < kChunk; ++i) {
      const int even_odd = 2 * (i % 32) + i / 32;
      const int eights = i % 32 / 8 * 16 + i / 32 * 8 + i % 8;
      index[i] = static_cast<std::uint16_t>(order == Order::even_odd ? even_odd
                                            : order == Order::eights ? eights
                                                                     : i);
    }
    const __m512i first = _mm512_load_si512(index), second = _mm512_load_si512(index + 32);
    const auto* source = static_cast<const std::uint16_t*>(x);
    std::uint16_t* out = all_.get();
    for (std::int64_t k = 0; k < cols; k += kChunk) {
      for (int m = 0; m < rows; ++m, out += kChunk) {
        const std::int64_t n = m < count ? smaller(kChunk, cols - k) : 0;
        alignas(64) std::uint16_t staged[kChunk] = {};
        const std::uint16_t* from = source + m * stride + k;
        if (n < kChunk) {
          if (n > 0) std::memcpy(staged, from, static_cast<std::size_t>(n) * 2);
          from = staged;
        }
        const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 32);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(low, first, high));
        _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(low, second, high));
      }
    }
  }
  const std::uint16_t* get() const { return all_.get(); }

 private:
  Scratch<std::uint16_t> all_;
};

// Sums over the lanes of 4, 8 or 16 vectors, by transposing additions.
F add_lanes4(F a, F b, F c, F d) {  // in each quarter: its part of the sums of a, b, c, d
  const F ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const F cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  return _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
}
template <int count>
[[gnu::always_inline]] inline F add_lanes(const F* v) {  // the sum of v[i] in lane i
  const F zero = _mm512_setzero_ps();
  F quarters[4] = {zero, zero, zero, zero};
  VRAMKIT_UNROLL for (int i = 0; i < count / 4; ++i) {
    quarters[i] = add_lanes4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  }
  auto halves = [](F a, F b) __attribute__((always_inline)) {
    return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  };
  const F low = halves(quarters[0], quarters[1]);
  const F high = count > 8 ? halves(quarters[2], quarters[3]) : zero;
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

// The scales of up to `count` rows at a time as float32 bytes: in place where they are stored so.
class RowScales {
 public:
  RowScales(const Weight& weight, int count)
      : weight_(weight),
        decoded_(weight.format->scale == ScaleType::f32 ? 0
                                                        : count * (weight.at.groups_per_row + 1)) {}
  // Valid until the next call for this slot.
  const std::uint8_t* row(std::int64_t r, int slot) const {
    const std::int64_t groups = weight_.at.groups_per_row;
    if (weight_.format->scale == ScaleType::f32) return weight_.scales + r * groups * 4;
    float* out = decoded_.get() + slot * (groups + 1);
    row_scales(weight_, r, out);
    return reinterpret_cast<const std::uint8_t*>(out);
  }

 private:
  const Weight& weight_;
  Scratch<float> decoded_;
};

// The scales of a chunk's lanes where a chunk has `groups` groups: lane i of a sum holds products
// of elements of group i * groups / 16.
template <int groups>
F lane_scales(const std::uint8_t* scales, std::int64_t first) {
  if constexpr (groups == 1) return _mm512_set1_ps(read<float>(scales, first));
  if constexpr (groups == 2) {
    const __m256 low = _mm256_set1_ps(read<float>(scales, first));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low),
                              _mm256_set1_ps(read<float>(scales, first + 1)), 1);
  }
  __m128 four;
  std::memcpy(&four, scales + first * 4, sizeof(four));
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(four));
}

// Adds to sums[m * R + r] the products of a chunk: of row r of the weight, whose codes lie at
// from[r], and row m of x.
template <class Decoder, int M, int R>
[[gnu::always_inline]] inline void add_chunk(F* sums, const Decoder& decoder,
                                             const typename Decoder::Row* state,
                                             const std::uint8_t* const* from, std::int64_t offset,
                                             const std::uint16_t* x, std::int64_t ahead) {
  Pair pair[R];
  VRAMKIT_UNROLL for (int r = 0; r < R; ++r) {
    pair[r] = decoder.decode(state[r], from[r] + offset);
    // Rows are short: the processor's own prefetching would begin anew with each.
    for (int line = 0; line < Decoder::bits / 8 || line == 0; ++line) {
      __builtin_prefetch(from[r] + offset + ahead + 64 * line, 0, 2);
    }
  }
  VRAMKIT_UNROLL for (int m = 0; m < M; ++m) {
    const auto first = (__m512bh)in_register(_mm512_loadu_si512(x + m * kChunk));
    const auto second = (__m512bh)in_register(_mm512_loadu_si512(x + m * kChunk + 32));
    VRAMKIT_UNROLL for (int r = 0; r < R; ++r) {
      sums[m * R + r] = _mm512_dpbf16_ps(sums[m * R + r], first, pair[r].first);
      sums[m * R + r] = _mm512_dpbf16_ps(sums[m * R + r], second, pair[r].second);
    }
  }
}

// What dot_chunks works on: R rows of the weight.
template <int R>
struct Lines {
  std::int64_t rows[R];
  const std::uint8_t* codes[R];
  const std::uint8_t* scales[R];
};

// Adds to `sums`, a vector for each of m * R + r, the products of chunks [from, to) of row r of the
// weight and row m of x; they begin at zero where from is 0. `groups` is the number of groups in a
// chunk where there is more than one, else 1.
template <class Decoder, int M, int R, int groups>
void dot_chunks(const Decoder& decoder, const Weight& weight, const Lines<R>& lines,
                const std::uint16_t* x, std::int64_t from, std::int64_t to, std::int64_t ahead,
                float* sums) {
  const std::int64_t cols = weight.at.cols, chunks = cols / kChunk;
  const std::int64_t per_row = weight.at.groups_per_row;
  constexpr std::int64_t bytes = kChunk * Decoder::bits / 8, width = M * kChunk;
  const std::uint8_t* rest[R];
  alignas(64) std::uint8_t staged[R][bytes];  // the last chunk, where it is a part of one
  if (to > chunks) {
    for (int r = 0; r < R; ++r) {
      const std::int64_t left = ((cols % kChunk) * Decoder::bits + 7) / 8;
      std::memset(staged[r], 0, bytes);
      std::memcpy(staged[r], lines.codes[r] + chunks * bytes, static_cast<std::size_t>(left));
      rest[r] = staged[r];
    }
  }
  typename Decoder::Row state[R];
  F total[M * R];
  VRAMKIT_UNROLL for (int i = 0; i < M * R; ++i) {
    total[i] = from > 0 ? _mm512_loadu_ps(sums + 16 * i) : _mm512_setzero_ps();
  }
  std::int64_t c = from;
  if constexpr (Decoder::scaling == Scaling::none || Decoder::scaling == Scaling::row) {
    for (const std::int64_t last = smaller(to, chunks); c < last; ++c) {
      add_chunk<Decoder, M, R>(total, decoder, state, lines.codes, c * bytes, x + c * width, ahead);
    }
    if (c < to) add_chunk<Decoder, M, R>(total, decoder, state, rest, 0, x + c * width, 0);
  } else {
    const std::int64_t span = groups > 1 ? 1 : per_row > 1 ? weight.at.group / kChunk : chunks + 1;
    while (c < to) {
      const std::int64_t g = c / span * groups;
      VRAMKIT_UNROLL for (int r = 0; r < R; ++r) {
        decoder.group(state[r], lines.rows[r] * per_row + g, lines.scales[r], g);
      }
      const std::int64_t end = smaller((c / span + 1) * span, to), last = smaller(end, chunks);
      if constexpr (Decoder::scaling == Scaling::table) {
        for (; c < last; ++c) {
          add_chunk<Decoder, M, R>(total, decoder, state, lines.codes, c * bytes, x + c * width,
                                   ahead);
        }
        if (c < end) add_chunk<Decoder, M, R>(total, decoder, state, rest, 0, x + c * width, 0);
      } else {
        F part[M * R];
        VRAMKIT_UNROLL for (int i = 0; i < M * R; ++i) part[i] = _mm512_setzero_ps();
        for (; c < last; ++c) {
          add_chunk<Decoder, M, R>(part, decoder, state, lines.codes, c * bytes, x + c * width,
                                   ahead);
        }
        if (c < end) add_chunk<Decoder, M, R>(part, decoder, state, rest, 0, x + c * width, 0);
        VRAMKIT_UNROLL for (int r = 0; r < R; ++r) {
          const F by = lane_scales<groups>(lines.scales[r], g);
          VRAMKIT_UNROLL for (int m = 0; m < M; ++m) {
            total[m * R + r] = _mm512_fmadd_ps(part[m * R + r], by, total[m * R + r]);
          }
        }
      }
      c = end;
    }
  }
  VRAMKIT_UNROLL for (int i = 0; i < M * R; ++i) _mm512_storeu_ps(sums + 16 * i, total[i]);
}

// Up to M rows of x with the weight's rows from begin to end.
//
// x is walked in blocks of columns that stay in the first-level cache while several rows of the
// weight pass; the partial sums of those are kept meanwhile.
template <class Decoder, int M, int R, int groups>
void linear_chunks(const Weight& weight, const void* x, std::int64_t count, std::int64_t x_stride,
                   const float* bias, void* out, std::int64_t out_stride, std::int64_t begin,
                   std::int64_t end) {
  // Chunks: 24 KiB of x, or 16 beside codes of 16 bits.
  constexpr std::int64_t block = ((Decoder::bits == 16 ? 8 : 12) << 10) / (M * kChunk);
  constexpr std::int64_t most_rows = 16;
  const std::int64_t cols = weight.at.cols, all = (cols + kChunk - 1) / kChunk;
  const std::int64_t rows_in_turn = all > block ? most_rows : R;
  const Decoder decoder(weight);
  const Chunks chunks(x, count, x_stride, cols, M, Decoder::order);
  const RowScales scales(weight, static_cast<int>(rows_in_turn));
  const Scratch<float> partial(rows_in_turn * M * 16);
  auto* target = static_cast<std::uint16_t*>(out);
  Lines<R> lines[most_rows / R];
  for (std::int64_t n = begin; n < end; n += rows_in_turn) {
    const auto turns = static_cast<int>((smaller(rows_in_turn, end - n) + R - 1) / R);
    for (int i = 0; i < turns * R; ++i) {
      Lines<R>& at = lines[i / R];
      at.rows[i % R] = smaller(n + i, end - 1);
      at.codes[i % R] = weight.codes + at.rows[i % R] * weight.at.row_code_bytes;
      at.scales[i % R] = scales.row(at.rows[i % R], i);
    }
    const std::int64_t ahead = rows_in_turn * weight.at.row_code_bytes;
    for (std::int64_t from = 0; from < all; from += block) {
      const std::int64_t to = smaller(from + block, all);
      for (int i = 0; i < turns; ++i) {
        dot_chunks<Decoder, M, R, groups>(decoder, weight, lines[i], chunks.get(), from, to, ahead,
                                          partial.get() + i * M * R * 16);
      }
    }
    for (int i = 0; i < turns; ++i) {
      F lanes[M * R];
      VRAMKIT_UNROLL for (int k = 0; k < M * R; ++k) {
        lanes[k] = _mm512_loadu_ps(partial.get() + (i * M * R + k) * 16);
      }
      F sums = add_lanes<M * R>(lanes);
      alignas(64) float factor[16], offset[16];
      for (int k = 0; k < 16; ++k) {
        factor[k] =
            Decoder::scaling == Scaling::row ? read<float>(lines[i].scales[k % R], 0) : 1.0f;
        offset[k] = bias ? bias[lines[i].rows[k % R]] : 0.0f;
      }
      if constexpr (Decoder::scaling == Scaling::row) sums *= _mm512_load_ps(factor);
      if (bias) sums += _mm512_load_ps(offset);
      alignas(32) std::uint16_t halves[16];
      Simd::store_halves(halves, bf16_bits(sums));
      const std::int64_t width = smaller(R, end - n - i * R);
      for (std::int64_t m = 0; m < count; ++m) {
        std::memcpy(target + m * out_stride + n + i * R, halves + m * R,
                    static_cast<std::size_t>(width) * 2);
      }
    }
  }
}

// How many weight rows share the loads of x: as many as the registers allow. Sums with a scale per
// group need two accumulators.
constexpr int rows_at_once(Scaling scaling, int m) {
  if (scaling == Scaling::group && m > 2) return m == 8 ? 1 : 2;
  return m == 8 ? 2 : 4;
}

// Calls run with the decoder and the number of groups in a chunk; false where only the float32
// path serves (groups that are not made of chunks, nor chunks of groups).
template <int M, class Run>
bool with_bf16_decoder(const Weight& weight, const Run& run) {
  const Format& format = *weight.format;
  const std::int64_t group = weight.at.group;
  if (format.family == Family::cast) {
    if (format.encoder == Encoder::bf16) {
      run.template operator()<Halves<DType::bf16>, 1>();
    } else {
      run.template operator()<Halves<DType::f16>, 1>();
    }
    return true;
  }
  const bool single = weight.at.groups_per_row == 1, chunked = single || group % kChunk == 0;
  if (format.bits == 4) {
    const bool whole = weight.at.cols % kChunk == 0;
    if (format.family == Family::codebook) {
      if (chunked) {
        using Decoder = std::conditional_t<(M <= 2), Codebook4Values, ScaledCodebook4>;
        return run.template operator()<Decoder, 1>(), true;
      }
      if (whole && group == 32) return run.template operator()<Codebook4Values, 2>(), true;
      return false;
    }
    auto integers = [&]<int groups>() {
      if constexpr (M <= 2) {
        run.template operator()<Integer4Values<groups>, groups>();
      } else {
        run.template operator()<ScaledInteger4<groups>, groups>();
      }
      return true;
    };
    if (chunked) return integers.template operator()<1>();
    if (whole && group == 32) return integers.template operator()<2>();
    if (whole && group == 16) return integers.template operator()<4>();
    return false;
  }
  if (!chunked) return false;
  auto bytes = [&]<class Value>() {
    if (single) {
      run.template operator()<Bytes<Value, Scaling::row>, 1>();
    } else {
      run.template operator()<Bytes<Value, Scaling::group>, 1>();
    }
    return true;
  };
  if (format.family == Family::affine) return bytes.template operator()<Integer8Values>();
  if (SignedTable::fits(weight.table)) return bytes.template operator()<SignedTable>();
  return bytes.template operator()<FullTable>();
}

// Kernels::linear for bfloat16 and at most eight rows; false where it does not serve.
bool linear_bf16(const Weight& weight, const void* x, std::int64_t count, std::int64_t x_stride,
                 const float* bias, void* out, std::int64_t out_stride, std::int64_t begin,
                 std::int64_t end) {
  auto rows = [&]<int M>() {
    return with_bf16_decoder<M>(weight, [&]<class Decoder, int groups>() {
      linear_chunks<Decoder, M, rows_at_once(Decoder::scaling, M), groups>(
          weight, x, count, x_stride, bias, out, out_stride, begin, end);
    });
  };
  if (count == 1) return rows.template operator()<1>();
  if (count == 2) return rows.template operator()<2>();
  if (count <= 4) return rows.template operator()<4>();
  return rows.template operator()<8>();
}

}  // namespace
}  // namespace vramkit::cpu
