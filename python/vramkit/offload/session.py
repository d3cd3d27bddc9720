"""A model that is offloaded: what its blocks' calls do, and what may be done to it meanwhile.

A parameter is a view of the store at all times, except within the calls of its block: there it is a
view of the block's place in the engine's arena. What was changed since a block's last call goes to
the store's file before the next; what came or went is noticed when the model is called.
"""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _core
from ..errors import BudgetError, VramkitError
from ..sizes import parse_size
from .blocks import Division
from .changes import Changing, ordinary
from .device import HOST, HostDevice, SeparateDevice
from .gradients import Kept, saving
from .graphs import Graphs, capture_all
from .guests import Guest, Open, State, Terms
from .lent import Lent, Uncompiled, not_a_graph, refuse_freezing
from .membership import Owners, survey
from .ordering import Station
from .pages import Pages
from .placed import Placed, hide_device, show_device
from .pressure import Pressure, PressureEvent
from .report import Seen
from .store import BlockStore
from .turns import Turn, runs

if TYPE_CHECKING:
    from .pipeline import Turns

__all__ = ["Lent", "OffloadSession", "OffloadWarning"]


class OffloadWarning(UserWarning):
    """Something that is done for an offloaded model cannot be done as well as elsewhere."""


class OffloadSession(Changing, Seen):
    """What `enable_vram_management` sets up for a model.

    One thread at a time is inside a block.

    Attributes:
        division: The blocks, their order, and the parameters that stay in memory, with reasons.
        turns: What it shares with the other components of a pipeline, if it is one's.
        pressure: What gives residents up when memory runs short, and takes them back; None: off.
        pressure_events: What it did.
    """

    def __init__(
        self,
        model: nn.Module,
        division: Division,
        store: BlockStore,
        make_engine: Callable[[Division, BlockStore, int], _core.Engine],
        *,
        limit: int,
        buffer_bytes: int,
        fixed_bytes: int,
        turns: Turns | None = None,
        device: HostDevice = HOST,
    ) -> None:
        self.device = device
        self.placed = Placed(device) if isinstance(device, SeparateDevice) else None
        self.graphs: Graphs | None = None
        self.visits: list[tuple[str, int]] | None = None  # where blocks lay, while it is asked
        self._refusing: dict[int, Any] = {}  # hooks of parameters, by their ids
        self.division, self.store, self._model = division, store, model
        self._own_fixed, self.buffer_bytes, self._limit = fixed_bytes, buffer_bytes, limit
        self._make_engine = make_engine
        self.turns = turns
        self._lock = Turn() if turns is None else turns.lock
        self.pressure_events: list[PressureEvent] = []
        self.pressure: Pressure | None = Pressure(self)
        self._open: list[Open] = []
        self._in_graph: Guest | None = None  # brought by compiled code
        self._depth = 0  # of calls of blocks, one within the other
        self._read_by_backward: Guest | None = None
        self._pages = _pages()
        self._guests = [
            Guest([model.get_submodule(entry) for entry in block.entries], ", ".join(block.entries))
            for block in division.blocks
        ]
        self._move_in(list(range(len(self._guests))))
        try:
            if self.placed is not None:
                others: dict[int, Tensor] = {}
                survey(model, self._moved, others)
                self.placed.known(others.values())
                self.share()
                self.placed.take(others.values())
            self._start_engine()
        except BaseException:
            self._leave_the_device()
            raise
        # Compiled code would hold parameters for tensors of the host: it ends before each block
        # there, as it does where gradients are kept.
        compiled = not device.apart
        self._stations = [Station(self._before_the_model, _nothing)]
        self._lent = [
            Lent(model, self._around_the_model(), self._stations[0] if compiled else None)
        ]
        for guest in self._guests:
            around, station = self._around_a_block(guest), self._station(guest)
            self._stations.append(station)
            lends = station if compiled else None
            self._lent += [Lent(module, around, lends) for module in guest.entries]
        if device.apart:
            show_device(model, device.torch)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is a resident one."""
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def _session(self) -> OffloadSession:
        return self

    def _move_in(self, indices: Sequence[int | None]) -> None:
        """Every block has the parameters that the store has for it."""
        for guest, index in zip(self._guests, indices, strict=True):
            guest.index = index
            guest.places = [] if index is None else self.store.places[index]
            if index is None:
                guest.home([], 0)
            else:
                guest.home(self.store.views[index], self.store.mapped_places(index))
        parameters = [[place.parameter for place in guest.places] for guest in self._guests]
        self._moved = {id(p) for found in parameters for p in found}
        self._owners = Owners(self._model, parameters)
        modules = dict(self._model.named_modules())
        self._paths = {id(module): path for path, module in modules.items()}
        changing = (modules.get(path) for path in self.division.changing)
        self._changing = {id(module) for module in changing if module is not None}

    def _offloaded(self) -> nn.Module | None:
        return self._model if self._lent else None

    @property
    def fixed_bytes(self) -> int:
        """What stays: parameters that are in no block, and buffers (with turns, of all)."""
        return self._own_fixed if self.turns is None else self.turns.fixed_bytes

    @property
    def limit_bytes(self) -> int:
        """The user's limit; with turns, what it leaves beside the buffer."""
        return self._limit if self.turns is None else self.turns.room

    @property
    def room(self) -> int:
        """Bytes that blocks may take: the limit less the buffer and what stays."""
        return max(0, self.limit_bytes - self.buffer_bytes - self.fixed_bytes)

    def share(self) -> None:
        """On a device apart, torch may take what the limit leaves beside this session's blocks."""
        there = self.placed.there if self.placed is not None else 0
        if self.turns is None:
            self.device.share(self, max(0, self._limit - self.room), there)
        elif self.turns.current is self or self.turns.current is None:
            whole = self.turns.room + self.turns.buffer
            self.device.share(self, max(0, whole - self.room), there)

    def grant(self, nbytes: int) -> None:
        """Calls need so much more than was thought: blocks have less from now on."""
        self.buffer_bytes += nbytes
        self.share()

    def _leave_the_device(self) -> None:
        if self.placed is not None:
            self.placed.undo()
        self.device.unshare(self)

    @property
    def device_bytes(self) -> int:
        """What the model's weights take now: what stays, residents and slots."""
        return self.fixed_bytes + self.engine.stats().committed

    def _start_engine(self) -> None:
        self._made_for: int | None = None  # until all of it is there
        self.graphs = None  # of other addresses
        for guest in self._guests:
            guest.slots = {}
        state = self.store.state
        self._planned_for = self.room
        self.engine = self._make_engine(self.division, self.store, self._planned_for)
        if self.turns is not None and self.turns.current is not self:
            self.engine.park()  # it takes its memory with its turn
        if self._records:
            self.record(self._records)
        self._arena = self.device.whole(self.engine)
        self._made_for = state

    def _around_the_model(self) -> Callable[..., Any]:
        @not_a_graph
        def around(lent: Lent, args: Any, kwargs: Any) -> Any:
            with Uncompiled() as compiler:
                self._before_the_model()
                args, kwargs = self.device.take((args, kwargs))
                return compiler.again(lent.inner, args, kwargs)

        return around

    def _around_a_block(self, guest: Guest) -> Callable[..., Any]:
        @not_a_graph
        def around(lent: Lent, args: Any, kwargs: Any) -> Any:
            with Uncompiled() as compiler, self._lock:
                if compiler.compiling:
                    refuse_freezing()
                self._leave_graph()
                self._enter(guest, sys._getframe())
                try:
                    with self.device.mark(guest.label), saving(self._in_store):
                        args, kwargs = self.device.take((args, kwargs))
                        return self._apart(self._run(compiler, lent, args, kwargs))
                finally:
                    self._leave(guest)

        return around

    def _run(self, compiler: Uncompiled, lent: Lent, args: Any, kwargs: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return compiler.again(lent.inner, args, kwargs)

        def under_pressure(*args: Any, **kwargs: Any) -> Any:
            if self.pressure is None:
                return forward(*args, **kwargs)
            repeatable = id(lent.module) not in self._changing
            return self.pressure.run(forward, args, kwargs, repeatable=repeatable)

        if self.graphs is None or self._depth > 1 or compiler.compiling:
            return under_pressure(*args, **kwargs)
        path = self._paths.get(id(lent.module), "")
        return self.graphs.call(forward, lent.module, path, under_pressure, args, kwargs)

    def _station(self, guest: Guest) -> Station:
        """The same for compiled code, which has at most one block at a time.

        One that is called within another's call takes its turn over: what is left of the outer one
        reads the store.
        """

        def before() -> None:
            with self._lock:
                refuse_freezing()
                self._leave_graph()
                self._enter(guest, None)
                self._in_graph = guest
                self._lock.hold()

        def after(results: Sequence[Tensor]) -> None:
            with self._lock:
                for result in results:  # backends that keep views as they are hand them on so
                    kept = self._apart(result)
                    if kept is not result:
                        result.data = kept
                if self._in_graph is guest:
                    self._leave_graph()

        return Station(before, after)

    def _leave_graph(self) -> None:
        """The end of a block's call in compiled code, there or where that has failed."""
        guest, self._in_graph = self._in_graph, None
        if guest is not None:
            self._lock.let_go()
            self._leave(guest)

    def _before_the_model(self) -> None:
        with self._lock:
            self._leave_graph()
            self._look_at_the_model()

    def _enter(self, guest: Guest, frame: types.FrameType | None) -> None:
        if self._open:
            self._tidy()
        self._open.append(Open(guest, threading.get_ident(), frame))
        if guest.inside == 0:
            state = State.OTHER if self.engine.closed else self._state(guest)
            if state is not State.SAME:
                self._follow(guest, state)
            if guest.index is not None:
                self._bring(guest, guest.index)
        guest.inside += 1
        self._depth += 1

    def _tidy(self) -> None:
        """A signal broke a call off between two steps of entering or leaving a block."""
        stale = [one for one in self._open if not self._goes_on(one)]
        if not stale:
            return
        live = [one for one in self._open if self._goes_on(one)]
        for guest in {id(one.guest): one.guest for one in stale}.values():
            guest.inside = sum(one.guest is guest for one in live)
            if guest.inside or guest.index is None:
                continue
            for place, view in zip(guest.places, guest.views, strict=True):
                if self._is_lent(place.parameter.data_ptr(), guest):
                    place.parameter.data = view
            self._give_back(guest.index)
        if not live and self._made_for != self.store.state:
            self.engine.close()  # and is made anew by the next call
        self._depth, self._open = len(live), live  # last: a signal may break this off too

    def _goes_on(self, one: Open) -> bool:
        if one.frame is None:
            return self._in_graph is one.guest
        return runs(one.thread, one.frame)

    def _is_lent(self, address: int, guest: Guest) -> bool:
        """Whether it is one of the engine's, as a place of this block."""
        if self._arena is not None:
            return 0 <= address - self.engine.base < self.engine.reserved
        return any(0 <= address - at < guest.nbytes_there for at in guest.slots)

    def _give_back(self, index: int) -> None:
        """A signal may come between a lease and its address."""
        if self.engine.closed or index >= len(self.engine):
            return
        if self.engine.block_stats(index).state == _core.BlockStatus.in_use:
            self.engine.release(index, self.device.stream())

    def _bring(self, guest: Guest, index: int) -> None:
        if self.turns is not None:
            self.turns.take(self)
        if self.pressure is not None and not self.device.apart:
            self.pressure.look()
        with Terms(self):
            address = self._acquire(index)
        guest.at = address
        if self.visits is not None:
            self.visits.append((guest.label, address))
        views = guest.slots.get(address)
        if views is None:
            views = guest.slots[address] = self._views_at(address, guest, index)
        for place, view in zip(guest.places, views, strict=True):
            place.parameter.data = view
        if self.device.apart and torch.is_grad_enabled():
            self._refuse_gradients(guest)

    def _acquire(self, index: int) -> int:
        stream = self.device.stream()
        try:
            return self.engine.acquire(index, stream)
        except MemoryError as error:
            if not self.device.apart or isinstance(error, BudgetError):
                raise
            self.device.empty_cache()
        try:
            return self.engine.acquire(index, stream)
        except MemoryError as error:
            raise self.device.out_of_memory(str(error)) from error

    def _refuse_gradients(self, guest: Guest) -> None:
        """A parameter's gradient would be on the device, and it on the host, after the call."""
        for place in guest.places:
            parameter = place.parameter
            if parameter.requires_grad and id(parameter) not in self._refusing:
                self._refusing[id(parameter)] = parameter.register_hook(_no_gradient)

    @ordinary
    def _views_at(self, address: int, guest: Guest, index: int) -> list[Tensor]:
        size = self.store.sizes[index]
        guest.nbytes_there = size
        if self._arena is None:
            run = self.device.tensor(self.engine.window(address, size))
        else:
            start = address - self.engine.base
            run = self._arena[start : start + size]
        return [place.view(run) for place in guest.places]

    def _leave(self, guest: Guest) -> None:
        guest.inside -= 1
        self._depth -= 1
        if guest.inside or guest.index is None:
            self._open.pop()
            return
        for place, view, version in zip(guest.places, guest.views, guest.versions, strict=True):
            if place.parameter._version != version:  # changed in the slot: the store learns of it
                view.copy_(place.parameter.data)
            place.parameter.data = view
        self.engine.release(guest.index, self.device.stream())
        self._open.pop()

    def _in_store(self, tensor: Tensor) -> Kept | None:
        """The same view of the store, for a tensor that lies in a slot."""
        if type(tensor) is not Tensor and not isinstance(tensor, nn.Parameter):
            return None
        if not self._in_the_engine(tensor):
            return None
        first = tensor.data_ptr()
        for guest in self._guests:
            if not guest.inside:
                continue
            for place, view in zip(guest.places, guest.views, strict=True):
                offset = first - place.parameter.data_ptr()
                if 0 <= offset < place.nbytes:
                    kept = view.as_strided(
                        tensor.shape,
                        tensor.stride(),
                        view.storage_offset() + offset // tensor.element_size(),
                    )
                    parameter = place.parameter
                    version, reads = parameter._version, self._reader(guest)
                    return Kept(kept, parameter, version, reads, self.device.torch)
        raise VramkitError("autograd keeps a tensor in a slot whose block is not being called")

    def _in_the_engine(self, tensor: Tensor) -> bool:
        """Whether it lies in a block that is being called."""
        if tensor.device != self.device.torch or not tensor.numel():
            return False
        address = tensor.untyped_storage().data_ptr()
        if self._arena is not None:
            return 0 <= address - self.engine.base < self.engine.reserved
        return any(0 <= address - g.at < g.nbytes_there for g in self._guests if g.inside)

    def _reader(self, guest: Guest) -> Callable[[], None]:
        def reads() -> None:
            before, self._read_by_backward = self._read_by_backward, guest
            if before is None or before is guest or self._pages is None or not before.nbytes:
                return
            found = self._pages.look(before.address, before.nbytes)
            if found.present and not found.written:
                self._pages.drop(before.address, before.nbytes)

        return reads

    def _apart(self, result: Any) -> Any:
        """Results that are views of a slot, as copies: the slot will hold something else."""

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor) and self._in_the_engine(value):
                return value.clone()
            return value

        if isinstance(result, Tensor):
            return kept(result)
        return torch.utils._pytree.tree_map_only(Tensor, kept, result)

    def resize(self, vram_limit: int | float | str) -> None:
        """Another limit: blocks leave memory, or stay there when they are next read.

        Raises BudgetError, with nothing changed, for less than one block needs.
        """
        self._alone("resize")
        limit = parse_size(vram_limit)
        with self._lock:
            self._leave_graph()
            if not self.engine.closed:
                self._set_room(limit, self._own_fixed)
            else:
                self._limit = limit
                self._rebuild()

    def _alone(self, what: str) -> None:
        if self.turns is not None:
            raise ValueError(
                f"this module takes turns with others: {what} the session of the pipeline"
            )

    def disable(self) -> None:
        """The model as it was before: plain forwards, and parameters of its own in memory.

        Raises FileChangedError, with nothing changed, if somebody else wrote to the blocks' file.
        """
        self._alone("disable")
        with self._lock:
            self._leave_graph()
            if self._open:
                self._tidy()
            if self._depth:
                raise VramkitError("a block is being called; disable the offloading afterwards")
            self.store.check()
            for lent in reversed(self._lent):
                lent.end()
            self._lent = []
            self.engine.close()
            for hook in self._refusing.values():
                hook.remove()
            self.graphs = self._arena = None
            self.device.unshare(self)
            self.store.release()
            self._leave_the_device()
            hide_device(self._model)
            object.__setattr__(self._model, "vramkit_session", None)

    def capture(self, inputs: Any) -> dict[str, str]:
        """Make CUDA graphs of the blocks' calls, for calls of the model like this one.

        Args:
            inputs: One call's, as for `enable_vram_management`: tensors, no shapes.

        The model is called four times, without gradients. From then on each module that brings a
        block is one launch, where its arguments are of the same kind and its block lies where it
        lay; other calls run as before. A graph's inputs, results and inner memory stay, for each
        module's. Anything that changes the model or the limit drops all graphs.

        Returns:
            For each module that brings a block "captured", or why it is not.

        Raises:
            ValueError: The model is not on a GPU.
            VramkitError: The blocks do not lie in the same places in each pass, or no module's
                call can be captured.
        """
        if not isinstance(self.device, SeparateDevice):
            raise ValueError("CUDA graphs are for models that are offloaded to a GPU")
        self.graphs = None
        return capture_all(self, Graphs(self.device, self._changing), inputs)


def _no_gradient(gradient: Tensor) -> None:
    raise VramkitError(
        "a weight that is streamed to a GPU has no gradient: freeze it with requires_grad_(False); "
        "adapters and other parameters that came after offloading stay on the device and can be "
        "trained"
    )


def _nothing(results: Sequence[Tensor]) -> None:
    return None


def _pages() -> Pages | None:
    try:
        return Pages()
    except OSError as error:
        warnings.warn(
            f"this system does not say which pages were written ({error}): a change of an "
            "offloaded weight through `.data` or a pointer, as PEFT merges adapters, will not be "
            "seen; disable the offloading before such changes",
            OffloadWarning,
            stacklevel=4,
        )
        return None
