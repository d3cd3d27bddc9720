"""Which modules of a model stay in float32 while the rest computes in 16 bits.

By rule: normalizations, and what has weights beyond the range of the 16 bits. By measurement:
modules whose inputs or outputs would overflow float16, or lose too many of their outputs below its
smallest number, on calibration inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

HEADROOM = 2.0
"""Values seen on calibration inputs may be exceeded by this factor before they overflow."""
LOST = 0.01
"""Share of nonzero outputs that may become zero."""


class Island(NamedTuple):
    """A module that stays in float32, and why."""

    name: str
    reason: str
    overflows: bool = False
    """Whether its output was measured to overflow."""


def rule_islands(model: nn.Module) -> list[Island]:
    """Normalizations, by type, or by a class name that ends in "Norm" (RMSNorm and its kin)."""
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return [
        Island(name, "a normalization")
        for name, module in model.named_modules()
        if (isinstance(module, known) or type(module).__name__.endswith("Norm"))
        and any(True for _ in module.parameters(recurse=False))
    ]


@torch.no_grad()
def overflowing_weights(model: nn.Module, dtype: torch.dtype) -> list[Island]:
    """Modules with a parameter or buffer of their own that `dtype` would make infinite."""
    most = torch.finfo(dtype).max
    found = []
    for name, module in model.named_modules():
        for key, t in (*module.named_parameters("", False), *module.named_buffers("", False)):
            if t.is_floating_point() and t.numel() and not t.is_meta:
                low, high = torch.aminmax(t)
                largest = max(-float(low), float(high))
                if most < largest < float("inf"):
                    found.append(Island(name, f"its {key} reaches {largest:.3g}"))
                    break
    return found


@torch.no_grad()
def measured_islands(
    model: nn.Module, inputs: Iterable[tuple[Any, ...]], dtype: torch.dtype
) -> list[Island]:
    """Modules that `dtype` cannot hold: weights by themselves, activations on these inputs.

    The model runs in the precision it has, in evaluation mode, and is left as it was.

    Args:
        model: In float32.
        inputs: Tuples of positional arguments.
        dtype: float16 or bfloat16 (which has float32's range: nothing overflows it).
    """
    limits = torch.finfo(dtype)
    most = limits.max / HEADROOM
    least = limits.smallest_normal * limits.eps / 2  # half the smallest subnormal: rounds to 0
    reasons = {name: reason for name, reason, _ in overflowing_weights(model, dtype)}
    overflowing: set[str] = set()
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = names[module]
        for what, value in (("input", (args, kwargs)), ("output", output)):
            for tensor in _tensors(value):
                largest = float(tensor.abs().max())
                if largest > most:
                    if what == "output":
                        overflowing.add(name)
                    reasons.setdefault(name, f"its {what} reaches {largest:.3g}")
                elif what == "output":
                    there = tensor != 0
                    lost = int((there & (tensor.abs() < least)).sum())
                    if lost > LOST * int(there.sum()):
                        reasons.setdefault(name, f"{lost} of its outputs would vanish")

    leaves = [m for m in names if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_hook(look, with_kwargs=True) for m in leaves]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for args in inputs:
            model(*args)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return [Island(name, reason, name in overflowing) for name, reason in reasons.items()]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for one in value for tensor in _tensors(one)]
