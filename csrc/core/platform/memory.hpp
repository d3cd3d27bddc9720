// Pages of memory from the operating system, large where it gives them.
#pragma once
#include <cstdint>
#include <optional>

#include "core/platform/file.hpp"

namespace vramkit {

// `bytes` (a multiple of 2 MiB) of zeroed memory, aligned to 2 MiB, every page of it touched. Null
// if the system refuses.
void* touched_pages(std::int64_t bytes);
void return_pages(void* start, std::int64_t bytes);

// Asks that fresh memory be backed by large pages where it covers them whole. Never more than is
// there already is used for it, and a refusal only costs time.
void advise_large_pages(void* start, std::int64_t bytes);

// An address range with nothing behind it: any access to it faults. `alignment` is a power of two
// of at least a page. Null if the system refuses. return_pages() gives it back, with whatever was
// committed in it.
void* reserve_pages(std::int64_t bytes, std::int64_t alignment);
// Zeroed memory behind a part of it, in large pages where they fit and the system has them. False
// if the system refuses, with nothing changed.
bool commit_pages(void* start, std::int64_t bytes);
// Touches every page of committed memory, so that it is there.
void touch_pages(void* start, std::int64_t bytes);
// The memory goes back to the system, the addresses stay reserved.
void decommit_pages(void* start, std::int64_t bytes);

// A private mapping of a part of a file, in the place of addresses that were reserved: it may be
// read and written, and no memory is set aside for what will be written. `offset` and `at` are
// multiples of a page. False if the system refuses.
bool map_private(const Descriptor& file, std::int64_t offset, std::int64_t bytes, void* at);
// Whether any page of a private mapping of a file is this process's own copy by now. Empty where
// the system does not tell.
std::optional<bool> pages_written(const void* start, std::int64_t bytes);

}  // namespace vramkit
