// A CUDA device for tests on a machine without one. Streams are threads that take their time, and
// "device memory" is addresses that the host cannot touch, so that code runs as it does on a GPU:
// what was enqueued happens later, and what nothing orders happens in any order.
//
// Beyond that it proves the order. Each copy, fill and read is checked, when it is enqueued,
// against all others of the same bytes by vector clocks: two that no event orders, of which one
// writes, are a complaint, whatever the threads happened to do. So are memory that is given back
// while something enqueued still uses it, copies from memory that is not pinned, addresses without
// memory, and streams or events that are gone, or another device's.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "core/engine/cuda_calls.hpp"

namespace vramkit::testing {

class FakeCuda : public CudaCalls {
 public:
  struct Options {
    int devices = 1;
    std::int64_t memory = std::int64_t{1} << 30;
    std::int64_t granularity = 4096;  // 0: no virtual memory management
    bool batches = true;
    int delay_us = 30;  // a copy takes up to so long
  };
  FakeCuda() : FakeCuda(Options{}) {}
  explicit FakeCuda(Options options);
  ~FakeCuda() override;

  // For tests.
  // With what the how-manieth call of all, from 0, is to fail; 0 lets it happen.
  using Fails = std::function<CudaStatus(std::int64_t call, const std::string& name)>;
  void fail(Fails fails);
  // A kernel that compares memory with `want`, when the stream comes to it.
  void expect(const std::byte* at, std::string want, StreamHandle stream, const std::string& what);
  // What is there when all that is on the stream now is done.
  std::string read(const std::byte* at, std::int64_t bytes, StreamHandle stream);
  void finish();  // waits for all streams
  // What was done that may not be done, and what arrived that should not have.
  std::vector<std::string> complaints();
  std::int64_t calls() const { return calls_; }
  std::int64_t count(const std::string& name) const;
  // Calls that make a host wait, and calls that take or give memory, streams and events.
  std::int64_t waits() const;
  std::int64_t waits_of(std::thread::id thread) const;
  std::int64_t resources() const;
  std::int64_t used() const;      // bytes of the device's memory
  std::int64_t reserved() const;  // bytes of addresses
  std::int64_t pinned() const;    // bytes of the host's memory
  std::int64_t live() const;      // streams, events and allocations that nobody gave back

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
  bool copies_in_batches() const override { return options_.batches; }
  CudaStatus copy_batch(std::span<const CopyRange> copies, StreamHandle stream) override;
  CudaStatus fill(std::byte* dst, std::uint8_t value, std::int64_t bytes,
                  StreamHandle stream) override;
  void begin_range(const char*) noexcept override { ++open_ranges_; }
  void end_range() noexcept override { --open_ranges_; }

 private:
  using Clock = std::vector<std::int64_t>;  // ticks by stream that are known to have happened
  using Ticket = std::shared_ptr<bool>;     // an event's record, true when it has come
  struct Stream {
    std::size_t id = 0;
    int device = 0;
    bool gone = false;
    Clock clock;
    std::deque<std::function<void()>> queue;
    std::condition_variable work;
    bool busy = false;
    std::thread thread;
  };
  struct Event {
    int device = 0;
    bool gone = false;
    Ticket ticket;
    Clock clock;
  };
  struct Reservation {
    std::byte* start;  // what others know, untouchable
    std::byte* shadow;
    std::int64_t bytes;
  };
  struct Mapping {
    std::int64_t bytes;
    CudaAllocation allocation;
    bool allowed;
  };
  struct Physical {
    std::int64_t bytes;
    bool held = true;
    int mappings = 0;
  };
  struct Access {
    const std::byte* begin;
    const std::byte* end;
    std::size_t stream;
    std::int64_t tick;
    bool write;
  };
  using Lock = std::unique_lock<std::mutex>;

  CudaStatus enter(const char* name);
  void complain(const std::string& what) { complaints_.push_back(what); }
  Stream* stream_of(StreamHandle stream, const char* what);
  Event* event_of(CudaEventHandle event, const char* what);
  int current() const;
  static void join(Clock& clock, const Clock& other);
  void push(Stream& stream, std::function<void()> work);
  void run(Stream& stream);
  template <typename Done>
  void wait_until(Lock& lock, Done done);
  void notify();
  void access(Stream& stream, const std::byte* at, std::int64_t bytes, bool write,
              const char* what);
  void given_back(const std::byte* start, std::int64_t bytes, const char* what);
  std::byte* shadow(const std::byte* at, std::int64_t bytes, const char* what);
  void enqueue_copy(Stream& stream, const CopyRange& copy);
  Reservation make_addresses(std::int64_t bytes, std::int64_t alignment);
  void drop_if_unused(CudaAllocation allocation);
  void delay();

  const Options options_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<std::int64_t> calls_{0};
  std::atomic<int> open_ranges_{0};
  Fails fails_;
  std::map<std::string, std::int64_t> counts_;
  std::map<std::thread::id, std::int64_t> waits_;
  std::set<std::thread::id> uncleared_;
  std::map<std::thread::id, int> current_;
  std::set<int> contexts_;
  std::vector<std::string> complaints_;
  std::vector<std::unique_ptr<Stream>> streams_;  // the default ones of the devices first
  std::vector<std::unique_ptr<Event>> events_;
  std::map<const std::byte*, Reservation> reservations_;
  std::map<const std::byte*, Mapping> mappings_;
  std::map<const std::byte*, std::int64_t> registered_;
  std::map<CudaAllocation, Physical> physical_;
  CudaAllocation next_allocation_ = 1;
  std::int64_t used_ = 0;
  std::vector<Access> accesses_;
  Clock host_;  // what the host has waited for
  std::mt19937 random_{1};
  int waiting_ = 0;  // for something to have happened
  bool stopping_ = false;
};

}  // namespace vramkit::testing
