// See block_cache.hpp.
#include "core/engine/block_cache.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <thread>
#include <utility>

#include "core/error.hpp"
#include "core/safetensors.hpp"
#include "core/safetensors_writer.hpp"
#include "core/sha256.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFile = "blocks.safetensors";
constexpr const char* kLock = "lock";
constexpr const char* kKey = "vramkit.block_file";
constexpr std::chrono::milliseconds kPoll{10};

std::string in(const std::string& folder, const char* name) { return folder + "/" + name; }

void make_folder(const std::string& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error && !fs::is_directory(folder)) {
    throw SystemError(error.value(), printable(folder) +
                                         ": the cache's folder cannot be made: " + error.message());
  }
}

// Bytes of the files in an entry's folder, what a killed builder left included.
std::int64_t bytes_of(const fs::path& entry) {
  std::int64_t sum = 0;
  std::error_code error;
  for (fs::directory_iterator file(entry, error), end; !error && file != end;
       file.increment(error)) {
    std::error_code gone;
    const auto size = file->file_size(gone);
    if (!gone) sum += static_cast<std::int64_t>(size);
  }
  return sum;
}

// All but the file and its lock: temporaries of builders that died. Wants the exclusive lock.
void clean(const std::string& entry) {
  std::error_code error;
  for (fs::directory_iterator file(entry, error), end; !error && file != end;
       file.increment(error)) {
    const std::string name = file->path().filename();
    std::error_code gone;
    if (name != kFile && name != kLock) fs::remove(file->path(), gone);
  }
}

struct Entry {
  std::string folder;
  std::int64_t bytes = 0;
  fs::file_time_type used;
};

// Least recently used first.
std::vector<Entry> entries_of(const std::string& folder) {
  std::vector<Entry> entries;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    std::error_code gone;
    if (!entry->is_directory(gone) || gone) continue;
    Entry found{entry->path(), bytes_of(entry->path()), {}};
    found.used = fs::last_write_time(in(found.folder, kLock), gone);
    if (gone) found.used = fs::file_time_type::min();
    entries.push_back(std::move(found));
  }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.used < b.used; });
  return entries;
}

// Removes an entry that nobody uses; false if somebody does.
bool remove_entry(const std::string& entry) {
  const std::string path = in(entry, kLock);
  const Descriptor lock = open_lock_file(path);
  if (!lock) return true;
  if (!try_to_lock(lock, LockKind::exclusive, path) || !names(path, lock)) return false;
  std::error_code gone;
  fs::remove(in(entry, kFile), gone);
  clean(entry);
  // The lock goes last: who opened it meanwhile sees that its name is gone, and begins again.
  fs::remove(path, gone);
  fs::remove(entry, gone);
  return true;
}

}  // namespace

BlockCache::BlockCache(std::string folder, std::int64_t most_bytes)
    : folder_(std::move(folder)), most_(most_bytes) {
  if (most_bytes < 0) {
    throw InvalidArgument("a cache holds 0 bytes or more, not " + std::to_string(most_bytes));
  }
  make_folder(folder_);
}

std::int64_t BlockCache::bytes() const {
  std::int64_t sum = 0;
  for (const Entry& entry : entries_of(folder_)) sum += entry.bytes;
  return sum;
}

std::int64_t BlockCache::trim(std::int64_t most) {
  const std::vector<Entry> entries = entries_of(folder_);
  std::int64_t left = 0;
  for (const Entry& entry : entries) left += entry.bytes;
  for (const Entry& entry : entries) {
    if (left <= most) break;
    if (remove_entry(entry.folder)) left -= entry.bytes;
  }
  return left;
}

// Empty if the folder went away meanwhile.
Descriptor BlockCache::lock(const std::string& path, LockKind kind,
                            const Interrupt& interrupt) const {
  Descriptor file = open_lock_file(path);
  while (file && !try_to_lock(file, kind, path)) {
    if (interrupt && interrupt()) throw Interrupted("waiting for a block file was broken off");
    std::this_thread::sleep_for(kPoll);
  }
  if (file && !names(path, file)) file.reset();
  return file;
}

std::shared_ptr<BlockFile> BlockCache::find(const std::string& entry, const std::string& key,
                                            std::span<const std::int64_t> bytes, Descriptor& lock,
                                            bool built) const {
  std::vector<std::int64_t> offsets;
  try {
    const SafetensorsFile file(in(entry, kFile));
    const auto stored = file.metadata().find(kKey);
    if (stored == file.metadata().end() || stored->second != key) return nullptr;
    if (file.tensors().size() != bytes.size()) return nullptr;
    for (std::size_t block = 0; block < bytes.size(); ++block) {
      const TensorInfo& info = file.info(std::to_string(block));
      if (info.begin % kDirectUnit != 0 || info.bytes() != round_up_to(bytes[block], kDirectUnit)) {
        return nullptr;
      }
      offsets.push_back(info.begin);
    }
  } catch (const CheckpointError&) {
    return nullptr;  // not ours, or damaged: built again
  } catch (const SystemError& error) {
    if (error.code() == ENOENT) return nullptr;
    throw;
  }
  std::error_code gone;
  fs::last_write_time(in(entry, kLock), fs::file_time_type::clock::now(), gone);
  return std::make_shared<BlockFile>(in(entry, kFile), std::move(offsets), std::move(lock), built);
}

void BlockCache::build(const std::string& entry, const std::string& key,
                       std::span<const std::int64_t> bytes, const Fill& fill,
                       const Interrupt& interrupt) const {
  clean(entry);
  std::error_code gone;
  fs::remove(in(entry, kFile), gone);
  std::vector<TensorSpec> tensors;
  // The header takes less than this for each tensor.
  std::int64_t total = kSafetensorsDataAlignment +
                       round_up_to(128 * static_cast<std::int64_t>(bytes.size()), kDirectUnit);
  std::int64_t largest = 0;
  for (std::size_t block = 0; block < bytes.size(); ++block) {
    if (bytes[block] < 0) throw InvalidArgument("a block has 0 bytes or more");
    const std::int64_t size = round_up_to(bytes[block], kDirectUnit);
    tensors.push_back({std::to_string(block), "U8", {size}});
    total += size;
    largest = std::max(largest, size);
  }
  std::unique_ptr<SafetensorsWriter> writer;
  {
    // One at a time makes room and reserves it.
    const std::string path = in(folder_, kLock);
    const Descriptor all = lock(path, LockKind::exclusive, interrupt);
    std::int64_t left = 0;
    if (total <= most_) {
      for (const Entry& other : entries_of(folder_)) left += other.bytes;
      for (const Entry& other : entries_of(folder_)) {
        if (left + total <= most_) break;
        if (other.folder != entry && remove_entry(other.folder)) left -= other.bytes;
      }
    }
    if (left + total > most_) {
      throw BudgetError(printable(folder_) + ": the cache may hold " + std::to_string(most_) +
                            " bytes, of which files in use have " + std::to_string(left) +
                            "; a block file of " + std::to_string(total) + " has no room",
                        left + total);
    }
    writer = std::make_unique<SafetensorsWriter>(in(entry, kFile), tensors,
                                                 std::map<std::string, std::string>{{kKey, key}});
  }
  HostMemory memory;
  const Allocation buffer(memory, largest);
  for (std::size_t block = 0; block < bytes.size(); ++block) {
    if (interrupt && interrupt()) throw Interrupted("building a block file was broken off");
    const std::int64_t size = round_up_to(bytes[block], kDirectUnit);
    if (size == 0) continue;
    std::memset(buffer.data() + bytes[block], 0, static_cast<std::size_t>(size - bytes[block]));
    fill(static_cast<std::int64_t>(block), buffer.data());
    writer->write(tensors[block].name, buffer.data(), size);
  }
  writer->commit();
}

std::shared_ptr<BlockFile> BlockCache::open(const std::string& key,
                                            std::span<const std::int64_t> bytes, const Fill& fill,
                                            const Interrupt& interrupt) {
  const std::string digest = sha256_hex(key);
  const std::string entry = folder_ + "/" + digest;
  const std::string path = in(entry, kLock);
  bool built = false;
  while (true) {
    make_folder(entry);
    Descriptor file = lock(path, LockKind::shared, interrupt);
    if (!file) continue;
    if (auto found = find(entry, digest, bytes, file, built)) return found;
    file.reset();
    file = lock(path, LockKind::exclusive, interrupt);
    if (!file) continue;
    // Another may have built it while this one waited: found again under a shared lock, then.
    if (Descriptor none; find(entry, digest, bytes, none, built)) continue;
    build(entry, digest, bytes, fill, interrupt);
    built = true;
  }
}

std::string describe(std::span<const std::shared_ptr<const Source>> sources,
                     std::span<const BlockSpec> blocks) {
  std::string text = "vramkit block file 1\n";
  for (const auto& source : sources) {
    const auto* file = dynamic_cast<const FileSource*>(source.get());
    if (file == nullptr) {
      throw InvalidArgument("a block file is made from files, not from " +
                            printable(source->name()));
    }
    const FileIdentity& id = file->identity();
    for (const auto part : {static_cast<std::int64_t>(id.device),
                            static_cast<std::int64_t>(id.inode), id.bytes, id.modified_ns}) {
      text += std::to_string(part) + ' ';
    }
    text += '\n';
  }
  for (const BlockSpec& block : blocks) {
    text += std::to_string(block.bytes) + ':';
    for (const Extent& e : block.extents) {
      for (const auto part : {e.source, e.source_offset, e.block_offset, e.bytes}) {
        text += std::to_string(part) + ' ';
      }
    }
    text += '\n';
  }
  return text;
}

void read_block(std::span<const std::shared_ptr<const Source>> sources, const BlockSpec& block,
                std::byte* dst) {
  std::memset(dst, 0, static_cast<std::size_t>(block.bytes));
  for (const Extent& e : block.extents) {
    if (e.source < 0 || e.source >= static_cast<std::int64_t>(sources.size()) || e.bytes < 0 ||
        e.block_offset < 0 || e.block_offset > block.bytes - e.bytes || e.source_offset < 0 ||
        e.source_offset > sources[static_cast<std::size_t>(e.source)]->bytes() - e.bytes) {
      throw InvalidArgument("block '" + printable(block.name) +
                            "' takes bytes that are not there, or has no place for them");
    }
    sources[static_cast<std::size_t>(e.source)]->read(ReadPath::plain, dst + e.block_offset,
                                                      e.source_offset, e.bytes);
  }
}

}  // namespace vramkit
