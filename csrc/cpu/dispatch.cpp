// Chooses the instruction-set unit at run time.
#include <cstdlib>
#include <string>

#include "core/error.hpp"
#include "cpu/kernels.hpp"

namespace vramkit::cpu {
namespace {

#if defined(__x86_64__)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512bf16");
}
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
#endif

const Kernels& choose() {
  const auto available = available_kernels();
  const char* forced = std::getenv("VRAMKIT_ISA");
  if (!forced || !*forced) return *available.back();
  std::string names;
  for (const Kernels* kernels : available) {
    if (std::string(forced) == kernels->name) return *kernels;
    names += names.empty() ? "" : ", ";
    names += kernels->name;
  }
  throw InvalidArgument("VRAMKIT_ISA=" + std::string(forced) +
                        " is not to be had here; this build and processor have: " + names);
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> all{&reference_kernels()};
  if (avx2_kernels() && runs_avx2()) all.push_back(avx2_kernels());
  if (avx512_kernels() && runs_avx512()) all.push_back(avx512_kernels());
  return all;
}

const Kernels& active_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace vramkit::cpu
