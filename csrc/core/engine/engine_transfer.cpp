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
  Lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    Block& block = blocks_[static_cast<std::size_t>(queue_.front())];
    if (block.state == BlockStatus::requested) {
      block.state = BlockStatus::copying;
      if (copying_++ == 0) active_since_ = now();
    }
    const Piece& piece = block.pieces[block.taken++];
    if (block.taken == block.pieces.size()) dequeue(block);
    ++block.at_work;
    Place& place = *block.place;
    const std::int64_t begin = now();

    lock.unlock();
    std::exception_ptr error;
    ReadPath path = ReadPath::memory;
    try {
      path = transfer(worker, piece, place);
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
      ++block.arrived;
      place.lanes |= std::uint64_t{1} << worker.index;
      stats_.bytes_copied += piece.bytes;
      stats_.bytes_by_path[static_cast<std::size_t>(path)] += piece.bytes;
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
  } catch (...) {  // NOLINT(bugprone-empty-catch): a broken device says so at the next call
  }
}

ReadPath Engine::transfer(Worker& worker, const Piece& piece, Place& place) {
  std::byte* const dst = arena_->base() + place.offset + piece.block_offset;
  // What was done with the place before: by the arithmetic, and by loads that nobody used.
  if (place.used) worker.lane->wait(*place.released);
  for (std::size_t lane = 0; lane < place.arrived.size(); ++lane) {
    if ((place.lanes_before >> lane & 1) != 0) worker.lane->wait(*place.arrived[lane]);
  }
  ReadPath path = piece.source->path_for(piece.offset, piece.bytes);
  if (const std::byte* memory = piece.source->memory()) {
    worker.lane->copy(dst, memory + piece.offset, piece.bytes);
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
    worker.lane->copy(dst + done, stage, bytes);
    worker.lane->record(*worker.copied[half]);
    done += bytes;
  }
}

}  // namespace vramkit
