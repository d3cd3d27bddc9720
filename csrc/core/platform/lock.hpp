// Locks that processes share and that end with the process, however it ends.
#pragma once
#include <string>

#include "core/platform/file.hpp"

namespace vramkit {

enum class LockKind { shared, exclusive };

// Opens a file to be locked, and makes it if it is not there. Empty if its folder is not there.
// Throws SystemError.
Descriptor open_lock_file(const std::string& path);
// Takes the lock, or changes its kind, if nobody is in the way; false otherwise. Throws
// SystemError where the file system has no locks.
bool try_to_lock(const Descriptor& file, LockKind kind, const std::string& path);
// The path still names this file: a lock on a removed one is worth nothing.
bool names(const std::string& path, const Descriptor& file);

}  // namespace vramkit
