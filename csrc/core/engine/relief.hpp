// An engine that follows the memory that others leave on its device.
#pragma once
#include <cstdint>

#include "core/engine/engine.hpp"
#include "core/engine/pressure.hpp"

namespace vramkit {

// Looks at what is free on the engine's device and moves the engine's limit as the gauge says:
// down at once, up again to at most `most`. Returns by how many bytes it moved. Asking a device
// costs it some time, so the caller says how often. Throws InvalidArgument if nobody counts the
// device's memory, else what give_up() and resize() throw.
std::int64_t relieve(Engine& engine, PressureGauge& gauge, std::int64_t most);

}  // namespace vramkit
