// The process itself.
#pragma once
#include <cstdint>

namespace vramkit {

// Tells a process from the one that it was forked from, which has none of its threads.
std::int64_t current_process();

}  // namespace vramkit
