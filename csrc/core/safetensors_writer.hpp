// Writes checkpoints in safetensors' layout without ever holding more than the caller's buffer.
//
// All tensors are declared first, so the header and every offset are known before a byte of data:
// tensors may then come in any order and in parts, and a disk that is too small is noticed at the
// start. The file appears under its name only when every byte of every tensor has been written
// exactly once; until then it is a temporary beside it, which goes away if the writer does.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/platform/file.hpp"
#include "core/safetensors.hpp"

namespace vramkit {

// The data section begins at a multiple of this, so that blocks of it can be read past the page
// cache (direct I/O) and mapped.
inline constexpr std::int64_t kSafetensorsDataAlignment = 4096;

struct TensorSpec {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
};

// Members may be called from several threads at once; writes then run side by side.
class SafetensorsWriter {
 public:
  // The tensors lie in the file in the order given, without gaps. Throws InvalidArgument for names
  // that repeat or cannot be stored, for unknown dtypes and for sizes past the format's bounds;
  // SystemError, with the bytes needed, where the system refuses the file.
  SafetensorsWriter(std::string path, const std::vector<TensorSpec>& tensors,
                    const std::map<std::string, std::string>& metadata = {});

  const std::string& path() const { return path_; }
  std::int64_t file_bytes() const { return file_bytes_; }
  std::span<const TensorInfo> tensors() const { return tensors_; }
  const TensorInfo& info(std::string_view name) const;  // throws InvalidArgument if not declared

  // Writes `bytes` bytes from `offset` within the tensor on. Throws InvalidArgument if they do not
  // lie within it or any of them was written before, SystemError if the system refuses: the
  // temporary is then removed, and the writer takes no more.
  void write(std::string_view name, const void* src, std::int64_t bytes, std::int64_t offset = 0);

  // Puts the finished file in its place, on the disk as well as in memory. Throws InvalidArgument
  // naming a tensor that is not complete (the writer stays usable), SystemError if the system
  // refuses (the temporary is then removed).
  void commit();

  // Gives up: removes the temporary. Does nothing after commit().
  void discard() noexcept;

  bool committed() const;

 private:
  enum class State { open, failed, committed, discarded };
  struct Progress {
    std::map<std::int64_t, std::int64_t> written;  // begin -> end, disjoint, neighbours joined
    std::int64_t bytes = 0;
  };

  std::string build_header(const std::vector<TensorSpec>& tensors,
                           const std::map<std::string, std::string>& metadata);
  std::size_t find(std::string_view name) const;
  void require_open() const;
  void finish_write(bool done) noexcept;
  void claim(std::size_t tensor, std::int64_t begin, std::int64_t end);

  std::string path_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, std::size_t, std::less<>> index_;
  std::int64_t file_bytes_ = 0;
  std::optional<ReplacementFile> file_;

  // Guards what follows. It is not held during I/O: a range is claimed first and written after.
  mutable std::mutex mutex_;
  std::vector<Progress> progress_;
  State state_ = State::open;
  int writing_ = 0;  // writes in flight
};

}  // namespace vramkit
