// Many bytes of files into memory at once, at the rate of the disk or of the page cache: what
// loading a whole checkpoint is. (The engine reads blocks one by one, ahead of need.)
//
// Runs are cut into pieces, and a few threads read them, each in the way that is fastest for it
// (source.hpp). Pieces that lie in memory as they lie in the file, modulo kDirectUnit, are read
// straight into place; others past the page cache go through a buffer of their thread's own.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "core/engine/memory.hpp"
#include "core/engine/source.hpp"

namespace vramkit {

struct ReadRun {
  std::int64_t source = 0;  // index of the source
  std::int64_t offset = 0;  // where the run lies there
  std::int64_t bytes = 0;
  std::byte* dst = nullptr;
};

struct BulkReadOptions {
  std::int64_t threads = 2;
  std::int64_t piece = std::int64_t{8} << 20;  // bytes, a multiple of kDirectUnit
  // All of the units of kDirectUnit that a run touches in memory are its own to write.
  bool whole_units = false;
};

// Asked every now and then, on the calling thread, with the bytes that have arrived so far; true
// breaks the reading off.
using ReadWatch = std::function<bool(std::int64_t done)>;

// Reads all runs, or throws the first error after every thread has stopped: then what lies in the
// runs' memory is unspecified. Returns bytes by ReadPath. Throws InvalidArgument for runs that
// their source does not have; SystemError, FileChangedError, OutOfMemoryError; Interrupted; what
// `watch` throws.
std::array<std::int64_t, 4> read_runs(std::span<const std::shared_ptr<const Source>> sources,
                                      std::span<const ReadRun> runs,
                                      const BulkReadOptions& options = {},
                                      const ReadWatch& watch = {});

}  // namespace vramkit
