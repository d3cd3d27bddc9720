// The engine under threads: many callers, limits that move, waits that are broken off, a disk that
// fails now and then. What is leased must have its block's bytes at all times.
#include <gtest/gtest.h>

#include <cerrno>
#include <random>
#include <thread>
#include <vector>

#include "engine_cases.hpp"

namespace vramkit::testing {
namespace {

class EngineThreads : public EngineOnEach {};

TEST_P(EngineThreads, CallersLimitsFaultsAndInterrupts) {
  constexpr int kBlocks = 12, kCallers = 4, kCalls = 400;
  disk_->instead = [](std::int64_t call, std::int64_t bytes) {
    if (call % 97 == 13) return static_cast<std::int64_t>(-EIO);
    if (call % 11 == 3) return bytes / 2;
    if (call % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
    return TestDisk::kDoIt;
  };
  EngineConfig c = config(kBlocks, 7 * kBlock);
  c.options.threads = 3;
  c.options.depth = 2;
  c.options.timeline = 64;
  Engine engine(std::move(c));
  std::atomic<bool> done{false};
  std::atomic<std::int64_t> served{0}, broken{0}, failed{0};
  std::vector<std::thread> threads;
  for (int caller = 0; caller < kCallers; ++caller) {
    threads.emplace_back([&, caller] {
      std::mt19937 random(static_cast<unsigned>(caller));
      for (int i = 0; i < kCalls; ++i) {
        // Two keep to the order, two do not.
        const std::int64_t block = caller < 2 ? i % kBlocks : random() % kBlocks;
        try {
          const bool patient = random() % 4 != 0;
          const std::byte* at = engine.acquire(
              block, nullptr, patient ? Interrupt() : [&] { return random() % 2 == 0; });
          expect_content(engine, block, at);
          if (i % 5 == 0) {
            EXPECT_EQ(engine.acquire(block), at);
            engine.release(block);
          }
          std::this_thread::yield();
          expect_content(engine, block, at);
          engine.release(block);
          ++served;
        } catch (const Interrupted&) {
          ++broken;
        } catch (const SystemError& error) {
          EXPECT_EQ(error.code(), EIO);
          ++failed;
        }
      }
    });
  }
  std::thread limits([&] {
    std::mt19937 random(99);
    while (!done) {
      const std::int64_t wanted = static_cast<std::int64_t>(random() % 13) * kBlock;
      if (random() % 2 == 0) {
        engine.give_up(wanted / 4);
      } else {
        engine.resize(std::max(wanted, engine.minimum()));
      }
      engine.check();
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  });
  std::thread others([&] {
    std::mt19937 random(7);
    while (!done) {
      const std::int64_t block = random() % kBlocks;
      engine.prefetch(block);
      try {
        engine.invalidate(random() % kBlocks);
      } catch (const InvalidArgument&) {  // in use
      }
      (void)engine.stats();
      (void)engine.block_stats(block);
      (void)engine.timeline();
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  });
  for (std::thread& thread : threads) thread.join();
  done = true;
  limits.join();
  others.join();
  EXPECT_EQ(served + broken + failed, kCallers * kCalls);
  EXPECT_GT(served, kCallers * kCalls / 2);
  settle(engine);
  engine.check();
  engine.resize(engine.minimum());
  const EngineStats stats = engine.stats();
  EXPECT_LE(stats.committed, stats.limit);
  EXPECT_GE(stats.acquires, served + broken + failed);
  EXPECT_EQ(stats.hits + stats.waits, stats.acquires);
}

TEST_P(EngineThreads, OneModelSeveralCallers) {
  // Each caller makes whole passes; slots are few, so that they wait for each other all the time.
  for (const std::int64_t slots : {1, 2, 3}) {
    contents_.clear();
    disk_->in_cache = slots == 2;
    EngineConfig c = config(7, slots * kBlock);
    c.options.slots = slots;
    for (BlockSpec& block : c.blocks) block.residence = Residence::streamed;
    Engine engine(std::move(c));
    std::vector<std::thread> threads;
    for (int caller = 0; caller < 3; ++caller) {
      threads.emplace_back([&] {
        for (int round = 0; round < 30; ++round) {
          for (std::int64_t block = 0; block < engine.blocks(); ++block) {
            expect_content(engine, block, engine.acquire(block));
            engine.release(block);
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(engine.stats().acquires, 3 * 30 * 7);
    engine.close();
  }
}

TEST_P(EngineThreads, ClosedWhileOthersWait) {
  EngineConfig c = config(4, 2 * kBlock);
  c.options.threads = 1;
  Engine engine(std::move(c));
  disk_->hold();
  std::vector<std::thread> threads;
  std::atomic<int> refused{0};
  for (int caller = 0; caller < 3; ++caller) {
    threads.emplace_back([&, caller] {
      try {
        engine.acquire(caller);
      } catch (const InvalidArgument&) {
        ++refused;
      }
    });
  }
  disk_->wait_for_reads(1);
  ASSERT_TRUE(soon([&] { return engine.stats().waits == 3; }));
  std::thread closer([&] { engine.close(); });
  ASSERT_TRUE(soon([&] { return refused == 3; }));
  disk_->let_go();
  closer.join();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(engine.stats().committed, 0);
}

INSTANTIATE_TEST_SUITE_P(On, EngineThreads, kEachDevice, device_name);

}  // namespace
}  // namespace vramkit::testing
