"""Values that are known while all else is shapes: buffers, masks, counters.

Fake tensors have no values, and models decide by some: whether a mask is all ones, how much a
buffer says to pad. Where every argument of an operator is a real tensor, and the results are views
or small integers, the operator runs for real. What a forward writes into a real tensor from a fake
one makes it unknown from then on.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .tracing import tensors_in

LARGEST = 1 << 20  # elements; larger masks keep their shapes only
LARGEST_FLOAT = 64  # elements: counters that were divided, scales; never activations


class Known:
    """Decides which operators run for real, and remembers which tensors lost their values."""

    def __init__(self) -> None:
        self.unknown: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def holds(self, value: Tensor) -> bool:
        """Whether the values of a tensor are known."""
        return (
            type(value) in (Tensor, torch.nn.Parameter)
            and value.device.type == "cpu"
            and value.untyped_storage() not in self.unknown
        )

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """The operator's result: real where it can be known, else fake. `tensors` are in `args`."""
        from torch._subclasses.fake_tensor import (
            DataDependentOutputException,
            DynamicOutputShapeException,
        )

        if not all(self.holds(t) for t in tensors) or _random(func):
            return self._written(func, args, kwargs, tensors)
        if func.is_view and tensors:
            return _real(func, args, kwargs)
        small = all(t.numel() <= LARGEST for t in tensors)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not small:
                raise
            return _real(func, args, kwargs)
        if func._schema.is_mutable and tensors:
            if small:
                return _real(func, args, kwargs)
            return self._written(func, args, kwargs, tensors)
        made = tensors_in(out)
        if made and small and all(_plain(t) for t in made):
            return _real(func, args, kwargs)
        return out

    def _written(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        out = func(*args, **kwargs)
        if not func._schema.is_mutable:
            return out
        # A fake result must not stand for a real tensor that the caller goes on using.
        for argument, value in zip(func._schema.arguments, args, strict=False):
            info = argument.alias_info
            if info is None or not info.is_write or not isinstance(value, Tensor):
                continue
            if any(value is t and self.holds(t) for t in tensors):
                self.unknown[value.untyped_storage()] = True
            if isinstance(out, Tensor) and len(func._schema.returns) == 1:
                out = value
        return out


def _random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _plain(value: Tensor) -> bool:
    real = value.is_floating_point() or value.is_complex()
    return value.device.type == "cpu" and value.numel() <= (LARGEST_FLOAT if real else LARGEST)


def _real(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return func(*args, **kwargs)
