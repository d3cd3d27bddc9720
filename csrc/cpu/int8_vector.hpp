// The int8 kernels on vectors, in terms of the unit's `Simd`, `Dot` and `Packing` (int8_avx2.hpp;
// int8_avx512.hpp and int8_packed.hpp).
//
// Of few rows (and without AVX-512 of any number) the product has both operands along k, as they
// lie in memory, so nothing is packed: a tile of Dot::rows x 4 dot products keeps its vectors of
// partial sums in registers, and adds them across lanes once at its end. Blocking, from the inside
// out:
//   kDepth     columns at a time: four rows of the weight (8 KB) stay in the first-level cache
//              while the rows of x pass by, with as much of x.
//   kChunkRows rows of x at a time stay in the second-level cache (512 KB of 4096 columns) ...
//   kChunkCols ... while this many rows of the weight meet them. Sums wait in an int32 scratch of
//              kChunkRows x kChunkCols until k is through, then scales, bias and activation are
//              applied to whole vectors.
// While a tile's rows of the weight are in use the next ones are asked for, line by line.
#pragma once
#include "cpu/int8_encode.hpp"
#include "cpu/vector_common.hpp"
#include "cpu/vector_math.hpp"

namespace vramkit::cpu {
namespace {

constexpr std::int64_t kDepth = kInt8Depth, kChunkRows = kInt8ChunkRows,
                       kChunkCols = kInt8ChunkCols;
constexpr int kTileCols = 4;
// From this length on one or two rows of x meet the weight row by row (int8_stream).
constexpr std::int64_t kStreamCols = 1024;

// Rows, as one call quantizes them.

// Lanes whose magnitude (as bits) is at least the threshold's, NaN not among them.
inline I outlier_lanes(I magnitude, I threshold) {
  return (magnitude >= threshold) & (magnitude <= 0x7f800000);
}

template <DType type>
void quantize_int8_row(const std::uint8_t* x, std::int64_t cols, float threshold,
                       std::uint8_t* columns, std::int8_t* codes, std::int64_t block,
                       float* absmax_out, std::int32_t* sum_out) {
  constexpr int size = bytes_of(type);
  const std::int64_t whole = cols - cols % kLanes;
  std::int32_t threshold_bits = 0x7fffffff;  // above every magnitude
  if (threshold > 0.0f) std::memcpy(&threshold_bits, &threshold, sizeof(threshold_bits));
  const I limit = I{} + threshold_bits;
  // Magnitudes order as their bits; those of NaN and infinity come last.
  I most[4] = {}, any = {};
  auto look = [&](int u, F v) __attribute__((always_inline)) {
    const I magnitude = (I)v & 0x7fffffff;
    const I out = outlier_lanes(magnitude, limit);
    any |= out;
    most[u] = Simd::max(most[u], magnitude & ~out);
  };
  std::int64_t k = 0;
  for (; k + 4 * kLanes <= whole; k += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) look(u, load<type>(x + (k + u * kLanes) * size));
  }
  for (; k < whole; k += kLanes) look(0, load<type>(x + k * size));
  if (k < cols) look(0, load_part<type>(x + k * size, cols - k));
  const std::int32_t bits =
      Simd::most(Simd::max(Simd::max(most[0], most[1]), Simd::max(most[2], most[3])));
  float absmax;
  std::memcpy(&absmax, &bits, sizeof(absmax));
  const bool finite = bits < 0x7f800000;
  if (!finite) absmax = __builtin_nanf("");
  *absmax_out = absmax;

  const bool outliers = Simd::most(any & 1) != 0;
  const F factor = Simd::set1(finite ? int8_factor(absmax) : 0.0f);
  const I keep = I{} - (finite ? 1 : 0);
  I sum = {};
  auto code = [&](F v) __attribute__((always_inline)) {
    F y = v * factor;
    y = Simd::max(Simd::set1(-127.0f), Simd::min(Simd::set1(127.0f), y));
    I q = Simd::to_int_even(y) & keep;
    if (outliers) q &= ~outlier_lanes((I)v & 0x7fffffff, limit);
    sum += q;
    return q;
  };
  for (std::int64_t first = 0; first < cols; first += kDepth, codes += block) {
    const std::int64_t last = smaller(first + kDepth, cols);
    for (k = first; k + kLanes <= last; k += kLanes) {
      Simd::store_bytes(codes + k - first, code(load<type>(x + k * size)));
    }
    if (k < last) {
      alignas(64) std::int8_t staged[kLanes];
      Simd::store_bytes(staged, code(load_part<type>(x + k * size, last - k)));
      std::memcpy(codes + k - first, staged, static_cast<std::size_t>(last - k));
    }
  }
  std::int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  *sum_out = total;
  if (!outliers) return;
  for (k = 0; k < cols; k += kLanes) {
    const std::int64_t n = smaller(kLanes, cols - k);
    const F v = n == kLanes ? load<type>(x + k * size) : load_part<type>(x + k * size, n);
    const I out = outlier_lanes((I)v & 0x7fffffff, limit);
    for (std::int64_t lane = 0; lane < n; ++lane) {
      if (out[lane]) __atomic_store_n(&columns[k + lane], std::uint8_t{1}, __ATOMIC_RELAXED);
    }
  }
}

void quantize_int8(const void* x, DType type, std::int64_t cols, std::int64_t stride,
                   float threshold, std::uint8_t* columns, Int8Rows out, std::int64_t begin,
                   std::int64_t end) {
  with_type(type, [&]<DType from>() {
    for (std::int64_t r = begin; r < end; ++r) {
      const auto row = static_cast<const std::uint8_t*>(x) + r * stride * bytes_of(from);
      quantize_int8_row<from>(row, cols, threshold, columns, out.codes + r * out.stride, out.block,
                              out.absmax + r, out.sums + r);
    }
  });
}

void sums_int8(const std::int8_t* x, std::int64_t cols, std::int64_t stride, std::int32_t* sums,
               std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < cols; ++k) sum += x[r * stride + k];
    sums[r] = sum;
  }
}

// `tiles` times M rows of x, from `x` on, with four rows of the weight over `depth` columns:
// sums[m][n] (+)= x[m] . w[n], without the correction by Dot::bias. Each tile reads `A` more rows
// from `ahead` on into the cache, until four are read.
template <int M, int A>
[[gnu::noinline]] void int8_strip(const std::int8_t* x, std::int64_t x_stride, std::int64_t tiles,
                                  const std::int8_t* const* w, std::int64_t depth, bool add,
                                  const std::int8_t* ahead, std::int64_t stride,
                                  std::int32_t* sums) {
  const std::int8_t *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  for (std::int64_t tile = 0; tile < tiles; ++tile, x += M * x_stride, sums += M * kTileCols) {
    Dot::V acc[M][kTileCols];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kTileCols; ++n) acc[m][n] = Dot::V{};
    }
    std::int64_t k = 0;
    for (; k + Dot::step <= depth; k += Dot::step) {
      typename Dot::X rows[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) rows[m] = Dot::load_x(x + m * x_stride + k);
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + a * stride + k), _MM_HINT_T1);
      }
#pragma GCC unroll 4
      for (int n = 0; n < kTileCols; ++n) {
        const std::int8_t* row = n == 0 ? w0 : n == 1 ? w1 : n == 2 ? w2 : w3;
        const typename Dot::W column = Dot::load_w(row + k);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[m][n] = Dot::dot(acc[m][n], column, rows[m]);
      }
    }
    if (k < depth) {
      typename Dot::X rows[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) rows[m] = Dot::load_x_part(x + m * x_stride + k, depth - k);
#pragma GCC unroll 4
      for (int n = 0; n < kTileCols; ++n) {
        const std::int8_t* row = n == 0 ? w0 : n == 1 ? w1 : n == 2 ? w2 : w3;
        const typename Dot::W column = Dot::load_w_part(row + k, depth - k);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[m][n] = Dot::dot(acc[m][n], column, rows[m]);
      }
    }
    Dot::reduce(acc, add, sums);
    ahead = (tile + 1) * A < kTileCols ? ahead + A * stride : w0;
    if (ahead == w0) stride = 0;
  }
}

// The same for one or two rows of x, one row of the weight after the other: memory is read in a
// single stream, which is what bounds this.
template <int M>
[[gnu::noinline]] void int8_stream(const std::int8_t* x, std::int64_t x_stride,
                                   std::int64_t x_block, const std::int8_t* const* w,
                                   std::int64_t cols, std::int32_t* sums) {
  constexpr int U = 4 / M;  // vectors in flight
  Dot::V acc[M][kTileCols];
  for (int n = 0; n < kTileCols; ++n) {
    Dot::V part[M][U];
    for (int m = 0; m < M; ++m) {
      for (int u = 0; u < U; ++u) part[m][u] = Dot::V{};
    }
    for (std::int64_t first = 0; first < cols; first += kDepth) {
      const std::int8_t* codes = x + first / kDepth * x_block;
      const std::int8_t* row = w[n] + first;
      const std::int64_t depth = smaller(kDepth, cols - first);
      std::int64_t k = 0;
      auto add = [&](int u) __attribute__((always_inline)) {
        const typename Dot::W column = Dot::load_w(row + k);
        for (int m = 0; m < M; ++m) {
          part[m][u] = Dot::dot(part[m][u], column, Dot::load_x(codes + m * x_stride + k));
        }
        k += Dot::step;
      };
      while (k + U * Dot::step <= depth) {
        for (int u = 0; u < U; ++u) add(u);
      }
      while (k + Dot::step <= depth) add(0);
      if (k == depth) continue;
      const typename Dot::W column = Dot::load_w_part(row + k, depth - k);
      for (int m = 0; m < M; ++m) {
        part[m][0] =
            Dot::dot(part[m][0], column, Dot::load_x_part(codes + m * x_stride + k, depth - k));
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int u = U - 1; u > 0; --u) part[m][u - 1] = Dot::plus(part[m][u - 1], part[m][u]);
      acc[m][n] = part[m][0];
    }
  }
  Dot::reduce(acc, false, sums);
}

struct Int8Scratch {
  // [tile of columns][row][column in the tile]: what a tile writes is consecutive, and does not
  // drive the operands out of the first-level cache. Packed: [row][column].
  std::int32_t sums[kChunkRows * kChunkCols];
  bool packed;
  float rest[kChunkRows * kChunkCols];     // outlier columns' share
  float values[kChunkRows * kChunkCols];   // of some outlier columns: x ...
  float decoded[kChunkCols * kChunkCols];  // ... and the codes of the weight, column by column
};

// One or two rows of x times rows [col, col + cols) of a long weight.
void int8_stream_sums(const Int8Product& job, std::int64_t row, std::int64_t rows, std::int64_t col,
                      std::int64_t cols, Int8Scratch& scratch) {
  for (std::int64_t n = 0; n < cols; n += kTileCols) {
    const std::int8_t* w[kTileCols];
    for (int j = 0; j < kTileCols; ++j) {
      w[j] = job.weight + (col + smaller(n + j, cols - 1)) * job.weight_stride;
    }
    const std::int8_t* x = job.x + row * job.x_stride;
    const auto run = rows == 1 ? int8_stream<1> : int8_stream<2>;
    run(x, job.x_stride, job.x_block, w, job.cols, scratch.sums + n * kChunkRows);
  }
}

// The sums of rows [row, row + rows) of x and rows [col, col + cols) of the weight.
void int8_sums(const Int8Product& job, std::int64_t row, std::int64_t rows, std::int64_t col,
               std::int64_t cols, std::int64_t end, Int8Scratch& scratch) {
  if (rows <= 2 && job.cols >= kStreamCols) {
    return int8_stream_sums(job, row, rows, col, cols, scratch);
  }
  for (std::int64_t first = 0; first == 0 || first < job.cols; first += kDepth) {
    const std::int64_t depth = smaller(kDepth, job.cols - first);
    const std::int8_t* block = job.x + first / kDepth * job.x_block;
    for (std::int64_t n = 0; n < cols; n += kTileCols) {
      // What lies past the end is computed twice and never read.
      const std::int8_t* w[kTileCols];
      for (int j = 0; j < kTileCols; ++j) {
        w[j] = job.weight + smaller(col + n + j, end - 1) * job.weight_stride + first;
      }
      const std::int64_t next = col + n + kTileCols;
      const bool more = next + kTileCols <= end;
      const std::int8_t* ahead = more ? job.weight + next * job.weight_stride + first : w[0];
      const std::int64_t stride = more ? job.weight_stride : 0;
      const std::int8_t* x = block + row * job.x_stride;
      std::int32_t* sums = scratch.sums + n * kChunkRows;
      const std::int64_t whole = rows / Dot::rows;
      const bool add = first > 0;
      if (whole) {
        const auto strip = whole == 1   ? int8_strip<Dot::rows, 4>
                           : whole <= 3 ? int8_strip<Dot::rows, 2>
                                        : int8_strip<Dot::rows, 1>;
        strip(x, job.x_stride, whole, w, depth, add, ahead, stride, sums);
      }
      std::int64_t done = whole * Dot::rows;
      if (rows - done > 1) {
        const auto strip = whole ? int8_strip<2, 1> : int8_strip<2, 4>;
        strip(x + done * job.x_stride, job.x_stride, 1, w, depth, add, whole ? w[0] : ahead,
              whole ? 0 : stride, sums + done * kTileCols);
        done += 2;
      }
      if (done < rows) {
        const auto strip = whole ? int8_strip<1, 1> : int8_strip<1, 4>;
        strip(x + done * job.x_stride, job.x_stride, 1, w, depth, add, done ? w[0] : ahead,
              done ? 0 : stride, sums + done * kTileCols);
      }
    }
  }
}

// rest[i][n] = sum over outlier columns of x * code, in float32.
void int8_outliers(const Int8Product& job, std::int64_t row, std::int64_t rows, std::int64_t col,
                   std::int64_t cols, Int8Scratch& s) {
  std::memset(s.rest, 0, static_cast<std::size_t>(rows * kChunkCols) * 4);
  for (std::int64_t first = 0; first < job.outlier_count; first += kChunkCols) {
    const std::int64_t count = smaller(kChunkCols, job.outlier_count - first);
    const std::int64_t* columns = job.outliers + first;
    for (std::int64_t n = 0; n < cols; ++n) {
      const std::int8_t* w = job.weight + (col + n) * job.weight_stride;
      for (std::int64_t j = 0; j < count; ++j) {
        s.decoded[j * kChunkCols + n] = static_cast<float>(w[columns[j]]);
      }
    }
    with_type(job.type, [&]<DType type>() {
      constexpr int size = bytes_of(type);
      for (std::int64_t i = 0; i < rows; ++i) {
        const auto x =
            static_cast<const std::uint8_t*>(job.values) + (row + i) * job.values_stride * size;
        for (std::int64_t j = 0; j < count; ++j) {
          s.values[i * kChunkCols + j] = load_part<type>(x + columns[j] * size, 1)[0];
        }
      }
    });
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t n = 0; n < cols; n += kLanes) {
        float* target = s.rest + i * kChunkCols + n;
        F sum = Simd::load(target);
        for (std::int64_t j = 0; j < count; ++j) {
          sum = Simd::fma(Simd::set1(s.values[i * kChunkCols + j]),
                          Simd::load(s.decoded + j * kChunkCols + n), sum);
        }
        Simd::store(target, sum);
      }
    }
  }
}

// A vector of row i's sums from column n on.
inline I sums_at(const Int8Scratch& s, std::int64_t i, std::int64_t n) {
  if (!s.packed) {
    return Dot::gather(s.sums + n * kChunkRows + i * kTileCols, kChunkRows * kTileCols);
  }
  I all;
  std::memcpy(&all, s.sums + i * kChunkCols + n, sizeof(all));
  return all;
}

template <Activation activation>
F activate(F v) {
  if constexpr (activation == Activation::gelu) return gelu(v);
  if constexpr (activation == Activation::gelu_tanh) return gelu_tanh(v);
  if constexpr (activation == Activation::silu) return silu(v);
  return v;
}

template <DType type, Activation activation>
void int8_finish(const Int8Product& job, std::int64_t row, std::int64_t rows, std::int64_t col,
                 std::int64_t cols, const Int8Scratch& s) {
  constexpr int size = bytes_of(type);
  alignas(64) float scales[kChunkCols], bias[kChunkCols] = {};
  std::memcpy(scales, job.weight_scales + col * 4, static_cast<std::size_t>(cols) * 4);
  if (job.bias) std::memcpy(bias, job.bias + col, static_cast<std::size_t>(cols) * 4);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int32_t correction = Dot::bias * job.x_sums[row + i];
    const F row_scale = Simd::set1(job.x_absmax[row + i] / 127.0f);
    auto out = static_cast<std::uint8_t*>(job.out) + ((row + i) * job.out_stride + col) * size;
    for (std::int64_t n = 0; n < cols; n += kLanes) {
      const I sum = sums_at(s, i, n);
      const F scale = Simd::load(scales + n);
      F value = Simd::to_float(sum - correction) * scale * row_scale;
      if (job.outlier_count) value = value + Simd::load(s.rest + i * kChunkCols + n) * scale;
      if (job.bias) value = value + Simd::load(bias + n);
      value = activate<activation>(value);
      if (n + kLanes <= cols) {
        store<type>(out + n * size, value);
      } else {
        store_part<type>(out + n * size, value, cols - n);
      }
    }
  }
}

void int8_copy_sums(const Int8Product& job, std::int64_t row, std::int64_t rows, std::int64_t col,
                    std::int64_t cols, const Int8Scratch& s) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int32_t correction = Dot::bias * job.x_sums[row + i];
    std::int32_t* out = static_cast<std::int32_t*>(job.out) + (row + i) * job.out_stride + col;
    for (std::int64_t n = 0; n < cols; ++n) {
      const std::int64_t tile = n / kTileCols * kTileCols * kChunkRows + i * kTileCols;
      out[n] = s.sums[s.packed ? i * kChunkCols + n : tile + n % kTileCols] - correction;
    }
  }
}

// The weight transposed, panel by panel, where that pays; whether it does.
template <class P>
bool int8_pack(const Int8Product& job, std::int64_t row, std::int64_t rows, std::int64_t col,
               std::int64_t cols, Int8Scratch& scratch) {
  if constexpr (P::exists) {
    if (P::pays(rows, job.cols)) {
      const Scratch<typename P::Panel> panel(1);
      P::sums(job, row, rows, col, cols, *panel.get(), scratch.sums);
      return true;
    }
  }
  return false;
}

void product_int8(const Int8Product& job, std::int64_t row, std::int64_t row_end,
                  std::int64_t begin, std::int64_t end) {
  const Scratch<Int8Scratch> owned(1);
  Int8Scratch& scratch = *owned.get();
  for (std::int64_t col = begin; col < end; col += kChunkCols) {
    const std::int64_t cols = smaller(kChunkCols, end - col);
    for (std::int64_t first = row; first < row_end; first += kChunkRows) {
      const std::int64_t rows = smaller(kChunkRows, row_end - first);
      scratch.packed = int8_pack<Packing>(job, first, rows, col, cols, scratch);
      if (!scratch.packed) int8_sums(job, first, rows, col, cols, end, scratch);
      if (job.exact) {
        int8_copy_sums(job, first, rows, col, cols, scratch);
        continue;
      }
      if (job.outlier_count) int8_outliers(job, first, rows, col, cols, scratch);
      with_type(job.type, [&]<DType type>() {
        auto finish = [&]<Activation activation>() {
          int8_finish<type, activation>(job, first, rows, col, cols, scratch);
        };
        switch (job.activation) {
          case Activation::none:
            return finish.template operator()<Activation::none>();
          case Activation::gelu:
            return finish.template operator()<Activation::gelu>();
          case Activation::gelu_tanh:
            return finish.template operator()<Activation::gelu_tanh>();
          case Activation::silu:
            return finish.template operator()<Activation::silu>();
        }
      });
    }
  }
}

std::int64_t spin_int8(std::int64_t rounds) {
  constexpr int count = 8;
  const std::int8_t ones[64] = {};
  Dot::V sums[count];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) sums[i] = Dot::V{};
  typename Dot::X x = Dot::load_x(ones);
  const typename Dot::W w = Dot::load_w(ones);
  for (std::int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : "+v"(x));  // nothing to hoist
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) sums[i] = Dot::dot(sums[i], w, x);
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) asm volatile("" : : "v"(sums[i]));
  return rounds * count * Dot::step;
}

constexpr Int8Kernels int8_kernels{quantize_int8, sums_int8, product_int8, spin_int8};

}  // namespace
}  // namespace vramkit::cpu
