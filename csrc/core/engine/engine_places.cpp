// Who lies where, what waits to be copied, and what is loaded ahead of need. All of it is called
// under the mutex. See engine.hpp.
#include <algorithm>
#include <cassert>

#include "core/engine/engine.hpp"
#include "core/error.hpp"

namespace vramkit {
namespace {

constexpr std::uint8_t kPoison = 0xFF;  // NaN in every floating type

}  // namespace

Engine::Rank Engine::rank(const Place& place) const {
  if (place.block < 0) return Rank::idle;
  const Block& block = blocks_[static_cast<std::size_t>(place.block)];
  if (block.waiters > 0) return Rank::held;
  switch (block.state) {
    case BlockStatus::released:
      return Rank::idle;
    case BlockStatus::requested:
    case BlockStatus::ready:
      return Rank::prefetched;
    case BlockStatus::copying:
      return Rank::copying;
    default:
      return Rank::held;
  }
}

// Makes a place free, at once (true) or as soon as threads have let go of it.
bool Engine::vacate(Place& place) {
  if (place.block < 0) return true;
  Block& block = blocks_[static_cast<std::size_t>(place.block)];
  if (rank(place) == Rank::held) return false;
  if (block.state == BlockStatus::copying && block.at_work > 0) {
    block.dropped = true;
    dequeue(block);
    return false;
  }
  if (block.state == BlockStatus::ready) ++stats_.dropped;
  if (block.state == BlockStatus::requested || block.state == BlockStatus::copying) {
    ++stats_.cancelled;
  }
  make_absent(block);
  return true;
}

void Engine::make_absent(Block& block) {
  assert(block.state != BlockStatus::in_use && block.at_work == 0);
  dequeue(block);
  if (block.state == BlockStatus::copying) leave_copying();
  Place& place = *block.place;
  block.state = BlockStatus::absent;
  block.place = nullptr;
  block.dropped = block.stale = block.failing = false;
  block.taken = block.arrived = 0;
  ++absent_;
  place.block = -1;
  if (options_.poison && place.bytes > 0) {
    quiesce(place);
    try {
      backend_->fill(place.address, kPoison, place.bytes);
    } catch (const Error&) {  // NOLINT(bugprone-empty-catch): tests see less, nobody sees wrong
    }
  }
  if (&place == &block.home) {
    quiesce(place);
    arena_->decommit(place.offset, place.bytes);
  }
  place.address = nullptr;
  notify();
}

// Waits until the device is done with a place: its arithmetic, and copies that nobody waited for.
void Engine::quiesce(Place& place) noexcept {
  try {
    if (place.used) backend_->synchronize(*place.released);
    for (std::size_t lane = 0; lane < place.arrived.size(); ++lane) {
      if (((place.lanes | place.lanes_before) >> lane & 1) != 0) {
        backend_->synchronize(*place.arrived[lane]);
      }
    }
  } catch (...) {
    backend_->drain();
  }
  place.used = false;
  place.lanes = place.lanes_before = 0;
}

// A resident that had to go goes as soon as nobody holds it.
void Engine::settle(Block& block) {
  if (block.place == &block.home && !block.resident) vacate(block.home);
}

bool Engine::slots_ready() {
  if (slots_committed_) return true;
  if (limited_.committed() + arena_->cost(0, slots_bytes_) > limited_.limit()) return false;
  arena_->commit(0, slots_bytes_);
  slots_committed_ = true;
  return true;
}

// The block's home with memory behind it, or null where there is none to be had now.
Engine::Place* Engine::home_for(Block& block) {
  const std::int64_t cost = arena_->cost(block.home.offset, block.home.bytes);
  if (limited_.committed() + cost > limited_.limit()) return nullptr;
  try {
    arena_->commit(block.home.offset, block.home.bytes);
  } catch (const OutOfMemoryError&) {
    if (block.spec.residence == Residence::resident) throw;
    // The system has less than the limit says: what cannot stay is streamed.
    block.resident = false;
    ++stats_.given_up;
    return nullptr;
  }
  return &block.home;
}

Engine::Place* Engine::place_for(Block& block) {
  if (block.resident) {
    if (Place* home = home_for(block)) return home;
  }
  if (block.slot < 0 || !slots_ready()) return nullptr;
  Place& own = slots_[static_cast<std::size_t>(block.slot)];
  if (rank(own) <= Rank::prefetched) {
    vacate(own);
    return &own;
  }
  for (const Rank most : {Rank::idle, Rank::prefetched}) {
    for (Place& other : slots_) {
      if (other.bytes < block.home.bytes || rank(other) > most) continue;
      vacate(other);
      return &other;
    }
  }
  return vacate(own) ? &own : nullptr;
}

bool Engine::queued(const Block& block) const {
  return std::find(queue_.begin(), queue_.end(), id_of(block)) != queue_.end();
}

void Engine::dequeue(const Block& block) {
  const auto found = std::find(queue_.begin(), queue_.end(), id_of(block));
  if (found != queue_.end()) queue_.erase(found);
}

void Engine::enqueue(const Block& block, bool first) {
  dequeue(block);
  queue_.insert(first ? queue_.begin() : queue_.end(), id_of(block));
  work_.notify_all();
}

void Engine::request(Block& block, Place& place, bool first) {
  assert(block.state == BlockStatus::absent && place.block < 0);
  place.block = id_of(block);
  --absent_;
  // Of all earlier ones: one that was given up before its first piece has waited for none.
  place.lanes_before |= place.lanes;
  place.lanes = 0;
  place.address = limited_.resolve(arena_->base() + place.offset);
  block.place = &place;
  block.state = BlockStatus::requested;
  block.taken = block.arrived = 0;
  if (&place != &block.home && &place != &slots_[static_cast<std::size_t>(block.slot)]) {
    ++stats_.displaced;
  }
  if (block.pieces.empty()) {
    block.state = BlockStatus::ready;
    ++block.stats.loads, ++stats_.loads;
    notify();
    return;
  }
  enqueue(block, first);
}

// What is called next is loaded while there are places for it. Never fails: what is wrong comes to
// light when the block itself is called.
void Engine::schedule() {
  if (stopping_ || parked_ || absent_ == 0) return;
  try {
    look_ahead();
  } catch (const Error&) {  // NOLINT(bugprone-empty-catch)
  }
}

void Engine::look_ahead() {
  ahead_.clear();
  std::fill(claimed_.begin(), claimed_.end(), false);
  std::int64_t wanted = 0;
  while (wanted < options_.depth && ahead_.size() < kFarthest) {
    const std::int64_t next = predictor_.next(ahead_);
    if (next < 0) return;
    ahead_.push_back(next);
    Block& block = blocks_[static_cast<std::size_t>(next)];
    if (block.state == BlockStatus::absent && block.resident) {
      if (Place* home = home_for(block)) {
        request(block, *home, false);
        ++wanted;
        continue;
      }
    }
    if (block.state == BlockStatus::absent) {
      ++wanted;
      if (block.slot < 0 || !slots_ready()) continue;
      const auto slot = static_cast<std::size_t>(block.slot);
      if (claimed_[slot]) return;  // the one before it has to be through first
      claimed_[slot] = true;
      if (vacate(slots_[slot])) request(block, slots_[slot], false);
      continue;
    }
    if (block.place != &block.home) {
      claimed_[static_cast<std::size_t>(block.place - slots_.data())] = true;
      if (block.state != BlockStatus::in_use) ++wanted;
    } else if (block.state == BlockStatus::requested || block.state == BlockStatus::copying) {
      ++wanted;
    }
  }
}

}  // namespace vramkit
