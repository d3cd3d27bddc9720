// The process itself.
#pragma once
#include <cstdint>

namespace vramkit {

// Tells a process from the one that it was forked from, which has none of its threads.
std::int64_t current_process();

// Names the calling thread for the system's tools (`top -H`, debuggers): at most 15 characters.
void name_this_thread(const char* name) noexcept;

}  // namespace vramkit
