// What the engine decides before anything moves: pieces, slots, homes, and who is resident under a
// limit. See engine.hpp.
#include <algorithm>
#include <numeric>
#include <string>

#include "core/engine/engine.hpp"
#include "core/error.hpp"
#include "core/text.hpp"

namespace vramkit {
namespace {

// Of one thread on a device that files can be read into: only what lies askew goes through it, and
// small enough to stay in a cache between the read and the copy.
constexpr std::int64_t kBounce = std::int64_t{1} << 20;

[[noreturn]] void refuse(const BlockSpec& spec, const std::string& what) {
  throw InvalidArgument("block '" + printable(spec.name) + "': " + what);
}

}  // namespace

void Engine::cut_pieces(Block& block) {
  BlockSpec& spec = block.spec;
  if (spec.bytes < 0) refuse(spec, "has " + std::to_string(spec.bytes) + " bytes");
  std::sort(spec.extents.begin(), spec.extents.end(),
            [](const Extent& a, const Extent& b) { return a.block_offset < b.block_offset; });
  const std::int64_t room = round_up_to(spec.bytes, kDirectUnit);
  std::int64_t end = 0;
  for (const Extent& e : spec.extents) {
    if (e.source < 0 || e.source >= static_cast<std::int64_t>(sources_.size())) {
      refuse(spec, "takes bytes from source " + std::to_string(e.source) + " of " +
                       std::to_string(sources_.size()));
    }
    const Source& source = *sources_[static_cast<std::size_t>(e.source)];
    if (e.bytes < 0 || e.block_offset < end || e.block_offset > spec.bytes - e.bytes) {
      refuse(spec, "has bytes that overlap, or lie outside of its " + std::to_string(spec.bytes));
    }
    if (e.source_offset < 0 || e.source_offset > source.bytes() - e.bytes) {
      refuse(spec, "takes " + std::to_string(e.bytes) + " bytes at offset " +
                       std::to_string(e.source_offset) + " of " + printable(source.name()) +
                       ", which has " + std::to_string(source.bytes()));
    }
    end = e.block_offset + e.bytes;
  }
  for (std::size_t index = 0; index < spec.extents.size(); ++index) {
    const Extent& e = spec.extents[index];
    const Source& source = *sources_[static_cast<std::size_t>(e.source)];
    const bool by_lane = source.memory() != nullptr &&
                         backend_->copies_from(source.memory() + e.source_offset, e.bytes);
    const std::int64_t first = round_down_to(e.block_offset, kDirectUnit);
    const std::int64_t last = round_up_to(e.block_offset + e.bytes, kDirectUnit);
    bool in_place = (e.block_offset - e.source_offset) % kDirectUnit == 0 && last <= room;
    // Nobody else's bytes lie in the units that a direct read of it writes.
    if (index > 0) {
      const Extent& before = spec.extents[index - 1];
      in_place = in_place && round_up_to(before.block_offset + before.bytes, kDirectUnit) <= first;
    }
    if (index + 1 < spec.extents.size()) {
      const Extent& after = spec.extents[index + 1];
      in_place = in_place && round_down_to(after.block_offset, kDirectUnit) >= last;
    }
    const std::int64_t step = round_up_to(options_.piece, kDirectUnit);
    for (std::int64_t done = 0; done < e.bytes;) {
      // Cuts lie between units, so that no unit is read by two threads.
      const std::int64_t at = e.source_offset + done;
      const std::int64_t cut = round_down_to(at, kDirectUnit) + step;
      const std::int64_t bytes = std::min(e.bytes - done, cut - at);
      block.pieces.push_back({&source, at, e.block_offset + done, bytes, in_place, by_lane});
      done += bytes;
    }
  }
}

// Slots and homes, in as many slots as wanted or, under a tight limit, in fewer: what streams then
// waits more often, but runs.
void Engine::lay_out(const std::vector<std::int64_t>& order) {
  std::vector<bool> must(blocks_.size());
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    must[index] = blocks_[index].spec.residence == Residence::resident;
  }
  for (std::int64_t most = options_.slots; most >= 1; --most) {
    lay_out_in(most, order);
    if (cost(must) <= options_.limit) break;
  }
  auto events = [&](Place& place) {
    place.released = backend_->make_event();
    for (std::int64_t lane = 0; lane < options_.threads; ++lane) {
      place.arrived.push_back(backend_->make_event());
    }
  };
  for (Place& slot : slots_) events(slot);
  for (Block& block : blocks_) events(block.home);
}

void Engine::lay_out_in(std::int64_t most, const std::vector<std::int64_t>& order) {
  std::vector<std::int64_t> bytes;
  std::vector<bool> needs;
  for (const Block& block : blocks_) {
    bytes.push_back(block.spec.bytes);
    needs.push_back(block.spec.residence != Residence::resident);
  }
  const SlotPlan plan = colour_slots(order, bytes, needs, options_.depth, most);
  std::int64_t end = 0;
  slots_.clear();
  slots_.resize(plan.capacity.size());
  for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
    slots_[slot].offset = end;
    slots_[slot].bytes = plan.capacity[slot];
    end += plan.capacity[slot];
  }
  slots_bytes_ = end = round_up_to(end, limited_.granularity());
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    Block& block = blocks_[index];
    block.slot = plan.slot_of[index];
    // In granules of its own where it must be in one piece.
    if (limited_.names_only()) end = round_up_to(end, limited_.granularity());
    block.home.offset = end;
    block.home.bytes = round_up_to(block.spec.bytes, kDirectUnit);
    end += block.home.bytes;
  }
  arena_bytes_ = end;
}

// Slots once more, now that it is known who streams: of blocks in turn every other may be resident,
// and those between would all have the same slot. The slots stay as they are.
void Engine::share_slots(const std::vector<std::int64_t>& order,
                         const std::vector<bool>& resident) {
  std::vector<std::int64_t> bytes;
  std::vector<bool> needs;
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    bytes.push_back(blocks_[index].spec.bytes);
    needs.push_back(!resident[index]);
  }
  if (slots_.empty() || std::find(needs.begin(), needs.end(), true) == needs.end()) return;
  const auto most = static_cast<std::int64_t>(slots_.size());
  const SlotPlan plan = colour_slots(order, bytes, needs, options_.depth, most);
  // The largest of the plan's is the largest here, and so on.
  auto by_size = [](std::size_t count, auto size) {
    std::vector<std::size_t> found(count);
    std::iota(found.begin(), found.end(), std::size_t{0});
    std::stable_sort(found.begin(), found.end(),
                     [&](std::size_t a, std::size_t b) { return size(a) > size(b); });
    return found;
  };
  const auto planned =
      by_size(plan.capacity.size(), [&](auto slot) { return plan.capacity[slot]; });
  const auto here = by_size(slots_.size(), [&](auto slot) { return slots_[slot].bytes; });
  std::vector<std::size_t> slot_here(plan.capacity.size());
  for (std::size_t at = 0; at < planned.size(); ++at) {
    if (plan.capacity[planned[at]] > slots_[here[at]].bytes) return;
    slot_here[planned[at]] = here[at];
  }
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    if (!needs[index]) continue;
    const auto slot = static_cast<std::size_t>(plan.slot_of[index]);
    blocks_[index].slot = static_cast<std::int64_t>(slot_here[slot]);
  }
}

void Engine::find_ring(const std::vector<std::int64_t>& order) {
  std::vector<bool> seen(blocks_.size(), false);
  auto append = [&](std::size_t block) {
    if (seen[block]) return;
    seen[block] = true;
    ring_.push_back(block);
  };
  for (std::int64_t block : order) append(static_cast<std::size_t>(block));
  for (std::size_t block = 0; block < blocks_.size(); ++block) append(block);
}

// Bytes of one half of a thread's staging memory, 0 if all goes straight to its place.
std::int64_t Engine::staging_half() const {
  const bool addressable = backend_->host_addressable();
  for (const Block& block : blocks_) {
    for (const Piece& piece : block.pieces) {
      if (piece.by_lane || (addressable && piece.in_place)) continue;
      const std::int64_t half = addressable ? std::min(options_.piece, kBounce) : options_.piece;
      // Room for the units that a piece begins and ends in.
      return round_up_to(half, kDirectUnit) + 2 * kDirectUnit;
    }
  }
  return 0;
}

void Engine::make_workers(std::int64_t half) {
  const bool counts = backend_->host_addressable();
  for (std::int64_t index = 0; index < options_.threads; ++index) {
    auto worker = std::make_unique<Worker>();
    worker->index = index;
    worker->lane = backend_->make_lane();
    worker->half = half;
    worker->staging =
        Allocation(counts ? static_cast<Memory&>(limited_) : backend_->staging(), 2 * half);
    for (auto& event : worker->copied) event = backend_->make_event();
    workers_.push_back(std::move(worker));
  }
}

// Bytes that the limit counts if these blocks are resident and the others have slots.
std::int64_t Engine::cost(const std::vector<bool>& resident) const {
  const std::int64_t granule = limited_.granularity();
  const bool streams = std::find(resident.begin(), resident.end(), false) != resident.end();
  std::int64_t sum = staging_bytes_ + (streams || slots_committed_ ? slots_bytes_ : 0);
  std::int64_t counted = 0;  // end of the granules counted so far; homes lie in this order
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    const Place& home = blocks_[index].home;
    if (!resident[index] || home.bytes == 0) continue;
    const std::int64_t first = std::max(counted, round_down_to(home.offset, granule));
    counted = round_up_to(home.offset + home.bytes, granule);
    sum += counted - first;
  }
  return sum;
}

std::int64_t Engine::least() const {
  std::vector<bool> all(blocks_.size(), true);
  std::vector<bool> must(blocks_.size());
  bool may_stay = true;
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    must[index] = blocks_[index].spec.residence == Residence::resident;
    may_stay = may_stay && blocks_[index].spec.residence != Residence::streamed;
  }
  // A model of a few blocks may be smaller than the slots that it would take turns in.
  return may_stay && !slots_committed_ ? std::min(cost(all), cost(must)) : cost(must);
}

std::vector<bool> Engine::residents_for(std::int64_t limit) const {
  std::vector<bool> resident(blocks_.size());
  std::vector<std::size_t> free;  // in call order
  std::vector<std::int64_t> bytes;
  bool all_may = true;
  for (std::size_t index : ring_) {
    const Residence residence = blocks_[index].spec.residence;
    resident[index] = residence == Residence::resident;
    all_may = all_may && residence != Residence::streamed;
    if (residence == Residence::automatic) {
      free.push_back(index);
      bytes.push_back(blocks_[index].home.bytes);
    }
  }
  if (all_may) {
    std::vector<bool> all(blocks_.size(), true);
    if (cost(all) <= limit) return all;
  }
  const std::int64_t must = cost(resident);
  if (must > limit) {
    throw BudgetError("the limit of " + std::to_string(limit) +
                          " bytes is too small: slots, staging and blocks that must stay take " +
                          std::to_string(least()),
                      least());
  }
  const std::vector<bool> stays = spread_residents(bytes, limit - must);
  for (std::size_t at = 0; at < free.size(); ++at) resident[free[at]] = stays[at];
  // Homes may share their first and last granules with nobody: a few bytes more than the sum.
  for (std::size_t at = free.size(); at-- > 0 && cost(resident) > limit;) {
    resident[free[at]] = false;
  }
  return resident;
}

std::vector<bool> Engine::residents_now() const {
  std::vector<bool> resident(blocks_.size());
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    resident[index] = blocks_[index].resident;
  }
  return resident;
}

// Calls from the block at this place of the ring to the nearest that is resident or not.
std::int64_t Engine::distance(std::size_t place, const std::vector<bool>& resident, bool to) const {
  const std::size_t count = ring_.size();
  for (std::size_t steps = 1; steps < count; ++steps) {
    if (resident[ring_[(place + steps) % count]] == to ||
        resident[ring_[(place + count - steps) % count]] == to) {
      return static_cast<std::int64_t>(steps);
    }
  }
  return static_cast<std::int64_t>(count);
}

void Engine::set_limit(std::int64_t limit) {
  if (limit < least()) {
    throw BudgetError("the limit of " + std::to_string(limit) +
                          " bytes is too small: slots, staging and blocks that must stay take " +
                          std::to_string(least()),
                      least());
  }
  // One block at a time, the one that is farthest from its like, so that what streams stays spread
  // evenly and no more is moved than the limit asks for.
  std::vector<bool> resident = residents_now();
  auto farthest = [&](bool leaves) {
    std::size_t best = blocks_.size();
    std::int64_t best_distance = -1;
    for (std::size_t place = 0; place < ring_.size(); ++place) {
      const std::size_t index = ring_[place];
      if (resident[index] != leaves || blocks_[index].spec.residence != Residence::automatic) {
        continue;
      }
      const std::int64_t far = distance(place, resident, !leaves);
      if (far <= best_distance) continue;
      if (!leaves) {
        resident[index] = true;
        const bool fits = cost(resident) <= limit;
        resident[index] = false;
        if (!fits) continue;
      }
      best = index;
      best_distance = far;
    }
    return best;
  };
  while (cost(resident) > limit) {
    const std::size_t leaver = farthest(true);
    if (leaver == blocks_.size()) break;  // only if least() is that of all blocks, at rest
    resident[leaver] = false;
  }
  for (std::size_t joiner = farthest(false); joiner < blocks_.size(); joiner = farthest(false)) {
    resident[joiner] = true;
  }
  stats_.limit = limit;
  limited_.set_limit(limit);
  apply(resident);
}

void Engine::apply(const std::vector<bool>& resident) {
  for (std::size_t index = 0; index < blocks_.size(); ++index) {
    Block& block = blocks_[index];
    if (block.resident == resident[index]) continue;
    block.resident = resident[index];
    if (block.resident) {
      ++stats_.regrown;
      continue;
    }
    ++stats_.given_up;
    // A block that is leased or waited for goes when it is released.
    if (block.place == &block.home && rank(block.home) != Rank::held) vacate(block.home);
  }
  notify();
}

}  // namespace vramkit
