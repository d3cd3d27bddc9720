// The checkpoint reader, above all against files made to deceive it.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint_files.hpp"
#include "core/error.hpp"
#include "core/safetensors.hpp"
#include "core/safetensors_writer.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

using testing::code_of;
using testing::entry;
using testing::file_of;
using testing::message_of;
using testing::prefix;
using std::string_literals::operator""s;

class SafetensorsTest : public testing::CheckpointFolderTest {};

TEST_F(SafetensorsTest, ReadsNamesInfoMetadataAndBytes) {
  // The header names b before a, and an empty tensor shares a's offset: order is by position.
  const std::string header =
      "{" + entry("b", "F32", "[2]", "[4,12]") + "," + entry("a", "U8", "[2,2]", "[0,4]") + "," +
      entry("empty", "F64", "[3,0]", "[4,4]") + "," + entry("scalar", "BF16", "[]", "[12,14]") +
      ",\"__metadata__\":{\"format\":\"pt\",\"k\\u00e9\":\"\\ud83d\\ude00\"}}  ";
  const std::string bytes = file_of(header, 14);
  const SafetensorsFile file(put(bytes));
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "empty", "b", "scalar"}));
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{
                                 {"format", "pt"}, {"k\xC3\xA9", "\xF0\x9F\x98\x80"}}));
  EXPECT_EQ(file.file_bytes(), static_cast<std::int64_t>(bytes.size()));

  const auto begin = static_cast<std::int64_t>(8 + header.size());
  const TensorInfo& b = file.info("b");
  EXPECT_EQ(b.dtype, "F32");
  EXPECT_EQ(b.shape, (std::vector<std::int64_t>{2}));
  EXPECT_EQ(b.begin, begin + 4);
  EXPECT_EQ(b.end, begin + 12);
  EXPECT_EQ(b.bytes(), 8);
  EXPECT_EQ(file.info("empty").bytes(), 0);
  EXPECT_TRUE(file.info("scalar").shape.empty());

  std::string data(8, '?');
  file.read_into("b", data.data(), 8);
  EXPECT_EQ(data, bytes.substr(static_cast<std::size_t>(b.begin), 8));
  std::string part(3, '?');
  file.read_range("b", 2, part.data(), 3, true);
  EXPECT_EQ(part, data.substr(2, 3));
  file.read_into("empty", nullptr, 0);
  file.read_range("b", 8, nullptr, 0);
}

TEST_F(SafetensorsTest, ReadsAFileWithoutTensors) {
  const SafetensorsFile file(put(file_of("{}")));
  EXPECT_TRUE(file.names().empty());
  EXPECT_TRUE(file.metadata().empty());
}

TEST_F(SafetensorsTest, EveryDtypeHasItsSize) {
  ASSERT_EQ(safetensors_dtypes().size(), 22u);
  for (const auto& [name, bits] : safetensors_dtypes()) {
    EXPECT_EQ(safetensors_bytes(name, std::vector<std::int64_t>{3, 8}), 3 * bits) << name;
    const std::int64_t bytes = bits;
    const std::string header =
        "{" + entry("t", std::string(name), "[8]", "[0," + std::to_string(bytes) + "]") + "}";
    EXPECT_EQ(
        SafetensorsFile(put(file_of(header, static_cast<std::size_t>(bytes)))).info("t").bytes(),
        bytes)
        << name;
  }
}

TEST_F(SafetensorsTest, WrongRequestsAreRefused) {
  const SafetensorsFile file(put(file_of("{" + entry("a", "U8", "[4]", "[0,4]") + "}", 4)));
  char room[8];
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  EXPECT_NE(message_of<CheckpointError>([&] { file.info("nope\n"); }).find("'nope\\x0a'"),
            std::string::npos);
  EXPECT_THROW(file.read_into("nope", room, 4), CheckpointError);
  EXPECT_THROW(file.read_into("a", room, 3), InvalidArgument);
  EXPECT_THROW(file.read_into("a", room, 5), InvalidArgument);
  EXPECT_THROW(file.read_into("a", nullptr, 4), InvalidArgument);
  EXPECT_THROW(file.read_range("a", -1, room, 1), InvalidArgument);
  EXPECT_THROW(file.read_range("a", 0, room, -1), InvalidArgument);
  EXPECT_THROW(file.read_range("a", 1, room, 4), InvalidArgument);
  EXPECT_THROW(file.read_range("a", 5, room, 0), InvalidArgument);
  EXPECT_THROW(file.read_range("a", kMost, room, kMost), InvalidArgument);
  EXPECT_THROW(file.read_range("a", 2, room, kMost), InvalidArgument);
}

struct Attack {
  std::string what;   // shown when the test fails
  std::string bytes;  // the file
  std::string text;   // what the message must hold
};

std::vector<Attack> attacks() {
  const std::string one = entry("a", "U8", "[1]", "[0,1]");
  const auto tensor = [](const std::string& fields) { return "{\"a\":{" + fields + "}}"; };
  const auto shaped = [](const std::string& dtype, const std::string& shape) {
    return file_of("{" + entry("a", dtype, shape, "[0,1]") + "}", 1);
  };
  const std::string rest = "\"shape\":[1],\"data_offsets\":[0,1]";
  std::string deep_shape = "{\"a\":{\"dtype\":\"U8\",\"shape\":";
  deep_shape += std::string(1'000'000, '[');
  std::string deep_entry = "{\"a\":";
  for (int i = 0; i < 200'000; ++i) deep_entry += "{\"a\":";
  std::string many = "[1";
  for (int i = 0; i < 256; ++i) many += ",1";
  many += "]";
  return {
      {"empty file", "", "0 bytes"},
      {"seven bytes", "1234567", "7 bytes"},
      {"header length without header", prefix(2), "only 0 follow"},
      {"header past the end", prefix(100) + "{}", "cut short"},
      {"header over the cap", prefix(100'000'001) + "{}", "100000000"},
      {"header length 2^64 - 1", prefix(~std::uint64_t{0}) + "{}", "18446744073709551615"},
      {"header length 2^63", prefix(std::uint64_t{1} << 63) + "{}", "9223372036854775808"},
      {"empty header", file_of(""), "'{'"},
      {"leading space", file_of(" {}"), "'{'"},
      {"array", file_of("[]"), "'{'"},
      {"string", file_of("\"a\""), "'{'"},
      {"byte order mark", file_of("\xEF\xBB\xBF{}"), "'{'"},
      {"stray byte", file_of("{\"\xFF\":1}"), "UTF-8 at byte 2"},
      {"overlong", file_of("{\"\xC0\xAF\":1}"), "UTF-8 at byte 2"},
      {"overlong, three bytes", file_of("{\"\xE0\x9F\xBF\":1}"), "UTF-8"},
      {"overlong, four bytes", file_of("{\"\xF0\x8F\xBF\xBF\":1}"), "UTF-8"},
      {"surrogate in UTF-8", file_of("{\"\xED\xA0\x80\":1}"), "UTF-8"},
      {"past U+10FFFF", file_of("{\"\xF4\x90\x80\x80\":1}"), "UTF-8"},
      {"sequence cut off", file_of("{\"a\xE2\x82"), "UTF-8"},
      {"no end", file_of("{" + one, 1), "found the end"},
      {"second value", file_of("{}{}"), "more text follows"},
      {"NUL after the end", file_of("{}\0"s), "more text follows"},
      {"trailing comma", file_of("{" + one + ",}", 1), "string as key"},
      {"leading comma", file_of("{," + one + "}", 1), "string as key"},
      {"no comma", file_of("{" + one + entry("b", "U8", "[0]", "[1,1]") + "}", 1), "','"},
      {"no colon", file_of("{\"a\" 1}"), "':'"},
      {"key is a number", file_of("{1:2}"), "string as key"},
      {"comment", file_of("{/* */}"), "string as key"},
      {"control character in a name", file_of("{\"a\x01\":1}"), "control character"},
      {"string without end", file_of("{\"a"), "no end"},
      {"escape without end", file_of("{\"a\\"), "no end"},
      {"unknown escape", file_of("{\"\\x41\":1}"), "unknown escape"},
      {"short \\u", file_of("{\"\\u12g4\":1}"), "hexadecimal"},
      {"high surrogate alone", file_of("{\"\\ud800\":1}"), "surrogate"},
      {"high surrogate twice", file_of("{\"\\ud800\\ud800\":1}"), "surrogate"},
      {"low surrogate alone", file_of("{\"\\udc00\":1}"), "surrogate"},
      {"NUL in a name", file_of("{" + entry("a\\u0000b", "U8", "[1]", "[0,1]") + "}", 1), "NUL"},
      {"NUL in metadata", file_of("{\"__metadata__\":{\"a\":\"\\u0000\"}}"), "NUL"},
      {"NUL in a metadata key", file_of("{\"__metadata__\":{\"\\u0000\":\"\"}}"), "NUL"},
      {"metadata is null", file_of("{\"__metadata__\":null}"), "expected an object, found null"},
      {"metadata value is a number", file_of("{\"__metadata__\":{\"a\":1}}"), "expected a string"},
      {"metadata value is an object", file_of("{\"__metadata__\":{\"a\":{}}}"), "found an object"},
      {"metadata twice", file_of("{\"__metadata__\":{},\"__metadata__\":{}}"), "twice"},
      {"metadata key twice", file_of("{\"__metadata__\":{\"a\":\"1\",\"a\":\"1\"}}"), "twice"},
      {"tensor twice", file_of("{" + one + "," + one + "}", 1), "tensor 'a': the name is there"},
      {"tensor twice, one escaped",
       file_of("{" + one + "," + entry("\\u0061", "U8", "[1]", "[1,2]") + "}", 2), "twice"},
      {"tensor is null", file_of("{\"a\":null}"), "expected an object, found null"},
      {"tensor is an array", file_of("{\"a\":[\"U8\",[1],[0,1]]}", 1), "found an array"},
      {"tensor is true", file_of("{\"a\":true}"), "found a boolean"},
      {"no fields", file_of(tensor("")), "'dtype' is missing"},
      {"no dtype", file_of(tensor(rest), 1), "'dtype' is missing"},
      {"no shape", file_of(tensor("\"dtype\":\"U8\",\"data_offsets\":[0,1]"), 1), "'shape'"},
      {"no offsets", file_of(tensor("\"dtype\":\"U8\",\"shape\":[1]"), 1), "'data_offsets'"},
      {"unknown field", file_of(tensor("\"dtype\":\"U8\",\"x\":0," + rest), 1),
       "unknown field 'x'"},
      {"dtype twice", file_of(tensor("\"dtype\":\"U8\",\"dtype\":\"I8\"," + rest), 1), "twice"},
      {"shape twice", file_of(tensor("\"dtype\":\"U8\",\"shape\":[1]," + rest), 1), "twice"},
      {"offsets twice", file_of(tensor("\"dtype\":\"U8\",\"data_offsets\":[0,1]," + rest), 1),
       "twice"},
      {"dtype unknown", shaped("Q4_0", "[1]"), "unknown dtype 'Q4_0'"},
      {"dtype in lower case", shaped("u8", "[1]"), "unknown dtype 'u8'"},
      {"dtype is a number", file_of(tensor("\"dtype\":8," + rest), 1), "expected a string"},
      {"dtype is an object", file_of(tensor("\"dtype\":{\"U8\":null}," + rest), 1),
       "found an object"},
      {"shape is a number", shaped("U8", "1"), "expected an array"},
      {"shape of a string", shaped("U8", "[\"1\"]"), "found a string"},
      {"shape of an array", shaped("U8", "[[1]]"), "found an array"},
      {"negative dimension", shaped("U8", "[-1]"), "negative"},
      {"negative zero", shaped("U8", "[-0]"), "negative"},
      {"fraction", shaped("U8", "[1.0]"), "fraction"},
      {"exponent", shaped("U8", "[1e0]"), "fraction or exponent"},
      {"needless zero", shaped("U8", "[01]"), "needless 0"},
      {"plus sign", shaped("U8", "[+1]"), "expected an integer"},
      {"hexadecimal", shaped("U8", "[0x1]"), "','"},
      {"NaN", shaped("U8", "[NaN]"), "expected an integer"},
      {"empty item", shaped("U8", "[1,]"), "expected an integer"},
      {"dimension 2^63", shaped("U8", "[9223372036854775808]"), "larger"},
      {"dimension 2^64 + 1", shaped("U8", "[18446744073709551617]"), "larger"},
      {"product wraps to 1", shaped("U8", "[4294967297,4294967295,3,5,17,257,65537]"),
       "2^63 - 1 elements"},
      {"product wraps to 0", shaped("U8", "[4294967296,4294967296]"), "2^63 - 1 elements"},
      {"bits overflow", shaped("F64", "[2305843009213693952]"), "2^63 - 1 bits"},
      {"overflow beside a zero",
       file_of("{" + entry("a", "U8", "[0,9223372036854775807,2]", "[0,0]") + "}"),
       "2^63 - 1 elements"},
      {"257 dimensions", shaped("U8", many), "more than 256"},
      {"half a byte", shaped("F4", "[1]"), "whole number of bytes"},
      {"three quarters of a byte", shaped("F6_E2M3", "[1]"), "whole number of bytes"},
      {"shape too small", file_of("{" + entry("a", "F32", "[1]", "[0,8]") + "}", 8), "takes 4"},
      {"shape too large", file_of("{" + entry("a", "F32", "[3]", "[0,8]") + "}", 8), "takes 12"},
      {"empty shape with bytes", file_of("{" + entry("a", "U8", "[0]", "[0,1]") + "}", 1),
       "takes 0"},
      {"one offset", file_of("{" + entry("a", "U8", "[1]", "[0]") + "}", 1), "fewer than two"},
      {"three offsets", file_of("{" + entry("a", "U8", "[1]", "[0,1,1]") + "}", 1),
       "more than two"},
      {"negative offset", file_of("{" + entry("a", "U8", "[1]", "[-1,0]") + "}", 1), "negative"},
      {"offsets reversed", file_of("{" + entry("a", "U8", "[1]", "[1,0]") + "}", 1),
       "end before they begin"},
      {"offsets past the end", file_of("{" + entry("a", "U8", "[2]", "[0,2]") + "}", 1),
       "past the end"},
      {"huge offsets",
       file_of("{" + entry("a", "U8", "[1]", "[9223372036854775806,9223372036854775807]") + "}", 1),
       "past the end"},
      {"overlap",
       file_of(
           "{" + entry("a", "U8", "[2]", "[0,2]") + "," + entry("b", "U8", "[2]", "[1,3]") + "}",
           3),
       "tensor 'b': data_offsets [1, 3] overlap"},
      {"same bytes twice", file_of("{" + one + "," + entry("b", "U8", "[1]", "[0,1]") + "}", 1),
       "overlap"},
      {"empty tensor within another",
       file_of(
           "{" + entry("a", "U8", "[4]", "[0,4]") + "," + entry("b", "U8", "[0]", "[2,2]") + "}",
           4),
       "tensor 'b'"},
      {"hole at the beginning", file_of("{" + entry("a", "U8", "[1]", "[1,2]") + "}", 2), "hole"},
      {"hole between", file_of("{" + one + "," + entry("b", "U8", "[1]", "[2,3]") + "}", 3),
       "tensor 'b': data_offsets [2, 3] leave a hole"},
      {"trailing bytes", file_of("{" + one + "}", 3), "2 bytes follow"},
      {"trailing bytes without tensors", file_of("{}", 1), "1 bytes follow"},
      {"data cut off", file_of("{" + entry("a", "F32", "[4]", "[0,16]") + "}", 15), "cut short"},
      {"deep array", file_of(deep_shape), "found an array"},
      {"deep objects", file_of(deep_entry), "unknown field"},
  };
}

TEST_F(SafetensorsTest, AttacksAreRefusedByFileAndReason) {
  for (const Attack& attack : attacks()) {
    SCOPED_TRACE(attack.what);
    const std::string file = put(attack.bytes);
    const std::string text = message_of<CheckpointError>([&] { SafetensorsFile opened(file); });
    EXPECT_NE(text.find(attack.text), std::string::npos) << text;
    EXPECT_EQ(text.find(file + ": "), 0u) << text;
    EXPECT_TRUE(is_utf8(text)) << text;
  }
}

TEST_F(SafetensorsTest, AttackOnATensorNamesIt) {
  for (const std::string bad : {R"({"dtype":1})", R"({"dtype":"U8","shape":[-1]})", "{}", "[]"}) {
    const std::string file = put(
        file_of("{" + entry("good", "U8", "[0]", "[0,0]") + ",\"layer.7.weight\":" + bad + "}"));
    const std::string text = message_of<CheckpointError>([&] { SafetensorsFile opened(file); });
    EXPECT_NE(text.find("tensor 'layer.7.weight'"), std::string::npos) << text;
  }
}

// Any change of a header is refused or leaves a file whose tensors tile it. Seeded, so a failure
// repeats; run under the sanitizers this is where a slip in the parser would show.
TEST(SafetensorsHeaderTest, MutationsNeverBreakTheInvariants) {
  const std::string header =
      "{\"__metadata__\":{\"format\":\"pt\"}," + entry("a.weight", "F32", "[2,3]", "[0,24]") + "," +
      entry("b", "F4", "[6]", "[24,27]") + "," + entry("c", "BF16", "[]", "[27,29]") + "," +
      entry("d", "I64", "[0,5]", "[29,29]") + "}   ";
  std::mt19937 random(20240607);
  const std::string alphabet = "{}[]\",:0123456789-.eE\\u\t abFU\xC3\xA9\xFF"s + '\0';
  int accepted = 0, refused = 0;
  for (int round = 0; round < 60'000; ++round) {
    std::string text = header;
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < changes; ++i) {
      const std::size_t at = random() % text.size();
      const char c = alphabet[random() % alphabet.size()];
      switch (random() % 4) {
        case 0:
          text[at] = c;
          break;
        case 1:
          text.insert(at, 1, c);
          break;
        case 2:
          text.erase(at, 1);
          break;
        default:
          text.insert(at, text.substr(random() % text.size(), random() % 12));
      }
    }
    const auto bytes = static_cast<std::int64_t>(8 + text.size() + 29);
    try {
      const SafetensorsHeader parsed = parse_safetensors_header(text, bytes, "mutated");
      std::int64_t at = bytes - 29;
      for (const TensorInfo& t : parsed.tensors) {
        ASSERT_EQ(t.begin, at) << text;
        ASSERT_EQ(t.bytes(), safetensors_bytes(t.dtype, t.shape)) << text;
        ASSERT_TRUE(is_utf8(t.name)) << text;
        at = t.end;
      }
      ASSERT_EQ(at, bytes) << text;
      ++accepted;
    } catch (const CheckpointError& e) {
      ASSERT_TRUE(is_utf8(e.what())) << text;
      ++refused;
    }
  }
  // Both must be common, or the mutations test nothing.
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 10'000);
}

TEST_F(SafetensorsTest, ManyTensorsParseInLinearithmicTime) {
  std::string header = "{";
  constexpr int kCount = 100'000;
  for (int i = 0; i < kCount; ++i) {
    header += (i == 0 ? "" : ",") + entry("t" + std::to_string(i), "U8", "[0]", "[0,0]");
  }
  header += "}";
  const SafetensorsFile file(put(file_of(header)));
  EXPECT_EQ(file.names().size(), static_cast<std::size_t>(kCount));
  EXPECT_EQ(file.names().back(), "t99999");
}

TEST_F(SafetensorsTest, TruncationWhileOpenIsNoticed) {
  constexpr std::int64_t kBytes = (std::int64_t{8} << 20) + 5000;  // more than one piece
  const std::string header =
      "{" +
      entry("a", "U8", "[" + std::to_string(kBytes) + "]", "[0," + std::to_string(kBytes) + "]") +
      "}";
  const std::string whole = file_of(header, static_cast<std::size_t>(kBytes));
  const SafetensorsFile file(put(whole));
  std::string data(static_cast<std::size_t>(kBytes), '?');
  file.read_into("a", data.data(), kBytes, true);
  EXPECT_TRUE(data == whole.substr(whole.size() - data.size()));

  ASSERT_EQ(::truncate(path().c_str(), static_cast<::off_t>(whole.size() - 100)), 0);
  const std::string text =
      message_of<CheckpointError>([&] { file.read_into("a", data.data(), kBytes); });
  EXPECT_NE(text.find("tensor 'a'"), std::string::npos) << text;
  EXPECT_NE(text.find("shorter after it was opened"), std::string::npos) << text;
  EXPECT_NE(text.find(std::to_string(whole.size() - 100)), std::string::npos) << text;
  file.read_range("a", 0, data.data(), kBytes - 100);  // what is left can still be read
  ASSERT_EQ(::truncate(path().c_str(), 0), 0);
  EXPECT_THROW(file.read_range("a", 0, data.data(), 1), CheckpointError);
}

TEST_F(SafetensorsTest, WhatIsNotARegularFileIsRefused) {
  EXPECT_EQ(code_of([&] { SafetensorsFile file(path("absent")); }), ENOENT);
  EXPECT_EQ(code_of([&] { SafetensorsFile file(put("x", "plain") + "/below"); }), ENOTDIR);
  EXPECT_NE(
      message_of<CheckpointError>([&] { SafetensorsFile file(folder_.string()); }).find("a folder"),
      std::string::npos);
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  EXPECT_THROW(SafetensorsFile file(path("pipe")), CheckpointError);  // and does not wait
  EXPECT_THROW(SafetensorsFile file("/dev/zero"), CheckpointError);
}

// Pages of the file that are in the page cache.
std::size_t cached_pages(const std::string& path, std::size_t bytes) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  EXPECT_GE(fd, 0);
  void* const map = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  EXPECT_NE(map, MAP_FAILED);
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> resident((bytes + page - 1) / page);
  EXPECT_EQ(::mincore(map, bytes, resident.data()), 0);
  ::munmap(map, bytes);
  ::close(fd);
  return static_cast<std::size_t>(
      std::count_if(resident.begin(), resident.end(), [](unsigned char r) { return r & 1; }));
}

TEST_F(SafetensorsTest, PanelsLeaveThePageCacheWhenAsked) {
  constexpr std::int64_t kPanel = 300'001, kPanels = 10;  // no panel begins or ends at a page
  SafetensorsWriter writer(path(), {{"a", "U8", {kPanel * kPanels}}});
  const std::string data(kPanel * kPanels, 'x');
  writer.write("a", data.data(), kPanel * kPanels);
  writer.commit();
  const auto bytes = static_cast<std::size_t>(writer.file_bytes());
  const SafetensorsFile file(path());
  const auto drop_all = [&] {
    const int fd = ::open(path().c_str(), O_RDONLY | O_CLOEXEC);
    ASSERT_EQ(::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    ::close(fd);
  };
  std::string panel(kPanel, '?');
  for (std::int64_t i = 0; i < kPanels; ++i) {
    file.read_range("a", i * kPanel, panel.data(), kPanel);
  }
  EXPECT_GT(cached_pages(path(), bytes), bytes / 4096 / 2);  // kept by default
  drop_all();
  if (cached_pages(path(), bytes) > 0) {
    GTEST_SKIP() << "this file system keeps its pages (it may live in memory)";
  }
  for (std::int64_t i = 0; i < kPanels; ++i) {
    file.read_range("a", i * kPanel, panel.data(), kPanel, true);
  }
  // The end of each panel goes with the next one, so what stays does not add up.
  EXPECT_LE(cached_pages(path(), bytes) * 4096, static_cast<std::size_t>(kPanel) / 8);
}

TEST_F(SafetensorsTest, ThreadsReadAtOnce) {
  std::vector<TensorSpec> specs;
  for (int i = 0; i < 16; ++i) specs.push_back({"t" + std::to_string(i), "I32", {1000}});
  SafetensorsWriter writer(path(), specs);
  for (int i = 0; i < 16; ++i) {
    const std::vector<std::int32_t> data(1000, i);
    writer.write(specs[static_cast<std::size_t>(i)].name, data.data(), 4000);
  }
  writer.commit();
  const SafetensorsFile file(path());
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      std::vector<std::int32_t> data(1000);
      for (int round = 0; round < 200; ++round) {
        const int i = round % 16;
        file.read_into("t" + std::to_string(i), data.data(), 4000, round % 3 == 0);
        if (std::count(data.begin(), data.end(), i) != 1000) ++wrong;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace vramkit
