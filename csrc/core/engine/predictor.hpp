// Which block is called next. A table from the last calls to the one that followed them: the
// longest context that is known decides, so that a block that is called twice in a pass, or a
// decoder that runs after its encoder once and then alone, is told apart by what came before.
//
// The table has a fixed size and never allocates after construction; an entry that is crowded out
// costs a wrong guess, no more. Not safe to call from several threads.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace vramkit {

class Predictor {
 public:
  static constexpr std::size_t kLongest = 6;  // calls of context

  // `order`: the calls of a pass as far as known, block numbers from 0 to blocks - 1; what follows
  // its end is its beginning. A call that no context foretells is taken to be followed as there.
  Predictor(std::int64_t blocks, std::span<const std::int64_t> order);

  void observe(std::int64_t block);
  // What follows the calls observed and then `ahead`; -1 if nothing is known.
  std::int64_t next(std::span<const std::int64_t> ahead = {}) const;

 private:
  struct Entry {
    std::uint64_t key = 0;  // 0: free
    std::int32_t next = -1;
    std::uint32_t age = 0;
  };
  using Context = std::array<std::int64_t, kLongest>;  // the latest call last, -1 before the first

  static std::uint64_t extend(std::uint64_t key, std::int64_t block);
  const Entry* find(std::uint64_t key) const;
  void store(std::uint64_t key, std::int64_t next);

  Context history_;
  std::vector<std::int64_t> follows_;  // by the order given
  std::vector<Entry> table_;
  std::uint32_t clock_ = 0;
};

}  // namespace vramkit
