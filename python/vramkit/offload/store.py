"""Where a model's parameters live while it is offloaded: views of one mapped file.

Each block is a run of whole pages in the file, so that the engine reads it past the page cache.
The parameters of the model stay parameters: they become views of a private mapping, from which
`state_dict`, `deepcopy` and `save` read them as ever.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Block

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


class BlockStore:
    """The blocks' file and its mapping; the file goes when the store does.

    Making one moves the parameters of the blocks into it. Raises OSError, with the model as it was,
    where the file cannot be written.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], folder: str | os.PathLike[str]
    ) -> None:
        parameters = dict(model.named_parameters())
        self.places: list[list[Place]] = []
        self.starts: list[int] = []
        self.sizes: list[int] = []
        end = 0
        for block in blocks:
            places, size = [], 0
            for name in block.parameters:
                parameter = parameters[name]
                nbytes = parameter.numel() * parameter.element_size()
                places.append(Place(parameter, size, nbytes, _dense_strides(parameter)))
                size += -(-nbytes // ALIGNMENT) * ALIGNMENT
            self.places.append(places)
            self.starts.append(end)
            self.sizes.append(size)
            end += -(-size // PAGE) * PAGE
        self.nbytes = end
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(suffix=".blocks", prefix="vramkit-", dir=folder)
        self.path = Path(path)
        self._remove = weakref.finalize(self, _unlink, path)
        try:
            with os.fdopen(handle, "wb") as file:
                for start, size, places in zip(self.starts, self.sizes, self.places, strict=True):
                    file.seek(start)
                    file.write(_run(places, size))
                file.truncate(max(end, PAGE))
        except BaseException:
            self._remove()
            raise
        self.views = self._mapped()
        self.point_to_store()

    def _mapped(self) -> list[list[Tensor]]:
        """A view for each parameter, with a storage of its own."""
        with open(self.path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        found = []
        for start, places in zip(self.starts, self.places, strict=True):
            views = []
            for place in places:
                at = start + place.offset
                run = torch.empty(0, dtype=torch.uint8)
                if place.nbytes:
                    run = torch.frombuffer(
                        mapping, dtype=torch.uint8, count=place.nbytes, offset=at
                    )
                flat = run.view(place.parameter.dtype)
                views.append(flat.as_strided(place.parameter.shape, place.stride))
            found.append(views)
        return found

    def point_to_store(self) -> None:
        """Every parameter is a view of the mapping."""
        for places, views in zip(self.places, self.views, strict=True):
            for place, view in zip(places, views, strict=True):
                place.parameter.data = view

    def rewrite(self, block: int) -> None:
        """Write what the block's parameters hold now, and map it afresh."""
        with open(self.path, "r+b") as file:
            file.seek(self.starts[block])
            file.write(_run(self.places[block], self.sizes[block]))
        self.views[block] = self._mapped()[block]
        for place, view in zip(self.places[block], self.views[block], strict=True):
            place.parameter.data = view

    def discard(self) -> None:
        """The file goes; what its parameters hold is in another store."""
        self.views = []
        self._remove()

    def release(self) -> None:
        """Parameters become tensors of their own again, and the file goes."""
        for places, views in zip(self.places, self.views, strict=True):
            for place, view in zip(places, views, strict=True):
                now = place.parameter.data
                if now.data_ptr() == view.data_ptr():  # else it has memory of its own already
                    own = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype)
                    place.parameter.data = own.copy_(now)
        self.views = []
        self._remove()


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _run(places: Sequence[Place], size: int) -> memoryview:
    run = torch.zeros(size, dtype=torch.uint8)
    for place in places:
        place.view(run).copy_(place.parameter.detach())
    return run.numpy().data


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own strides where its elements fill its storage without gaps, else contiguous ones."""
    return tuple(torch.empty_like(tensor, device="meta").stride())
