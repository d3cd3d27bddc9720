// The calls of core/engine/cuda_calls.hpp as CUDA has them: the runtime, linked statically, and the
// driver's functions for virtual memory, asked for at run time. So nothing needs libcuda to be
// loaded before the first call, and a machine without a driver is told so by that call.
//
// One class definition for all of it, so that tests can change single calls.
#pragma once
#include <memory>
#include <mutex>

#include "core/engine/cuda_calls.hpp"

namespace vramkit::cuda {

class RuntimeCalls : public CudaCalls {
 public:
  RuntimeCalls();
  ~RuntimeCalls() override;

  CudaStatus device_count(int* count) override;
  CudaStatus set_device(int device) override;
  CudaStatus get_device(int* device) override;
  CudaStatus has_context(int device, bool* has) override;
  CudaStatus synchronize_device() override;
  CudaStatus memory_info(std::int64_t* free, std::int64_t* total) override;
  std::string describe(CudaStatus status) override;
  void clear_last_error() noexcept override;
  CudaStatus allocation_granularity(int device, std::int64_t* granularity) override;
  CudaStatus reserve_addresses(std::byte** start, std::int64_t bytes,
                               std::int64_t alignment) override;
  CudaStatus free_addresses(std::byte* start, std::int64_t bytes) override;
  CudaStatus create(CudaAllocation* allocation, std::int64_t bytes, int device) override;
  CudaStatus release(CudaAllocation allocation) override;
  CudaStatus map(std::byte* start, std::int64_t bytes, CudaAllocation allocation) override;
  CudaStatus unmap(std::byte* start, std::int64_t bytes) override;
  CudaStatus allow_access(std::byte* start, std::int64_t bytes, int device) override;
  CudaStatus allocate(std::byte** start, std::int64_t bytes) override;
  CudaStatus deallocate(std::byte* start) override;
  CudaStatus register_host(std::byte* start, std::int64_t bytes) override;
  CudaStatus unregister_host(std::byte* start) override;
  CudaStatus is_pinned(const std::byte* address, bool* pinned) override;
  CudaStatus create_stream(StreamHandle* stream) override;
  CudaStatus destroy_stream(StreamHandle stream) override;
  CudaStatus create_event(CudaEventHandle* event) override;
  CudaStatus destroy_event(CudaEventHandle event) override;
  CudaStatus record(CudaEventHandle event, StreamHandle stream) override;
  CudaStatus wait(StreamHandle stream, CudaEventHandle event) override;
  CudaStatus synchronize(CudaEventHandle event) override;
  CudaStatus copy(std::byte* dst, const std::byte* src, std::int64_t bytes,
                  StreamHandle stream) override;
  bool copies_in_batches() const override;
  CudaStatus copy_batch(std::span<const CopyRange> copies, StreamHandle stream) override;
  CudaStatus fill(std::byte* dst, std::uint8_t value, std::int64_t bytes,
                  StreamHandle stream) override;
  void begin_range(const char* name) noexcept override;
  void end_range() noexcept override;

 private:
  struct Driver;
  // Where a function is missing, its pointer is null.
  const Driver& driver() const;

  mutable std::once_flag once_;
  mutable std::unique_ptr<Driver> driver_;
};

}  // namespace vramkit::cuda
