"""Weights as other tools would store them: functions from a weight to its decoded form.

Bits per weight count scales and zero points as these tools keep them beside a 16-bit model: 2 bytes
each. HQQ is not imported: its published method stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Peer:
    """One tool's format: `bits` is its class (4 or 8), `stored` its bits per weight by columns."""

    bits: int
    stored: Callable[[int], float]
    decoded: Callable[[Tensor], Tensor]


def grouped(weight: Tensor, group: int = 128) -> Tensor:
    """[groups, group], a row's short last group padded with its last value."""
    short = -weight.shape[1] % group
    tail = weight[:, -1:].expand(-1, short)
    return torch.cat([weight, tail], 1).reshape(-1, group)


def ungrouped(groups: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `grouped`."""
    return groups.reshape(weight.shape[0], -1)[:, : weight.shape[1]]


def min_max(weight: Tensor) -> Tensor:
    """Range scaling, groups of 128, scale and minimum in float32 (quanto's qint4)."""
    groups = grouped(weight)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-12)
    return ungrouped(((groups - low) / scale).round() * scale + low, weight)


def half_quadratic(
    groups: Tensor, levels: int, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01
) -> Tensor:
    """Half-quadratic quantization (Badri and Shaji 2023) of each row, scale and zero in float16.

    Alternates between sparse outliers e (a generalized soft threshold, the proximal step of |.|_p)
    and the zero point that fits the weight without e, for as long as the mean error falls.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    inverse = ((levels - 1) / (high - low)).clamp(max=2e4)
    zero = -low * inverse
    best, best_zero = float("inf"), zero
    for _ in range(20):
        codes = (groups * inverse + zero).round().clamp(0, levels - 1)
        residual = groups - (codes - zero) / inverse
        magnitude = residual.abs()
        error = float(magnitude.mean())
        if error >= best:
            break
        best, best_zero = error, zero
        shrunk = (magnitude - magnitude.clamp_min(1e-9).pow(p - 1) / beta).clamp_min(0)
        outliers = residual.sign() * shrunk
        zero = (codes - (groups - outliers) * inverse).mean(1, keepdim=True)
        beta *= kappa
    scale, zero = (1 / inverse).half().float(), best_zero.half().float()
    codes = (groups / scale + zero).round().clamp(0, levels - 1)
    return (codes - zero) * scale


def hqq4(weight: Tensor) -> Tensor:
    """HQQ's 4 bits, groups of 128."""
    return ungrouped(half_quadratic(grouped(weight), 16), weight)


def hqq8(weight: Tensor) -> Tensor:
    """HQQ's 8 bits, a scale and a zero point per row."""
    return half_quadratic(weight, 256)


def _torchao(weight: Tensor, dtype: torch.dtype, *, grouped: bool) -> Tensor:
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    group = 128
    while weight.shape[1] % group:
        group //= 2  # it takes no short groups
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    config = IntxWeightOnlyConfig(
        weight_dtype=dtype,
        granularity=PerGroup(group) if grouped else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC if grouped else MappingType.SYMMETRIC,
    )
    quantize_(layer, config)
    decoded: Tensor = layer.weight.dequantize()  # type: ignore[operator]
    return decoded


def torchao4(weight: Tensor) -> Tensor:
    """torchao's IntxWeightOnly of 4 bits with zero points, groups of 128, or of what fits."""
    return _torchao(weight, torch.int4, grouped=True)


def torchao8(weight: Tensor) -> Tensor:
    """torchao's IntxWeightOnly of 8 bits, a scale per row."""
    return _torchao(weight, torch.int8, grouped=False)


def quanto8(weight: Tensor) -> Tensor:
    """optimum-quanto's qint8 by its own quantizer: absmax per row."""
    from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight

    scale = AbsmaxOptimizer()(weight, qtype=qint8, axis=0)
    found: Tensor = quantize_weight(weight, qint8, 0, scale, optimized=False).dequantize()
    return found


def quanto4(weight: Tensor) -> Tensor:
    """optimum-quanto's qint4 by its own quantizer, in the group size that its layers choose."""
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    group = 128
    while weight.shape[1] % group and group > 32:
        group -= 32
    scale, shift = MaxOptimizer()(weight, qtype=qint4, axis=0, group_size=group)
    found: Tensor = quantize_weight(
        weight, qint4, 0, scale, shift, group_size=group, optimized=False
    ).dequantize()
    return found


def bitsandbytes4(weight: Tensor) -> Tensor:
    """bitsandbytes' NF4, blocks of 64, scales quantized again."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=True
    )
    found: Tensor = functional.dequantize_4bit(packed, state)
    return found


def bitsandbytes8(weight: Tensor) -> Tensor:
    """bitsandbytes' LLM.int8 weights."""
    from bitsandbytes import functional

    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    return codes.float() * (absmax / 127)[:, None]


def _groups_of_128(cols: int) -> float:
    return 4 + 32 * -(-cols // 128) / cols


PEERS: dict[str, Peer] = {
    "min-max": Peer(4, _groups_of_128, min_max),
    "quanto qint4": Peer(4, _groups_of_128, quanto4),
    "torchao int4": Peer(4, lambda cols: 4 + 24 / 128, torchao4),
    "HQQ 4 bits": Peer(4, _groups_of_128, hqq4),
    "bitsandbytes nf4, double": Peer(4, lambda _: 4.127, bitsandbytes4),
    "quanto qint8": Peer(8, lambda cols: 8 + 32 / cols, quanto8),
    "torchao int8": Peer(8, lambda cols: 8 + 32 / cols, torchao8),
    "bitsandbytes int8": Peer(8, lambda cols: 8 + 32 / cols, bitsandbytes8),
    "HQQ 8 bits, by row": Peer(8, lambda cols: 8 + 32 / cols, hqq8),
}
