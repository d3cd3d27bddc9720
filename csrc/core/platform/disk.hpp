// The system calls of reading large files past the page cache, one virtual function each, so that
// tests can put faults between the engine and the disk. Linux has all of it; elsewhere direct
// reads are refused and nothing is known of the cache, which the engine is prepared for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/platform/file.hpp"

namespace vramkit {

// What tells a file from another, and from itself after a change.
struct FileIdentity {
  std::uint64_t device = 0, inode = 0;
  std::int64_t bytes = 0;
  std::int64_t modified_ns = 0;
  bool operator==(const FileIdentity&) const = default;
};

class DiskCalls {
 public:
  virtual ~DiskCalls() = default;

  // A second descriptor of the open file that reads past the page cache; empty if its file system
  // has no such reads.
  virtual Descriptor reopen_direct(const Descriptor& file) const;
  // One positioned read: the bytes that arrived, 0 at the end of the file, or minus errno.
  virtual std::int64_t read(const Descriptor& file, void* dst, std::int64_t bytes,
                            std::int64_t offset) const;
  virtual FileIdentity identify(const Descriptor& file, const std::string& path) const;
  // Bytes of the range that a read would find in the page cache, or -1 where nobody can tell.
  virtual std::int64_t cached(const Descriptor& file, std::int64_t offset,
                              std::int64_t bytes) const;
  // Asks the system to read the range into the page cache soon.
  virtual void will_need(const Descriptor& file, std::int64_t offset, std::int64_t bytes) const;
};

}  // namespace vramkit
