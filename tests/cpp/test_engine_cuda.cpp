// The CUDA backend over a device that is not there (fake_cuda.hpp): its memory, what orders copies
// and arithmetic, what a steady pass does not do, and every call failing once. The engine's own
// cases run on it too (EngineOnEach).
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "core/engine/relief.hpp"
#include "engine_cases.hpp"

namespace vramkit::testing {
namespace {

constexpr std::int64_t kGranule = kSmallPage;

class EngineCuda : public EngineTest {
 protected:
  void SetUp() override {
    EngineTest::SetUp();
    use(DeviceKind::cuda);
  }
  void use_fake(FakeCuda::Options options) { cuda_ = std::make_shared<FakeCuda>(options); }

  // `count` streamed blocks in pinned memory, each of a large part and `small` little ones.
  EngineConfig pinned(std::int64_t count, std::int64_t small = 0) {
    EngineConfig config;
    const auto cuda = std::make_shared<CudaBackend>(cuda_, 0, kGranule);
    const std::int64_t bytes = kBlock + 64 * small;
    store_ = std::make_shared<HostStore>(cuda->shared_staging(), count * bytes);
    contents_.clear();
    for (std::int64_t block = 0; block < count; ++block) {
      contents_.push_back(pattern(bytes, static_cast<std::uint64_t>(block) + 1));
      std::memcpy(store_->data() + block * bytes, contents_.back().data(), contents_.back().size());
      BlockSpec spec{"block" + std::to_string(block), bytes, {{0, block * bytes, 0, kBlock}}};
      for (std::int64_t i = 0; i < small; ++i) {
        const std::int64_t at = kBlock + 64 * i;
        spec.extents.push_back({0, block * bytes + at, at, 64});
      }
      spec.residence = Residence::streamed;
      config.blocks.push_back(std::move(spec));
    }
    config.sources = {source_of(store_)};
    config.backend = cuda;
    config.options.limit = 1 << 20;
    config.options.piece = kBlock;
    return config;
  }
  void expect_nothing_left() const {
    EXPECT_EQ(cuda_->used(), 0);
    EXPECT_EQ(cuda_->reserved(), 0);
    EXPECT_EQ(cuda_->pinned(), 0);
    EXPECT_EQ(cuda_->live(), 0);
  }

  std::shared_ptr<HostStore> store_;
};
class EngineCudaThreads : public EngineCuda {};
class EngineCudaFaults : public EngineCuda {};

TEST_F(EngineCuda, WhatIsNotThereIsSaid) {
  EXPECT_EQ(message_of<InvalidArgument>([&] { CudaBackend backend(cuda_, 1); }),
            "there is no cuda:1: this process sees 1 CUDA devices");
  EXPECT_THROW(CudaBackend(cuda_, -1), InvalidArgument);
  EXPECT_THROW(CudaBackend(cuda_, 0, 3 * kGranule), InvalidArgument);
  EXPECT_THROW(CudaBackend(cuda_, 0, kGranule / 2), InvalidArgument);
  cuda_->fail(
      [](std::int64_t, const std::string& name) { return name == "device_count" ? 35 : 0; });
  const std::string text = message_of<DeviceError>([&] { CudaBackend backend(cuda_, 0); });
  EXPECT_EQ(text, "cuda:0: looking for devices failed: injected (35)");
  cuda_->fail(nullptr);
}

TEST_F(EngineCuda, SegmentsComeAndGo) {
  FakeCuda::Options options;
  options.memory = 4 * kGranule;
  use_fake(options);
  CudaBackend cuda(cuda_, 0, kGranule);
  Memory& memory = cuda.memory();
  EXPECT_EQ(memory.granularity(), kGranule);
  std::byte* start = memory.reserve(8 * kGranule);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(start) % kGranule, 0U);
  EXPECT_EQ(cuda_->used(), 0);
  memory.commit(start, 3 * kGranule);
  EXPECT_EQ(cuda_->used(), 3 * kGranule);
  try {
    memory.commit(start + 4 * kGranule, 2 * kGranule);
    FAIL();
  } catch (const DeviceMemoryError& error) {
    EXPECT_EQ(error.bytes(), kGranule);
    EXPECT_NE(std::string(error.what()).find("torch.cuda.empty_cache"), std::string::npos);
  }
  EXPECT_EQ(cuda_->used(), 3 * kGranule);  // with nothing changed
  // A part of what one call took, under the same addresses again later.
  cuda.fill(start, 1, 3 * kGranule);
  memory.decommit(start + kGranule, kGranule);
  EXPECT_EQ(cuda_->used(), 2 * kGranule);
  memory.commit(start + kGranule, kGranule);
  EXPECT_EQ(cuda_->read(start + kGranule, 1, nullptr)[0], '\xEE');
  EXPECT_EQ(cuda_->read(start + 2 * kGranule, 1, nullptr)[0], '\x01');
  // A segment that cannot go now is used again, or goes with its addresses.
  int left = 1;
  cuda_->fail([&](std::int64_t, const std::string& name) {
    return name == "unmap" && left-- > 0 ? 999 : 0;
  });
  memory.decommit(start, kGranule);
  EXPECT_EQ(cuda_->used(), 3 * kGranule);
  memory.commit(start, kGranule);
  EXPECT_EQ(cuda_->used(), 3 * kGranule);
  left = 1;
  memory.decommit(start, 3 * kGranule);
  EXPECT_EQ(cuda_->used(), kGranule);
  memory.unreserve(start, 8 * kGranule);
  EXPECT_EQ(cuda_->used(), 0);
  EXPECT_EQ(cuda_->reserved(), 0);
}

TEST_F(EngineCuda, WithoutVirtualMemoryPiecesAreWhole) {
  use(DeviceKind::cuda_pieces);
  CudaBackend cuda(cuda_, 0, kGranule);
  Memory& memory = cuda.memory();
  EXPECT_TRUE(memory.names_only());
  std::byte* start = memory.reserve(8 * kGranule);
  memory.commit(start + kGranule, 3 * kGranule);
  std::byte* piece = memory.resolve(start + kGranule);
  EXPECT_EQ(memory.resolve(start + 3 * kGranule + 5), piece + 2 * kGranule + 5);
  EXPECT_EQ(cuda_->used(), 3 * kGranule);
  EXPECT_EQ(cuda_->read(piece + 3 * kGranule - 1, 1, nullptr)[0], '\xEE');
  memory.decommit(start + kGranule, 3 * kGranule);
  memory.unreserve(start, 8 * kGranule);
  EXPECT_EQ(cuda_->used(), 0);
  Engine engine(config(6, 4 * kBlock));
  EXPECT_FALSE(engine.contiguous());
  pass(engine);
}

TEST_F(EngineCuda, TheHostIsKeptOut) {
  Engine engine(config(2, 2 * kBlock));
  std::byte* at = engine.acquire(0);
  EXPECT_DEATH({ *static_cast<volatile std::byte*>(at) = std::byte{0}; }, "");
  engine.release(0);
}

TEST_F(EngineCuda, MemoryIsPinnedAtItsExactSize) {
  CudaBackend cuda(cuda_, 0, kGranule);
  const auto bytes = (std::int64_t{2} << 20) + kSmallPage;
  {
    const Allocation allocation(cuda.staging(), bytes);
    EXPECT_EQ(cuda_->pinned(), bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(allocation.data()) % HostMemory::kLargePage, 0U);
    EXPECT_TRUE(cuda.copies_from(allocation.data(), bytes));
    EXPECT_FALSE(cuda.copies_from(allocation.data() + 1, bytes));
    EXPECT_TRUE(cuda.copies_from(nullptr, 0));
  }
  EXPECT_EQ(cuda_->pinned(), 0);
  cuda_->fail(
      [](std::int64_t, const std::string& name) { return name == "register_host" ? 2 : 0; });
  EXPECT_THROW(Allocation(cuda.staging(), bytes), OutOfMemoryError);
}

TEST_F(EngineCuda, TheCallersDeviceStaysTheirs) {
  FakeCuda::Options options;
  options.devices = 3;
  use_fake(options);
  // 0 was never used: it must not get a context only because it is where every thread begins.
  CudaBackend cuda(cuda_, 1, kGranule);
  const Allocation allocation(cuda.memory(), kGranule);
  bool has = true;
  EXPECT_EQ(cuda_->has_context(0, &has), kCudaSuccess);
  EXPECT_FALSE(has);
  cuda_->set_device(2);
  cuda.fill(allocation.data(), 7, kGranule);
  const auto event = cuda.make_event();
  const auto lane = cuda.make_lane();
  lane->record(*event);
  cuda.synchronize(*event);
  EXPECT_TRUE(cuda.drain());
  int device = -1;
  cuda_->get_device(&device);
  EXPECT_EQ(device, 2);
}

TEST_F(EngineCuda, SteadyFromPinnedMemoryNobodyWaits) {
  for (const bool batches : {true, false}) {
    FakeCuda::Options options;
    options.batches = batches;
    use_fake(options);
    Engine engine(pinned(7, 6));
    for (int round = 0; round < 2; ++round) pass(engine);
    settle(engine);
    cuda_->finish();
    const std::int64_t waits = cuda_->waits(), resources = cuda_->resources();
    const std::int64_t batched = cuda_->count("copy_batch"), single = cuda_->count("copy");
    const EngineStats before = engine.stats();
    for (int round = 0; round < 5; ++round) pass(engine);
    settle(engine);
    EXPECT_EQ(cuda_->waits(), waits);
    EXPECT_EQ(cuda_->resources(), resources);
    const EngineStats after = engine.stats();
    const std::int64_t loads = after.loads - before.loads;
    EXPECT_GE(loads, 5 * (7 - 3));
    EXPECT_EQ(after.bytes_copied - before.bytes_copied, loads * (kBlock + 6 * 64));
    // The little parts of a block go together: 7 parts, of which the large one may be cut in two.
    if (batches) {
      EXPECT_LE(cuda_->count("copy_batch") - batched + cuda_->count("copy") - single, 3 * loads);
      EXPECT_GE(cuda_->count("copy_batch") - batched, loads);
    } else {
      EXPECT_EQ(cuda_->count("copy_batch"), batched);
      EXPECT_GE(cuda_->count("copy") - single, 7 * loads);
    }
  }
}

TEST_F(EngineCuda, SteadyFromFilesTheCallerNeverWaits) {
  EngineConfig c = config(7, 5 * kBlock);
  c.options.poison = false;
  Engine engine(std::move(c));
  for (int round = 0; round < 2; ++round) pass(engine);
  settle(engine);
  const auto me = std::this_thread::get_id();
  const std::int64_t waits = cuda_->waits_of(me), resources = cuda_->resources();
  for (int round = 0; round < 5; ++round) pass(engine);
  settle(engine);
  EXPECT_EQ(cuda_->waits_of(me), waits);
  EXPECT_EQ(cuda_->resources(), resources);
  EXPECT_EQ(engine.stats().staging, 0);
  EXPECT_GT(cuda_->pinned(), 0);
}

TEST_F(EngineCuda, MemoryThatSomebodyElseHasIsPinnedForAsLongAsItIsASource) {
  struct Shared {
    HostMemory memory{kGranule};
    Allocation bytes;
    std::unique_ptr<PinnedRange> pinned;
  };
  EngineConfig c = pinned(5);
  const std::int64_t own = cuda_->pinned();
  std::string whole;
  for (const std::string& block : contents_) whole += block;
  const auto bytes = static_cast<std::int64_t>(whole.size());
  auto shared = std::make_shared<Shared>();
  shared->bytes = Allocation(shared->memory, bytes);
  std::memcpy(shared->bytes.data(), whole.data(), whole.size());
  const auto device = std::make_shared<CudaDevice>(cuda_, 0);
  shared->pinned = std::make_unique<PinnedRange>(device, shared->bytes.data(), bytes);
  EXPECT_EQ(cuda_->pinned(), own + bytes);
  {
    c.sources = {std::make_shared<MemorySource>(shared->bytes.data(), bytes, shared)};
    shared.reset();  // the engine has it now
    Engine engine(std::move(c));
    for (int round = 0; round < 3; ++round) pass(engine);
    settle(engine);
    cuda_->finish();
    const std::int64_t waits = cuda_->waits();
    pass(engine);
    settle(engine);
    EXPECT_EQ(cuda_->waits(), waits);  // nothing goes through staging
    EXPECT_GT(cuda_->pinned(), own);
  }
  EXPECT_EQ(cuda_->pinned(), own);
  store_.reset();
  expect_nothing_left();
}

TEST_F(EngineCuda, MemoryThatCannotBePinnedIsAnError) {
  const auto device = std::make_shared<CudaDevice>(cuda_, 0);
  HostMemory memory(kGranule);
  const Allocation bytes(memory, kGranule);
  std::memset(bytes.data(), 1, static_cast<std::size_t>(kGranule));
  for (const CudaStatus status : {kCudaOutOfMemory, 719}) {
    cuda_->fail([&](std::int64_t, const std::string& name) {
      return name == "register_host" ? status : kCudaSuccess;
    });
    if (status == kCudaOutOfMemory) {
      EXPECT_THROW(PinnedRange(device, bytes.data(), kGranule), OutOfMemoryError);
    } else {
      EXPECT_THROW(PinnedRange(device, bytes.data(), kGranule), DeviceError);
    }
    cuda_->fail(nullptr);
  }
  EXPECT_EQ(cuda_->pinned(), 0);
}

TEST_F(EngineCuda, MemoryThatIsNotPinnedGoesThroughMemoryThatIs) {
  EngineConfig c = pinned(5);
  auto plain = std::make_shared<std::string>();
  for (const std::string& block : contents_) *plain += block;
  c.sources = {std::make_shared<MemorySource>(reinterpret_cast<const std::byte*>(plain->data()),
                                              static_cast<std::int64_t>(plain->size()), plain)};
  Engine engine(std::move(c));
  for (int round = 0; round < 3; ++round) pass(engine);
  EXPECT_EQ(engine.stats().bytes_by_path[static_cast<int>(ReadPath::memory)],
            engine.stats().bytes_copied);
}

TEST_F(EngineCuda, ABlockThatTwoStreamsReadInTurnStaysUntilBothHave) {
  EngineConfig c = pinned(5);
  c.options.slots = 2;
  Engine engine(std::move(c));
  StreamHandle other = nullptr;
  ASSERT_EQ(cuda_->create_stream(&other), kCudaSuccess);
  for (int round = 0; round < 20; ++round) {
    const std::int64_t block = round % 5;
    for (StreamHandle stream : {other, StreamHandle{nullptr}}) {
      const std::byte* at = engine.acquire(block, stream);
      for (int again = 0; again < 3; ++again) expect_content(engine, block, at, stream);
      engine.release(block, stream);
    }
  }
}

TEST_F(EngineCuda, CopiesThatNobodyWaitedForAreWaitedForByTheNext) {
  // Loads that arrive and are dropped, loads that are cancelled before their first piece, and
  // another into the same slot: the last must not be overtaken by the first.
  disk_->in_cache = true;
  for (std::uint32_t seed = 0; seed < 12; ++seed) {
    EngineConfig c = config(6, 2 * kBlock);
    c.options.slots = 1;
    c.options.poison = false;
    c.options.threads = 3;
    Engine engine(std::move(c));
    std::mt19937 random(seed);
    for (int step = 0; step < 30; ++step) {
      engine.prefetch(static_cast<std::int64_t>(random() % 6));
      if (random() % 2 == 0) settle(engine);
      if (random() % 3 == 0) engine.invalidate(static_cast<std::int64_t>(random() % 6));
      if (random() % 2 == 0) call(engine, static_cast<std::int64_t>(random() % 6));
    }
    contents_.clear();
  }
}

TEST_F(EngineCuda, AbsentBlocksArePoisoned) {
  Engine engine(config(4, 2 * kBlock));
  const std::byte* at = engine.acquire(0);
  engine.release(0);
  settle(engine);
  engine.invalidate(0);
  ASSERT_EQ(engine.state(0), BlockStatus::absent);
  EXPECT_EQ(cuda_->read(at, kBlock, nullptr), std::string(kBlock, '\xFF'));
}

TEST_F(EngineCuda, MemoryGoesOnlyWhenTheDeviceIsDoneWithIt) {
  {
    Engine engine(config(8, 8 * kBlock));
    pass(engine);
    engine.give_up(4 * kBlock);  // the last calls may be at it still
    pass(engine);
    engine.close();
  }
  expect_nothing_left();
  {
    contents_.clear();
    Engine engine(config(8, 8 * kBlock));
    for (std::int64_t block : {0, 1, 2}) expect_content(engine, block, engine.acquire(block));
    engine.prefetch(3);
  }  // leased, and on its way
  expect_nothing_left();
}

TEST_F(EngineCuda, FollowsTheMemoryThatOthersLeave) {
  FakeCuda::Options options;
  options.memory = 20 * kBlock;
  use_fake(options);
  Engine engine(config(10, 10 * kBlock));
  pass(engine);
  EXPECT_EQ(cuda_->used(), 10 * kBlock);
  PressureGauge gauge({2 * kBlock, 4 * kBlock, 2});
  EXPECT_EQ(relieve(engine, gauge, 10 * kBlock), 0);
  const CudaBackend others(cuda_, 0, kGranule);
  {
    Allocation theirs(const_cast<CudaBackend&>(others).memory(), 9 * kBlock);
    EXPECT_EQ(relieve(engine, gauge, 10 * kBlock), -2 * kBlock);
    pass(engine);
    EXPECT_LE(cuda_->used(), 17 * kBlock);
    EXPECT_EQ(relieve(engine, gauge, 10 * kBlock), 0);
  }
  EXPECT_EQ(relieve(engine, gauge, 10 * kBlock), 0);  // not at once
  EXPECT_EQ(relieve(engine, gauge, 10 * kBlock), 2 * kBlock);
  pass(engine);
  kind_ = DeviceKind::host;
  contents_.clear();
  Engine host(config(2, 2 * kBlock));
  EXPECT_THROW(relieve(host, gauge, 2 * kBlock), InvalidArgument);
  kind_ = DeviceKind::cuda;
}

// One call fails, whichever: the caller is told or need not know, and all goes on.
void every_call_fails_once(DeviceKind kind, CudaStatus status, bool files,
                           const std::function<EngineConfig(DeviceKind, bool)>& fresh,
                           const std::function<std::shared_ptr<FakeCuda>()>& fake,
                           const std::function<void(Engine&, std::int64_t)>& call) {
  bool reached = true;
  std::set<std::string> failed_names;
  for (std::int64_t nth = 0; reached; ++nth) {
    EngineConfig c = fresh(kind, files);
    const auto cuda = fake();
    const std::int64_t begin = cuda->calls();
    std::string failed;
    std::mutex mutex;
    cuda->fail([&](std::int64_t n, const std::string& name) {
      if (n != begin + nth) return kCudaSuccess;
      const std::scoped_lock lock(mutex);
      failed = name;
      return status;
    });
    try {
      Engine engine(std::move(c));
      for (std::int64_t i = 0; i < 10; ++i) {
        const std::int64_t block = i % 4;
        if (i == 6) engine.give_up(kGranule);
        if (i == 9) engine.resize(engine.minimum() + 3 * 3 * kGranule);
        try {
          call(engine, block);
        } catch (const DeviceError& error) {
          EXPECT_EQ(error.code(), status);
          if (engine.state(block) == BlockStatus::in_use) engine.release(block);
          call(engine, block);
        } catch (const OutOfMemoryError&) {
          call(engine, block);
        }
        engine.check();
      }
      engine.close();
    } catch (const DeviceError& error) {
      EXPECT_EQ(error.code(), status);
      EXPECT_NE(std::string(error.what()).find("cuda:0: "), std::string::npos);
    } catch (const OutOfMemoryError& error) {
      EXPECT_EQ(status, kCudaOutOfMemory) << error.what();
    }
    cuda->fail(nullptr);
    reached = !failed.empty();
    failed_names.insert(failed);
    // What could not be given back cannot be asked for again.
    static const std::set<std::string> kGiving{"release",        "free_addresses",
                                               "deallocate",     "unregister_host",
                                               "destroy_stream", "destroy_event"};
    for (const std::string& complaint : cuda->complaints()) {
      ADD_FAILURE() << failed << ", call " << nth << ": " << complaint;
    }
    if (kGiving.count(failed) == 0 && !files) {
      EXPECT_EQ(cuda->used(), 0) << failed << ' ' << nth;
      EXPECT_EQ(cuda->reserved(), 0) << failed << ' ' << nth;
      EXPECT_EQ(cuda->live(), 0) << failed << ' ' << nth;
    }
    ASSERT_LT(nth, 5'000);
    if (::testing::Test::HasFailure()) return;
  }
  for (const char* name : {"record", "wait", "create_event", "create_stream", "get_device",
                           files ? "copy" : "copy_batch"}) {
    EXPECT_EQ(failed_names.count(name), 1U) << name;
  }
}

TEST_F(EngineCudaFaults, EveryCallFailsOnce) {
  disk_->in_cache = true;
  struct Case {
    DeviceKind kind;
    CudaStatus status;
    bool files;
  };
  for (const auto& [kind, status, files] : {Case{DeviceKind::cuda, 700, true},
                                            {DeviceKind::cuda, kCudaOutOfMemory, false},
                                            {DeviceKind::cuda_pieces, 700, false},
                                            {DeviceKind::cuda_pieces, kCudaOutOfMemory, true}}) {
    const auto fresh = [&](DeviceKind on, bool from_files) {
      FakeCuda::Options options;
      options.granularity = on == DeviceKind::cuda ? kGranule : 0;
      options.delay_us = 0;
      store_.reset();
      use_fake(options);
      contents_.clear();
      EngineConfig c = from_files ? config(4, 3 * kBlock) : pinned(4, 2);
      for (BlockSpec& block : c.blocks) block.residence = Residence::automatic;
      c.options.limit = 3 * kBlock + 2 * kGranule;
      c.options.slots = 2;
      c.options.poison = false;
      return c;
    };
    every_call_fails_once(
        kind, status, files, fresh, [&] { return cuda_; },
        [&](Engine& engine, std::int64_t block) { call(engine, block); });
    if (HasFailure()) return;
  }
}

TEST_F(EngineCudaFaults, ADeviceThatAlwaysFailsEndsNothingButTheCalls) {
  Engine engine(config(4, 3 * kBlock));
  pass(engine);
  cuda_->fail([](std::int64_t, const std::string&) { return 719; });
  for (int round = 0; round < 3; ++round) {
    for (std::int64_t block = 0; block < 4; ++block) {
      EXPECT_THROW(engine.acquire(block), DeviceError);
    }
    engine.give_up(kBlock);
  }
  settle(engine);
  engine.check();
  cuda_->finish();
  cuda_->fail(nullptr);  // nothing comes back from such a device; this one does
  pass(engine);
}

TEST_F(EngineCudaThreads, CallersOnStreamsOfTheirOwn) {
  constexpr int kBlocks = 10, kCallers = 4, kCalls = 250;
  for (const bool files : {false, true}) {
    contents_.clear();
    store_.reset();
    use_fake({});
    EngineConfig c = files ? config(kBlocks, 6 * kBlock) : pinned(kBlocks, 3);
    c.options.limit = 7 * kBlock;
    c.options.depth = 2;
    c.options.threads = 3;
    c.options.poison = files;
    for (BlockSpec& block : c.blocks) block.residence = Residence::automatic;
    Engine engine(std::move(c));
    std::atomic<bool> done{false};
    std::atomic<std::int64_t> served{0};
    std::vector<std::thread> threads;
    for (int caller = 0; caller < kCallers; ++caller) {
      threads.emplace_back([&, caller] {
        StreamHandle stream = nullptr;
        ASSERT_EQ(cuda_->create_stream(&stream), kCudaSuccess);
        std::mt19937 random(static_cast<unsigned>(caller));
        for (int i = 0; i < kCalls; ++i) {
          const std::int64_t block = caller < 2 ? i % kBlocks : random() % kBlocks;
          try {
            const std::byte* at = engine.acquire(block, stream);
            expect_content(engine, block, at, stream);
            if (random() % 4 == 0) std::this_thread::yield();
            expect_content(engine, block, at, stream);
            engine.release(block, stream);
            ++served;
          } catch (const InvalidArgument&) {  // another stream has it now
          }
        }
      });
    }
    std::thread limits([&] {
      std::mt19937 random(99);
      while (!done) {
        const std::int64_t wanted = static_cast<std::int64_t>(random() % 11) * kBlock;
        if (random() % 2 == 0) {
          engine.give_up(wanted / 4);
        } else {
          engine.resize(std::max(wanted, engine.minimum()));
        }
        engine.prefetch(static_cast<std::int64_t>(random() % kBlocks));
        try {
          engine.invalidate(static_cast<std::int64_t>(random() % kBlocks));
        } catch (const InvalidArgument&) {  // in use
        }
        std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
    for (std::thread& thread : threads) thread.join();
    done = true;
    limits.join();
    EXPECT_GT(served, kCallers * kCalls / 4);
    engine.check();
    engine.close();
    for (const std::string& complaint : cuda_->complaints()) ADD_FAILURE() << complaint;
    EXPECT_EQ(cuda_->used(), 0);
  }
}

}  // namespace
}  // namespace vramkit::testing
