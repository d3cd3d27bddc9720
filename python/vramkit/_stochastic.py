"""Encoding with stochastic rounding: up or down at random, so that no error keeps its sign.

A number between two values of the format becomes the upper one with the probability of its
distance from the lower one, in steps. The mean of many roundings is the number: updates that are
smaller than half a step are not lost, and the errors of a long sum do not add up.

Random words come from Philox 4x32-10 (Salmon et al. 2011), by the element's row and column and the
seed: the same bits on the CPU and on CUDA, for any number of threads (csrc/core/stochastic.hpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._native import HAS_CUDA_OPERATORS
from ._operators import StoredParts, _part_shapes, _rows_of, encode
from .formats import (
    _ENCODER,
    _ENCODER_MIDPOINT,
    _GRAIN,
    _GRAIN_FLAT,
    StorageFormat,
)
from .host_pool import new_tensor

_ops = torch.ops.vramkit
ROUNDINGS = ("nearest", "stochastic")
_SEEDS = 1 << 64


def check_rounding(rounding: str, seed: int) -> None:
    """Raise ValueError for an unknown way of rounding or a seed that is no 64-bit number."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}, not {rounding!r}")
    if not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise ValueError(f"a seed is an integer from 0 to 2**64 - 1, not {seed!r}")


def rounds_stochastically(fmt: StorageFormat) -> bool:
    """Whether stochastic rounding is defined for a format: casts, FP8 and INT8 by row or group."""
    if fmt.family == "cast":
        return True
    spec = fmt.spec
    return fmt.bits == 8 and spec[_ENCODER] != _ENCODER_MIDPOINT and spec[_GRAIN] != _GRAIN_FLAT


def encode_rounded(
    weight: Tensor, fmt: StorageFormat, lead: int = 1, *, rounding: str = "nearest", seed: int = 0
) -> StoredParts:
    """`encode`, with a choice of rounding; seeds count modulo 2**64.

    With stochastic rounding INT8 takes the scale of the row's largest magnitude, where the nearest
    codes come with a searched one: what that cuts off would be an error of one sign.

    Raises ValueError for a format that rounds to nearest only (4 bits, codebooks).
    """
    check_rounding(rounding, seed % _SEEDS)
    if rounding == "nearest":
        return encode(weight, fmt, lead)
    if not rounds_stochastically(fmt):
        raise ValueError(
            f"{fmt.name} rounds to nearest only; stochastic rounding is for fp16, bf16, fp8, "
            "fp8_e5m2 and the int8 formats"
        )

    def quantize(x: Tensor, table: Tensor | None, spec: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        signed = seed % _SEEDS
        found: tuple[Tensor, Tensor, Tensor] = _ops.quantize_stochastic(
            x, table, spec, signed - _SEEDS if signed >= _SEEDS // 2 else signed
        )
        return found

    return encode(weight, fmt, lead, quantize)


def _quantize_stochastic(
    x: Tensor, table: Tensor | None, spec: list[int], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    matrix = _rows_of(x, spec)
    rows, cols = matrix.shape
    codes, scales, extra = (
        new_tensor(shape, torch.uint8, x.device) for shape in _part_shapes(spec, rows, cols)
    )
    _ops._quantize_stochastic_out(matrix, table, spec, seed, codes, scales)
    return codes, scales, extra


_library = torch.library.Library("vramkit", "IMPL")
for _key in ("CPU", "CUDA") if HAS_CUDA_OPERATORS else ("CPU",):
    _library.impl("quantize_stochastic", _quantize_stochastic, _key)


@torch.library.register_fake("vramkit::quantize_stochastic")
def _(x: Tensor, table: Tensor | None, spec: list[int], seed: int) -> Any:
    rows, cols = _rows_of(x, spec).shape
    return tuple(x.new_empty(s, dtype=torch.uint8) for s in _part_shapes(spec, rows, cols))
