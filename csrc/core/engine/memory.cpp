// See memory.hpp.
#include "core/engine/memory.hpp"

#include <bit>
#include <string>

#include "core/error.hpp"
#include "core/platform/memory.hpp"

namespace vramkit {
namespace {

constexpr std::int64_t kPage = 4096;

[[noreturn]] void refuse(const char* what, std::int64_t bytes) {
  throw OutOfMemoryError(
      "the system has no " + std::string(what) + " for " + std::to_string(bytes) + " bytes", bytes);
}

}  // namespace

HostMemory::HostMemory(std::int64_t granularity) : granularity_(granularity) {
  if (granularity < kPage || !std::has_single_bit(static_cast<std::uint64_t>(granularity))) {
    throw InvalidArgument("a granularity is a power of two of at least " + std::to_string(kPage) +
                          " bytes, not " + std::to_string(granularity));
  }
}

std::byte* HostMemory::reserve(std::int64_t bytes) {
  void* start = reserve_pages(bytes, granularity_);
  if (start == nullptr) refuse("addresses", bytes);
  return static_cast<std::byte*>(start);
}

void HostMemory::unreserve(std::byte* start, std::int64_t bytes) noexcept {
  return_pages(start, bytes);
}

void HostMemory::commit(std::byte* start, std::int64_t bytes) {
  if (!commit_pages(start, bytes)) refuse("memory", bytes);
}

void HostMemory::decommit(std::byte* start, std::int64_t bytes) noexcept {
  decommit_pages(start, bytes);
}

LimitedMemory::LimitedMemory(Memory& below, std::int64_t limit)
    : MemoryAdaptor(below), limit_(limit) {
  if (limit < 0) throw InvalidArgument("a limit is 0 bytes or more, not " + std::to_string(limit));
}

void LimitedMemory::commit(std::byte* start, std::int64_t bytes) {
  const std::int64_t wanted = committed_.fetch_add(bytes) + bytes;
  if (wanted > limit_) {
    committed_ -= bytes;
    throw BudgetError("the limit of " + std::to_string(limit_) + " bytes has no room for " +
                          std::to_string(bytes) + " more than the " +
                          std::to_string(wanted - bytes) + " in use",
                      wanted);
  }
  try {
    MemoryAdaptor::commit(start, bytes);
  } catch (...) {
    committed_ -= bytes;
    throw;
  }
}

void LimitedMemory::decommit(std::byte* start, std::int64_t bytes) noexcept {
  MemoryAdaptor::decommit(start, bytes);
  committed_ -= bytes;
}

std::byte* CountedMemory::reserve(std::int64_t bytes) {
  std::byte* start = MemoryAdaptor::reserve(bytes);
  reserved_ += bytes;
  return start;
}

void CountedMemory::unreserve(std::byte* start, std::int64_t bytes) noexcept {
  MemoryAdaptor::unreserve(start, bytes);
  reserved_ -= bytes;
}

void CountedMemory::commit(std::byte* start, std::int64_t bytes) {
  MemoryAdaptor::commit(start, bytes);
  ++commits_;
  const std::int64_t now = committed_.fetch_add(bytes) + bytes;
  std::int64_t peak = peak_;
  while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
  }
}

void CountedMemory::decommit(std::byte* start, std::int64_t bytes) noexcept {
  MemoryAdaptor::decommit(start, bytes);
  ++decommits_;
  committed_ -= bytes;
}

MemoryCounts CountedMemory::counts() const {
  return {committed_, peak_, reserved_, commits_, decommits_};
}

void FaultyMemory::maybe_fail(std::int64_t bytes) {
  if (fails_(calls_++)) throw OutOfMemoryError("injected: no memory", bytes);
}

std::byte* FaultyMemory::reserve(std::int64_t bytes) {
  maybe_fail(bytes);
  return MemoryAdaptor::reserve(bytes);
}

void FaultyMemory::commit(std::byte* start, std::int64_t bytes) {
  maybe_fail(bytes);
  MemoryAdaptor::commit(start, bytes);
}

Allocation::Allocation(Memory& memory, std::int64_t bytes) {
  const std::int64_t size = round_up_to(bytes, memory.granularity());
  if (size == 0) return;
  std::byte* start = memory.reserve(size);
  try {
    memory.commit(start, size);
  } catch (...) {
    memory.unreserve(start, size);
    throw;
  }
  memory_ = &memory;
  start_ = start;
  bytes_ = size;
}

Allocation& Allocation::operator=(Allocation&& other) noexcept {
  if (this != &other) {
    reset();
    memory_ = std::exchange(other.memory_, nullptr);
    start_ = std::exchange(other.start_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void Allocation::reset() noexcept {
  if (start_ == nullptr) return;
  memory_->decommit(start_, bytes_);
  memory_->unreserve(start_, bytes_);
  start_ = nullptr;
  bytes_ = 0;
}

}  // namespace vramkit
