// A team of csrc/cuda/team.hpp on the host: all lanes run one after another, the last one first,
// and meet where a GPU's threads would.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

#include "cuda/team.hpp"

namespace vramkit::testing {

class EmulatedTeam {
 public:
  static constexpr int kLargest = 256;

  template <class T>
  class Kept {
   public:
    Kept() : values_(std::make_unique<std::array<T, kLargest>>()) {}
    T& of(int lane) { return (*values_)[static_cast<std::size_t>(lane)]; }

   private:
    std::unique_ptr<std::array<T, kLargest>> values_;
  };

  explicit EmulatedTeam(int size) : size_(size) {}
  int size() const { return size_; }

  template <class Body>
  void each(const Body& body) const {
    for (int lane = size_ - 1; lane >= 0; --lane) body(lane);
  }
  template <class Body>
  std::uint32_t largest(const Body& body) const {
    std::uint32_t most = 0;
    each([&](int lane) { most = std::max(most, body(lane)); });
    return most;
  }
  // As shuffles add: each lane and the one whose number differs in one bit, the highest first.
  template <int C, class Body>
  cuda::Sums<C> sums(const Body& body) const {
    constexpr int lanes = 16;
    std::array<cuda::Sums<C>, lanes> mine;
    each([&](int lane) { mine[static_cast<std::size_t>(lane)] = body(lane); });
    for (std::size_t step = lanes / 2; step > 0; step /= 2) {
      const auto before = mine;
      for (std::size_t lane = 0; lane < lanes; ++lane) {
        for (int c = 0; c < C; ++c) {
          mine[lane].value[c] = before[lane].value[c] + before[lane ^ step].value[c];
        }
      }
    }
    return mine[lanes - 1];
  }

 private:
  int size_;
};

}  // namespace vramkit::testing
