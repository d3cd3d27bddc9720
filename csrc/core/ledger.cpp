// See ledger.hpp. Every public function takes the one mutex; whatever may let a waiting thread go
// on notifies all of them, since they wait for different things and are few.
#include "core/ledger.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "core/error.hpp"

namespace vramkit {
namespace {

bool in_use(LedgerState state) {  // counts against the invariants' bounds
  return state == LedgerState::loading || state == LedgerState::ready ||
         state == LedgerState::leased;
}

std::string named(std::int64_t id) { return "ledger: id " + std::to_string(id); }

std::int64_t checked_bytes(std::int64_t id, std::int64_t bytes) {
  if (bytes < 0) {
    throw InvalidArgument(named(id) + " was given " + std::to_string(bytes) +
                          " bytes; sizes are 0 or more");
  }
  return bytes;
}

void require(const LedgerEntry& entry, LedgerState state, const char* call) {
  if (entry.state != state) {
    throw InvalidArgument(named(entry.id) + " is " + to_string(entry.state) + ", but " + call +
                          " needs it to be " + to_string(state));
  }
}

void check_limits(std::optional<std::int64_t> budget, std::int64_t max_resident) {
  if (budget && *budget < 0) {
    throw InvalidArgument("ledger: the budget is " + std::to_string(*budget) +
                          " bytes; it must be 0 or more, or none");
  }
  if (max_resident < 1) {
    throw InvalidArgument("ledger: max_resident is " + std::to_string(max_resident) +
                          "; it must be at least 1");
  }
}

std::int64_t add_saturated(std::int64_t a, std::int64_t b) {
  std::int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? INT64_MAX : sum;
}

}  // namespace

const char* to_string(LedgerState state) {
  switch (state) {
    case LedgerState::absent:
      return "absent";
    case LedgerState::loading:
      return "loading";
    case LedgerState::ready:
      return "ready";
    case LedgerState::leased:
      return "leased";
    case LedgerState::evicting:
      return "evicting";
  }
  return "unknown";
}

Ledger::Ledger(std::optional<std::int64_t> budget, std::int64_t max_resident)
    : budget_(budget), max_resident_(max_resident) {
  check_limits(budget, max_resident);
}

const Ledger::Record& Ledger::find(std::int64_t id) const {
  const auto found = records_.find(id);
  if (found == records_.end()) throw InvalidArgument(named(id) + " is unknown; add it first");
  return found->second;
}

Ledger::Record& Ledger::find(std::int64_t id) {
  return const_cast<Record&>(std::as_const(*this).find(id));
}

void Ledger::add(std::int64_t id, std::int64_t expected_bytes) {
  checked_bytes(id, expected_bytes);
  const std::lock_guard lock(mutex_);
  Record record;
  record.entry.id = id;
  record.entry.expected = expected_bytes;
  if (!records_.emplace(id, record).second) {
    throw InvalidArgument(named(id) + " was added already; remove it first");
  }
}

void Ledger::set_expected(std::int64_t id, std::int64_t bytes) {
  checked_bytes(id, bytes);
  const std::lock_guard lock(mutex_);
  find(id).entry.expected = bytes;
  changed_.notify_all();
}

void Ledger::remove(std::int64_t id) {
  const std::lock_guard lock(mutex_);
  require(find(id).entry, LedgerState::absent, "remove");
  records_.erase(id);
  changed_.notify_all();  // whoever waits for it has to hear that it is unknown
}

bool Ledger::fits(std::int64_t bytes, std::int64_t places) const {
  return (!budget_ || bytes <= *budget_) && places <= max_resident_;
}

// Idle ids whose going makes `bytes` and `places` fit, least recently used first; none if there
// are not enough of them.
std::optional<std::vector<std::int64_t>> Ledger::victims_for(std::int64_t bytes,
                                                             std::int64_t places,
                                                             std::int64_t exempt) const {
  std::vector<const LedgerEntry*> idle;
  for (const auto& [id, record] : records_) {
    if (record.entry.state == LedgerState::ready && id != exempt) idle.push_back(&record.entry);
  }
  std::sort(idle.begin(), idle.end(),
            [](const LedgerEntry* a, const LedgerEntry* b) { return a->last_use < b->last_use; });
  std::vector<std::int64_t> victims;
  for (const LedgerEntry* entry : idle) {
    if (fits(bytes, places)) break;
    // Where only bytes are short, one that has none would go for nothing.
    if (places <= max_resident_ && entry->bytes == 0) continue;
    bytes -= entry->bytes;
    --places;
    victims.push_back(entry->id);
  }
  if (!fits(bytes, places)) return std::nullopt;
  return victims;
}

void Ledger::start_evicting(const std::vector<std::int64_t>& victims) {
  for (std::int64_t id : victims) {
    Record& record = find(id);
    record.entry.state = LedgerState::evicting;
    record.owner = std::this_thread::get_id();
  }
}

void Ledger::make_absent(Record& record) {
  record.entry.state = LedgerState::absent;
  record.entry.bytes = 0;
  record.owner = {};
  changed_.notify_all();
}

// Could this wait end if every thread but the stuck ones went on and let go of what it holds?
bool Ledger::could_proceed(const Waiter& waiter, const std::vector<Waiter>& stuck) const {
  auto is_stuck = [&](std::thread::id thread) {
    return std::any_of(stuck.begin(), stuck.end(),
                       [&](const Waiter& other) { return other.thread == thread; });
  };
  auto pinned = [&](const Record& record) {
    switch (record.entry.state) {
      case LedgerState::loading:
      case LedgerState::evicting:
        return is_stuck(record.owner);
      case LedgerState::leased:
        return std::any_of(record.lessees.begin(), record.lessees.end(),
                           [&](const auto& lessee) { return is_stuck(lessee.first); });
      default:
        return false;
    }
  };
  const auto found = records_.find(waiter.id);
  if (found == records_.end()) return true;  // and hears that the id is unknown
  const Record& wanted = found->second;
  if (waiter.evict) return !pinned(wanted);
  if (wanted.entry.state == LedgerState::ready || wanted.entry.state == LedgerState::leased) {
    return true;
  }
  if (pinned(wanted)) return false;
  std::int64_t bytes = wanted.entry.expected, places = 1;
  for (const auto& [id, record] : records_) {
    if (!pinned(record)) continue;
    bytes = add_saturated(bytes, record.entry.bytes);
    ++places;
  }
  return fits(bytes, places);
}

void Ledger::refuse_endless_wait(const Waiter& waiter) const {
  // Whoever can go on is not stuck, and what it holds comes free; what remains waits for itself.
  std::vector<Waiter> stuck = waiters_;
  bool moved = true;
  while (moved) {
    moved = false;
    for (std::size_t i = 0; i < stuck.size(); ++i) {
      if (!could_proceed(stuck[i], stuck)) continue;
      stuck.erase(stuck.begin() + static_cast<std::ptrdiff_t>(i));
      moved = true;
      break;
    }
  }
  if (std::none_of(stuck.begin(), stuck.end(),
                   [&](const Waiter& other) { return other.thread == waiter.thread; })) {
    return;
  }
  throw Error(named(waiter.id) + (waiter.evict ? " cannot be evicted" : " cannot be loaded") +
              ": what would have to go first is in use by this thread, or by threads that wait for "
              "it; end that use first, or raise the budget or max_resident");
}

// Waits until `ready()`. False if the time ran out.
template <typename Ready>
bool Ledger::wait(std::unique_lock<std::mutex>& lock, const Waiter& waiter,
                  const std::optional<double>& timeout, Ready ready) {
  if (ready()) return true;
  using Clock = std::chrono::steady_clock;
  // A century stands for "longer than anyone waits" and keeps the sum in the clock's range.
  const double seconds = timeout ? std::clamp(*timeout, 0.0, 3.2e9) : 3.2e9;
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                           std::chrono::duration<double>(seconds));
  struct Listed {
    std::vector<Waiter>& waiters;
    std::thread::id thread;
    ~Listed() {
      std::erase_if(waiters, [&](const Waiter& other) { return other.thread == thread; });
    }
  };
  waiters_.push_back(waiter);
  const Listed listed{waiters_, waiter.thread};
  while (true) {
    refuse_endless_wait(waiter);
    const bool late = changed_.wait_until(lock, deadline) == std::cv_status::timeout;
    if (ready()) return true;
    if (late) return false;
  }
}

Admission Ledger::begin_load(std::int64_t id, std::optional<double> timeout) {
  if (timeout && std::isnan(*timeout)) throw InvalidArgument("ledger: the timeout is NaN");
  std::unique_lock lock(mutex_);
  Admission admission;
  auto ready = [&] {
    Record& record = find(id);
    LedgerEntry& entry = record.entry;
    if (entry.state == LedgerState::ready || entry.state == LedgerState::leased) {
      entry.last_use = ++clock_;
      admission = {Admission::ready, entry.generation, {}};
      return true;
    }
    if (entry.state != LedgerState::absent) return false;
    if (budget_ && entry.expected > *budget_) {
      throw BudgetError(named(id) + " is expected to take " + std::to_string(entry.expected) +
                            " bytes, more than the whole budget of " + std::to_string(*budget_),
                        entry.expected);
    }
    std::int64_t bytes = entry.expected, places = 1;
    bool evicting = false;
    for (const auto& [other, held] : records_) {
      if (held.entry.state == LedgerState::absent) continue;
      evicting = evicting || held.entry.state == LedgerState::evicting;
      bytes = add_saturated(bytes, held.entry.bytes);
      ++places;
    }
    std::optional<std::vector<std::int64_t>> victims;
    if (fits(bytes, places)) {
      victims.emplace();
    } else if (!evicting) {  // else what is going already may be enough
      victims = victims_for(bytes, places, id);
    }
    if (!victims) return false;
    start_evicting(*victims);
    entry.state = LedgerState::loading;
    entry.bytes = entry.expected;
    entry.last_use = ++clock_;
    record.owner = std::this_thread::get_id();
    admission = {Admission::load, 0, std::move(*victims)};
    return true;
  };
  if (!wait(lock, {std::this_thread::get_id(), id, false}, timeout, ready)) return {};
  return admission;
}

Placement Ledger::finish_load(std::int64_t id, std::int64_t bytes) {
  checked_bytes(id, bytes);
  const std::lock_guard lock(mutex_);
  Record& record = find(id);
  LedgerEntry& entry = record.entry;
  require(entry, LedgerState::loading, "finish_load");
  entry.expected = bytes;
  entry.bytes = bytes;
  std::int64_t total = bytes;
  for (const auto& [other, held] : records_) {
    if (other != id && in_use(held.entry.state)) total = add_saturated(total, held.entry.bytes);
  }
  // Its place was granted with the load; only the bytes can have come out larger.
  auto victims = victims_for(total, 0, id);
  if (!victims) {
    start_evicting({id});
    changed_.notify_all();
    return {};
  }
  start_evicting(*victims);
  entry.state = LedgerState::ready;
  entry.generation = ++generations_;
  entry.last_use = ++clock_;
  record.owner = {};
  changed_.notify_all();
  return {true, entry.generation, std::move(*victims)};
}

void Ledger::fail_load(std::int64_t id) {
  const std::lock_guard lock(mutex_);
  Record& record = find(id);
  require(record.entry, LedgerState::loading, "fail_load");
  make_absent(record);
}

bool Ledger::acquire(std::int64_t id, std::uint64_t generation) {
  const std::lock_guard lock(mutex_);
  const auto found = records_.find(id);
  if (found == records_.end()) return false;
  LedgerEntry& entry = found->second.entry;
  if (entry.state != LedgerState::ready && entry.state != LedgerState::leased) return false;
  if (entry.generation != generation) return false;
  entry.state = LedgerState::leased;
  ++entry.leases;
  ++found->second.lessees[std::this_thread::get_id()];
  entry.last_use = ++clock_;
  return true;
}

void Ledger::release(std::int64_t id) {
  const std::lock_guard lock(mutex_);
  Record& record = find(id);
  require(record.entry, LedgerState::leased, "release");
  // A lease may end in another thread than it began in (a generator closed elsewhere).
  auto lessee = record.lessees.find(std::this_thread::get_id());
  if (lessee == record.lessees.end()) lessee = record.lessees.begin();
  if (--lessee->second == 0) record.lessees.erase(lessee);
  record.entry.last_use = ++clock_;
  if (--record.entry.leases == 0) record.entry.state = LedgerState::ready;
  changed_.notify_all();
}

void Ledger::touch(std::int64_t id) {
  const std::lock_guard lock(mutex_);
  find(id).entry.last_use = ++clock_;
}

Ledger::Eviction Ledger::begin_evict(std::int64_t id, std::optional<double> timeout,
                                     std::uint64_t generation) {
  if (timeout && std::isnan(*timeout)) throw InvalidArgument("ledger: the timeout is NaN");
  std::unique_lock lock(mutex_);
  Eviction result = Eviction::timed_out;
  auto ready = [&] {
    const Record& record = find(id);
    const LedgerEntry& entry = record.entry;
    const bool replaced =
        generation != 0 && (entry.state == LedgerState::loading || entry.generation != generation);
    if (entry.state == LedgerState::absent || replaced) {
      result = Eviction::absent;
      return true;
    }
    if (entry.state != LedgerState::ready) return false;
    start_evicting({id});
    result = Eviction::started;
    return true;
  };
  if (!wait(lock, {std::this_thread::get_id(), id, true}, timeout, ready)) {
    return Eviction::timed_out;
  }
  return result;
}

std::int64_t Ledger::finish_evict(std::int64_t id) {
  const std::lock_guard lock(mutex_);
  Record& record = find(id);
  require(record.entry, LedgerState::evicting, "finish_evict");
  const std::int64_t bytes = record.entry.bytes;
  make_absent(record);
  return bytes;
}

void Ledger::set_limits(std::optional<std::int64_t> budget, std::int64_t max_resident) {
  check_limits(budget, max_resident);
  const std::lock_guard lock(mutex_);
  std::int64_t bytes = 0, places = 0;
  for (const auto& [id, record] : records_) {
    if (!in_use(record.entry.state)) continue;
    bytes = add_saturated(bytes, record.entry.bytes);
    ++places;
  }
  if ((budget && bytes > *budget) || places > max_resident) {
    throw BudgetError("ledger: " + std::to_string(places) + " models with " +
                          std::to_string(bytes) +
                          " bytes are in memory, more than the new limits allow; unload some first",
                      bytes);
  }
  budget_ = budget;
  max_resident_ = max_resident;
  changed_.notify_all();
}

std::optional<std::int64_t> Ledger::budget() const {
  const std::lock_guard lock(mutex_);
  return budget_;
}

std::int64_t Ledger::max_resident() const {
  const std::lock_guard lock(mutex_);
  return max_resident_;
}

LedgerEntry Ledger::entry(std::int64_t id) const {
  const std::lock_guard lock(mutex_);
  return find(id).entry;
}

std::int64_t Ledger::total_bytes() const {
  const std::lock_guard lock(mutex_);
  std::int64_t total = 0;
  for (const auto& [id, record] : records_) total = add_saturated(total, record.entry.bytes);
  return total;
}

std::vector<LedgerEntry> Ledger::snapshot() const {
  const std::lock_guard lock(mutex_);
  std::vector<LedgerEntry> entries;
  for (const auto& [id, record] : records_) entries.push_back(record.entry);
  return entries;
}

void Ledger::check() const {
  const std::lock_guard lock(mutex_);
  std::int64_t bytes = 0, places = 0;
  for (const auto& [id, record] : records_) {
    const LedgerEntry& entry = record.entry;
    auto broken = [id = id](const char* what) {
      throw Error(named(id) + " breaks an invariant: " + what);
    };
    if (in_use(entry.state)) {
      bytes = add_saturated(bytes, entry.bytes);
      ++places;
    }
    if ((entry.leases > 0) != (entry.state == LedgerState::leased)) broken("leases and its state");
    std::int64_t leases = 0;
    for (const auto& [thread, count] : record.lessees) leases += count;
    if (leases != entry.leases) broken("leases by thread do not sum up");
    if (entry.state == LedgerState::absent && entry.bytes != 0) broken("absent, but has bytes");
    const bool owned = entry.state == LedgerState::loading || entry.state == LedgerState::evicting;
    if (owned != (record.owner != std::thread::id{})) broken("its owner and its state");
    if (entry.generation > generations_) broken("a generation that was never given");
  }
  if (!fits(bytes, places)) {
    throw Error("ledger: " + std::to_string(places) + " ids with " + std::to_string(bytes) +
                " bytes are in use, past the limits");
  }
}

}  // namespace vramkit
