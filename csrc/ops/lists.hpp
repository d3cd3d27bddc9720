// Lists of tensors that operators take (the schemas that begin with _multi), checked and cut into
// chunks, for the CPU and for CUDA.
//
// Elements are taken in the order of memory: every tensor is dense (its elements fill one run of
// addresses), and those that belong together have the same strides.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/multi.hpp"
#include "ops/weight.hpp"

namespace vramkit::ops {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<std::int64_t>;

struct Chunk {
  std::size_t tensor;
  std::int64_t first, count;
};

// Throws for a tensor that is not dense.
std::vector<Chunk> chunks_of(const Tensors& tensors);

void* element_of_list(const Tensor& tensor, std::int64_t element);

void check_partners(const Tensors& all, const Tensors& others, const char* name);

// The numbers of a step that its operators are given, and what it works on.
struct AdamwLists {
  const Tensors& parameters;
  const Tensors& gradients;
  const Tensors& seconds;  // or none
  double factor, lr, beta1, beta2, epsilon, weight_decay;
  const Integers& steps;
  const Integers& rows;  // of stochastic rounding, with the seed
  std::optional<std::int64_t> seed;

  void check() const;
  // Averages and squares, and for AMSGrad the largest of these (or none).
  void check_state(const Tensors& averages, const Tensors& squares, const Tensors& largest) const;
  // Codes and scales of averages, then of squares.
  void check_bytes(const Tensors* const (&lists)[4]) const;

  cpu::AdamwNumbers numbers(std::size_t tensor) const;
  cpu::Dice dice(std::size_t tensor) const;
};

}  // namespace vramkit::ops
