// A launch's grid on the host, for bodies of CUDA kernels that are written over a Context
// (csrc/cuda/products.hpp): blocks one after the other, a block's threads as fibers that take turns
// wherever one waits, so that barriers and instructions of a whole warp mean what they mean on a
// GPU.
//
//   emulate(Grid{x, y, z, threads, shared_bytes}, [&](EmulatedContext& context) { body(context);
//   });
//
// What it is strict about:
//   - shared memory is full of NaN at first and exactly as long as asked for; vectors are aligned
//   - an asynchronous copy happens at once or only when its group is waited for, by chance: neither
//     may change the result; copies nobody waits for are errors
//   - threads take turns in an order that changes from block to block, blocks run last to first
//   - a warp's instruction that not all lanes come to, and a barrier that not all threads come to,
//     are errors
// mma follows the fragment layout that the PTX manual gives for m16n8k16; products and sums of one
// instruction are exact, then rounded to float32 once.
#pragma once
#include <gtest/gtest.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "core/half.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace vramkit::testing {

struct Grid {
  int x = 1, y = 1, z = 1;
  int threads = 32;
  int shared_bytes = 0;
};

class EmulatedBlock;

class EmulatedContext {
 public:
  EmulatedContext(EmulatedBlock& block, int thread) : block_(block), thread_(thread) {}
  EmulatedContext(const EmulatedContext&) = delete;
  EmulatedContext& operator=(const EmulatedContext&) = delete;

  int thread() const { return thread_; }
  inline int threads() const;
  inline int block_x() const;
  inline int block_y() const;
  inline int block_z() const;
  inline std::uint8_t* shared() const;
  inline void sync() const;
  static void pin(const std::uint8_t*&) {}
  template <int N>
  void load_once(const std::uint8_t* from, std::uint32_t* to) const {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(from) % N, 0u) << "a vector load's address";
    std::memcpy(to, from, N);
  }
  template <int N>
  void load_often(const std::uint8_t* from, std::uint32_t* to) const {
    load_once<N>(from, to);
  }
  inline void copy_async(std::uint8_t* to, const std::uint8_t* from, int bytes) const;
  void commit() const { groups_.emplace_back(); }
  template <int N>
  void wait() const {
    while (groups_.size() > N + 1) finish_oldest();
  }
  template <bool kHalf>
  inline void mma(float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                  std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) const;

  bool has_copies() const {
    for (const auto& group : groups_) {
      if (!group.empty()) return true;
    }
    return false;
  }

 private:
  struct Copy {
    std::uint8_t* to;
    const std::uint8_t* from;
    int bytes;
  };
  static void perform(const Copy& copy) {
    std::uint8_t all[16] = {};
    if (copy.bytes > 0) std::memcpy(all, copy.from, static_cast<std::size_t>(copy.bytes));
    std::memcpy(copy.to, all, 16);
  }
  void finish_oldest() const {
    for (const Copy& copy : groups_.front()) perform(copy);
    groups_.pop_front();
  }

  EmulatedBlock& block_;
  int thread_;
  // The last is still open.
  mutable std::deque<std::vector<Copy>> groups_{1};
};

// One block; its threads' stacks are kept for the next one.
class EmulatedBlock {
 public:
  using Body = std::function<void(EmulatedContext&)>;

  EmulatedBlock(const Grid& grid, const Body& body) : grid_(grid), body_(body) {
    for (int i = 0; i < grid.threads; ++i) fibers_.push_back(std::make_unique<Fiber>());
    // Exactly as long as asked for, so that sanitizers see what lies past its end.
    shared_.reset(static_cast<std::uint8_t*>(
        ::operator new (static_cast<std::size_t>(grid.shared_bytes > 0 ? grid.shared_bytes : 1),
                        std::align_val_t{16})));
  }

  void run(int x, int y, int z) {
    x_ = x, y_ = y, z_ = z;
    std::memset(shared_.get(), 0xFF, static_cast<std::size_t>(grid_.shared_bytes));
    arrived_ = 0;
    warps_.assign(static_cast<std::size_t>(grid_.threads + 31) / 32, Warp{});
    for (int i = 0; i < grid_.threads; ++i) start(i);
    const auto count = static_cast<std::size_t>(grid_.threads);
    const std::size_t shift = random_() % count;
    const bool backwards = random_() % 2 != 0;
    std::size_t left = count;
    while (left > 0) {
      const std::uint64_t before = events_;
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t at = (shift + (backwards ? count - 1 - i : i)) % count;
        if (fibers_[at]->done) continue;
        current_ = at;
        enter(*fibers_[at]);
        if (fibers_[at]->done) --left;
      }
      if (events_ == before) {
        ADD_FAILURE() << "threads wait for others that do not come: block " << x << ' ' << y << ' '
                      << z;
        std::abort();  // their stacks cannot be left behind
      }
    }
  }

 private:
  friend class EmulatedContext;
  static constexpr std::size_t kStack = 256 << 10;

  struct Fiber {
    // Not zeroed: most of it is never touched.
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t context{};
    bool done = true;
    void* fake_stack = nullptr;
  };
  struct Warp {
    int arrived = 0;
    std::uint64_t generation = 0;
    int kind = -1;
    std::array<std::array<std::uint32_t, 6>, 32> operands{};
    std::array<std::array<float, 4>, 32> sums{};
  };
  struct Free {
    void operator()(std::uint8_t* memory) const {
      ::operator delete (memory, std::align_val_t{16});
    }
  };

  void start(int index) {
    Fiber& fiber = *fibers_[static_cast<std::size_t>(index)];
    fiber.done = false;
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    // makecontext passes ints alone.
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&EmulatedBlock::entry), 3,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self), index);
  }

  static void entry(unsigned high, unsigned low, int index) {
    auto* const block = reinterpret_cast<EmulatedBlock*>(static_cast<std::uintptr_t>(high) << 32 |
                                                         static_cast<std::uintptr_t>(low));
    Fiber& fiber = *block->fibers_[static_cast<std::size_t>(index)];
    block->arrive(fiber);
    {
      EmulatedContext context(*block, index);
      block->body_(context);
      EXPECT_FALSE(context.has_copies()) << "copies that nobody waited for";
    }
    fiber.done = true;
    ++block->events_;
    block->leave(fiber, true);
  }

  // From the scheduler to a fiber, and back.
  void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(&scheduler_, &fiber.context);
#endif
  }
  void arrive([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &bottom_, &size_);
#endif
  }
  void leave(Fiber& fiber, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, bottom_, size_);
#endif
    swapcontext(&fiber.context, &scheduler_);
    arrive(fiber);
  }
  void yield() { leave(*fibers_[current_], false); }

  void sync() {
    ++events_;
    const std::uint64_t mine = generation_;
    if (++arrived_ == grid_.threads) {
      arrived_ = 0;
      ++generation_;
      return;
    }
    while (generation_ == mine) yield();
  }

  void mma(int thread, bool half, float (&sum)[4], const std::array<std::uint32_t, 6>& operands) {
    ++events_;
    Warp& warp = warps_[static_cast<std::size_t>(thread) / 32];
    const auto lane = static_cast<std::size_t>(thread) % 32;
    const int kind = half ? 1 : 0;
    if (warp.arrived == 0) warp.kind = kind;
    EXPECT_EQ(warp.kind, kind) << "lanes of a warp at different instructions";
    warp.operands[lane] = operands;
    std::copy(sum, sum + 4, warp.sums[lane].begin());
    const std::uint64_t mine = warp.generation;
    if (++warp.arrived == 32) {
      multiply(warp, half);
      warp.arrived = 0;
      ++warp.generation;
    } else {
      while (warp.generation == mine) yield();
    }
    std::copy(warp.sums[lane].begin(), warp.sums[lane].end(), sum);
  }

  static void multiply(Warp& warp, bool half) {
    const auto widen = [&](std::uint32_t word, int which) {
      const auto bits = static_cast<std::uint16_t>(word >> (16 * which));
      return static_cast<double>(half ? fp16_to_float(bits) : bf16_to_float(bits));
    };
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, in_group = lane % 4;
      const auto& operand = warp.operands[static_cast<std::size_t>(lane)];
      for (int i = 0; i < 8; ++i) {  // element a_i: register i / 2, half i % 2
        const int row = group + (i / 2 % 2 == 0 ? 0 : 8);
        const int col = in_group * 2 + i % 2 + (i < 4 ? 0 : 8);
        a[row][col] = widen(operand[static_cast<std::size_t>(i / 2)], i % 2);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = in_group * 2 + i % 2 + (i < 2 ? 0 : 8);
        b[row][group] = widen(operand[static_cast<std::size_t>(4 + i / 2)], i % 2);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), col = lane % 4 * 2 + i % 2;
        float& sum = warp.sums[static_cast<std::size_t>(lane)][static_cast<std::size_t>(i)];
        double exact = sum;
        for (int k = 0; k < 16; ++k) exact += a[row][k] * b[k][col];
        sum = static_cast<float>(exact);
      }
    }
  }

  Grid grid_;
  const Body& body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::unique_ptr<std::uint8_t, Free> shared_;
  ucontext_t scheduler_{};
  const void* bottom_ = nullptr;
  std::size_t size_ = 0;
  std::size_t current_ = 0;
  int x_ = 0, y_ = 0, z_ = 0;
  int arrived_ = 0;
  std::uint64_t generation_ = 0, events_ = 0;
  std::vector<Warp> warps_;
  std::mt19937 random_{5};
};

int EmulatedContext::threads() const { return block_.grid_.threads; }
int EmulatedContext::block_x() const { return block_.x_; }
int EmulatedContext::block_y() const { return block_.y_; }
int EmulatedContext::block_z() const { return block_.z_; }
std::uint8_t* EmulatedContext::shared() const { return block_.shared_.get(); }
void EmulatedContext::sync() const { block_.sync(); }

void EmulatedContext::copy_async(std::uint8_t* to, const std::uint8_t* from, int bytes) const {
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(to) % 16, 0u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(from) % 16, 0u);
  if (block_.random_() % 2 == 0) {
    perform({to, from, bytes});
  } else {
    groups_.back().push_back({to, from, bytes});
  }
}

template <bool kHalf>
void EmulatedContext::mma(float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                          std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) const {
  block_.mma(thread_, kHalf, sum, {a0, a1, a2, a3, b0, b1});
}

inline void emulate(const Grid& grid, const EmulatedBlock::Body& body) {
  EmulatedBlock block(grid, body);
  for (int z = grid.z - 1; z >= 0; --z) {
    for (int y = grid.y - 1; y >= 0; --y) {
      for (int x = grid.x - 1; x >= 0; --x) block.run(x, y, z);
    }
  }
}

}  // namespace vramkit::testing
