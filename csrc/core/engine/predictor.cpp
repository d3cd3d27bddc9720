// See predictor.hpp.
#include "core/engine/predictor.hpp"

#include <algorithm>
#include <bit>
#include <string>

#include "core/error.hpp"

namespace vramkit {
namespace {

constexpr std::size_t kProbes = 8;
constexpr std::size_t kEntriesPerBlock = 16 * Predictor::kLongest;
constexpr std::size_t kFewestEntries = 1024;

}  // namespace

Predictor::Predictor(std::int64_t blocks, std::span<const std::int64_t> order) {
  history_.fill(-1);
  const auto count = static_cast<std::size_t>(blocks);
  follows_.assign(count, -1);
  table_.resize(std::bit_ceil(std::max(kFewestEntries, kEntriesPerBlock * count)));
  for (std::int64_t block : order) {
    if (block < 0 || block >= blocks) {
      throw InvalidArgument("the order names block " + std::to_string(block) + " of " +
                            std::to_string(blocks));
    }
  }
  for (std::size_t at = 0; at < order.size(); ++at) {
    follows_[static_cast<std::size_t>(order[at])] = order[(at + 1) % order.size()];
  }
  // Twice round, so that the end is known to be followed by the beginning.
  for (int round = 0; round < 2; ++round) {
    for (std::int64_t block : order) observe(block);
  }
  history_.fill(-1);
}

std::uint64_t Predictor::extend(std::uint64_t key, std::int64_t block) {
  // One round of SplitMix64 (Steele, Lea, Flood 2014) for each call of the context.
  std::uint64_t x = key + static_cast<std::uint64_t>(block) + 1 + 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return x == 0 ? 1 : x;
}

const Predictor::Entry* Predictor::find(std::uint64_t key) const {
  const std::size_t mask = table_.size() - 1;
  for (std::size_t probe = 0; probe < kProbes; ++probe) {
    const Entry& entry = table_[(key + probe) & mask];
    if (entry.key == key) return &entry;
  }
  return nullptr;
}

void Predictor::store(std::uint64_t key, std::int64_t next) {
  const std::size_t mask = table_.size() - 1;
  Entry* place = nullptr;
  for (std::size_t probe = 0; probe < kProbes; ++probe) {
    Entry& entry = table_[(key + probe) & mask];
    if (entry.key == key) {
      place = &entry;
      break;
    }
    // A free entry has age 0: older than all.
    if (place == nullptr || entry.age < place->age) place = &entry;
  }
  *place = {key, static_cast<std::int32_t>(next), ++clock_};
}

void Predictor::observe(std::int64_t block) {
  std::uint64_t key = 0;
  for (std::size_t length = 1; length <= kLongest; ++length) {
    const std::int64_t called = history_[kLongest - length];
    if (called < 0) break;
    key = extend(key, called);
    store(key, block);
  }
  std::copy(history_.begin() + 1, history_.end(), history_.begin());
  history_.back() = block;
}

std::int64_t Predictor::next(std::span<const std::int64_t> ahead) const {
  Context context = history_;
  if (ahead.size() >= kLongest) {
    std::copy(ahead.end() - kLongest, ahead.end(), context.begin());
  } else {
    const auto size = static_cast<std::ptrdiff_t>(ahead.size());
    std::copy(context.begin() + size, context.end(), context.begin());
    std::copy(ahead.begin(), ahead.end(), context.end() - size);
  }
  std::int64_t found = -1;
  std::uint64_t key = 0;
  for (std::size_t length = 1; length <= kLongest; ++length) {
    const std::int64_t called = context[kLongest - length];
    if (called < 0) break;
    key = extend(key, called);
    // A context that is unknown makes all longer ones unknown, but for entries crowded out.
    if (const Entry* entry = find(key)) found = entry->next;
  }
  if (found < 0 && context.back() >= 0) {
    found = follows_[static_cast<std::size_t>(context.back())];
  }
  return found;
}

}  // namespace vramkit
