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
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _core
from ..convert import Progress, progress_bar
from ..tensor_files import ModelFiles
from .blocks import Block
from .device import HOST, HostDevice, SeparateDevice
from .homes import Home, Plan, Waiting, in_memory, unique
from .places import PAGE, OwnFile, Place, dense_strides, packed, run_of, views_of


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
        device: HostDevice = HOST,
        origins: Mapping[int, torch.device] | None = None,
    ) -> None:
        self.device = device
        # Of each parameter (by id): where it was before any store had it.
        self._came_from = dict(origins or {})
        self.folder = Path(folder)
        self.state = 0
        self._own_path: Path | None = None
        self._model = weakref.ref(model)
        self._found = ModelFiles.of(model)
        self._own_files: list[_core.FileSource] = []
        parameters = dict(model.named_parameters())
        for block in blocks:
            for name in block.parameters:
                self._came_from.setdefault(id(parameters[name]), parameters[name].device)
        if isinstance(device, SeparateDevice):
            # A block is in one piece for the device's copies: a part of one waits with the rest.
            whole = [all(name in on_host for name in block.parameters) for block in blocks]
            on_host = ()
        else:
            whole = [False] * len(blocks)
        plans = [
            self._planned(
                [parameters[name] for name in block.parameters if name not in on_host], waits
            )
            for block, waits in zip(blocks, whole, strict=True)
        ]
        self._keep_in_memory([p for p, waits in zip(plans, whole, strict=True) if waits], progress)
        self._write_own(plans, [block.entries[0] for block in blocks], progress)
        self._gather(plans)
        waiting = [[parameters[n] for n in block.parameters if n in on_host] for block in blocks]
        staying = self._staying(model, plans, waiting)
        self._waiting = [
            Waiting.of(found, plan.size) if found else None
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
            views_of(mapped.mapping, places)
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

    def _planned(self, parameters: Sequence[nn.Parameter], waits: bool) -> Plan:
        origins = [self._found.find(p) if p.numel() and not waits else None for p in parameters]
        plan = Plan(list(parameters), origins)
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

    def _keep_in_memory(self, plans: Sequence[Plan], progress: bool | Progress) -> None:
        """Blocks that wait in memory of the host which the device copies from by itself."""
        if not plans:
            return
        assert isinstance(self.device, SeparateDevice)
        total = sum(plan.size for plan in plans)
        with progress_bar(progress, total, "offload") as advance:
            for number, plan in enumerate(plans):
                home = in_memory(plan.places, plan.size, self.device)
                plan.memory, plan.own = home.memory, home.files[0]
                plan.fresh = []
                self._own_files.append(plan.own)
                advance(plan.size, str(number))

    def _write_own(
        self, plans: Sequence[Plan], labels: Sequence[str], progress: bool | Progress
    ) -> None:
        """What is in memory only goes to a file of its own, which nobody else can open."""
        wanted = [plan for plan in plans if plan.fresh]
        if not wanted:
            return
        total = sum(plan.fresh_size for plan in wanted)
        with OwnFile(self.folder) as file, progress_bar(progress, total, "offload") as advance:
            for plan, label in zip(plans, labels, strict=True):
                if plan.fresh:
                    plan.own_offset = file.append(run_of(plan.fresh, plan.fresh_size))
                    advance(plan.fresh_size, label)
            source = file.source()
            kept = file.keep()
        weakref.finalize(self, kept.close)
        self._own_path = Path(f"/proc/self/fd/{kept.fileno()}")
        self._own_files.append(source)
        for plan in wanted:
            plan.own = source

    def _gather(self, plans: Sequence[Plan]) -> None:
        """What lies scattered in the model's files is gathered into one file of the cache."""
        wanted = [plan for plan in plans if plan.gathered]
        if not wanted:
            return
        files = unique(file for plan in wanted for file in plan.files)
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
        plans: Sequence[Plan],
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
        for home, places in zip(self._homes, self.places, strict=True):
            if home.memory is not None:
                waiting |= {id(place.parameter) for place in places}
        names = {name for name, p in model.named_parameters() if id(p) in waiting}
        names |= {
            name
            for block in blocks
            if any(name in names for name in block.parameters)
            for name in block.parameters
            if isinstance(self.device, SeparateDevice)
        }
        return BlockStore(
            model, blocks, self.folder, on_host=names, device=self.device, origins=self._came_from
        )

    def mapped_places(self, block: int) -> int:
        """How many of the block's places, the first ones, are of a file; the others wait."""
        part = self._waiting[block]
        return len(self.places[block]) - (len(part.places) if part is not None else 0)

    @property
    def reads_files(self) -> bool:
        """Whether any block is read from a file on a disk."""
        return any(home.memory is None and home.files for home in self._homes)

    def origins(self) -> list[str]:
        """How each block is read: "in place", "gathered", "own", "memory" (pinned), or two."""
        return [home.kind for home in self._homes]

    def plan(self, blocks: Sequence[Block]) -> tuple[list[_core.Source], list[_core.BlockSpec]]:
        """The blocks as the engine takes them, and what it reads them from."""
        files: list[_core.Source] = []
        files += unique(f for home in self._homes if home.memory is None for f in home.files)
        specs = []
        for block, size, home, part in zip(
            blocks, self.sizes, self._homes, self._waiting, strict=True
        ):
            if home.memory is not None:
                specs.append(_spec(block, size, [_core.Extent(len(files), 0, 0, size)]))
                files.append(home.memory.source())
                continue
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
            p._replace(stride=dense_strides(p.parameter)) for p in self.places[block]
        ]
        if part is not None:
            part.places = self.places[block][-len(part.places) :]
        places = self.places[block]
        if part is not None:
            part.write()
            places = places[: -len(part.places)]
        if places:
            size = self.sizes[block] if part is None else part.offset
            if self._homes[block].memory is not None:
                assert isinstance(self.device, SeparateDevice)
                home = in_memory(places, size, self.device)
                source = home.files[0]
            else:
                with OwnFile(self.folder) as file:
                    file.append(run_of(places, size))
                    source = file.source()
                home = Home("own", [source], [_core.Extent(0, 0, 0, size)])
            mapped = home.mapped(size)
            self._homes[block], self._mapped[block], self._cached[block] = home, mapped, None
            # The file it was in goes with its last block.
            read = {id(file) for one in self._homes for file in one.files}
            self._own_files[:] = [f for f in self._own_files if id(f) in read] + [source]
            self.views[block] = views_of(mapped.mapping, places)
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
        found = [self._moved_out(*pair) for pair in self._pairs()]
        for one in found:
            if one is not None:
                one[0].data = one[1]
        self.discard()
        self._register(None)

    def undo(self) -> None:
        """As before the store was made: tensors in memory, or views of the model's files."""
        for mapped, places, views in zip(self._mapped, self.places, self.views, strict=True):
            for place, view in zip(places, views, strict=True):
                found = mapped.mapping.find(view.data_ptr(), place.nbytes)
                if found is None or mapped.files[found.source] in self._own_files:
                    own = self._moved_out(place, view)
                    if own is not None:
                        own[0].data = own[1]
        kept = [m for m in self._mapped if any(f not in self._own_files for f in m.files)]
        self._register(ModelFiles(kept, self._found.cache_bytes) if kept else None)
        self.discard()

    def _pairs(self) -> Iterator[tuple[Place, Tensor]]:
        for places, views in zip(self.places, self.views, strict=True):
            yield from zip(places, views, strict=True)

    def _moved_out(self, place: Place, view: Tensor) -> tuple[nn.Parameter, Tensor] | None:
        """A parameter's values in memory of their own, where they were before; None: they are."""
        now = place.parameter.data
        if now.data_ptr() != view.data_ptr():
            return None
        where = self._came_from.get(id(place.parameter), view.device)
        own = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=where)
        return place.parameter, own.copy_(now)

    def discard(self) -> None:
        """The store's files go; what its parameters hold is in another store."""
        self.views, self._mapped, self._homes, self._cached, self._waiting = [], [], [], [], []


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
    return [_spec(b, packed([parameters[n] for n in b.parameters])[1], []) for b in blocks]
