// POSIX files, with Linux' page-cache and preallocation calls where they exist. See file.hpp.
#include "core/platform/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <system_error>

#include "core/error.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

// One system call moves at most this much. Linux stops short of 2 GiB anyway; smaller pieces keep
// each call brief enough that signals and other threads get their turn.
constexpr std::int64_t kLargestCall = std::int64_t{64} << 20;

// std::strerror shares one buffer between threads; this does not.
std::string reason(int code) { return std::generic_category().message(code); }

}  // namespace

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void Descriptor::reset() noexcept {
  // close() is not repeated after EINTR: on Linux the descriptor is gone by then, and a second
  // call could close one that another thread has just opened.
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

Descriptor open_regular_file(const std::string& path) {
  int fd = -1;
  do {
    // O_NONBLOCK: opening a pipe must not wait for a writer. It changes nothing for regular files.
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    const int code = errno;
    throw SystemError(code, printable(path) + ": cannot be opened for reading: " + reason(code));
  }
  Descriptor file(fd);
  struct stat state {};
  if (::fstat(fd, &state) != 0) {
    const int code = errno;
    throw SystemError(code, printable(path) + ": its size cannot be read: " + reason(code));
  }
  if (!S_ISREG(state.st_mode)) {
    throw CheckpointError(printable(path) + ": is " +
                          (S_ISDIR(state.st_mode) ? "a folder" : "not a regular file") +
                          "; expected a safetensors file");
  }
  return file;
}

Descriptor open_unnamed_file(const std::string& folder) {
  int fd = -1;
  int code = 0;
#if defined(O_TMPFILE)
  do {
    fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    code = fd < 0 ? errno : 0;
  } while (code == EINTR);
  // What systems and file systems without such files answer.
  const bool unknown = code == EOPNOTSUPP || code == EISDIR || code == EINVAL;
#else
  const bool unknown = true;
#endif
  if (fd < 0 && unknown) {
    std::string path = folder + "/vramkit-XXXXXX";
    fd = ::mkstemp(path.data());
    code = fd < 0 ? errno : 0;
    if (fd >= 0) {
      ::unlink(path.c_str());
      ::fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
  }
  if (fd < 0) {
    throw SystemError(code, printable(folder) + ": no file can be made in it: " + reason(code));
  }
  return Descriptor(fd);
}

std::int64_t file_bytes(const Descriptor& file, const std::string& path) {
  struct stat state {};
  if (::fstat(file.get(), &state) != 0) {
    const int code = errno;
    throw SystemError(code, printable(path) + ": its size cannot be read: " + reason(code));
  }
  return static_cast<std::int64_t>(state.st_size);
}

std::int64_t read_at(const Descriptor& file, void* dst, std::int64_t bytes, std::int64_t offset,
                     const std::string& path) {
  auto* out = static_cast<char*>(dst);
  std::int64_t done = 0;
  while (done < bytes) {
    const std::int64_t want = std::min(bytes - done, kLargestCall);
    const ::ssize_t got = ::pread(file.get(), out + done, static_cast<std::size_t>(want),
                                  static_cast<::off_t>(offset + done));
    if (got < 0) {
      const int code = errno;
      if (code == EINTR) continue;
      throw SystemError(code, printable(path) + ": reading " + std::to_string(want) +
                                  " bytes at offset " + std::to_string(offset + done) +
                                  " failed: " + reason(code));
    }
    if (got == 0) break;
    done += got;
  }
  return done;
}

void drop_page_cache(const Descriptor& file, std::int64_t offset, std::int64_t bytes) noexcept {
#if defined(POSIX_FADV_DONTNEED)
  if (bytes <= 0) return;
  // Linux caches a file in runs of pages, each aligned to its size of up to 2 MiB, and drops a run
  // only if all of it is in the range. The run around `offset` was read by whoever reads in
  // sequence, so the range starts below it: otherwise every read would leave one behind.
  constexpr std::int64_t kLargestRun = std::int64_t{2} << 20;
  const std::int64_t begin = offset / kLargestRun * kLargestRun;
  (void)::posix_fadvise(file.get(), static_cast<::off_t>(begin),
                        static_cast<::off_t>(offset - begin + bytes), POSIX_FADV_DONTNEED);
#else
  (void)file, (void)offset, (void)bytes;
#endif
}

ReplacementFile::ReplacementFile(std::string path, std::int64_t bytes)
    : path_(std::move(path)), bytes_(bytes), owner_(::getpid()) {
  const std::size_t slash = path_.rfind('/');
  name_ = slash == std::string::npos ? path_ : path_.substr(slash + 1);
  if (name_.empty() || name_ == "." || name_ == "..") {
    throw InvalidArgument("'" + printable(path_) + "' does not name a file to write");
  }
  const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
  int fd = -1;
  do {
    fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) fail("opening its folder", errno);
  folder_ = Descriptor(fd);

  // rename() would refuse a folder at the very end, when all the work is done.
  struct stat state {};
  if (::fstatat(fd, name_.c_str(), &state, AT_SYMLINK_NOFOLLOW) == 0) {
    if (S_ISDIR(state.st_mode)) fail("replacing it", EISDIR);
  } else if (errno != ENOENT) {
    fail("looking it up", errno);
  }

  create_temporary();
  try {
    reserve();
  } catch (...) {
    discard();  // a constructor that throws runs no destructor
    throw;
  }
}

void ReplacementFile::create_temporary() {
  std::random_device random;
  for (int attempt = 0; attempt < 16; ++attempt) {
    // Not made from the target's name, which may be as long as a name can be.
    char name[64];
    std::snprintf(name, sizeof name, ".vramkit-%lld-%08x%08x.tmp", static_cast<long long>(owner_),
                  static_cast<unsigned>(random()), static_cast<unsigned>(random()));
    const int fd = ::openat(folder_.get(), name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd >= 0) {
      file_ = Descriptor(fd);
      temporary_ = name;
      return;
    }
    if (errno != EEXIST && errno != EINTR) fail("creating a temporary file beside it", errno);
  }
  fail("creating a temporary file beside it", EEXIST);
}

void ReplacementFile::reserve() {
#if defined(__linux__)
  // fallocate, not posix_fallocate: where a file system has no preallocation, the C library's
  // version writes to every block instead, which doubles the work.
  const auto allocate = [&](std::int64_t bytes) {
    int code = 0;
    do {
      code = ::fallocate(file_.get(), 0, 0, static_cast<::off_t>(bytes)) == 0 ? 0 : errno;
    } while (code == EINTR);
    return code;
  };
  if (bytes_ == 0) return;
  int code = allocate(std::min<std::int64_t>(bytes_, 4096));
  if (code == EOPNOTSUPP || code == EINVAL || code == ENOSYS) return;
  struct statvfs space {};
  if (code == 0 && ::fstatvfs(file_.get(), &space) == 0 && space.f_blocks > 0 &&
      space.f_frsize > 0 && static_cast<std::uint64_t>(bytes_) / space.f_frsize > space.f_bfree) {
    // Asking for more than there is would take all of it until the refusal, and fail the writes
    // of every other program meanwhile.
    code = ENOSPC;
  }
  if (code == 0) code = allocate(bytes_);
  if (code == 0) return;
  fail("reserving disk space", code);
#endif
}

void ReplacementFile::write_at(const void* src, std::int64_t bytes, std::int64_t offset) {
  const auto* in = static_cast<const char*>(src);
  std::int64_t done = 0;
  while (done < bytes) {
    const std::int64_t want = std::min(bytes - done, kLargestCall);
    const ::ssize_t put = ::pwrite(file_.get(), in + done, static_cast<std::size_t>(want),
                                   static_cast<::off_t>(offset + done));
    if (put < 0) {
      if (errno == EINTR) continue;
      fail("writing at offset " + std::to_string(offset + done), errno);
    }
    if (put == 0) fail("writing at offset " + std::to_string(offset + done), EIO);
    done += put;
  }
}

void ReplacementFile::commit() {
  int code = 0;
  do {
    code = ::fsync(file_.get()) == 0 ? 0 : errno;
  } while (code == EINTR);
  if (code != 0) fail("flushing it to the disk", code);
  // Network file systems report a full disk or a spent quota as late as here.
  if (::close(file_.release()) != 0 && errno != EINTR) code = errno;
  if (code != 0) fail("closing it", code);
  if (::renameat(folder_.get(), temporary_.c_str(), folder_.get(), name_.c_str()) != 0) {
    fail("renaming the temporary file to it", errno);
  }
  temporary_.clear();
  do {
    code = ::fsync(folder_.get()) == 0 ? 0 : errno;
  } while (code == EINTR);
  // Some file systems cannot flush a folder and say so; the rename itself has happened.
  if (code != 0 && code != EINVAL && code != EOPNOTSUPP) fail("flushing its folder", code);
}

void ReplacementFile::discard() noexcept {
  file_.reset();
  if (!temporary_.empty() && owner_ == ::getpid()) {
    ::unlinkat(folder_.get(), temporary_.c_str(), 0);
  }
  temporary_.clear();
}

void ReplacementFile::fail(const std::string& doing, int code) const {
  std::string text = printable(path_) + ": " + doing + " failed: " + reason(code) + " (" +
                     std::to_string(bytes_) + " bytes are needed";
  struct statvfs space {};
  if ((code == ENOSPC || code == EDQUOT) && folder_ && ::fstatvfs(folder_.get(), &space) == 0) {
    text += ", " + std::to_string(std::uint64_t{space.f_bavail} * space.f_frsize) + " are free";
  }
  text += ")";
  switch (code) {
    case ENOSPC:
      text += "; free some space or choose another disk";
      break;
    case EDQUOT:
      text += "; the quota is spent: free some space or choose another disk";
      break;
    case EFBIG:
      text += "; the file system or a limit of the process (ulimit -f) forbids files this large";
      break;
    case EACCES:
    case EPERM:
    case EROFS:
      text += "; choose a folder that this user may write to";
      break;
    default:
      break;
  }
  throw SystemError(code, text);
}

}  // namespace vramkit
