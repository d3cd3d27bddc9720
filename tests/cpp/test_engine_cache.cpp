// Block files in their cache: built once whoever asks, kept within bounds, and sound after kills.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <thread>
#include <vector>

#include "core/engine/block_cache.hpp"
#include "core/sha256.hpp"
#include "engine_cases.hpp"

namespace vramkit::testing {
namespace {

using Bytes = std::vector<std::int64_t>;

class EngineCache : public EngineTest {
 protected:
  BlockCache cache(std::int64_t most = 1 << 20) { return BlockCache(path("cache"), most); }

  static BlockCache::Fill fill(std::atomic<int>* calls = nullptr, std::uint64_t seed = 0) {
    return [calls, seed](std::int64_t block, std::byte* dst) {
      if (calls != nullptr) ++*calls;
      const std::string data = pattern(sizes()[static_cast<std::size_t>(block)],
                                       seed + static_cast<std::uint64_t>(block));
      std::memcpy(dst, data.data(), data.size());
    };
  }
  static Bytes sizes() { return {5'000, 4'096, 0, 12'345}; }
  static constexpr std::int64_t kFileBytes = 4'096 + 8'192 + 4'096 + 16'384;

  static void expect_right(const BlockFile& file, std::uint64_t seed = 0) {
    std::ifstream in(file.path(), std::ios::binary);
    const std::string all{std::istreambuf_iterator<char>(in), {}};
    for (std::size_t block = 0; block < sizes().size(); ++block) {
      EXPECT_EQ(file.offsets()[block] % kDirectUnit, 0);
      EXPECT_TRUE(all.substr(static_cast<std::size_t>(file.offsets()[block]),
                             static_cast<std::size_t>(sizes()[block])) ==
                  pattern(sizes()[block], seed + block));
    }
  }
  std::vector<std::string> leftovers() const {
    std::vector<std::string> names;
    for (const auto& e : fs::recursive_directory_iterator(path("cache"))) {
      if (e.path().extension() == ".tmp") names.push_back(e.path());
    }
    return names;
  }
};
class EngineCacheThreads : public EngineCache {};

TEST(EngineSha256, StandardVectors) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_hex(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_F(EngineCache, BuiltOnceThenFound) {
  std::atomic<int> calls{0};
  BlockCache first = cache();
  const auto built = first.open("key", sizes(), fill(&calls));
  EXPECT_TRUE(built->built());
  expect_right(*built);
  BlockCache second = cache();
  const auto found = second.open("key", sizes(), fill(&calls));
  EXPECT_FALSE(found->built());
  EXPECT_EQ(found->path(), built->path());
  EXPECT_EQ(calls, 3);  // the empty block is not asked for
  EXPECT_EQ(first.bytes(), kFileBytes);
  // Another key or other sizes are other files.
  EXPECT_TRUE(second.open("other", sizes(), fill(&calls))->built());
  expect_right(*second.open("key", sizes(), fill(&calls)));
}

TEST_F(EngineCache, DamagedFilesAreBuiltAgain) {
  for (const std::int64_t size : {0, 100, 4'096, 9'000}) {
    std::string name;
    {
      BlockCache c = cache();
      name = c.open("key", sizes(), fill())->path();
    }
    fs::resize_file(name, static_cast<std::uintmax_t>(size));
    BlockCache c = cache();
    const auto again = c.open("key", sizes(), fill());
    EXPECT_TRUE(again->built()) << size;
    expect_right(*again);
  }
}

TEST_F(EngineCache, FailuresLeaveNothing) {
  BlockCache c = cache();
  EXPECT_THROW(c.open("key", sizes(),
                      [](std::int64_t block, std::byte*) {
                        if (block == 1) throw SystemError(EIO, "source");
                      }),
               SystemError);
  EXPECT_TRUE(leftovers().empty());
  EXPECT_THROW(c.open("key", sizes(), fill(), [] { return true; }), Interrupted);
  EXPECT_TRUE(leftovers().empty());
  // A disk or a limit that has no room for it.
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before{}, small{};
  getrlimit(RLIMIT_FSIZE, &before);
  small = before;
  small.rlim_cur = 10'000;
  setrlimit(RLIMIT_FSIZE, &small);
  EXPECT_EQ(code_of([&] { c.open("key", sizes(), fill()); }), EFBIG);
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_TRUE(leftovers().empty());
  EXPECT_TRUE(c.open("key", sizes(), fill())->built());
}

TEST_F(EngineCache, TheLeastRecentlyUsedGoes) {
  BlockCache c = cache(3 * (kFileBytes + kDirectUnit));
  for (const char* key : {"a", "b", "c"}) {
    c.open(key, sizes(), fill());
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  const auto a = c.open("a", sizes(), fill());  // used last, and in use
  EXPECT_FALSE(a->built());
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_TRUE(c.open("d", sizes(), fill())->built());
  EXPECT_EQ(c.bytes(), 3 * kFileBytes);
  EXPECT_FALSE(c.open("c", sizes(), fill())->built());
  EXPECT_TRUE(c.open("b", sizes(), fill())->built());  // went for d
  EXPECT_EQ(c.trim(0), kFileBytes);                    // a is in use
  expect_right(*a);
  BlockCache narrow = cache(kFileBytes + kDirectUnit + 1);
  try {
    narrow.open("e", sizes(), fill());
    FAIL();
  } catch (const BudgetError& error) {
    EXPECT_GT(error.needed(), kFileBytes);
  }
  EXPECT_THROW(cache(100).open("f", sizes(), fill()), BudgetError);
}

// The child's exit code, or minus the signal that ended it.
template <typename Function>
int in_child(Function function) {
  const pid_t child = fork();
  if (child == 0) {
    int code = 1;
    try {
      code = function();
    } catch (...) {  // NOLINT(bugprone-empty-catch): code says so
    }
    ::_exit(code);
  }
  return child;
}
int result_of(int child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

TEST_F(EngineCache, KilledBuilders) {
  for (std::int64_t at = 0; at < 4; ++at) {
    const int child = in_child([&] {
      BlockCache c = cache();
      c.open("key", sizes(), [&](std::int64_t block, std::byte*) {
        if (block == at) ::kill(::getpid(), SIGKILL);
      });
      return 0;
    });
    EXPECT_EQ(result_of(child), at == 2 ? 0 : -SIGKILL);  // block 2 is empty: never filled
    if (at == 2) {
      cache().trim(0);
      continue;
    }
    EXPECT_EQ(leftovers().size(), 1U);
    BlockCache c = cache();
    auto file = c.open("key", sizes(), fill());
    EXPECT_TRUE(file->built());
    expect_right(*file);
    EXPECT_TRUE(leftovers().empty());
    EXPECT_EQ(c.trim(0), kFileBytes);  // in use
    file.reset();
    EXPECT_EQ(c.trim(0), 0);
  }
  EXPECT_EQ(cache().trim(0), 0);
  EXPECT_EQ(listing().size(), 1U);
}

TEST_F(EngineCache, SeveralProcessesBuildItOnce) {
  std::vector<int> children;
  for (int i = 0; i < 4; ++i) {
    children.push_back(in_child([&] {
      BlockCache c = cache();
      const auto file = c.open("key", sizes(), [](std::int64_t block, std::byte* dst) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        fill()(block, dst);
      });
      expect_right(*file);
      return HasFailure() ? 1 : (file->built() ? 10 : 20);
    }));
  }
  int built = 0, found = 0;
  for (int child : children) {
    const int result = result_of(child);
    built += result == 10;
    found += result == 20;
  }
  EXPECT_EQ(built, 1);
  EXPECT_EQ(found, 3);
}

TEST_F(EngineCacheThreads, BuildersAndTrimmersAtOnce) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      BlockCache c = cache(3 * (kFileBytes + kDirectUnit));
      for (int i = 0; i < 12; ++i) {
        const int key = (i * 7 + t) % 4;
        try {
          const auto file = c.open("key" + std::to_string(key), sizes(),
                                   fill(nullptr, static_cast<std::uint64_t>(key) * 100));
          expect_right(*file, static_cast<std::uint64_t>(key) * 100);
        } catch (const BudgetError&) {  // the others use all there is room for
        }
        if (i % 5 == 4) c.trim(kFileBytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(cache().bytes(), 3 * (kFileBytes + kDirectUnit));
  EXPECT_TRUE(leftovers().empty());
}

TEST_F(EngineCache, FromFilesToTheEngine) {
  EngineConfig scattered;
  const std::string data = pattern(60'000, 3);
  scattered.sources = {std::make_shared<FileSource>(put(data, "data"))};
  scattered.blocks = {{"a", 9'000, {{0, 11, 0, 4'000}, {0, 40'003, 4'000, 5'000}}},
                      {"b", 6'000, {{0, 10'001, 64, 5'900}}}};
  const std::string key = describe(scattered.sources, scattered.blocks);
  BlockCache c = cache();
  const auto file = c.open(key, Bytes{9'000, 6'000}, [&](std::int64_t block, std::byte* dst) {
    read_block(scattered.sources, scattered.blocks[static_cast<std::size_t>(block)], dst);
  });
  EngineConfig config;
  config.backend = std::make_shared<HostBackend>(memory_);
  config.sources = {std::make_shared<FileSource>(file->path())};
  config.blocks = {{"a", 9'000, {{0, file->offsets()[0], 0, 9'000}}},
                   {"b", 6'000, {{0, file->offsets()[1], 0, 6'000}}}};
  config.options.limit = 3 * kSmallPage;
  Engine engine(std::move(config));
  EXPECT_EQ(engine.stats().staging, 0);  // all of it can be read straight into place
  for (int round = 0; round < 3; ++round) {
    const std::byte* at = engine.acquire(0);
    EXPECT_EQ(std::memcmp(at, data.data() + 11, 4'000), 0);
    EXPECT_EQ(std::memcmp(at + 4'000, data.data() + 40'003, 5'000), 0);
    engine.release(0);
    at = engine.acquire(1);
    EXPECT_EQ(std::memcmp(at + 64, data.data() + 10'001, 5'900), 0);
    engine.release(1);
  }
  // The key is of the file as it is: another time of change is another key.
  fs::last_write_time(path("data"), fs::last_write_time(path("data")) + std::chrono::seconds(1));
  scattered.sources = {std::make_shared<FileSource>(path("data"))};
  EXPECT_NE(describe(scattered.sources, scattered.blocks), key);
  const auto store = std::make_shared<HostStore>(memory_, 100);
  scattered.sources.push_back(source_of(store));
  EXPECT_THROW(describe(scattered.sources, scattered.blocks), InvalidArgument);
}

}  // namespace
}  // namespace vramkit::testing
