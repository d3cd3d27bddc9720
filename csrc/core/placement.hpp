// The planner with places: a storage format and a tier for every layer, under a device limit, a
// host limit and a bound on the loss, by the least loss, the least time, or a sum of both.
//
// A model is run in phases that take turns on the device (a pipeline's text encoder, transformer,
// decoder; most models are one phase). A phase needs on the device what is reserved for it, its
// resident layers, and `slots` slots as large as its largest streamed layer. On the host lie the
// layers that say so and, where any layer of a phase comes from disk, as many staging slots of that
// size (phases share the staging room). Copies overlap with arithmetic, so a phase takes the
// longest of three: its arithmetic, what crosses the link, what is read from disk; plus, once, its
// turn.
//
// Sizes are exact bytes, never rounded. Losses and seconds are summed exactly, as fixed-point
// numbers of 60 bits over the largest possible sum, so that no order of summation matters.
#pragma once
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace vramkit {

// One way to keep one layer. The seconds are those of the layer's phase's whole run.
struct PlacedChoice {
  std::int64_t resident = 0;  // bytes that stay on the device while the phase has its turn
  std::int64_t streamed = 0;  // bytes that a slot must hold; 0: no slot is needed
  std::int64_t host = 0;      // bytes kept on the host
  bool staged = false;        // comes from disk, through a staging slot
  double loss = 0;
  double compute_seconds = 0;
  double link_seconds = 0;
  double disk_seconds = 0;
  double turn_seconds = 0;  // spent once, before the phase runs, beside nothing else
};

struct PlacedGroup {
  std::int64_t phase = 0;
  std::vector<PlacedChoice> choices;
};

struct PlacedPhase {
  std::int64_t reserved = 0;   // device bytes beside the layers: norms, activations, workspaces
  double compute_seconds = 0;  // arithmetic that is no layer's
};

inline constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();
inline constexpr std::int64_t kPlacementStates = 400'000;  // some 100 bytes each
inline constexpr std::int64_t kPlacementNodes = 96;

enum class Preference {
  weighted,  // loss_weight * loss + time_weight * seconds
  quality,   // the least loss, and of all plans of that loss the least seconds
};

struct PlacementProblem {
  std::vector<PlacedPhase> phases;
  std::vector<PlacedGroup> groups;
  std::int64_t device_limit = 0;
  std::int64_t host_limit = kUnlimited;
  std::int64_t slots = 2;
  double loss_limit = std::numeric_limits<double>::infinity();
  Preference preference = Preference::quality;
  double loss_weight = 1, time_weight = 0;
  // Bounds on the search: counts, not clocks, so that every machine gives the same answer.
  std::int64_t state_limit = kPlacementStates;
  std::int64_t node_limit = kPlacementNodes;
};

struct PlacementResult {
  bool found = false;  // false: no plan is known; if also `optimal`, none exists
  std::vector<std::int64_t> choices;
  double loss = 0;
  double seconds = 0;
  std::vector<std::int64_t> device_bytes;  // by phase, with what is reserved and the slots
  std::vector<std::int64_t> slot_bytes;    // by phase, of one slot
  std::int64_t host_bytes = 0;             // with staging
  // Of loss_weight * loss + time_weight * seconds; with Preference::quality, of the loss.
  double objective = 0;
  double lower_bound = 0;          // no plan has a smaller objective; equals it if `optimal`
  double seconds_lower_bound = 0;  // with Preference::quality: of plans that lose no more
  bool optimal = false;  // with Preference::quality: the loss and the seconds are both least
  std::int64_t states = 0, nodes = 0;  // what the search spent
};

// Solves the problem above. Of plans with the same objective the first that the search meets is
// taken, in an order that depends on the problem alone (of choices that are alike the first).
// `optimal` means that no plan is better by more than 1e-12 of the objective.
//
// Throws InvalidArgument for malformed input (a group without choices, an unknown phase, negative
// sizes, losses or seconds that are negative or not finite, sums that overflow).
PlacementResult place(const PlacementProblem& problem);

// The least device bytes that hold each phase, whatever the loss and the host: exact.
struct PhaseNeed {
  std::int64_t bytes = 0;
  std::int64_t slot = 0;  // bytes of one slot of the smallest plan
};
std::vector<PhaseNeed> least_device_bytes(const PlacementProblem& problem);

}  // namespace vramkit
