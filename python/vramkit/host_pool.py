"""Where stored and decoded weights get memory: torch's own, or a pool that is touched once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from ._native import _core
from .sizes import parse_size

__all__ = ["HostPool"]

# Those entered, the innermost last.
_entered: ContextVar[tuple[HostPool, ...]] = ContextVar("vramkit_host_pools", default=())
# Fresh memory from this size on is worth a system call that asks for large pages.
_LARGE_BYTES = 4 << 20


class HostPool:
    """Host memory in large pages that is touched once and lent again and again.

    The first write to fresh memory costs several times what writing it again does. Inside
    `with pool:` stored and decoded weights, and the panels that products decode, come from the
    pool, and go back to it when nothing refers to them:

    >>> import torch, vramkit
    >>> pool = vramkit.HostPool("1 GiB")
    >>> for _ in range(3):
    ...     model = torch.nn.Linear(512, 512)
    ...     with pool:
    ...         report = vramkit.convert(model, "bf16")
    >>> pool.stats().segments
    1

    Args:
        limit: The most bytes it may hold, as a string with its unit or as GiB; None: no limit.
            What does not fit raises BudgetError.

    Tensors keep the pool's memory alive, whatever becomes of the pool. Nothing goes back to the
    system before `trim()`. Safe to use from several threads; `with` is for the one that enters.
    """

    def __init__(self, limit: str | float | None = None) -> None:
        self._pool = _core.HostPool(None if limit is None else parse_size(limit))

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
        """A tensor of the pool's memory; its content is what was there."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        piece = self._pool.take(count * dtype.itemsize)
        return torch.frombuffer(piece, dtype=dtype, count=count).reshape(tuple(shape))

    def stats(self) -> _core.HostPoolStats:
        """Bytes held and lent, and how often memory was reused."""
        return self._pool.stats()

    def trim(self) -> int:
        """Give segments of which nothing is lent back to the system; returns their bytes."""
        return self._pool.trim()

    def __enter__(self) -> HostPool:
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *exc: object) -> None:
        _entered.set(_entered.get()[:-1])

    def __repr__(self) -> str:
        return f"HostPool({self.stats()!r})"


def new_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result: from the pool in use, or torch's, in large pages where that pays."""
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    pools = _entered.get()
    if pools:
        return pools[-1].empty(shape, dtype)
    out = torch.empty(tuple(shape), dtype=dtype)
    if out.nbytes >= _LARGE_BYTES:
        _core.advise_large_pages(out.data_ptr(), out.nbytes)
    return out
