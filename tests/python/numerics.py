"""Tolerances of the tests, one place for all of them, each with the reason for its size."""

from __future__ import annotations

import math

import torch

# Unit roundoff: half the distance from 1 to the next number, 2^-p for a p-bit significand.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half the smallest subnormal: the error of rounding what lies below the normal range.
TINY = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


def gamma(count: float) -> float:
    """Higham's bound for `count` dependent float32 roundings: count u / (1 - count u)."""
    return count * UNIT[torch.float32] / (1 - count * UNIT[torch.float32])


def accumulation_bound(length: int) -> float:
    """Error of a float32 sum of `length` products, relative to the sum of their magnitudes.

    The order of additions is the kernel's, or torch's. Any order is within gamma(length); with
    roundings that are independent the error stays within 6 sqrt(length) u except once in 10^7
    (Higham and Mary 2019, theorem 2.4: 2 exp(-36 / 2) for each sum). The smaller one holds.
    """
    return min(gamma(length + 2), gamma(6 * math.sqrt(length) + 2))


def mean_bound(count: int, failure: float = 1e-9) -> float:
    """How far the mean of `count` independent errors lies from its expectation, at most.

    Errors lie within an interval of length 1; more happens once in 1 / `failure` times (Hoeffding
    1963, theorem 2: 2 exp(-2 count t^2)).
    """
    return math.sqrt(math.log(2 / failure) / (2 * count))


def linear_bound(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    weight_rounded: bool = False,
) -> torch.Tensor:
    """Largest |y - (x W^T + b)| of a Linear in `dtype`, elementwise, for the decoded weight W.

    Terms: the accumulation; the rounding of the weight to `dtype` where the product takes it so
    (`weight_rounded`); the product and its sum with the bias, rounded to `dtype` once each at most.
    """
    x, weight = x.double(), weight.double()
    magnitude = x.abs() @ weight.abs().t()
    product = x @ weight.t()
    total = product if bias is None else product + bias.double()
    bound = accumulation_bound(x.shape[-1]) * magnitude
    if weight_rounded:
        bound = bound + UNIT[dtype] * magnitude
    if bias is not None or dtype != torch.float32:
        # The computed product is rounded, so its own error enters the roundings too.
        bound = bound * (1 + 2 * UNIT[dtype]) + UNIT[dtype] * (product.abs() + total.abs())
    return bound + 2 * TINY[dtype]


def tensor_core_bound(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    weight_rounded: bool,
) -> torch.Tensor:
    """Like `linear_bound` for sums that tensor cores make, which cut off where others round.

    Eight products and the sum so far are aligned to the largest of the nine and cut off (Fasi and
    others 2021, "Numerical behavior of NVIDIA tensor cores"): each loses up to 2^-24 of the
    largest, so that K products lose 9/8 K units of their magnitudes' sum. Scales and parts add a
    few roundings.
    """
    x, weight = x.double(), weight.double()
    magnitude = x.abs() @ weight.abs().t()
    total = x @ weight.t()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
        total = total + bias.double()
    bound = gamma(1.125 * x.shape[-1] + 12) * magnitude
    if weight_rounded:
        bound = bound + UNIT[dtype] * magnitude
    # A result of torch's own product is rounded, and again when the bias is added.
    return bound * (1 + 2 * UNIT[dtype]) + 2 * UNIT[dtype] * total.abs() + 2 * TINY[dtype]


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """|actual - expected| <= bound, elementwise; says the worst ratio where it is not."""
    ratio = ((actual.double() - expected.double()).abs() / bound).nan_to_num(0.0)
    worst = float(ratio.max()) if ratio.numel() else 0.0
    assert worst <= 1.0, f"the error reaches {worst:.3g} times its bound"


# Two float64 sums of the same at most 10^4 terms in different orders: 2 * 10^4 * 2^-53 = 2e-12 of
# the sum of magnitudes, which in a sum of squares is the sum itself.
FLOAT64_SUM = 2e-12
# A cosine of two vectors of at most 10^3 elements: three such sums, 10^3 * 2^-53 each, and the
# roundings of their quotient.
FLOAT64_COSINE = 1e-12
# Two implementations that round the same numbers to the same steps, one of them by way of float16,
# differ by chance. Measured once, on MiniLM and 16 sentences: bitsandbytes' LLM.int8 has a relative
# L2 error of 0.0387, ours 0.0395, 2 % apart. The rest is room for other processors and versions.
SAME_ROUNDINGS = 1.05


def product_bound(
    magnitude: torch.Tensor,
    value: torch.Tensor,
    length: int,
    dtype: torch.dtype,
    *,
    exact_inputs: bool,
) -> torch.Tensor:
    """Largest error of sums of `length` products in `dtype`, elementwise.

    `magnitude` is the same sum of absolute values, `value` the exact result, bias included. Where
    the weight is rounded to `dtype` first (not `exact_inputs`), that is one unit of each product;
    the result and its sum with the bias are rounded to `dtype`.
    """
    bound = accumulation_bound(length) * magnitude
    if not exact_inputs:
        bound = bound + UNIT[dtype] * magnitude
    return bound * (1 + 2 * UNIT[dtype]) + UNIT[dtype] * (magnitude + value.abs()) + 2 * TINY[dtype]


# A recurrence of T steps in float32, against the same in another order of operations: each step
# adds a few roundings of values below one, and gates whose slope is at most 1/4 pass on less than
# they get, so that errors stay at some tens of roundings.
RECURRENCE = 64 * UNIT[torch.float32]


def nested_bound(magnitude: torch.Tensor, length: int, depth: int) -> torch.Tensor:
    """Largest error of `depth` float32 sums of `length` products, each of results of the one below.

    `magnitude` is the exact result for absolute values of everything, so that it is also what each
    sum's magnitudes come to when they are passed on: every level adds its own share of it. Products
    of two computed numbers (a square) count as one level more.
    """
    return depth * accumulation_bound(length) * magnitude.double() + 2 * TINY[torch.float32]


def size_bound(values: torch.Tensor, length: int, depth: int) -> float:
    """Like `nested_bound` where magnitudes are not at hand: from the largest of `values`.

    The terms of a sum have signs of their own, so that their magnitudes come to about sqrt(length)
    times its size.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    return depth * accumulation_bound(length) * math.sqrt(length) * largest


# bitsandbytes multiplies by 6.200124e-05 where 1 / 127^2 = 6.200012e-05 is meant.
INT8_CONSTANT = 1.9e-5
# A merged adapter is rounded to int8's steps: half a step of a row, absmax / 254, on every weight,
# against weights whose mean square is about (absmax / 3)^2. That is 1.2 % / sqrt(3) of each layer's
# output, by chance in sign; a few such layers, and outputs that are small beside the others, reach
# some percent of the largest output.
INT8_MERGED = 0.05


# A traced peak with every operator probed against the profiler's: the same events but for scalars
# of a few bytes that C++ wraps and frees outside of any operator.
PROBED_PEAK = 0.005
# By rule alone: the rules know results, reorders and packed panels, not every scratch buffer of
# oneDNN, which for small transposed convolutions makes up a tenth. (The promise, 10 % in 90 % of a
# zoo, is the suite `estimate` of the benchmarks.)
RULED_PEAK = 0.15


def squared_difference(error: float, length: int, more: float = 0.0) -> float:
    """Relative tolerance of ||a - b||^2 / ||b||^2 = `error`, a and b sums in float32.

    Each is off by accumulation_bound(length) of its size (and by `more` beside), their difference
    by twice that, and the square of the difference by twice its share of it.
    """
    return 4 * (accumulation_bound(length) + more) / math.sqrt(error)


def stack_bound(length: int, layers: int) -> float:
    """Relative error in float32 of a stack of layers that hold values to order one.

    Each adds the error of its sums (`accumulation_bound`), and carries what came before it on.
    """
    return layers * accumulation_bound(length)


def reordered(length: int, error: float) -> float:
    """Relative change of a relative L2 `error` where products of `length` are summed otherwise.

    torch's product takes another way through memory that is aligned otherwise. Both outputs, the
    one that is judged and the one it is held against, move by accumulation_bound of their size.
    """
    return 2 * accumulation_bound(length) / error


# Chatterbox's networks with random weights, relative L2. A row of weights and one of activations
# each err by absmax / 127 / sqrt(12), 0.75 % of a Gaussian row's norm (absmax is 3.3 deviations in
# a row of 1024), together 1.06 % a product. Blocks of a residual network add their errors as they
# add their outputs, so that those count which follow each other on one way: two products of a
# block, or three recurrent layers, what comes before, the head; four, independent in sign, are
# twice one. Measured over twelve seeds: 0.0127 at most.
INT8_DYNAMIC_NETWORK = 2 * 0.0106
# float16 rounds by 2^-11 at most, by 2^-11 / sqrt(3) in the mean square. Some twelve roundings
# follow each other on one way (weights, products, sums, norms, an activation, the head), and are
# independent in sign: sqrt(12 / 3) 2^-11. Measured over four seeds: 0.00069.
FP16_NETWORK = 2 * UNIT[torch.float16]

# FP8 attention against its own arithmetic in float64, relative L2. Float32 scores are off by some
# 10^-6 of themselves, so that about one weight in 10^4 rounds to the neighbouring e4m3 number, an
# eighth away at most: 0.125 / sqrt(10^4) = 1.3e-3 if all weights counted alike. Measured: 2e-4.
FP8_ATTENTION = 1.3e-3
