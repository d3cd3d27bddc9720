// The bodies of the CUDA kernels over lists of tensors (csrc/cuda/multi.hpp), run on the host over
// a launch's grid, against the scalar reference: bit for bit, sums too.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.hpp"
#include "cuda/multi.hpp"
#include "emulated_team.hpp"
#include "kernel_cases.hpp"

namespace vramkit::testing {
namespace {

using cpu::Buffer;
using cpu::DType;
using cpu::kTypes;
using cuda::Element;

// More than a chunk, or a block of threads, and short tails; some empty.
constexpr std::int64_t kCounts[] = {1, 3, 0, 16, 17, 1000, 1024, 4095, 0, 4097, 40001, 257};
constexpr std::int64_t kOffsets[] = {0, 2, 4, 16};  // bytes from an aligned address

Element element(DType type) {
  return type == DType::f32 ? Element::f32 : type == DType::bf16 ? Element::bf16 : Element::f16;
}

struct Values {
  DType type;
  std::int64_t count;
  Buffer bytes;
  Values(DType t, std::int64_t n, unsigned seed, bool positive = false, bool zero = false)
      : type(t),
        count(n),
        bytes(n * cpu::size_of(t), t == DType::f32 ? 4 * (seed % 5) : kOffsets[seed % 4]) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    for (std::int64_t i = 0; i < n; ++i) {
      const float x = zero ? 0.0f : normal(random) * std::exp2(3.0f * normal(random));
      cpu::write(bytes.data(), type, i, positive ? std::fabs(x) : x);
    }
  }
  Values(const Values& other) : type(other.type), count(other.count), bytes(other.bytes.size()) {
    std::memcpy(bytes.data(), other.bytes.data(), static_cast<std::size_t>(bytes.size()));
  }
  bool operator==(const Values& other) const { return bytes == other.bytes; }
};

std::int32_t blocks_for(std::int64_t count, std::int64_t each) {
  return static_cast<std::int32_t>((count + each - 1) / each);
}

double sum_of_block(const cuda::SumJob& job, std::int32_t block) {
  auto scratch = std::make_unique<cuda::SumScratch>();
  std::memset(scratch.get(), 0xFF, sizeof(*scratch));
  for (int t = cuda::kSumThreads - 1; t >= 0; --t) cuda::sum_lanes(job, block, t, *scratch);
  for (int piece = cuda::kPieces - 1; piece >= 0; --piece) cuda::sum_piece(piece, *scratch);
  return cuda::sum_chunk(*scratch);
}

TEST(CudaMulti, SumsHaveTheReferencesBits) {
  std::vector<Values> tensors;
  for (const DType type : kTypes) {
    for (const std::int64_t count : kCounts) {
      tensors.emplace_back(type, count, static_cast<unsigned>(tensors.size()));
    }
  }
  cpu::write(tensors[5].bytes.data(), DType::f32, 999, cpu::kInf);
  auto job = std::make_unique<cuda::SumJob>();
  std::int32_t blocks = 0;
  std::vector<double> expected;
  for (const Values& x : tensors) {
    if (x.count == 0) continue;
    job->slot[job->slots++] = {x.bytes.data(), x.count, blocks, element(x.type)};
    blocks += blocks_for(x.count, cpu::kMultiChunk);
    for (std::int64_t first = 0; first < x.count; first += cpu::kMultiChunk) {
      expected.push_back(cpu::reference_kernels().multi.square_sum(
          x.bytes.data() + first * cpu::size_of(x.type), x.type,
          std::min(cpu::kMultiChunk, x.count - first)));
    }
  }
  std::vector<double> sums;
  for (std::int32_t block = 0; block < blocks; ++block) sums.push_back(sum_of_block(*job, block));
  EXPECT_EQ(sums, expected);
  EXPECT_EQ(std::count(sums.begin(), sums.end(), std::numeric_limits<double>::infinity()), 1);

  std::vector<double> many(3001);
  for (std::size_t i = 0; i < many.size(); ++i) many[i] = std::exp(std::sin(double(i) * 7.1) * 9);
  for (const std::size_t count : {0, 1, 256, 257, 3001}) {
    std::vector<double> lanes(cpu::kTotalLanes);
    const auto n = static_cast<std::int64_t>(count);
    for (int lane = 0; lane < cpu::kTotalLanes; ++lane) {
      lanes[static_cast<std::size_t>(lane)] = cuda::total_lane(many.data(), n, lane);
    }
    EXPECT_EQ(cuda::total_of_lanes(lanes.data()), cpu::total_of(many.data(), n));
  }
}

TEST(CudaMulti, CopiesHaveTheReferencesBits) {
  for (const bool random : {false, true}) {
    for (const float factor : {1.0f, 0.37f}) {
      auto job = std::make_unique<cuda::CopyJob>();
      job->factor = factor;
      job->random = random;
      job->seed = 0xfedcba9876543210u;
      std::vector<Values> from, to;
      for (const DType source : kTypes) {
        for (const DType target : kTypes) {
          // In place, as scaling has it, or to another list.
          for (const std::int64_t count : {1, 3, 17, 1000, 5001}) {
            from.emplace_back(source, count, static_cast<unsigned>(from.size()));
            to.emplace_back(target, count, static_cast<unsigned>(from.size()), false, true);
          }
        }
      }
      std::vector<Values> expected(to);
      std::int32_t blocks = 0;
      for (std::size_t t = 0; t < from.size(); ++t) {
        const Values& x = from[t];
        if (x.count > 20) {
          cpu::write(from[t].bytes.data(), x.type, 9, std::nanf(""));
          cpu::write(from[t].bytes.data(), x.type, 10, cpu::kInf);
          cpu::write(from[t].bytes.data(), x.type, 11, 7e4f);
          cpu::write(from[t].bytes.data(), x.type, 12, 3e-7f);
        }
        const auto row = static_cast<std::int64_t>(t) << 33;
        job->slot[job->slots++] = {x.bytes.data(),  to[t].bytes.data(), x.count, row, blocks,
                                   element(x.type), element(to[t].type)};
        blocks += blocks_for(x.count, cuda::kBlockElements);
        std::vector<float> scaled(static_cast<std::size_t>(x.count));
        for (std::int64_t i = 0; i < x.count; ++i) {
          scaled[static_cast<std::size_t>(i)] = cpu::read(x.bytes.data(), x.type, i) * factor;
        }
        cpu::reference_kernels().multi.cast(scaled.data(), DType::f32, expected[t].bytes.data(),
                                            to[t].type, x.count, {random, job->seed, row, 0});
        if (job->slots == cuda::CopyJob::kSlots || t + 1 == from.size()) {
          for (std::int32_t block = blocks - 1; block >= 0; --block) {
            for (int thread = cuda::kThreads - 1; thread >= 0; --thread) {
              cuda::copy_thread(*job, block, thread);
            }
          }
          job->slots = 0;
          blocks = 0;
        }
      }
      for (std::size_t t = 0; t < to.size(); ++t) {
        EXPECT_EQ(to[t], expected[t]) << t;
        EXPECT_TRUE(to[t].bytes.intact());
      }
    }
  }
}

struct Parameter {
  Values w, second, gradient, m, v, largest;
  bool has_second;
  std::vector<std::uint8_t> codes[2];
  std::vector<float> scales[2];

  Parameter(std::int64_t n, DType p, bool with_second, DType s, DType g, unsigned seed)
      : w(p, n, seed),
        second(s, n, seed + 1, false, true),
        gradient(g, n, seed + 2),
        m(DType::f32, n, seed + 3),
        v(DType::f32, n, seed + 4, true),
        largest(DType::f32, n, seed + 5, true),
        has_second(with_second) {
    const std::int64_t blocks = (n + cpu::kStateBlock - 1) / cpu::kStateBlock;
    for (int k = 0; k < 2; ++k) {
      codes[k].assign(static_cast<std::size_t>(n), static_cast<std::uint8_t>(k ? 0 : 127));
      scales[k].assign(static_cast<std::size_t>(blocks), 0.0f);
    }
  }
  bool operator==(const Parameter& other) const {
    return w == other.w && second == other.second && m == other.m && v == other.v &&
           largest == other.largest && codes[0] == other.codes[0] && codes[1] == other.codes[1] &&
           scales[0] == other.scales[0] && scales[1] == other.scales[1];
  }
};

std::vector<Parameter> parameters() {
  std::vector<Parameter> all;
  const auto add = [&](std::int64_t count, DType p, bool second, DType s) {
    all.emplace_back(count, p, second, s, kTypes[all.size() % 3],
                     static_cast<unsigned>(10 * all.size()));
  };
  for (const std::int64_t count : {5, 300, 4100}) {
    add(count, DType::f32, false, DType::f32);
    add(count, DType::f32, true, DType::bf16);
    add(count, DType::f32, true, DType::f16);
    for (const DType type : {DType::bf16, DType::f16}) {
      add(count, type, false, type);
      add(count, type, true, type);
    }
  }
  return all;
}

template <class Job>
std::int32_t fill(Job& job, std::vector<Parameter>& all, std::size_t first, std::size_t count,
                  bool bytes, bool amsgrad) {
  std::int32_t blocks = 0;
  job.slots = 0;
  for (std::size_t t = first; t < first + count; ++t) {
    Parameter& p = all[t];
    cuda::StepSlot& slot = job.slot[job.slots++];
    slot.parameter = p.w.bytes.data();
    slot.parameter_type = element(p.w.type);
    slot.second = p.has_second ? p.second.bytes.data() : nullptr;
    slot.second_type = element(p.second.type);
    slot.gradient = p.gradient.bytes.data();
    slot.gradient_type = element(p.gradient.type);
    if (bytes) {
      for (int k = 0; k < 2; ++k) {
        slot.state[2 * k] = p.codes[k].data();
        slot.state[2 * k + 1] = p.scales[k].data();
      }
    } else {
      slot.state[0] = p.m.bytes.data();
      slot.state[1] = p.v.bytes.data();
      slot.state[2] = amsgrad ? p.largest.bytes.data() : nullptr;
    }
    slot.count = p.w.count;
    slot.row = static_cast<std::int64_t>(t);
    slot.step_size = 0.01f * static_cast<float>(t + 1);
    slot.root_correction = 0.3f;
    slot.first_block = blocks;
    blocks += blocks_for(slot.count, cuda::kBlockElements);
  }
  return blocks;
}

cpu::AdamwNumbers numbers() {
  cpu::AdamwNumbers n;
  n.factor = -0.25f;
  n.decay = 0.999f;
  n.beta2 = 0.999f;
  n.less_beta1 = 0.1f;
  n.less_beta2 = 0.001f;
  n.epsilon = 1e-8f;
  return n;
}

void reference_step(std::vector<Parameter>& all, bool bytes, bool amsgrad, bool random,
                    std::uint64_t seed) {
  for (std::size_t t = 0; t < all.size(); ++t) {
    Parameter& p = all[t];
    cpu::AdamwStep step;
    step.numbers = numbers();
    step.numbers.step_size = 0.01f * static_cast<float>(t + 1);
    step.numbers.root_correction = 0.3f;
    step.parameter = p.w.bytes.data();
    step.parameter_type = p.w.type;
    step.second = p.has_second ? p.second.bytes.data() : nullptr;
    step.second_type = p.second.type;
    step.gradient = p.gradient.bytes.data();
    step.gradient_type = p.gradient.type;
    if (bytes) {
      step.average_bytes = {&cpu::signed_state(), p.codes[0].data(), p.scales[0].data()};
      step.square_bytes = {&cpu::unsigned_state(), p.codes[1].data(), p.scales[1].data()};
    } else {
      step.average = reinterpret_cast<float*>(p.m.bytes.data());
      step.average_square = reinterpret_cast<float*>(p.v.bytes.data());
      if (amsgrad) step.largest = reinterpret_cast<float*>(p.largest.bytes.data());
    }
    step.count = p.w.count;
    step.dice = {random, seed, static_cast<std::int64_t>(t), 0};
    cpu::reference_kernels().multi.adamw(step);
  }
}

void gpu_step(std::vector<Parameter>& all, bool bytes, bool amsgrad, bool random,
              std::uint64_t seed) {
  if (!bytes) {
    auto job = std::make_unique<cuda::FloatStepJob>();
    job->numbers = numbers();
    job->random = random;
    job->seed = seed;
    const std::int32_t blocks = fill(*job, all, 0, all.size(), false, amsgrad);
    for (std::int32_t block = blocks - 1; block >= 0; --block) {
      for (int thread = cuda::kThreads - 1; thread >= 0; --thread) {
        cuda::step_thread(*job, block, thread);
      }
    }
    return;
  }
  cuda::StateMaps maps;
  std::copy_n(cpu::signed_state().values, 256, maps.value[0]);
  std::copy_n(cpu::unsigned_state().values, 256, maps.value[1]);
  cuda::StateTables tables;
  for (int thread = 0; thread < 256; ++thread) cuda::fill_tables(maps, tables, thread);
  auto job = std::make_unique<cuda::ByteStepJob>();
  job->numbers = numbers();
  job->random = random;
  job->seed = seed;
  for (std::size_t first = 0; first < all.size(); first += 7) {
    const std::int32_t blocks = fill(*job, all, first, 7, true, false);
    for (std::int32_t block = blocks - 1; block >= 0; --block) {
      for (int state = cuda::kStatesPerBlock - 1; state >= 0; --state) {
        EmulatedTeam team(32);
        cuda::step_states(*job, tables, block, state, team);
      }
    }
  }
}

TEST(CudaMulti, StepsHaveTheReferencesBits) {
  struct Kind {
    bool bytes, amsgrad, random;
  };
  for (const Kind kind :
       {Kind{false, false, false}, Kind{false, true, false}, Kind{false, false, true},
        Kind{true, false, false}, Kind{true, false, true}}) {
    // The copies lie at aligned addresses, what the kernels work on does not always.
    std::vector<Parameter> two = parameters(), one = two;
    for (int step = 0; step < 3; ++step) {
      reference_step(one, kind.bytes, kind.amsgrad, kind.random, 99);
      gpu_step(two, kind.bytes, kind.amsgrad, kind.random, 99);
    }
    for (std::size_t t = 0; t < one.size(); ++t) {
      EXPECT_TRUE(one[t] == two[t]) << t << " " << kind.bytes << kind.amsgrad << kind.random;
      EXPECT_TRUE(two[t].w.bytes.intact() && two[t].second.bytes.intact());
    }
  }
}

TEST(CudaMulti, StateThatIsNotFiniteSaysSo) {
  std::vector<Parameter> all;
  all.emplace_back(600, DType::f32, false, DType::f32, DType::f32, 0u);
  for (int k = 0; k < 6; ++k) all.emplace_back(1, DType::f32, false, DType::f32, DType::f32, 0u);
  cpu::write(all[0].gradient.bytes.data(), DType::f32, 0, std::nanf(""));
  cpu::write(all[0].gradient.bytes.data(), DType::f32, 599, cpu::kInf);
  std::vector<Parameter> expected = all;
  gpu_step(all, true, false, false, 0);
  reference_step(expected, true, false, false, 0);
  for (int k = 0; k < 2; ++k) {
    EXPECT_TRUE(std::isnan(all[0].scales[k][0]) && std::isnan(all[0].scales[k][2]));
    EXPECT_EQ(all[0].scales[k][1], expected[0].scales[k][1]);
    EXPECT_EQ(all[0].codes[k], expected[0].codes[k]);
  }
}

}  // namespace
}  // namespace vramkit::testing
