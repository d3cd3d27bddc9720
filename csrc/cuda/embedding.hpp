// Rows of a stored weight by index, and weights of convolutions in another order: bodies of kernels
// as in decode.hpp. The kernels are in embedding.cu.
#pragma once
#include "cuda/decode.hpp"

namespace vramkit::cuda {

// Rows index[0 .. count) of `weight`, whose `rows` are all that there are, to weight.out.
struct GatherJob {
  DecodeJob weight;
  const std::int64_t* index = nullptr;
  std::int64_t count = 0;
};

// Second step of a block, after fill_tables. False if an index is out of range: nothing is read or
// written for it.
template <Codes C, Element E>
VRAMKIT_ANYWHERE inline bool gather_block(const GatherJob& job, const DecodeTables& shared,
                                          std::int64_t block, int thread) {
  const DecodeJob& weight = job.weight;
  const std::int64_t per_row = (weight.cols + kChunk - 1) / kChunk;
  bool valid = true;
  for (int round = 0; round < kRounds; ++round) {
    const std::int64_t chunk = (block * kRounds + round) * kThreads + thread;
    if (chunk >= job.count * per_row) break;
    const ChunkPlace at = place_of(chunk, per_row);
    const std::int64_t row = job.index[at.row];
    if (row < 0 || row >= weight.rows) {
      valid = false;
      continue;
    }
    const std::int64_t left = weight.cols - at.col;
    const int count = left < kChunk ? static_cast<int>(left) : kChunk;
    float value[kChunk];
    decode_values<C>(weight, shared, row, at.col, count, value);
    store_chunk<E>(weight.out, at.row * weight.out_stride + at.col, count, value);
  }
  return valid;
}

// A stored row is [channels, taps]; out, contiguous, is [rows, taps, channels]. A block decodes
// kTileCols columns of one row into shared memory, and writes them tap by tap, so that neighbouring
// threads write neighbouring channels.
inline constexpr int kTileCols = kThreads * kChunk;

struct TapsJob {
  DecodeJob weight;  // rows from first_row on; out_stride unused
  std::int64_t taps = 1, channels = 1;
};

struct TapsTile {
  float value[kTileCols];
};

constexpr std::int64_t tiles_per_row(std::int64_t cols) {
  return (cols + kTileCols - 1) / kTileCols;
}

struct TilePlace {
  std::int64_t row, col;
  int count;
};
VRAMKIT_ANYWHERE inline TilePlace tile_at(const TapsJob& job, std::int64_t block) {
  const std::int64_t per_row = (job.weight.cols + kTileCols - 1) / kTileCols;
  const std::int64_t row = quotient(block, per_row), col = (block - row * per_row) * kTileCols;
  const std::int64_t left = job.weight.cols - col;
  return {row, col, left < kTileCols ? static_cast<int>(left) : kTileCols};
}

// Second step of a block: its tile's values.
template <Codes C>
VRAMKIT_ANYWHERE inline void fetch_tile(const TapsJob& job, const DecodeTables& shared,
                                        TapsTile& tile, std::int64_t block, int thread) {
  const TilePlace at = tile_at(job, block);
  const int first = thread * kChunk, left = at.count - first;
  if (left <= 0) return;
  float value[kChunk];
  decode_values<C>(job.weight, shared, job.weight.first_row + at.row, at.col + first,
                   left < kChunk ? left : kChunk, value);
  VRAMKIT_UNROLLED
  for (int i = 0; i < kChunk; ++i) tile.value[first + i] = value[i];
}

template <Element E>
VRAMKIT_ANYWHERE inline void store_element(void* out, std::int64_t at, float value) {
  if constexpr (E == Element::f32) {
    static_cast<float*>(out)[at] = value;
  } else {
    static_cast<std::uint16_t*>(out)[at] =
        E == Element::bf16 ? float_to_bf16(value) : float_to_half(value);
  }
}

// Third step: writing it.
template <Element E>
VRAMKIT_ANYWHERE inline void store_tile(const TapsJob& job, const TapsTile& tile,
                                        std::int64_t block, int thread) {
  const TilePlace at = tile_at(job, block);
  const std::int64_t row = at.row * job.taps * job.channels;
  if (job.taps > kTileCols) {  // a tap has one channel of the tile at most
    for (int i = thread; i < at.count; i += kThreads) {
      const std::int64_t channel = quotient(at.col + i, job.taps);
      const std::int64_t tap = at.col + i - channel * job.taps;
      store_element<E>(job.weight.out, row + tap * job.channels + channel, tile.value[i]);
    }
    return;
  }
  const auto taps = static_cast<int>(job.taps);
  const std::int64_t first = quotient(at.col, job.taps);  // channel
  const int skipped = static_cast<int>(at.col - first * job.taps);
  const int wide = (skipped + at.count + taps - 1) / taps;  // channels that the tile touches
  for (int i = thread; i < taps * wide; i += kThreads) {
    const int tap = i / wide, channel = i - tap * wide;
    const int place = channel * taps + tap - skipped;
    if (place < 0 || place >= at.count) continue;
    store_element<E>(job.weight.out, row + tap * job.channels + first + channel, tile.value[place]);
  }
}

}  // namespace vramkit::cuda
