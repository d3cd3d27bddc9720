"""Where a model's parameters live while it is offloaded: views of one mapped file, or of memory.

Each block is a run of whole pages in the file, so that the engine reads it past the page cache.
The parameters of the model stay parameters: they become views of a private mapping, from which
`state_dict`, `deepcopy` and `save` read them as ever. Those that are to wait in the host's memory
instead are views of one large piece of it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _core
from .blocks import Block

PAGE = 4096
LARGE_PAGE = 2 << 20
# Below this much, memory is counted in small pages: large ones would be more than what is in them.
SMALL = 256 << 20
ALIGNMENT = 64  # of each parameter in its block: what kernels like best


class Place(NamedTuple):
    """Where a parameter lies: bytes from the start of its block, and its geometry.

    `host`: it waits in memory, not in the file.
    """

    parameter: nn.Parameter
    offset: int
    nbytes: int
    stride: tuple[int, ...]
    host: bool

    def view(self, run: Tensor) -> Tensor:
        """The parameter's values in a block's bytes (uint8, one dimension)."""
        flat = run[self.offset : self.offset + self.nbytes].view(self.parameter.dtype)
        return flat.as_strided(self.parameter.shape, self.stride)


@dataclass
class Layout:
    """One block: its parameters, and the two runs of bytes that it is made of.

    A run is (offset in the block, offset in the file or the memory, bytes).
    """

    places: list[Place]
    nbytes: int
    file: tuple[int, int, int]
    memory: tuple[int, int, int]


class BlockStore:
    """The blocks' file and its mapping; the file goes when the store does.

    Making one moves the parameters of the blocks into it. Raises OSError, with the model as it was,
    where the file cannot be written.

    Args:
        model: Whose parameters they are.
        blocks: All that move.
        folder: Where the file goes.
        on_host: Names of the parameters that wait in memory instead.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        folder: str | os.PathLike[str],
        on_host: Container[str] = (),
    ) -> None:
        self.layouts: list[Layout] = []
        in_file = in_memory = 0
        parameters = dict(model.named_parameters())
        for block in blocks:
            layout = _lay_out(block, parameters, on_host, in_file, in_memory)
            self.layouts.append(layout)
            in_file = _pages(layout.file[1] + layout.file[2])
            in_memory = _pages(layout.memory[1] + layout.memory[2])
        self.host_bytes = in_memory
        self._memory = _core.HostStore(in_memory, PAGE if in_memory < SMALL else LARGE_PAGE)
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(suffix=".blocks", prefix="vramkit-", dir=folder)
        self.path = Path(path)
        self.remove = weakref.finalize(self, _unlink, path)
        try:
            with os.fdopen(handle, "wb") as file:
                for layout in self.layouts:
                    self._write(layout, file)
                file.truncate(max(in_file, PAGE))
        except BaseException:
            self.remove()
            raise
        self.views = [self._mapped(layout) for layout in self.layouts]
        self.point_to_store()

    def sources(self) -> list[_core.Source]:
        """What the engine reads from: the file, opened now, and the memory."""
        return [_core.FileSource(str(self.path)), self._memory.source()]

    def spec(self, index: int, block: Block) -> _core.BlockSpec:
        """A block as the engine knows it."""
        layout = self.layouts[index]
        extents = [
            _core.Extent(source, start, offset, nbytes)
            for source, (offset, start, nbytes) in enumerate((layout.file, layout.memory))
            if nbytes
        ]
        return _spec(block, layout, extents)

    def _write(self, layout: Layout, file: Any) -> None:
        """What the block's parameters hold now goes to the file and to the memory."""
        run = torch.zeros(layout.nbytes, dtype=torch.uint8)
        for place in layout.places:
            place.view(run).copy_(place.parameter.detach())
        offset, start, nbytes = layout.file
        file.seek(start)
        file.write(run[offset : offset + nbytes].numpy().data)
        offset, start, nbytes = layout.memory
        if nbytes:
            self._host()[start : start + nbytes] = run[offset : offset + nbytes]

    def _host(self) -> Tensor:
        return torch.frombuffer(self._memory, dtype=torch.uint8)

    def _mapped(self, layout: Layout) -> list[Tensor]:
        """A view for each parameter, with a storage of its own."""
        with open(self.path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        views = []
        for place in layout.places:
            base, keeper = (layout.memory, self._memory) if place.host else (layout.file, mapping)
            at = base[1] + place.offset - base[0]
            run = torch.empty(0, dtype=torch.uint8)
            if place.nbytes:
                run = torch.frombuffer(keeper, dtype=torch.uint8, count=place.nbytes, offset=at)
            flat = run.view(place.parameter.dtype)
            views.append(flat.as_strided(place.parameter.shape, place.stride))
        return views

    def point_to_store(self) -> None:
        """Every parameter is a view of the mapping or the memory."""
        for layout, views in zip(self.layouts, self.views, strict=True):
            for place, view in zip(layout.places, views, strict=True):
                place.parameter.data = view

    def rewrite(self, block: int) -> None:
        """Write what the block's parameters hold now, and map it afresh."""
        with open(self.path, "r+b") as file:
            self._write(self.layouts[block], file)
        self.views[block] = self._mapped(self.layouts[block])
        for place, view in zip(self.layouts[block].places, self.views[block], strict=True):
            place.parameter.data = view

    def release(self) -> None:
        """Parameters become tensors of their own again, and the file goes."""
        for layout, views in zip(self.layouts, self.views, strict=True):
            for place, view in zip(layout.places, views, strict=True):
                own = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype)
                place.parameter.data = own.copy_(view)
        self.views = []
        self.remove()


def _spec(block: Block, layout: Layout, extents: list[_core.Extent]) -> _core.BlockSpec:
    residence = {
        None: _core.Residence.automatic,
        True: _core.Residence.streamed,
        False: _core.Residence.resident,
    }[block.streamed]
    return _core.BlockSpec(", ".join(block.entries), layout.nbytes, extents, residence)


def empty_specs(model: nn.Module, blocks: Sequence[Block]) -> list[_core.BlockSpec]:
    """The blocks as an engine sees their sizes, with no bytes behind them."""
    parameters = dict(model.named_parameters())
    return [_spec(block, _lay_out(block, parameters, (), 0, 0), []) for block in blocks]


def _lay_out(
    block: Block,
    parameters: Mapping[str, nn.Parameter],
    on_host: Container[str],
    in_file: int,
    in_memory: int,
) -> Layout:
    places: list[Place] = []
    end = 0

    def add(names: list[str], host: bool) -> int:
        nonlocal end
        begin = end
        for name in names:
            parameter = parameters[name]
            nbytes = parameter.numel() * parameter.element_size()
            places.append(Place(parameter, end, nbytes, _dense_strides(parameter), host))
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return end - begin

    file = add([n for n in block.parameters if n not in on_host], False)
    if file:
        end = _pages(end)  # direct reads write whole pages
    begin = end
    memory = add([n for n in block.parameters if n in on_host], True)
    # Without parameters in memory the block ends where those of the file do.
    return Layout(places, end if memory else file, (0, in_file, file), (begin, in_memory, memory))


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own strides where its elements fill its storage without gaps, else contiguous ones."""
    return tuple(torch.empty_like(tensor, device="meta").stride())
