// Engines that take turns: all memory is given back, and comes again with the next call.
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "engine_cases.hpp"

namespace vramkit::testing {
namespace {

using S = BlockStatus;
class EnginePark : public EngineTest {};

TEST_F(EnginePark, GivesBackResidentsAndSlotsUntilTheNextCall) {
  Engine engine(config(6, 5 * kBlock));
  pass(engine);
  settle(engine);
  const EngineStats before = engine.stats();
  ASSERT_GT(before.residents, 0);
  ASSERT_GT(before.committed, 0);
  EXPECT_EQ(engine.park(), before.committed);
  const EngineStats parked = engine.stats();
  EXPECT_EQ(parked.committed, 0);
  EXPECT_EQ(parked.residents, before.residents);  // they are residents still, when there is a turn
  for (std::int64_t block = 0; block < engine.blocks(); ++block) {
    EXPECT_EQ(engine.state(block), S::absent);
  }
  engine.check();
  EXPECT_EQ(engine.park(), 0);
  pass(engine);
  settle(engine);
  EXPECT_EQ(engine.stats().committed, before.committed);
}

TEST_F(EnginePark, NothingIsLoadedAheadWhileParked) {
  Engine engine(config(6, 3 * kBlock));
  pass(engine);
  engine.park();
  const std::int64_t calls = disk_->calls;
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(disk_->calls, calls);
  EXPECT_EQ(engine.stats().committed, 0);
  EXPECT_TRUE(engine.prefetch(2));
  settle(engine);
  EXPECT_EQ(engine.state(2), S::ready);
  call(engine, 2);
}

TEST_F(EnginePark, WaitsForCopiesUnderWay) {
  EngineConfig c = config(4, 2 * kBlock);
  c.options.threads = 2;
  Engine engine(std::move(c));
  disk_->hold();
  EXPECT_TRUE(engine.prefetch(1));
  disk_->wait_for_reads(1);
  auto parked = elsewhere([&] { return engine.park(); });
  EXPECT_EQ(parked.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  disk_->let_go();
  EXPECT_GT(parked.get(), 0);
  EXPECT_EQ(engine.stats().committed, 0);
  pass(engine);
}

TEST_F(EnginePark, IsRefusedWhileABlockIsInUse) {
  Engine engine(config(4, 2 * kBlock));
  engine.acquire(1);
  EXPECT_THROW(engine.park(), InvalidArgument);
  EXPECT_EQ(engine.state(1), S::in_use);
  engine.release(1);
  pass(engine);
  EXPECT_GT(engine.park(), 0);
}

TEST_F(EnginePark, AnInterruptedWaitLeavesItUsable) {
  EngineConfig c = config(4, 2 * kBlock);
  c.options.threads = 1;
  Engine engine(std::move(c));
  disk_->hold();
  EXPECT_TRUE(engine.prefetch(0));
  disk_->wait_for_reads(1);
  EXPECT_THROW(engine.park([] { return true; }), Interrupted);
  disk_->let_go();
  pass(engine);
  settle(engine);
  EXPECT_GT(engine.park(), 0);
}

TEST_F(EnginePark, TwoEnginesInOneLimit) {
  const EngineConfig c = config(5, 4 * kBlock);
  Engine first(c), second(c);
  for (int turn = 0; turn < 3; ++turn) {
    if (turn > 0) second.park();
    pass(first);
    EXPECT_LE(first.stats().committed + (turn > 0 ? second.stats().committed : 0), 4 * kBlock);
    first.park();
    pass(second);
    EXPECT_LE(first.stats().committed + second.stats().committed, 4 * kBlock);
  }
}

}  // namespace
}  // namespace vramkit::testing
