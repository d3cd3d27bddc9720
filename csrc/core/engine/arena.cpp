// See arena.hpp.
#include "core/engine/arena.hpp"

#include <cassert>
#include <string>

#include "core/error.hpp"

namespace vramkit {

Arena::Arena(Memory& memory, std::int64_t bytes) : memory_(memory), granule_(memory.granularity()) {
  if (bytes < 0)
    throw InvalidArgument("an arena has 0 bytes or more, not " + std::to_string(bytes));
  bytes_ = round_up_to(bytes, granule_);
  users_.resize(static_cast<std::size_t>(bytes_ / granule_));
  if (bytes_ > 0) base_ = memory_.reserve(bytes_);
}

Arena::~Arena() {
  for (std::size_t at = 0; at < users_.size();) {
    std::size_t end = at + 1;
    while (end < users_.size() && (users_[end] > 0) == (users_[at] > 0)) ++end;
    if (users_[at] > 0) {
      memory_.decommit(base_ + static_cast<std::int64_t>(at) * granule_,
                       static_cast<std::int64_t>(end - at) * granule_);
    }
    at = end;
  }
  if (bytes_ > 0) memory_.unreserve(base_, bytes_);
}

Arena::Granules Arena::granules(std::int64_t offset, std::int64_t bytes) const {
  assert(offset >= 0 && bytes >= 0 && offset + bytes <= bytes_);
  if (bytes == 0) return {0, 0};
  return {static_cast<std::size_t>(offset / granule_),
          static_cast<std::size_t>((offset + bytes + granule_ - 1) / granule_)};
}

template <typename Step>
void Arena::runs(Granules range, std::int32_t users, Step step) const {
  for (std::size_t at = range.first; at < range.last;) {
    if (users_[at] != users) {
      ++at;
      continue;
    }
    std::size_t end = at + 1;
    while (end < range.last && users_[end] == users) ++end;
    step(at, end);
    at = end;
  }
}

std::int64_t Arena::cost(std::int64_t offset, std::int64_t bytes) const {
  std::int64_t sum = 0;
  runs(granules(offset, bytes), 0, [&](std::size_t first, std::size_t last) {
    sum += static_cast<std::int64_t>(last - first) * granule_;
  });
  return sum;
}

std::int64_t Arena::gain(std::int64_t offset, std::int64_t bytes) const {
  std::int64_t sum = 0;
  runs(granules(offset, bytes), 1, [&](std::size_t first, std::size_t last) {
    sum += static_cast<std::int64_t>(last - first) * granule_;
  });
  return sum;
}

void Arena::commit(std::int64_t offset, std::int64_t bytes) {
  const Granules range = granules(offset, bytes);
  auto start = [&](std::size_t granule) {
    return base_ + static_cast<std::int64_t>(granule) * granule_;
  };
  auto length = [&](std::size_t first, std::size_t last) {
    return static_cast<std::int64_t>(last - first) * granule_;
  };
  std::size_t done = range.first;  // runs before it are committed
  try {
    runs(range, 0, [&](std::size_t first, std::size_t last) {
      memory_.commit(start(first), length(first, last));
      done = last;
    });
  } catch (...) {
    runs({range.first, done}, 0, [&](std::size_t first, std::size_t last) {
      memory_.decommit(start(first), length(first, last));
    });
    throw;
  }
  for (std::size_t at = range.first; at < range.last; ++at) {
    if (users_[at]++ == 0) committed_ += granule_;
  }
}

void Arena::decommit(std::int64_t offset, std::int64_t bytes) noexcept {
  const Granules range = granules(offset, bytes);
  runs(range, 1, [&](std::size_t first, std::size_t last) {
    memory_.decommit(base_ + static_cast<std::int64_t>(first) * granule_,
                     static_cast<std::int64_t>(last - first) * granule_);
  });
  for (std::size_t at = range.first; at < range.last; ++at) {
    assert(users_[at] > 0);
    if (--users_[at] == 0) committed_ -= granule_;
  }
}

}  // namespace vramkit
