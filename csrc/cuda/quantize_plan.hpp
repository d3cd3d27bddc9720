// Which kernel encodes what, and on which grid: decided on the host.
#pragma once
#include <cstdint>

#include "core/format.hpp"
#include "cuda/quantize_search.hpp"

namespace vramkit::cuda {

inline Coder coder_of(const Format& format) {
  switch (format.encoder) {
    case Encoder::midpoint:
      return format.bits == 4 ? Coder::table4 : Coder::table8;
    case Encoder::e4m3:
      return Coder::e4m3;
    case Encoder::e5m2:
      return Coder::e5m2;
    default:
      return Coder::integer8;
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
