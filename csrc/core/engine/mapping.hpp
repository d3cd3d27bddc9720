// Parts of files as memory: what the tensors of a checkpoint are while nobody has room for them.
//
// A mapping is private. Pages come from the page cache when they are first looked at and go back
// when the system wants them; what is written to them stays with this process, in memory of its
// own, and never reaches the file.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/engine/layout.hpp"
#include "core/engine/source.hpp"

namespace vramkit {

// A block as it will lie in memory, its extents mapped at their places one behind the other. What
// no extent covers must not be touched.
class FileMapping {
 public:
  using Files = std::vector<std::shared_ptr<const FileSource>>;

  // Throws InvalidArgument for extents that their file does not have, that do not lie in the block,
  // that share a page of it, or whose places differ from their files' modulo kDirectUnit;
  // OutOfMemoryError where the system has no addresses left.
  FileMapping(Files files, std::vector<Extent> extents, std::int64_t bytes);
  FileMapping(const FileMapping&) = delete;
  FileMapping& operator=(const FileMapping&) = delete;
  ~FileMapping();

  std::byte* data() const { return start_; }
  std::int64_t bytes() const { return bytes_; }
  const Files& files() const { return files_; }

  // Where these bytes of memory lie in the files: within one extent, or nowhere.
  std::optional<Extent> find(const std::byte* address, std::int64_t bytes) const;
  // Whether any page of these bytes of the block was written to. Where the system does not tell,
  // whether the bytes differ from the files'.
  bool changed(std::int64_t begin, std::int64_t bytes) const;

 private:
  void check() const;
  void unmap() noexcept;

  const Files files_;
  std::vector<Extent> extents_;  // by place in the block
  const std::int64_t bytes_;
  std::byte* reserved_ = nullptr;
  std::int64_t reserved_bytes_ = 0;
  std::byte* start_ = nullptr;
};

}  // namespace vramkit
