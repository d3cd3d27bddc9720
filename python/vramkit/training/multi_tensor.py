"""Work over all of a model's gradients or parameters at once, in native code.

A norm reads each gradient once. The factor that unscales and clips is known after that, and goes
to the optimizer's step as a number (`vramkit.training.AdamW`, or torch's own with fused=True), so
that nothing is written before the step. Other optimizers get it in a second pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native as _native

_ops = torch.ops.vramkit
_KNOWN = (torch.float32, torch.bfloat16, torch.float16)


class GradientNorm(NamedTuple):
    """The norm of gradients, and what would unscale and clip them."""

    norm: float
    """L2 norm over all of them, of the unscaled values."""
    finite: bool
    """Whether no gradient holds an infinity or a NaN."""
    factor: float
    """What to multiply each gradient by."""


def square_sum(tensors: Iterable[Tensor]) -> float:
    """The sum of the squares of all elements, in float64; inf or NaN where an element is.

    Elements are read once, in chunks whose sums are added in order: the result does not depend on
    the number of threads. float32, bfloat16 and float16 in native code, other dtypes by torch.

    >>> square_sum([torch.tensor([3.0, 4.0]), torch.zeros(0)])
    25.0
    """
    native, rest = _split(tensors)
    total = 0.0
    if native:
        total += float(_ops._multi_square_sum([_dense(t) for t in native]))
    for t in rest:
        total += float(t.detach().double().square().sum())
    return total


def gradient_norm(
    tensors: Iterable[Tensor], *, scale: float = 1.0, clip: float | None = None
) -> GradientNorm:
    """The norm of gradients that were computed from a loss times `scale`.

    `factor` is 1 / scale, times clip / (norm + 1e-6) where the norm exceeds `clip` (as
    torch.nn.utils.clip_grad_norm_ has it).

    Raises ValueError for a scale that is not positive, or a clip that is not.

    >>> gradient_norm([torch.tensor([6.0, 8.0])], scale=2.0, clip=1.0).norm
    5.0
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"a loss scale is positive and finite, not {scale}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is the largest norm allowed, above 0, not {clip}")
    total = square_sum(tensors)
    finite = math.isfinite(total)
    norm = math.sqrt(total) / scale if finite else math.inf
    factor = 1.0 / scale
    if finite and clip is not None:
        factor *= min(1.0, clip / (norm + 1e-6))
    return GradientNorm(norm, finite, factor)


def scale_(tensors: Iterable[Tensor], factor: float) -> None:
    """Multiply all tensors by a number, in place; rounded once. 1 touches nothing."""
    if factor == 1.0:
        return
    native, rest = _split(tensors)
    number = torch.tensor(factor, dtype=torch.float32)
    whole = [t for t in native if is_dense(t)]
    if whole:
        _ops._multi_scale_(whole, number)
    for t in (*rest, *(t for t in native if not is_dense(t))):
        t.mul_(float(number))


def cast_(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Write each source into its target, in the target's dtype, rounded to nearest even.

    Raises ValueError for lists of different lengths, or partners of different shapes.
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources and {len(targets)} targets")
    pairs: list[tuple[Tensor, Tensor]] = []
    for source, target in zip(sources, targets, strict=True):
        if source.shape != target.shape:
            raise ValueError(
                f"a source of shape {tuple(source.shape)} for a target of {tuple(target.shape)}"
            )
        known = source.dtype in _KNOWN and target.dtype in _KNOWN and source.device.type == "cpu"
        same = source.stride() == target.stride() and source.device == target.device
        if known and same and is_dense(source):
            pairs.append((source.detach(), target.detach()))
        else:
            target.detach().copy_(source.detach())
    if pairs:
        _ops._multi_cast_out([s for s, _ in pairs], [t for _, t in pairs])


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill one run of memory, in whatever order."""
    expected = 1
    dims = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]
    if any(n == 0 for _, n in dims):
        return True
    for stride, size in sorted(dims):
        if stride != expected:
            return False
        expected *= size
    return True


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if is_dense(tensor) else tensor.contiguous()


def _split(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that the native code takes, and the rest."""
    parts: dict[bool, list[Tensor]] = defaultdict(list)
    for t in tensors:
        if t.is_sparse:
            raise TypeError("sparse gradients are not supported: use sparse=False in the embedding")
        parts[t.dtype in _KNOWN and t.device.type == "cpu"].append(t.detach())
    return parts[True], parts[False]
