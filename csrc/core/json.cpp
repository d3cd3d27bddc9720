// See json.hpp. The grammar is RFC 8259's.
#include "core/json.hpp"

#include <limits>

namespace vramkit {
namespace {

void append_utf8(std::string& out, unsigned code) {
  const auto put = [&](unsigned byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

const char* kind_of(char c) {
  switch (c) {
    case '{':
      return "an object";
    case '[':
      return "an array";
    case '"':
      return "a string";
    case 't':
    case 'f':
      return "a boolean";
    case 'n':
      return "null";
    case '\0':
      return "the end";
    default:
      return c == '-' || (c >= '0' && c <= '9') ? "a number" : "something else";
  }
}

}  // namespace

void JsonReader::fail(const std::string& what) const {
  throw JsonError(what + " (at byte " + std::to_string(token_) + ")");
}

void JsonReader::expected(const char* what) {
  fail(std::string("expected ") + what + ", found " + kind_of(peek()));
}

char JsonReader::peek() {
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c != ' ' && c != '\t' && c != '\n' && c != '\r') break;
    ++at_;
  }
  token_ = at_;
  // A NUL in the text fits no rule of the grammar either, so it need not be told from the end.
  return at_ < text_.size() ? text_[at_] : '\0';
}

void JsonReader::expect(char wanted, const char* what) {
  if (peek() != wanted) expected(what);
  ++at_;
}

void JsonReader::begin_object() {
  expect('{', "an object");
  first_ = true;
}

void JsonReader::begin_array() {
  expect('[', "an array");
  first_ = true;
}

bool JsonReader::next(char close, const char* what) {
  const bool first = first_;
  first_ = false;
  const char c = peek();
  if (c == close) {
    ++at_;
    return false;
  }
  if (first) return true;
  if (c != ',') expected(what);
  ++at_;
  return true;
}

bool JsonReader::next_key(std::string& key) {
  if (!next('}', "',' or '}'")) return false;
  if (peek() != '"') expected("a string as key");
  key = string();
  expect(':', "':' after the key");
  return true;
}

bool JsonReader::next_item() { return next(']', "',' or ']'"); }

std::string JsonReader::string() {
  expect('"', "a string");
  std::string out;
  for (;;) {
    if (at_ >= text_.size()) fail("a string has no end");
    const char c = text_[at_];
    if (static_cast<unsigned char>(c) < 0x20) fail("a string holds an unescaped control character");
    ++at_;
    if (c == '"') return out;
    if (c == '\\') {
      escape(out);
    } else {
      out += c;
    }
  }
}

void JsonReader::escape(std::string& out) {
  if (at_ >= text_.size()) fail("a string has no end");
  switch (text_[at_++]) {
    case '"':
      out += '"';
      return;
    case '\\':
      out += '\\';
      return;
    case '/':
      out += '/';
      return;
    case 'b':
      out += '\b';
      return;
    case 'f':
      out += '\f';
      return;
    case 'n':
      out += '\n';
      return;
    case 'r':
      out += '\r';
      return;
    case 't':
      out += '\t';
      return;
    case 'u':
      break;
    default:
      fail("a string holds an unknown escape");
  }
  unsigned code = hex4();
  if (code >= 0xDC00 && code <= 0xDFFF) fail("a string holds half of a surrogate pair");
  if (code >= 0xD800 && code <= 0xDBFF) {
    if (text_.substr(at_, 2) != "\\u") fail("a string holds half of a surrogate pair");
    at_ += 2;
    const unsigned low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("a string holds half of a surrogate pair");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  append_utf8(out, code);
}

unsigned JsonReader::hex4() {
  unsigned value = 0;
  for (int i = 0; i < 4; ++i) {
    const char c = at_ < text_.size() ? text_[at_] : '\0';
    unsigned digit = 0;
    if (c >= '0' && c <= '9') {
      digit = static_cast<unsigned>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      digit = static_cast<unsigned>(c - 'a') + 10;
    } else if (c >= 'A' && c <= 'F') {
      digit = static_cast<unsigned>(c - 'A') + 10;
    } else {
      fail("a string holds a \\u escape without four hexadecimal digits");
    }
    value = value << 4 | digit;
    ++at_;
  }
  return value;
}

std::int64_t JsonReader::natural() {
  const char* const what = "an integer from 0 to 9223372036854775807";
  const char lead = peek();
  if (lead == '-') fail(std::string("expected ") + what + ", found a negative number");
  if (lead < '0' || lead > '9') expected(what);
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  std::int64_t value = 0;
  const std::size_t begin = at_;
  while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
    const std::int64_t digit = text_[at_] - '0';
    if (value > (kMost - digit) / 10)
      fail(std::string("expected ") + what + ", found a larger one");
    value = value * 10 + digit;
    ++at_;
  }
  if (lead == '0' && at_ - begin > 1) fail("a number begins with a needless 0");
  if (at_ < text_.size() && (text_[at_] == '.' || text_[at_] == 'e' || text_[at_] == 'E')) {
    fail(std::string("expected ") + what + ", found one with a fraction or exponent");
  }
  return value;
}

void JsonReader::end() {
  (void)peek();
  if (at_ != text_.size()) fail("more text follows the end of the JSON value");
}

void append_json_string(std::string& out, std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20) {
      out += "\\u00";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      out += c;
    }
  }
  out += '"';
}

}  // namespace vramkit
