// See bulk_read.hpp.
#include "core/engine/bulk_read.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/engine/layout.hpp"
#include "core/error.hpp"
#include "core/platform/process.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

constexpr std::chrono::milliseconds kWatchEvery{20};

struct Piece {
  const Source* source = nullptr;
  std::int64_t offset = 0;
  std::int64_t bytes = 0;
  std::byte* dst = nullptr;
  bool in_place = false;  // direct reads may go straight to dst
};

std::int64_t misfit(const std::byte* address) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(address) %
                                   static_cast<std::uintptr_t>(kDirectUnit));
}

std::vector<Piece> cut(std::span<const std::shared_ptr<const Source>> sources,
                       std::span<const ReadRun> runs, const BulkReadOptions& options) {
  if (options.threads < 1 || options.piece < kDirectUnit || options.piece % kDirectUnit != 0) {
    throw InvalidArgument("reading takes 1 thread or more and pieces of a multiple of " +
                          std::to_string(kDirectUnit) + " bytes, not " +
                          std::to_string(options.threads) + " and " +
                          std::to_string(options.piece));
  }
  std::vector<Piece> pieces;
  for (const ReadRun& run : runs) {
    if (run.source < 0 || run.source >= static_cast<std::int64_t>(sources.size())) {
      throw InvalidArgument("there is no source " + std::to_string(run.source));
    }
    const Source& source = *sources[static_cast<std::size_t>(run.source)];
    if (run.offset < 0 || run.bytes < 0 || run.offset > source.bytes() - run.bytes) {
      throw InvalidArgument(printable(source.name()) + " has " + std::to_string(source.bytes()) +
                            " bytes, none of them " + std::to_string(run.bytes) + " at offset " +
                            std::to_string(run.offset));
    }
    if (run.dst == nullptr && run.bytes > 0) throw InvalidArgument("a run has an address");
    const std::int64_t end = run.offset + run.bytes;
    const bool fits = run.bytes > 0 && misfit(run.dst) == run.offset % kDirectUnit;
    for (std::int64_t at = run.offset; at < end;) {
      std::int64_t to = std::min(round_down_to(at, options.piece) + options.piece, end);
      bool in_place = fits;
      if (fits && !options.whole_units) {
        // Its first and its last bytes share a unit of memory with others'.
        if (at % kDirectUnit != 0) {
          to = std::min(to, round_up_to(at, kDirectUnit));
          in_place = false;
        } else if (to % kDirectUnit != 0) {
          const std::int64_t whole = round_down_to(to, kDirectUnit);
          in_place = whole > at;
          if (in_place) to = whole;
        }
      }
      pieces.push_back({&source, at, to - at, run.dst + (at - run.offset), in_place});
      at = to;
    }
  }
  return pieces;
}

// What the threads of one call share.
class Work {
 public:
  Work(std::vector<Piece> pieces, std::int64_t largest)
      : pieces_(std::move(pieces)), staging_bytes_(largest + 2 * kDirectUnit) {}

  std::size_t pieces() const { return pieces_.size(); }
  std::int64_t done() const { return done_; }

  void run() noexcept {
    name_this_thread("vramkit-read");
    Allocation staging;
    try {
      while (!stopping_) {
        const std::size_t next = next_.fetch_add(1);
        if (next >= pieces_.size()) break;
        const Piece& piece = pieces_[next];
        const ReadPath path = read(piece, staging);
        by_path_[static_cast<std::size_t>(path)] += piece.bytes;
        done_ += piece.bytes;
      }
    } catch (...) {
      fail(std::current_exception());
    }
    const std::scoped_lock lock(mutex_);
    ++ended_;
    changed_.notify_all();
  }

  void fail(std::exception_ptr error) {
    const std::scoped_lock lock(mutex_);
    if (!error_) error_ = std::move(error);
    stopping_ = true;
  }

  // Until `threads` have ended; false where `watch` broke it off.
  bool wait(std::size_t threads, const ReadWatch& watch) {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, kWatchEvery, [&] { return ended_ >= threads; })) {
      if (!watch) continue;
      lock.unlock();
      if (watch(done_)) return false;
      lock.lock();
    }
    return true;
  }

  void stop() { stopping_ = true; }

  std::array<std::int64_t, 4> result() const {
    if (error_) std::rethrow_exception(error_);
    std::array<std::int64_t, 4> by_path{};
    for (std::size_t i = 0; i < by_path.size(); ++i) by_path[i] = by_path_[i];
    return by_path;
  }

 private:
  ReadPath read(const Piece& piece, Allocation& staging) const {
    const Source& source = *piece.source;
    const ReadPath path = source.path_for(piece.offset, piece.bytes);
    if (path != ReadPath::direct || piece.in_place) {
      return source.read(path, piece.dst, piece.offset, piece.bytes);
    }
    if (!staging) staging = Allocation(memory_, staging_bytes_);
    std::byte* const at = staging.data() + piece.offset % kDirectUnit;
    const ReadPath taken = source.read(path, at, piece.offset, piece.bytes);
    std::memcpy(piece.dst, at, static_cast<std::size_t>(piece.bytes));
    return taken;
  }

  const std::vector<Piece> pieces_;
  const std::int64_t staging_bytes_;
  mutable HostMemory memory_{kDirectUnit};
  std::atomic<std::size_t> next_{0};
  std::atomic<std::int64_t> done_{0};
  std::array<std::atomic<std::int64_t>, 4> by_path_{};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t ended_ = 0;
  std::exception_ptr error_;
};

// Whatever happens, no thread outlives the memory that it writes to.
class Threads {
 public:
  Threads(Work& work, std::size_t count) : work_(work) {
    try {
      threads_.reserve(count);
      for (std::size_t i = 0; i < count; ++i) threads_.emplace_back([&work] { work.run(); });
    } catch (const std::system_error&) {
      if (threads_.empty()) throw;  // else fewer will do
    }
  }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  ~Threads() {
    work_.stop();
    for (std::thread& thread : threads_) thread.join();
  }
  std::size_t count() const { return threads_.size(); }

 private:
  Work& work_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::array<std::int64_t, 4> read_runs(std::span<const std::shared_ptr<const Source>> sources,
                                      std::span<const ReadRun> runs, const BulkReadOptions& options,
                                      const ReadWatch& watch) {
  Work work(cut(sources, runs, options), options.piece);
  if (work.pieces() == 0) return {};
  const auto wanted = static_cast<std::size_t>(options.threads);
  {
    const Threads threads(work, std::min(wanted, work.pieces()));
    if (!work.wait(threads.count(), watch)) throw Interrupted("reading was broken off");
  }
  const std::array<std::int64_t, 4> by_path = work.result();
  if (watch && watch(work.done())) throw Interrupted("reading was broken off at its end");
  return by_path;
}

}  // namespace vramkit
