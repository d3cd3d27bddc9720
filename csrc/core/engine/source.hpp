// Where the bytes of blocks lie while they are not on the device: memory of the host, or files.
//
// A file is read in the way that is fastest for each piece: through the page cache where the piece
// is there already, past it (O_DIRECT) where it is not, and plainly, with read-ahead asked for,
// where the file system has no direct reads. A file must not change while it is a source: each
// read is followed by a look at its size and time of change, and bytes of a changed file are never
// handed out. A file that another takes the name of is read on as it was, since it is open.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/engine/memory.hpp"
#include "core/platform/disk.hpp"

namespace vramkit {

class SafetensorsFile;

enum class ReadPath { memory, cached, direct, plain };
const char* to_string(ReadPath path);

// Members may be called from several threads at once.
class Source {
 public:
  virtual ~Source() = default;

  virtual std::int64_t bytes() const = 0;
  virtual const std::string& name() const = 0;  // for messages
  // Where its first byte is, if it is memory.
  virtual const std::byte* memory() const { return nullptr; }

  // How [offset, offset + bytes) is best read now. For `direct`, read() wants `dst` and `offset`
  // to agree modulo kDirectUnit and may write all of the units that the range touches.
  virtual ReadPath path_for(std::int64_t offset, std::int64_t bytes) const = 0;
  // Reads the whole range or throws: SystemError, FileChangedError. Returns the path taken, which
  // is another where the one asked for failed.
  virtual ReadPath read(ReadPath path, std::byte* dst, std::int64_t offset,
                        std::int64_t bytes) const = 0;
};

// Memory that its keeper keeps alive.
class MemorySource : public Source {
 public:
  MemorySource(const std::byte* start, std::int64_t bytes, std::shared_ptr<const void> keeper,
               std::string name = "memory");

  std::int64_t bytes() const override { return bytes_; }
  const std::string& name() const override { return name_; }
  const std::byte* memory() const override { return start_; }
  ReadPath path_for(std::int64_t, std::int64_t) const override { return ReadPath::memory; }
  ReadPath read(ReadPath path, std::byte* dst, std::int64_t offset,
                std::int64_t bytes) const override;

 private:
  const std::byte* start_;
  const std::int64_t bytes_;
  const std::shared_ptr<const void> keeper_;
  const std::string name_;
};

enum class DirectReads { automatic, off };

class FileSource : public Source {
 public:
  // Throws SystemError or CheckpointError if the file cannot be opened (see open_regular_file).
  explicit FileSource(std::string path, DirectReads direct = DirectReads::automatic,
                      std::shared_ptr<const DiskCalls> calls = nullptr);

  std::int64_t bytes() const override { return identity_.bytes; }
  const std::string& name() const override { return path_; }
  ReadPath path_for(std::int64_t offset, std::int64_t bytes) const override;
  ReadPath read(ReadPath path, std::byte* dst, std::int64_t offset,
                std::int64_t bytes) const override;

  const FileIdentity& identity() const { return identity_; }
  bool direct() const { return direct_works_; }
  const Descriptor& descriptor() const { return file_; }
  // Throws FileChangedError if the file is not what it was when it was opened.
  void check() const;

 private:
  // Bytes of [offset, offset + bytes) that direct reads brought before the file system refused.
  std::int64_t read_direct(std::byte* dst, std::int64_t offset, std::int64_t bytes) const;
  void read_plain(std::byte* dst, std::int64_t offset, std::int64_t bytes) const;
  [[noreturn]] void fail(int code, std::int64_t offset, std::int64_t bytes) const;
  [[noreturn]] void ended(std::int64_t offset) const;

  const std::string path_;
  const std::shared_ptr<const DiskCalls> calls_;
  Descriptor file_;
  Descriptor direct_;
  FileIdentity identity_;
  mutable std::atomic<bool> direct_works_{false};
};

// The file of a checkpoint whose header was read. Throws FileChangedError if its name means another
// file by now, or it was written to since.
std::shared_ptr<FileSource> source_of(const SafetensorsFile& file,
                                      DirectReads direct = DirectReads::automatic,
                                      std::shared_ptr<const DiskCalls> calls = nullptr);

// Memory of the host for blocks, in one piece, in large pages where the system has them. Tensors
// may be views of it: it is what a model's parameters are while the model is offloaded.
class HostStore {
 public:
  HostStore(std::shared_ptr<Memory> memory, std::int64_t bytes)
      : memory_(std::move(memory)), bytes_(bytes), allocation_(*memory_, bytes) {}

  std::byte* data() const { return allocation_.data(); }
  std::int64_t bytes() const { return bytes_; }
  // Nobody touches these bytes again: whole granules of them go back to the system.
  void discard(std::int64_t offset, std::int64_t bytes) noexcept;

 private:
  std::shared_ptr<Memory> memory_;
  std::int64_t bytes_;
  Allocation allocation_;
};

std::shared_ptr<MemorySource> source_of(const std::shared_ptr<HostStore>& store);

}  // namespace vramkit
