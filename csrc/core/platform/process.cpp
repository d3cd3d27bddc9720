// See process.hpp.
#include "core/platform/process.hpp"

#include <unistd.h>

namespace vramkit {

std::int64_t current_process() { return ::getpid(); }

}  // namespace vramkit
