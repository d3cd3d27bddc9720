"""How each block is read: where it lies already, gathered, from a file or memory of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _core
from ..tensor_files import Mapped
from .device import HostMemory, SeparateDevice
from .places import PAGE, Place, dense_strides, packed, views_of

LARGE_PAGE = 2 << 20
# Below this much, memory is counted in small pages: large ones would be more than what is in them.
SMALL = 256 << 20
# A block is read where it lies if so much of what is read is its own, and its parts are so large:
# a disk needs about as long for a read of its own as for half of these bytes.
USED = 0.9
PART = 512 << 10


@dataclass
class Home:
    """Where a block's bytes are: extents of files. `kind` says whose.

    What waits in memory for a device apart is a file too, and `memory` what the device copies from.
    """

    kind: str
    files: list[_core.FileSource]
    extents: list[_core.Extent]
    memory: HostMemory | None = None

    def mapped(self, size: int) -> Mapped:
        """Its private mapping, which parameters are views of."""
        return Mapped(self.files, _core.FileMapping(self.files, self.extents, size))


@dataclass
class Waiting:
    """The part of a block that waits in memory: where it begins in the block, and its places."""

    offset: int
    size: int
    places: list[Place]  # by offset in the block
    memory: _core.HostStore

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], after: int) -> Waiting:
        """These parameters, behind so many bytes of their block."""
        # Direct reads of what comes before it write whole pages.
        offset = -(-after // PAGE) * PAGE
        laid, size = packed(parameters)
        places = [place._replace(offset=offset + place.offset) for place in laid]
        memory = _core.HostStore(size, PAGE if size < SMALL else LARGE_PAGE)
        part = cls(offset, size, places, memory)
        part.write()
        return part

    def write(self) -> None:
        """Take what the parameters hold now."""
        run = torch.frombuffer(self.memory, dtype=torch.uint8)
        for place in self.places:
            place._replace(offset=place.offset - self.offset).view(run).copy_(
                place.parameter.detach()
            )

    def views(self) -> list[Tensor]:
        """Of each place, in order."""
        return views_of(self.memory, self.places, self.offset)


class Plan:
    """One block before it is in the store: what is where, and what is to be written."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        origins: list[tuple[_core.FileSource, int] | None],
    ) -> None:
        self.parameters, self.origins = parameters, origins
        self.files = unique(origin[0] for origin in origins if origin is not None)
        self.places: list[Place] = []
        self.size = 0
        self.extents: list[_core.Extent] = []
        self.fresh: list[Place] = []  # to be written, by place in what is written
        self.fresh_size = 0
        self.gathered = False
        self.own: _core.FileSource | None = None
        self.own_offset = 0
        self.cached: _core.BlockFile | None = None
        self.memory: HostMemory | None = None

    def pack(self) -> None:
        """All parameters one after another, in one run."""
        self.places, self.size = packed(self.parameters)
        if not self.gathered:
            self.fresh, self.fresh_size = self.places, self.size

    def in_place(self) -> bool:
        """Lie as the files have it; False where that would be slow."""
        fresh = [p for p, at in zip(self.parameters, self.origins, strict=True) if at is None]
        laid, fresh_size = packed(fresh)
        rest = iter(laid)
        own = len(self.files)
        ranges = []
        for parameter, origin in zip(self.parameters, self.origins, strict=True):
            nbytes = parameter.numel() * parameter.element_size()
            where = (own, next(rest).offset) if origin is None else None
            if origin is not None:
                where = (self.files.index(origin[0]), origin[1])
            assert where is not None
            ranges.append((*where, nbytes, parameter.element_size()))
        layout = _core.block_layout(ranges)
        parts = len(layout.extents)
        useful = sum(r[2] for r in ranges) >= layout.bytes * USED
        if not layout.direct or not useful or (parts > 1 and layout.bytes < parts * PART):
            return False
        self.places = [
            Place(p, at, r[2], dense_strides(p))
            for p, at, r in zip(self.parameters, layout.places, ranges, strict=True)
        ]
        self.size, self.extents = layout.bytes, layout.extents
        self.fresh, self.fresh_size = laid, fresh_size
        return True

    def home(self) -> Home:
        """Where it lies, after all that was to be written is."""
        if not self.parameters:
            return Home("memory", [], [])
        if not self.extents:
            assert self.own is not None
            kind = "own" if self.cached is None else "gathered"
            extents = [_core.Extent(0, self.own_offset, 0, self.size)]
            if self.memory is not None:
                kind = "memory"
            return Home(kind, [self.own], extents, self.memory)
        files = list(self.files)
        extents = self.extents
        if self.own is not None:
            files.append(self.own)
            # What was laid out before the file was there begins where it came to lie.
            extents = [
                _core.Extent(e.source, e.source_offset + self.own_offset, e.block_offset, e.bytes)
                if e.source == len(self.files)
                else e
                for e in extents
            ]
        return Home("in place and own" if self.own else "in place", files, extents)


def in_memory(places: Sequence[Place], size: int, device: SeparateDevice) -> Home:
    """A block's values now, in memory of the host that the device copies from."""
    memory = HostMemory(size, device)
    for place in places:
        place.view(memory.bytes).copy_(place.parameter.detach())
    return Home("memory", [memory.seal()], [_core.Extent(0, 0, 0, size)], memory)


def unique(files: Iterable[_core.FileSource]) -> list[_core.FileSource]:
    """Each file once, told apart as objects."""
    return list({id(file): file for file in files}.values())
