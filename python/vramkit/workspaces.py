"""How much work an operator is, and what it holds inside where no probe was made."""

from __future__ import annotations

from typing import Any

from .targets import Target
from .tracing import Call, Geometry, Inside, geometries


def work(call: Call) -> float:
    """Multiply-adds of a call, roughly; elements touched for all but products and convolutions."""
    tensors = list(geometries(call.spec))
    name = call.operator._schema.name.removeprefix("aten::")
    total = float(sum(g.numel for g in tensors))
    if not tensors:
        return 1.0
    if name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "_addmm_activation"):
        a, b = [g for g in tensors if len(g.shape) >= 2][-2:]
        return float(a.numel) * (b.shape[-1] if len(b.shape) > 1 else 1)
    if "convolution" in name:
        return _convolution_work(call.spec[0])
    if "attention" in name:
        query, key = tensors[0], tensors[1]
        length = key.shape[-2] if len(key.shape) > 1 else 1
        return 2.0 * query.numel * length
    if name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        rows = tensors[0].numel / max(1, tensors[0].shape[-1])
        return rows * sum(g.numel for g in tensors[1:])
    if "rnn" in name or "lstm" in name or "gru" in name:
        rows = tensors[0].numel / max(1, tensors[0].shape[-1])
        return rows * sum(g.numel for g in tensors[1:])
    return total


def _convolution_work(args: tuple[Any, ...]) -> float:
    from math import prod

    x, weight = args[1], args[2]
    if not isinstance(x, Geometry) or not isinstance(weight, Geometry):
        return 1.0
    transposed = bool(args[7]) if len(args) > 7 else False
    if transposed:
        return float(x.numel) * prod(weight.shape[1:])
    stride = args[4][1:] if len(args) > 4 and isinstance(args[4], tuple) else (1,)
    return float(x.numel) / prod(stride) * weight.numel / max(1, weight.shape[1])


def inside_of(call: Call, results: tuple[int, ...], target: Target) -> Inside | None:
    """What a call allocates, by rule: signed sizes in order; None where only results are known.

    `results` are the bytes of the call's new results.
    """
    return None
