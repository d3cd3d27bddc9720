"""What the backward pass keeps, in another place: the host's memory, or a file.

The engine that streams weights reads sources that never change and knows its blocks when it starts;
activations are written anew at each step. They go past it: from a GPU to pinned memory on a stream
of their own, from the host's memory to a file without a name (`_core.open_unnamed_file`), which
nobody else can open and which is gone when the process is.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import _core
from ..errors import BudgetError
from ..sizes import parse_size
from .activations import Load, SavedActivations, has_values, keeping

_PAGE = 4096


@dataclass
class OffloadedActivations(SavedActivations):
    """What an `offload_activations` has seen."""

    place: str = ""
    """"disk" or "host"."""
    bytes_away: int = 0
    """Bytes that are there now."""
    peak_bytes_away: int = 0


@contextlib.contextmanager
def offload_activations(
    model: nn.Module,
    to: Literal["auto", "host", "disk"] = "auto",
    *,
    limit: str | float | None = None,
    folder: str | os.PathLike[str] | None = None,
    least_bytes: int = 1 << 16,
) -> Iterator[OffloadedActivations]:
    """Keep what is saved for the backward pass off the device; the values stay what they are.

    From a GPU activations go to pinned memory of the host; there, and where there is no GPU, they
    can go to a file: it has no name, its room is used again, and it is gone with the last graph
    that needs it. The system's page cache holds of it what memory is free. Parameters, buffers and
    small tensors stay. What several operators save is kept once.

    Args:
        model: Whose parameters are left alone; its device decides what "auto" means.
        to: "host" (for a model on a GPU), "disk", or "auto": host for a GPU, else disk.
        limit: Most bytes away at a time, as text with its unit or GiB. None: no limit.
        folder: Where the file is; the system's folder for temporary files by default.
        least_bytes: Smaller tensors stay.

    Raises ValueError for another place, or "host" where the model is there already. Within it, a
    forward pass raises BudgetError past the limit, and OSError where the file cannot be written.

    >>> layer, x = torch.nn.Linear(64, 64), torch.randn(512, 64)
    >>> with offload_activations(layer) as saved:
    ...     y = (layer(x) ** 2).sum()
    >>> y.backward()
    >>> saved.place, saved.tensors, saved.bytes_away
    ('disk', 2, 0)
    """
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    real = first is None or has_values(first)
    if to not in ("auto", "host", "disk"):
        raise ValueError(f"activations go to 'host', 'disk' or 'auto', not {to!r}")
    if to == "host" and real and device.type != "cuda":
        raise ValueError(
            f"the model is on {device}, so its activations are in the host's memory already: "
            "offload them to 'disk', or compress them (compress_activations)"
        )
    place = to if to != "auto" else ("host" if device.type == "cuda" else "disk")
    saved = OffloadedActivations(place=place)
    most = None if limit is None else parse_size(limit)

    def count(kept: Any, nbytes: int) -> None:
        if most is not None and saved.bytes_away + nbytes > most:
            raise BudgetError(
                f"{nbytes} bytes of activations do not fit beside the {saved.bytes_away} that are "
                f"away, of {most} allowed: raise the limit, or checkpoint blocks "
                "(plan_checkpoints)",
                saved.bytes_away + nbytes,
            )
        saved.bytes_away += nbytes
        saved.peak_bytes_away = max(saved.peak_bytes_away, saved.bytes_away)
        weakref.finalize(kept, _less, saved, nbytes).atexit = False

    if place == "host":
        keep: Callable[[Tensor, int], Load | None] = _to_host(device, count)
    else:
        keep = _to_file(_File(folder), count)
    with keeping(model, keep, saved, least_bytes):
        yield saved


def _less(saved: OffloadedActivations, nbytes: int) -> None:
    saved.bytes_away -= nbytes


class _Piece:
    """Bytes of a file; their room is free when this goes."""

    def __init__(self, file: _File, nbytes: int) -> None:
        self.file, self.nbytes = file, nbytes
        self.offset = file.take(nbytes)
        weakref.finalize(self, file.give, self.offset, nbytes).atexit = False


class _File:
    """Room in a file without a name, the first that fits; written and read past Python's buffers.

    Steps are alike: what one leaves free fits the next.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        where = tempfile.gettempdir() if folder is None else os.fspath(folder)
        self._file: Any = open(where, "wb", opener=_core.open_unnamed_file)  # noqa: SIM115
        # Once more, for reading.
        self._reader: Any = open(f"/proc/self/fd/{self._file.fileno()}", "rb", buffering=0)  # noqa: SIM115
        self._end = 0
        self._free: list[tuple[int, int]] = []  # (offset, bytes), by offset
        # Pieces may go at any moment, in any thread: what they return is taken in at the next turn.
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._file, self._reader)

    def take(self, nbytes: int) -> int:
        room = -(-nbytes // _PAGE) * _PAGE
        with self._lock:
            self._take_in()
            for place, (offset, free) in enumerate(self._free):
                if free >= room:
                    self._free[place : place + 1] = [(offset + room, free - room)] * (free > room)
                    return offset
            self._end += room
            return self._end - room

    def give(self, offset: int, nbytes: int) -> None:
        self._returned.append((offset, -(-nbytes // _PAGE) * _PAGE))

    def _take_in(self) -> None:
        found = self._free
        while self._returned:
            found.append(self._returned.popleft())
        merged: list[tuple[int, int]] = []
        for start, free in sorted(found):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + free)
            else:
                merged.append((start, free))
        self._free = merged

    def write(self, tensor: Tensor, offset: int) -> None:
        rest = tensor.view(torch.uint8).numpy().data
        while rest:
            done = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[done:], offset + done

    def read(self, tensor: Tensor, offset: int) -> None:
        rest = tensor.view(torch.uint8).numpy().data
        while rest:
            done = os.preadv(self._reader.fileno(), [rest], offset)
            if not done:
                raise OSError(f"the file of activations ended at byte {offset}")
            rest, offset = rest[done:], offset + done

    def coming(self, offset: int, nbytes: int) -> None:
        """Ask the system to read ahead: a backward pass wants what was written before this."""
        first = max(0, offset - nbytes)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._reader.fileno(), first, offset - first, os.POSIX_FADV_WILLNEED)


def _close(*files: Any) -> None:
    for file in files:
        file.close()


def _nothing(flat: Tensor) -> Load:
    """While an estimate runs: what is away takes no memory until it is back."""
    dtype, elements, device = flat.dtype, flat.numel(), flat.device
    return lambda: torch.empty(elements, dtype=dtype, device=device)


def _to_file(
    file: _File, count: Callable[[Any, int], None]
) -> Callable[[Tensor, int], Load | None]:
    def keep(flat: Tensor, _row: int) -> Load | None:
        if not has_values(flat):
            return _nothing(flat)
        piece = _Piece(file, flat.nbytes)
        count(piece, flat.nbytes)
        host = flat.cpu()
        file.write(host, piece.offset)
        dtype, device = flat.dtype, flat.device

        def load() -> Tensor:
            back = torch.empty(piece.nbytes // dtype.itemsize, dtype=dtype)
            file.coming(piece.offset, piece.nbytes)
            file.read(back, piece.offset)
            return back.to(device)

        return load

    return keep


def _to_host(
    device: torch.device, count: Callable[[Any, int], None]
) -> Callable[[Tensor, int], Load | None]:
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def keep(flat: Tensor, _row: int) -> Load | None:
        if not has_values(flat) or copies is None:
            return _nothing(flat)
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        count(host, flat.nbytes)
        # The copy waits for what makes the tensor; its memory is not used again before the copy.
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            host.copy_(flat, non_blocking=True)
            flat.record_stream(copies)
            done = copies.record_event()

        def load() -> Tensor:
            torch.cuda.current_stream(device).wait_event(done)
            return host.to(device, non_blocking=True)

        return load

    return keep
