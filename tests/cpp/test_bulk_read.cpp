// Many bytes at once: every way of reading and every misfit of file and memory gives the file's
// bytes, nothing beside them is written, and every error ends the reading with all threads gone.
// And files as memory.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <thread>

#include "core/engine/bulk_read.hpp"
#include "core/engine/mapping.hpp"
#include "core/platform/memory.hpp"
#include "core/safetensors.hpp"
#include "engine_cases.hpp"

namespace vramkit::testing {
namespace {

constexpr std::int64_t kPiece = 4 * kSmallPage;
constexpr char kGuard = '\x5a';

class BulkRead : public CheckpointFolderTest {
 protected:
  std::shared_ptr<FileSource> source(const std::string& bytes, const std::string& name = "file") {
    return std::make_shared<FileSource>(put(bytes, name), DirectReads::automatic, disk_);
  }
  // Memory with guards around it; `misfit` is its address modulo a unit.
  std::byte* room(std::int64_t bytes, std::int64_t misfit) {
    memory_.assign(static_cast<std::size_t>(bytes + 4 * kDirectUnit), kGuard);
    const auto start = reinterpret_cast<std::uintptr_t>(memory_.data());
    const auto unit = static_cast<std::uintptr_t>(kDirectUnit);
    const auto skip = unit - start % unit + unit + static_cast<std::uintptr_t>(misfit);
    return reinterpret_cast<std::byte*>(memory_.data()) + skip;
  }
  // What was read, and whether the guards around it are as they were.
  void expect(const std::byte* at, const std::string& want) const {
    const char* read = reinterpret_cast<const char*>(at);
    EXPECT_TRUE(std::equal(want.begin(), want.end(), read));
    EXPECT_TRUE(std::all_of(memory_.data(), read, [](char c) { return c == kGuard; }));
    EXPECT_TRUE(std::all_of(read + want.size(), memory_.data() + memory_.size(),
                            [](char c) { return c == kGuard; }));
  }

  std::shared_ptr<TestDisk> disk_ = std::make_shared<TestDisk>();
  std::string memory_;
  static constexpr BulkReadOptions kOptions{3, kPiece, false};
};

using Sources = std::vector<std::shared_ptr<const Source>>;

TEST_F(BulkRead, EveryMisfitAndPathGivesTheFilesBytesAndNoMore) {
  const std::string all = pattern(9 * kPiece + 77, 1);
  for (const bool cached : {true, false}) {
    for (const bool direct : {true, false}) {
      disk_->in_cache = cached;
      disk_->has_direct = direct;
      const Sources sources{source(all)};
      for (const std::int64_t offset : {0, 1, 100, 4096, 4097, 12288}) {
        for (const std::int64_t bytes : {0, 1, 4095, 4096, 9000, 5 * 16384 + 3}) {
          for (const std::int64_t misfit : {std::int64_t{0}, offset % kDirectUnit}) {
            std::byte* at = room(bytes, misfit);
            const std::vector<ReadRun> runs{{0, offset, bytes, at}};
            const auto by_path = read_runs(sources, runs, kOptions);
            expect(at,
                   all.substr(static_cast<std::size_t>(offset), static_cast<std::size_t>(bytes)));
            const ReadPath path = cached   ? ReadPath::cached
                                  : direct ? ReadPath::direct
                                           : ReadPath::plain;
            EXPECT_EQ(by_path[static_cast<std::size_t>(path)], bytes);
          }
        }
      }
    }
  }
}

TEST_F(BulkRead, WholeUnitsNeedNoBuffer) {
  const std::string all = pattern(5 * kPiece + 100, 2);
  const Sources sources{source(all)};
  std::byte* at = room(static_cast<std::int64_t>(all.size()) + kDirectUnit, 0);
  const std::vector<ReadRun> runs{{0, 100, static_cast<std::int64_t>(all.size()) - 100, at + 100}};
  BulkReadOptions options = kOptions;
  options.whole_units = true;
  read_runs(sources, runs, options);
  EXPECT_EQ(std::memcmp(at + 100, all.data() + 100, all.size() - 100), 0);
  EXPECT_EQ(disk_->calls, 6);  // as many as pieces: no edges are read apart
}

TEST_F(BulkRead, SeveralFilesAndRuns) {
  const std::string one = pattern(3 * kPiece, 3);
  const std::string two = pattern(2 * kPiece + 5, 4);
  const Sources sources{source(one, "one"), source(two, "two")};
  const auto large = static_cast<std::int64_t>(two.size());
  std::byte* at = room(kPiece + large + 10, 0);
  const std::vector<ReadRun> runs{
      {0, kPiece, kPiece, at}, {1, 0, large, at + kPiece}, {0, 3, 10, at + kPiece + large}};
  std::int64_t last = 0;
  read_runs(sources, runs, kOptions, [&](std::int64_t done) {
    EXPECT_GE(done, last);
    last = done;
    return false;
  });
  expect(at, one.substr(kPiece, kPiece) + two + one.substr(3, 10));
  EXPECT_EQ(last, kPiece + large + 10);
}

TEST_F(BulkRead, RunsThatAreNotThereAreRefused) {
  const Sources sources{source(pattern(100, 5))};
  std::byte* at = room(200, 0);
  const auto refused = [&](ReadRun run, BulkReadOptions options = kOptions) {
    EXPECT_THROW(read_runs(sources, std::vector<ReadRun>{run}, options), InvalidArgument);
  };
  refused({1, 0, 10, at});
  refused({-1, 0, 10, at});
  refused({0, 91, 10, at});
  refused({0, -1, 10, at});
  refused({0, 0, -1, at});
  refused({0, INT64_MAX, INT64_MAX, at});
  refused({0, 0, 10, nullptr});
  refused({0, 0, 10, at}, {0, kPiece, false});
  refused({0, 0, 10, at}, {1, 100, false});
  EXPECT_EQ(disk_->calls, 0);
}

TEST_F(BulkRead, EveryReadThatFailsIsAnError) {
  const std::string all = pattern(6 * kPiece + 9, 6);
  const std::vector<ReadRun> runs{
      {0, 1, static_cast<std::int64_t>(all.size()) - 1, room(7 * kPiece, 8)}};
  for (const int code : {EIO, ENOMEM, ESTALE}) {
    bool failed = true;
    for (std::int64_t nth = 0; failed; ++nth) {
      disk_ = std::make_shared<TestDisk>();
      std::atomic<bool> now{false};
      disk_->instead = [&](std::int64_t call, std::int64_t) {
        if (call != nth) return TestDisk::kDoIt;
        now = true;
        return static_cast<std::int64_t>(-code);
      };
      const Sources sources{source(all)};
      int found = 0;
      try {
        read_runs(sources, runs, kOptions);
      } catch (const SystemError& error) {
        found = error.code();
      }
      failed = now;
      EXPECT_EQ(found, failed ? code : 0) << nth;
    }
  }
}

TEST_F(BulkRead, ShortReadsAndRefusedDirectReadsAreNone) {
  const std::string all = pattern(6 * kPiece + 9, 7);
  const auto size = static_cast<std::int64_t>(all.size());
  for (const std::int64_t answer : {-EINTR, -EINVAL, 1, 4096, 5000}) {
    disk_ = std::make_shared<TestDisk>();
    disk_->instead = [&](std::int64_t call, std::int64_t) {
      const bool now = answer == -EINVAL ? call == 0 : call % 2 == 0;
      return now ? static_cast<std::int64_t>(answer) : TestDisk::kDoIt;
    };
    const Sources sources{source(all)};
    std::byte* at = room(size, 0);
    read_runs(sources, std::vector<ReadRun>{{0, 0, size, at}}, kOptions);
    expect(at, all);
  }
}

TEST_F(BulkRead, AFileThatChangesMeanwhileIsAnError) {
  const std::string all = pattern(8 * kPiece, 8);
  const auto size = static_cast<std::int64_t>(all.size());
  const std::vector<ReadRun> runs{{0, 0, size, room(size, 0)}};
  for (const bool cut : {true, false}) {
    disk_ = std::make_shared<TestDisk>();
    const auto file = source(all);
    disk_->instead = [&](std::int64_t call, std::int64_t) {
      if (call == 4) {
        if (cut) {
          EXPECT_EQ(::truncate(file->name().c_str(), size / 2), 0);
        } else {
          fs::last_write_time(file->name(),
                              fs::file_time_type::clock::now() + std::chrono::seconds(5));
        }
      }
      return TestDisk::kDoIt;
    };
    EXPECT_THROW(read_runs(Sources{file}, runs, kOptions), FileChangedError);
  }
}

TEST_F(BulkRead, CanBeBrokenOffWhileTheDiskHangs) {
  const std::string all = pattern(8 * kPiece, 9);
  const auto size = static_cast<std::int64_t>(all.size());
  const Sources sources{source(all)};
  const std::vector<ReadRun> runs{{0, 0, size, room(size, 0)}};
  disk_->hold();
  int asked = 0;
  std::future<void> later;
  EXPECT_THROW(read_runs(sources, runs, kOptions,
                         [&](std::int64_t) {
                           if (++asked < 3) return false;
                           later = elsewhere([&] {
                             std::this_thread::sleep_for(std::chrono::milliseconds(200));
                             disk_->let_go();
                           });
                           return true;
                         }),
               Interrupted);
  EXPECT_LT(disk_->calls, 8);  // what nobody had begun was not read
  disk_->hold();
  EXPECT_THROW(read_runs(sources, runs, kOptions,
                         [&](std::int64_t) -> bool {
                           disk_->let_go();
                           throw std::runtime_error("a caller's own");
                         }),
               std::runtime_error);
}

TEST_F(BulkRead, ASourceIsTheFileWhoseHeaderWasRead) {
  const std::string header = "{" + entry("a", "U8", "[8]", "[0,8]") + "}";
  const std::string name = put(file_of(header, 8));
  const SafetensorsFile file(name);
  EXPECT_EQ(source_of(file)->identity(), file.identity());
  fs::rename(put(file_of(header, 8), "other"), name);
  EXPECT_THROW(source_of(file), FileChangedError);
  const SafetensorsFile again(name);
  fs::last_write_time(name, fs::file_time_type::clock::now() + std::chrono::seconds(5));
  EXPECT_THROW(source_of(again), FileChangedError);
}

TEST(HostStore, PartsThatNobodyNeedsGoBack) {
  auto counted_below = std::make_shared<HostMemory>(kSmallPage);
  auto counted = std::make_shared<CountedMemory>(*counted_below);
  {
    HostStore store(counted, 10 * kSmallPage);
    EXPECT_EQ(counted->counts().committed, 10 * kSmallPage);
    store.discard(1, 3 * kSmallPage);  // whole pages in it: two
    EXPECT_EQ(counted->counts().committed, 8 * kSmallPage);
    store.discard(100, 50);
    EXPECT_EQ(counted->counts().committed, 8 * kSmallPage);
    store.data()[0] = store.data()[3 * kSmallPage] = std::byte{1};  // what shares a page is there
  }
  EXPECT_EQ(counted->counts().reserved, 0);
}

class Mapping : public CheckpointFolderTest {
 protected:
  std::shared_ptr<const FileSource> source(const std::string& bytes, const std::string& name) {
    return std::make_shared<FileSource>(put(bytes, name));
  }
};

TEST_F(Mapping, ExtentsLieWhereTheBlockHasThem) {
  const std::string one = pattern(5 * kSmallPage + 7, 1);
  const std::string two = pattern(3 * kSmallPage, 2);
  const std::vector<Extent> extents{{1, kSmallPage, 2 * kSmallPage, 2 * kSmallPage},
                                    {0, 3 * kSmallPage + 5, 5, 2 * kSmallPage - 5}};
  FileMapping mapping({source(one, "one"), source(two, "two")}, extents, 4 * kSmallPage);
  EXPECT_EQ(std::memcmp(mapping.data() + 5, one.data() + 3 * kSmallPage + 5, 2 * kSmallPage - 5),
            0);
  EXPECT_EQ(std::memcmp(mapping.data() + 2 * kSmallPage, two.data() + kSmallPage, 2 * kSmallPage),
            0);
}

TEST_F(Mapping, FindsWhereBytesLie) {
  const auto file = source(pattern(4 * kSmallPage, 3), "file");
  FileMapping mapping({file}, {{0, kSmallPage, 0, kSmallPage}, {0, 0, kSmallPage, kSmallPage}},
                      2 * kSmallPage);
  const auto found = mapping.find(mapping.data() + kSmallPage + 10, 20);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->source_offset, 10);
  EXPECT_EQ(found->block_offset, kSmallPage + 10);
  EXPECT_FALSE(mapping.find(mapping.data() + kSmallPage - 1, 2));  // of two extents
  EXPECT_FALSE(mapping.find(mapping.data() + 2 * kSmallPage - 1, 2));
  EXPECT_FALSE(mapping.find(mapping.data() - 1, 1));
}

TEST_F(Mapping, WritesStayHereAndAreSeen) {
  const std::string all = pattern(8 * kSmallPage, 4);
  FileMapping mapping({source(all, "file")}, {{0, 0, 0, 8 * kSmallPage}}, 8 * kSmallPage);
  EXPECT_FALSE(mapping.changed(0, 8 * kSmallPage));
  EXPECT_EQ(mapping.data()[kSmallPage], static_cast<std::byte>(all[kSmallPage]));  // looked at
  EXPECT_FALSE(mapping.changed(0, 8 * kSmallPage));
  mapping.data()[3 * kSmallPage + 9] ^= std::byte{1};
  EXPECT_TRUE(mapping.changed(0, 8 * kSmallPage));
  EXPECT_TRUE(mapping.changed(3 * kSmallPage, 100));
  EXPECT_FALSE(mapping.changed(0, 3 * kSmallPage));
  EXPECT_FALSE(mapping.changed(4 * kSmallPage, 4 * kSmallPage));
  EXPECT_FALSE(mapping.changed(5, 0));
  EXPECT_EQ(get("file"), all);
  const std::optional<bool> told = pages_written(mapping.data(), 8 * kSmallPage);
#if defined(__linux__)
  EXPECT_EQ(told, true);
#else
  EXPECT_FALSE(told);
#endif
}

TEST_F(Mapping, BadExtentsAreRefused) {
  const auto file = source(pattern(2 * kSmallPage, 5), "file");
  const auto refused = [&](std::vector<Extent> extents) {
    EXPECT_THROW(FileMapping({file}, std::move(extents), 2 * kSmallPage), InvalidArgument);
  };
  refused({{1, 0, 0, 10}});
  refused({{0, 0, 0, 3 * kSmallPage}});
  refused({{0, -1, 0, 10}});
  refused({{0, 0, kSmallPage, 2 * kSmallPage}});
  refused({{0, 1, 0, 10}});                   // not as the pages lie
  refused({{0, 0, 0, 10}, {0, 20, 20, 10}});  // one page twice
  refused({{0, 0, -kSmallPage, 10}});
  FileMapping empty({file}, {}, 0);
  EXPECT_FALSE(empty.changed(0, 0));
}

}  // namespace
}  // namespace vramkit::testing
