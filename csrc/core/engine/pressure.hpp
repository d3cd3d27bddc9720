// When to give memory up and when to take it back. Pure logic over observations of how many bytes
// are free, so that what decides is tested apart from what moves.
//
// Below `low` bytes free, enough is given up to have the middle of the band free. Only when more
// than `high` has been free in `patience` observations in a row is what exceeds it taken again:
// what was just given up cannot come straight back, and what is taken leaves `high` free.
#pragma once
#include <algorithm>
#include <cstdint>

namespace vramkit {

struct PressureBand {
  std::int64_t low = 0;
  std::int64_t high = 0;
  std::int64_t patience = 3;
};

class PressureGauge {
 public:
  explicit PressureGauge(PressureBand band) : band_(band) {}

  // Bytes to change by: negative, give up so many; positive, up to so many may be taken.
  std::int64_t observe(std::int64_t free) {
    if (free < band_.low) {
      calm_ = 0;
      return free - (band_.low + (band_.high - band_.low) / 2);
    }
    if (free <= band_.high) {
      calm_ = 0;
      return 0;
    }
    spare_ = calm_ == 0 ? free - band_.high : std::min(spare_, free - band_.high);
    if (++calm_ < band_.patience) return 0;
    calm_ = 0;
    return spare_;
  }

  const PressureBand& band() const { return band_; }

 private:
  PressureBand band_;
  std::int64_t calm_ = 0;   // observations in a row with more than `high` free
  std::int64_t spare_ = 0;  // the least that any of them had beyond it
};

}  // namespace vramkit
