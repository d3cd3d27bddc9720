// Memory of a CUDA device, and memory of the host that the device can copy from by itself.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "core/engine/cuda_calls.hpp"
#include "core/engine/memory.hpp"

namespace vramkit {

// One device, and what became of the calls to it.
class CudaDevice {
 public:
  // Throws InvalidArgument if there is no such device, DeviceError if there is no driver.
  CudaDevice(std::shared_ptr<CudaCalls> calls, int index);

  CudaCalls& calls() const { return *calls_; }
  int index() const { return index_; }
  const std::string& name() const { return name_; }
  // A fork's copy of this object must not call the driver, nor need it: the memory is another's.
  bool usable() const;

  // Throws DeviceError unless the call succeeded, and clears the error that it left.
  void check(CudaStatus status, const char* what) const;
  // The same, and OutOfMemoryError where there is no memory for `bytes`.
  void check_memory(CudaStatus status, const char* what, std::int64_t bytes) const;
  // For what cannot throw: whether it succeeded.
  bool succeeded(CudaStatus status) const noexcept;

 private:
  const std::shared_ptr<CudaCalls> calls_;
  const int index_;
  const std::string name_;
  const std::int64_t process_;
};

// The device is the calling thread's for as long as this lives. The one before it is so again
// afterwards, if this process uses it at all.
class OnDevice {
 public:
  explicit OnDevice(const CudaDevice& device);  // throws DeviceError
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice();

 private:
  const CudaDevice& device_;
  int before_ = 0;
};

// Addresses by CUDA's virtual memory management, backed in segments of the granularity.
class CudaMemory : public Memory {
 public:
  // Throws InvalidArgument if the granularity is no power of two, or finer than the device's.
  CudaMemory(std::shared_ptr<const CudaDevice> device, std::int64_t granularity,
             std::int64_t finest);

  std::int64_t granularity() const override { return granularity_; }
  std::byte* reserve(std::int64_t bytes) override;
  void unreserve(std::byte* start, std::int64_t bytes) noexcept override;
  void commit(std::byte* start, std::int64_t bytes) override;
  void decommit(std::byte* start, std::int64_t bytes) noexcept override;

 private:
  void map_segment(std::byte* start);
  void unmap(std::byte* start, std::int64_t bytes) noexcept;

  const std::shared_ptr<const CudaDevice> device_;
  const std::int64_t granularity_;
  std::mutex mutex_;
  std::set<std::byte*> stuck_;  // segments that were to go, and could not
};

// Where the device has no virtual memory management: what is committed at once is one allocation,
// and what is reserved are addresses of the host that only name it.
class CudaAllocations : public Memory {
 public:
  CudaAllocations(std::shared_ptr<const CudaDevice> device, std::int64_t granularity);

  std::int64_t granularity() const override { return granularity_; }
  std::byte* reserve(std::int64_t bytes) override;
  void unreserve(std::byte* start, std::int64_t bytes) noexcept override;
  void commit(std::byte* start, std::int64_t bytes) override;
  // `start` and `bytes` as of one commit().
  void decommit(std::byte* start, std::int64_t bytes) noexcept override;
  bool names_only() const override { return true; }
  std::byte* resolve(std::byte* byte) const override;

 private:
  const std::shared_ptr<const CudaDevice> device_;
  const std::int64_t granularity_;
  mutable std::mutex mutex_;
  std::map<std::byte*, std::byte*> pieces_;  // where each named piece lies
};

// Memory of the host in large pages, touched and then registered with the device at its exact size:
// an allocator of pinned memory would round it up, by as much again for some sizes.
class PinnedMemory : public Memory {
 public:
  explicit PinnedMemory(std::shared_ptr<const CudaDevice> device) : device_(std::move(device)) {}

  std::int64_t granularity() const override;
  std::byte* reserve(std::int64_t bytes) override;
  void unreserve(std::byte* start, std::int64_t bytes) noexcept override;
  void commit(std::byte* start, std::int64_t bytes) override;
  // `start` and `bytes` as of one commit().
  void decommit(std::byte* start, std::int64_t bytes) noexcept override;

 private:
  const std::shared_ptr<const CudaDevice> device_;
  HostMemory host_{4096};
};

// Memory of the host that somebody else has, such as a shared mapping, registered with the device
// for as long as this lives. Whoever has it keeps it for longer.
class PinnedRange {
 public:
  // Throws OutOfMemoryError, DeviceError.
  PinnedRange(std::shared_ptr<const CudaDevice> device, std::byte* start, std::int64_t bytes);
  PinnedRange(const PinnedRange&) = delete;
  PinnedRange& operator=(const PinnedRange&) = delete;
  ~PinnedRange();

 private:
  const std::shared_ptr<const CudaDevice> device_;
  std::byte* const start_;
};

}  // namespace vramkit
