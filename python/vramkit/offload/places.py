"""Where parameters lie in a block's bytes, and views of them there; files of a store's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _core

PAGE = 4096
ALIGNMENT = 64  # of each parameter in its block: what kernels like best


class Place(NamedTuple):
    """Where a parameter lies: bytes from the start of its block, and its geometry."""

    parameter: nn.Parameter
    offset: int
    nbytes: int
    stride: tuple[int, ...]

    def view(self, run: Tensor) -> Tensor:
        """The parameter's values in a block's bytes (uint8, one dimension)."""
        flat = run[self.offset : self.offset + self.nbytes].view(self.parameter.dtype)
        return flat.as_strided(self.parameter.shape, self.stride)


def packed(parameters: Sequence[nn.Parameter]) -> tuple[list[Place], int]:
    """Places one after another, and the bytes of all."""
    places, size = [], 0
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.element_size()
        places.append(Place(parameter, size, nbytes, dense_strides(parameter)))
        size += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return places, size


@torch.inference_mode(False)  # parameters are ordinary tensors wherever they are made
def views_of(
    memory: _core.FileMapping | _core.HostStore, places: Sequence[Place], start: int = 0
) -> list[Tensor]:
    """A view for each parameter, with a storage of its own; `start`: where the memory begins."""
    views = []
    for place in places:
        run = torch.empty(0, dtype=torch.uint8)
        if place.nbytes:
            run = torch.frombuffer(
                memory, dtype=torch.uint8, count=place.nbytes, offset=place.offset - start
            )
        flat = run.view(place.parameter.dtype)
        views.append(flat.as_strided(place.parameter.shape, place.stride))
    return views


def run_of(places: Sequence[Place], size: int) -> memoryview:
    """A block's bytes as its parameters are now."""
    run = torch.zeros(size, dtype=torch.uint8)
    for place in places:
        place.view(run).copy_(place.parameter.detach())
    return run.numpy().data


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own strides where its elements fill its storage without gaps, else contiguous ones."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


class OwnFile:
    """A file without a name: written once, then a source that nobody else can open."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Native, so that wherever a signal breaks this off the descriptor has an owner.
        self._file: Any = open(folder, "wb", opener=_core.open_unnamed_file)  # noqa: SIM115
        self._path = f"/proc/self/fd/{self._file.fileno()}"
        self._end = 0

    def append(self, run: memoryview) -> int:
        """Write a run at the next page; where it begins."""
        start = self._end
        self._file.seek(start)
        self._file.write(run)
        self._end += -(-len(run) // PAGE) * PAGE
        return start

    def keep(self) -> Any:
        """The file opened once more, so that this process can open it again by that."""
        return open(self._path, "rb", buffering=0)

    def source(self) -> _core.FileSource:
        """The whole file, open for reading once more."""
        self._file.truncate(max(self._end, PAGE))
        self._file.flush()
        return _core.FileSource(self._path)

    def __enter__(self) -> OwnFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()  # sources have it open
