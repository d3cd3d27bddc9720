// The offload engine: blocks of bytes that are on the device when they are called, although the
// device has no room for all of them at once.
//
// Residents have a home in the arena and stay there. All other blocks take turns in a few slots,
// copied ahead of need by threads of the engine, in the order that the calls are expected in. A
// block is called by acquire(), which returns where it lies and waits only if it has not arrived,
// and given back by release(). A block keeps its slot for life, so that its address stays; only
// where calls come in an order that nobody foretold does it lie elsewhere for once.
//
//              request                first piece              last piece
//    absent -----------> requested ---------------> copying ---------------> ready
//     ^ ^ ^                  |                         |                      | |
//     | | |     drop         |     drop, failure       |         drop         | | acquire
//     | | +------------------+-------------------------+----------------------+ v
//     | |                                                        acquire      in_use
//     | |                          drop                       +-----------> (again: one lease more)
//     | +------------------------------------------- released <-------------   |
//     +-- failure                                               last release <-+
//
// Invariants, true whenever no call is inside (check() verifies them, in debug builds after every
// change):
//   1. A block that is not absent has one place, a slot or its home, and no place has two blocks.
//   2. Memory is behind a home exactly while its block lies there, and behind the slots from the
//      first time on that a block lies in one.
//   3. Bytes are written to a place only in state copying; nobody has its address then. Leases are
//      there exactly in state in_use, and only the other states may end in absent.
//   4. A block is in the queue exactly while it is requested or copying, was not dropped and has
//      pieces that no thread has taken.
//   5. requested: no piece is taken. copying: pieces are taken, not all have arrived, or one failed
//      or the block was dropped while threads are still at it. Later states: all have arrived.
//   6. Memory in use does not exceed the limit, except for residents that had to go and are leased:
//      they go when they are released.
//
// A load that fails leaves its block absent. Who waits for it gets the error; if nobody does, the
// next call tries again. A wait can be broken off at any time: the load goes on and the engine is
// as usable as before. In a steady pass nothing is allocated.
#pragma once
#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core/engine/arena.hpp"
#include "core/engine/backend.hpp"
#include "core/engine/layout.hpp"
#include "core/engine/memory.hpp"
#include "core/engine/predictor.hpp"
#include "core/engine/source.hpp"

namespace vramkit {

enum class BlockStatus : std::uint8_t { absent, requested, copying, ready, in_use, released };
const char* to_string(BlockStatus state);
// All of its bytes have arrived and are still there.
inline bool there(BlockStatus state) {
  return state == BlockStatus::ready || state == BlockStatus::in_use ||
         state == BlockStatus::released;
}

enum class Residence {
  automatic,  // resident where there is room
  resident,   // always
  streamed,   // never
};

struct BlockSpec {
  std::string name;
  std::int64_t bytes = 0;
  std::vector<Extent> extents;  // disjoint, within the block; what none covers is unspecified
  Residence residence = Residence::automatic;
};

struct EngineOptions {
  std::int64_t limit = 0;  // bytes of slots and residents, and of staging where it is device memory
  std::int64_t depth = 1;  // blocks that lie ready ahead of the one in use, where slots allow it
  std::int64_t slots = 3;  // at most so many
  std::int64_t threads = 2;                    // that copy
  std::int64_t piece = std::int64_t{8} << 20;  // bytes that one thread copies at a time
  bool poison = false;        // fill places with 0xFF (NaN) when their block goes: for tests
  std::int64_t timeline = 0;  // records to keep
};

struct EngineConfig {
  std::shared_ptr<Backend> backend;
  std::vector<std::shared_ptr<const Source>> sources;
  std::vector<BlockSpec> blocks;
  std::vector<std::int64_t> order;  // of a pass, as far as known; empty: that of `blocks`
  EngineOptions options;
};

struct BlockStats {
  BlockStatus state = BlockStatus::absent;
  bool resident = false;
  std::int64_t acquires = 0;
  std::int64_t hits = 0;     // acquires that found it there
  std::int64_t wait_ns = 0;  // of all others
  std::int64_t loads = 0;
  std::int64_t bytes = 0;  // that a load copies
};

struct EngineStats {
  std::int64_t limit = 0, committed = 0, staging = 0;  // bytes; staging only as the limit counts it
  std::int64_t slots = 0, slot_bytes = 0;
  std::int64_t residents = 0, resident_bytes = 0;
  std::int64_t acquires = 0, hits = 0, waits = 0, wait_ns = 0;
  std::int64_t loads = 0;                       // blocks that arrived
  std::int64_t dropped = 0;                     // of these, gone unused
  std::int64_t cancelled = 0;                   // loads given up before the end
  std::int64_t failed = 0;                      // loads that an error ended
  std::int64_t displaced = 0;                   // loads into another slot than the block's own
  std::int64_t given_up = 0, regrown = 0;       // residents
  std::int64_t bytes_copied = 0;                // that blocks asked for
  std::array<std::int64_t, 4> bytes_by_path{};  // of these, by ReadPath
  std::int64_t copy_ns = 0;                     // of all threads
  std::int64_t active_ns = 0;  // during which anything was copied: bytes_copied over it is the rate
  std::int64_t commits = 0;    // times that memory was taken
};

struct TimelineRecord {
  enum Kind : std::uint8_t { copy, wait, use } kind = copy;
  std::int64_t block = -1;
  std::int64_t thread = -1;               // of a copy: the engine's thread
  std::int64_t begin_ns = 0, end_ns = 0;  // since the engine was made
};

// Asked every now and then during a wait; true breaks it off.
using Interrupt = std::function<bool()>;

// Members may be called from several threads at once, in the process that made the engine.
class Engine {
 public:
  // Throws InvalidArgument for a plan that makes no sense, BudgetError with the least limit that
  // would do, OutOfMemoryError.
  explicit Engine(EngineConfig config);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine();

  std::int64_t blocks() const { return static_cast<std::int64_t>(blocks_.size()); }
  const BlockSpec& spec(std::int64_t block) const;

  // Where the block lies, until as many calls of release(). Leases of one block that overlap are of
  // one stream. Throws what the load threw; Interrupted; BudgetError if all slots are held by
  // threads that themselves wait for one, so that waiting would never end.
  std::byte* acquire(std::int64_t block, StreamHandle stream = nullptr,
                     const Interrupt& interrupt = {});
  void release(std::int64_t block, StreamHandle stream = nullptr);
  // Starts loading the block if it has room now; whether it is there or on its way.
  bool prefetch(std::int64_t block);
  // The block's source has changed: what is on the device is dropped. Waits for a load to end.
  void invalidate(std::int64_t block, const Interrupt& interrupt = {});

  // A new limit: residents are given up, or blocks become resident when they are next loaded.
  // Throws BudgetError, with nothing changed, below minimum().
  void resize(std::int64_t limit);
  // Residents go until at least `bytes` are free, as far as there are any; returns how many bytes
  // the system has got back or gets when leases end. The limit is lowered by it.
  std::int64_t give_up(std::int64_t bytes);
  std::int64_t minimum() const;  // the least limit that resize() takes
  // Gives back all memory but staging: residents and slots. The next acquire() takes it again, and
  // until then nothing is loaded ahead. For engines that take turns. Returns the bytes given back;
  // throws InvalidArgument while blocks are leased or waited for.
  std::int64_t park(const Interrupt& interrupt = {});
  Backend& backend() const { return *backend_; }

  // No more calls: ends the threads and gives the memory back. Throws InvalidArgument while blocks
  // are leased.
  void close();
  bool closed() const;

  // The whole address range: constant, and what acquire() returns lies in it, unless the device
  // has no addresses without memory (contiguous() is false).
  bool contiguous() const { return !backend_->memory().names_only(); }
  std::byte* base() const { return arena_->base(); }
  std::int64_t reserved() const { return arena_->reserved(); }
  std::int64_t slot_of(std::int64_t block) const;

  EngineStats stats() const;
  BlockStats block_stats(std::int64_t block) const;
  BlockStatus state(std::int64_t block) const { return block_stats(block).state; }
  std::vector<TimelineRecord> timeline() const;  // the latest ones, by begin
  // From now on the latest `records` are kept, 0 for none; earlier ones are forgotten.
  void keep_timeline(std::int64_t records);
  // Throws Error that names the first broken invariant.
  void check() const;

 private:
  static constexpr std::size_t kFarthest = 64;  // calls that are looked ahead
  struct Checked {};
  Engine(EngineConfig config, Checked);

  struct Piece {
    const Source* source = nullptr;
    std::int64_t offset = 0;        // there
    std::int64_t block_offset = 0;  // in the block
    std::int64_t bytes = 0;
    bool in_place = false;  // whole units around it may be written
    bool by_lane = false;   // a lane may copy it from where it is
  };
  struct Place {
    std::int64_t offset = 0;  // in the arena
    std::int64_t bytes = 0;
    std::int64_t block = -1;
    std::byte* address = nullptr;                 // while it has a block
    bool used = false;                            // `released` was recorded
    StreamHandle stream = nullptr;                // there
    std::unique_ptr<Event> released;              // by the arithmetic
    std::vector<std::unique_ptr<Event>> arrived;  // by lane
    std::uint64_t lanes = 0;                      // that took part in the load
    std::uint64_t lanes_before = 0;               // that took part in earlier ones
  };
  struct Block {
    BlockSpec spec;
    std::vector<Piece> pieces;
    Place home;
    Place* place = nullptr;
    std::int64_t slot = -1;
    BlockStatus state = BlockStatus::absent;
    bool resident = false;  // or to be
    bool dropped = false;   // while copying: it is to be absent
    bool stale = false;     // while copying: dropped, and what has arrived is out of date
    bool failing = false;   // while copying: a piece failed
    std::size_t taken = 0, arrived = 0;
    std::int64_t at_work = 0;  // threads
    std::int64_t waiters = 0;
    std::int64_t failures = 0;
    std::exception_ptr error;  // of the last failure
    StreamHandle stream = nullptr;
    std::vector<std::thread::id> lessees;  // one for each lease
    std::int64_t since_ns = 0;             // of its first lease
    BlockStats stats;
  };
  static constexpr std::size_t kTogether = 32;  // pieces that a lane is given at once
  struct Worker {
    std::int64_t index = 0;
    std::unique_ptr<Lane> lane;
    Allocation staging;
    std::int64_t half = 0;  // bytes
    std::array<std::unique_ptr<Event>, 2> copied;
    std::array<CopyRange, kTogether> copies;
    std::thread thread;
  };
  using Lock = std::unique_lock<std::mutex>;

  // engine_plan.cpp: what is decided before anything moves, and again when the limit does.
  void cut_pieces(Block& block);
  void lay_out(const std::vector<std::int64_t>& order);
  void lay_out_in(std::int64_t most, const std::vector<std::int64_t>& order);
  void share_slots(const std::vector<std::int64_t>& order, const std::vector<bool>& resident);
  void find_ring(const std::vector<std::int64_t>& order);
  std::int64_t staging_half() const;
  void make_workers(std::int64_t half);
  std::int64_t cost(const std::vector<bool>& resident) const;
  std::int64_t least() const;
  std::vector<bool> residents_for(std::int64_t limit) const;
  std::vector<bool> residents_now() const;
  std::int64_t distance(std::size_t place, const std::vector<bool>& resident, bool to) const;
  void set_limit(std::int64_t limit);
  void apply(const std::vector<bool>& resident);

  // engine.cpp: calls; engine_places.cpp: places, the queue, what is next; engine_report.cpp.
  enum class Rank { idle, prefetched, copying, held };  // of a place, as others may take it
  Block& at(std::int64_t block);
  const Block& at(std::int64_t block) const;
  std::int64_t id_of(const Block& block) const { return &block - blocks_.data(); }
  Lock locked() const;
  void require_open() const;
  void fetch(Lock& lock, Block& block, const Interrupt& interrupt);
  void lease(Block& block, StreamHandle stream);
  void refuse_other_stream(const Block& block, StreamHandle stream) const;
  void request(Block& block, Place& place, bool first);
  Rank rank(const Place& place) const;
  Place* place_for(Block& block);
  Place* home_for(Block& block);
  bool slots_ready();
  bool vacate(Place& place);
  void make_absent(Block& block);
  void quiesce(Place& place) noexcept;
  void settle(Block& block);
  void schedule();
  void look_ahead();
  void refuse_endless_wait(const Block& block) const;
  template <typename Done>
  void wait(Lock& lock, const Interrupt& interrupt, Done done);
  bool queued(const Block& block) const;
  void dequeue(const Block& block);
  void enqueue(const Block& block, bool first);
  void notify();
  std::int64_t now() const;
  void record(TimelineRecord::Kind kind, const Block& block, std::int64_t thread,
              std::int64_t begin);
  void check_locked() const;
  void debug_check() const;

  // engine_transfer.cpp: the copying threads.
  void start_threads();
  void stop_threads() noexcept;
  void work(Worker& worker);
  std::size_t pieces_at_once(const Block& block) const;
  ReadPath transfer(Worker& worker, std::span<const Piece> pieces, Place& place);
  void through_staging(Worker& worker, const Piece& piece, std::byte* dst, ReadPath path);
  void finish(Block& block);
  void leave_copying();
  void drain(Worker& worker) noexcept;

  const std::shared_ptr<Backend> backend_;
  const std::vector<std::shared_ptr<const Source>> sources_;
  const EngineOptions options_;
  const std::int64_t process_;
  const std::int64_t epoch_;
  CountedMemory counted_;
  LimitedMemory limited_;
  std::vector<Block> blocks_;
  std::vector<Place> slots_;
  std::vector<std::size_t> ring_;  // every block once, in call order
  std::int64_t slots_bytes_ = 0;   // of the arena, in granules
  std::int64_t arena_bytes_ = 0;
  std::int64_t staging_bytes_ = 0;  // that the limit counts
  Predictor predictor_;
  std::unique_ptr<Arena> arena_;
  bool slots_committed_ = false;
  bool parked_ = false;

  // Apart, because a fork's copy is never destroyed: its threads, which wait for it, are not there.
  struct Sync {
    std::mutex mutex;
    std::condition_variable changed, work;
  };
  std::unique_ptr<Sync> sync_ = std::make_unique<Sync>();
  std::mutex& mutex_ = sync_->mutex;
  std::condition_variable& changed_ = sync_->changed;  // a block or a place has changed
  std::condition_variable& work_ = sync_->work;        // the queue has work, or all is to end
  std::vector<std::int64_t> queue_;
  std::vector<std::thread::id> waiting_;  // for a slot
  std::vector<std::int64_t> ahead_;       // scratch of schedule()
  std::vector<bool> claimed_;
  std::int64_t waiters_ = 0;
  std::uint64_t changes_ = 0;  // of blocks or places
  std::int64_t copying_ = 0;   // blocks
  std::int64_t absent_ = 0;    // blocks
  std::int64_t active_since_ = 0;
  bool stopping_ = false, closed_ = false;
  EngineStats stats_;
  std::vector<TimelineRecord> timeline_;
  std::size_t timeline_most_ = 0, timeline_next_ = 0;
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace vramkit
