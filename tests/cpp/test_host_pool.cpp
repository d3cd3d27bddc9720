// The pool's pieces: apart from each other, whole again once they are back, within the limit.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "core/error.hpp"
#include "core/host_pool.hpp"
#include "core/platform/memory.hpp"

namespace vramkit {
namespace {

constexpr std::int64_t kPage = HostPool::kLargePage;

TEST(HostPool, PiecesAreAlignedWritableAndApart) {
  HostPool pool;
  std::map<std::uint8_t*, std::int64_t> pieces;
  for (const std::int64_t bytes : {std::int64_t{1}, std::int64_t{63}, std::int64_t{64},
                                   std::int64_t{65}, kPage - 1, kPage, kPage + 1, 3 * kPage}) {
    auto* piece = static_cast<std::uint8_t*>(pool.take(bytes));
    ASSERT_NE(piece, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece) % HostPool::kAlignment, 0);
    std::memset(piece, static_cast<int>(pieces.size()) + 1, static_cast<std::size_t>(bytes));
    pieces[piece] = bytes;
  }
  std::uint8_t* end = nullptr;
  for (const auto& [start, bytes] : pieces) {
    EXPECT_GE(start, end);
    end = start + bytes;
    for (std::int64_t i = 1; i < bytes; ++i) ASSERT_EQ(start[i], start[0]);
  }
}

TEST(HostPool, WhatCameBackIsLentAgainWithoutTheSystem) {
  HostPool pool;
  std::vector<void*> pieces;
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 50; ++i) pieces.push_back(pool.take(10'000 + 777 * i));
    for (void* piece : pieces) pool.give(piece);
    pieces.clear();
    EXPECT_EQ(pool.stats().used, 0);
  }
  const auto stats = pool.stats();
  EXPECT_EQ(stats.lent, 200);
  EXPECT_EQ(stats.lent - stats.reused, stats.segments);  // each grew the pool in its first round
  EXPECT_LE(stats.segments, 3);
  EXPECT_GE(stats.peak_used, 50 * 10'000);
}

TEST(HostPool, FreeNeighboursAreOneRange) {
  HostPool pool(kPage);
  std::vector<void*> pieces;
  while (void* piece = pool.take(kPage / 16)) pieces.push_back(piece);
  ASSERT_EQ(pieces.size(), 16u);
  for (const int i : {3, 5, 4, 0, 15, 1, 2, 14, 6, 8, 7, 10, 9, 12, 13, 11}) {
    pool.give(pieces[static_cast<std::size_t>(i)]);
  }
  void* whole = pool.take(kPage);
  EXPECT_NE(whole, nullptr);
  EXPECT_EQ(pool.take(1), nullptr);
  pool.give(whole);
  EXPECT_EQ(pool.stats().held, kPage);
}

TEST(HostPool, TheLimitHoldsAndNothingChangesWhenItRefuses) {
  HostPool pool(3 * kPage + 17);  // only whole pages count
  void* first = pool.take(2 * kPage);
  ASSERT_NE(first, nullptr);
  EXPECT_EQ(pool.take(kPage + 1), nullptr);
  const auto stats = pool.stats();
  EXPECT_EQ(stats.used, 2 * kPage);
  EXPECT_EQ(stats.held, 2 * kPage);
  void* second = pool.take(kPage);
  EXPECT_NE(second, nullptr);
  EXPECT_LE(pool.stats().held, 3 * kPage);
  pool.give(first);
  pool.give(second);
}

TEST(HostPool, TrimReturnsWhatIsWhollyFree) {
  HostPool pool;
  void* first = pool.take(kPage);
  void* second = pool.take(kPage);
  pool.give(first);
  EXPECT_EQ(pool.trim(), kPage);
  EXPECT_EQ(pool.stats().held, kPage);
  EXPECT_EQ(pool.trim(), 0);
  pool.give(second);
  EXPECT_EQ(pool.trim(), kPage);
  EXPECT_EQ(pool.stats().held, 0);
  EXPECT_EQ(pool.stats().segments, 0);
  void* again = pool.take(100);
  EXPECT_NE(again, nullptr);
  pool.give(again);
}

TEST(HostPool, BadArgumentsAreRefused) {
  EXPECT_THROW(HostPool(kPage - 1), InvalidArgument);
  HostPool pool;
  EXPECT_THROW(pool.take(0), InvalidArgument);
  EXPECT_THROW(pool.take(-1), InvalidArgument);
  int other = 0;
  EXPECT_THROW(pool.give(&other), InvalidArgument);
  void* piece = pool.take(1);
  pool.give(piece);
  EXPECT_THROW(pool.give(piece), InvalidArgument);
}

TEST(HostPool, ManyThreadsShareOne) {
  HostPool pool;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&pool, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      std::vector<std::pair<std::uint8_t*, std::size_t>> mine;
      for (int step = 0; step < 400; ++step) {
        if (mine.size() < 10 && random() % 2 == 0) {
          const std::size_t bytes = 1 + random() % 50'000;
          auto* piece = static_cast<std::uint8_t*>(pool.take(static_cast<std::int64_t>(bytes)));
          std::memset(piece, t + 1, bytes);
          mine.emplace_back(piece, bytes);
        } else if (!mine.empty()) {
          const auto [piece, bytes] = mine.back();
          mine.pop_back();
          for (std::size_t i = 0; i < bytes; ++i) ASSERT_EQ(piece[i], t + 1);
          pool.give(piece);
        }
      }
      for (const auto& [piece, bytes] : mine) pool.give(piece);
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(pool.stats().used, 0);
  const std::int64_t held = pool.stats().held;
  EXPECT_EQ(pool.trim(), held);
}

TEST(LargePages, AdviceNeverReachesBeyondTheMemory) {
  std::vector<char> some(5'000'000, 'x');
  advise_large_pages(some.data(), static_cast<std::int64_t>(some.size()));
  advise_large_pages(some.data(), 0);
  advise_large_pages(some.data() + 1, 100);
  for (const char c : some) ASSERT_EQ(c, 'x');
}

}  // namespace
}  // namespace vramkit
