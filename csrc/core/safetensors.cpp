// See safetensors.hpp. Every refusal names the file, the tensor where there is one, and what was
// expected instead.
#include "core/safetensors.hpp"

#include <algorithm>
#include <array>
#include <limits>

#include "core/error.hpp"
#include "core/json.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

constexpr std::array<std::pair<std::string_view, int>, 22> kDtypes{{
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
}};

constexpr std::int64_t kMostBytes = std::numeric_limits<std::int64_t>::max();
// Read at a time: large enough for the disk's full rate, small enough that what is dropped from
// the page cache piece by piece never adds up to much.
constexpr std::int64_t kPieceBytes = std::int64_t{8} << 20;
constexpr std::size_t kShownName = 200;

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw CheckpointError(printable(path) + ": " + what +
                        "; the file is damaged or is not a safetensors file: fetch or save it "
                        "again");
}

std::string quoted(std::string_view name) { return "'" + printable(name, kShownName) + "'"; }

[[noreturn]] void refuse_tensor(const std::string& path, std::string_view name,
                                const std::string& what) {
  refuse(path, "tensor " + quoted(name) + ": " + what);
}

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i == 16) return text + ", ...]";
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::string offsets_text(const TensorInfo& t) {
  return "data_offsets [" + std::to_string(t.begin) + ", " + std::to_string(t.end) + "]";
}

// Fields of one tensor, offsets still relative to the data section.
TensorInfo read_tensor(JsonReader& json, std::string name) {
  TensorInfo info;
  info.name = std::move(name);
  bool has_dtype = false, has_shape = false, has_offsets = false;
  const auto once = [&](bool& seen, const char* field) {
    if (seen) json.fail(std::string("the field '") + field + "' is there twice");
    seen = true;
  };
  json.begin_object();
  std::string key;
  while (json.next_key(key)) {
    if (key == "dtype") {
      once(has_dtype, "dtype");
      info.dtype = json.string();
    } else if (key == "shape") {
      once(has_shape, "shape");
      json.begin_array();
      while (json.next_item()) {
        if (info.shape.size() == kSafetensorsRankCap) {
          json.fail("the shape has more than " + std::to_string(kSafetensorsRankCap) +
                    " dimensions");
        }
        info.shape.push_back(json.natural());
      }
    } else if (key == "data_offsets") {
      once(has_offsets, "data_offsets");
      std::array<std::int64_t, 2> pair{};
      std::size_t count = 0;
      json.begin_array();
      while (json.next_item()) {
        if (count == pair.size()) json.fail("data_offsets has more than two numbers");
        pair[count++] = json.natural();
      }
      if (count != pair.size()) json.fail("data_offsets has fewer than two numbers");
      info.begin = pair[0];
      info.end = pair[1];
    } else {
      json.fail("unknown field " + quoted(key) + ", expected dtype, shape and data_offsets");
    }
  }
  if (!has_dtype) json.fail("the field 'dtype' is missing");
  if (!has_shape) json.fail("the field 'shape' is missing");
  if (!has_offsets) json.fail("the field 'data_offsets' is missing");
  return info;
}

bool has_nul(std::string_view text) { return text.find('\0') != std::string_view::npos; }

std::map<std::string, std::string> read_metadata(JsonReader& json) {
  std::map<std::string, std::string> metadata;
  json.begin_object();
  std::string key;
  while (json.next_key(key)) {
    std::string value = json.string();
    // Tools that treat the header as C strings would see another text than we do.
    if (has_nul(key) || has_nul(value)) {
      json.fail("the entry " + quoted(key) + " holds a NUL character");
    }
    if (!metadata.emplace(key, std::move(value)).second) {
      json.fail("the entry " + quoted(key) + " is there twice");
    }
  }
  return metadata;
}

// The tensors must follow each other from 0 to the end of the data section.
void check_layout(std::vector<TensorInfo>& tensors, std::int64_t data_bytes,
                  const std::string& path) {
  for (const TensorInfo& t : tensors) {
    if (t.end < t.begin) refuse_tensor(path, t.name, offsets_text(t) + " end before they begin");
    if (t.end > data_bytes) {
      refuse_tensor(path, t.name,
                    offsets_text(t) + " reach past the end of the file, which holds " +
                        std::to_string(data_bytes) + " bytes of tensors; it may be cut short");
    }
    std::int64_t bytes = 0;
    try {
      bytes = safetensors_bytes(t.dtype, t.shape);
    } catch (const InvalidArgument& e) {
      refuse_tensor(path, t.name, e.what());
    }
    if (bytes != t.end - t.begin) {
      refuse_tensor(path, t.name,
                    offsets_text(t) + " span " + std::to_string(t.end - t.begin) +
                        " bytes, but dtype " + t.dtype + " with shape " + shape_text(t.shape) +
                        " takes " + std::to_string(bytes));
    }
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::int64_t at = 0;
  for (const TensorInfo& t : tensors) {
    if (t.begin < at) {
      refuse_tensor(
          path, t.name,
          offsets_text(t) + " overlap the tensor before, which ends at " + std::to_string(at));
    }
    if (t.begin > at) {
      refuse_tensor(
          path, t.name,
          offsets_text(t) + " leave a hole: the tensor before ends at " + std::to_string(at));
    }
    at = t.end;
  }
  if (at != data_bytes) {
    refuse(path, std::to_string(data_bytes - at) +
                     " bytes follow the end of the last tensor, expected none");
  }
}

}  // namespace

std::span<const std::pair<std::string_view, int>> safetensors_dtypes() { return kDtypes; }

std::int64_t safetensors_bytes(std::string_view dtype, std::span<const std::int64_t> shape) {
  const auto found = std::find_if(kDtypes.begin(), kDtypes.end(),
                                  [&](const auto& entry) { return entry.first == dtype; });
  if (found == kDtypes.end()) {
    std::string known;
    for (const auto& [name, bits] : kDtypes) {
      known += (known.empty() ? "" : ", ") + std::string(name);
    }
    throw InvalidArgument("unknown dtype " + quoted(dtype) + ", expected one of " + known);
  }
  if (shape.size() > kSafetensorsRankCap) {
    throw InvalidArgument("the shape has " + std::to_string(shape.size()) +
                          " dimensions, expected at most " + std::to_string(kSafetensorsRankCap));
  }
  // Zeros are left out of the product: an empty tensor whose other dimensions overflow is refused
  // wherever the zero stands, since frameworks compute strides from the same products.
  std::int64_t count = 1;
  bool empty = false;
  for (const std::int64_t dim : shape) {
    if (dim < 0) {
      throw InvalidArgument("shape " + shape_text(shape) + " has a negative dimension");
    }
    if (dim == 0) {
      empty = true;
    } else if (count > kMostBytes / dim) {
      throw InvalidArgument("shape " + shape_text(shape) + " has more than 2^63 - 1 elements");
    } else {
      count *= dim;
    }
  }
  const std::int64_t bits = found->second;
  if (count > kMostBytes / bits) {
    throw InvalidArgument("dtype " + std::string(dtype) + " with shape " + shape_text(shape) +
                          " takes more than 2^63 - 1 bits");
  }
  if (empty) return 0;
  if (count * bits % 8 != 0) {
    throw InvalidArgument("dtype " + std::string(dtype) + " with shape " + shape_text(shape) +
                          " does not fill a whole number of bytes");
  }
  return count * bits / 8;
}

SafetensorsHeader parse_safetensors_header(std::string_view header, std::int64_t file_bytes,
                                           const std::string& path) {
  std::size_t bad = 0;
  if (!is_utf8(header, &bad)) {
    refuse(path, "the header is not UTF-8 at byte " + std::to_string(bad));
  }
  if (header.empty() || header.front() != '{') {
    refuse(path, "the header does not begin with '{', as the format demands");
  }
  SafetensorsHeader out;
  bool has_metadata = false;
  bool in_entry = false;  // whether `name` is the entry being read, for messages
  std::string name;
  JsonReader json(header);
  try {
    json.begin_object();
    while (json.next_key(name)) {
      in_entry = true;
      if (has_nul(name)) json.fail("the name holds a NUL character");
      if (name == "__metadata__") {
        if (has_metadata) json.fail("it is there twice");
        has_metadata = true;
        out.metadata = read_metadata(json);
      } else {
        out.tensors.push_back(read_tensor(json, name));
      }
      in_entry = false;
    }
    json.end();
  } catch (const JsonError& e) {
    const std::string what = std::string("the header is not sound: ") + e.what();
    if (!in_entry) refuse(path, what);
    if (name == "__metadata__") refuse(path, "__metadata__: " + what);
    refuse_tensor(path, name, what);
  }

  std::vector<std::string_view> names;
  names.reserve(out.tensors.size());
  for (const TensorInfo& t : out.tensors) names.push_back(t.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) refuse_tensor(path, *twice, "the name is there twice");

  const std::int64_t data_begin =
      kSafetensorsPrefixBytes + static_cast<std::int64_t>(header.size());
  check_layout(out.tensors, file_bytes - data_begin, path);
  for (TensorInfo& t : out.tensors) {
    t.begin += data_begin;
    t.end += data_begin;
  }
  return out;
}

SafetensorsFile::SafetensorsFile(std::string path)
    : path_(std::move(path)),
      file_(open_regular_file(path_)),
      identity_(DiskCalls().identify(file_, path_)),
      file_bytes_(identity_.bytes) {
  std::array<unsigned char, kSafetensorsPrefixBytes> prefix{};
  if (file_bytes_ < kSafetensorsPrefixBytes ||
      read_at(file_, prefix.data(), kSafetensorsPrefixBytes, 0, path_) < kSafetensorsPrefixBytes) {
    refuse(path_, "the file has " + std::to_string(file_bytes_) +
                      " bytes, less than the 8 of the header's length");
  }
  std::uint64_t length = 0;
  for (std::size_t i = prefix.size(); i-- > 0;) length = length << 8 | prefix[i];
  if (length > static_cast<std::uint64_t>(kSafetensorsHeaderCap)) {
    refuse(path_, "the header is said to have " + std::to_string(length) +
                      " bytes, expected at most " + std::to_string(kSafetensorsHeaderCap));
  }
  const auto header_bytes = static_cast<std::int64_t>(length);
  if (header_bytes > file_bytes_ - kSafetensorsPrefixBytes) {
    refuse(path_, "the header is said to have " + std::to_string(length) + " bytes, but only " +
                      std::to_string(file_bytes_ - kSafetensorsPrefixBytes) +
                      " follow its length; the file may be cut short");
  }
  std::string header(static_cast<std::size_t>(length), '\0');
  if (read_at(file_, header.data(), header_bytes, kSafetensorsPrefixBytes, path_) < header_bytes) {
    refuse(path_, "the file became shorter while its header was read");
  }
  SafetensorsHeader parsed = parse_safetensors_header(header, file_bytes_, path_);
  tensors_ = std::move(parsed.tensors);
  metadata_ = std::move(parsed.metadata);
  for (std::size_t i = 0; i < tensors_.size(); ++i) index_.emplace(tensors_[i].name, i);
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const TensorInfo& t : tensors_) names.push_back(t.name);
  return names;
}

const TensorInfo& SafetensorsFile::info(std::string_view name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) {
    throw CheckpointError(printable(path_) + ": has no tensor " + quoted(name) + " among its " +
                          std::to_string(tensors_.size()) +
                          "; names() lists them, and an index of shards may be out of date");
  }
  return tensors_[found->second];
}

void SafetensorsFile::read_into(std::string_view name, void* dst, std::int64_t bytes,
                                bool drop_cache) const {
  const TensorInfo& t = info(name);
  if (bytes != t.bytes()) {
    throw InvalidArgument("tensor " + quoted(name) + " of " + printable(path_) + " has " +
                          std::to_string(t.bytes()) + " bytes, but the destination has " +
                          std::to_string(bytes));
  }
  read_range(name, 0, dst, bytes, drop_cache);
}

void SafetensorsFile::read_range(std::string_view name, std::int64_t offset, void* dst,
                                 std::int64_t bytes, bool drop_cache) const {
  const TensorInfo& t = info(name);
  if (offset < 0 || bytes < 0 || offset > t.bytes() || bytes > t.bytes() - offset) {
    throw InvalidArgument("tensor " + quoted(name) + " of " + printable(path_) + " has " +
                          std::to_string(t.bytes()) + " bytes; " + std::to_string(bytes) +
                          " from " + std::to_string(offset) + " on do not lie within");
  }
  if (bytes > 0 && dst == nullptr) {
    throw InvalidArgument("tensor " + quoted(name) + ": the destination is a null pointer");
  }
  auto* out = static_cast<char*>(dst);
  for (std::int64_t done = 0; done < bytes;) {
    const std::int64_t piece = std::min(kPieceBytes, bytes - done);
    const std::int64_t at = t.begin + offset + done;
    const std::int64_t got = read_at(file_, out + done, piece, at, path_);
    if (got < piece) {
      refuse_tensor(path_, name,
                    "the file ends at byte " + std::to_string(at + got) + ", expected " +
                        std::to_string(file_bytes_) + ": it became shorter after it was opened");
    }
    if (drop_cache) drop_page_cache(file_, at, piece);
    done += piece;
  }
}

}  // namespace vramkit
