// Where things lie: the tensors of a block within the block, blocks within slots, and which blocks
// stay. Pure functions of sizes and orders, decided once before anything moves.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace vramkit {

// Direct reads move whole units of this many bytes, and blocks begin at multiples of it.
inline constexpr std::int64_t kDirectUnit = 4096;
// What is packed without regard to a file begins at multiples of this: no element is larger.
inline constexpr std::int64_t kPackUnit = 64;

// A run of bytes that a block takes from a source.
struct Extent {
  std::int64_t source = 0;         // index of the source
  std::int64_t source_offset = 0;  // where the run lies there
  std::int64_t block_offset = 0;   // where it goes in the block
  std::int64_t bytes = 0;
};

// One tensor's bytes in a source, and what its first byte's address must be a multiple of.
struct SourceRange {
  std::int64_t source = 0;
  std::int64_t offset = 0;
  std::int64_t bytes = 0;
  std::int64_t alignment = 1;
};

struct BlockLayout {
  std::int64_t bytes = 0;            // of the block, a multiple of kDirectUnit
  std::vector<Extent> extents;       // by block offset, disjoint
  std::vector<std::int64_t> places;  // block offset of each range, in the order given
  std::int64_t padding = 0;          // bytes of the block that no range has
  bool direct = true;                // every extent lies as direct reads need it
};

// A block that is read straight from files: each run of neighbouring ranges keeps its offset modulo
// kDirectUnit, so that whole units can be read into place. A range whose alignment its offset in
// the file breaks is packed by itself instead and read through a buffer (direct is then false).
// Throws InvalidArgument for negative sizes and alignments that are no powers of two up to 64.
BlockLayout layout_in_place(std::span<const SourceRange> ranges);
// A block whose ranges follow one another at multiples of kPackUnit: for memory and for block
// files.
BlockLayout layout_packed(std::span<const SourceRange> ranges);

struct SlotPlan {
  std::vector<std::int64_t> slot_of;   // by block, -1 for a block that needs none
  std::vector<std::int64_t> capacity;  // by slot, a multiple of kDirectUnit
  std::int64_t conflicts = 0;  // neighbours that share a slot: each costs a wait per pass, no more
};

// Slots by colouring the call order (blocks by number, repeats allowed, its end followed by its
// beginning): blocks at most `depth` calls apart get different slots where `most` slots allow it,
// and each slot is as large as its largest block. needs[b]: whether block b is ever streamed.
SlotPlan colour_slots(std::span<const std::int64_t> order, std::span<const std::int64_t> bytes,
                      const std::vector<bool>& needs, std::int64_t depth, std::int64_t most);

// Which of the blocks (in call order) stay within `budget` bytes: as many bytes as fit, spread
// evenly, so that every streamed block has arithmetic of residents to hide behind.
std::vector<bool> spread_residents(std::span<const std::int64_t> bytes, std::int64_t budget);

}  // namespace vramkit
