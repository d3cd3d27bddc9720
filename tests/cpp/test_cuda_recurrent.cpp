// The bodies of the CUDA kernels of recurrent layers (csrc/cuda/recurrent.hpp) over an emulated
// grid: some steps of every recurrence, bit for bit as the CPU's vector units.
#include <algorithm>

#include "cuda/recurrent.hpp"
#include "int8_grid.hpp"

namespace vramkit::testing {
namespace {

using cpu::Recurrence;

template <Recurrence kind, int NT>
void emulate_step(const gpu::StepJob& job) {
  constexpr int gates = cpu::gates_of(kind);
  for (std::int64_t block = gpu::step_blocks<NT>(job.from.rows, job.step.units) - 1; block >= 0;
       --block) {
    const auto shared = std::make_unique<gpu::SharedSums<gates, NT>>();
    std::memset(shared.get(), 0xa5, sizeof(*shared));
    const gpu::Tile tile = gpu::step_tile<NT>(job, block);
    if (gpu::whole(job.from)) {
      emulate_tile<true, true>(job.from, tile, *shared);
    } else {
      emulate_tile<false, true>(job.from, tile, *shared);
    }
    for (int thread = kThreads - 1; thread >= 0; --thread) {
      gpu::finish_step<kind, gates, NT>(job, tile, *shared, thread);
    }
  }
}

void emulate_step(const gpu::StepJob& job) {
  const auto run = [&]<Recurrence kind>() {
    return job.from.rows <= 8 ? emulate_step<kind, 1>(job) : emulate_step<kind, 2>(job);
  };
  switch (job.step.kind) {
    case Recurrence::lstm:
      return run.template operator()<Recurrence::lstm>();
    case Recurrence::gru:
      return run.template operator()<Recurrence::gru>();
    case Recurrence::rnn_tanh:
      return run.template operator()<Recurrence::rnn_tanh>();
    case Recurrence::rnn_relu:
      return run.template operator()<Recurrence::rnn_relu>();
  }
}

// What a layer has between two steps, and where its outputs go.
struct Layer {
  std::vector<float> state, cell, out;
};

struct Case {
  Recurrence kind;
  std::int64_t rows, units;
  float threshold;
  bool odd;
};

constexpr int kSteps = 4;

void check(const Case& c, std::mt19937& random) {
  const std::int64_t gates = cpu::gates_of(c.kind), width = gates * c.units;
  const Int8Stored weight(width, c.units, c.odd, random);
  std::normal_distribution<float> normal;
  const auto made = [&](std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& v : values) v = normal(random);
    return values;
  };
  std::vector<float> from_x = made(kSteps * c.rows * (width + 1));
  if (c.rows > 4) from_x[static_cast<std::size_t>(4 * (width + 1))] = std::nanf("");
  const std::int64_t out_stride = c.units + 2;
  const Layer first{made(c.rows * c.units), made(c.rows * c.units),
                    std::vector<float>(static_cast<std::size_t>(kSteps * c.rows * out_stride))};
  cpu::RecurrentStep step{};
  step.kind = c.kind;
  step.units = step.before_stride = step.after_stride = c.units;
  step.x_stride = width + 1;
  step.out_stride = out_stride;
  const auto at = [&](Layer& layer, int t) {
    cpu::RecurrentStep now = step;
    now.from_x = from_x.data() + t * c.rows * (width + 1);
    now.before = now.after = layer.state.data();
    now.cell = layer.cell.data();
    now.out = layer.out.data() + t * c.rows * out_stride;
    return now;
  };

  Layer mine = first;
  for (int t = 0; t < kSteps; ++t) {
    GpuRows rounded(c.rows, c.units, (c.units + 15) / 16 * 16);
    rounded.run(mine.state.data(), Element::f32, c.units, c.threshold, true);
    const std::vector<float> copy = mine.state;
    gpu::StepJob job;
    job.from = {reinterpret_cast<const std::int8_t*>(rounded.codes.data()),
                c.rows,
                rounded.stride,
                rounded.stride,
                weight.codes,
                width,
                c.units,
                c.units};
    job.h.absmax = rounded.absmax.data();
    job.h.scales = weight.scale_bytes();
    job.h.bias = weight.bias.data();
    job.h.values = copy.data();
    job.h.values_stride = job.h.weight_stride = c.units;
    job.h.weight = weight.codes;
    job.h.outliers = c.threshold > 0.0f ? rounded.list.data() : nullptr;
    job.h.outlier_count = c.threshold > 0.0f ? &rounded.count : nullptr;
    job.step = at(mine, t);
    emulate_step(job);
  }
  for (const cpu::Kernels* unit : vector_units()) {
    Layer theirs = first;
    for (int t = 0; t < kSteps; ++t) {
      const CpuRows rounded(*unit, theirs.state.data(), cpu::DType::f32, c.rows, c.units, c.units,
                            c.threshold);
      std::vector<float> from_h(static_cast<std::size_t>(c.rows * width));
      cpu::Int8Product product = rounded.job();
      product.weight = weight.codes;
      product.weight_stride = c.units;
      product.weight_scales = weight.scale_bytes();
      product.bias = weight.bias.data();
      product.values = theirs.state.data();
      product.values_stride = c.units;
      product.type = cpu::DType::f32;
      product.out = from_h.data();
      product.out_stride = width;
      unit->int8.product(product, 0, c.rows, 0, width);
      cpu::RecurrentStep now = at(theirs, t);
      now.from_h = from_h.data();
      now.h_stride = width;
      unit->recur(now, c.rows, 0, c.units);
    }
    const auto equal = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::equal(a.begin(), a.end(), b.begin(), b.end(), same);
    };
    const std::string what = std::string(unit->name) + " kind " +
                             std::to_string(static_cast<int>(c.kind)) + ", " +
                             std::to_string(c.rows) + " x " + std::to_string(c.units);
    EXPECT_TRUE(equal(mine.state, theirs.state)) << what;
    EXPECT_TRUE(equal(mine.out, theirs.out)) << what;
    if (c.kind == Recurrence::lstm) {
      EXPECT_TRUE(equal(mine.cell, theirs.cell)) << what;
    }
  }
}

TEST(CudaRecurrent, StepsHaveTheVectorUnitsBits) {
  if (vector_units().empty()) GTEST_SKIP() << "this processor has no vector unit of ours";
  std::mt19937 random(6);
  for (int mode = 0; mode < 4; ++mode) {
    for (const auto& [rows, units] :
         {std::pair{1, 1}, {1, 32}, {3, 17}, {8, 16}, {9, 33}, {20, 100}, {2, 300}}) {
      for (const float threshold : {0.0f, 0.7f}) {
        check({static_cast<Recurrence>(mode), rows, units, threshold, units % 2 == 1}, random);
      }
    }
  }
}

}  // namespace
}  // namespace vramkit::testing
