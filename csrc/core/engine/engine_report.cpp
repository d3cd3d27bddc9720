// What the engine says of itself: counts, times, and whether its invariants hold. See engine.hpp.
#include <algorithm>
#include <string>

#include "core/engine/engine.hpp"
#include "core/error.hpp"
#include "core/text.hpp"

namespace vramkit {

void Engine::record(TimelineRecord::Kind kind, const Block& block, std::int64_t thread,
                    std::int64_t begin) {
  if (timeline_most_ == 0) return;
  const TimelineRecord entry{kind, id_of(block), thread, begin, now()};
  if (timeline_.size() < timeline_most_) {
    timeline_.push_back(entry);
  } else {
    timeline_[timeline_next_] = entry;
  }
  timeline_next_ = (timeline_next_ + 1) % timeline_most_;
}

std::vector<TimelineRecord> Engine::timeline() const {
  std::vector<TimelineRecord> records;
  {
    const Lock lock = locked();
    records = timeline_;
  }
  std::stable_sort(records.begin(), records.end(),
                   [](const auto& a, const auto& b) { return a.begin_ns < b.begin_ns; });
  return records;
}

void Engine::keep_timeline(std::int64_t records) {
  if (records < 0) throw InvalidArgument("a timeline keeps 0 records or more");
  std::vector<TimelineRecord> fresh;
  fresh.reserve(static_cast<std::size_t>(records));
  const Lock lock = locked();
  timeline_.swap(fresh);
  timeline_most_ = static_cast<std::size_t>(records);
  timeline_next_ = 0;
}

EngineStats Engine::stats() const {
  const Lock lock = locked();
  EngineStats stats = stats_;
  stats.committed = limited_.committed();
  stats.staging = staging_bytes_;
  stats.slots = static_cast<std::int64_t>(slots_.size());
  stats.slot_bytes = slots_bytes_;
  for (const Block& block : blocks_) {
    if (!block.resident) continue;
    ++stats.residents;
    stats.resident_bytes += block.spec.bytes;
  }
  if (copying_ > 0) stats.active_ns += now() - active_since_;
  stats.commits = counted_.counts().commits;
  return stats;
}

BlockStats Engine::block_stats(std::int64_t block) const {
  const Lock lock = locked();
  BlockStats stats = at(block).stats;
  stats.state = at(block).state;
  stats.resident = at(block).resident;
  for (const Piece& piece : at(block).pieces) stats.bytes += piece.bytes;
  return stats;
}

void Engine::check() const {
  const Lock lock = locked();
  check_locked();
}

void Engine::debug_check() const {
#ifndef NDEBUG
  check_locked();
#endif
}

void Engine::check_locked() const {
  auto require = [](bool holds, const Block& block, const char* what) {
    if (!holds) {
      throw Error("engine: block '" + printable(block.spec.name) + "', " + to_string(block.state) +
                  ": " + what);
    }
  };
  std::int64_t copying = 0, leaving = 0, absent = 0;
  for (const Block& block : blocks_) {
    const BlockStatus state = block.state;
    require((state == BlockStatus::absent) == (block.place == nullptr), block,
            "a block has a place unless it is absent");
    if (block.place != nullptr) {
      require(block.place->block == id_of(block), block, "its place has another block");
      require(block.place->bytes >= block.spec.bytes, block, "its place is too small");
    }
    require(block.home.block < 0 || block.place == &block.home, block,
            "a home has its own block or none");
    require(block.lessees.empty() == (state != BlockStatus::in_use), block,
            "leases make a block in use");
    require(block.at_work == 0 || state == BlockStatus::copying, block,
            "threads are at work on blocks that are copying only");
    require(block.taken >= block.arrived && block.taken <= block.pieces.size(), block,
            "pieces arrive after they were taken");
    const bool moving = state == BlockStatus::requested || state == BlockStatus::copying;
    require(queued(block) ==
                (moving && !block.dropped && !block.failing && block.taken < block.pieces.size()),
            block, "the queue has what is to be copied");
    require(state != BlockStatus::requested || block.taken == 0, block,
            "no piece is taken of a block that is requested");
    require(!there(state) || block.arrived == block.pieces.size(), block,
            "all pieces have arrived of a block that is there");
    require(state != BlockStatus::copying || !(block.dropped || block.failing) || block.at_work > 0,
            block, "a dropped block ends when its last thread does");
    copying += state == BlockStatus::copying ? 1 : 0;
    absent += state == BlockStatus::absent ? 1 : 0;
    if (block.place == &block.home && !block.resident) leaving += block.home.bytes;
  }
  for (const Place& slot : slots_) {
    if (slot.block >= 0 && at(slot.block).place != &slot) {
      require(false, at(slot.block), "is in a slot that it does not know of");
    }
  }
  if (copying != copying_ || absent != absent_) {
    throw Error("engine: blocks that are absent or copying are miscounted");
  }
  if (leaving == 0 && limited_.committed() > stats_.limit) {
    throw Error("engine: " + std::to_string(limited_.committed()) +
                " bytes are in use, more than the limit of " + std::to_string(stats_.limit));
  }
}

}  // namespace vramkit
