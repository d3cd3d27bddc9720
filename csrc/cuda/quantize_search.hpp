// Encoding weights whose scales are searched for the least squared error, and groups that share a
// byte: as quantize.hpp, by teams of sixteen.
#pragma once
#include <cstdint>

#include "cuda/quantize.hpp"

namespace vramkit::cuda {

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

}  // namespace vramkit::cuda
