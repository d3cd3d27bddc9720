// Work over lists of tensors (csrc/cpu/multi.hpp) on a GPU: what its threads do, as functions that
// the host compiles too, so that tests run these very bodies against the scalar reference. The
// kernels around them are in multi.cu.
//
// A launch takes a few dozen tensors, whose addresses are the kernel's own arguments: nothing is
// copied to the device before it, and it may be captured in a graph. Blocks are numbered through
// all tensors of a launch; each finds its tensor among the slots.
//
//   sums    a block has a chunk (kMultiChunk), four threads a piece of it (kSumPiece): thread t has
//           running sums 4 (t % 4) .. + 3 of piece t / 4, so that it reads four elements at once
//   steps   a thread has four neighbouring elements, kQuadRounds times; with state in 8 bits a warp
//   casts   has a block of state, eight elements a thread
//
// Sums have the CPU's order, and all results its bits, NaN but for its payload.
#pragma once
#include <cstdint>

#include "core/stochastic.hpp"
#include "cpu/multi_math.hpp"
#include "cuda/decode.hpp"
#include "cuda/quantize.hpp"
#include "cuda/team.hpp"

namespace vramkit::cuda {

inline constexpr int kQuad = 4;
inline constexpr int kQuadRounds = 4;
// Elements of a block of threads.
inline constexpr std::int64_t kBlockElements = std::int64_t{kThreads} * kQuad * kQuadRounds;
inline constexpr int kStatesPerBlock = static_cast<int>(kBlockElements / cpu::kStateBlock);

// The last slot whose first block is not past this one.
template <class Slot>
VRAMKIT_ANYWHERE inline int slot_of(const Slot* slots, int count, std::int32_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (slots[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Four neighbouring elements of any type.

struct Quad {
  float value[kQuad];
};

VRAMKIT_ANYWHERE inline int left_of(std::int64_t count, std::int64_t at) {
  const std::int64_t left = count - at;
  return left < 0 ? 0 : left < kQuad ? static_cast<int>(left) : kQuad;
}

// `count` elements from `at` on, and zeros.
VRAMKIT_ANYWHERE inline Quad load_quad(const void* base, Element type, std::int64_t at, int count) {
  const auto* bytes = static_cast<const std::uint8_t*>(base);
  Quad quad;
  if (type == Element::f32) {
    std::uint8_t raw[16];
    load_bytes<16>(bytes + 4 * at, 4 * count, raw);
    memcpy(quad.value, raw, 16);
    return quad;
  }
  std::uint8_t raw[8];
  std::uint16_t half[kQuad];
  load_bytes<8>(bytes + 2 * at, 2 * count, raw);
  memcpy(half, raw, 8);
  VRAMKIT_UNROLLED
  for (int k = 0; k < kQuad; ++k) {
    quad.value[k] = type == Element::bf16 ? bf16_to_float(half[k]) : half_to_float(half[k]);
  }
  return quad;
}

VRAMKIT_ANYWHERE inline void store_halves(void* base, std::int64_t at, int count,
                                          const std::uint16_t (&half)[kQuad]) {
  std::uint8_t raw[8];
  memcpy(raw, half, 8);
  store_bytes<8>(static_cast<std::uint8_t*>(base) + 2 * at, 2 * count, raw);
}

// To nearest even.
VRAMKIT_ANYWHERE inline void store_quad(void* base, Element type, std::int64_t at, int count,
                                        const Quad& quad) {
  if (type == Element::f32) {
    std::uint8_t raw[16];
    memcpy(raw, quad.value, 16);
    store_bytes<16>(static_cast<std::uint8_t*>(base) + 4 * at, 4 * count, raw);
    return;
  }
  std::uint16_t half[kQuad];
  VRAMKIT_UNROLLED
  for (int k = 0; k < kQuad; ++k) {
    half[k] = type == Element::bf16 ? float_to_bf16(quad.value[k]) : float_to_half(quad.value[k]);
  }
  store_halves(base, at, count, half);
}

// At random, 16-bit types; `at` is a multiple of four.
VRAMKIT_ANYWHERE inline void store_quad_rounded(void* base, Element type, std::int64_t at,
                                                int count, const Quad& quad, std::uint64_t seed,
                                                std::int64_t row) {
  const PhiloxWords words = words_of(seed, row, at / kQuad);
  std::uint16_t half[kQuad];
  VRAMKIT_UNROLLED
  for (int k = 0; k < kQuad; ++k) {
    half[k] = type == Element::bf16 ? stochastic_bf16(quad.value[k], words.word[k])
                                    : stochastic_fp16(quad.value[k], words.word[k]);
  }
  store_halves(base, at, count, half);
}

// Sums of squares.

struct SumSlot {
  const void* x = nullptr;
  std::int64_t count = 0;
  std::int32_t first_block = 0;
  Element type = Element::f32;
};

struct SumJob {
  static constexpr int kSlots = 128;
  SumSlot slot[kSlots];
  int slots = 0;
  double* sums = nullptr;  // one per block of the launch
};

inline constexpr int kPieces = static_cast<int>(cpu::kMultiChunk / cpu::kSumPiece);
inline constexpr int kThreadsPerPiece = cpu::kSumLanes / kQuad;
inline constexpr int kSumThreads = kPieces * kThreadsPerPiece;

// Shared by the threads of a block.
struct SumScratch {
  double lane[kSumThreads * kQuad];
  double piece[kPieces];
};

VRAMKIT_ANYWHERE inline void sum_lanes(const SumJob& job, std::int32_t block, int thread,
                                       SumScratch& scratch) {
  const SumSlot& slot = job.slot[slot_of(job.slot, job.slots, block)];
  const std::int64_t first = (block - slot.first_block) * cpu::kMultiChunk +
                             thread / kThreadsPerPiece * cpu::kSumPiece +
                             thread % kThreadsPerPiece * kQuad;
  double sums[kQuad] = {};
#if defined(__CUDA_ARCH__)
#pragma unroll 8
#endif
  for (int round = 0; round < cpu::kSumPiece / cpu::kSumLanes; ++round) {
    const std::int64_t at = first + round * cpu::kSumLanes;
    const Quad quad = load_quad(slot.x, slot.type, at, left_of(slot.count, at));
    VRAMKIT_UNROLLED
    for (int k = 0; k < kQuad; ++k) {
      const double value = quad.value[k];
      sums[k] += value * value;
    }
  }
  VRAMKIT_UNROLLED
  for (int k = 0; k < kQuad; ++k) scratch.lane[thread * kQuad + k] = sums[k];
}

VRAMKIT_ANYWHERE inline void sum_piece(int piece, SumScratch& scratch) {
  double sum = 0.0;
  for (int k = 0; k < cpu::kSumLanes; ++k) sum += scratch.lane[piece * cpu::kSumLanes + k];
  scratch.piece[piece] = sum;
}

VRAMKIT_ANYWHERE inline double sum_chunk(const SumScratch& scratch) {
  double sum = 0.0;
  for (int piece = 0; piece < kPieces; ++piece) sum += scratch.piece[piece];
  return sum;
}

// cpu::total_of, by kTotalLanes threads and then one.
VRAMKIT_ANYWHERE inline double total_lane(const double* sums, std::int64_t count, int lane) {
  double sum = 0.0;
  for (std::int64_t i = lane; i < count; i += cpu::kTotalLanes) sum += sums[i];
  return sum;
}
VRAMKIT_ANYWHERE inline double total_of_lanes(const double* lanes) {
  double sum = 0.0;
  for (int lane = 0; lane < cpu::kTotalLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Scaling and casts.

struct CopySlot {
  const void* from = nullptr;
  void* to = nullptr;
  std::int64_t count = 0;
  std::int64_t row = 0;  // of the random words
  std::int32_t first_block = 0;
  Element from_type = Element::f32, to_type = Element::f32;
};

// to = from * factor, rounded once.
struct CopyJob {
  static constexpr int kSlots = 64;
  CopySlot slot[kSlots];
  int slots = 0;
  float factor = 1.0f;
  bool random = false;  // 16-bit results are rounded stochastically
  std::uint64_t seed = 0;
};

VRAMKIT_ANYWHERE inline void copy_thread(const CopyJob& job, std::int32_t block, int thread) {
  const CopySlot& slot = job.slot[slot_of(job.slot, job.slots, block)];
  const std::int64_t first = (block - slot.first_block) * kBlockElements + thread * kQuad;
  VRAMKIT_UNROLLED
  for (int round = 0; round < kQuadRounds; ++round) {
    const std::int64_t at = first + round * kThreads * kQuad;
    const int count = left_of(slot.count, at);
    if (count == 0) return;
    Quad quad = load_quad(slot.from, slot.from_type, at, count);
    if (job.factor != 1.0f) {
      VRAMKIT_UNROLLED
      for (int k = 0; k < kQuad; ++k) quad.value[k] = product_of(quad.value[k], job.factor);
    }
    if (job.random && slot.to_type != Element::f32) {
      store_quad_rounded(slot.to, slot.to_type, at, count, quad, job.seed, slot.row);
    } else {
      store_quad(slot.to, slot.to_type, at, count, quad);
    }
  }
}

// Steps of AdamW.

// cpu::AdamwStep of one tensor.
struct StepSlot {
  void* parameter = nullptr;
  void* second = nullptr;
  const void* gradient = nullptr;
  // m, v and the largest v, or null; with 8 bits: codes and scales of m, codes and scales of v.
  void* state[4] = {};
  std::int64_t count = 0;
  std::int64_t row = 0;  // of the random words
  float step_size = 0.0f, root_correction = 1.0f;
  std::int32_t first_block = 0;
  Element parameter_type : 8 = Element::f32, gradient_type : 8 = Element::f32;
  Element second_type : 8 = Element::f32;
};

template <int Slots>
struct StepJob {
  static constexpr int kSlots = Slots;
  StepSlot slot[Slots];
  int slots = 0;
  cpu::AdamwNumbers numbers;  // but for what slots have of their own
  bool random = false;        // 16-bit parameters without a second are rounded stochastically
  std::uint64_t seed = 0;
};
using FloatStepJob = StepJob<40>;
using ByteStepJob = StepJob<20>;
static_assert(sizeof(SumJob) <= 4096 && sizeof(CopyJob) <= 4096 && sizeof(FloatStepJob) <= 4096,
              "arguments of kernels");

// Updates four elements, whose state is m, v and largest.
template <class Job>
VRAMKIT_ANYWHERE inline void step_quad(const Job& job, const StepSlot& slot, std::int64_t at,
                                       int count, Quad& m, Quad& v, Quad& largest, bool amsgrad) {
  const bool halves = slot.second && slot.second_type == slot.parameter_type;
  cpu::AdamwNumbers numbers = job.numbers;
  numbers.step_size = slot.step_size;
  numbers.root_correction = slot.root_correction;
  Quad w = load_quad(slot.parameter, slot.parameter_type, at, count);
  const Quad g = load_quad(slot.gradient, slot.gradient_type, at, count);
  if (halves) {
    const Quad rest = load_quad(slot.second, slot.second_type, at, count);
    VRAMKIT_UNROLLED
    for (int k = 0; k < kQuad; ++k) w.value[k] = w.value[k] + rest.value[k];
  }
  VRAMKIT_UNROLLED
  for (int k = 0; k < kQuad; ++k) {
    cpu::AdamwElement e{w.value[k], m.value[k], v.value[k], largest.value[k]};
    cpu::adamw_element(numbers, g.value[k], amsgrad, e);
    w.value[k] = e.w;
    m.value[k] = e.m;
    v.value[k] = e.v;
    largest.value[k] = e.largest;
  }
  if (!slot.second && job.random && slot.parameter_type != Element::f32) {
    return store_quad_rounded(slot.parameter, slot.parameter_type, at, count, w, job.seed,
                              slot.row);
  }
  store_quad(slot.parameter, slot.parameter_type, at, count, w);
  if (!slot.second) return;
  if (halves) {  // what rounding has left
    VRAMKIT_UNROLLED
    for (int k = 0; k < kQuad; ++k) {
      const float kept = slot.parameter_type == Element::bf16
                             ? bf16_to_float(float_to_bf16(w.value[k]))
                             : half_to_float(float_to_half(w.value[k]));
      w.value[k] = w.value[k] - kept;
    }
  }
  store_quad(slot.second, slot.second_type, at, count, w);
}

VRAMKIT_ANYWHERE inline void step_thread(const FloatStepJob& job, std::int32_t block, int thread) {
  const StepSlot& slot = job.slot[slot_of(job.slot, job.slots, block)];
  const std::int64_t first = (block - slot.first_block) * kBlockElements + thread * kQuad;
  const bool amsgrad = slot.state[2] != nullptr;
  for (int round = 0; round < kQuadRounds; ++round) {
    const std::int64_t at = first + round * kThreads * kQuad;
    const int count = left_of(slot.count, at);
    if (count == 0) return;
    Quad m = load_quad(slot.state[0], Element::f32, at, count);
    Quad v = load_quad(slot.state[1], Element::f32, at, count);
    Quad largest{};
    if (amsgrad) largest = load_quad(slot.state[2], Element::f32, at, count);
    step_quad(job, slot, at, count, m, v, largest, amsgrad);
    store_quad(slot.state[0], Element::f32, at, count, m);
    store_quad(slot.state[1], Element::f32, at, count, v);
    if (amsgrad) store_quad(slot.state[2], Element::f32, at, count, largest);
  }
}

// The values of the codes of m and of v, as arguments of the kernel; and with their midpoints,
// shared by a block.
struct StateMaps {
  float value[2][256];
};
static_assert(sizeof(ByteStepJob) + sizeof(StateMaps) <= 4096, "arguments of kernels");
struct StateTables {
  float value[2][256];
  float bound[2][256];  // the last is unused
};

VRAMKIT_ANYWHERE inline void fill_tables(const StateMaps& maps, StateTables& tables, int thread) {
  VRAMKIT_UNROLLED
  for (int k = 0; k < 2; ++k) {
    const float value = maps.value[k][thread], next = maps.value[k][thread < 255 ? thread + 1 : 0];
    tables.value[k][thread] = value;
    tables.bound[k][thread] = (value + next) / 2.0f;
  }
}

// What a lane keeps of a block of state: m and v of its elements.
struct KeptState {
  Quad quad[2][2];
};

// One block of state, `in_block` of a block of threads, by a team of 32.
template <class Team>
VRAMKIT_ANYWHERE inline void step_states(const ByteStepJob& job, const StateTables& tables,
                                         std::int32_t block, int in_block, Team& team) {
  const StepSlot& slot = job.slot[slot_of(job.slot, job.slots, block)];
  const std::int64_t index = std::int64_t{block - slot.first_block} * kStatesPerBlock + in_block;
  const std::int64_t first = index * cpu::kStateBlock;
  if (first >= slot.count) return;  // the same for all lanes
  typename Team::template Kept<KeptState> kept;
  const auto place = [&](int lane, int part) { return first + 128 * part + kQuad * lane; };
  const auto largest = [&](int lane, int which) {
    std::uint32_t most = 0;
    VRAMKIT_UNROLLED
    for (int part = 0; part < 2; ++part) {
      VRAMKIT_UNROLLED
      for (int k = 0; k < kQuad; ++k) {
        most = larger(most, magnitude_of(kept.of(lane).quad[which][part].value[k]));
      }
    }
    return most;
  };
  const std::uint32_t most_m = team.largest([&](int lane) {
    VRAMKIT_UNROLLED
    for (int part = 0; part < 2; ++part) {
      const std::int64_t at = place(lane, part);
      const int count = left_of(slot.count, at);
      Quad(&state)[2][2] = kept.of(lane).quad;
      VRAMKIT_UNROLLED
      for (int which = 0; which < 2; ++which) {
        std::uint8_t code[kQuad];
        load_bytes<kQuad>(static_cast<const std::uint8_t*>(slot.state[2 * which]) + at, count,
                          code);
        const float absmax = static_cast<const float*>(slot.state[2 * which + 1])[index];
        VRAMKIT_UNROLLED
        for (int k = 0; k < kQuad; ++k) {
          state[which][part].value[k] = tables.value[which][code[k]] * absmax;
        }
      }
      Quad none{};
      step_quad(job, slot, at, count, state[0][part], state[1][part], none, false);
      VRAMKIT_UNROLLED
      for (int k = 0; k < kQuad; ++k) {  // what is not there is no state's largest
        if (k >= count) state[0][part].value[k] = state[1][part].value[k] = 0.0f;
      }
    }
    return largest(lane, 0);
  });
  const std::uint32_t most_v = team.largest([&](int lane) { return largest(lane, 1); });
  team.each([&](int lane) {
    VRAMKIT_UNROLLED
    for (int which = 0; which < 2; ++which) {
      const std::uint32_t most = which ? most_v : most_m;
      const float absmax = float_of(most < kInfinity ? most : 0x7fc00000u);
      if (lane == 0) static_cast<float*>(slot.state[2 * which + 1])[index] = absmax;
      VRAMKIT_UNROLLED
      for (int part = 0; part < 2; ++part) {
        const std::int64_t at = place(lane, part);
        std::uint8_t code[kQuad];
        VRAMKIT_UNROLLED
        for (int k = 0; k < kQuad; ++k) {
          const float value = kept.of(lane).quad[which][part].value[k];
          const float share = absmax > 0.0f ? value / absmax : 0.0f;
          code[k] = static_cast<std::uint8_t>(bounds_below<255>(tables.bound[which], share));
        }
        store_bytes<kQuad>(static_cast<std::uint8_t*>(slot.state[2 * which]) + at,
                           left_of(slot.count, at), code);
      }
    }
  });
}

}  // namespace vramkit::cuda
