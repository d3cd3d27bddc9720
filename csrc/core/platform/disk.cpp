// See disk.hpp.
#include "core/platform/disk.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

#include "core/error.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

constexpr std::int64_t kPage = 4096;

#if defined(__linux__)
// mincore() answers truly to those who may write the file; to others it says that all is cached.
bool told_the_truth(const Descriptor& file) {
  struct stat state {};
  if (::geteuid() == 0) return true;
  if (::fstat(file.get(), &state) == 0 && state.st_uid == ::geteuid()) return true;
  return ::faccessat(file.get(), "", W_OK, AT_EMPTY_PATH | AT_EACCESS) == 0;
}

std::int64_t mapped_pages(const Descriptor& file, std::int64_t begin, std::int64_t end) {
  const auto size = static_cast<std::size_t>(end - begin);
  // Never touched: a mapping is how mincore() is asked about a file.
  void* map = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.get(), begin);
  if (map == MAP_FAILED) return -1;
  std::array<unsigned char, 2048> pages{};
  std::int64_t found = 0;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t part = std::min(end - at, static_cast<std::int64_t>(pages.size()) * kPage);
    if (::mincore(static_cast<char*>(map) + (at - begin), static_cast<std::size_t>(part),
                  pages.data()) != 0) {
      found = -1;
      break;
    }
    const auto count = static_cast<std::size_t>((part + kPage - 1) / kPage);
    found += std::count_if(pages.begin(), pages.begin() + static_cast<std::ptrdiff_t>(count),
                           [](unsigned char page) { return (page & 1) != 0; }) *
             kPage;
    at += part;
  }
  ::munmap(map, size);
  return found;
}

// A few bytes, read only if that needs no disk.
std::int64_t sampled(const Descriptor& file, std::int64_t begin, std::int64_t end) {
#if defined(RWF_NOWAIT)
  constexpr int kSamples = 4;
  std::int64_t found = 0;
  for (int sample = 0; sample < kSamples; ++sample) {
    char byte = 0;
    ::iovec target{&byte, 1};
    const std::int64_t at = begin + (end - begin - 1) * sample / (kSamples - 1);
    const ::ssize_t got = ::preadv2(file.get(), &target, 1, at, RWF_NOWAIT);
    if (got < 0 && errno != EAGAIN) return -1;
    found += got == 1 ? 1 : 0;
  }
  return (end - begin) * found / kSamples;
#else
  (void)file, (void)begin, (void)end;
  return -1;
#endif
}
#endif

}  // namespace

Descriptor DiskCalls::reopen_direct(const Descriptor& file) const {
#if defined(__linux__) && defined(O_DIRECT)
  // Through /proc, so that it is this file even if its name means another by now.
  const std::string same = "/proc/self/fd/" + std::to_string(file.get());
  int fd = -1;
  do {
    fd = ::open(same.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  } while (fd < 0 && errno == EINTR);
  return Descriptor(fd);
#else
  (void)file;
  return Descriptor();
#endif
}

std::int64_t DiskCalls::read(const Descriptor& file, void* dst, std::int64_t bytes,
                             std::int64_t offset) const {
  const ::ssize_t got =
      ::pread(file.get(), dst, static_cast<std::size_t>(bytes), static_cast<::off_t>(offset));
  return got < 0 ? -static_cast<std::int64_t>(errno) : static_cast<std::int64_t>(got);
}

FileIdentity DiskCalls::identify(const Descriptor& file, const std::string& path) const {
  struct stat state {};
  if (::fstat(file.get(), &state) != 0) {
    const int code = errno;
    throw SystemError(code, printable(path) + ": its state cannot be read: " +
                                std::generic_category().message(code));
  }
  FileIdentity identity;
  identity.device = static_cast<std::uint64_t>(state.st_dev);
  identity.inode = static_cast<std::uint64_t>(state.st_ino);
  identity.bytes = static_cast<std::int64_t>(state.st_size);
#if defined(__linux__)
  const auto& modified = state.st_mtim;
#else
  const auto& modified = state.st_mtimespec;
#endif
  identity.modified_ns = std::int64_t{modified.tv_sec} * 1'000'000'000 + modified.tv_nsec;
  return identity;
}

std::int64_t DiskCalls::cached(const Descriptor& file, std::int64_t offset,
                               std::int64_t bytes) const {
#if defined(__linux__)
  if (bytes <= 0) return 0;
  const std::int64_t begin = offset / kPage * kPage;
  const std::int64_t end = offset + bytes;
  const std::int64_t found =
      told_the_truth(file) ? mapped_pages(file, begin, end) : sampled(file, begin, end);
  return std::min(found, bytes);
#else
  (void)file, (void)offset, (void)bytes;
  return -1;
#endif
}

void DiskCalls::will_need(const Descriptor& file, std::int64_t offset, std::int64_t bytes) const {
#if defined(POSIX_FADV_WILLNEED)
  (void)::posix_fadvise(file.get(), static_cast<::off_t>(offset), static_cast<::off_t>(bytes),
                        POSIX_FADV_WILLNEED);
#else
  (void)file, (void)offset, (void)bytes;
#endif
}

}  // namespace vramkit
