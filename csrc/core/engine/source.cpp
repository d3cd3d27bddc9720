// See source.hpp.
#include "core/engine/source.hpp"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "core/engine/layout.hpp"
#include "core/error.hpp"
#include "core/safetensors.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

// A piece counts as cached if at least so much of it is: what is missing is read ahead.
constexpr std::int64_t kCachedTenths = 9;

}  // namespace

const char* to_string(ReadPath path) {
  switch (path) {
    case ReadPath::memory:
      return "memory";
    case ReadPath::cached:
      return "cached";
    case ReadPath::direct:
      return "direct";
    case ReadPath::plain:
      return "plain";
  }
  return "unknown";
}

MemorySource::MemorySource(const std::byte* start, std::int64_t bytes,
                           std::shared_ptr<const void> keeper, std::string name)
    : start_(start), bytes_(bytes), keeper_(std::move(keeper)), name_(std::move(name)) {
  if (bytes < 0 || (start == nullptr && bytes > 0)) {
    throw InvalidArgument("a source in memory has an address and 0 bytes or more");
  }
}

ReadPath MemorySource::read(ReadPath, std::byte* dst, std::int64_t offset,
                            std::int64_t bytes) const {
  assert(offset >= 0 && bytes >= 0 && offset + bytes <= bytes_);
  std::memcpy(dst, start_ + offset, static_cast<std::size_t>(bytes));
  return ReadPath::memory;
}

FileSource::FileSource(std::string path, DirectReads direct, std::shared_ptr<const DiskCalls> calls)
    : path_(std::move(path)), calls_(calls ? std::move(calls) : std::make_shared<DiskCalls>()) {
  file_ = open_regular_file(path_);
  identity_ = calls_->identify(file_, path_);
  if (direct == DirectReads::automatic) direct_ = calls_->reopen_direct(file_);
  direct_works_ = static_cast<bool>(direct_);
}

void FileSource::check() const {
  const FileIdentity now = calls_->identify(file_, path_);
  if (now == identity_) return;
  if (now.bytes != identity_.bytes) {
    throw FileChangedError(printable(path_) + ": had " + std::to_string(identity_.bytes) +
                           " bytes when it was opened and has " + std::to_string(now.bytes) +
                           " now; load the model again from a file that stays as it is");
  }
  throw FileChangedError(printable(path_) +
                         ": was written to since it was opened; load the model again from a file "
                         "that stays as it is");
}

void FileSource::fail(int code, std::int64_t offset, std::int64_t bytes) const {
  throw SystemError(code, printable(path_) + ": reading " + std::to_string(bytes) +
                              " bytes at offset " + std::to_string(offset) +
                              " failed: " + std::generic_category().message(code));
}

void FileSource::ended(std::int64_t offset) const {
  check();  // says so if the file has become shorter
  throw SystemError(EIO, printable(path_) + ": ends at offset " + std::to_string(offset) +
                             " although it has " + std::to_string(identity_.bytes) + " bytes");
}

ReadPath FileSource::path_for(std::int64_t offset, std::int64_t bytes) const {
  const std::int64_t cached = calls_->cached(file_, offset, bytes);
  if (cached > 0 && cached >= bytes / 10 * kCachedTenths) {
    if (cached < bytes) calls_->will_need(file_, offset, bytes);
    return ReadPath::cached;
  }
  if (direct_works_) return ReadPath::direct;
  calls_->will_need(file_, offset, bytes);
  return ReadPath::plain;
}

ReadPath FileSource::read(ReadPath path, std::byte* dst, std::int64_t offset,
                          std::int64_t bytes) const {
  assert(offset >= 0 && bytes >= 0 && offset + bytes <= identity_.bytes);
  std::int64_t done = 0;
  if (path == ReadPath::direct) {
    done = read_direct(dst, offset, bytes);
    if (done < bytes) path = ReadPath::plain;
  }
  if (done < bytes) read_plain(dst + done, offset + done, bytes - done);
  check();
  return path;
}

std::int64_t FileSource::read_direct(std::byte* dst, std::int64_t offset,
                                     std::int64_t bytes) const {
  assert(reinterpret_cast<std::uintptr_t>(dst) % kDirectUnit ==
         static_cast<std::uintptr_t>(offset % kDirectUnit));
  const std::int64_t begin = round_down_to(offset, kDirectUnit);
  const std::int64_t end = round_up_to(offset + bytes, kDirectUnit);
  std::byte* const out = dst - (offset - begin);
  std::int64_t at = begin;
  while (at < offset + bytes) {
    const std::int64_t got = calls_->read(direct_, out + (at - begin), end - at, at);
    if (got == -EINTR) continue;
    if (got == -EINVAL || got == -EOPNOTSUPP) {
      // Asked for more than the file system's unit allows, or it only pretended: never again.
      direct_works_ = false;
      return std::max<std::int64_t>(at - offset, 0);
    }
    if (got < 0) fail(static_cast<int>(-got), at, end - at);
    if (got == 0) ended(at);
    if (at + got >= offset + bytes) break;
    // A short read may end within a unit, and the next must begin with one.
    const std::int64_t whole = round_down_to(got, kDirectUnit);
    if (whole == 0) {
      // Less than a unit, and not the end: the rest is read the plain way.
      return std::max<std::int64_t>(at - offset, 0);
    }
    at += whole;
  }
  return bytes;
}

void FileSource::read_plain(std::byte* dst, std::int64_t offset, std::int64_t bytes) const {
  std::int64_t done = 0;
  while (done < bytes) {
    const std::int64_t got = calls_->read(file_, dst + done, bytes - done, offset + done);
    if (got == -EINTR) continue;
    if (got < 0) fail(static_cast<int>(-got), offset + done, bytes - done);
    if (got == 0) ended(offset + done);
    done += got;
  }
}

std::shared_ptr<FileSource> source_of(const SafetensorsFile& file, DirectReads direct,
                                      std::shared_ptr<const DiskCalls> calls) {
  auto source = std::make_shared<FileSource>(file.path(), direct, std::move(calls));
  if (source->identity() != file.identity()) {
    throw FileChangedError(printable(file.path()) +
                           ": was replaced or written to after its header was read; load it again");
  }
  return source;
}

void HostStore::discard(std::int64_t offset, std::int64_t bytes) noexcept {
  const std::int64_t begin = round_up_to(offset, memory_->granularity());
  const std::int64_t end = round_down_to(offset + bytes, memory_->granularity());
  if (begin < end) memory_->decommit(data() + begin, end - begin);
}

std::shared_ptr<MemorySource> source_of(const std::shared_ptr<HostStore>& store) {
  return std::make_shared<MemorySource>(store->data(), store->bytes(), store, "host store");
}

}  // namespace vramkit
