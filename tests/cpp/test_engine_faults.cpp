// The engine under limits that move, errors at every step, and waits that are broken off.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <set>

#include "core/engine/pressure.hpp"
#include "engine_cases.hpp"

namespace vramkit::testing {
namespace {

using S = BlockStatus;
class EngineLimits : public EngineOnEach {};
class EngineFaults : public EngineOnEach {};

TEST_P(EngineLimits, AllResidentNeedsNoSlots) {
  EngineConfig c = config(4, 4 * kBlock);
  Engine engine(std::move(c));
  pass(engine);
  pass(engine);
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.residents, 4);
  EXPECT_EQ(stats.committed, 4 * kBlock);
  EXPECT_EQ(stats.loads, 4);
  EXPECT_EQ(stats.bytes_copied, 4 * kBlock);
}

TEST_P(EngineLimits, ResidentsAreSpreadAndTheRestStreams) {
  EngineConfig c = config(8, 6 * kBlock);
  Engine engine(std::move(c));
  EXPECT_EQ(engine.stats().residents, 4);
  for (int block = 0; block < 8; ++block) {
    EXPECT_NE(engine.block_stats(block).resident, engine.block_stats((block + 1) % 8).resident);
  }
  pass(engine);
  settle(engine);
  const EngineStats before = engine.stats();
  EXPECT_LE(before.committed, before.limit);
  for (int round = 0; round < 3; ++round) pass(engine);
  settle(engine);
  const EngineStats after = engine.stats();
  EXPECT_EQ(after.bytes_copied - before.bytes_copied, 3 * 4 * kBlock);  // the plan's, to a byte
  EXPECT_EQ(after.commits, before.commits);
  EXPECT_EQ(after.committed, before.committed);
}

TEST_P(EngineLimits, TooSmallSaysTheLeastThatWouldDo) {
  const auto needed = [&](EngineConfig c) {
    try {
      Engine engine(std::move(c));
    } catch (const BudgetError& error) {
      return error.needed();
    }
    return std::int64_t{0};
  };
  EXPECT_EQ(needed(config(8, kBlock - 1)), kBlock);
  EXPECT_EQ(needed(config(1, 0)), kBlock);
  EngineConfig must = config(8, 2 * kBlock);
  must.blocks[2].residence = must.blocks[5].residence = Residence::resident;
  EXPECT_EQ(needed(std::move(must)), 3 * kBlock);
  EngineConfig askew = config(3, kBlock, kBlock - 5);
  const std::int64_t staging = 2 * round_up_to(2 * 3 * kSmallPage, kSmallPage);  // two threads
  EXPECT_EQ(needed(std::move(askew)), on_host() ? staging + kBlock : 0);         // fits elsewhere
}

TEST_P(EngineLimits, OneSlotRunsToo) {
  for (const std::int64_t slots : {1, 2}) {
    contents_.clear();
    Engine engine(config(8, slots * kBlock));
    EXPECT_EQ(engine.stats().slots, slots);
    EXPECT_EQ(engine.minimum(), slots * kBlock);
    pass(engine);
    pass(engine);
    EXPECT_EQ(engine.stats().committed, slots * kBlock);
    EXPECT_THROW(engine.resize(slots * kBlock - 1), BudgetError);
  }
}

TEST_P(EngineLimits, GivenUpAndRegrown) {
  Engine engine(config(8, 8 * kBlock));
  pass(engine);
  EXPECT_EQ(engine.stats().committed, 8 * kBlock);
  // Half of it: slots have to come out of it too.
  EXPECT_EQ(engine.give_up(4 * kBlock), 4 * kBlock);
  EngineStats stats = engine.stats();
  EXPECT_EQ(stats.limit, 4 * kBlock);
  EXPECT_EQ(stats.residents, 2);
  EXPECT_EQ(stats.given_up, 6);
  EXPECT_LE(stats.committed, stats.limit);
  for (int round = 0; round < 2; ++round) pass(engine);
  EXPECT_LE(engine.stats().committed, 4 * kBlock);
  // Not below the minimum, however much is asked for.
  engine.give_up(100 * kBlock);
  EXPECT_EQ(engine.stats().limit, engine.minimum());
  EXPECT_EQ(engine.stats().residents, 0);
  pass(engine);
  engine.resize(7 * kBlock);
  EXPECT_EQ(engine.stats().residents, 5);
  for (int round = 0; round < 2; ++round) pass(engine);
  stats = engine.stats();
  EXPECT_LE(stats.committed, 7 * kBlock);
  EXPECT_EQ(stats.regrown, 5);
  EXPECT_THROW(engine.give_up(-1), InvalidArgument);
}

TEST_P(EngineLimits, ALeasedResidentGoesWhenItIsReleased) {
  Engine engine(config(4, 4 * kBlock));
  pass(engine);
  const std::byte* at = engine.acquire(1);
  engine.resize(2 * kBlock);
  EXPECT_EQ(engine.stats().committed, kBlock);  // the one in use
  expect_content(engine, 1, at);
  EXPECT_EQ(engine.acquire(1), at);
  engine.release(1);
  // Slots take two blocks, and one is still leased: nothing else has room.
  EXPECT_THROW(engine.acquire(0), BudgetError);
  engine.release(1);
  EXPECT_LE(engine.stats().committed, 2 * kBlock);
  EXPECT_NE(engine.acquire(1), at);
  engine.release(1);
  pass(engine);
  EXPECT_LE(engine.stats().committed, 2 * kBlock);
}

TEST_P(EngineLimits, PressureAndHysteresisTogether) {
  Engine engine(config(10, 10 * kBlock));
  pass(engine);
  PressureGauge gauge({2 * kBlock, 4 * kBlock, 3});
  std::int64_t system = 14 * kBlock;  // what we and others share
  std::int64_t others = 0;
  std::set<std::int64_t> committed;
  std::int64_t changes = 0;
  const auto adapt = [&] {
    const std::int64_t free = system - others - engine.stats().committed;
    const std::int64_t by = gauge.observe(free);
    const std::int64_t limit = engine.stats().limit;
    if (by < 0) engine.give_up(-by);
    if (by > 0) engine.resize(std::min(limit + by, 10 * kBlock));
    changes += engine.stats().limit != limit ? 1 : 0;
    pass(engine);
  };
  for (int i = 0; i < 5; ++i) adapt();
  EXPECT_EQ(changes, 0);
  others = 6 * kBlock;  // two blocks more than there are
  for (int i = 0; i < 10; ++i) adapt();
  EXPECT_EQ(changes, 1);  // at once, and no to and fro after it
  EXPECT_LE(engine.stats().committed, 5 * kBlock);
  others = 0;
  adapt(), adapt();
  EXPECT_EQ(changes, 1);  // not yet
  for (int i = 0; i < 10; ++i) adapt();
  EXPECT_EQ(engine.stats().limit, 10 * kBlock);
  EXPECT_LE(changes, 3);
}

TEST_P(EngineFaults, EveryReadFailsOnce) {
  for (const int code : {EIO, ENOMEM, EINVAL, ESTALE}) {
    std::atomic<bool> failed{true};
    for (std::int64_t nth = 0; failed; ++nth) {
      contents_.clear();
      disk_ = std::make_shared<TestDisk>();
      failed = false;
      disk_->instead = [&](std::int64_t call, std::int64_t) {
        if (call != nth) return TestDisk::kDoIt;
        failed = true;
        return static_cast<std::int64_t>(-code);
      };
      Engine engine(config(4, 2 * kBlock));
      int errors = 0;
      for (std::int64_t i = 0; i < 8; ++i) {
        const std::int64_t block = i % 4;
        try {
          call(engine, block);
        } catch (const SystemError& error) {
          EXPECT_EQ(error.code(), code);
          EXPECT_NE(std::string(error.what()).find("blocks"), std::string::npos);
          ++errors;
          EXPECT_EQ(engine.state(block), S::absent);
          call(engine, block);  // and works the next time
        }
      }
      // Of a prefetch that failed only its statistics tell: the call loaded it again. And a file
      // system that refuses direct reads is read another way.
      EXPECT_LE(errors, failed ? 1 : 0);
      if (code == EINVAL) {
        EXPECT_EQ(errors + engine.stats().failed, 0);
      }
      ASSERT_LT(nth, 100);
    }
  }
}

TEST_P(EngineFaults, ADiskThatAlwaysFails) {
  disk_->instead = [](std::int64_t, std::int64_t) { return static_cast<std::int64_t>(-EIO); };
  Engine engine(config(4, 2 * kBlock));
  for (int round = 0; round < 3; ++round) {
    for (std::int64_t block = 0; block < 4; ++block) {
      EXPECT_EQ(code_of([&] { engine.acquire(block); }), EIO);
    }
  }
  settle(engine);
  engine.check();
  disk_->instead = nullptr;
  pass(engine);
}

TEST_P(EngineFaults, ShortReadsOfEverySize) {
  for (const std::int64_t most : {1, 7, 511, 4096, 5000, 8192}) {
    contents_.clear();
    disk_->instead = [&](std::int64_t call, std::int64_t) {
      return call % 3 == 2 ? static_cast<std::int64_t>(-EINTR) : most;
    };
    for (const bool cached : {true, false}) {
      contents_.clear();
      disk_->in_cache = cached;
      EngineConfig c = config(3, 1 << 20, 2 * kSmallPage + 100);
      c.options.piece = 2 * kSmallPage;
      Engine engine(std::move(c));
      pass(engine);
    }
  }
}

TEST_P(EngineFaults, TruncatedWrittenToOrReplaced) {
  const auto start = [&] {
    contents_.clear();
    return std::make_unique<Engine>(config(4, 2 * kBlock));
  };
  auto engine = start();
  call(*engine, 0);
  settle(*engine);
  std::filesystem::resize_file(file_, 3 * kBlock);
  EXPECT_NE(message_of<FileChangedError>([&] { engine->acquire(3); }).find("bytes when it was"),
            std::string::npos);
  EXPECT_THROW(call(*engine, 2), FileChangedError);  // its bytes are there, but of what?

  engine = start();
  call(*engine, 0);
  settle(*engine);
  const auto later = fs::last_write_time(file_) + std::chrono::seconds(2);
  put(pattern(4 * kBlock, 99), "blocks");
  fs::last_write_time(file_, later);
  EXPECT_NE(message_of<FileChangedError>([&] { engine->acquire(3); }).find("written to"),
            std::string::npos);

  engine = start();
  call(*engine, 0);
  put(pattern(4 * kBlock, 99), "another");
  fs::rename(path("another"), file_);  // the name means another file, ours is open
  pass(*engine);
  fs::remove(file_);
  pass(*engine);
}

class EngineHostFaults : public EngineTest {};

TEST_F(EngineHostFaults, MemoryFailsAtEveryStep) {
  // While the engine is made, and while it runs.
  bool made = false;
  for (std::int64_t nth = 0; nth < 40; ++nth) {
    contents_.clear();
    const auto below = std::make_shared<HostMemory>(kSmallPage);
    const auto counted = std::make_shared<CountedMemory>(*below);
    memory_ =
        std::make_shared<FaultyMemory>(*counted, [nth](std::int64_t call) { return call == nth; });
    try {
      Engine engine(config(8, 5 * kBlock));
      made = true;
      for (int round = 0; round < 2; ++round) {
        for (std::int64_t block = 0; block < 8; ++block) call(engine, block);
      }
      EXPECT_LE(engine.stats().committed, 5 * kBlock);
    } catch (const OutOfMemoryError& error) {
      EXPECT_GT(error.bytes(), 0);
      EXPECT_FALSE(made) << nth;  // a resident that finds no memory is streamed
    }
    EXPECT_EQ(counted->counts().committed, 0);
    EXPECT_EQ(counted->counts().reserved, 0);
  }
  EXPECT_TRUE(made);
}

TEST_P(EngineFaults, AWaitIsBrokenOff) {
  EngineConfig c = config(4, 2 * kBlock);
  c.options.threads = 1;
  Engine engine(std::move(c));
  disk_->hold();
  int asked = 0;
  EXPECT_THROW(engine.acquire(0, nullptr, [&] { return ++asked == 2; }), Interrupted);
  struct Signal {};
  EXPECT_THROW(engine.acquire(2, nullptr, []() -> bool { throw Signal(); }), Signal);
  engine.check();
  disk_->let_go();
  settle(engine);
  pass(engine);
  EXPECT_EQ(engine.stats().failed, 0);
}

TEST_P(EngineFaults, ClosedOrDestroyedDuringTransfers) {
  for (int round = 0; round < 20; ++round) {
    contents_.clear();
    const auto below = std::make_shared<HostMemory>(kSmallPage);
    const auto counted = std::make_shared<CountedMemory>(*below);
    memory_ = counted;
    {
      Engine engine(config(6, 3 * kBlock));
      engine.acquire(round % 6);
      if (round % 2 == 0) {
        engine.release(round % 6);
        engine.close();
      }
    }
    EXPECT_EQ(counted->counts().reserved, 0);
    if (!on_host()) {
      EXPECT_EQ(cuda_->used() + cuda_->reserved() + cuda_->live(), 0);
    }
  }
}

TEST_P(EngineFaults, AForkedProcessIsToldAndEnds) {
  auto engine = std::make_unique<Engine>(config(4, 2 * kBlock));
  call(*engine, 0);
  const pid_t child = ::fork();
  if (child == 0) {
    int code = 1;
    try {
      engine->acquire(0);
    } catch (const Error& error) {
      code = std::string(error.what()).find("forked") == std::string::npos ? 2 : 0;
    }
    engine.reset();  // neither joins threads that are not there nor waits for them
    ::_exit(code);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  pass(*engine);
}

INSTANTIATE_TEST_SUITE_P(On, EngineLimits, kEachDevice, device_name);
INSTANTIATE_TEST_SUITE_P(On, EngineFaults, kEachDevice, device_name);

}  // namespace
}  // namespace vramkit::testing
