// See mapping.hpp.
#include "core/engine/mapping.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "core/error.hpp"
#include "core/platform/memory.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

constexpr std::int64_t kCompared = std::int64_t{1} << 20;

std::string range(std::int64_t begin, std::int64_t bytes) {
  return std::to_string(bytes) + " bytes at " + std::to_string(begin);
}

}  // namespace

FileMapping::FileMapping(Files files, std::vector<Extent> extents, std::int64_t bytes)
    : files_(std::move(files)), extents_(std::move(extents)), bytes_(bytes) {
  std::erase_if(extents_, [](const Extent& extent) { return extent.bytes == 0; });
  std::sort(extents_.begin(), extents_.end(),
            [](const Extent& a, const Extent& b) { return a.block_offset < b.block_offset; });
  check();
  if (bytes == 0) return;
  // Large pages of the page cache are mapped whole where addresses and offsets agree modulo theirs.
  constexpr std::int64_t kLarge = HostMemory::kLargePage;
  std::int64_t shift = 0;
  reserved_bytes_ = round_up_to(bytes, kDirectUnit);
  if (bytes >= kLarge && !extents_.empty()) {
    const Extent& largest =
        *std::max_element(extents_.begin(), extents_.end(),
                          [](const Extent& a, const Extent& b) { return a.bytes < b.bytes; });
    shift = ((largest.source_offset - largest.block_offset) % kLarge + kLarge) % kLarge;
    reserved_bytes_ += shift;
  }
  reserved_ = static_cast<std::byte*>(
      reserve_pages(reserved_bytes_, bytes >= kLarge ? kLarge : kDirectUnit));
  bool mapped = reserved_ != nullptr;
  start_ = mapped ? reserved_ + shift : nullptr;
  for (const Extent& extent : extents_) {
    const std::int64_t lead = extent.block_offset % kDirectUnit;
    mapped = mapped && map_private(files_[static_cast<std::size_t>(extent.source)]->descriptor(),
                                   extent.source_offset - lead, extent.bytes + lead,
                                   start_ + (extent.block_offset - lead));
  }
  if (mapped) return;
  unmap();
  throw OutOfMemoryError(
      "the system has no addresses (or no mappings) left for " + std::to_string(bytes) + " bytes",
      bytes);
}

void FileMapping::check() const {
  std::int64_t end = 0;  // of the pages so far
  for (const Extent& extent : extents_) {
    if (extent.source < 0 || extent.source >= static_cast<std::int64_t>(files_.size())) {
      throw InvalidArgument("there is no file " + std::to_string(extent.source));
    }
    const FileSource& file = *files_[static_cast<std::size_t>(extent.source)];
    if (extent.source_offset < 0 || extent.bytes < 0 ||
        extent.source_offset > file.bytes() - extent.bytes) {
      throw InvalidArgument(printable(file.name()) + " has " + std::to_string(file.bytes()) +
                            " bytes, not " + range(extent.source_offset, extent.bytes));
    }
    if (extent.block_offset < 0 || extent.block_offset > bytes_ - extent.bytes) {
      throw InvalidArgument("a block of " + std::to_string(bytes_) + " bytes has no " +
                            range(extent.block_offset, extent.bytes));
    }
    if (extent.block_offset % kDirectUnit != extent.source_offset % kDirectUnit ||
        round_down_to(extent.block_offset, kDirectUnit) < end) {
      throw InvalidArgument("extents are mapped by whole pages, each to its own: " +
                            range(extent.source_offset, extent.bytes) + " cannot lie at " +
                            std::to_string(extent.block_offset));
    }
    end = round_up_to(extent.block_offset + extent.bytes, kDirectUnit);
  }
}

void FileMapping::unmap() noexcept {
  if (reserved_ != nullptr) return_pages(reserved_, reserved_bytes_);
  reserved_ = start_ = nullptr;
}

FileMapping::~FileMapping() { unmap(); }

std::optional<Extent> FileMapping::find(const std::byte* address, std::int64_t bytes) const {
  const auto at = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(address) -
                                            reinterpret_cast<std::uintptr_t>(start_));
  for (const Extent& extent : extents_) {
    const std::int64_t into = at - extent.block_offset;
    if (into >= 0 && into <= extent.bytes - bytes) {
      return Extent{extent.source, extent.source_offset + into, at, bytes};
    }
  }
  return std::nullopt;
}

bool FileMapping::changed(std::int64_t begin, std::int64_t bytes) const {
  if (begin < 0 || bytes < 0 || begin > bytes_ - bytes) {
    throw InvalidArgument("a block of " + std::to_string(bytes_) + " bytes has no " +
                          range(begin, bytes));
  }
  if (bytes == 0) return false;
  if (const std::optional<bool> told = pages_written(data() + begin, bytes)) return *told;
  HostMemory memory(kDirectUnit);
  const Allocation buffer(memory, std::min(bytes, kCompared));
  for (const Extent& extent : extents_) {
    const std::int64_t end = std::min(begin + bytes, extent.block_offset + extent.bytes);
    for (std::int64_t at = std::max(begin, extent.block_offset); at < end; at += kCompared) {
      const std::int64_t part = std::min(end - at, kCompared);
      files_[static_cast<std::size_t>(extent.source)]->read(
          ReadPath::plain, buffer.data(), extent.source_offset + (at - extent.block_offset), part);
      if (std::memcmp(buffer.data(), data() + at, static_cast<std::size_t>(part)) != 0) return true;
    }
  }
  return false;
}

}  // namespace vramkit
