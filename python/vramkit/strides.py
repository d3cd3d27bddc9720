"""Where a fake tensor's strides are not those that the real operator gives, and what is done.

Fake views, and elementwise operators on their results, may take another stride in a dimension of
size one. That changes nothing for arithmetic and much for a convolution, which chooses its memory
layout by strides. Probes see the real strides; without them the rules here stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_VIEWS = frozenset({"aten::view", "aten::reshape", "aten::_unsafe_view", "aten::_reshape_alias"})


def corrected(
    func: Any, args: tuple[Any, ...], out: Any, known: Sequence[tuple[int, ...]] | None
) -> Any:
    """`out` with the strides that the real operator gives.

    Views are repeated on the meta device, whose views are the real ones. `known` holds the strides
    of the results as a probe saw them, in order.
    """
    if known is not None:
        return _with_strides(out, known)
    if func._schema.name in _VIEWS and isinstance(out, Tensor) and 1 in out.shape:
        stride = _view_stride(args[0], tuple(out.shape))
        if stride is not None and stride != out.stride():
            return torch.as_strided(out, out.shape, stride, out.storage_offset())
    first = args[0] if args and isinstance(args[0], Tensor) else None
    if first is None or 1 not in first.shape:
        return out
    alike = isinstance(out, Tensor) and out.shape == first.shape
    others = [a for a in args[1:] if isinstance(a, Tensor) and a.dim()]
    plain = others and all(t.is_contiguous() for t in (first, *others))
    if alike and not plain and func._schema.name in _ELEMENTWISE and _dense(first):
        return _with_strides(out, [_compact(first)])
    if func._schema.name == "aten::native_group_norm" and _channels_last(first):
        _, c, h, w = first.shape
        return _with_strides(out, [(c * h * w, 1, c * w, c)])
    return out


def _channels_last(x: Tensor) -> bool:
    if x.dim() != 4 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


_ELEMENTWISE = frozenset(f"aten::{n}" for n in ("add", "sub", "mul", "div", "silu", "relu", "gelu"))


def _compact(x: Tensor) -> tuple[int, ...]:
    """Strides without gaps in the order of `x`'s own, as TensorIterator allocates a result."""
    made, step = [0] * x.dim(), 1
    for dim in sorted(range(x.dim()), key=lambda d: (x.stride(d), x.shape[d], -d)):
        made[dim] = step
        step *= x.shape[dim]
    return tuple(made)


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their storage's part without gaps, in some order."""
    steps = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1)
    expected = 1
    for step, count in steps:
        if step != expected:
            return False
        expected *= count
    return True


def _view_stride(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        plain = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        try:
            return tuple(plain.view(shape).stride())
        except RuntimeError:  # it takes a copy, which is contiguous on either side
            return None


def _with_strides(out: Any, known: Sequence[tuple[int, ...]]) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor

    strides = iter(known)

    def fix(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        stride = tuple(next(strides, leaf.stride()))
        fake = isinstance(leaf, FakeTensor)
        if not fake or stride == leaf.stride() or len(stride) != leaf.dim():
            return leaf
        needed = 1 + sum((n - 1) * s for n, s in zip(leaf.shape, stride, strict=True))
        if needed * leaf.element_size() > leaf.untyped_storage().nbytes():
            return torch.empty_strided(leaf.shape, stride, dtype=leaf.dtype, device=leaf.device)
        return torch.as_strided(leaf, leaf.shape, stride, leaf.storage_offset())

    return torch.utils._pytree.tree_map(fix, out)
