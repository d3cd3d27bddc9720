// Where an arena's bytes come from: address ranges that are reserved once and backed by memory in
// parts. Adaptors stack on any of them and are told apart by nobody above: a limit, counters, and
// faults for tests.
//
// Reserving takes addresses only. Committing takes memory, decommitting gives it back; both in
// multiples of granularity(), and the caller knows which parts are committed.
//
// Some devices have no addresses without memory. There, what is reserved are names: resolve() says
// where a committed byte lies, and only what was committed by one call is in one piece.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

namespace vramkit {

class Memory {
 public:
  virtual ~Memory() = default;

  virtual std::int64_t granularity() const = 0;  // a power of two
  // Aligned to granularity(); `bytes` is a multiple of it. Throws OutOfMemoryError.
  virtual std::byte* reserve(std::int64_t bytes) = 0;
  // The same range, of which nothing is committed any more.
  virtual void unreserve(std::byte* start, std::int64_t bytes) noexcept = 0;
  // Throws OutOfMemoryError or BudgetError with nothing changed. The content is unspecified.
  virtual void commit(std::byte* start, std::int64_t bytes) = 0;
  virtual void decommit(std::byte* start, std::int64_t bytes) noexcept = 0;

  virtual bool names_only() const { return false; }
  // The address of a byte that is committed.
  virtual std::byte* resolve(std::byte* byte) const { return byte; }
};

// The machine's own memory.
class HostMemory : public Memory {
 public:
  static constexpr std::int64_t kLargePage = std::int64_t{2} << 20;

  // Large pages want a granularity of at least theirs; less suits small arenas.
  explicit HostMemory(std::int64_t granularity = kLargePage);

  std::int64_t granularity() const override { return granularity_; }
  std::byte* reserve(std::int64_t bytes) override;
  void unreserve(std::byte* start, std::int64_t bytes) noexcept override;
  void commit(std::byte* start, std::int64_t bytes) override;
  void decommit(std::byte* start, std::int64_t bytes) noexcept override;

 private:
  const std::int64_t granularity_;
};

// Passes everything on: what adaptors change, they override.
class MemoryAdaptor : public Memory {
 public:
  explicit MemoryAdaptor(Memory& below) : below_(below) {}

  std::int64_t granularity() const override { return below_.granularity(); }
  std::byte* reserve(std::int64_t bytes) override { return below_.reserve(bytes); }
  void unreserve(std::byte* start, std::int64_t bytes) noexcept override {
    below_.unreserve(start, bytes);
  }
  void commit(std::byte* start, std::int64_t bytes) override { below_.commit(start, bytes); }
  void decommit(std::byte* start, std::int64_t bytes) noexcept override {
    below_.decommit(start, bytes);
  }
  bool names_only() const override { return below_.names_only(); }
  std::byte* resolve(std::byte* byte) const override { return below_.resolve(byte); }

 private:
  Memory& below_;
};

// Refuses (BudgetError) what would commit more than the limit. The limit may move while in use;
// lowering it takes nothing back.
class LimitedMemory : public MemoryAdaptor {
 public:
  LimitedMemory(Memory& below, std::int64_t limit);

  void commit(std::byte* start, std::int64_t bytes) override;
  void decommit(std::byte* start, std::int64_t bytes) noexcept override;

  void set_limit(std::int64_t limit) { limit_ = limit; }
  std::int64_t limit() const { return limit_; }
  std::int64_t committed() const { return committed_; }

 private:
  std::atomic<std::int64_t> limit_;
  std::atomic<std::int64_t> committed_{0};
};

struct MemoryCounts {
  std::int64_t committed = 0;       // bytes now
  std::int64_t peak_committed = 0;  // the most ever
  std::int64_t reserved = 0;        // bytes of addresses now
  std::int64_t commits = 0;         // calls that took memory
  std::int64_t decommits = 0;
};

class CountedMemory : public MemoryAdaptor {
 public:
  using MemoryAdaptor::MemoryAdaptor;

  std::byte* reserve(std::int64_t bytes) override;
  void unreserve(std::byte* start, std::int64_t bytes) noexcept override;
  void commit(std::byte* start, std::int64_t bytes) override;
  void decommit(std::byte* start, std::int64_t bytes) noexcept override;

  MemoryCounts counts() const;

 private:
  std::atomic<std::int64_t> committed_{0}, peak_{0}, reserved_{0}, commits_{0}, decommits_{0};
};

// Throws OutOfMemoryError where `fails` says so, of the how-manieth call (from 0) of any kind that
// can fail.
class FaultyMemory : public MemoryAdaptor {
 public:
  FaultyMemory(Memory& below, std::function<bool(std::int64_t call)> fails)
      : MemoryAdaptor(below), fails_(std::move(fails)) {}

  std::byte* reserve(std::int64_t bytes) override;
  void commit(std::byte* start, std::int64_t bytes) override;

 private:
  void maybe_fail(std::int64_t bytes);

  std::function<bool(std::int64_t)> fails_;
  std::atomic<std::int64_t> calls_{0};
};

// One committed range, given back at its end.
class Allocation {
 public:
  Allocation() = default;
  Allocation(Memory& memory, std::int64_t bytes);  // rounded up to the granularity
  Allocation(Allocation&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        start_(std::exchange(other.start_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)) {}
  Allocation& operator=(Allocation&& other) noexcept;
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  ~Allocation() { reset(); }

  std::byte* data() const { return start_; }
  std::int64_t bytes() const { return bytes_; }
  explicit operator bool() const { return start_ != nullptr; }
  void reset() noexcept;

 private:
  Memory* memory_ = nullptr;
  std::byte* start_ = nullptr;
  std::int64_t bytes_ = 0;
};

inline std::int64_t round_up_to(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}
inline std::int64_t round_down_to(std::int64_t value, std::int64_t unit) {
  return value / unit * unit;
}

}  // namespace vramkit
