// Schemas of all operators, in one place. Implementations: ops.cpp (CPU), and
// python/vramkit/_operators.py for those that allocate or call torch's own products.
//
// A stored weight is passed as its parts (codes, scales, extra), the codebook's table, and `spec`:
// [family, bits, grain, block, scale type, encoder, zero point], the fields of vramkit::Format.
#pragma once

namespace vramkit::ops {

inline constexpr const char* kSchemas[] = {
    // Public: functional, checked in Python, differentiable where that makes sense.
    "quantize(Tensor x, Tensor? table, int[] spec) -> (Tensor, Tensor, Tensor)",
    "dequantize(Tensor codes, Tensor scales, Tensor? extra, Tensor? table, int[] spec, "
    "int[] shape, ScalarType dtype) -> Tensor",
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, Tensor? bias, "
    "int[] spec, int out_features) -> Tensor",
    "embedding(Tensor indices, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "int[] spec, int[] shape, ScalarType dtype) -> Tensor",
    // Kernels: write into what the caller allocated.
    "_quantize_out(Tensor x, Tensor? table, int[] spec, Tensor(a!) codes, Tensor(b!) scales, "
    "Tensor(c!) extra) -> ()",
    "_dequantize_out(Tensor codes, Tensor scales, Tensor? extra, Tensor? table, int[] spec, "
    "int rows, int cols, int first_row, Tensor(a!) out) -> ()",
    "_linear_out(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "Tensor? bias, int[] spec, Tensor(a!) out) -> ()",
    "_embedding_out(Tensor indices, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "int[] spec, int rows, Tensor(a!) out) -> ()",
    // Rounding with feedback (cpu::Feedback): codes of x anew, on the scales that are there.
    "_feedback_out(Tensor x, Tensor coefficients, Tensor order, Tensor scales, Tensor? extra, "
    "Tensor? table, int[] spec, bool resume, Tensor(a!) codes) -> ()",
    // [sum of squared differences between x and the stored weight, sum of squares of x], float64;
    // columns weighted by `importance` where given.
    "_squared_error(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "Tensor? importance, int[] spec) -> Tensor",
};

}  // namespace vramkit::ops
