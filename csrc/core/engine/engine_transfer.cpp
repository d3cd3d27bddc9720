// The threads that copy. They know pieces; which blocks, and where to, is decided in engine.cpp.
#include <algorithm>
#include <utility>

#include "core/engine/engine.hpp"
#include "core/error.hpp"
#include "core/platform/process.hpp"

namespace vramkit {

void Engine::start_threads() {
  try {
    for (auto& worker : workers_) {
      worker->thread = std::thread([this, &worker = *worker] { work(worker); });
    }
  } catch (...) {  // the system gives no thread: a constructor that throws runs no destructor
    stop_threads();
    throw;
  }
}

void Engine::stop_threads() noexcept {
  if (current_process() != process_) {
    // A fork's copy: the threads are the other process's.
    for (auto& worker : workers_) {
      if (worker->thread.joinable()) worker->thread.detach();
    }
    static_cast<void>(sync_.release());
    return;
  }
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (auto& worker : workers_) {
    if (worker->thread.joinable()) worker->thread.join();
  }
}

void Engine::work(Worker& worker) {
  name_this_thread("vramkit-copy");
  Lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    Block& block = blocks_[static_cast<std::size_t>(queue_.front())];
    if (block.state == BlockStatus::requested) {
      block.state = BlockStatus::copying;
      if (copying_++ == 0) active_since_ = now();
    }
    const std::span<const Piece> pieces(&block.pieces[block.taken], pieces_at_once(block));
    block.taken += pieces.size();
    if (block.taken == block.pieces.size()) dequeue(block);
    ++block.at_work;
    Place& place = *block.place;
    const std::int64_t begin = now();

    lock.unlock();
    std::exception_ptr error;
    ReadPath path = ReadPath::memory;
    try {
      path = transfer(worker, pieces, place);
    } catch (...) {
      error = std::current_exception();
      drain(worker);
    }
    lock.lock();

    --block.at_work;
    stats_.copy_ns += now() - begin;
    record(TimelineRecord::copy, block, worker.index, begin);
    if (error) {
      block.error = error;
      block.failing = true;
      dequeue(block);
    } else {
      block.arrived += pieces.size();
      place.lanes |= std::uint64_t{1} << worker.index;
      for (const Piece& piece : pieces) {
        stats_.bytes_copied += piece.bytes;
        stats_.bytes_by_path[static_cast<std::size_t>(path)] += piece.bytes;
      }
    }
    if (block.at_work == 0) finish(block);
    debug_check();
  }
}

void Engine::leave_copying() {
  if (--copying_ == 0) stats_.active_ns += now() - active_since_;
}

// No thread is at work on the block any more.
void Engine::finish(Block& block) {
  if (block.failing) {
    // Not scheduled again from here: it would fail again, for ever.
    ++stats_.failed;
    ++block.failures;
    make_absent(block);
  } else if (block.dropped) {
    ++stats_.cancelled;
    make_absent(block);
    schedule();
  } else if (block.arrived == block.pieces.size()) {
    leave_copying();
    block.state = BlockStatus::ready;
    ++block.stats.loads, ++stats_.loads;
    notify();
    settle(block);
  }
}

// After a failure nothing is under way: the place and the staging memory may be used for another.
void Engine::drain(Worker& worker) noexcept {
  try {
    worker.lane->record(*worker.copied[0]);
    backend_->synchronize(*worker.copied[0]);
  } catch (...) {
    backend_->drain();
  }
}

// Small pieces that need no reading are handed over together: each hand-over has a price.
std::size_t Engine::pieces_at_once(const Block& block) const {
  std::size_t count = 0;
  std::int64_t bytes = 0;
  for (std::size_t at = block.taken; at < block.pieces.size() && count < kTogether; ++at) {
    const Piece& piece = block.pieces[at];
    bytes += piece.bytes;
    if (count > 0 && (!piece.by_lane || bytes > options_.piece)) break;
    ++count;
    if (!piece.by_lane) break;
  }
  return count;
}

// One piece, or several that a lane copies by itself.
ReadPath Engine::transfer(Worker& worker, std::span<const Piece> pieces, Place& place) {
  // What was done with the place before: by the arithmetic, and by loads that nobody used.
  if (place.used) worker.lane->wait(*place.released);
  for (std::size_t lane = 0; lane < place.arrived.size(); ++lane) {
    if ((place.lanes_before >> lane & 1) != 0) worker.lane->wait(*place.arrived[lane]);
  }
  const Piece& piece = pieces.front();
  std::byte* const dst = place.address + piece.block_offset;
  ReadPath path = piece.source->path_for(piece.offset, piece.bytes);
  if (piece.by_lane) {
    for (std::size_t at = 0; at < pieces.size(); ++at) {
      const Piece& each = pieces[at];
      worker.copies[at] = {place.address + each.block_offset, each.source->memory() + each.offset,
                           each.bytes};
    }
    worker.lane->copy({worker.copies.data(), pieces.size()});
  } else if (backend_->host_addressable() && (path != ReadPath::direct || piece.in_place)) {
    path = piece.source->read(path, dst, piece.offset, piece.bytes);
  } else {
    through_staging(worker, piece, dst, path);
  }
  worker.lane->record(*place.arrived[static_cast<std::size_t>(worker.index)]);
  return path;
}

// By two halves in turn: one is filled while the device still copies from the other.
void Engine::through_staging(Worker& worker, const Piece& piece, std::byte* dst, ReadPath path) {
  const std::int64_t most = worker.half - 2 * kDirectUnit;
  std::size_t half = 0;
  for (std::int64_t done = 0; done < piece.bytes; half = 1 - half) {
    const std::int64_t at = piece.offset + done;
    // Up to a unit's end, so that none is read twice.
    const std::int64_t bytes =
        std::min(piece.bytes - done, round_down_to(at, kDirectUnit) + most - at);
    std::byte* const stage =
        worker.staging.data() + static_cast<std::int64_t>(half) * worker.half + at % kDirectUnit;
    backend_->synchronize(*worker.copied[half]);
    path = piece.source->read(path, stage, at, bytes);
    const CopyRange copy{dst + done, stage, bytes};
    worker.lane->copy({&copy, 1});
    worker.lane->record(*worker.copied[half]);
    done += bytes;
  }
}

}  // namespace vramkit
