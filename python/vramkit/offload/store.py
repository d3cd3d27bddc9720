"""Where a model's parameters live while it is offloaded: blocks of files, and views of them.

A block is read from where its tensors are already: from the files that the model was mapped from,
where they lie there as the engine wants them. Tensors that lie scattered there are gathered into a
file in the cache once, and later loads find it. What is in memory only, or was changed, goes to
files of the store's own, which have no name and end with the process. Files that the model came
from are never written to.

The parameters of the model stay parameters: they become views of private mappings of their blocks,
from which `state_dict`, `deepcopy` and `save` read them as ever. Those that are to wait in the
host's memory instead are views of large pieces of that.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _core
from ..convert import Progress, progress_bar
from ..tensor_files import Mapped, ModelFiles
from .blocks import Block

PAGE = 4096
LARGE_PAGE = 2 << 20
# Below this much, memory is counted in small pages: large ones would be more than what is in them.
SMALL = 256 << 20
ALIGNMENT = 64  # of each parameter in its block: what kernels like best

# A block is read where it lies if so much of what is read is its own, and its parts are so large:
# a disk needs about as long for a read of its own as for half of these bytes.
USED = 0.9
PART = 512 << 10


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


@dataclass
class _Home:
    """Where a block's bytes are: extents of files. `kind` says whose."""

    kind: str
    files: list[_core.FileSource]
    extents: list[_core.Extent]

    def mapped(self, size: int) -> Mapped:
        return Mapped(self.files, _core.FileMapping(self.files, self.extents, size))


@dataclass
class _Waiting:
    """The part of a block that waits in memory: where it begins in the block, and its places."""

    offset: int
    size: int
    places: list[Place]  # by offset in the block
    memory: _core.HostStore

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], after: int) -> _Waiting:
        # Direct reads of what comes before it write whole pages.
        offset = -(-after // PAGE) * PAGE
        packed, size = _packed(parameters)
        places = [place._replace(offset=offset + place.offset) for place in packed]
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
        return _views(self.memory, self.places, self.offset)


class BlockStore:
    """The blocks' files and their mappings.

    Making one moves the parameters of the blocks into it, and copies into memory what is mapped and
    in no block. Raises OSError where a file cannot be written, BudgetError where the cache has no
    room; the model is as it was then.

    Attributes:
        places: Of each block's parameters.
        sizes: Of each block, in bytes.
        views: Of each block's parameters, in the mapping.
        nbytes: Of all blocks, in whole pages.
        folder: Where files are written.
        state: Another number whenever a block lies elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        folder: str | os.PathLike[str],
        progress: bool | Progress = False,
        on_host: Container[str] = (),
    ) -> None:
        self.folder = Path(folder)
        self.state = 0
        self._own_path: Path | None = None
        self._model = weakref.ref(model)
        self._found = ModelFiles.of(model)
        self._own_files: list[_core.FileSource] = []
        parameters = dict(model.named_parameters())
        plans = [
            self._planned([parameters[name] for name in block.parameters if name not in on_host])
            for block in blocks
        ]
        self._write_own(plans, [block.entries[0] for block in blocks], progress)
        self._gather(plans)
        waiting = [[parameters[n] for n in block.parameters if n in on_host] for block in blocks]
        staying = self._staying(model, plans, waiting)
        self._waiting = [
            _Waiting.of(found, plan.size) if found else None
            for found, plan in zip(waiting, plans, strict=True)
        ]
        self._homes = [plan.home() for plan in plans]
        self._cached = [plan.cached for plan in plans]
        self._mapped = [
            home.mapped(plan.size) for home, plan in zip(self._homes, plans, strict=True)
        ]
        self.places = [plan.places for plan in plans]
        self.sizes = [plan.size for plan in plans]
        self.views = [
            _views(mapped.mapping, places)
            for mapped, places in zip(self._mapped, self.places, strict=True)
        ]
        for index, part in enumerate(self._waiting):
            if part is not None:
                self.places[index] = self.places[index] + part.places
                self.sizes[index] = part.offset + part.size
                self.views[index] += part.views()
        self.nbytes = sum(-(-size // PAGE) * PAGE for size in self.sizes)
        for parameter, tensor in staying:
            parameter.data = tensor
        self.point_to_store()
        self._register(ModelFiles(self._mapped, self._found.cache_bytes, self._own_files))

    def _planned(self, parameters: Sequence[nn.Parameter]) -> _Plan:
        origins = [self._found.find(p) if p.numel() else None for p in parameters]
        plan = _Plan(list(parameters), origins)
        if all(origin is None for origin in origins):
            plan.pack()
        elif not plan.in_place():
            # Without a cache, and where some are in memory only, the store has a copy of its own.
            plan.gathered = self._found.cache_bytes > 0 and all(
                (origin is not None and origin[0] not in self._found.own) or not p.numel()
                for p, origin in zip(parameters, origins, strict=True)
            )
            plan.pack()
        return plan

    def _write_own(
        self, plans: Sequence[_Plan], labels: Sequence[str], progress: bool | Progress
    ) -> None:
        """What is in memory only goes to a file of its own, which nobody else can open."""
        wanted = [plan for plan in plans if plan.fresh]
        if not wanted:
            return
        total = sum(plan.fresh_size for plan in wanted)
        with _OwnFile(self.folder) as file, progress_bar(progress, total, "offload") as advance:
            for plan, label in zip(plans, labels, strict=True):
                if plan.fresh:
                    plan.own_offset = file.append(_run(plan.fresh, plan.fresh_size))
                    advance(plan.fresh_size, label)
            source = file.source()
            kept = file.keep()
        weakref.finalize(self, kept.close)
        self._own_path = Path(f"/proc/self/fd/{kept.fileno()}")
        self._own_files.append(source)
        for plan in wanted:
            plan.own = source

    def _gather(self, plans: Sequence[_Plan]) -> None:
        """What lies scattered in the model's files is gathered into one file of the cache."""
        wanted = [plan for plan in plans if plan.gathered]
        if not wanted:
            return
        files = _unique(file for plan in wanted for file in plan.files)
        specs = []
        for number, plan in enumerate(wanted):
            extents = [
                _core.Extent(files.index(origin[0]), origin[1], place.offset, place.nbytes)
                for place, origin in zip(plan.places, plan.origins, strict=True)
                if origin is not None
            ]
            specs.append(_core.BlockSpec(str(number), plan.size, extents))
        cache = _core.BlockCache(str(self.folder / "gathered"), self._found.cache_bytes)
        built = cache.open(files, specs)
        source = _core.FileSource(built.path)
        for plan, offset in zip(wanted, built.offsets, strict=True):
            plan.cached, plan.own, plan.own_offset = built, source, offset

    def _staying(
        self,
        model: nn.Module,
        plans: Sequence[_Plan],
        waiting: Sequence[Sequence[nn.Parameter]],
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Mapped parameters that are in no block, in memory of their own."""
        moved = {id(p) for plan in plans for p in plan.parameters}
        moved |= {id(p) for found in waiting for p in found}
        found, files, runs = [], list[_core.FileSource](), []
        for parameter in model.parameters():
            if id(parameter) in moved or not self._found.holds(parameter):
                continue
            origin = self._found.find(parameter)
            if origin is None:
                found.append((parameter, parameter.detach().clone()))
                continue
            tensor = torch.empty_like(parameter, requires_grad=False)
            files.append(origin[0])
            runs.append((len(files) - 1, origin[1], tensor.nbytes, tensor.data_ptr()))
            found.append((parameter, tensor))
        _core.read_runs(files, runs)
        return found

    def _register(self, files: ModelFiles | None) -> None:
        model = self._model()
        if model is None:
            return
        for module in model.modules():
            module.__dict__.pop("vramkit_files", None)
        if files is not None:
            object.__setattr__(model, "vramkit_files", files)

    @property
    def path(self) -> Path:
        """A file that blocks are read from: the store's own, if it has one."""
        if self._own_path is not None:
            return self._own_path
        return Path(next(file.name for home in self._homes for file in home.files))

    def successor(self, blocks: Sequence[Block]) -> BlockStore:
        """A store for other blocks of the model; what waited in memory still does."""
        model = self._model()
        assert model is not None
        waiting = {id(p.parameter) for part in self._waiting if part for p in part.places}
        names = {name for name, p in model.named_parameters() if id(p) in waiting}
        return BlockStore(model, blocks, self.folder, on_host=names)

    def mapped_places(self, block: int) -> int:
        """How many of the block's places, the first ones, are of a file; the others wait."""
        part = self._waiting[block]
        return len(self.places[block]) - (len(part.places) if part is not None else 0)

    def origins(self) -> list[str]:
        """How each block is read: "in place", "gathered" (from the cache), "own", or two."""
        return [home.kind for home in self._homes]

    def plan(self, blocks: Sequence[Block]) -> tuple[list[_core.Source], list[_core.BlockSpec]]:
        """The blocks as the engine takes them, and what it reads them from."""
        files: list[_core.Source] = []
        files += _unique(file for home in self._homes for file in home.files)
        specs = []
        for block, size, home, part in zip(
            blocks, self.sizes, self._homes, self._waiting, strict=True
        ):
            extents = [
                _core.Extent(files.index(home.files[e.source]), e.source_offset, e.block_offset,
                             e.bytes)
                for e in home.extents
            ]  # fmt: skip
            if part is not None:
                extents.append(_core.Extent(len(files), 0, part.offset, part.size))
                files.append(part.memory.source())
            specs.append(_spec(block, size, extents))
        return files, specs

    def check(self) -> None:
        """Raises FileChangedError if somebody wrote to a file that blocks are read from."""
        for home in self._homes:
            for file in home.files:
                file.check()

    def point_to_store(self) -> None:
        """Every parameter is a view of the mapping."""
        for places, views in zip(self.places, self.views, strict=True):
            for place, view in zip(places, views, strict=True):
                place.parameter.data = view

    def rewrite(self, block: int) -> None:
        """Write what the block's parameters hold now to a file of its own, and map that.

        Raises OSError where there is no room; nothing has changed then.
        """
        self.state += 1
        part = self._waiting[block]
        # As they lie now: arithmetic on other strides may round otherwise.
        self.places[block] = [
            p._replace(stride=_dense_strides(p.parameter)) for p in self.places[block]
        ]
        if part is not None:
            part.places = self.places[block][-len(part.places) :]
        places = self.places[block]
        if part is not None:
            part.write()
            places = places[: -len(part.places)]
        if places:
            size = self.sizes[block] if part is None else part.offset
            with _OwnFile(self.folder) as file:
                file.append(_run(places, size))
                source = file.source()
            home = _Home("own", [source], [_core.Extent(0, 0, 0, size)])
            mapped = home.mapped(size)
            self._homes[block], self._mapped[block], self._cached[block] = home, mapped, None
            # The file it was in goes with its last block.
            read = {id(file) for one in self._homes for file in one.files}
            self._own_files[:] = [f for f in self._own_files if id(f) in read] + [source]
            self.views[block] = _views(mapped.mapping, places)
        else:
            self.views[block] = []
        if part is not None:
            self.views[block] += part.views()
        for place, view in zip(self.places[block], self.views[block], strict=True):
            place.parameter.data = view

    @torch.inference_mode(False)
    def release(self) -> None:
        """Parameters become tensors of their own again, and the store's files go.

        Raises FileChangedError, with nothing changed: to read a mapping that has no file behind it
        any more would end the process.
        """
        self.check()
        for places, views in zip(self.places, self.views, strict=True):
            for place, view in zip(places, views, strict=True):
                _move_out(place, view)
        self.discard()
        self._register(None)

    def undo(self) -> None:
        """As before the store was made: tensors in memory, or views of the model's files."""
        for mapped, places, views in zip(self._mapped, self.places, self.views, strict=True):
            for place, view in zip(places, views, strict=True):
                found = mapped.mapping.find(view.data_ptr(), place.nbytes)
                if found is None or mapped.files[found.source] in self._own_files:
                    _move_out(place, view)
        kept = [m for m in self._mapped if any(f not in self._own_files for f in m.files)]
        self._register(ModelFiles(kept, self._found.cache_bytes) if kept else None)
        self.discard()

    def discard(self) -> None:
        """The store's files go; what its parameters hold is in another store."""
        self.views, self._mapped, self._homes, self._cached, self._waiting = [], [], [], [], []


def _move_out(place: Place, view: Tensor) -> None:
    now = place.parameter.data
    if now.data_ptr() == view.data_ptr():  # else it has memory of its own already
        own = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype)
        place.parameter.data = own.copy_(now)


class _Plan:
    """One block before it is in the store: what is where, and what is to be written."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        origins: list[tuple[_core.FileSource, int] | None],
    ) -> None:
        self.parameters, self.origins = parameters, origins
        self.files = _unique(origin[0] for origin in origins if origin is not None)
        self.places: list[Place] = []
        self.size = 0
        self.extents: list[_core.Extent] = []
        self.fresh: list[Place] = []  # to be written, by place in what is written
        self.fresh_size = 0
        self.gathered = False
        self.own: _core.FileSource | None = None
        self.own_offset = 0
        self.cached: _core.BlockFile | None = None

    def pack(self) -> None:
        """All parameters one after another, in one run."""
        self.places, self.size = _packed(self.parameters)
        if not self.gathered:
            self.fresh, self.fresh_size = self.places, self.size

    def in_place(self) -> bool:
        """Lie as the files have it; False where that would be slow."""
        fresh = [p for p, at in zip(self.parameters, self.origins, strict=True) if at is None]
        packed, fresh_size = _packed(fresh)
        rest = iter(packed)
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
            Place(p, at, r[2], _dense_strides(p))
            for p, at, r in zip(self.parameters, layout.places, ranges, strict=True)
        ]
        self.size, self.extents = layout.bytes, layout.extents
        self.fresh, self.fresh_size = packed, fresh_size
        return True

    def home(self) -> _Home:
        if not self.parameters:
            return _Home("memory", [], [])
        if not self.extents:
            assert self.own is not None
            kind = "own" if self.cached is None else "gathered"
            return _Home(kind, [self.own], [_core.Extent(0, self.own_offset, 0, self.size)])
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
        return _Home("in place and own" if self.own else "in place", files, extents)


class _OwnFile:
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
        self._file.truncate(max(self._end, PAGE))
        self._file.flush()
        return _core.FileSource(self._path)

    def __enter__(self) -> _OwnFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()  # sources have it open


def _unique(files: Iterable[_core.FileSource]) -> list[_core.FileSource]:
    return list({id(file): file for file in files}.values())


def _spec(block: Block, size: int, extents: list[_core.Extent]) -> _core.BlockSpec:
    residence = {
        None: _core.Residence.automatic,
        True: _core.Residence.streamed,
        False: _core.Residence.resident,
    }[block.streamed]
    return _core.BlockSpec(", ".join(block.entries), size, extents, residence)


def empty_specs(model: nn.Module, blocks: Sequence[Block]) -> list[_core.BlockSpec]:
    """The blocks as an engine sees their sizes, with no bytes behind them."""
    parameters = dict(model.named_parameters())
    return [_spec(b, _packed([parameters[n] for n in b.parameters])[1], []) for b in blocks]


def _packed(parameters: Sequence[nn.Parameter]) -> tuple[list[Place], int]:
    places, size = [], 0
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.element_size()
        places.append(Place(parameter, size, nbytes, _dense_strides(parameter)))
        size += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return places, size


@torch.inference_mode(False)  # parameters are ordinary tensors wherever they are made
def _views(
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


def _run(places: Sequence[Place], size: int) -> memoryview:
    run = torch.zeros(size, dtype=torch.uint8)
    for place in places:
        place.view(run).copy_(place.parameter.detach())
    return run.numpy().data


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own strides where its elements fill its storage without gaps, else contiguous ones."""
    return tuple(torch.empty_like(tensor, device="meta").stride())
