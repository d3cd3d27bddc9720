// Schemas of all operators, in one place. Implementations: ops.cpp, blockwise.cpp, conv.cpp,
// int8.cpp, multi.cpp, recurrent.cpp, stochastic.cpp (CPU), csrc/cuda/ops (CUDA), and
// python/vramkit/_operators.py for those that allocate or call torch's own products.
//
// A stored weight is passed as its parts (codes, scales, extra), the codebook's table, and `spec`:
// [family, bits, grain, block, scale type, encoder, zero point], the fields of vramkit::Format.
#pragma once

namespace vramkit::ops {

inline constexpr const char* kSchemas[] = {
    // Public: functional, checked in Python, differentiable where that makes sense.
    "quantize(Tensor x, Tensor? table, int[] spec) -> (Tensor, Tensor, Tensor)",
    // The same, rounding up or down at random (core/stochastic.hpp).
    "quantize_stochastic(Tensor x, Tensor? table, int[] spec, int seed) "
    "-> (Tensor, Tensor, Tensor)",
    "dequantize(Tensor codes, Tensor scales, Tensor? extra, Tensor? table, int[] spec, "
    "int[] shape, ScalarType dtype) -> Tensor",
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, Tensor? bias, "
    "int[] spec, int out_features) -> Tensor",
    "embedding(Tensor indices, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "int[] spec, int[] shape, ScalarType dtype) -> Tensor",
    // Dynamic INT8 and LLM.int8 (_operators_int8.py): scales are the bits of float32, one a row.
    "linear_int8(Tensor x, Tensor codes, Tensor scales, Tensor? bias, float threshold, "
    "str activation, int out_features) -> Tensor",
    "quantize_rows(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)",
    "int8_mm(Tensor a, Tensor b) -> Tensor",
    // One direction of one recurrent layer (_recurrent.py): x [steps * batch, features] or, with
    // the
    // sizes of its steps, packed; [out, h, c], all float32, c empty but of an LSTM.
    "recurrent_int8(Tensor x, int[]? steps, Tensor h, Tensor? c, Tensor ih_codes, "
    "Tensor ih_scales, Tensor hh_codes, Tensor hh_scales, Tensor? hr_codes, Tensor? hr_scales, "
    "Tensor? ih_bias, Tensor? hh_bias, str mode, float threshold, bool reverse) "
    "-> (Tensor, Tensor, Tensor)",
    // Rows [first, first + count) of a weight seen as [rows, cols].
    "dequantize_rows(Tensor codes, Tensor scales, Tensor? extra, Tensor? table, int[] spec, "
    "SymInt rows, SymInt cols, SymInt first, SymInt count, ScalarType dtype) -> Tensor",
    // x: [batch, channels, …]; `shape`: the weight's, as torch's convolutions have it.
    "conv(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, Tensor? bias, "
    "int[] spec, int[] shape, int[] stride, SymInt[] padding, int[] dilation, bool transposed, "
    "SymInt[] output_padding, int groups) -> Tensor",
    // Kernels: write into what the caller allocated.
    "_quantize_out(Tensor x, Tensor? table, int[] spec, Tensor(a!) codes, Tensor(b!) scales, "
    "Tensor(c!) extra) -> ()",
    "_quantize_stochastic_out(Tensor x, Tensor? table, int[] spec, int seed, Tensor(a!) codes, "
    "Tensor(b!) scales) -> ()",
    "_dequantize_out(Tensor codes, Tensor scales, Tensor? extra, Tensor? table, int[] spec, "
    "int rows, int cols, int first_row, Tensor(a!) out) -> ()",
    // `conv` where its weight is decoded whole, in x's dtype; no derivative.
    "_conv_whole(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "Tensor? bias, int[] spec, int[] shape, int[] stride, int[] padding, int[] dilation, "
    "bool transposed, int[] output_padding, int groups) -> Tensor",
    // The same rows as [taps, channels] of [channels, taps]: out is [rows, taps, channels].
    "_dequantize_taps_out(Tensor codes, Tensor scales, Tensor? extra, Tensor? table, int[] spec, "
    "int rows, int cols, int first_row, Tensor(a!) out) -> ()",
    "_linear_out(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "Tensor? bias, int[] spec, Tensor(a!) out) -> ()",
    // CUDA alone, rows of a few to a hundred: `shape` is [kernel, warps of a block, splits of the
    // columns]; python/vramkit/_routes.py chooses it and sizes the workspace.
    "_linear_packed_out(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "Tensor? bias, int[] spec, int[] shape, Tensor(a!) workspace, Tensor(b!) out) -> ()",
    "_panel_product_out(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "int[] spec, Tensor(a!) workspace, Tensor(b!) out) -> ()",
    "_embedding_out(Tensor indices, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "int[] spec, int rows, Tensor(a!) out) -> ()",
    "_linear_int8_out(Tensor x, Tensor codes, Tensor scales, Tensor? bias, float threshold, "
    "int activation, Tensor(a!) workspace, Tensor(b!) out) -> ()",
    "_quantize_rows_out(Tensor x, float threshold, Tensor(a!) codes, Tensor(b!) absmax, "
    "Tensor(c!) columns) -> ()",
    "_recurrent_int8_out(Tensor x, Tensor? steps, Tensor ih_codes, Tensor ih_scales, "
    "Tensor hh_codes, Tensor hh_scales, Tensor? hr_codes, Tensor? hr_scales, Tensor? ih_bias, "
    "Tensor? hh_bias, int mode, float threshold, bool reverse, Tensor(a!) h, Tensor(b!) c, "
    "Tensor(c!) workspace, Tensor(d!) out) -> ()",
    "_int8_mm_out(Tensor a, Tensor b, Tensor(a!) out) -> ()",
    // The same in two parts, for torch's own product of the codes between them: rows of x to codes
    // (and what else a workspace of _linear_int8_out holds); sums, of rows from `first` on, to out.
    "_round_int8_out(Tensor x, float threshold, Tensor(a!) workspace) -> ()",
    "_scale_int8_out(Tensor sums, Tensor x, int first, Tensor codes, Tensor scales, Tensor? bias, "
    "float threshold, int activation, Tensor workspace, Tensor(a!) out) -> ()",
    // The steps of _recurrent_int8_out, with what x gives for the gates at hand.
    "_recurrent_int8_steps_out(Tensor from_x, Tensor? steps, Tensor hh_codes, Tensor hh_scales, "
    "Tensor? hr_codes, Tensor? hr_scales, Tensor? hh_bias, int mode, float threshold, "
    "bool reverse, Tensor(a!) h, Tensor(b!) c, Tensor(c!) workspace, Tensor(d!) out) -> ()",
    // Blocks of 8-bit codes: how many of `bounds` (255, ascending) lie below x / absmax; blocks
    // of zeros have code 0.
    "_quantize_bounds_out(Tensor x, Tensor bounds, int block, Tensor(a!) codes, Tensor(b!) absmax) "
    "-> ()",
    // Rounding with feedback (cpu::Feedback): codes of x anew, on the scales that are there.
    "_feedback_out(Tensor x, Tensor coefficients, Tensor order, Tensor scales, Tensor? extra, "
    "Tensor? table, int[] spec, bool resume, Tensor(a!) codes) -> ()",
    // [sum of squared differences between x and the stored weight, sum of squares of x], float64;
    // columns weighted by `importance` where given.
    "_squared_error(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor? table, "
    "Tensor? importance, int[] spec) -> Tensor",
    // Over lists of dense tensors, each with its partner's strides (multi.cpp). The sum of all
    // squares, float64: infinite or NaN if and only if an element is.
    "_multi_square_sum(Tensor[] tensors) -> Tensor",
    "_multi_scale_(Tensor(a!)[] tensors, float factor) -> ()",
    // With a seed, 16-bit targets are rounded at random: tensor t has row t's words.
    "_multi_cast_out(Tensor[] sources, Tensor(a!)[] targets, int? seed) -> ()",
    // cpu::AdamwStep. `largest`: empty, or AMSGrad's. `seconds`, empty or one per parameter: copies
    // of float32 parameters, or the other halves of 16-bit ones. `steps`: each one's number, from
    // 1. With a seed, 16-bit parameters without a second are rounded at random, by `rows`' words.
    "_multi_adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] averages, "
    "Tensor(c!)[] squares, Tensor(d!)[] largest, Tensor(e!)[] seconds, float factor, float lr, "
    "float beta1, float beta2, float epsilon, float weight_decay, int[] steps, int[] rows, "
    "int? seed) -> ()",
    // The same with state in 8 bits: codes, and a float32 scale per 256 elements.
    "_multi_adamw8_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] average_codes, "
    "Tensor(c!)[] average_scales, Tensor(d!)[] square_codes, Tensor(e!)[] square_scales, "
    "Tensor(f!)[] seconds, float factor, float lr, float beta1, float beta2, float epsilon, "
    "float weight_decay, int[] steps, int[] rows, int? seed) -> ()",
    // Limits of this machine: products per second of `operand`'s dtype with operands in registers,
    // on as many threads as it is long; and bytes per second of a streaming read of `buffer`.
    "_product_rate(Tensor operand) -> float",
    "_read_rate(Tensor buffer) -> float",
};

}  // namespace vramkit::ops
