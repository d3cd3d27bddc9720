// What the engine's tests share: files and memory with bytes that tell where they come from, disks
// that wait, fail and fall short on demand, and engines over them, on each device that there is:
// this machine, and a CUDA device of fake_cuda.hpp with and without virtual memory management.
#pragma once
#include <fcntl.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint_files.hpp"
#include "core/engine/cuda_backend.hpp"
#include "core/engine/engine.hpp"
#include "fake_cuda.hpp"

namespace vramkit::testing {

inline constexpr std::int64_t kSmallPage = 4096;

// Differs between neighbours, blocks and files; a shift by any amount is seen.
inline std::string pattern(std::int64_t bytes, std::uint64_t seed) {
  std::string data(static_cast<std::size_t>(bytes), '\0');
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ULL + 1;
  for (char& c : data) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    c = static_cast<char>(x >> 32);
  }
  return data;
}

// A disk under the test's control. Its "direct" reads are ordinary ones, so that every file system
// will do.
class TestDisk : public DiskCalls {
 public:
  // Instead of a read, where it returns a value: minus errno, or fewer bytes than asked for.
  std::function<std::int64_t(std::int64_t call, std::int64_t bytes)> instead;
  std::atomic<bool> in_cache{false};
  std::atomic<bool> has_direct{true};
  static constexpr std::int64_t kDoIt = INT64_MIN;

  Descriptor reopen_direct(const Descriptor& file) const override {
    return has_direct ? Descriptor(::fcntl(file.get(), F_DUPFD_CLOEXEC, 0)) : Descriptor();
  }
  std::int64_t read(const Descriptor& file, void* dst, std::int64_t bytes,
                    std::int64_t offset) const override {
    {
      std::unique_lock lock(mutex_);
      ++arrived_;
      changed_.notify_all();
      changed_.wait(lock, [&] { return !held_; });
    }
    const std::int64_t call = calls++;
    if (instead) {
      const std::int64_t answer = instead(call, bytes);
      if (answer < 0 && answer != kDoIt) return answer;
      if (answer >= 0) bytes = std::min(bytes, answer);
    }
    return DiskCalls::read(file, dst, bytes, offset);
  }
  std::int64_t cached(const Descriptor&, std::int64_t, std::int64_t bytes) const override {
    return in_cache ? bytes : 0;
  }

  // From now on reads wait, until let_go().
  void hold() {
    const std::scoped_lock lock(mutex_);
    held_ = true;
    arrived_ = 0;
  }
  void let_go() {
    const std::scoped_lock lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }
  void wait_for_reads(int count) const {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return arrived_ >= count; });
  }

  mutable std::atomic<std::int64_t> calls{0};

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool held_ = false;
  mutable int arrived_ = 0;
};

template <typename Condition>
bool soon(Condition condition) {
  for (int i = 0; i < 40'000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  }
  return false;
}

template <typename Function>
auto elsewhere(Function function) {
  return std::async(std::launch::async, function);
}

enum class DeviceKind { host, cuda, cuda_pieces };

// Blocks in one file, one after another, or in memory.
class EngineTest : public CheckpointFolderTest {
 protected:
  static constexpr std::int64_t kBlock = 3 * kSmallPage;

  void use(DeviceKind kind) {
    kind_ = kind;
    if (kind == DeviceKind::host) return;
    FakeCuda::Options options;
    options.granularity = kind == DeviceKind::cuda ? kSmallPage : 0;
    cuda_ = std::make_shared<FakeCuda>(options);
  }
  void TearDown() override {
    if (cuda_ != nullptr) {
      for (const std::string& complaint : cuda_->complaints()) ADD_FAILURE() << complaint;
    }
    CheckpointFolderTest::TearDown();
  }
  bool on_host() const { return kind_ == DeviceKind::host; }

  std::shared_ptr<Backend> backend() {
    if (on_host()) return std::make_shared<HostBackend>(memory_);
    return std::make_shared<CudaBackend>(cuda_, 0, kSmallPage);
  }

  // `count` blocks of `bytes`, in a file, read through disk_.
  EngineConfig config(std::int64_t count, std::int64_t limit, std::int64_t bytes = kBlock) {
    std::string all;
    EngineConfig config;
    for (std::int64_t block = 0; block < count; ++block) {
      contents_.push_back(pattern(bytes, static_cast<std::uint64_t>(block) + 1));
      config.blocks.push_back({"block" + std::to_string(block),
                               bytes,
                               {{0, static_cast<std::int64_t>(all.size()), 0, bytes}}});
      all += contents_.back();
    }
    file_ = put(all, "blocks");
    config.sources = {std::make_shared<FileSource>(file_, DirectReads::automatic, disk_)};
    config.backend = backend();
    config.options.limit = limit;
    config.options.piece = kSmallPage;
    config.options.poison = true;
    config.options.timeline = 1000;
    return config;
  }

  // Of bytes on the device: seen at once there, or when the stream comes to it.
  void expect_bytes(const std::byte* at, const std::string& want, const std::string& what,
                    StreamHandle stream = nullptr) const {
    if (on_host()) {
      EXPECT_EQ(std::memcmp(at, want.data(), want.size()), 0) << what;
    } else {
      cuda_->expect(at, want, stream, what);
    }
  }
  std::byte first_byte(const std::byte* at) const {
    return on_host() ? *at : static_cast<std::byte>(cuda_->read(at, 1, nullptr)[0]);
  }
  void expect_content(const Engine& engine, std::int64_t block, const std::byte* at,
                      StreamHandle stream = nullptr) const {
    expect_bytes(at, contents_[static_cast<std::size_t>(block)], engine.spec(block).name, stream);
  }
  // One call of a block as a model makes it.
  void call(Engine& engine, std::int64_t block) const {
    const std::byte* at = engine.acquire(block);
    EXPECT_EQ(engine.state(block), BlockStatus::in_use);
    expect_content(engine, block, at);
    engine.release(block);
    engine.check();
  }
  void pass(Engine& engine) const {
    for (std::int64_t block = 0; block < engine.blocks(); ++block) call(engine, block);
  }
  // Waits until nothing is on its way.
  static void settle(const Engine& engine) {
    EXPECT_TRUE(soon([&] {
      for (std::int64_t block = 0; block < engine.blocks(); ++block) {
        const BlockStatus state = engine.state(block);
        if (state == BlockStatus::requested || state == BlockStatus::copying) return false;
      }
      return true;
    }));
  }

  DeviceKind kind_ = DeviceKind::host;
  std::shared_ptr<FakeCuda> cuda_;
  std::shared_ptr<Memory> memory_ = std::make_shared<HostMemory>(kSmallPage);
  std::shared_ptr<TestDisk> disk_ = std::make_shared<TestDisk>();
  std::vector<std::string> contents_;
  std::string file_;
};

class EngineOnEach : public EngineTest, public ::testing::WithParamInterface<DeviceKind> {
 protected:
  void SetUp() override {
    EngineTest::SetUp();
    use(GetParam());
  }
};
inline const auto kEachDevice =
    ::testing::Values(DeviceKind::host, DeviceKind::cuda, DeviceKind::cuda_pieces);
inline std::string device_name(const ::testing::TestParamInfo<DeviceKind>& info) {
  static constexpr const char* kNames[] = {"host", "cuda", "cuda_pieces"};
  return kNames[static_cast<int>(info.param)];
}

}  // namespace vramkit::testing
