"""Offloading switched on and off: from a model, or a pipeline of them, and a limit to a session."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core
from ..convert import Progress
from ..errors import BudgetError
from ..estimator import estimate, weight_bytes
from ..first_run import by_name
from ..probing import cache_folder
from ..sizes import format_size, parse_size
from .blocks import Block, Division, divide, touches_of
from .device import HOST, HostDevice, SeparateDevice, device_for
from .lent import Lent, Uncompiled, not_a_graph
from .pipeline import PipelineSession, Turns, components_of
from .pressure import Pressure, PressureEvent
from .session import OffloadSession
from .store import BlockStore, empty_specs

SLOTS, DEPTH, THREADS = 3, 1, 2


# (most bytes of a block, ids of parameters that are streamed, ids of those that wait on the host):
# what a plan says of a component. Its other parameters stay for the length of its turn.
Places = tuple[int | None, Collection[int], Collection[int]]


@dataclass(frozen=True)
class Settings:
    """What a user asked for, in bytes; what is decided once for all blocks."""

    limit: int
    buffer: int
    folder: str
    pressure: bool | Callable[[PressureEvent], None] = True
    slots: int = SLOTS
    on_host: Collection[str] | None = None
    progress: bool | Progress = False
    device: HostDevice = HOST


def enable_vram_management(
    model: Any,
    vram_limit: int | float | str | None = None,
    vram_buffer: int | float | str = 0.5,
    *,
    inputs: Any = None,
    folder: str | os.PathLike[str] | None = None,
    pressure: bool | Callable[[PressureEvent], None] = True,
    skip: Collection[str] = (),
    progress: bool | Progress = False,
    device: str | torch.device | None = None,
) -> Any:
    """Keep at most `vram_limit` of the model's weights in memory; the rest is read when needed.

    Args:
        model: A module, plain or converted, on the CPU or `device`; or a pipeline: an object that
            holds modules, which then take turns. Changed in place, and returned.
        vram_limit: Bounds the weights in memory: a number of GiB, or text such as "6 GB". None: all
            the memory that is available now.
        vram_buffer: Kept free within the limit.
        inputs: One call's inputs (or their shapes, as for `vramkit.estimate`), from which is seen
            which weights a call uses, and in what order. Without, the first call's inputs serve.
            For a pipeline a dict: by component's name, those of its call.
        folder: Where the weights are written, on a disk (by default the user's cache folder).
        pressure: Whether blocks that stay in memory are given up when it runs short, for other
            processes or for a call of this model, and taken back later; a function is told of it.
        skip: Components of a pipeline that stay in memory whole.
        progress: True for a progress bar of the writing, or a function of (bytes done, bytes in
            all, module).
        device: Where the model computes: "cpu" (by default), "cuda" or "cuda:1". On a GPU the limit
            bounds everything there, torch's tensors too, whose share is capped; blocks wait in
            pinned memory of the host as far as that has room, else in the file; inputs are moved.

    On the CPU, the weights are written to one file, which goes with the session, and read from it
    block by block, ahead of need, past the page cache where the file is not in it. The limit bounds
    weights: a call's own memory comes on top. ``model.vramkit_session`` has `stats`, `resize`,
    `disable`.

    The parameters stay parameters, views of the file: they can be read, copied, saved and changed
    at any time. Raises BudgetError, which says the smallest limit that would do; ValueError where
    a call cannot be followed on fake tensors, for models on other devices, and where nothing can be
    moved; OSError where the file cannot be written. The model is as it was then.
    """
    if getattr(model, "vramkit_session", None) is not None:
        raise ValueError("this model is offloaded already; model.vramkit_session.disable() first")
    on = device_for(device)
    limit = available(on) if vram_limit is None else parse_size(vram_limit)
    where = os.fspath(folder) if folder is not None else str(cache_folder() / "blocks")
    settings = Settings(
        limit, parse_size(vram_buffer), where, pressure, progress=progress, device=on
    )
    # A module that has no forward is a bag of components. (A compiled one has it as an attribute.)
    whole = isinstance(model, nn.Module) and (
        type(model).forward is not nn.Module.forward or "forward" in vars(model)
    )
    if not whole:
        enable_pipeline(model, components_of(model), settings, inputs, skip)
        return model
    if skip:
        raise ValueError("skip= names components of a pipeline; this is one module")
    in_reach(model, on)

    def begin(call: Any) -> None:
        with on_the_host(model, on):
            call = inputs_on_host(call, on)
            division = divide(model, touches_of(model, call))
            needs = call_bytes(model, call, on)
        start(model, division, replace(settings, buffer=settings.buffer + needs))

    if inputs is not None:
        begin(inputs)
    else:
        at_first_call(model, begin)
    return model


def enable_pipeline(
    pipeline: Any,
    components: Mapping[str, nn.Module],
    settings: Settings,
    inputs: Any,
    skip: Collection[str],
    places: Mapping[str, Places] | None = None,
) -> PipelineSession:
    """Components that take turns within one limit; raises as `enable_vram_management`."""
    if inputs is not None and not (isinstance(inputs, Mapping) and set(inputs) <= set(components)):
        raise ValueError(
            f"the inputs of a pipeline are a dict by component, of {', '.join(components)}"
        )
    unknown = set(skip) - set(components)
    if unknown:
        raise ValueError(f"skip= names {min(unknown)!r}, of {', '.join(components)}")
    for module in components.values():
        in_reach(module, HOST)
    turns = Turns(settings.limit - settings.buffer, settings.buffer)
    session = PipelineSession(pipeline, components, turns, settings.folder, skip, settings.device)
    try:
        for name, module in session.moved.items():
            asked = places[name] if places is not None else None
            session.watch(name, module, _starter(settings, session, asked))
            if inputs is not None and name in inputs:
                session.call(name, inputs[name])
    except BaseException:
        session.disable()
        raise
    object.__setattr__(pipeline, "vramkit_session", session)
    return session


def _starter(
    settings: Settings, session: PipelineSession, places: Places | None
) -> Callable[[nn.Module, Any], OffloadSession]:
    def begin(module: nn.Module, inputs: Any) -> OffloadSession:
        cap, streamed_ids, host_ids = places if places is not None else (None, None, None)
        names = {id(p): n for n, p in module.named_parameters()}
        streamed = None
        if streamed_ids is not None:
            streamed = {n for i, n in names.items() if i in streamed_ids}
        on_host = None
        if host_ids is not None:
            on_host = {n for i, n in names.items() if i in host_ids}
        taken = session.names_taken(module)
        with on_the_host(module, settings.device):
            inputs = inputs_on_host(inputs, settings.device)
            touches = touches_of(module, inputs)
            needs = 0 if places is not None else call_bytes(module, inputs, settings.device)
        division = divide(module, touches, cap, stay=taken, streamed=streamed)
        if not division.blocks:  # a layer that is called by itself
            own = [n for n in names.values() if n not in taken]
            size = sum(
                p.numel() * p.element_size() for n, p in module.named_parameters() if n in own
            )
            division = Division([Block(own, [""], size)], [0], list(taken.items()))
        moved = {n for block in division.blocks for n in block.parameters}
        stay = [p for n, p in module.named_parameters() if n not in moved]
        turns = session.turns
        before = turns.fixed_bytes
        turns.settle(turns.room, before + session.waiting_bytes(stay))
        try:
            mine = replace(settings, limit=turns.room, buffer=needs, on_host=on_host)
            found = start(module, division, mine, turns=turns)
        except BaseException:
            turns.settle(turns.room, before)
            raise
        turns.sessions.append(found)
        return found

    return begin


def in_reach(model: nn.Module, device: HostDevice) -> None:
    """ValueError for a model that is neither on the CPU nor on the device."""
    reach = {torch.device("cpu"), device.torch}
    elsewhere = {p.device for p in (*model.parameters(), *model.buffers())} - reach
    if elsewhere:
        names = " or ".join(sorted(str(d) for d in reach))
        raise ValueError(
            f"the model is on {min(map(str, elsewhere))}, and can be offloaded from {names}: move "
            "it to the CPU first, or say device="
        )


def inputs_on_host(call: Any, device: HostDevice) -> Any:
    """A call's inputs as a trace takes them."""
    if not device.apart:
        return call
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.cpu() if t.device == device.torch else t, call
    )


@contextlib.contextmanager
def on_the_host(model: nn.Module, device: HostDevice) -> Iterator[None]:
    """Buffers of a model are on the host meanwhile, where calls are followed."""
    moved = [b for b in model.buffers() if device.apart and b.device == device.torch]
    before = [b.data for b in moved]
    try:
        for buffer in moved:
            buffer.data = buffer.data.cpu()
        yield
    finally:
        for buffer, data in zip(moved, before, strict=True):
            buffer.data = data


def call_bytes(model: nn.Module, call: Any, device: HostDevice) -> int:
    """What a call takes on a device apart, inputs too; 0 where the limit bounds weights alone."""
    if not isinstance(device, SeparateDevice):
        return 0
    found = estimate(model, inputs=call, target=device.target())
    assert found.activations_bytes is not None
    interval = found.activations_interval_bytes
    return found.inputs_bytes + (found.activations_bytes if interval is None else interval[1])


def at_first_call(model: nn.Module, begin: Callable[[Any], Any]) -> None:
    """`begin` with the inputs of the first call, before it runs; where it fails, nothing runs."""
    first = threading.Lock()

    @not_a_graph
    def around(lent: Lent, args: Any, kwargs: Any) -> Any:
        with Uncompiled() as compiler:
            with first:
                if model.__dict__.get("forward") is lent:  # else another thread was faster
                    lent.end(for_good=False)
                    try:
                        begin(by_name(model, args, kwargs))
                    except BaseException:
                        lent.begin()  # nothing runs whole unasked
                        raise
            return compiler.again(model.forward, args, kwargs)

    Lent(model, around)  # takes the place of the model's forward


def available(device: HostDevice) -> int:
    """Bytes that this process may still take."""
    found = device.free_bytes()
    if found is None:
        raise ValueError("this system does not say what memory is available; give vram_limit")
    return found


@torch.inference_mode(False)  # what it makes lasts longer than a call
def start(
    model: nn.Module, division: Division, settings: Settings, *, turns: Turns | None = None
) -> OffloadSession:
    """Move the blocks to a file, and lend them from there within the limit."""
    if not division.blocks:
        raise ValueError(
            "nothing of this model can be moved: its weights are used by the model itself, beside "
            "its modules"
        )
    moved = sum(block.nbytes for block in division.blocks)
    fixed = weight_bytes(model) - moved
    store = BlockStore(
        model,
        division.blocks,
        settings.folder,
        settings.progress,
        on_host=_waiting(division, settings),
        device=settings.device,
    )

    def make_engine(division: Division, store: BlockStore, room: int) -> _core.Engine:
        files, specs = store.plan(division.blocks)
        return _engine(files, specs, division, settings, room)

    try:
        session = OffloadSession(
            model,
            division,
            store,
            make_engine,
            limit=settings.limit,
            buffer_bytes=settings.buffer,
            fixed_bytes=fixed,
            turns=turns,
            device=settings.device,
        )
    except BudgetError as error:
        store.undo()
        always = fixed if turns is None else turns.fixed_bytes
        raise _no_room(error, always, settings) from None
    except BaseException:
        store.undo()
        raise
    if settings.pressure is False:
        session.pressure = None
    elif settings.pressure is not True:
        session.pressure = Pressure(session, settings.pressure)
    object.__setattr__(model, "vramkit_session", session)
    return session


def _waiting(division: Division, settings: Settings) -> Collection[str]:
    """Parameters that wait in memory of the host: what a plan says, else all that it has room for.

    None without a device apart: memory is what is short then.
    """
    if settings.on_host is not None:
        return settings.on_host
    if not isinstance(settings.device, SeparateDevice):
        return ()
    room = settings.device.host_room()
    found: list[str] = []
    for block in division.blocks:
        if block.nbytes <= room:
            room -= block.nbytes
            found += block.parameters
    return frozenset(found)


def _engine(
    sources: Sequence[_core.Source],
    specs: list[_core.BlockSpec],
    division: Division,
    settings: Settings,
    room: int,
) -> _core.Engine:
    moved = sum(block.nbytes for block in division.blocks)
    return _core.Engine(
        sources,
        specs,
        limit=room,
        order=division.order,
        depth=DEPTH,
        slots=settings.slots,
        threads=THREADS,
        granularity=settings.device.segment(moved),
        device=settings.device.engine_name,
    )


def check_room(model: nn.Module, division: Division, settings: Settings) -> None:
    """BudgetError if the blocks do not fit; the model may be one without memory."""
    fixed = weight_bytes(model) - sum(block.nbytes for block in division.blocks)
    specs = empty_specs(model, division.blocks)
    try:
        room = max(0, settings.limit - settings.buffer - fixed)
        _engine([], specs, division, settings, room).close()
    except BudgetError as error:
        raise _no_room(error, fixed, settings) from None


def _no_room(error: BudgetError, fixed: int, settings: Settings) -> BudgetError:
    needed = error.needed_bytes + fixed + settings.buffer
    return BudgetError(
        f"no room for the slots within {format_size(settings.limit)}: the smallest limit that "
        f"would do is {format_size(needed)} ({needed} B), of which {format_size(fixed)} always "
        f"stay in memory and {format_size(settings.buffer)} are buffer",
        needed,
    )
