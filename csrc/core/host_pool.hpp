// Memory of the host that is touched once and used again.
//
// The first write to fresh memory costs more than writing it: the system hands out zeroed pages one
// fault at a time. The pool asks for segments of large pages, touches them once, and lends pieces
// of them; what comes back is lent again. Nothing returns to the system before trim() or the end.
//
// Pieces are the best fit among the free ranges of all segments, and neighbouring free ranges are
// one, so that a pool whose pieces have all come back is as good as new. Safe to call from several
// threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <utility>

namespace vramkit {

class HostPool {
 public:
  struct Stats {
    std::int64_t held = 0;       // bytes of all segments
    std::int64_t used = 0;       // bytes lent now, rounded up to the alignment
    std::int64_t peak_used = 0;  // the most ever lent
    std::int64_t segments = 0;
    std::int64_t lent = 0;    // pieces ever lent
    std::int64_t reused = 0;  // of these, without memory from the system
  };

  static constexpr std::int64_t kAlignment = 64;                        // bytes
  static constexpr std::int64_t kLargePage = std::int64_t{2} << 20;     // segments are multiples
  static constexpr std::int64_t kMostGrowth = std::int64_t{256} << 20;  // beyond a request

  // `limit`: the most bytes of all segments.
  explicit HostPool(std::optional<std::int64_t> limit = std::nullopt);
  ~HostPool();
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  // A piece of at least `bytes` > 0, aligned to kAlignment and touched. Null if the limit or the
  // system has no room, with nothing changed.
  void* take(std::int64_t bytes);
  // Gives a piece back. It must be one that take() returned and that was not given back since.
  void give(void* piece);
  // Returns segments without a lent piece to the system; how many bytes they had.
  std::int64_t trim();

  Stats stats() const;
  std::optional<std::int64_t> limit() const { return limit_; }

 private:
  struct Range {
    std::int64_t bytes;
    bool free;
    std::byte* segment;  // where its segment begins
  };
  using Ranges = std::map<std::byte*, Range>;

  Ranges::iterator best_fit(std::int64_t bytes);
  Ranges::iterator grow(std::int64_t bytes);
  void add_free(Ranges::iterator range) { by_size_.insert({range->second.bytes, range->first}); }
  void drop_free(Ranges::iterator range) { by_size_.erase({range->second.bytes, range->first}); }

  const std::optional<std::int64_t> limit_;
  mutable std::mutex mutex_;
  Ranges ranges_;                                          // of all segments, by address
  std::set<std::pair<std::int64_t, std::byte*>> by_size_;  // the free ones
  std::map<std::byte*, std::int64_t> segments_;
  Stats stats_;
};

}  // namespace vramkit
