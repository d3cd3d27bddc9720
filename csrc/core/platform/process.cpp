// See process.hpp.
#include "core/platform/process.hpp"

#include <pthread.h>
#include <unistd.h>

namespace vramkit {

std::int64_t current_process() { return ::getpid(); }

void name_this_thread(const char* name) noexcept {
  // It fails for a name that is too long alone, and a thread without a name does its work as well.
  static_cast<void>(::pthread_setname_np(::pthread_self(), name));
}

}  // namespace vramkit
