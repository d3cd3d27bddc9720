// A strict JSON reader for the headers of checkpoints, and the escaping that writing them needs.
//
// The reader is pulled: the caller says what must come next, and anything else is an error at that
// byte. A header's structure is fixed and shallow, so no tree is built and nothing recurses: what
// nests deeper than the caller asks for is refused at its first bracket, and memory is bounded by
// what the caller keeps.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/error.hpp"

namespace vramkit {

// Text that is not the JSON that was asked for. The message ends with the offset in bytes.
class JsonError : public Error {
 public:
  using Error::Error;
};

class JsonReader {
 public:
  // The text must outlive the reader and must be UTF-8 already (is_utf8 in text.hpp).
  explicit JsonReader(std::string_view text) : text_(text) {}

  // { key : value , … }: begin_object(), then next_key() until it says false, reading each value.
  void begin_object();
  bool next_key(std::string& key);
  // [ item , … ]: begin_array(), then next_item() until it says false, reading each item.
  void begin_array();
  bool next_item();

  std::string string();
  // An integer from 0 to 2^63 - 1, with neither sign, fraction nor exponent.
  std::int64_t natural();
  // Nothing but white space may follow.
  void end();

  // Throws JsonError at the place where the last token began.
  [[noreturn]] void fail(const std::string& what) const;

 private:
  char peek();  // next character after white space; '\0' at the end
  void expect(char wanted, const char* what);
  void expected(const char* what);
  unsigned hex4();
  void escape(std::string& out);
  bool next(char close, const char* what);

  std::string_view text_;
  std::size_t at_ = 0;
  std::size_t token_ = 0;  // where the token being read began
  bool first_ = false;     // an object or array was just opened
};

// Appends the text as a JSON string, with its quotes. The text must be UTF-8.
void append_json_string(std::string& out, std::string_view text);

}  // namespace vramkit
