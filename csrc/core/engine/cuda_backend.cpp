// See cuda_backend.hpp.
#include "core/engine/cuda_backend.hpp"

#include <utility>

#include "core/error.hpp"

namespace vramkit {
namespace {

using Device = std::shared_ptr<const CudaDevice>;

class CudaEvent : public Event {
 public:
  explicit CudaEvent(Device device) : device_(std::move(device)) {
    const OnDevice here(*device_);
    device_->check_memory(device_->calls().create_event(&handle_), "making an event", 0);
  }
  ~CudaEvent() override {
    if (device_->usable()) device_->succeeded(device_->calls().destroy_event(handle_));
  }
  CudaEventHandle handle() const { return handle_; }

 private:
  const Device device_;
  CudaEventHandle handle_ = nullptr;
};

CudaEventHandle handle_of(Event& event) { return static_cast<CudaEvent&>(event).handle(); }

class CudaLane : public Lane {
 public:
  explicit CudaLane(Device device) : device_(std::move(device)) {
    const OnDevice here(*device_);
    device_->check_memory(device_->calls().create_stream(&stream_), "making a stream", 0);
  }
  ~CudaLane() override {
    if (device_->usable()) device_->succeeded(device_->calls().destroy_stream(stream_));
  }

  void copy(std::span<const CopyRange> copies) override {
    const OnDevice here(*device_);
    CudaCalls& calls = device_->calls();
    const Range range(calls, "vramkit: copy");
    if (copies.size() > 1 && calls.copies_in_batches()) {
      device_->check(calls.copy_batch(copies, stream_), "a batch of copies to the device");
      return;
    }
    for (const CopyRange& copy : copies) {
      device_->check(calls.copy(copy.dst, copy.src, copy.bytes, stream_), "a copy to the device");
    }
  }
  void wait(Event& event) override {
    const OnDevice here(*device_);
    device_->check(device_->calls().wait(stream_, handle_of(event)), "waiting for an event");
  }
  void record(Event& event) override {
    const OnDevice here(*device_);
    device_->check(device_->calls().record(handle_of(event), stream_), "recording an event");
  }
  void fill(std::byte* dst, std::uint8_t value, std::int64_t bytes) {
    const OnDevice here(*device_);
    device_->check(device_->calls().fill(dst, value, bytes, stream_), "filling memory");
  }

 private:
  class Range {
   public:
    Range(CudaCalls& calls, const char* name) : calls_(calls) { calls_.begin_range(name); }
    ~Range() { calls_.end_range(); }
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;

   private:
    CudaCalls& calls_;
  };

  const Device device_;
  StreamHandle stream_ = nullptr;
};

}  // namespace

CudaBackend::CudaBackend(std::shared_ptr<CudaCalls> calls, int device, std::int64_t granularity)
    : device_(std::make_shared<const CudaDevice>(std::move(calls), device)) {
  const OnDevice here(*device_);
  // The first call that needs the driver: makes the context, and says so here if it cannot.
  std::int64_t free = 0, total = 0;
  device_->check_memory(device_->calls().memory_info(&free, &total), "making a context", 0);
  std::int64_t finest = 0;
  device_->check(device_->calls().allocation_granularity(device, &finest),
                 "asking for the granularity of memory");
  if (finest > 0) {
    memory_ = std::make_unique<CudaMemory>(device_, granularity, finest);
  } else {
    memory_ = std::make_unique<CudaAllocations>(device_, granularity);
  }
  staging_ = std::make_shared<PinnedMemory>(device_);
}

CudaBackend::~CudaBackend() = default;

// A range counts by its ends: nobody pins half of an allocation.
bool CudaBackend::copies_from(const std::byte* src, std::int64_t bytes) const {
  if (bytes == 0) return true;
  const OnDevice here(*device_);
  for (const std::byte* end : {src, src + bytes - 1}) {
    bool pinned = false;
    device_->check(device_->calls().is_pinned(end, &pinned), "asking whether memory is pinned");
    if (!pinned) return false;
  }
  return true;
}

std::optional<DeviceMemoryInfo> CudaBackend::memory_info() {
  const OnDevice here(*device_);
  DeviceMemoryInfo info;
  device_->check(device_->calls().memory_info(&info.free, &info.total), "asking for free memory");
  return info;
}

std::unique_ptr<Lane> CudaBackend::make_lane() { return std::make_unique<CudaLane>(device_); }
std::unique_ptr<Event> CudaBackend::make_event() { return std::make_unique<CudaEvent>(device_); }

void CudaBackend::wait(Event& event, StreamHandle stream) {
  const OnDevice here(*device_);
  device_->check(device_->calls().wait(stream, handle_of(event)), "waiting for an event");
}

void CudaBackend::record(Event& event, StreamHandle stream) {
  const OnDevice here(*device_);
  device_->check(device_->calls().record(handle_of(event), stream), "recording an event");
}

void CudaBackend::synchronize(Event& event) {
  const OnDevice here(*device_);
  device_->check(device_->calls().synchronize(handle_of(event)), "waiting for the device");
}

bool CudaBackend::drain() noexcept {
  if (!device_->usable()) return true;
  try {
    const OnDevice here(*device_);
    return device_->succeeded(device_->calls().synchronize_device());
  } catch (const Error&) {
    return false;
  }
}

void CudaBackend::fill(std::byte* dst, std::uint8_t value, std::int64_t bytes) {
  const std::scoped_lock lock(fill_mutex_);
  if (!fill_lane_) fill_lane_ = make_lane();
  if (!filled_) filled_ = make_event();
  static_cast<CudaLane&>(*fill_lane_).fill(dst, value, bytes);
  fill_lane_->record(*filled_);
  synchronize(*filled_);
}

}  // namespace vramkit
