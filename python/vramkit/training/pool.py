"""Buffers that are used again instead of being allocated anew."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..precision import PrecisionMode

_Key = tuple[torch.device, torch.dtype, int, tuple[int, ...]]


class PoolStats(NamedTuple):
    """What a pool holds and how often it served."""

    leased: int
    """Buffers in use."""
    leased_bytes: int
    free: int
    """Buffers that wait."""
    free_bytes: int
    hits: int
    """Requests served by a buffer that was there."""
    misses: int
    """Requests that allocated one."""


class MemoryPool:
    """Hands out uninitialized tensors of one precision and takes them back.

    A buffer is handed out to one at a time: `get_tensor` leases it until `release`. Free buffers
    are kept by device, dtype, stream and shape: on CUDA a buffer goes back to the stream that had
    it, so that work still enqueued there comes before its next use; where it was released on
    another stream, that one's work is waited for. Threads may share a pool.

    Args:
        precision: "fp16", "bf16" or "fp32".
        device: Where buffers lie; None for CUDA if there is any, else the CPU.

    >>> pool = MemoryPool("bf16", device="cpu")
    >>> with pool.lease((2, 3)) as buffer:
    ...     buffer.dtype
    torch.bfloat16
    >>> pool.get_tensor((2, 3)) is buffer
    True
    """

    def __init__(
        self,
        precision: PrecisionMode | str = "fp16",
        device: str | torch.device | None = None,
    ) -> None:
        mode = PrecisionMode.parse(precision)
        if mode not in (PrecisionMode.FP16, PrecisionMode.BF16, PrecisionMode.FP32):
            raise ValueError(f"a pool holds fp16, bf16 or fp32, not {mode.value}")
        self.dtype = mode.torch_dtype
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        # With the event that the next to lease it waits for, if any.
        self._free: dict[_Key, list[tuple[Tensor, Any]]] = defaultdict(list)
        self._leased: dict[int, tuple[_Key, Tensor]] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get_tensor(self, shape: Sequence[int]) -> Tensor:
        """Lease a buffer of this shape; its content is arbitrary. Give it back with `release`."""
        if any(n < 0 for n in shape):
            raise ValueError(f"a shape has no negative sizes: {tuple(shape)}")
        key = (self.device, self.dtype, self._stream(), tuple(shape))
        with self._lock:
            waiting = self._free[key]
            event = None
            if waiting:
                buffer, event = waiting.pop()
                self._hits += 1
            else:
                buffer = torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
                self._misses += 1
            self._leased[id(buffer)] = (key, buffer)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Take a buffer back. ValueError for one that this pool did not lease, or has back."""
        with self._lock:
            found = self._leased.get(id(buffer))
            if found is None or found[1] is not buffer:
                raise ValueError(
                    "this tensor is not leased from the pool: release what get_tensor returned, "
                    "once, and not a view of it"
                )
            del self._leased[id(buffer)]
            key, event = found[0], None
            if key[2] != self._stream():
                event = torch.cuda.current_stream(self.device).record_event()
            self._free[key].append((buffer, event))

    @contextlib.contextmanager
    def lease(self, shape: Sequence[int]) -> Iterator[Tensor]:
        """A buffer for the length of a with statement."""
        buffer = self.get_tensor(shape)
        try:
            yield buffer
        finally:
            self.release(buffer)

    def clear(self) -> int:
        """Let go of the free buffers; returns their bytes."""
        with self._lock:
            freed = sum(b.nbytes for waiting in self._free.values() for b, _ in waiting)
            self._free.clear()
        return freed

    def stats(self) -> PoolStats:
        """How many buffers and bytes there are."""
        with self._lock:
            leased = [b for _, b in self._leased.values()]
            free = [b for waiting in self._free.values() for b, _ in waiting]
            return PoolStats(
                len(leased),
                sum(b.nbytes for b in leased),
                len(free),
                sum(b.nbytes for b in free),
                self._hits,
                self._misses,
            )

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)
