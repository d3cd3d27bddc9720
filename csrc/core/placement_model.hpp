// What the parts of the placement search share: the problem in integers, a node of the search, and
// a whole plan. placement.cpp says how they work together.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace vramkit::placement {

// Indices into Item::weights, and with it the order of every priced row.
enum Row : std::size_t { kDevice, kHost, kLoss, kTurn, kCompute, kLink, kDisk, kRows };

struct Item {
  std::array<std::int64_t, kRows> values;  // bytes, or fixed-point loss and time
  std::array<double, kRows> weights;       // the same, for prices
  std::int64_t slot;
  bool staged;
  std::int64_t index;  // in the caller's group

  std::int64_t operator[](Row row) const { return values[row]; }
};
using Items = std::vector<Item>;

struct Model {
  std::size_t phases = 0;
  std::vector<std::size_t> phase;  // of each group; never falls
  std::vector<std::size_t> ids;    // the caller's index of each group
  std::vector<std::int64_t> room;  // by phase: device bytes for layers and slots
  std::vector<std::int64_t> base;  // by phase: arithmetic that is no layer's
  std::int64_t host_room = 0;
  std::int64_t loss_room = 0;
  std::int64_t slots = 0;
  double loss_weight = 0, time_weight = 0;  // per unit of fixed point

  double objective(std::int64_t loss, std::int64_t time) const {
    return loss_weight * static_cast<double>(loss) + time_weight * static_cast<double>(time);
  }
};

// Prices of the rows: what a bound charges for each unit. `time` splits the weight of time over the
// three that overlap.
struct Prices {
  double host = 0, loss = 0;
  std::vector<double> device;
  std::vector<std::array<double, 3>> time;
};

enum class FromDisk : char { no, yes, open };

// A part of all plans: the largest streamed layer of phase p lies in [low[p], high[p]], and a phase
// does or does not read from disk.
struct Node {
  std::vector<std::int64_t> low, high;
  std::vector<FromDisk> disk;
  std::vector<Items> groups;   // the choices that a better plan of this part can have
  double bound = 0;            // no plan of this part has a smaller objective
  std::vector<Prices> prices;  // that gave good bounds, the best first
  bool tried = false;          // the exact search has run, and ran out of room
};

// What a plan takes, kept up to date choice by choice.
struct Plan {
  bool found = false;
  double objective = 0;
  std::int64_t loss = 0, time = 0;
  std::vector<std::size_t> items;  // the caller's choice, by the model's groups
};

// Room on the host beside staging slots of the least size that the node admits.
inline std::int64_t host_room(const Model& model, const Node& node) {
  std::int64_t staging = 0;
  for (std::size_t p = 0; p < model.phases; ++p) {
    if (node.disk[p] == FromDisk::yes) staging = staging > node.low[p] ? staging : node.low[p];
  }
  return model.host_room - model.slots * staging;
}

inline std::int64_t device_room(const Model& model, const Node& node, std::size_t p) {
  return model.room[p] - model.slots * node.low[p];
}

}  // namespace vramkit::placement
