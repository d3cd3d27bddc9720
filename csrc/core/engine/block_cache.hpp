// Block files: blocks written one after another as the engine wants them, for checkpoints whose own
// order does not allow reading blocks straight from them.
//
// A block file is a safetensors file of one U8 tensor per block, each at a multiple of kDirectUnit.
// It lies in a folder of its own within the cache, named by the SHA-256 of a text that determines
// the content. Beside it is a lock file: whoever uses the file holds a shared lock, whoever builds
// or removes it an exclusive one, and the system takes both away from a process that dies. A file
// appears under its name only when it is complete and on the disk; what a killed builder leaves
// behind is removed by the next who locks the folder.
//
// The cache keeps within its bytes by removing the files that were not used for longest. Safe to
// use from several threads, processes and objects at once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/engine/engine.hpp"
#include "core/engine/source.hpp"
#include "core/platform/file.hpp"
#include "core/platform/lock.hpp"

namespace vramkit {

// In the cache for as long as it lives.
class BlockFile {
 public:
  BlockFile(std::string path, std::vector<std::int64_t> offsets, Descriptor lock, bool built)
      : path_(std::move(path)),
        offsets_(std::move(offsets)),
        lock_(std::move(lock)),
        built_(built) {}

  const std::string& path() const { return path_; }
  // Of each block in the file: multiples of kDirectUnit.
  const std::vector<std::int64_t>& offsets() const { return offsets_; }
  bool built() const { return built_; }  // now, rather than found

 private:
  std::string path_;
  std::vector<std::int64_t> offsets_;
  Descriptor lock_;
  bool built_;
};

class BlockCache {
 public:
  // Writes one block's bytes.
  using Fill = std::function<void(std::int64_t block, std::byte* dst)>;

  // The folder is made if it is not there. Throws SystemError.
  BlockCache(std::string folder, std::int64_t most_bytes);

  // The file that `key` determines, built if it is not there: block by block, in memory of the
  // largest. Waits for another who builds it. Throws what `fill` throws; BudgetError if the cache
  // has no room beside the files in use; SystemError; Interrupted.
  std::shared_ptr<BlockFile> open(const std::string& key, std::span<const std::int64_t> bytes,
                                  const Fill& fill, const Interrupt& interrupt = {});
  // Removes files that are not in use, least recently used first, until `most` bytes are left.
  // Returns what is left.
  std::int64_t trim(std::int64_t most);

  const std::string& folder() const { return folder_; }
  std::int64_t bytes() const;  // of all files now

 private:
  std::shared_ptr<BlockFile> find(const std::string& entry, const std::string& key,
                                  std::span<const std::int64_t> bytes, Descriptor& lock,
                                  bool built) const;
  void build(const std::string& entry, const std::string& key, std::span<const std::int64_t> bytes,
             const Fill& fill, const Interrupt& interrupt) const;
  Descriptor lock(const std::string& path, LockKind kind, const Interrupt& interrupt) const;

  const std::string folder_;
  const std::int64_t most_;
};

// Text that determines the content of blocks that are taken from files: which files, as they are
// now, and which of their bytes. Throws InvalidArgument for sources that are no files.
std::string describe(std::span<const std::shared_ptr<const Source>> sources,
                     std::span<const BlockSpec> blocks);
// Reads a block's extents into `dst`; what none covers becomes zero.
void read_block(std::span<const std::shared_ptr<const Source>> sources, const BlockSpec& block,
                std::byte* dst);

}  // namespace vramkit
