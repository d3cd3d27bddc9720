// SHA-256 (FIPS 180-4), for names that no two different things share.
#pragma once
#include <string>
#include <string_view>

namespace vramkit {

// 64 hexadecimal digits.
std::string sha256_hex(std::string_view bytes);

}  // namespace vramkit
