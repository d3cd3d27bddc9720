// Encoding with stochastic rounding (core/stochastic.hpp): one unit for all instruction sets.
#pragma once
#include "cpu/kernels.hpp"

namespace vramkit::cpu {

// Whether stochastic rounding is defined for a format: casts, 8-bit floats, 8-bit integers.
bool rounds_stochastically(const Format& format);

// As Kernels::quantize. Scales are those of absmax, also where the format's encoder would search:
// what a narrower one cuts off would be an error of one sign.
void quantize_stochastic(const Format& format, const Layout& at, const void* x, DType type,
                         std::int64_t stride, Parts out, std::uint64_t seed, std::int64_t begin,
                         std::int64_t end);

}  // namespace vramkit::cpu
