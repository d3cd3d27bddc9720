// What this machine can do, measured by native loops: the limits that benchmarks print beside their
// figures.
#include <atomic>
#include <chrono>
#include <functional>

#include "cpu/int8.hpp"
#include "ops/schema.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {
namespace {

namespace ts = torch::stable;

constexpr std::int64_t kReadPerTask = std::int64_t{1} << 20;
constexpr std::int64_t kPrefetchAhead = 2048;  // bytes

// Best of a few: whatever else runs can only make it slower.
double best_rate(const std::function<std::int64_t()>& work) {
  double best = 0.0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    const std::int64_t done = work();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(done) / took.count());
  }
  return best;
}

double product_rate(const Tensor& operand) {
  const cpu::Kernels& kernels = cpu::active_kernels();
  const bool bytes = operand.scalar_type() == ScalarType::Char;
  const cpu::DType type = bytes ? cpu::DType::f32 : dtype_of(operand);
  constexpr std::int64_t rounds = std::int64_t{1} << 20;
  return best_rate([&] {
    std::atomic<std::int64_t> products{0};
    ts::parallel_for(0, operand.size(0), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        products += bytes ? kernels.int8.spin(rounds) : kernels.spin(type, rounds);
      }
    });
    return products.load();
  });
}

double read_rate(const Tensor& buffer) {
  STD_TORCH_CHECK(buffer.is_contiguous() && buffer.scalar_type() == ScalarType::Long,
                  "vramkit: the buffer to read must be contiguous int64");
  const auto* words = static_cast<const std::uint64_t*>(buffer.data_ptr());
  const std::int64_t lines = buffer.numel() / 8;
  std::atomic<std::uint64_t> sink{0};
  return best_rate([&] {
    ts::parallel_for(0, lines, kReadPerTask / 64, [&](std::int64_t begin, std::int64_t end) {
      std::uint64_t sums[8] = {};
      for (std::int64_t line = begin; line < end; ++line) {
        const std::uint64_t* at = words + line * 8;
        __builtin_prefetch(at + kPrefetchAhead / 8);
        for (int i = 0; i < 8; ++i) sums[i] += at[i];
      }
      for (const std::uint64_t sum : sums) sink += sum;
    });
    return lines * 64;
  });
}

}  // namespace
}  // namespace vramkit::ops

STABLE_TORCH_LIBRARY_IMPL(vramkit, CPU, m) {
  m.impl("_product_rate", TORCH_BOX(&vramkit::ops::product_rate));
  m.impl("_read_rate", TORCH_BOX(&vramkit::ops::read_rate));
}
