// One address range for all that offloading keeps on the device: the slots first, then a home for
// every block, packed. A home is backed by memory only while its block is resident, so that the
// addresses stay and the memory of residents that are given up goes back to the system.
//
// Memory comes in granules, which neighbours may share: a granule is committed while anything in
// it is. Not safe to call from several threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/engine/memory.hpp"

namespace vramkit {

class Arena {
 public:
  Arena(Memory& memory, std::int64_t bytes);  // throws OutOfMemoryError
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  std::byte* base() const { return base_; }
  std::int64_t reserved() const { return bytes_; }
  std::int64_t committed() const { return committed_; }

  // Memory behind [offset, offset + bytes). Throws as Memory::commit, with nothing changed.
  void commit(std::int64_t offset, std::int64_t bytes);
  // Undoes one commit() of the same range.
  void decommit(std::int64_t offset, std::int64_t bytes) noexcept;
  // What a commit of this range would add to committed(), and what undoing one would take away.
  std::int64_t cost(std::int64_t offset, std::int64_t bytes) const;
  std::int64_t gain(std::int64_t offset, std::int64_t bytes) const;

 private:
  struct Granules {
    std::size_t first, last;  // last is one past
  };
  Granules granules(std::int64_t offset, std::int64_t bytes) const;
  // Calls step(first, last) for each run of granules in the range that have `users` users.
  template <typename Step>
  void runs(Granules range, std::int32_t users, Step step) const;

  Memory& memory_;
  std::int64_t granule_;
  std::int64_t bytes_ = 0;
  std::int64_t committed_ = 0;
  std::byte* base_ = nullptr;
  std::vector<std::int32_t> users_;  // of each granule
};

}  // namespace vramkit
