"""A model that is offloaded: what its blocks' calls do, and what may be done to it meanwhile.

A parameter is a view of the store at all times, except within the calls of its block: there it is a
view of the block's place in the engine's arena. What was changed since a block's last call goes to
the store's file before the next; what came or went is noticed when the model is called.
"""

from __future__ import annotations

import enum
import sys
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _core
from ..errors import BudgetError, VramkitError
from ..sizes import format_size, parse_size
from .blocks import Division
from .gradients import Kept, saving
from .lent import Lent, Uncompiled, not_a_graph, refuse_freezing
from .membership import Owners, check_on_the_cpu, division_of, survey
from .ordering import Station
from .pages import Pages
from .pressure import Pressure, PressureEvent
from .report import Seen
from .store import BlockStore, Place
from .turns import Turn, runs

if TYPE_CHECKING:
    from .pipeline import Turns

__all__ = ["Lent", "OffloadSession", "OffloadWarning"]


class OffloadWarning(UserWarning):
    """Something that is done for an offloaded model cannot be done as well as elsewhere."""


# What a session makes lasts longer than the inference mode that a call may be in.
_ordinary: Any = torch.inference_mode(False)


class _State(enum.Enum):
    """Of a block's parameters, against what its store and the engine have."""

    SAME = enum.auto()
    WRITTEN = enum.auto()
    OTHER = enum.auto()  # of another dtype, shape or device


class _Guest:
    """One block as the session sees it: its parameters, where they lie, who is inside."""

    def __init__(self, entries: Sequence[nn.Module]) -> None:
        self.entries = list(entries)
        self.index: int | None = None  # in the engine; None: it has no parameters any more
        self.inside = 0
        self.places: list[Place] = []
        self.slots: dict[int, list[Tensor]] = {}  # by address in the arena

    def home(self, views: list[Tensor], mapped: int) -> None:
        """The views of the store, and the versions that the parameters had there.

        Of the views, so many are of a file.
        """
        self.views = views
        self.versions = [place.parameter._version for place in self.places]
        self.geometry = [(v.data_ptr(), v.dtype, v.shape, v.stride()) for v in views]
        of_file = list(zip(views, self.places, strict=True))[:mapped]
        starts = [view.data_ptr() for view, _ in of_file if view.numel()]
        ends = [view.data_ptr() + place.nbytes for view, place in of_file]
        self.address = min(starts, default=0)
        self.nbytes = max(ends, default=0) - self.address


class _Open(NamedTuple):
    """A call of a block that has begun; `frame` is None where compiled code has it."""

    guest: _Guest
    thread: int
    frame: types.FrameType | None


class OffloadSession(Seen):
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
    ) -> None:
        self.division, self.store, self._model = division, store, model
        self._own_fixed, self.buffer_bytes, self._limit = fixed_bytes, buffer_bytes, limit
        self._make_engine = make_engine
        self.turns = turns
        self._lock = Turn() if turns is None else turns.lock
        self.pressure_events: list[PressureEvent] = []
        self.pressure: Pressure | None = Pressure(self)
        self._open: list[_Open] = []
        self._in_graph: _Guest | None = None  # brought by compiled code
        self._depth = 0  # of calls of blocks, one within the other
        self._read_by_backward: _Guest | None = None
        self._pages = _pages()
        self._guests = [
            _Guest([model.get_submodule(entry) for entry in block.entries])
            for block in division.blocks
        ]
        self._move_in(list(range(len(self._guests))))
        self._start_engine()
        self._stations = [Station(self._before_the_model, _nothing)]
        self._lent = [Lent(model, self._around_the_model(), self._stations[0])]
        for guest in self._guests:
            around, station = self._around_a_block(guest), self._station(guest)
            self._stations.append(station)
            self._lent += [Lent(module, around, station) for module in guest.entries]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is a resident one."""
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

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

    @property
    def device_bytes(self) -> int:
        """What the model's weights take now: what stays, residents and slots."""
        return self.fixed_bytes + self.engine.stats().committed

    def _start_engine(self) -> None:
        self._made_for: int | None = None  # until all of it is there
        for guest in self._guests:
            guest.slots = {}
        state = self.store.state
        self._planned_for = self.room
        self.engine = self._make_engine(self.division, self.store, self._planned_for)
        if self.turns is not None and self.turns.current is not self:
            self.engine.park()  # it takes its memory with its turn
        if self._records:
            self.record(self._records)
        self._arena = torch.frombuffer(self.engine.view(), dtype=torch.uint8)
        self._made_for = state

    def _around_the_model(self) -> Callable[..., Any]:
        @not_a_graph
        def around(lent: Lent, args: Any, kwargs: Any) -> Any:
            with Uncompiled() as compiler:
                self._before_the_model()
                return compiler.again(lent.inner, args, kwargs)

        return around

    def _around_a_block(self, guest: _Guest) -> Callable[..., Any]:
        @not_a_graph
        def around(lent: Lent, args: Any, kwargs: Any) -> Any:
            with Uncompiled() as compiler, self._lock:
                if compiler.compiling:
                    refuse_freezing()
                self._leave_graph()
                self._enter(guest, sys._getframe())
                try:
                    with saving(self._in_store):
                        return self._apart(self._run(compiler, lent, args, kwargs))
                finally:
                    self._leave(guest)

        return around

    def _run(self, compiler: Uncompiled, lent: Lent, args: Any, kwargs: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return compiler.again(lent.inner, args, kwargs)

        if self.pressure is None:
            return forward(*args, **kwargs)
        repeatable = id(lent.module) not in self._changing
        return self.pressure.run(forward, args, kwargs, repeatable=repeatable)

    def _station(self, guest: _Guest) -> Station:
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

    def _enter(self, guest: _Guest, frame: types.FrameType | None) -> None:
        if self._open:
            self._tidy()
        self._open.append(_Open(guest, threading.get_ident(), frame))
        if guest.inside == 0:
            state = _State.OTHER if self.engine.closed else self._state(guest)
            if state is not _State.SAME:
                self._follow(guest, state)
            if guest.index is not None:
                self._bring(guest, guest.index)
        guest.inside += 1
        self._depth += 1

    @_ordinary
    def _follow(self, guest: _Guest, state: _State) -> None:
        """The file and the engine have what the block's parameters are now."""
        if self._depth:
            raise VramkitError(
                f"a weight of block {guest.index} was changed within the call of another block; "
                "change weights between calls"
            )
        if state is _State.WRITTEN:
            self._write_back(guest)
        else:
            self._rebuild()

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
                lies = place.parameter.data_ptr() - self.engine.base
                if 0 <= lies < self.engine.reserved:
                    place.parameter.data = view
            self._give_back(guest.index)
        if not live and self._made_for != self.store.state:
            self.engine.close()  # and is made anew by the next call
        self._depth, self._open = len(live), live  # last: a signal may break this off too

    def _goes_on(self, one: _Open) -> bool:
        if one.frame is None:
            return self._in_graph is one.guest
        return runs(one.thread, one.frame)

    def _give_back(self, index: int) -> None:
        """A signal may come between a lease and its address."""
        if self.engine.closed or index >= len(self.engine):
            return
        if self.engine.block_stats(index).state == _core.BlockStatus.in_use:
            self.engine.release(index)

    def _bring(self, guest: _Guest, index: int) -> None:
        if self.turns is not None:
            self.turns.take(self)
        if self.pressure is not None:
            self.pressure.look()
        with _Terms(self):
            address = self.engine.acquire(index)
        views = guest.slots.get(address)
        if views is None:
            views = guest.slots[address] = self._views_at(address, guest, index)
        for place, view in zip(guest.places, views, strict=True):
            place.parameter.data = view

    @_ordinary
    def _views_at(self, address: int, guest: _Guest, index: int) -> list[Tensor]:
        start = address - self.engine.base
        run = self._arena[start : start + self.store.sizes[index]]
        return [place.view(run) for place in guest.places]

    def _leave(self, guest: _Guest) -> None:
        guest.inside -= 1
        self._depth -= 1
        if guest.inside or guest.index is None:
            self._open.pop()
            return
        for place, view, version in zip(guest.places, guest.views, guest.versions, strict=True):
            if place.parameter._version != version:  # changed in the slot: the store learns of it
                view.copy_(place.parameter.data)
            place.parameter.data = view
        self.engine.release(guest.index)
        self._open.pop()

    def _look_at_the_model(self) -> None:
        """Parameters that came or went since the last call: blocks and limit follow."""
        if self._open:
            self._tidy()
        if self._depth:
            return  # a block calls the model again
        found, fixed = survey(self._model, self._moved)
        if found != len(self._moved) or self.engine.closed:
            self._rebuild()
        elif fixed != self._own_fixed:
            self._stays(fixed)

    def _stays(self, fixed: int) -> None:
        """Another part of the limit stays in memory."""
        if self.turns is None:
            self._set_room(self._limit, fixed)
        else:
            self.turns.settle(self.turns.room, self.turns.fixed_bytes + fixed - self._own_fixed)
            self._own_fixed = fixed

    @_ordinary
    def _set_room(self, limit: int, fixed: int) -> None:
        """Another limit, or another part of it that stays. BudgetError: all is as it was."""
        before = self._limit, self._own_fixed
        self._limit, self._own_fixed = limit, fixed
        try:
            with _Terms(self):
                # An engine keeps its slots: a new one can do with fewer, or has room for more than
                # the one in which nothing can be loaded ahead.
                cramped = self.engine.stats().slots == 1 and self.room > self._planned_for
                try:
                    self.engine.resize(self.room)
                except BudgetError:
                    if self._depth:
                        raise
                    cramped = True
                if cramped and not self._depth:
                    self.engine.close()
                    self._start_engine()
        except BaseException:
            self._limit, self._own_fixed = before
            if self.engine.closed:
                self._start_engine()
            raise

    @_ordinary
    def _rebuild(self) -> None:
        """A new store and engine for parameters that are others now, or of another geometry."""
        parameters = self._owners.blocks_now(self._model, len(self._guests))
        for found in parameters:
            check_on_the_cpu(found)
        entries = [guest.entries for guest in self._guests]
        old = [guest.index for guest in self._guests]
        division, indices = division_of(self._model, parameters, entries, self.division, old)
        self.store.check()
        store = self.store.successor(division.blocks)
        self.engine.close()
        self.store.discard()
        self.division, self.store = division, store
        self._move_in(indices)
        fixed = survey(self._model, self._moved)[1]
        if self.turns is not None:
            self.turns.settle(self.turns.room, self.turns.fixed_bytes + fixed - self._own_fixed)
        self._own_fixed = fixed
        with _Terms(self):
            self._start_engine()

    def _state(self, guest: _Guest) -> _State:
        """What was done to a block's parameters since it was last called, in whatever way."""
        changed = False
        for place, version, found in zip(guest.places, guest.versions, guest.geometry, strict=True):
            parameter = place.parameter
            pointer, dtype, shape, stride = found
            if parameter.dtype != dtype or parameter.shape != shape or not parameter.is_cpu:
                return _State.OTHER
            if (
                parameter._version != version
                or parameter.data_ptr() != pointer
                or parameter.stride() != stride
            ):
                changed = True
        if changed:
            return _State.WRITTEN
        if self._pages is None or not guest.nbytes:
            return _State.SAME
        look = self._pages.look(guest.address, guest.nbytes)
        if look.present and not look.written:
            self._pages.drop(guest.address, guest.nbytes)  # it was read here, beside its calls
        return _State.WRITTEN if look.written else _State.SAME

    def _write_back(self, first: _Guest) -> None:
        """Parameters that were changed since their blocks were last called go to the file."""
        others = (g for g in self._guests if g is not first and g.index is not None)
        self.store.check()
        try:
            for guest in [first, *(g for g in others if self._state(g) is _State.WRITTEN)]:
                assert guest.index is not None
                self.store.rewrite(guest.index)
                index = guest.index
                guest.places = self.store.places[index]
                guest.home(self.store.views[index], self.store.mapped_places(index))
        finally:
            self.engine.close()
            self._start_engine()

    def _in_store(self, tensor: Tensor) -> Kept | None:
        """The same view of the store, for a tensor that lies in a slot."""
        if type(tensor) is not Tensor and not isinstance(tensor, nn.Parameter):
            return None
        address = tensor.untyped_storage().data_ptr()
        if not 0 <= address - self.engine.base < self.engine.reserved:
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
                    return Kept(kept, parameter, parameter._version, self._reader(guest))
        raise VramkitError("autograd keeps a tensor in a slot whose block is not being called")

    def _reader(self, guest: _Guest) -> Callable[[], None]:
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
            if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel():
                address = value.untyped_storage().data_ptr()
                if 0 <= address - self.engine.base < self.engine.reserved:
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
            self.store.release()
            object.__setattr__(self._model, "vramkit_session", None)


def _nothing(results: Sequence[Tensor]) -> None:
    return None


class _Terms:
    """Turns what the engine needs into the limit that the user would have to give."""

    def __init__(self, session: OffloadSession) -> None:
        self.session = session

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: types.TracebackType | None
    ) -> None:
        if not isinstance(error, BudgetError):
            return
        session = self.session
        needed = error.needed_bytes + session.fixed_bytes + session.buffer_bytes
        raise BudgetError(
            f"no room for the slots within {format_size(session.limit_bytes)}: the smallest limit "
            f"that would do is {format_size(needed)} ({needed} B), of which "
            f"{format_size(session.fixed_bytes)} always stay in memory (what came since the model "
            f"was offloaded, such as adapters, included) and {format_size(session.buffer_bytes)} "
            "are buffer; model.vramkit_session.resize(…), or disable() and enable again",
            needed,
        ) from None


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
