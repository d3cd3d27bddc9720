// The checkpoint writer: what it writes, what it refuses, and that nothing is left when a disk, a
// limit or its user says no.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint_files.hpp"
#include "core/error.hpp"
#include "core/safetensors.hpp"
#include "core/safetensors_writer.hpp"

namespace vramkit {
namespace {

namespace fs = std::filesystem;
using testing::code_of;
using testing::message_of;
using std::string_literals::operator""s;

class SafetensorsWriterTest : public testing::CheckpointFolderTest {};

TEST_F(SafetensorsWriterTest, WriterRoundTrips) {
  const std::map<std::string, std::string> metadata{{"format", "pt"}, {"q\"\\\n\x01", "\xC3\xA9/"}};
  const std::vector<TensorSpec> specs{{"z \"quoted\"\\\t\x7F", "U8", {5}},
                                      {"a", "F32", {2, 2}},
                                      {"none", "F16", {0, 3}},
                                      {"scalar", "F64", {}},
                                      {"", "BF16", {1}}};
  std::vector<std::string> data;
  for (const TensorSpec& s : specs) {
    std::string bytes(static_cast<std::size_t>(safetensors_bytes(s.dtype, s.shape)), '\0');
    std::iota(bytes.begin(), bytes.end(), static_cast<char>(data.size() * 50 + 1));
    data.push_back(bytes);
  }
  SafetensorsWriter writer(path(), specs, metadata);
  EXPECT_EQ(writer.info("a").begin, 4096 + 5);
  for (std::size_t i = specs.size(); i-- > 0;) {  // last first
    writer.write(specs[i].name, data[i].data(), static_cast<std::int64_t>(data[i].size()));
  }
  EXPECT_FALSE(fs::exists(path()));
  EXPECT_FALSE(writer.committed());
  writer.commit();
  EXPECT_TRUE(writer.committed());
  EXPECT_EQ(listing(), std::vector<std::string>{"model.safetensors"});

  const SafetensorsFile file(path());
  EXPECT_EQ(file.file_bytes(), writer.file_bytes());
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), specs.size());
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const TensorInfo& t = file.tensors()[i];
    EXPECT_EQ(t.name, specs[i].name);  // the order given
    EXPECT_EQ(t.dtype, specs[i].dtype);
    EXPECT_EQ(t.shape, specs[i].shape);
    EXPECT_EQ(t.begin, writer.tensors()[i].begin);
    std::string bytes(data[i].size(), '?');
    file.read_into(t.name, bytes.data(), t.bytes());
    EXPECT_EQ(bytes, data[i]);
  }
  EXPECT_EQ(file.tensors().front().begin % 4096, 0);
}

TEST_F(SafetensorsWriterTest, WriterIsDeterministicAndAligned) {
  for (const std::size_t length : {1u, 100u, 4000u, 4021u, 4022u, 4023u, 5000u, 9000u}) {
    std::string first;
    for (const char* name : {"one", "two"}) {
      SafetensorsWriter writer(path(name), {{std::string(length, 'n'), "U8", {3}}},
                               {{"b", "2"}, {"a", "1"}});
      EXPECT_EQ(writer.tensors()[0].begin % 4096, 0);
      EXPECT_LE(writer.tensors()[0].begin, static_cast<std::int64_t>(length) + 4096 + 120);
      writer.write(std::string(length, 'n'), "abc", 3);
      writer.commit();
      const std::string bytes = get(name);
      EXPECT_EQ(static_cast<std::int64_t>(bytes.size()), writer.file_bytes());
      if (first.empty()) first = bytes;
      EXPECT_TRUE(bytes == first);
    }
  }
}

TEST_F(SafetensorsWriterTest, WriterOfNothing) {
  SafetensorsWriter writer(path(), {});
  writer.commit();
  EXPECT_TRUE(SafetensorsFile(path()).names().empty());
}

TEST_F(SafetensorsWriterTest, WriterRefusesWhatCannotBeStored) {
  const auto make = [&](std::vector<TensorSpec> specs,
                        std::map<std::string, std::string> metadata = {}) {
    SafetensorsWriter writer(path(), specs, std::move(metadata));
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  EXPECT_NE(message_of<InvalidArgument>([&] {
              make({{"a", "U8", {}}, {"a", "U8", {}}});
            }).find("'a' is declared twice"),
            std::string::npos);
  EXPECT_THROW(make({{"__metadata__", "U8", {}}}), InvalidArgument);
  EXPECT_THROW(make({{"a\0b"s, "U8", {}}}), InvalidArgument);
  EXPECT_THROW(make({{"\xFF", "U8", {}}}), InvalidArgument);
  EXPECT_THROW(make({}, {{"\xFF", ""}}), InvalidArgument);
  EXPECT_THROW(make({}, {{"a", "\0"s}}), InvalidArgument);
  EXPECT_NE(message_of<InvalidArgument>([&] {
              make({{"a", "float32", {}}});
            }).find("unknown dtype 'float32'"),
            std::string::npos);
  EXPECT_THROW(make({{"a", "U8", {-1}}}), InvalidArgument);
  EXPECT_THROW(make({{"a", "F4", {3}}}), InvalidArgument);
  EXPECT_THROW(make({{"a", "U8", {kMost, 2}}}), InvalidArgument);
  EXPECT_THROW(make({{"a", "U8", {kMost / 8}},
                     {"b", "U8", {kMost / 8}},
                     {"c", "U8", {kMost / 8}},
                     {"d", "U8", {kMost / 8}},
                     {"e", "U8", {kMost / 8}},
                     {"f", "U8", {kMost / 8}},
                     {"g", "U8", {kMost / 8}},
                     {"h", "U8", {kMost / 8}}}),
               InvalidArgument);
  EXPECT_THROW(make({{"a", "U8", std::vector<std::int64_t>(257, 1)}}), InvalidArgument);
  EXPECT_THROW(make({{std::string(100'000'000, 'n'), "U8", {}}}), InvalidArgument);
  EXPECT_TRUE(listing().empty());
}

TEST_F(SafetensorsWriterTest, WriterTakesPartsAndCountsThem) {
  std::string data(1000, '\0');
  std::iota(data.begin(), data.end(), '\0');
  SafetensorsWriter writer(path(), {{"a", "U8", {1000}}, {"b", "U8", {2}}});
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    writer.write("a", data.data() + begin, end - begin, begin);
  };
  part(100, 200);
  part(300, 400);
  part(200, 300);  // joins both
  part(900, 1000);
  part(400, 400);  // nothing, which is fine anywhere
  for (const auto& [begin, end] : std::vector<std::pair<int, int>>{
           {100, 200}, {150, 160}, {99, 101}, {399, 401}, {0, 1000}, {0, 101}, {899, 901}}) {
    EXPECT_THROW(part(begin, end), InvalidArgument) << begin << " " << end;
  }
  EXPECT_NE(message_of<InvalidArgument>([&] {
              writer.commit();
            }).find("tensor 'a' is not complete: 400 of 1000"),
            std::string::npos);
  part(0, 100);
  part(400, 900);
  EXPECT_NE(message_of<InvalidArgument>([&] { writer.commit(); }).find("tensor 'b'"),
            std::string::npos);
  writer.write("b", data.data(), 2);
  EXPECT_THROW(writer.write("b", data.data(), 2), InvalidArgument);
  EXPECT_THROW(writer.write("b", data.data(), 3), InvalidArgument);
  EXPECT_THROW(writer.write("b", data.data(), 1, 2), InvalidArgument);
  EXPECT_THROW(writer.write("b", data.data(), -1), InvalidArgument);
  EXPECT_THROW(writer.write("b", data.data(), 1, -1), InvalidArgument);
  EXPECT_THROW(writer.write("b", nullptr, 1), InvalidArgument);
  EXPECT_THROW(writer.write("c", data.data(), 0), InvalidArgument);
  writer.commit();
  EXPECT_THROW(writer.commit(), InvalidArgument);
  EXPECT_THROW(writer.write("a", data.data(), 0), InvalidArgument);
  writer.discard();  // does nothing now
  std::string back(1000, '?');
  SafetensorsFile(path()).read_into("a", back.data(), 1000);
  EXPECT_EQ(back, data);
}

TEST_F(SafetensorsWriterTest, ThreadsWriteAtOnce) {
  constexpr std::int64_t kPart = 4096 + 13, kParts = 64;
  std::string data(kPart * kParts, '\0');
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 31 >> 3);
  SafetensorsWriter writer(path(), {{"a", "U8", {kPart * kParts}}});
  std::atomic<std::int64_t> next = 0;
  std::atomic<int> refused = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      // Every part is offered twice; one of the two must be refused.
      for (std::int64_t i; (i = next++) < 2 * kParts;) {
        const std::int64_t at = i / 2 * kPart;
        try {
          writer.write("a", data.data() + at, kPart, at);
        } catch (const InvalidArgument&) {
          ++refused;
        }
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(refused, kParts);
  writer.commit();
  std::string back(data.size(), '?');
  SafetensorsFile(path()).read_into("a", back.data(), kPart * kParts);
  EXPECT_TRUE(back == data);
}

TEST_F(SafetensorsWriterTest, NothingIsLeftWithoutCommit) {
  put("what was there before");
  {
    SafetensorsWriter writer(path(), {{"a", "U8", {4}}});
    writer.write("a", "abcd", 4);
    EXPECT_EQ(listing().size(), 2u);
  }
  EXPECT_EQ(listing(), std::vector<std::string>{"model.safetensors"});
  EXPECT_EQ(get(), "what was there before");
  SafetensorsWriter writer(path(), {{"a", "U8", {4}}});
  writer.discard();
  EXPECT_EQ(listing().size(), 1u);
  EXPECT_THROW(writer.write("a", "abcd", 4), InvalidArgument);
  EXPECT_THROW(writer.commit(), InvalidArgument);
}

TEST_F(SafetensorsWriterTest, CommitReplacesAFileAndASymbolicLink) {
  put("old");
  put("the target of the link", "blob");
  fs::create_symlink("blob", path("link"));
  for (const char* name : {"model.safetensors", "link"}) {
    SafetensorsWriter writer(path(name), {{"a", "U8", {1}}});
    writer.write("a", "x", 1);
    writer.commit();
    EXPECT_EQ(SafetensorsFile(path(name)).names(), std::vector<std::string>{"a"});
    EXPECT_FALSE(fs::is_symlink(path(name)));
  }
  EXPECT_EQ(get("blob"), "the target of the link");
  EXPECT_EQ(listing(), (std::vector<std::string>{"blob", "link", "model.safetensors"}));
}

TEST_F(SafetensorsWriterTest, FileHasOrdinaryPermissions) {
  const ::mode_t mask = ::umask(027);
  {
    SafetensorsWriter writer(path(), {});
    writer.commit();
  }
  ::umask(mask);
  EXPECT_EQ(static_cast<int>(fs::status(path()).permissions()), 0640);
}

TEST_F(SafetensorsWriterTest, LongestNameAndAChangeOfFolderDoNotMatter) {
  const std::string name(255, 'n');
  const fs::path before = fs::current_path();
  fs::current_path(folder_);
  {
    SafetensorsWriter writer(name, {});
    fs::current_path(before);
    writer.commit();
  }
  EXPECT_EQ(listing(), std::vector<std::string>{name});
}

TEST_F(SafetensorsWriterTest, AForkDoesNotRemoveItsParentsFile) {
  SafetensorsWriter writer(path(), {{"a", "U8", {1}}});
  const ::pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    writer.discard();
    ::_exit(0);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  writer.write("a", "x", 1);
  writer.commit();
  EXPECT_EQ(SafetensorsFile(path()).names().size(), 1u);
}

TEST_F(SafetensorsWriterTest, PlacesThatCannotBeWrittenAreRefused) {
  const auto make = [](const std::string& where) {
    SafetensorsWriter writer(where, {{"a", "U8", {1000}}});
  };
  put("a file", "plain");
  EXPECT_EQ(code_of([&] { make(path("plain/model.safetensors")); }), ENOTDIR);
  EXPECT_EQ(code_of([&] { make(path("absent/model.safetensors")); }), ENOENT);
  fs::create_directory(path("folder"));
  EXPECT_EQ(code_of([&] { make(path("folder")); }), EISDIR);
  EXPECT_THROW(make(path("folder/")), InvalidArgument);
  EXPECT_THROW(make(""), InvalidArgument);
  EXPECT_THROW(make("."), InvalidArgument);
  EXPECT_EQ(code_of([&] { make(path(std::string(256, 'n'))); }), ENAMETOOLONG);
#if defined(__linux__)
  // Refuses even root, whom permissions do not bind.
  EXPECT_NE(code_of([&] { make("/proc/self/model.safetensors"); }), 0);
#endif
  const std::string text = message_of<SystemError>([&] { make(path("plain/model.safetensors")); });
  EXPECT_NE(text.find(path("plain/model.safetensors")), std::string::npos) << text;
  EXPECT_NE(text.find("5096 bytes are needed"), std::string::npos) << text;
  EXPECT_EQ(listing(), (std::vector<std::string>{"folder", "plain"}));
}

TEST_F(SafetensorsWriterTest, FolderWithoutWritePermissionIsRefused) {
  const bool root = ::geteuid() == 0;
  fs::permissions(folder_, static_cast<fs::perms>(0555));
  if (root && ::seteuid(65534) != 0) GTEST_SKIP() << "root here cannot become another user";
  const int code = code_of([&] { SafetensorsWriter writer(path(), {}); });
  const std::string text = message_of<SystemError>([&] { SafetensorsWriter writer(path(), {}); });
  if (root) {
    ASSERT_EQ(::seteuid(0), 0);
  }
  fs::permissions(folder_, static_cast<fs::perms>(0700));
  EXPECT_EQ(code, EACCES);
  EXPECT_NE(text.find("may write to"), std::string::npos) << text;
  EXPECT_TRUE(listing().empty());
}

// Limits the size of files for as long as it lives, without the signal that would end the process.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(::rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    EXPECT_EQ(::getrlimit(RLIMIT_FSIZE, &before_), 0);
    ::rlimit limit = before_;
    limit.rlim_cur = bytes;
    EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  ::rlimit before_{};
  void (*handler_)(int);
};

TEST_F(SafetensorsWriterTest, AFileTooLargeFailsBeforeAnyWork) {
  put("old");
  int code = 0;
  std::string text;
  {
    const FileSizeLimit limit(100'000);
    try {
      SafetensorsWriter writer(path(), {{"a", "U8", {200'000}}});
      // Where the file system reserves nothing, the write is refused instead.
      const std::string data(200'000, 'x');
      writer.write("a", data.data(), 200'000);
    } catch (const SystemError& e) {
      code = e.code();
      text = e.what();
    }
  }
  EXPECT_EQ(code, EFBIG);
  EXPECT_NE(text.find(path()), std::string::npos) << text;
  EXPECT_NE(text.find("204096 bytes are needed"), std::string::npos) << text;
  EXPECT_EQ(listing(), std::vector<std::string>{"model.safetensors"});
  EXPECT_EQ(get(), "old");
}

TEST_F(SafetensorsWriterTest, AFailedWriteRemovesTheFileAndEndsTheWriter) {
  SafetensorsWriter writer(path(), {{"a", "U8", {200'000}}});
  const std::string data(200'000, 'x');
  {
    const FileSizeLimit limit(100'000);
    // Begins below the limit, so that part of it is written before the refusal.
    EXPECT_EQ(code_of([&] { writer.write("a", data.data(), 150'000); }), EFBIG);
  }
  EXPECT_TRUE(listing().empty());
  EXPECT_NE(message_of<InvalidArgument>([&] {
              writer.write("a", data.data(), 1, 199'999);
            }).find("earlier write failed"),
            std::string::npos);
  EXPECT_THROW(writer.commit(), InvalidArgument);
  EXPECT_FALSE(writer.committed());
}

TEST_F(SafetensorsWriterTest, DiskTooSmallIsNoticedAtTheStart) {
  // Where the file system cannot reserve, nothing can be noticed early.
  const std::int64_t bytes =
      static_cast<std::int64_t>(fs::space(folder_).capacity) + (std::int64_t{1} << 30);
  try {
    SafetensorsWriter writer(path(), {{"a", "U8", {bytes}}});
    GTEST_SKIP() << "this file system reserves no space";
  } catch (const SystemError& e) {
    EXPECT_EQ(e.code(), ENOSPC) << e.what();
    EXPECT_NE(std::string(e.what()).find(std::to_string(bytes + 4096)), std::string::npos)
        << e.what();
  }
  EXPECT_TRUE(listing().empty());
}

TEST_F(SafetensorsWriterTest, CommitIntoAFolderThatIsGoneFails) {
  fs::create_directory(path("sub"));
  SafetensorsWriter writer(path("sub/model.safetensors"), {});
  fs::remove_all(path("sub"));
  EXPECT_EQ(code_of([&] { writer.commit(); }), ENOENT);
  EXPECT_FALSE(writer.committed());
}

}  // namespace
}  // namespace vramkit
