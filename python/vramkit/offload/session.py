"""A model that is offloaded: what its blocks' calls do, and what may be done to it meanwhile.

A parameter is a view of the store at all times, except within the calls of its block: there it is a
view of the block's place in the engine's arena. What was changed since a block's last call goes to
the store's file before the next; what came or went is noticed when the model is called.
"""

from __future__ import annotations

import enum
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

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
from .store import BlockStore, Place
from .turns import Turn

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

    def home(self, views: list[Tensor]) -> None:
        """The views of the store, and the versions that the parameters had there."""
        self.views = views
        self.versions = [place.parameter._version for place in self.places]
        self.geometry = [(v.data_ptr(), v.dtype, v.shape, v.stride()) for v in views]
        starts = [view.data_ptr() for view in views if view.numel()]
        ends = [v.data_ptr() + place.nbytes for v, place in zip(views, self.places, strict=True)]
        self.address = min(starts, default=0)
        self.nbytes = max(ends, default=0) - self.address


class OffloadSession:
    """What `enable_vram_management` sets up for a model.

    One thread at a time is inside a block.

    Attributes:
        division: The blocks, their order, and the parameters that stay in memory, with reasons.
        fixed_bytes: What stays: parameters that are in no block, and buffers.
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
    ) -> None:
        self.division, self.store, self._model = division, store, model
        self.fixed_bytes, self.buffer_bytes, self._limit = fixed_bytes, buffer_bytes, limit
        self._make_engine = make_engine
        self._lock = Turn()
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
            guest.home([] if index is None else self.store.views[index])
        parameters = [[place.parameter for place in guest.places] for guest in self._guests]
        self._moved = {id(p) for found in parameters for p in found}
        self._owners = Owners(self._model, parameters)

    def _room(self) -> int:
        return max(0, self._limit - self.buffer_bytes - self.fixed_bytes)

    def _start_engine(self) -> None:
        self._planned_for = self._room()
        self.engine = self._make_engine(self.division, self.store, self._planned_for)
        self._arena = torch.frombuffer(self.engine.view(), dtype=torch.uint8)
        for guest in self._guests:
            guest.slots = {}

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
                self._enter(guest)
                try:
                    with saving(self._in_store):
                        return self._apart(compiler.again(lent.inner, args, kwargs))
                finally:
                    self._leave(guest)

        return around

    def _station(self, guest: _Guest) -> Station:
        """The same for compiled code, which has at most one block at a time.

        One that is called within another's call takes its turn over: what is left of the outer one
        reads the store.
        """

        def before() -> None:
            with self._lock:
                refuse_freezing()
                self._leave_graph()
                self._enter(guest)
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

    def _enter(self, guest: _Guest) -> None:
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

    def _bring(self, guest: _Guest, index: int) -> None:
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
            return
        for place, view, version in zip(guest.places, guest.views, guest.versions, strict=True):
            if place.parameter._version != version:  # changed in the slot: the store learns of it
                view.copy_(place.parameter.data)
            place.parameter.data = view
        self.engine.release(guest.index)

    def _look_at_the_model(self) -> None:
        """Parameters that came or went since the last call: blocks and limit follow."""
        if self._depth:
            return  # a block calls the model again
        found, fixed = survey(self._model, self._moved)
        if found != len(self._moved) or self.engine.closed:
            self._rebuild()
        elif fixed != self.fixed_bytes:
            self._set_room(self._limit, fixed)

    @_ordinary
    def _set_room(self, limit: int, fixed: int) -> None:
        """Another limit, or another part of it that stays. BudgetError: all is as it was."""
        before = self._limit, self.fixed_bytes
        self._limit, self.fixed_bytes = limit, fixed
        try:
            with _Terms(self):
                # An engine keeps its slots: a new one can do with fewer, or has room for more than
                # the one in which nothing can be loaded ahead.
                cramped = self.engine.stats().slots == 1 and self._room() > self._planned_for
                try:
                    self.engine.resize(self._room())
                except BudgetError:
                    if self._depth:
                        raise
                    cramped = True
                if cramped and not self._depth:
                    self.engine.close()
                    self._start_engine()
        except BaseException:
            self._limit, self.fixed_bytes = before
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
        division, indices = division_of(self._model, parameters, entries, self.division)
        store = BlockStore(self._model, division.blocks, self.store.path.parent)
        self.engine.close()
        self.store.discard()
        self.division, self.store = division, store
        self._move_in(indices)
        self.fixed_bytes = survey(self._model, self._moved)[1]
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
        for guest in [first, *(g for g in others if self._state(g) is _State.WRITTEN)]:
            assert guest.index is not None
            self.store.rewrite(guest.index)
            guest.home(self.store.views[guest.index])
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

    def stats(self) -> _core.EngineStats:
        """Bytes, counts and times since the model was offloaded, or last changed from outside.

        `limit` is what the blocks may take: the user's, less the buffer and `fixed_bytes`.
        """
        return self.engine.stats()

    def resize(self, vram_limit: int | float | str) -> None:
        """Another limit: blocks leave memory, or stay there when they are next read.

        Raises BudgetError, with nothing changed, for less than one block needs.
        """
        limit = parse_size(vram_limit)
        with self._lock:
            self._leave_graph()
            if not self.engine.closed:
                self._set_room(limit, self.fixed_bytes)
            else:
                self._limit = limit
                self._rebuild()

    def disable(self) -> None:
        """The model as it was before: plain forwards, and parameters of its own in memory."""
        with self._lock:
            self._leave_graph()
            if self._depth:
                raise VramkitError("a block is being called; disable the offloading afterwards")
            for lent in self._lent:
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
            f"no room for the slots within {format_size(session._limit)}: the smallest limit that "
            f"would do is {format_size(needed)} ({needed} B), of which "
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
