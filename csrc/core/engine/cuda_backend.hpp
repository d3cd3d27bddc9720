// A CUDA device for the engine: memory in segments under addresses that stay, copies on streams of
// their own, order by events, staging memory that is pinned. All through CudaCalls, so that this
// has no need of a toolkit or a driver before it is made.
#pragma once
#include <memory>
#include <mutex>
#include <optional>

#include "core/engine/backend.hpp"
#include "core/engine/cuda_calls.hpp"
#include "core/engine/cuda_memory.hpp"

namespace vramkit {

class CudaBackend : public Backend {
 public:
  // Of the memory that is taken and given back at once. Each segment has a cost of some tens of
  // microseconds; what blocks at its ends leave of it is lost.
  static constexpr std::int64_t kSegment = std::int64_t{32} << 20;

  // Throws InvalidArgument if there is no such device, or for a granularity that it cannot have;
  // DeviceError; OutOfMemoryError.
  CudaBackend(std::shared_ptr<CudaCalls> calls, int device, std::int64_t granularity = kSegment);
  ~CudaBackend() override;

  const char* name() const override { return "cuda"; }
  int device() const { return device_->index(); }
  Memory& memory() override { return *memory_; }
  Memory& staging() override { return *staging_; }
  // For stores of blocks that outlive an engine.
  std::shared_ptr<Memory> shared_staging() const { return staging_; }
  bool host_addressable() const override { return false; }
  bool copies_from(const std::byte* src, std::int64_t bytes) const override;
  std::optional<DeviceMemoryInfo> memory_info() override;
  std::unique_ptr<Lane> make_lane() override;
  std::unique_ptr<Event> make_event() override;
  void wait(Event& event, StreamHandle stream) override;
  void record(Event& event, StreamHandle stream) override;
  void synchronize(Event& event) override;
  bool drain() noexcept override;
  void fill(std::byte* dst, std::uint8_t value, std::int64_t bytes) override;

 private:
  const std::shared_ptr<const CudaDevice> device_;
  std::unique_ptr<Memory> memory_;
  std::shared_ptr<Memory> staging_;
  std::mutex fill_mutex_;
  std::unique_ptr<Lane> fill_lane_;
  std::unique_ptr<Event> filled_;
};

}  // namespace vramkit
