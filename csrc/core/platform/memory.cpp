#include "core/platform/memory.hpp"

#include <sys/mman.h>

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

}  // namespace vramkit
