// The JSON reader and the text checks below the checkpoint code.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "core/json.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

TEST(JsonTest, EscapedStringsReadBack) {
  std::string all;
  for (int i = 0; i < 128; ++i) all += static_cast<char>(i);
  all += "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80";
  std::string json;
  append_json_string(json, all);
  JsonReader reader(json);
  EXPECT_EQ(reader.string(), all);
  reader.end();
}

TEST(JsonTest, EscapesDecode) {
  JsonReader reader(R"("\"\\\/\b\f\n\r\t\u0041\u00e9\u20AC\uD83D\uDE00")");
  EXPECT_EQ(reader.string(), "\"\\/\b\f\n\r\tA\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80");
}

TEST(JsonTest, LargestIntegerReads) {
  EXPECT_EQ(JsonReader("9223372036854775807").natural(), std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(JsonReader("0").natural(), 0);
  EXPECT_THROW(JsonReader("9223372036854775808").natural(), JsonError);
}

TEST(TextTest, PrintableEscapesAndCuts) {
  EXPECT_EQ(printable("a\x1B[31m\xFF\xC3\xA9\x7F"), "a\\x1b[31m\\xff\xC3\xA9\\x7f");
  const std::string cut = printable(std::string(5000, 'x'), 100);
  EXPECT_LT(cut.size(), 120u);
  EXPECT_EQ(cut.substr(cut.size() - 3), "...");
}

}  // namespace
}  // namespace vramkit
