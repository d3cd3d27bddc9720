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

}  // namespace vramkit
