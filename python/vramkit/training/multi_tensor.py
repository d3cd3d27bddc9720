"""Work over all of a model's gradients or parameters at once, in native code.

A norm reads each gradient once: that is the check for infinities and NaN, the unscaled norm, and
with both the factor that unscales and clips. The factor goes to the optimizer's step as a number
(`vramkit.training.AdamW`, or torch's own with fused=True), which multiplies gradients by it as it
reads them, so that nothing is written before the step. Other optimizers get it in a second pass
(`scale_`), which is left out where the factor is 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._native import HAS_CUDA_OPERATORS
from .._stochastic import check_rounding

_ops = torch.ops.vramkit
_KNOWN = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda") if HAS_CUDA_OPERATORS else ("cpu",)


class GradientNorm(NamedTuple):
    """The norm of gradients, and what would unscale and clip them."""

    norm: float
    """L2 norm over all of them, of the unscaled values."""
    finite: bool
    """Whether no gradient holds an infinity or a NaN."""
    factor: float
    """What to multiply each gradient by."""


@torch.no_grad()
def square_sum(tensors: Iterable[Tensor]) -> float:
    """The sum of the squares of all elements, in float64; inf or NaN where an element is.

    Elements are read once, in chunks whose sums are added in order: the result depends neither on
    the number of threads nor on the device. float32, bfloat16 and float16 in native code, other
    dtypes by torch. Waits for the device.

    >>> square_sum([torch.tensor([3.0, 4.0]), torch.zeros(0)])
    25.0
    """
    native, rest = _split(tensors)
    total = 0.0
    # All devices are at work before the first is waited for.
    for found in [_ops._multi_square_sum([_dense(t) for t in ts]) for ts in native]:
        total += float(found)
    for t in rest:
        total += float(t.double().square().sum())
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


@torch.no_grad()
def scale_(tensors: Iterable[Tensor], factor: float) -> None:
    """Multiply all tensors by a number, in place; rounded once. 1 touches nothing."""
    if factor == 1.0:
        return
    native, rest = _split(tensors)
    for ts in native:
        whole = [t for t in ts if is_dense(t)]
        if whole:
            _ops._multi_scale_(whole, factor)
        rest += [t for t in ts if not is_dense(t)]
    number = float(torch.tensor(factor, dtype=torch.float32))
    for t in rest:
        t.mul_(number)


def cast_(sources: Sequence[Tensor], targets: Sequence[Tensor], *, seed: int | None = None) -> None:
    """Write each source into its target, in the target's dtype, rounded to nearest even.

    With a seed, what goes to 16 bits rounds up or down at random, so that the mean of many
    roundings is the number itself: the same bits for the same seed on every device, each tensor of
    the list with random words of its own (Philox 4x32-10, by the tensor's index and the element's,
    in the order of memory).

    Raises ValueError for lists of different lengths, partners of different shapes, a seed that is
    no 64-bit number; and with a seed for partners whose memory the native code does not take:
    dtypes other than float32, bfloat16 and float16, different strides or devices, elements that do
    not fill one run of memory. Nothing is written then.

    >>> halves = torch.empty(1000, dtype=torch.bfloat16)
    >>> cast_([torch.full((1000,), 1 + 2**-9)], [halves], seed=1)  # a quarter of the way up
    >>> 0.2 < float((halves > 1).float().mean()) < 0.3
    True
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources and {len(targets)} targets")
    if seed is not None:
        check_rounding("stochastic", seed)
    pairs: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for source, target in zip(sources, targets, strict=True):
        if source.shape != target.shape:
            raise ValueError(
                f"a source of shape {tuple(source.shape)} for a target of {tuple(target.shape)}"
            )
        known = source.dtype in _KNOWN and target.dtype in _KNOWN
        same = source.stride() == target.stride() and source.device == target.device
        native = known and same and source.device.type in _DEVICES and is_dense(source)
        (pairs if native else others).append((source.detach(), target.detach()))
    if others and seed is not None:
        source, target = others[0]
        raise ValueError(
            f"no stochastic cast from {source.dtype}, strides {source.stride()}, {source.device} "
            f"to {target.dtype}, strides {target.stride()}, {target.device}: it takes float32, "
            "bfloat16 and float16 in partners of the same dense layout on one device"
        )
    for device in dict.fromkeys(s.device for s, _ in pairs):
        if seed is not None and device != pairs[0][0].device:
            raise ValueError("a stochastic cast takes tensors of one device: call it for each")
    for device in dict.fromkeys(s.device for s, _ in pairs):
        chosen = [(s, t) for s, t in pairs if s.device == device]
        _ops._multi_cast_out([s for s, _ in chosen], [t for _, t in chosen], signed_seed(seed))
    for source, target in others:
        target.copy_(source)


def signed_seed(seed: int | None) -> int | None:
    """A 64-bit seed as operators take it: the signed number of the same bits."""
    return seed if seed is None or seed < 1 << 63 else seed - (1 << 64)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill one run of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
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
    return tensor if is_dense(tensor) else tensor.contiguous()


def _split(tensors: Iterable[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Those that the native code takes, device by device, and the rest."""
    on_cpu: list[Tensor] = []
    native: dict[torch.device, list[Tensor]] = defaultdict(list)
    rest: list[Tensor] = []
    for t in tensors:
        if t.is_sparse:
            raise TypeError("sparse gradients are not supported: use sparse=False in the embedding")
        if t.dtype not in _KNOWN:
            rest.append(t)
        elif t.is_cpu:
            on_cpu.append(t)
        else:
            (native[t.device] if t.device.type in _DEVICES else rest).append(t)
    return [ts for ts in (on_cpu, *native.values()) if ts], rest
