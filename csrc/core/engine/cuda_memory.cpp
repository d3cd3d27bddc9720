// See cuda_memory.hpp.
#include "core/engine/cuda_memory.hpp"

#include <bit>
#include <utility>

#include "core/error.hpp"
#include "core/platform/memory.hpp"
#include "core/platform/process.hpp"

namespace vramkit {
namespace {

void require_power_of_two(std::int64_t granularity, std::int64_t least) {
  if (granularity < least || !std::has_single_bit(static_cast<std::uint64_t>(granularity))) {
    throw InvalidArgument("a granularity is a power of two of at least the device's " +
                          std::to_string(least) + " bytes, not " + std::to_string(granularity));
  }
}

}  // namespace

CudaDevice::CudaDevice(std::shared_ptr<CudaCalls> calls, int index)
    : calls_(std::move(calls)),
      index_(index),
      name_("cuda:" + std::to_string(index)),
      process_(current_process()) {
  int count = 0;
  check(calls_->device_count(&count), "looking for devices");
  if (index < 0 || index >= count) {
    throw InvalidArgument("there is no " + name_ + ": this process sees " + std::to_string(count) +
                          " CUDA devices");
  }
}

bool CudaDevice::usable() const { return current_process() == process_; }

bool CudaDevice::succeeded(CudaStatus status) const noexcept {
  if (status == kCudaSuccess) return true;
  calls_->clear_last_error();
  return false;
}

void CudaDevice::check(CudaStatus status, const char* what) const {
  if (succeeded(status)) return;
  throw DeviceError(status, name_ + ": " + what + " failed: " + calls_->describe(status) + " (" +
                                std::to_string(status) + ")");
}

void CudaDevice::check_memory(CudaStatus status, const char* what, std::int64_t bytes) const {
  if (status != kCudaOutOfMemory) return check(status, what);
  calls_->clear_last_error();
  throw DeviceMemoryError(name_ + ": no memory: " + what + " of " + std::to_string(bytes) +
                              " bytes failed; other programs, or torch's cache "
                              "(torch.cuda.empty_cache()), may hold it",
                          bytes);
}

OnDevice::OnDevice(const CudaDevice& device) : device_(device) {
  CudaCalls& calls = device.calls();
  device.check(calls.get_device(&before_), "asking for the current device");
  if (before_ != device.index()) {
    device.check(calls.set_device(device.index()), "making the device current");
  }
}

OnDevice::~OnDevice() {
  if (before_ == device_.index()) return;
  CudaCalls& calls = device_.calls();
  bool has = false;
  if (device_.succeeded(calls.has_context(before_, &has)) && has) {
    device_.succeeded(calls.set_device(before_));
  }
}

CudaMemory::CudaMemory(std::shared_ptr<const CudaDevice> device, std::int64_t granularity,
                       std::int64_t finest)
    : device_(std::move(device)), granularity_(granularity) {
  require_power_of_two(granularity, finest);
}

std::byte* CudaMemory::reserve(std::int64_t bytes) {
  std::byte* start = nullptr;
  device_->check_memory(device_->calls().reserve_addresses(&start, bytes, granularity_),
                        "reserving addresses", bytes);
  return start;
}

void CudaMemory::unreserve(std::byte* start, std::int64_t bytes) noexcept {
  if (!device_->usable()) return;
  const std::scoped_lock lock(mutex_);
  const auto first = stuck_.lower_bound(start), last = stuck_.lower_bound(start + bytes);
  for (auto segment = first; segment != last; ++segment) {
    device_->succeeded(device_->calls().unmap(*segment, granularity_));
  }
  stuck_.erase(first, last);
  device_->succeeded(device_->calls().free_addresses(start, bytes));
}

void CudaMemory::map_segment(std::byte* start) {
  if (stuck_.erase(start) > 0) return;  // there is memory still
  CudaCalls& calls = device_->calls();
  CudaAllocation allocation = 0;
  device_->check_memory(calls.create(&allocation, granularity_, device_->index()),
                        "taking a segment", granularity_);
  const CudaStatus mapped = calls.map(start, granularity_, allocation);
  // The mapping keeps the memory; without one it goes back here.
  device_->succeeded(calls.release(allocation));
  device_->check_memory(mapped, "mapping a segment", granularity_);
}

void CudaMemory::unmap(std::byte* start, std::int64_t bytes) noexcept {
  // One by one, as they were mapped.
  for (std::int64_t at = 0; at < bytes; at += granularity_) {
    if (!device_->succeeded(device_->calls().unmap(start + at, granularity_))) {
      stuck_.insert(start + at);
    }
  }
}

void CudaMemory::commit(std::byte* start, std::int64_t bytes) {
  const OnDevice here(*device_);
  const std::scoped_lock lock(mutex_);
  std::int64_t done = 0;
  try {
    for (; done < bytes; done += granularity_) map_segment(start + done);
    device_->check_memory(device_->calls().allow_access(start, bytes, device_->index()),
                          "allowing access to segments", bytes);
  } catch (...) {
    unmap(start, done);
    throw;
  }
}

void CudaMemory::decommit(std::byte* start, std::int64_t bytes) noexcept {
  if (!device_->usable()) return;
  const std::scoped_lock lock(mutex_);
  unmap(start, bytes);
}

CudaAllocations::CudaAllocations(std::shared_ptr<const CudaDevice> device, std::int64_t granularity)
    : device_(std::move(device)), granularity_(granularity) {
  require_power_of_two(granularity, 4096);
}

std::byte* CudaAllocations::reserve(std::int64_t bytes) {
  void* start = reserve_pages(bytes, granularity_);
  if (start == nullptr) {
    throw OutOfMemoryError("the system has no addresses for " + std::to_string(bytes) + " bytes",
                           bytes);
  }
  return static_cast<std::byte*>(start);
}

void CudaAllocations::unreserve(std::byte* start, std::int64_t bytes) noexcept {
  return_pages(start, bytes);
}

void CudaAllocations::commit(std::byte* start, std::int64_t bytes) {
  const OnDevice here(*device_);
  std::byte* found = nullptr;
  device_->check_memory(device_->calls().allocate(&found, bytes), "an allocation", bytes);
  const std::scoped_lock lock(mutex_);
  pieces_[start] = found;
}

void CudaAllocations::decommit(std::byte* start, std::int64_t) noexcept {
  if (!device_->usable()) return;
  const std::scoped_lock lock(mutex_);
  const auto found = pieces_.find(start);
  if (found == pieces_.end()) return;
  device_->succeeded(device_->calls().deallocate(found->second));
  pieces_.erase(found);
}

std::byte* CudaAllocations::resolve(std::byte* byte) const {
  const std::scoped_lock lock(mutex_);
  const auto after = pieces_.upper_bound(byte);
  if (after == pieces_.begin()) return byte;  // of no bytes: nobody reads there
  const auto& [start, found] = *std::prev(after);
  return found + (byte - start);
}

std::int64_t PinnedMemory::granularity() const { return host_.granularity(); }

std::byte* PinnedMemory::reserve(std::int64_t bytes) {
  void* start = reserve_pages(bytes, HostMemory::kLargePage);
  if (start == nullptr) {
    throw OutOfMemoryError("the system has no addresses for " + std::to_string(bytes) + " bytes",
                           bytes);
  }
  return static_cast<std::byte*>(start);
}

void PinnedMemory::unreserve(std::byte* start, std::int64_t bytes) noexcept {
  host_.unreserve(start, bytes);
}

void PinnedMemory::commit(std::byte* start, std::int64_t bytes) {
  host_.commit(start, bytes);
  try {
    touch_pages(start, bytes);
    const OnDevice here(*device_);
    device_->check_memory(device_->calls().register_host(start, bytes),
                          "pinning memory of the host", bytes);
  } catch (...) {
    host_.decommit(start, bytes);
    throw;
  }
}

void PinnedMemory::decommit(std::byte* start, std::int64_t bytes) noexcept {
  if (device_->usable()) device_->succeeded(device_->calls().unregister_host(start));
  host_.decommit(start, bytes);
}

PinnedRange::PinnedRange(std::shared_ptr<const CudaDevice> device, std::byte* start,
                         std::int64_t bytes)
    : device_(std::move(device)), start_(start) {
  const OnDevice here(*device_);
  device_->check_memory(device_->calls().register_host(start, bytes), "pinning memory of the host",
                        bytes);
}

PinnedRange::~PinnedRange() {
  if (device_->usable()) device_->succeeded(device_->calls().unregister_host(start_));
}

}  // namespace vramkit
