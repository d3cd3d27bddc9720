// A steady pass allocates nothing: counted by replacing the operators that all C++ allocations go
// through. Sanitizers replace them too, so this is left out of their builds.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "engine_cases.hpp"

namespace {
std::atomic<std::int64_t> allocations{0};
}

// Not inlined: the compiler would see malloc() where it expects operator new.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* found = std::malloc(bytes == 0 ? 1 : bytes)) return found;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* gone) noexcept { std::free(gone); }
[[gnu::noinline]] void operator delete(void* gone, std::size_t) noexcept { std::free(gone); }

namespace vramkit::testing {
namespace {

class EngineSteady : public EngineTest {};

TEST_F(EngineSteady, NothingIsAllocated) {
  for (const bool resident : {false, true}) {
    contents_.clear();
    EngineConfig c = config(9, 5 * kBlock);
    c.sources = {std::make_shared<FileSource>(file_)};
    c.options.poison = false;
    c.options.timeline = 20;
    for (BlockSpec& block : c.blocks) {
      block.residence = resident ? Residence::automatic : Residence::streamed;
    }
    Engine engine(std::move(c));
    const auto pass = [&] {
      for (std::int64_t block = 0; block < engine.blocks(); ++block) {
        engine.acquire(block);
        engine.release(block);
      }
    };
    pass(), pass();
    settle(engine);
    const std::int64_t before = allocations, copied = engine.stats().bytes_copied;
    for (int round = 0; round < 20; ++round) pass();
    EXPECT_EQ(allocations - before, 0);
    EXPECT_GT(engine.stats().bytes_copied, copied);
    EXPECT_EQ(engine.stats().slots, 3);
  }
}

}  // namespace
}  // namespace vramkit::testing
#endif
