// Pages of memory from the operating system, large where it gives them.
#pragma once
#include <cstdint>

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

}  // namespace vramkit
