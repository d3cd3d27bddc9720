// What all units of multi.hpp share and make once: the tables of 8-bit optimizer state.
#include "cpu/multi.hpp"

#include <algorithm>
#include <bit>

#include "core/error.hpp"
#include "core/format.hpp"

namespace vramkit::cpu {

double total_of(const double* sums, std::int64_t count) {
  double lanes[kTotalLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i % kTotalLanes] += sums[i];
  double total = 0.0;
  for (const double lane : lanes) total += lane;
  return total;
}

StateTable::StateTable(const float* map) {
  std::copy_n(map, 256, values);
  for (int k = 0; k < 255; ++k) bounds[k] = (values[k] + values[k + 1]) / 2.0f;
  const auto code_of = [&](std::uint32_t bits) {
    const auto* end = std::lower_bound(bounds, bounds + 255, std::bit_cast<float>(bits));
    return static_cast<std::uint32_t>(end - bounds);
  };
  for (std::uint32_t sign = 0; sign < 2; ++sign) {
    for (std::uint32_t cell = 0; cell < kCells; ++cell) {
      const std::uint32_t first = (cell + kFirst) << kLowBits | sign << 31;
      const std::uint32_t last = cell + 1 < kCells ? first | kLowMask : first;
      const std::uint32_t code = code_of(cell ? first : sign << 31), end = code_of(last);
      const bool changes = code != end;
      if (changes && (cell == 0 || (sign ? code - end : end - code) != 1)) {
        throw InvalidArgument("a codebook of optimizer state is too dense for its table");
      }
      std::uint32_t same = 0, other = kLowMask + 1;  // low bits that have the code, that have not
      while (changes && other - same > 1) {
        const std::uint32_t middle = (same + other) / 2;
        (code_of(first | middle) == code ? same : other) = middle;
      }
      cells[sign * kCells + cell] = code << 24 | (changes ? same : kLowMask);
    }
  }
}

const StateTable& signed_state() {
  static const StateTable table(dynamic_map().data());
  return table;
}

const StateTable& unsigned_state() {
  static const StateTable table(unsigned_dynamic_map().data());
  return table;
}

}  // namespace vramkit::cpu
