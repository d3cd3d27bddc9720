// What the engine asks of a device: memory, copies to it, and events that order the copies with
// the arithmetic. A host backend (below) does all of it in place, at once; one with streams
// (cuda_backend.hpp) enqueues and returns.
//
// Ordering, for a device with streams. A lane is a stream for copies, used by one thread. Before a
// lane writes to a slot it waits for the event that the arithmetic recorded when it gave the slot
// back; after its last copy it records an event, which the arithmetic's stream waits for when it
// takes the block. So the calling thread never waits for the device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "core/engine/memory.hpp"

namespace vramkit {

// The device's own handle of a stream of arithmetic; null is the default one.
using StreamHandle = void*;

class Event {
 public:
  virtual ~Event() = default;
};

struct CopyRange {
  std::byte* dst = nullptr;
  const std::byte* src = nullptr;
  std::int64_t bytes = 0;
};

class Lane {
 public:
  virtual ~Lane() = default;
  // Sources are memory of the host that copies_from() says yes to, and stay valid until an event
  // recorded later has come. The order among the copies is unspecified.
  virtual void copy(std::span<const CopyRange> copies) = 0;
  virtual void wait(Event& event) = 0;
  virtual void record(Event& event) = 0;
};

struct DeviceMemoryInfo {
  std::int64_t free = 0, total = 0;  // bytes
};

// Members but the lanes' may be called from several threads at once. All throw Error types.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;
  virtual Memory& memory() = 0;   // the device's
  virtual Memory& staging() = 0;  // the host's, such that copies from it are fast
  // Files may be read straight into memory().
  virtual bool host_addressable() const = 0;
  // Lanes may copy from this memory of the host; else it goes through memory of staging().
  virtual bool copies_from(const std::byte* src, std::int64_t bytes) const = 0;
  // What the device has, whoever uses it; none where nobody counts it.
  virtual std::optional<DeviceMemoryInfo> memory_info() = 0;

  virtual std::unique_ptr<Lane> make_lane() = 0;
  virtual std::unique_ptr<Event> make_event() = 0;
  // What is enqueued on the stream later waits for the event.
  virtual void wait(Event& event, StreamHandle stream) = 0;
  // The event comes when all that is on the stream now is done.
  virtual void record(Event& event, StreamHandle stream) = 0;
  // Blocks the calling thread until the event has come.
  virtual void synchronize(Event& event) = 0;
  // Blocks until all that was ever enqueued on the device is done, whoever did. False if the device
  // fails: nothing that it holds can be trusted then.
  virtual bool drain() noexcept = 0;
  // Fills memory of the device and waits for it, for tests that want absent blocks to be seen.
  virtual void fill(std::byte* dst, std::uint8_t value, std::int64_t bytes) = 0;
};

// The device tier is memory of this machine. Works everywhere.
class HostBackend : public Backend {
 public:
  explicit HostBackend(std::shared_ptr<Memory> memory = std::make_shared<HostMemory>());

  const char* name() const override { return "host"; }
  Memory& memory() override { return *memory_; }
  Memory& staging() override { return *memory_; }
  bool host_addressable() const override { return true; }
  bool copies_from(const std::byte*, std::int64_t) const override { return true; }
  std::optional<DeviceMemoryInfo> memory_info() override { return std::nullopt; }
  std::unique_ptr<Lane> make_lane() override;
  std::unique_ptr<Event> make_event() override { return std::make_unique<Event>(); }
  void wait(Event&, StreamHandle) override {}
  void record(Event&, StreamHandle) override {}
  void synchronize(Event&) override {}
  bool drain() noexcept override { return true; }
  void fill(std::byte* dst, std::uint8_t value, std::int64_t bytes) override;

 private:
  std::shared_ptr<Memory> memory_;
};

}  // namespace vramkit
