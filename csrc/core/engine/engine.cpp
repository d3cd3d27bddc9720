// Calls, states and limits; see engine.hpp. Every public function takes the one mutex. It is not
// held while bytes are copied, nor while the caller's interrupt runs.
#include "core/engine/engine.hpp"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <string>
#include <utility>

#include "core/error.hpp"
#include "core/platform/process.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

constexpr std::chrono::milliseconds kSlice{50};  // between two questions to an interrupt
constexpr std::size_t kLeases = 8;               // of one block at once, without an allocation

std::int64_t steady_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

EngineConfig checked(EngineConfig config) {
  const EngineOptions& o = config.options;
  if (config.backend == nullptr) throw InvalidArgument("an engine needs a backend");
  if (o.depth < 1 || o.slots < 1 || o.threads < 1 || o.threads > 64 || o.piece < 1 ||
      o.timeline < 0 || o.limit < 0) {
    throw InvalidArgument(
        "an engine's depth, slots, threads (at most 64) and piece are at least 1, its limit and "
        "timeline at least 0");
  }
  for (const auto& source : config.sources) {
    if (source == nullptr) throw InvalidArgument("an engine's source is missing");
  }
  if (config.order.empty()) {
    for (std::size_t block = 0; block < config.blocks.size(); ++block) {
      config.order.push_back(static_cast<std::int64_t>(block));
    }
  }
  return config;
}

// Counts for as long as it lives. Both ends are under the mutex.
class Counted {
 public:
  Counted(std::int64_t& a, std::int64_t& b) : a_(a), b_(b) { ++a_, ++b_; }
  ~Counted() { --a_, --b_; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 private:
  std::int64_t& a_;
  std::int64_t& b_;
};

}  // namespace

const char* to_string(BlockStatus state) {
  switch (state) {
    case BlockStatus::absent:
      return "absent";
    case BlockStatus::requested:
      return "requested";
    case BlockStatus::copying:
      return "copying";
    case BlockStatus::ready:
      return "ready";
    case BlockStatus::in_use:
      return "in_use";
    case BlockStatus::released:
      return "released";
  }
  return "unknown";
}

Engine::Engine(EngineConfig given) : Engine(checked(std::move(given)), Checked{}) {}

Engine::Engine(EngineConfig config, Checked)
    : backend_(std::move(config.backend)),
      sources_(std::move(config.sources)),
      options_(config.options),
      process_(current_process()),
      epoch_(steady_ns()),
      counted_(backend_->memory()),
      limited_(counted_, options_.limit),
      blocks_(config.blocks.size()),
      predictor_(static_cast<std::int64_t>(config.blocks.size()), config.order) {
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    blocks_[index].spec = std::move(config.blocks[index]);
    blocks_[index].lessees.reserve(kLeases);
    cut_pieces(blocks_[index]);
  }
  find_ring(config.order);
  const std::int64_t half = staging_half();
  if (backend_->host_addressable()) {
    staging_bytes_ = options_.threads * round_up_to(2 * half, limited_.granularity());
  }
  lay_out(config.order);
  const std::vector<bool> resident = residents_for(options_.limit);
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    blocks_[index].resident = resident[index];
  }
  share_slots(config.order, resident);
  make_workers(half);
  arena_ = std::make_unique<Arena>(limited_, arena_bytes_);
  absent_ = static_cast<std::int64_t>(blocks_.size());
  stats_.limit = options_.limit;
  // Here, so that a machine without the memory says so at once.
  if (std::find(resident.begin(), resident.end(), false) != resident.end()) {
    arena_->commit(0, slots_bytes_);
    slots_committed_ = true;
  }
  queue_.reserve(blocks_.size());
  waiting_.reserve(kFarthest);
  ahead_.reserve(kFarthest);
  claimed_.resize(slots_.size());
  timeline_most_ = static_cast<std::size_t>(options_.timeline);
  timeline_.reserve(timeline_most_);
  start_threads();
}

Engine::~Engine() {
  stop_threads();
  // What is still leased, or on its way: the memory goes away beneath it.
  if (current_process() == process_ && arena_->committed() > 0) backend_->drain();
}

Engine::Block& Engine::at(std::int64_t block) {
  return const_cast<Block&>(std::as_const(*this).at(block));
}

const Engine::Block& Engine::at(std::int64_t block) const {
  if (block < 0 || block >= blocks()) {
    throw InvalidArgument("there is no block " + std::to_string(block) + " among " +
                          std::to_string(blocks()));
  }
  return blocks_[static_cast<std::size_t>(block)];
}

const BlockSpec& Engine::spec(std::int64_t block) const { return at(block).spec; }
std::int64_t Engine::slot_of(std::int64_t block) const { return at(block).slot; }

void Engine::require_open() const {
  if (closed_) throw InvalidArgument("the engine is closed");
}

Engine::Lock Engine::locked() const {
  // Before the mutex, which a thread may have held when the process was forked.
  if (current_process() != process_) {
    throw Error(
        "an offload engine works in the process that made it only, and this one was forked from "
        "it: make an engine here");
  }
  return Lock(mutex_);
}

std::int64_t Engine::now() const { return steady_ns() - epoch_; }

void Engine::notify() {
  ++changes_;
  if (waiters_ > 0) changed_.notify_all();
}

template <typename Done>
void Engine::wait(Lock& lock, const Interrupt& interrupt, Done done) {
  while (!done()) {
    if (closed_) throw InvalidArgument("the engine was closed during a wait");
    if (!interrupt) {
      changed_.wait(lock);
      continue;
    }
    changed_.wait_for(lock, kSlice);
    if (done()) return;
    lock.unlock();
    bool stop = false;
    try {
      stop = interrupt();
    } catch (...) {
      lock.lock();
      throw;
    }
    lock.lock();
    if (stop) throw Interrupted("a wait for a block was broken off");
  }
}

std::byte* Engine::acquire(std::int64_t id, StreamHandle stream, const Interrupt& interrupt) {
  Lock lock = locked();
  require_open();
  Block& block = at(id);
  refuse_other_stream(block, stream);
  parked_ = false;
  ++block.stats.acquires, ++stats_.acquires;
  predictor_.observe(id);
  if (there(block.state)) {
    ++block.stats.hits, ++stats_.hits;
  } else {
    const std::int64_t begin = now();
    ++stats_.waits;
    try {
      fetch(lock, block, interrupt);
    } catch (...) {
      settle(block);
      notify();  // its place may be had by another now
      debug_check();
      throw;
    }
    const std::int64_t waited = now() - begin;
    block.stats.wait_ns += waited;
    stats_.wait_ns += waited;
    record(TimelineRecord::wait, block, -1, begin);
  }
  lease(block, stream);
  schedule();
  debug_check();
  return block.place->address;
}

void Engine::fetch(Lock& lock, Block& block, const Interrupt& interrupt) {
  const Counted waiting(block.waiters, waiters_);
  const std::int64_t failures = block.failures;
  bool scheduled = false;
  while (!there(block.state)) {
    if (closed_) throw InvalidArgument("the engine was closed during a wait");
    if (block.failures != failures) std::rethrow_exception(block.error);
    if (block.state == BlockStatus::absent) {
      if (Place* place = place_for(block)) {
        request(block, *place, true);
        if (!std::exchange(scheduled, true)) schedule();
        continue;
      }
      const std::thread::id me = std::this_thread::get_id();
      waiting_.push_back(me);
      try {
        refuse_endless_wait(block);
        changed_.notify_all();  // whoever waits for what this thread holds looks again
        const std::uint64_t seen = ++changes_;
        wait(lock, interrupt, [&] { return changes_ != seen; });
      } catch (...) {
        waiting_.erase(std::find(waiting_.begin(), waiting_.end(), me));
        throw;
      }
      waiting_.erase(std::find(waiting_.begin(), waiting_.end(), me));
      continue;
    }
    if (block.dropped && !block.stale && !block.failing) {
      block.dropped = false;  // wanted after all: what has arrived is still right
      if (block.taken < block.pieces.size()) enqueue(block, true);
    } else if (queued(block)) {
      enqueue(block, true);
    }
    const std::uint64_t seen = changes_;
    wait(lock, interrupt, [&] { return changes_ != seen; });
  }
}

// Called by a thread that found no place, with itself in waiting_.
void Engine::refuse_endless_wait(const Block& block) const {
  std::string holders;
  for (const Block& other : blocks_) {
    if (other.state == BlockStatus::requested || other.state == BlockStatus::copying ||
        (there(other.state) && other.waiters > 0)) {
      return;  // it is on its way, or about to be leased and released: that changes things
    }
    if (other.state != BlockStatus::in_use) continue;
    for (const std::thread::id& lessee : other.lessees) {
      if (std::find(waiting_.begin(), waiting_.end(), lessee) == waiting_.end()) return;
    }
    holders += (holders.empty() ? "'" : ", '") + printable(other.spec.name) + "'";
  }
  throw BudgetError("block '" + printable(block.spec.name) + "' of " +
                        std::to_string(block.spec.bytes) +
                        " bytes finds no place: all that could go is in use by threads that wait "
                        "themselves (" +
                        holders + "); release blocks before calling more, or allow more slots",
                    limited_.committed() + block.home.bytes);
}

void Engine::refuse_other_stream(const Block& block, StreamHandle stream) const {
  if (block.state == BlockStatus::in_use && block.stream != stream) {
    throw InvalidArgument("block '" + printable(block.spec.name) +
                          "' is in use on another stream; one stream at a time may use a block");
  }
}

void Engine::lease(Block& block, StreamHandle stream) {
  refuse_other_stream(block, stream);  // it may have come, and been taken, during a wait
  Place& place = *block.place;
  for (std::size_t lane = 0; lane < place.arrived.size(); ++lane) {
    if ((place.lanes >> lane & 1) != 0) backend_->wait(*place.arrived[lane], stream);
  }
  // Another stream read the block before: whoever waits for this one waits for both.
  if (place.used && place.stream != stream) backend_->wait(*place.released, stream);
  block.lessees.push_back(std::this_thread::get_id());
  if (block.state != BlockStatus::in_use) {
    block.state = BlockStatus::in_use;
    block.stream = stream;
    block.since_ns = now();
  }
}

void Engine::release(std::int64_t id, StreamHandle stream) {
  const Lock lock = locked();
  require_open();
  Block& block = at(id);
  if (block.state != BlockStatus::in_use) {
    throw InvalidArgument("block '" + printable(block.spec.name) + "' is not in use");
  }
  if (block.stream != stream) {
    throw InvalidArgument("block '" + printable(block.spec.name) +
                          "' was acquired on another stream");
  }
  auto mine = std::find(block.lessees.begin(), block.lessees.end(), std::this_thread::get_id());
  if (mine == block.lessees.end()) mine = block.lessees.end() - 1;  // another's: it may be so
  std::exception_ptr failure;
  if (block.lessees.size() == 1) {
    Place& place = *block.place;
    try {
      backend_->record(*place.released, stream);
      place.used = true;
    } catch (...) {
      // Nothing will tell when the arithmetic is over, so it has to be now.
      failure = std::current_exception();
      backend_->drain();
      place.used = false;
    }
    place.stream = stream;
  }
  block.lessees.erase(mine);
  if (!block.lessees.empty()) {
    notify();
    return;
  }
  block.state = BlockStatus::released;
  record(TimelineRecord::use, block, -1, block.since_ns);
  settle(block);
  notify();
  schedule();
  debug_check();
  if (failure) std::rethrow_exception(failure);
}

bool Engine::prefetch(std::int64_t id) {
  const Lock lock = locked();
  require_open();
  parked_ = false;
  Block& block = at(id);
  if (block.state != BlockStatus::absent) return !block.dropped;
  Place* place = block.resident ? home_for(block) : nullptr;
  if (place == nullptr && block.slot >= 0 && slots_ready()) {
    place = &slots_[static_cast<std::size_t>(block.slot)];
    if (rank(*place) != Rank::idle || !vacate(*place)) place = nullptr;
  }
  if (place != nullptr) request(block, *place, false);
  debug_check();
  return place != nullptr;
}

void Engine::invalidate(std::int64_t id, const Interrupt& interrupt) {
  Lock lock = locked();
  require_open();
  Block& block = at(id);
  if (block.state == BlockStatus::in_use) {
    throw InvalidArgument("block '" + printable(block.spec.name) +
                          "' is in use; release it before its source changes");
  }
  std::int64_t mine = 0;
  while (block.state != BlockStatus::absent) {
    if (block.state == BlockStatus::in_use) break;  // loaded again, and called, since
    if (block.at_work == 0) {
      if (block.state == BlockStatus::ready) ++stats_.dropped;
      make_absent(block);
      break;
    }
    block.dropped = block.stale = true;
    dequeue(block);
    const std::uint64_t seen = changes_;
    const Counted waiting(mine, waiters_);
    wait(lock, interrupt, [&] { return changes_ != seen; });
    if (!block.stale) break;  // it was absent in between
  }
  debug_check();
}

std::int64_t Engine::minimum() const {
  const Lock lock = locked();
  return least();
}

void Engine::resize(std::int64_t limit) {
  const Lock lock = locked();
  require_open();
  set_limit(limit);
  debug_check();
}

std::int64_t Engine::give_up(std::int64_t bytes) {
  const Lock lock = locked();
  require_open();
  if (bytes < 0) throw InvalidArgument("0 bytes or more are given up");
  const std::int64_t before = cost(residents_now());
  set_limit(std::max(least(), before - bytes));
  debug_check();
  return before - cost(residents_now());
}

std::int64_t Engine::park(const Interrupt& interrupt) {
  Lock lock = locked();
  require_open();
  const std::int64_t before = limited_.committed();
  parked_ = true;
  for (Block& block : blocks_) {
    while (block.state != BlockStatus::absent) {
      if (block.state == BlockStatus::in_use || block.waiters > 0) {
        throw InvalidArgument("block '" + printable(block.spec.name) +
                              "' is in use; release all blocks before parking the engine");
      }
      Place& place = *block.place;
      if (vacate(place)) break;
      const std::uint64_t seen = changes_;
      std::int64_t mine = 0;
      const Counted waiting(mine, waiters_);
      wait(lock, interrupt, [&] { return changes_ != seen; });
    }
  }
  // A thread that came in during a wait has taken it up again.
  if (parked_ && slots_committed_) {
    for (Place& slot : slots_) quiesce(slot);
    arena_->decommit(0, slots_bytes_);
    slots_committed_ = false;
  }
  debug_check();
  return before - limited_.committed();
}

void Engine::close() {
  {
    Lock lock = locked();
    if (closed_) return;
    require_open();
    for (const Block& block : blocks_) {
      if (block.state == BlockStatus::in_use) {
        throw InvalidArgument("block '" + printable(block.spec.name) +
                              "' is in use; release all blocks before closing the engine");
      }
    }
    closed_ = true;
    notify();
    while (waiters_ > 0) {
      changed_.notify_all();
      lock.unlock();
      std::this_thread::yield();
      lock.lock();
    }
  }
  stop_threads();
  const Lock lock = locked();
  for (Block& block : blocks_) {
    if (block.state != BlockStatus::absent) make_absent(block);
  }
  for (Place& slot : slots_) quiesce(slot);
  if (slots_committed_) arena_->decommit(0, slots_bytes_);
  slots_committed_ = false;
  for (auto& worker : workers_) worker->staging.reset();
  staging_bytes_ = 0;
}

bool Engine::closed() const {
  const Lock lock = locked();
  return closed_;
}

}  // namespace vramkit
