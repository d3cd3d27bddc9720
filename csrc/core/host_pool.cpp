#include "core/host_pool.hpp"

#include <algorithm>
#include <iterator>
#include <string>

#include "core/error.hpp"
#include "core/platform/memory.hpp"

namespace vramkit {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

}  // namespace

HostPool::HostPool(std::optional<std::int64_t> limit) : limit_(limit) {
  if (limit && *limit < kLargePage) {
    throw InvalidArgument("a pool's limit is at least " + std::to_string(kLargePage) +
                          " bytes, one large page, not " + std::to_string(*limit));
  }
}

HostPool::~HostPool() {
  for (const auto& [start, bytes] : segments_) return_pages(start, bytes);
}

HostPool::Ranges::iterator HostPool::best_fit(std::int64_t bytes) {
  const auto found = by_size_.lower_bound({bytes, nullptr});
  return found == by_size_.end() ? ranges_.end() : ranges_.find(found->second);
}

HostPool::Ranges::iterator HostPool::grow(std::int64_t bytes) {
  // As much again as is held, so that a growing pool asks the system a few times only; if that is
  // too much, what is needed.
  const std::int64_t needed = round_up(bytes, kLargePage);
  const std::int64_t room = limit_ ? *limit_ - stats_.held : needed + kMostGrowth;
  const std::int64_t wanted = std::max(needed, std::min(stats_.held, kMostGrowth));
  for (const std::int64_t size : {std::min(wanted, room / kLargePage * kLargePage), needed}) {
    if (size < needed || size > room) continue;
    auto* start = static_cast<std::byte*>(touched_pages(size));
    if (start == nullptr) continue;
    segments_[start] = size;
    stats_.held += size;
    ++stats_.segments;
    const auto range = ranges_.insert({start, {size, true, start}}).first;
    add_free(range);
    return range;
  }
  return ranges_.end();
}

void* HostPool::take(std::int64_t bytes) {
  if (bytes <= 0) throw InvalidArgument("a piece of a pool has at least one byte");
  const std::int64_t size = round_up(bytes, kAlignment);
  const std::scoped_lock lock(mutex_);
  auto range = best_fit(size);
  const bool reused = range != ranges_.end();
  if (!reused) range = grow(size);
  if (range == ranges_.end()) return nullptr;
  drop_free(range);
  if (const std::int64_t rest = range->second.bytes - size; rest > 0) {
    add_free(ranges_.insert({range->first + size, {rest, true, range->second.segment}}).first);
  }
  range->second.bytes = size;
  range->second.free = false;
  stats_.used += size;
  stats_.peak_used = std::max(stats_.peak_used, stats_.used);
  ++stats_.lent;
  stats_.reused += reused ? 1 : 0;
  return range->first;
}

void HostPool::give(void* piece) {
  const std::scoped_lock lock(mutex_);
  auto range = ranges_.find(static_cast<std::byte*>(piece));
  if (range == ranges_.end() || range->second.free) {
    throw InvalidArgument("this piece is not lent by this pool");
  }
  stats_.used -= range->second.bytes;
  range->second.free = true;
  auto mergeable = [&](Ranges::iterator other) {
    return other->second.free && other->second.segment == range->second.segment;
  };
  if (const auto next = std::next(range); next != ranges_.end() && mergeable(next)) {
    drop_free(next);
    range->second.bytes += next->second.bytes;
    ranges_.erase(next);
  }
  if (range != ranges_.begin() && mergeable(std::prev(range))) {
    const auto before = std::prev(range);
    drop_free(before);
    before->second.bytes += range->second.bytes;
    ranges_.erase(range);
    range = before;
  }
  add_free(range);
}

std::int64_t HostPool::trim() {
  const std::scoped_lock lock(mutex_);
  std::int64_t returned = 0;
  for (auto segment = segments_.begin(); segment != segments_.end();) {
    const auto [start, bytes] = *segment;
    const auto range = ranges_.find(start);
    if (!range->second.free || range->second.bytes != bytes) {
      ++segment;
      continue;
    }
    drop_free(range);
    ranges_.erase(range);
    return_pages(start, bytes);
    returned += bytes;
    stats_.held -= bytes;
    --stats_.segments;
    segment = segments_.erase(segment);
  }
  return returned;
}

HostPool::Stats HostPool::stats() const {
  const std::scoped_lock lock(mutex_);
  return stats_;
}

}  // namespace vramkit
