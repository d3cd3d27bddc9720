// Encoding weights: what the threads of a GPU do, as functions that the host compiles too, so that
// tests run these very bodies against the scalar reference (csrc/cpu/reference.cpp). The kernels
// around them are in quantize.cu.
//
// A group, the elements that share a scale, belongs to one team (team.hpp): first its absmax or
// searched scale, then its codes. A lane takes chunks of eight neighbouring elements:
//
//   scales of absmax   the first chunks of a lane stay in registers between the two steps, so that
//                      x is read once; what a long row has more is read again, from the cache
//   searched scales    sixteen lanes, because the sums of the search run in sixteen lanes
//                      (cpu::LevelScorer); up to 128 elements of a group stay in registers
//
// Results have the reference's bits: the arithmetic is cpu/encode.hpp's own, and the largest of
// some numbers is the same in any order. Magnitudes are compared as integers: infinity and NaN lie
// above all numbers.
#pragma once
#include <cstdint>

#include "core/stochastic.hpp"
#include "cpu/encode.hpp"
#include "cuda/decode.hpp"
#include "cuda/team.hpp"

namespace vramkit::cuda {

// How a number that has been divided by its scale becomes a code.
enum class Coder : std::int32_t { table4, table8, e4m3, e5m2, integer8 };

// A codebook sorted by value (cpu::SortedTable), in the device's memory.
struct SortedCodes {
  float bound[256];  // the last is unused
  std::uint8_t code[256];
};

// Plain data, passed to the kernel by value: x, any Element, as [rows, cols], to the parts of
// cpu::Parts. Flat blocks of a contiguous x are the groups of one row.
struct QuantizeJob {
  const void* x = nullptr;
  std::int64_t rows = 0, cols = 0, stride = 0;  // elements
  std::int64_t group = 1, groups_per_row = 1, row_code_bytes = 0;
  std::uint8_t* codes = nullptr;
  std::uint8_t* scales = nullptr;
  std::uint8_t* extra = nullptr;
  const SortedCodes* sorted = nullptr;
  Coder coder = Coder::table4;
  bool searched = false;     // scales by search: integer8, or four bits with zero points
  bool zero_point = false;   // four bits, with float16 scales
  bool clear_empty = false;  // groups of zeros have code 0
  std::uint64_t seed = 0;    // of stochastic rounding
};

VRAMKIT_ANYWHERE constexpr int bits_of_code(const QuantizeJob& job) {
  return job.zero_point || job.coder == Coder::table4 ? 4 : 8;
}
// Two groups that share a byte are one team's work.
constexpr bool shares_bytes(const QuantizeJob& job) {
  return bits_of_code(job) == 4 && job.group % 2 != 0 && job.groups_per_row > 1;
}

// Reading x.

template <Element E>
VRAMKIT_ANYWHERE inline float element_at(const void* x, std::int64_t at) {
  if constexpr (E == Element::f32) return static_cast<const float*>(x)[at];
  const std::uint16_t half = static_cast<const std::uint16_t*>(x)[at];
  return E == Element::bf16 ? bf16_to_float(half) : half_to_float(half);
}

struct Chunk {
  float value[kChunk];
};

// `count` elements from `at` on, and zeros: by vectors where the address allows it.
template <Element E>
VRAMKIT_ANYWHERE inline void load_chunk(const void* x, std::int64_t at, int count, Chunk& chunk) {
  constexpr int size = E == Element::f32 ? 4 : 2;
  const auto* from = static_cast<const std::uint8_t*>(x) + at * size;
  if (count == kChunk && (reinterpret_cast<std::uintptr_t>(from) & 15u) == 0) {
    std::uint8_t raw[kChunk * size];
    VRAMKIT_UNROLLED
    for (int i = 0; i < kChunk * size; i += 16) {
      memcpy(raw + i, __builtin_assume_aligned(from + i, 16), 16);
    }
    if constexpr (E == Element::f32) {
      memcpy(chunk.value, raw, sizeof(raw));
    } else {
      std::uint16_t half[kChunk];
      memcpy(half, raw, sizeof(raw));
      VRAMKIT_UNROLLED
      for (int i = 0; i < kChunk; ++i) {
        chunk.value[i] = E == Element::bf16 ? bf16_to_float(half[i]) : half_to_float(half[i]);
      }
    }
    return;
  }
  VRAMKIT_UNROLLED
  for (int i = 0; i < kChunk; ++i) chunk.value[i] = i < count ? element_at<E>(x, at + i) : 0.0f;
}

VRAMKIT_ANYWHERE inline std::uint32_t magnitude_of(float x) { return bits_of(x) & 0x7fffffffu; }
VRAMKIT_ANYWHERE inline std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
  return a > b ? a : b;
}
VRAMKIT_ANYWHERE inline std::uint32_t largest_of(const Chunk& chunk) {
  std::uint32_t most = 0;
  VRAMKIT_UNROLLED
  for (int i = 0; i < kChunk; ++i) most = larger(most, magnitude_of(chunk.value[i]));
  return most;
}
inline constexpr std::uint32_t kInfinity = 0x7f800000u;

// Unsigned numbers in the order of the floats.
VRAMKIT_ANYWHERE inline std::uint32_t ordered(float x) {
  const std::uint32_t bits = bits_of(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
VRAMKIT_ANYWHERE inline float from_ordered(std::uint32_t order) {
  return float_of(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// Codes of numbers.

// How many of `Bounds` ascending bounds, one less than a power of two, lie below y.
template <int Bounds>
VRAMKIT_ANYWHERE inline int bounds_below(const float* bound, float y) {
  int found = 0;
  VRAMKIT_UNROLLED
  for (int step = (Bounds + 1) / 2; step > 0; step /= 2) {
    if (y > bound[found + step - 1]) found += step;
  }
  return found;
}

// A float of one byte with E exponent and M mantissa bits, for finite numbers: to nearest even,
// saturating.
template <int E, int M>
VRAMKIT_ANYWHERE inline std::uint32_t small_code(float y, std::uint32_t largest) {
  constexpr int bias = (1 << (E - 1)) - 1, drop = 23 - M;
  constexpr std::uint32_t smallest_normal = static_cast<std::uint32_t>(127 + 1 - bias) << 23;
  constexpr auto per_step = static_cast<float>(1 << (bias + M - 1));
  const std::uint32_t magnitude = magnitude_of(y);
  const std::uint32_t rounded = magnitude + ((1u << (drop - 1)) - 1) + (magnitude >> drop & 1u);
  const std::uint32_t normal = (rounded >> drop) - (static_cast<std::uint32_t>(127 - bias) << M);
  const auto subnormal =
      static_cast<std::uint32_t>(cpu::round_even(float_of(magnitude) * per_step));
  const std::uint32_t code = magnitude < smallest_normal ? subnormal : normal;
  return (code < largest ? code : largest) | (bits_of(y) >> 24 & 0x80u);
}

VRAMKIT_ANYWHERE inline float limited(float y, float low, float high) {
  return __builtin_fminf(__builtin_fmaxf(y, low), high);
}

VRAMKIT_ANYWHERE inline std::uint32_t integer8_code(float y) {
  const auto level = static_cast<int>(cpu::round_even(limited(y, -127.0f, 127.0f)));
  return static_cast<std::uint32_t>(level) & 0xffu;
}

// `stochastic`: of the coders that allow it, with the element's random word.
template <bool stochastic>
VRAMKIT_ANYWHERE inline std::uint32_t code_of(Coder coder, const SortedCodes& sorted, float y,
                                              std::uint32_t word) {
  switch (coder) {
    case Coder::table4:
      return sorted.code[bounds_below<15>(sorted.bound, limited(y, -1.0f, 1.0f))];
    case Coder::table8:
      return sorted.code[bounds_below<255>(sorted.bound, limited(y, -1.0f, 1.0f))];
    case Coder::e4m3:
      return stochastic ? stochastic_e4m3(y, word) : small_code<4, 3>(y, 0x7e);
    case Coder::e5m2:
      return stochastic ? stochastic_e5m2(y, word) : small_code<5, 2>(y, 0x7b);
    default:
      return stochastic ? stochastic_int8(y, word) : integer8_code(y);
  }
}

VRAMKIT_ANYWHERE constexpr float most_of(Coder coder) {
  return coder == Coder::e4m3       ? 448.0f
         : coder == Coder::e5m2     ? 57344.0f
         : coder == Coder::integer8 ? 127.0f
                                    : 1.0f;
}

// What a group's codes are made with. Where `valid` is false all codes are 0.
struct Fit {
  float scale = 0.0f, factor = 0.0f;
  std::uint16_t half_scale = 0;  // of four bits with zero points
  std::uint8_t zero = 0;
  bool valid = false;
};

VRAMKIT_ANYWHERE inline Fit invalid_fit() {
  Fit fit;
  fit.scale = float_of(0x7fc00000u);
  fit.half_scale = 0x7e00;
  return fit;
}

// Of a group with this largest magnitude.
VRAMKIT_ANYWHERE inline Fit absmax_fit(const QuantizeJob& job, std::uint32_t most_bits) {
  if (most_bits >= kInfinity) return invalid_fit();
  const float absmax = float_of(most_bits), most = most_of(job.coder);
  Fit fit;
  fit.scale = most == 1.0f ? absmax : absmax / most;
  fit.factor = cpu::encode_factor(absmax, most);
  fit.valid = !(job.clear_empty && absmax == 0.0f);
  return fit;
}

VRAMKIT_ANYWHERE inline void store_fit(const QuantizeJob& job, std::int64_t index, const Fit& fit) {
  if (job.zero_point) {
    std::uint8_t raw[2];
    memcpy(raw, &fit.half_scale, 2);
    store_bytes<2>(job.scales + 2 * index, 2, raw);
    job.extra[index] = fit.zero;
  } else {
    std::uint8_t raw[4];
    memcpy(raw, &fit.scale, 4);
    store_bytes<4>(job.scales + 4 * index, 4, raw);
  }
}

// Four bits with a zero point: cpu::affine4_level.
VRAMKIT_ANYWHERE inline std::uint32_t affine4_code(float factor, float zero, float x) {
  const float level = cpu::round_even(limited(x * factor, -512.0f, 512.0f)) + zero;
  return static_cast<std::uint32_t>(limited(level, 0.0f, 15.0f));
}

// Writes the codes of `count` elements from column `col` of a row on; with four bits col is even.
template <int Bits>
VRAMKIT_ANYWHERE inline void store_codes(const QuantizeJob& job, std::int64_t row, std::int64_t col,
                                         int count, const std::uint32_t (&code)[kChunk]) {
  std::uint8_t* to = job.codes + row * job.row_code_bytes + (Bits == 4 ? col / 2 : col);
  constexpr int bytes = kChunk * Bits / 8;
  std::uint8_t raw[bytes];
  VRAMKIT_UNROLLED
  for (int i = 0; i < bytes; ++i) {
    if constexpr (Bits == 8) {
      raw[i] = static_cast<std::uint8_t>(code[i]);
    } else {
      const std::uint32_t second = 2 * i + 1 < count ? code[2 * i + 1] : 0u;
      raw[i] = static_cast<std::uint8_t>(code[2 * i] << 4 | second);
    }
  }
  store_bytes<bytes>(to, Bits == 4 ? (count + 1) / 2 : count, raw);
}

// The random words of eight columns from `col` on.
struct ChunkWords {
  std::uint32_t word[kChunk];
};
VRAMKIT_ANYWHERE inline void fill_words(std::uint64_t seed, std::int64_t row, std::int64_t col,
                                        ChunkWords& words) {
  if (col % 4 == 0) {
    VRAMKIT_UNROLLED
    for (int half = 0; half < 2; ++half) {
      const PhiloxWords found = words_of(seed, row, col / 4 + half);
      VRAMKIT_UNROLLED
      for (int i = 0; i < 4; ++i) words.word[4 * half + i] = found.word[i];
    }
    return;
  }
  VRAMKIT_UNROLLED
  for (int i = 0; i < kChunk; ++i) {
    const PhiloxWords found = words_of(seed, row, (col + i) / 4);
    const auto which = static_cast<int>((col + i) % 4);
    words.word[i] = which < 2 ? (which == 0 ? found.word[0] : found.word[1])
                              : (which == 2 ? found.word[2] : found.word[3]);
  }
}

template <bool stochastic>
VRAMKIT_ANYWHERE inline void encode_chunk(const QuantizeJob& job, const SortedCodes& sorted,
                                          const Fit& fit, std::int64_t row, std::int64_t col,
                                          int count, const Chunk& chunk) {
  ChunkWords words{};
  if constexpr (stochastic) fill_words(job.seed, row, col, words);
  std::uint32_t code[kChunk];
  VRAMKIT_UNROLLED
  for (int i = 0; i < kChunk; ++i) {
    const float y = chunk.value[i] * fit.factor;
    code[i] = fit.valid ? code_of<stochastic>(job.coder, sorted, y, words.word[i]) : 0u;
  }
  if (bits_of_code(job) == 4) {
    store_codes<4>(job, row, col, count, code);
  } else {
    store_codes<8>(job, row, col, count, code);
  }
}

// Where a group lies.
struct GroupPlace {
  std::int64_t index, row, col, count;
};
VRAMKIT_ANYWHERE inline GroupPlace group_at(const QuantizeJob& job, std::int64_t index) {
  const std::int64_t row = quotient(index, job.groups_per_row);
  const std::int64_t col = (index - row * job.groups_per_row) * job.group;
  const std::int64_t left = job.cols - col;
  return {index, row, col, left < job.group ? left : job.group};
}
VRAMKIT_ANYWHERE inline int part_of(std::int64_t count, std::int64_t chunk) {
  const std::int64_t left = count - chunk * kChunk;
  return left < kChunk ? static_cast<int>(left) : kChunk;
}

template <int Kept>
struct KeptChunks {
  Chunk chunk[Kept];
};

// A group whose scale is that of its absmax. `Kept` chunks of each lane stay in registers; `more`
// says that there may be others.
template <Element E, int Kept, bool more, bool stochastic, class Team>
VRAMKIT_ANYWHERE inline void quantize_group(const QuantizeJob& job, const SortedCodes& sorted,
                                            Team& team, std::int64_t index) {
  const GroupPlace at = group_at(job, index);
  const std::int64_t first = at.row * job.stride + at.col;
  const auto chunks = static_cast<int>((at.count + kChunk - 1) / kChunk);
  typename Team::template Kept<KeptChunks<Kept>> kept;
  const std::uint32_t most = team.largest([&](int lane) {
    KeptChunks<Kept>& mine = kept.of(lane);
    VRAMKIT_UNROLLED
    for (int k = 0; k < Kept; ++k) {
      const int chunk = lane + k * team.size();
      const int count = chunk < chunks ? part_of(at.count, chunk) : 0;
      load_chunk<E>(job.x, first + std::int64_t{chunk} * kChunk, count, mine.chunk[k]);
    }
    std::uint32_t found = 0;
    VRAMKIT_UNROLLED
    for (int k = 0; k < Kept; ++k) found = larger(found, largest_of(mine.chunk[k]));
    for (int chunk = lane + Kept * team.size(); more && chunk < chunks; chunk += team.size()) {
      Chunk part;
      load_chunk<E>(job.x, first + std::int64_t{chunk} * kChunk, part_of(at.count, chunk), part);
      found = larger(found, largest_of(part));
    }
    return found;
  });
  const Fit fit = absmax_fit(job, most);
  team.each([&](int lane) {
    if (lane == 0) store_fit(job, at.index, fit);
    KeptChunks<Kept>& mine = kept.of(lane);
    VRAMKIT_UNROLLED
    for (int k = 0; k < Kept; ++k) {
      const int chunk = lane + k * team.size();
      if (chunk < chunks) {
        encode_chunk<stochastic>(job, sorted, fit, at.row, at.col + std::int64_t{chunk} * kChunk,
                                 part_of(at.count, chunk), mine.chunk[k]);
      }
    }
    for (int chunk = lane + Kept * team.size(); more && chunk < chunks; chunk += team.size()) {
      Chunk part;
      const int count = part_of(at.count, chunk);
      const std::int64_t from = std::int64_t{chunk} * kChunk;
      load_chunk<E>(job.x, first + from, count, part);
      encode_chunk<stochastic>(job, sorted, fit, at.row, at.col + from, count, part);
    }
  });
}

// Searched scales.

inline constexpr int kSearchLanes = 16;
inline constexpr int kKeptPerLane = 8;

struct KeptElements {
  float value[kKeptPerLane];
};

// cpu::LevelScorer's sums, by a team of sixteen: lane l has elements l, l + 16, … of the group.
// Zeros pad a short last round: they lie on a level, and add nothing.
template <Element E, class Team>
class TeamScorer {
 public:
  VRAMKIT_ANYWHERE TeamScorer(const void* x, std::int64_t first, std::int64_t count, Team& team)
      : x_(x), first_(first), count_(count), team_(team) {
    team_.each([&](int lane) {
      KeptElements& mine = kept_.of(lane);
      VRAMKIT_UNROLLED
      for (int k = 0; k < kKeptPerLane; ++k) {
        const std::int64_t i = lane + kSearchLanes * k;
        mine.value[k] = i < count_ ? element_at<E>(x_, first_ + i) : 0.0f;
      }
    });
  }

  // visit(lane, element) in order.
  template <class Visit>
  VRAMKIT_ANYWHERE void each_of(int lane, const Visit& visit) const {
    const KeptElements& mine = kept_.of(lane);
    VRAMKIT_UNROLLED
    for (int k = 0; k < kKeptPerLane; ++k) visit(mine.value[k]);
    for (std::int64_t i = lane + kSearchLanes * kKeptPerLane; i < count_; i += kSearchLanes) {
      visit(element_at<E>(x_, first_ + i));
    }
  }

  template <int C>
  VRAMKIT_ANYWHERE void misses(const cpu::LevelGrid<C>& grid, float* out) const {
    const Sums<C> sums = team_.template sums<C>([&](int lane) {
      Sums<C> mine{};
      each_of(lane, [&](float x) {
        VRAMKIT_UNROLLED
        for (int c = 0; c < C; ++c) {
          const float y = x * grid.factor[c];
          const float miss = y - level(y, grid.low[c], grid.high[c]);
          mine.value[c] += miss * miss;
        }
      });
      return mine;
    });
    VRAMKIT_UNROLLED
    for (int c = 0; c < C; ++c) out[c] = sums.value[c];
  }

  VRAMKIT_ANYWHERE float refit(const cpu::LevelGrid<1>& at) const {
    const Sums<2> sums = team_.template sums<2>([&](int lane) {
      Sums<2> mine{};
      each_of(lane, [&](float x) {
        const float y = x * at.factor[0];
        const float found = level(y, at.low[0], at.high[0]);
        mine.value[0] += y * found;
        mine.value[1] += found * found;
      });
      return mine;
    });
    return sums.value[0] / sums.value[1];
  }

  // The least and the largest element, and the largest magnitude's bits.
  struct Range {
    float low, high;
    std::uint32_t most;
  };
  VRAMKIT_ANYWHERE Range range(bool signs) const {
    Range found{0.0f, 0.0f, 0};
    found.most = team_.largest([&](int lane) {
      std::uint32_t most = 0;
      each_of(lane, [&](float x) { most = larger(most, magnitude_of(x)); });
      return most;
    });
    if (!signs || found.most >= kInfinity) return found;
    // Zero is in the range of every search: padding does no harm.
    found.high = from_ordered(team_.largest([&](int lane) {
      std::uint32_t most = ordered(0.0f);
      each_of(lane, [&](float x) { most = larger(most, ordered(x)); });
      return most;
    }));
    found.low = -from_ordered(team_.largest([&](int lane) {
      std::uint32_t most = ordered(0.0f);
      each_of(lane, [&](float x) { most = larger(most, ordered(-x)); });
      return most;
    }));
    return found;
  }

 private:
  VRAMKIT_ANYWHERE static float level(float y, float low, float high) {
    return cpu::round_even(limited(y, low, high));
  }

  const void* x_;
  std::int64_t first_, count_;
  Team& team_;
  mutable typename Team::template Kept<KeptElements> kept_;
};

template <Element E, int Bits, class Team>
VRAMKIT_ANYWHERE inline Fit searched_fit(const QuantizeJob& job, Team& team, const GroupPlace& at) {
  const TeamScorer<E, Team> scorer(job.x, at.row * job.stride + at.col, at.count, team);
  const auto range = scorer.range(Bits == 4);
  if (range.most >= kInfinity) return invalid_fit();
  Fit fit;
  fit.valid = true;
  if constexpr (Bits == 4) {
    const cpu::Affine4 found = cpu::search_affine4(range.low, range.high, scorer);
    fit.half_scale = found.scale;
    fit.zero = found.zero;
    fit.factor = found.factor;
  } else {
    const cpu::Scale8 found = cpu::search_scale8(float_of(range.most), scorer);
    fit.scale = found.scale;
    fit.factor = found.factor;
  }
  return fit;
}

// A group whose scale is searched, of four bits with a zero point or of eight; a team of sixteen.
template <Element E, int Bits, class Team>
VRAMKIT_ANYWHERE inline void search_group(const QuantizeJob& job, Team& team, std::int64_t index) {
  const GroupPlace at = group_at(job, index);
  const Fit fit = searched_fit<E, Bits>(job, team, at);
  const std::int64_t first = at.row * job.stride + at.col;
  const std::int64_t chunks = (at.count + kChunk - 1) / kChunk;
  team.each([&](int lane) {
    if (lane == 0) store_fit(job, at.index, fit);
    for (std::int64_t chunk = lane; chunk < chunks; chunk += kSearchLanes) {
      Chunk part;
      const int count = part_of(at.count, chunk);
      load_chunk<E>(job.x, first + chunk * kChunk, count, part);
      std::uint32_t code[kChunk];
      VRAMKIT_UNROLLED
      for (int i = 0; i < kChunk; ++i) {
        const float x = part.value[i];
        const std::uint32_t found = Bits == 4
                                        ? affine4_code(fit.factor, static_cast<float>(fit.zero), x)
                                        : integer8_code(x * fit.factor);
        code[i] = fit.valid ? found : 0u;
      }
      store_codes<Bits>(job, at.row, at.col + chunk * kChunk, count, code);
    }
  });
}

// Two groups that share a byte, of any kind of scale (four bits, an odd number of elements to a
// group): rare, and not written for speed. A team of sixteen; `pair` counts within all rows.
VRAMKIT_ANYWHERE constexpr std::int64_t pairs_per_row(const QuantizeJob& job) {
  return (job.groups_per_row + 1) / 2;
}
template <Element E, class Team>
VRAMKIT_ANYWHERE inline void quantize_pair(const QuantizeJob& job, const SortedCodes& sorted,
                                           Team& team, std::int64_t pair) {
  const std::int64_t row = quotient(pair, pairs_per_row(job));
  const std::int64_t in_row = 2 * (pair - row * pairs_per_row(job));
  const GroupPlace at = group_at(job, row * job.groups_per_row + in_row);
  const bool both = in_row + 1 < job.groups_per_row;
  const GroupPlace next = both ? group_at(job, at.index + 1) : GroupPlace{};
  const auto fit_of = [&](const GroupPlace& place) {
    if (job.zero_point) return searched_fit<E, 4>(job, team, place);
    const TeamScorer<E, Team> elements(job.x, place.row * job.stride + place.col, place.count,
                                       team);
    return absmax_fit(job, elements.range(false).most);
  };
  const Fit first = fit_of(at);
  const Fit second = both ? fit_of(next) : first;
  const std::int64_t count = at.count + (both ? next.count : 0);
  const std::int64_t chunks = (count + kChunk - 1) / kChunk;
  team.each([&](int lane) {
    if (lane == 0) {
      store_fit(job, at.index, first);
      if (both) store_fit(job, next.index, second);
    }
    for (std::int64_t chunk = lane; chunk < chunks; chunk += kSearchLanes) {
      const int part = part_of(count, chunk);
      const std::int64_t col = at.col + chunk * kChunk;
      Chunk x;
      load_chunk<E>(job.x, at.row * job.stride + col, part, x);
      std::uint32_t code[kChunk];
      VRAMKIT_UNROLLED
      for (int i = 0; i < kChunk; ++i) {
        const bool early = chunk * kChunk + i < at.count;
        const float factor = early ? first.factor : second.factor, value = x.value[i];
        const std::uint32_t zero = early ? first.zero : second.zero;
        const std::uint32_t found = job.zero_point
                                        ? affine4_code(factor, static_cast<float>(zero), value)
                                        : code_of<false>(Coder::table4, sorted, value * factor, 0);
        code[i] = (early ? first.valid : second.valid) ? found : 0u;
      }
      store_codes<4>(job, at.row, col, part, code);
    }
  });
}

// Sorting a codebook, by one thread for each of its 2^bits codes: first the rank of each value,
// equal ones in the order of their codes, then the midpoints.
struct SortScratch {
  float value[256];
};
VRAMKIT_ANYWHERE inline void sort_rank(const float* table, int entries, SortScratch& scratch,
                                       SortedCodes& sorted, int thread) {
  if (thread >= entries) return;
  const float mine = table[thread];
  int rank = 0;
  for (int other = 0; other < entries; ++other) {
    const float value = table[other];
    if (value < mine || (value == mine && other < thread)) ++rank;
  }
  scratch.value[rank] = mine;
  sorted.code[rank] = static_cast<std::uint8_t>(thread);
}
VRAMKIT_ANYWHERE inline void sort_bound(int entries, const SortScratch& scratch,
                                        SortedCodes& sorted, int thread) {
  if (thread + 1 < entries) {
    sorted.bound[thread] = (scratch.value[thread] + scratch.value[thread + 1]) / 2.0f;
  } else {
    sorted.bound[thread] = 0.0f;
    if (thread >= entries) sorted.code[thread] = 0;
  }
}
// The same of 255 given bounds between codes that ascend.
VRAMKIT_ANYWHERE inline void take_bound(const float* bounds, SortedCodes& sorted, int thread) {
  sorted.bound[thread] = thread < 255 ? bounds[thread] : 0.0f;
  sorted.code[thread] = static_cast<std::uint8_t>(thread);
}

// A block's copy of the table in shared memory, before its teams begin.
VRAMKIT_ANYWHERE inline void fetch_sorted(const QuantizeJob& job, SortedCodes& shared, int thread) {
  if (job.sorted == nullptr || thread >= (job.coder == Coder::table4 ? 16 : 256)) return;
  shared.bound[thread] = job.sorted->bound[thread];
  shared.code[thread] = job.sorted->code[thread];
}

// Casts to 16 bit with stochastic rounding: a thread has eight elements, as in decode.hpp.
struct StochasticCast {
  CastJob cast;
  std::uint64_t seed = 0;
};
template <Element From, Codes To>
VRAMKIT_ANYWHERE inline void stochastic_chunk(const StochasticCast& job, std::int64_t index) {
  const ChunkPlace at = place_of(index, (job.cast.cols + kChunk - 1) / kChunk);
  const int count = part_of(job.cast.cols, at.col / kChunk);
  Chunk chunk;
  load_chunk<From>(job.cast.x, at.row * job.cast.stride + at.col, count, chunk);
  ChunkWords words{};
  fill_words(job.seed, at.row, at.col, words);
  std::uint16_t rounded[kChunk];
  VRAMKIT_UNROLLED
  for (int i = 0; i < kChunk; ++i) {
    rounded[i] = To == Codes::bf16 ? stochastic_bf16(chunk.value[i], words.word[i])
                                   : stochastic_fp16(chunk.value[i], words.word[i]);
  }
  std::uint8_t raw[2 * kChunk];
  memcpy(raw, rounded, sizeof(raw));
  store_bytes<2 * kChunk>(job.cast.codes + 2 * (at.row * job.cast.cols + at.col), 2 * count, raw);
}
template <Element From, Codes To>
VRAMKIT_ANYWHERE inline void stochastic_block(const StochasticCast& job, std::int64_t block,
                                              int thread) {
  const std::int64_t chunks = job.cast.rows * ((job.cast.cols + kChunk - 1) / kChunk);
  for (int round = 0; round < kRounds; ++round) {
    const std::int64_t chunk = (block * kRounds + round) * kThreads + thread;
    if (chunk < chunks) stochastic_chunk<From, To>(job, chunk);
  }
}

// The choice of a kernel and its grid, from the sizes alone. (A group's chunks are counted in 32
// bits: launch_quantize refuses longer ones.)
enum class QuantizeKernel : std::int32_t { small, warp, block, search, pair };

inline constexpr int kWarpKept = 4, kBlockKept = 4;
inline constexpr int kGroupRounds = 4;  // groups of a team, one after another

struct QuantizePlan {
  QuantizeKernel kernel = QuantizeKernel::small;
  int width = 1;           // lanes of a team
  std::int64_t teams = 0;  // groups, or pairs of groups
  std::int64_t blocks = 0;
};

inline QuantizePlan plan_of(const QuantizeJob& job) {
  QuantizePlan plan;
  plan.teams = job.rows * job.groups_per_row;
  const std::int64_t longest = job.group < job.cols ? job.group : job.cols;
  if (shares_bytes(job)) {
    plan.kernel = QuantizeKernel::pair;
    plan.width = kSearchLanes;
    plan.teams = job.rows * pairs_per_row(job);
  } else if (job.searched) {
    plan.kernel = QuantizeKernel::search;
    plan.width = kSearchLanes;
  } else if (longest > kChunk * 32 * kWarpKept) {
    plan.kernel = QuantizeKernel::block;
    plan.width = kThreads;
    plan.blocks = plan.teams;
    return plan;
  } else {
    plan.kernel = longest > kChunk * 32 ? QuantizeKernel::warp : QuantizeKernel::small;
    while (plan.width < 32 && plan.width * kChunk < longest) plan.width *= 2;
  }
  const std::int64_t each = kThreads / plan.width * kGroupRounds;
  plan.blocks = (plan.teams + each - 1) / each;
  return plan;
}

}  // namespace vramkit::cuda
