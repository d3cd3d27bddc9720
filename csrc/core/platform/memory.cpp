#include "core/platform/memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>

namespace vramkit {
namespace {

constexpr std::uintptr_t kLarge = std::uintptr_t{2} << 20;
constexpr std::int64_t kSmallest = 4096;

void touch(std::byte* start, std::int64_t bytes) {
#ifdef MADV_POPULATE_WRITE
  if (madvise(start, static_cast<std::size_t>(bytes), MADV_POPULATE_WRITE) == 0) return;
#endif
  for (std::int64_t at = 0; at < bytes; at += kSmallest) {
    *static_cast<volatile std::byte*>(start + at) = std::byte{0};
  }
}

}  // namespace

void* touched_pages(std::int64_t bytes) {
  // Room to cut an aligned range out of.
  const auto size = static_cast<std::size_t>(bytes);
  void* found = mmap(nullptr, size + kLarge, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  auto* base = static_cast<std::byte*>(found);
  const auto misfit = reinterpret_cast<std::uintptr_t>(base) % kLarge;
  const std::size_t before = misfit == 0 ? 0 : kLarge - misfit;
  if (before > 0) munmap(base, before);
  munmap(base + before + size, kLarge - before);
  madvise(base + before, size, MADV_HUGEPAGE);
  touch(base + before, bytes);
  return base + before;
}

void return_pages(void* start, std::int64_t bytes) {
  munmap(start, static_cast<std::size_t>(bytes));
}

void advise_large_pages(void* start, std::int64_t bytes) {
  const auto misfit = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(start) % kLarge);
  const auto large = static_cast<std::int64_t>(kLarge);
  const std::int64_t skipped = misfit == 0 ? 0 : large - misfit;
  const std::int64_t covered = (bytes - skipped) / large * large;
  if (covered <= 0) return;
  madvise(static_cast<std::byte*>(start) + skipped, static_cast<std::size_t>(covered),
          MADV_HUGEPAGE);
}

void* reserve_pages(std::int64_t bytes, std::int64_t alignment) {
  const auto size = static_cast<std::size_t>(bytes);
  const auto unit = static_cast<std::size_t>(alignment);
  void* found =
      mmap(nullptr, size + unit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  auto* base = static_cast<std::byte*>(found);
  const std::size_t misfit = reinterpret_cast<std::uintptr_t>(base) % unit;
  const std::size_t before = misfit == 0 ? 0 : unit - misfit;
  if (before > 0) munmap(base, before);
  if (unit > before) munmap(base + before + size, unit - before);
  return base + before;
}

bool commit_pages(void* start, std::int64_t bytes) {
  // Only now, so that limits on a process's data (RLIMIT_DATA) count what is used alone.
  if (mprotect(start, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE) != 0) {
    // A range of several mappings may have been changed in part.
    mprotect(start, static_cast<std::size_t>(bytes), PROT_NONE);
    return false;
  }
  advise_large_pages(start, bytes);
  return true;
}

void touch_pages(void* start, std::int64_t bytes) { touch(static_cast<std::byte*>(start), bytes); }

void decommit_pages(void* start, std::int64_t bytes) {
  // A new mapping in its place both frees the memory and forbids access, in one step.
  const auto size = static_cast<std::size_t>(bytes);
  if (mmap(start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
           0) == MAP_FAILED) {
    madvise(start, size, MADV_DONTNEED);  // out of mappings: at least the memory goes
    mprotect(start, size, PROT_NONE);
  }
}

bool map_private(const Descriptor& file, std::int64_t offset, std::int64_t bytes, void* at) {
  // MAP_NORESERVE: models that are larger than memory are mapped too.
  return mmap(at, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, file.get(),
              static_cast<::off_t>(offset)) != MAP_FAILED;
}

std::optional<bool> pages_written(const void* start, std::int64_t bytes) {
#if defined(__linux__)
  // An entry of 64 bits for each page, whose flags every process may read of itself.
  constexpr std::uint64_t kPresent = std::uint64_t{1} << 63;
  constexpr std::uint64_t kSwapped = std::uint64_t{1} << 62;
  constexpr std::uint64_t kOfFile = std::uint64_t{1} << 61;
  const std::int64_t page = ::sysconf(_SC_PAGESIZE);
  const Descriptor map(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!map || page <= 0) return std::nullopt;
  const auto first = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(start)) / page;
  const auto last =
      (static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(start)) + bytes - 1) / page;
  std::array<std::uint64_t, 4096> entries{};
  for (std::int64_t at = first; at <= last;) {
    const std::int64_t want =
        std::min(last + 1 - at, static_cast<std::int64_t>(entries.size())) * 8;
    const ::ssize_t got = ::pread(map.get(), entries.data(), static_cast<std::size_t>(want),
                                  static_cast<::off_t>(at * 8));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0 || got % 8 != 0) return std::nullopt;
    const auto end = entries.begin() + got / 8;
    const bool own = std::any_of(entries.begin(), end, [](std::uint64_t entry) {
      return (entry & kOfFile) == 0 && (entry & (kPresent | kSwapped)) != 0;
    });
    if (own) return true;
    at += got / 8;
  }
  return false;
#else
  (void)start, (void)bytes;
  return std::nullopt;
#endif
}

}  // namespace vramkit
