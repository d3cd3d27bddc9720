// See relief.hpp.
#include "core/engine/relief.hpp"

#include <algorithm>
#include <optional>
#include <string>

#include "core/error.hpp"

namespace vramkit {

std::int64_t relieve(Engine& engine, PressureGauge& gauge, std::int64_t most) {
  const std::optional<DeviceMemoryInfo> memory = engine.backend().memory_info();
  if (!memory) {
    throw InvalidArgument(std::string("the backend '") + engine.backend().name() +
                          "' does not count its device's memory: say how much is free by "
                          "give_up() and resize()");
  }
  const std::int64_t by = gauge.observe(memory->free);
  const std::int64_t before = engine.stats().limit;
  if (by < 0) engine.give_up(-by);
  if (by > 0 && before < most) engine.resize(std::min(before + by, most));
  return engine.stats().limit - before;
}

}  // namespace vramkit
