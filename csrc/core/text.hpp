// Text that comes from files and users: checked before it is believed, escaped before it is shown.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace vramkit {

// True if the text is well-formed UTF-8 (no overlong forms, surrogates or values past U+10FFFF).
// `bad`, where given, receives the offset of the first sequence that is not.
bool is_utf8(std::string_view text, std::size_t* bad = nullptr);

// Text made safe to put into a message: control characters and bytes that are not UTF-8 become
// \xNN, and text past about `most` bytes is cut. Neither a tensor's name nor a path may break a
// terminal or a decoder that expects UTF-8.
std::string printable(std::string_view text, std::size_t most = 4096);

}  // namespace vramkit
