// Files as the checkpoint code needs them: positioned reads and writes that finish or say why not,
// and a file that appears under its name only once it is complete. Everything that is particular
// to one operating system (page-cache hints, preallocation, descriptors of folders) sits in
// file.cpp, so that the code above it is portable.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

namespace vramkit {

// Owns one file descriptor.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() noexcept { return std::exchange(fd_, -1); }
  void reset() noexcept;

 private:
  int fd_ = -1;
};

// Opens a regular file for reading. Throws SystemError if the system refuses, CheckpointError if
// the path names something else (a folder, a pipe, a device): those have no size and no offsets.
Descriptor open_regular_file(const std::string& path);

// A new file in a folder, for writing, that never has a name there: nothing is left of it once it
// is closed. Where the file system has no such files, it has a name for the moment between making
// and unlinking it. Throws SystemError.
Descriptor open_unnamed_file(const std::string& folder);

// Bytes of the file behind the descriptor now. Throws SystemError.
std::int64_t file_bytes(const Descriptor& file, const std::string& path);

// Reads `bytes` at `offset`, through short reads and interruptions. Returns how many were read:
// fewer only where the file ends. Throws SystemError. Safe to call from several threads at once.
std::int64_t read_at(const Descriptor& file, void* dst, std::int64_t bytes, std::int64_t offset,
                     const std::string& path);

// Tells the system that these bytes of the page cache are not needed again. A hint: it frees
// nothing on systems that lack it, and never fails.
void drop_page_cache(const Descriptor& file, std::int64_t offset, std::int64_t bytes) noexcept;

// A file that is written beside its final place and appears under its name only when complete.
// The constructor creates a temporary in the same folder and reserves `bytes` of disk, so that a
// full disk fails before any work; commit() makes the content durable and renames it over the
// target (a symbolic link is replaced, not followed). Without commit() the temporary is removed
// by discard() or the destructor, and the target stays as it was.
//
// write_at() may be called from several threads; the other members need one thread at a time.
class ReplacementFile {
 public:
  ReplacementFile(std::string path, std::int64_t bytes);
  ReplacementFile(const ReplacementFile&) = delete;
  ReplacementFile& operator=(const ReplacementFile&) = delete;
  ~ReplacementFile() { discard(); }

  void write_at(const void* src, std::int64_t bytes, std::int64_t offset);
  void commit();
  void discard() noexcept;

 private:
  [[noreturn]] void fail(const std::string& doing, int code) const;
  void create_temporary();
  void reserve();

  std::string path_;       // as the caller gave it, for messages
  std::string name_;       // last part of it
  std::string temporary_;  // name of the temporary within folder_; empty once renamed or removed
  std::int64_t bytes_ = 0;
  Descriptor folder_;  // names are resolved here, so that a change of directory cannot matter
  Descriptor file_;
  std::int64_t owner_ = 0;  // process that created it: a fork's copy must not remove the file
};

}  // namespace vramkit
