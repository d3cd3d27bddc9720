// The CUDA calls that the engine's backend makes, one virtual function each, so that the engine
// knows no CUDA header, is built and tested where there is no toolkit, and tests can put faults and
// a device of their own behind it. The real ones are in csrc/cuda/runtime_calls.cpp.
//
// All return CUDA's own number of the outcome, 0 being success: the runtime's and the driver's
// agree on those that are told apart here. Safe to call from several threads at once. Streams and
// events are those of the device that is current in the calling thread (set_device).
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "core/engine/backend.hpp"

namespace vramkit {

using CudaStatus = int;
inline constexpr CudaStatus kCudaSuccess = 0;
inline constexpr CudaStatus kCudaOutOfMemory = 2;

using CudaEventHandle = void*;
using CudaAllocation = std::uint64_t;  // physical memory, without an address

class CudaCalls {
 public:
  virtual ~CudaCalls() = default;

  virtual CudaStatus device_count(int* count) = 0;
  // Also makes the device's context, in which all of the process works (the primary one).
  virtual CudaStatus set_device(int device) = 0;
  virtual CudaStatus get_device(int* device) = 0;
  // Whether this process works on the device already: making it current costs memory otherwise.
  virtual CudaStatus has_context(int device, bool* has) = 0;
  virtual CudaStatus synchronize_device() = 0;
  virtual CudaStatus memory_info(std::int64_t* free, std::int64_t* total) = 0;
  virtual std::string describe(CudaStatus status) = 0;
  // Forgets the calling thread's last error, which someone else's check would find.
  virtual void clear_last_error() noexcept = 0;

  // Virtual memory management. `granularity` is 0 where the device or the driver lacks it.
  virtual CudaStatus allocation_granularity(int device, std::int64_t* granularity) = 0;
  virtual CudaStatus reserve_addresses(std::byte** start, std::int64_t bytes,
                                       std::int64_t alignment) = 0;
  virtual CudaStatus free_addresses(std::byte* start, std::int64_t bytes) = 0;
  virtual CudaStatus create(CudaAllocation* allocation, std::int64_t bytes, int device) = 0;
  virtual CudaStatus release(CudaAllocation allocation) = 0;
  virtual CudaStatus map(std::byte* start, std::int64_t bytes, CudaAllocation allocation) = 0;
  virtual CudaStatus unmap(std::byte* start, std::int64_t bytes) = 0;
  virtual CudaStatus allow_access(std::byte* start, std::int64_t bytes, int device) = 0;

  // Memory in one piece, where there is none of the above.
  virtual CudaStatus allocate(std::byte** start, std::int64_t bytes) = 0;
  virtual CudaStatus deallocate(std::byte* start) = 0;

  virtual CudaStatus register_host(std::byte* start, std::int64_t bytes) = 0;
  virtual CudaStatus unregister_host(std::byte* start) = 0;
  // Whether the device may copy from this address by itself.
  virtual CudaStatus is_pinned(const std::byte* address, bool* pinned) = 0;

  // A stream that does not wait for the default one, nor it for this one.
  virtual CudaStatus create_stream(StreamHandle* stream) = 0;
  virtual CudaStatus destroy_stream(StreamHandle stream) = 0;
  virtual CudaStatus create_event(CudaEventHandle* event) = 0;  // without times
  virtual CudaStatus destroy_event(CudaEventHandle event) = 0;
  virtual CudaStatus record(CudaEventHandle event, StreamHandle stream) = 0;
  virtual CudaStatus wait(StreamHandle stream, CudaEventHandle event) = 0;
  virtual CudaStatus synchronize(CudaEventHandle event) = 0;
  virtual CudaStatus copy(std::byte* dst, const std::byte* src, std::int64_t bytes,
                          StreamHandle stream) = 0;
  virtual bool copies_in_batches() const = 0;
  virtual CudaStatus copy_batch(std::span<const CopyRange> copies, StreamHandle stream) = 0;
  virtual CudaStatus fill(std::byte* dst, std::uint8_t value, std::int64_t bytes,
                          StreamHandle stream) = 0;

  // Named ranges on the profiler's timeline; nothing where there is no profiler.
  virtual void begin_range(const char* name) noexcept = 0;
  virtual void end_range() noexcept = 0;
};

}  // namespace vramkit
