// Reads checkpoints in safetensors' layout: 8 bytes with the header's length (little endian), the
// header (a JSON object), then the tensors' bytes without gaps up to the end of the file.
//
// A checkpoint is input from a stranger, so the header is believed only after every part of it has
// been checked, and what the format leaves open is refused: repeated names or fields, fields that
// the format does not have, overlaps, gaps and trailing bytes. A file that passes has exactly one
// meaning. The bytes of the tensors are read on request, by position and in pieces, so that a
// file of any size converts in little memory.
#pragma once
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/platform/disk.hpp"
#include "core/platform/file.hpp"

namespace vramkit {

inline constexpr std::int64_t kSafetensorsPrefixBytes = 8;
// The format's own bounds: a header of at most 100 MB. Ours: more dimensions than any framework's
// tensor has, so that a header cannot blow up to many times its size.
inline constexpr std::int64_t kSafetensorsHeaderCap = 100'000'000;
inline constexpr std::size_t kSafetensorsRankCap = 256;

// Names of the element types and their bits, as the format lists them.
std::span<const std::pair<std::string_view, int>> safetensors_dtypes();

// Bytes of a tensor. Throws InvalidArgument for an unknown dtype, a negative or too long shape, a
// size past 2^63 - 1, or elements of less than a byte that do not fill their last byte.
std::int64_t safetensors_bytes(std::string_view dtype, std::span<const std::int64_t> shape);

// One tensor of a file. begin and end are offsets in the file (not in its data section).
struct TensorInfo {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0, end = 0;
  std::int64_t bytes() const { return end - begin; }
};

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // by offset; empty tensors at one offset, in the header's order
  std::map<std::string, std::string> metadata;
};

// Parses and checks a header (without its 8-byte length) for a file of `file_bytes` bytes. `path`
// is only for messages. Throws CheckpointError naming the file and the tensor.
SafetensorsHeader parse_safetensors_header(std::string_view header, std::int64_t file_bytes,
                                           const std::string& path);

// An open checkpoint file. Immutable after construction: any number of threads may read at once.
class SafetensorsFile {
 public:
  // Throws SystemError if the file cannot be opened or read, CheckpointError if it is not sound.
  explicit SafetensorsFile(std::string path);

  const std::string& path() const { return path_; }
  std::int64_t file_bytes() const { return file_bytes_; }
  // As it was before its header was read: who opens the file again can tell if it is another.
  const FileIdentity& identity() const { return identity_; }
  std::span<const TensorInfo> tensors() const { return tensors_; }
  std::vector<std::string> names() const;  // in the order of their bytes in the file
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  bool contains(std::string_view name) const { return index_.find(name) != index_.end(); }
  const TensorInfo& info(std::string_view name) const;  // throws CheckpointError if absent

  // Reads the whole tensor; `bytes` must be its size (InvalidArgument otherwise). Throws
  // CheckpointError if the file has become shorter since it was opened. With `drop_cache` the
  // pages read leave the page cache at once, so that a long conversion does not crowd out others.
  void read_into(std::string_view name, void* dst, std::int64_t bytes,
                 bool drop_cache = false) const;
  // Reads `bytes` bytes from `offset` within the tensor on, for tensors streamed in panels.
  void read_range(std::string_view name, std::int64_t offset, void* dst, std::int64_t bytes,
                  bool drop_cache = false) const;

 private:
  std::string path_;
  Descriptor file_;
  FileIdentity identity_;
  std::int64_t file_bytes_ = 0;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
  // A tree, not a hash table: names come from the file, and colliding ones must not cost more.
  std::map<std::string, std::size_t, std::less<>> index_;
};

}  // namespace vramkit
