// See safetensors_writer.hpp.
#include "core/safetensors_writer.hpp"

#include <iterator>
#include <limits>
#include <utility>

#include "core/error.hpp"
#include "core/json.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

std::string quoted(std::string_view name) { return "'" + printable(name, 200) + "'"; }

void check_text(const std::string& path, const char* what, std::string_view text) {
  if (!is_utf8(text) || text.find('\0') != std::string_view::npos) {
    throw InvalidArgument(printable(path) + ": " + what + " " + quoted(text) +
                          " cannot be stored: expected UTF-8 without NUL characters");
  }
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(std::string path, const std::vector<TensorSpec>& tensors,
                                     const std::map<std::string, std::string>& metadata)
    : path_(std::move(path)) {
  const std::string header = build_header(tensors, metadata);
  progress_.resize(tensors_.size());
  file_.emplace(path_, file_bytes_);
  file_->write_at(header.data(), static_cast<std::int64_t>(header.size()), 0);
}

// Fills tensors_, index_ and file_bytes_; returns the file's bytes before the first tensor.
std::string SafetensorsWriter::build_header(const std::vector<TensorSpec>& tensors,
                                            const std::map<std::string, std::string>& metadata) {
  std::string json = "{";
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      check_text(path_, "the metadata key", key);
      check_text(path_, "the metadata value", value);
      if (json.back() != '{') json += ',';
      append_json_string(json, key);
      json += ':';
      append_json_string(json, value);
    }
    json += '}';
  }
  std::int64_t at = 0;
  for (const TensorSpec& spec : tensors) {
    check_text(path_, "the tensor name", spec.name);
    if (spec.name == "__metadata__") {
      throw InvalidArgument(printable(path_) +
                            ": a tensor cannot be named '__metadata__', which the format keeps for "
                            "itself; rename it");
    }
    std::int64_t bytes = 0;
    try {
      bytes = safetensors_bytes(spec.dtype, spec.shape);
    } catch (const InvalidArgument& e) {
      throw InvalidArgument(printable(path_) + ": tensor " + quoted(spec.name) + ": " + e.what());
    }
    // Leaves room for the header, whose size is bounded.
    if (bytes > std::numeric_limits<std::int64_t>::max() - 2 * kSafetensorsHeaderCap - at) {
      throw InvalidArgument(printable(path_) + ": tensor " + quoted(spec.name) +
                            ": the file would pass 2^63 - 1 bytes");
    }
    if (!index_.emplace(spec.name, tensors_.size()).second) {
      throw InvalidArgument(printable(path_) + ": tensor " + quoted(spec.name) +
                            " is declared twice; names must be unique");
    }
    tensors_.push_back({spec.name, spec.dtype, spec.shape, at, at + bytes});
    if (json.size() > 1) json += ',';
    append_json_string(json, spec.name);
    json += ":{\"dtype\":\"" + spec.dtype + "\",\"shape\":[";
    for (std::size_t i = 0; i < spec.shape.size(); ++i) {
      json += (i == 0 ? "" : ",") + std::to_string(spec.shape[i]);
    }
    json += "],\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(at + bytes) + "]}";
    at += bytes;
  }
  json += '}';

  constexpr auto kPrefix = static_cast<std::size_t>(kSafetensorsPrefixBytes);
  constexpr auto kAlign = static_cast<std::size_t>(kSafetensorsDataAlignment);
  const std::size_t total = (kPrefix + json.size() + kAlign - 1) / kAlign * kAlign;
  json.resize(total - kPrefix, ' ');
  if (json.size() > static_cast<std::size_t>(kSafetensorsHeaderCap)) {
    throw InvalidArgument(printable(path_) + ": the header would have " +
                          std::to_string(json.size()) + " bytes, the format allows " +
                          std::to_string(kSafetensorsHeaderCap) +
                          "; spread the tensors over several files");
  }
  std::string bytes(kPrefix, '\0');
  for (std::size_t i = 0; i < kPrefix; ++i) {
    bytes[i] = static_cast<char>(static_cast<std::uint64_t>(json.size()) >> (8 * i) & 0xFF);
  }
  bytes += json;
  const auto data_begin = static_cast<std::int64_t>(total);
  for (TensorInfo& t : tensors_) {
    t.begin += data_begin;
    t.end += data_begin;
  }
  file_bytes_ = data_begin + at;
  return bytes;
}

std::size_t SafetensorsWriter::find(std::string_view name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) {
    throw InvalidArgument(printable(path_) + ": tensor " + quoted(name) +
                          " was not declared when the writer was made");
  }
  return found->second;
}

const TensorInfo& SafetensorsWriter::info(std::string_view name) const {
  return tensors_[find(name)];
}

void SafetensorsWriter::require_open() const {
  switch (state_) {
    case State::open:
      return;
    case State::failed:
      throw InvalidArgument(printable(path_) +
                            ": an earlier write failed, so the file cannot be finished; make a new "
                            "writer");
    case State::committed:
      throw InvalidArgument(printable(path_) + ": the file is finished; make a new writer");
    case State::discarded:
      throw InvalidArgument(printable(path_) + ": the writer gave up; make a new one");
  }
}

void SafetensorsWriter::claim(std::size_t tensor, std::int64_t begin, std::int64_t end) {
  if (begin == end) return;
  Progress& progress = progress_[tensor];
  auto& written = progress.written;
  const auto after = written.lower_bound(begin);
  const bool joins_after = after != written.end() && after->first == end;
  auto before = written.end();
  if (after != written.begin()) before = std::prev(after);
  if ((after != written.end() && after->first < end) ||
      (before != written.end() && before->second > begin)) {
    throw InvalidArgument(printable(path_) + ": tensor " + quoted(tensors_[tensor].name) +
                          ": some of the bytes [" + std::to_string(begin) + ", " +
                          std::to_string(end) + ") were written before");
  }
  std::int64_t joined_end = end;
  if (joins_after) {
    joined_end = after->second;
    written.erase(after);
  }
  if (before != written.end() && before->second == begin) {
    before->second = joined_end;
  } else {
    written.emplace(begin, joined_end);
  }
  progress.bytes += end - begin;
}

void SafetensorsWriter::write(std::string_view name, const void* src, std::int64_t bytes,
                              std::int64_t offset) {
  const std::size_t tensor = find(name);
  const TensorInfo& t = tensors_[tensor];
  if (offset < 0 || bytes < 0 || offset > t.bytes() || bytes > t.bytes() - offset) {
    throw InvalidArgument(printable(path_) + ": tensor " + quoted(name) + " has " +
                          std::to_string(t.bytes()) + " bytes; " + std::to_string(bytes) +
                          " from " + std::to_string(offset) + " on do not lie within");
  }
  if (bytes > 0 && src == nullptr) {
    throw InvalidArgument(printable(path_) + ": tensor " + quoted(name) +
                          ": the source is a null pointer");
  }
  {
    const std::lock_guard lock(mutex_);
    require_open();
    claim(tensor, offset, offset + bytes);
    ++writing_;
  }
  try {
    file_->write_at(src, bytes, t.begin + offset);
  } catch (...) {
    finish_write(false);
    throw;
  }
  finish_write(true);
}

void SafetensorsWriter::finish_write(bool done) noexcept {
  const std::lock_guard lock(mutex_);
  --writing_;
  if (!done && state_ == State::open) state_ = State::failed;
  // The last write to return removes the file, not the one that failed: closing it under another
  // write could let that one hit whatever is opened next. Removing it at once gives a full disk
  // its room back, though the writer may live on in a traceback.
  if (writing_ == 0 && state_ != State::open) file_->discard();
}

void SafetensorsWriter::commit() {
  const std::lock_guard lock(mutex_);
  require_open();
  if (writing_ != 0) {
    throw InvalidArgument(printable(path_) + ": " + std::to_string(writing_) +
                          " writes are still running; commit after they return");
  }
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    if (progress_[i].bytes != tensors_[i].bytes()) {
      throw InvalidArgument(printable(path_) + ": tensor " + quoted(tensors_[i].name) +
                            " is not complete: " + std::to_string(progress_[i].bytes) + " of " +
                            std::to_string(tensors_[i].bytes()) + " bytes were written");
    }
  }
  try {
    file_->commit();
  } catch (...) {
    file_->discard();
    state_ = State::failed;
    throw;
  }
  state_ = State::committed;
}

void SafetensorsWriter::discard() noexcept {
  const std::lock_guard lock(mutex_);
  if (state_ == State::committed) return;
  state_ = State::discarded;
  if (writing_ == 0) file_->discard();  // else the last write does it
}

bool SafetensorsWriter::committed() const {
  const std::lock_guard lock(mutex_);
  return state_ == State::committed;
}

}  // namespace vramkit
