// The engine on a GPU, with CUDA's own calls and memory in segments. Skipped where there is none;
// what can be proven without one is in test_engine_cuda.cpp.
#ifdef VRAMKIT_WITH_CUDA
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "cuda/runtime_calls.hpp"
#include "engine_cases.hpp"

namespace vramkit::testing {
namespace {

constexpr std::int64_t kMegabyte = std::int64_t{1} << 20;
constexpr std::int64_t kSegment = 2 * kMegabyte;
constexpr std::int64_t kLarge = 3 * kMegabyte;  // of a block: segments are shared

// As a device without virtual memory management has it.
class InPieces : public cuda::RuntimeCalls {
 public:
  CudaStatus allocation_granularity(int, std::int64_t* granularity) override {
    *granularity = 0;
    return kCudaSuccess;
  }
};

class EngineGpu : public EngineTest {
 protected:
  void SetUp() override {
    EngineTest::SetUp();
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      static_cast<void>(cudaGetLastError());
      GTEST_SKIP() << "no GPU";
    }
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    if (stream_ != nullptr) {
      EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
      EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
      EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    }
    EngineTest::TearDown();
  }

  EngineConfig blocks(std::shared_ptr<CudaCalls> calls, bool pinned, std::int64_t count,
                      std::int64_t limit) {
    const auto gpu = std::make_shared<CudaBackend>(std::move(calls), 0, kSegment);
    contents_.clear();
    EngineConfig c = config(count, limit, kLarge);
    if (pinned) {
      const auto store = std::make_shared<HostStore>(gpu->shared_staging(), count * kLarge);
      for (std::size_t block = 0; block < contents_.size(); ++block) {
        std::memcpy(store->data() + static_cast<std::int64_t>(block) * kLarge,
                    contents_[block].data(), contents_[block].size());
      }
      c.sources = {source_of(store)};
    } else {
      c.sources = {std::make_shared<FileSource>(file_)};
    }
    c.backend = gpu;
    c.options.piece = kMegabyte;
    return c;
  }

  // A call whose "kernel" is a copy of the block to elsewhere on the device, on the stream: read at
  // the end, so that nothing waits in between.
  struct Result {
    std::int64_t block;
    void* copy;
  };
  void run(Engine& engine, std::int64_t block) {
    const std::byte* at = engine.acquire(block, stream_);
    void* copy = nullptr;
    ASSERT_EQ(cudaMallocAsync(&copy, kLarge, stream_), cudaSuccess);
    ASSERT_EQ(cudaMemcpyAsync(copy, at, kLarge, cudaMemcpyDeviceToDevice, stream_), cudaSuccess);
    results_.push_back({block, copy});
    engine.release(block, stream_);
    engine.check();
  }
  void expect_all_right() {
    for (const Result& result : results_) {
      std::string got(static_cast<std::size_t>(kLarge), '\0');
      ASSERT_EQ(cudaMemcpyAsync(got.data(), result.copy, kLarge, cudaMemcpyDeviceToHost, stream_),
                cudaSuccess);
      ASSERT_EQ(cudaFreeAsync(result.copy, stream_), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
      EXPECT_TRUE(got == contents_[static_cast<std::size_t>(result.block)]) << result.block;
    }
    results_.clear();
  }

  cudaStream_t stream_ = nullptr;
  std::vector<Result> results_;
};

TEST_F(EngineGpu, PassesUnderALimit) {
  for (const bool in_pieces : {false, true}) {
    for (const bool pinned : {true, false}) {
      std::shared_ptr<CudaCalls> calls;
      if (in_pieces) {
        calls = std::make_shared<InPieces>();
      } else {
        calls = std::make_shared<cuda::RuntimeCalls>();
      }
      const std::int64_t limit = in_pieces ? 40 * kMegabyte : 24 * kMegabyte;
      Engine engine(blocks(std::move(calls), pinned, 10, limit));
      EXPECT_EQ(engine.contiguous(), !in_pieces);
      for (int round = 0; round < 4; ++round) {
        for (std::int64_t block = 0; block < 10; ++block) run(engine, block);
      }
      EXPECT_LE(engine.stats().committed, limit);
      expect_all_right();
      engine.close();
    }
  }
}

TEST_F(EngineGpu, ResidentsAreGivenUpAndTheMemoryGoesBack) {
  const auto calls = std::make_shared<cuda::RuntimeCalls>();
  Engine engine(blocks(calls, true, 64, 256 * kMegabyte));
  for (std::int64_t block = 0; block < 64; ++block) run(engine, block);
  expect_all_right();
  const std::int64_t before = engine.backend().memory_info()->free;
  const std::int64_t given = engine.give_up(128 * kMegabyte);
  EXPECT_GE(given, 128 * kMegabyte);
  // Others on the machine may take or give a little meanwhile.
  EXPECT_GE(engine.backend().memory_info()->free - before, given / 2);
  for (std::int64_t block = 0; block < 64; ++block) run(engine, block);
  engine.resize(256 * kMegabyte);
  for (int round = 0; round < 2; ++round) {
    for (std::int64_t block = 0; block < 64; block += 3) run(engine, block);
  }
  expect_all_right();
}

TEST_F(EngineGpu, TwoStreamsInTurn) {
  EngineConfig c = blocks(std::make_shared<cuda::RuntimeCalls>(), true, 8, 16 * kMegabyte);
  Engine engine(std::move(c));
  cudaStream_t other = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), cudaSuccess);
  for (int round = 0; round < 6; ++round) {
    for (std::int64_t block = 0; block < 8; ++block) {
      run(engine, block);
      std::swap(stream_, other);
      run(engine, block);
      std::swap(stream_, other);
    }
  }
  ASSERT_EQ(cudaStreamSynchronize(other), cudaSuccess);
  ASSERT_EQ(cudaStreamDestroy(other), cudaSuccess);
  expect_all_right();
}

TEST_F(EngineGpu, NoMemoryIsSaidWithBytesAndLeavesNoError) {
  CudaBackend gpu(std::make_shared<cuda::RuntimeCalls>(), 0, kSegment);
  const std::int64_t bytes = gpu.memory_info()->total / kSegment * kSegment + 4 * kSegment;
  try {
    const Allocation all(gpu.memory(), bytes);
    FAIL();
  } catch (const OutOfMemoryError& error) {
    EXPECT_GT(error.bytes(), 0);
  }
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  const Allocation some(gpu.memory(), kSegment);
  gpu.fill(some.data(), 0x5A, kSegment);
  unsigned char byte = 0;
  ASSERT_EQ(cudaMemcpy(&byte, some.data() + kSegment - 1, 1, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(byte, 0x5A);
}

TEST_F(EngineGpu, PinnedMemoryIsKnown) {
  CudaBackend gpu(std::make_shared<cuda::RuntimeCalls>(), 0, kSegment);
  const Allocation pinned(gpu.staging(), 3 * kMegabyte + kSmallPage);
  EXPECT_TRUE(gpu.copies_from(pinned.data(), pinned.bytes()));
  const std::string plain(4096, 'x');
  EXPECT_FALSE(gpu.copies_from(reinterpret_cast<const std::byte*>(plain.data()), 4096));
}

}  // namespace
}  // namespace vramkit::testing
#endif
