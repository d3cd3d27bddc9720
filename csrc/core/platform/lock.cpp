// See lock.hpp.
#include "core/platform/lock.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <cerrno>
#include <system_error>

#include "core/error.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

[[noreturn]] void fail(const std::string& path, const char* doing, int code) {
  throw SystemError(
      code, printable(path) + ": " + doing + " failed: " + std::generic_category().message(code));
}

}  // namespace

Descriptor open_lock_file(const std::string& path) {
  int fd = -1;
  do {
    fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0 && errno != ENOENT) fail(path, "opening the lock file", errno);
  return Descriptor(fd);
}

bool try_to_lock(const Descriptor& file, LockKind kind, const std::string& path) {
  const int operation = (kind == LockKind::shared ? LOCK_SH : LOCK_EX) | LOCK_NB;
  while (::flock(file.get(), operation) != 0) {
    if (errno == EWOULDBLOCK) return false;
    if (errno != EINTR) fail(path, "locking", errno);
  }
  return true;
}

bool names(const std::string& path, const Descriptor& file) {
  struct stat there {};
  struct stat here {};
  return ::stat(path.c_str(), &there) == 0 && ::fstat(file.get(), &here) == 0 &&
         there.st_dev == here.st_dev && there.st_ino == here.st_ino;
}

}  // namespace vramkit
