// The last step of the planner's search (planner.cpp has the whole): lists of partial plans, built
// group by group, without those that are dominated or cannot lead below a ceiling.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace vramkit::planner {

__extension__ typedef __int128 Int128;  // costs in fixed point

struct Item {
  std::int64_t bytes;
  Int128 cost;
  std::int64_t index;  // in the caller's group
};
using Items = std::vector<Item>;  // sizes rise, costs fall

// A partial plan of the groups taken so far.
struct State {
  Int128 cost;
  std::int64_t bytes;
};

// One edge of a group's lower hull: taking it costs `bytes` and saves `saving`.
struct Segment {
  double slope;  // saving per byte
  std::int64_t bytes;
  Int128 saving;
  std::size_t group;  // index among the open groups
};

// An open group is one that still has a choice, a closed one has its single item in `base`.
struct Core {
  std::vector<Items> groups;         // those that can change sizes most come first
  std::vector<std::size_t> ids;      // the caller's index of each group
  std::vector<Segment> segments;     // of all hulls, steepest first, and in order within a group
  State base{0, 0};                  // the closed groups
  std::vector<std::int64_t> closed;  // choice of each of the caller's groups, -1 if open
};

State smallest(const Core& core);  // every group at its smallest choice

enum class Ended { found, none, full };

// Looks for the best plan that costs at most `ceiling`. Keeps at most `room` states. With a `width`
// each list keeps only its `width` most promising states instead, and Ended::none proves nothing.
// The core must outlive the search.
class Search {
 public:
  Search(const Core& core, std::int64_t budget, Int128 ceiling, std::int64_t room,
         std::optional<std::size_t> width);

  Ended run();
  std::int64_t kept() const { return kept_; }

  // After Ended::found: the plan's cost, and its choices by the caller's groups (of tied plans the
  // first).
  Int128 cost() const { return layers_.back().back().cost; }
  std::vector<std::int64_t> choices() const;

 private:
  // A step of an optimal plan, from a state of layers_[g] to one of layers_[g + 1].
  struct Edge {
    std::size_t from, to;
    std::int64_t index;  // the choice, in the caller's group
  };
  using Edges = std::vector<std::vector<Edge>>;  // by group

  Edges optimal_edges() const;
  static void keep_choice(Edges& edges, std::size_t g, std::int64_t index);
  bool extend(const Items& items, const State& rest);
  void narrow(std::vector<State>& states, const std::vector<double>& bounds) const;

  const Core& core_;
  const std::int64_t budget_;
  const Int128 ceiling_;
  Int128 margin_ = 0;
  const std::int64_t room_;
  const std::optional<std::size_t> width_;
  std::int64_t kept_ = 0;
  std::vector<std::vector<State>> layers_;  // after 0, 1, … groups
  std::vector<const Segment*> segments_;    // of the groups not yet taken
};

}  // namespace vramkit::planner
