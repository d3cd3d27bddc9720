// The model manager's ledger: which models are in memory, who uses them, and which has to go.
//
// Pure bookkeeping over integer ids. It holds no models, calls nothing from outside and knows no
// clock but that of its waits; the manager above loads and drops the objects when the ledger says
// so, with no lock held.
//
//            begin_load             finish_load            acquire
//    absent ------------> loading ---------------> ready <---------> leased
//      ^ ^                   |                       |      release
//      | |     fail_load     |                       |
//      | +-------------------+                       | begin_load (of another), begin_evict
//      |               finish_evict                  v
//      +----------------------------------------- evicting <--- finish_load (no room)
//
// Invariants, true whenever no call is inside:
//   1. The bytes of all ids that are loading, ready or leased do not exceed the budget, counting
//      for a loading id what it is expected to take.
//   2. No more than max_resident ids are loading, ready or leased.
//   3. Ids that are evicting still occupy their bytes and their place: they count against every
//      load but the one that chose them, which starts its loader only when they have gone.
//   4. leases > 0 exactly in state leased. A leased id is never chosen to go.
//   5. Exactly one begin_load returns Admission::load for each time an id becomes loading.
//   6. An absent id has no bytes in memory; each finish_load that keeps an id gives it a new
//      generation, so that a handle to an earlier load is known to be stale.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace vramkit {

enum class LedgerState { absent, loading, ready, leased, evicting };
const char* to_string(LedgerState state);

struct LedgerEntry {
  std::int64_t id = 0;
  LedgerState state = LedgerState::absent;
  std::int64_t bytes = 0;     // in memory, or expected while loading; 0 if absent
  std::int64_t expected = 0;  // what the next load is expected to take
  std::int64_t leases = 0;
  std::uint64_t generation = 0;  // of the latest load, from 1; 0 if never loaded
  std::uint64_t last_use = 0;    // larger is later
};

// What begin_load decided.
struct Admission {
  enum Action {
    ready,      // it is in memory; `generation` says as which load
    load,       // the caller drops `victims` (finish_evict each), loads, then finish_ or fail_load
    timed_out,  // nothing has changed
  };
  Action action = timed_out;
  std::uint64_t generation = 0;
  std::vector<std::int64_t> victims;  // evicting, least recently used first
};

// What finish_load decided.
struct Placement {
  // False: there is no room, or none beside what is leased. The id is evicting: the caller drops
  // it too. Since its size is known now, begin_load will wait for room or refuse.
  bool kept = false;
  std::uint64_t generation = 0;
  std::vector<std::int64_t> victims;  // evicting; the caller drops them (finish_evict each)
};

class Ledger {
 public:
  // budget: bytes, none for no bound. max_resident: at least 1.
  explicit Ledger(std::optional<std::int64_t> budget = std::nullopt, std::int64_t max_resident = 1);

  // Makes an id known, as absent. Throws InvalidArgument if it is known already.
  void add(std::int64_t id, std::int64_t expected_bytes = 0);
  // What the next load of the id will take; 0 if unknown.
  void set_expected(std::int64_t id, std::int64_t bytes);
  // Forgets an absent id. Throws InvalidArgument if it is not absent.
  void remove(std::int64_t id);

  // Asks for an id to be in memory. Waits while another thread loads or evicts it, and while what
  // would have to go is in use, at most `timeout` seconds (none: without end).
  // Throws BudgetError if the id alone is expected to exceed the budget, and Error if the wait
  // could never end because what has to go is held by threads that themselves wait.
  Admission begin_load(std::int64_t id, std::optional<double> timeout = std::nullopt);
  // The load that begin_load granted has ended well and takes `bytes`, which the ledger remembers
  // as what to expect.
  Placement finish_load(std::int64_t id, std::int64_t bytes);
  // … or has failed: the id is absent again.
  void fail_load(std::int64_t id);

  // Takes a lease on this generation of the id: it stays in memory until release. False if that
  // generation is not in memory, or is on its way out.
  bool acquire(std::int64_t id, std::uint64_t generation);
  // Gives one lease back. Throws InvalidArgument if there is none.
  void release(std::int64_t id);
  // Marks the id as used now.
  void touch(std::int64_t id);

  enum class Eviction { started, absent, timed_out };
  // Asks for an id to go. Waits for its load and its leases to end. After `started` the caller
  // drops the object and calls finish_evict. Throws Error as begin_load does. With a generation,
  // only that load is meant: `absent` if another has replaced it.
  Eviction begin_evict(std::int64_t id, std::optional<double> timeout = std::nullopt,
                       std::uint64_t generation = 0);
  // The object is gone: returns the bytes that the id had.
  std::int64_t finish_evict(std::int64_t id);

  // New limits, for loads to come; what is in memory stays until a load needs the room. Throws
  // BudgetError if less than what is in memory now, InvalidArgument for values out of range.
  void set_limits(std::optional<std::int64_t> budget, std::int64_t max_resident);
  std::optional<std::int64_t> budget() const;
  std::int64_t max_resident() const;

  LedgerEntry entry(std::int64_t id) const;
  LedgerState state(std::int64_t id) const { return entry(id).state; }
  // Of all ids that are not absent: loading ones at what they are expected to take.
  std::int64_t total_bytes() const;
  std::vector<LedgerEntry> snapshot() const;  // by id

  // Throws Error that names the first broken invariant. For tests.
  void check() const;

 private:
  struct Record {
    LedgerEntry entry;
    std::thread::id owner;                   // who loads or evicts it
    std::map<std::thread::id, int> lessees;  // leases by thread
  };
  // A thread that waits, and for what.
  struct Waiter {
    std::thread::id thread;
    std::int64_t id;
    bool evict;
  };

  Record& find(std::int64_t id);
  const Record& find(std::int64_t id) const;
  bool fits(std::int64_t bytes, std::int64_t places) const;
  std::optional<std::vector<std::int64_t>> victims_for(std::int64_t bytes, std::int64_t places,
                                                       std::int64_t exempt) const;
  void start_evicting(const std::vector<std::int64_t>& victims);
  void make_absent(Record& record);
  bool could_proceed(const Waiter& waiter, const std::vector<Waiter>& stuck) const;
  void refuse_endless_wait(const Waiter& waiter) const;
  template <typename Ready>
  bool wait(std::unique_lock<std::mutex>& lock, const Waiter& waiter,
            const std::optional<double>& timeout, Ready ready);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<std::int64_t> budget_;
  std::int64_t max_resident_;
  std::uint64_t clock_ = 0;
  std::uint64_t generations_ = 0;
  std::map<std::int64_t, Record> records_;
  std::vector<Waiter> waiters_;
};

}  // namespace vramkit
