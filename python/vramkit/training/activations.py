"""What the backward pass keeps, in fewer bytes: saved-tensor hooks.

`keeping` finds what is worth keeping otherwise (activations, not parameters) and sees to it that
memory which several operators save is kept once; `compress_activations` says how, and
`offloading.offload_activations` where.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._operators import StoredParts
from .._stochastic import encode_rounded
from ..formats import get_format
from .multi_tensor import is_dense, square_sum

Kept = Literal["fp16", "bf16", "int8", "fp8"]

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_EIGHTS = ("int8", "fp8")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_ROW = 64
"""Elements that share a scale, at least: its four bytes are then a sixteenth of the codes."""

Load = Callable[[], Tensor]
"""Gives back the elements that were kept, one after the other."""


@dataclass
class SavedActivations:
    """What a `compress_activations` or `offload_activations` has seen."""

    tensors: int = 0
    """Tensors that were kept otherwise; memory that several operators save counts once."""
    shared: int = 0
    """How often a tensor was saved whose memory was kept already."""
    bytes_before: int = 0
    bytes_after: int = 0
    """In memory of the device."""
    left: int = 0
    """Tensors left as they are because they hold an infinity or NaN, or overflow float16."""


@contextlib.contextmanager
def compress_activations(
    model: nn.Module, to: Kept = "bf16", *, seed: int = 0, least_bytes: int = 1 << 14
) -> Iterator[SavedActivations]:
    """Keep what is saved for the backward pass in 16 or 8 bits; the forward pass is untouched.

    Parameters and buffers are not copied, nor 16-bit copies of them that autocast made (told by
    their shapes), integers and small tensors. 8-bit values have a scale for each row, the last
    dimension in memory (or the last few, where they are short), and are rounded stochastically in
    native code, so that gradients stay unbiased in what they are linear in (Chen et al. 2021,
    ActNN). What several operators save is kept once. A tensor with an infinity or NaN is left as it
    is, so that a gradient scaler sees it.

    Args:
        model: Whose parameters are left alone.
        to: "fp16", "bf16", "int8" or "fp8" (e4m3).
        seed: Of the stochastic rounding; the same seed gives the same bits.
        least_bytes: Smaller tensors are left as they are.

    Raises ValueError for another name or a seed that is not from 0 to 2**64 - 1.

    >>> layer, x = torch.nn.Linear(64, 64), torch.randn(128, 64, requires_grad=True)
    >>> with compress_activations(layer, "bf16") as saved:
    ...     y = (layer(x) ** 2).sum()
    >>> saved.bytes_after * 2 == saved.bytes_before
    True
    """
    if to not in (*_HALVES, *_EIGHTS):
        raise ValueError(f"activations are kept in fp16, bf16, int8 or fp8, not {to!r}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"a seed is an integer from 0 to 2**64 - 1, not {seed!r}")
    saved = SavedActivations()

    def keep(flat: Tensor, row: int) -> Load | None:
        if flat.element_size() == 2 and to in _HALVES:
            return None
        if to in _HALVES:
            found = _half(flat, _HALVES[to], saved)
        else:
            found = _eight(flat, to, row, seed + saved.tensors, saved)
        if found is None:
            saved.left += 1
        return found

    with keeping(model, keep, saved, least_bytes):
        yield saved


def _half(flat: Tensor, half: torch.dtype, saved: SavedActivations) -> Load | None:
    dtype, kept = flat.dtype, flat.to(half)
    if half is torch.float16 and not _finite(kept):
        return None
    saved.bytes_after += kept.nbytes
    return lambda: kept.to(dtype)


def _eight(flat: Tensor, to: str, row: int, seed: int, saved: SavedActivations) -> Load | None:
    if not _finite(flat):
        return None
    dtype = flat.dtype
    parts: StoredParts = encode_rounded(
        flat.view(-1, row), get_format(to), rounding="stochastic", seed=seed
    )
    saved.bytes_after += parts.nbytes
    return lambda: parts.dense(dtype).view(-1)


class _Memory:
    """Memory that is kept: alive as long as a graph wants it back."""

    def __init__(self, load: Load, version: int) -> None:
        self.load, self.version = load, version


@dataclass
class _View:
    """A saved tensor: kept memory, and how it lies in that."""

    memory: _Memory
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@contextlib.contextmanager
def keeping(
    model: nn.Module,
    keep: Callable[[Tensor, int], Load | None],
    saved: SavedActivations,
    least_bytes: int,
) -> Iterator[None]:
    """Within it, autograd keeps of floating-point activations what `keep` makes of them.

    `keep` gets a flat tensor and the length of its rows, and returns how to have the elements back,
    or None to leave them as they are. Two views of the same elements are one to it, if nothing was
    written between.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    weights = {_shape(p) for p in model.parameters() if p.dim() > 1}
    known: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def wanted(tensor: Tensor) -> bool:
        if tensor.dtype not in _FLOATS or tensor.nbytes < least_bytes:
            return False
        if tensor.untyped_storage()._cdata in own:
            return False
        return tensor.element_size() == 4 or _shape(tensor) not in weights

    @torch.no_grad()
    def pack(tensor: Tensor) -> Tensor | _View:
        if not wanted(tensor):
            # Detached: a result that kept itself would never be freed.
            return tensor.detach()
        dense = is_dense(tensor)
        strides = tensor.stride() if dense else _contiguous(tensor.shape)
        where = (tensor.dtype, tensor.storage_offset(), tensor.numel())
        key = where if dense else (*where, tuple(tensor.shape), tuple(tensor.stride()))
        storage = tensor.untyped_storage()
        reference = known.setdefault(storage, {}).get(key)
        memory = None if reference is None else reference()
        if memory is None or memory.version != tensor._version:
            flat = tensor.detach() if dense else tensor.detach().contiguous()
            flat = flat.as_strided((flat.numel(),), (1,), flat.storage_offset())
            load = keep(flat, _row(tensor.shape, strides))
            if load is None:
                return tensor.detach()
            memory = _Memory(load, tensor._version)
            known[storage][key] = weakref.ref(memory)
            saved.tensors += 1
            saved.bytes_before += tensor.nbytes
        else:
            saved.shared += 1
        return _View(memory, tuple(tensor.shape), tuple(strides))

    def unpack(packed: Tensor | _View) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return packed.memory.load().as_strided(packed.shape, packed.strides)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at: not while an estimate runs on fake ones.

    A real tensor that a loss brings along is fake to operators then, too.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def _finite(flat: Tensor) -> bool:
    return not has_values(flat) or math.isfinite(square_sum([flat]))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """A weight's shape, transposed or not."""
    return tuple(sorted(tensor.shape))


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _row(shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Elements of a row: the innermost dimensions in memory, as many as make it long enough."""
    row = 1
    for _, n in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        row *= n
        if row >= _LEAST_ROW:
            break
    return row
