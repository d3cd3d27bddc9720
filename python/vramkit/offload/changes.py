"""What may be done to an offloaded model between two calls: noticed here, and followed.

What was changed since a block's last call goes to the store before the next; what came or went is
noticed when the model is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _core
from ..errors import BudgetError, VramkitError
from .blocks import Division
from .device import HostDevice
from .graphs import Graphs
from .guests import Guest, Open, State, Terms
from .membership import Owners, check_device, division_of, survey
from .pages import Pages
from .placed import Placed
from .pressure import Pressure
from .store import BlockStore

if TYPE_CHECKING:
    from .pipeline import Turns
    from .session import OffloadSession

# What a session makes lasts longer than the inference mode that a call may be in.
ordinary: Any = torch.inference_mode(False)


class Changing:
    """The part of a session that keeps up with its model."""

    division: Division
    store: BlockStore
    engine: _core.Engine
    turns: Turns | None
    pressure: Pressure | None
    placed: Placed | None
    device: HostDevice
    _model: nn.Module
    _guests: list[Guest]
    _moved: set[int]
    _owners: Owners
    _pages: Pages | None
    _depth: int
    _open: list[Open]
    _limit: int
    _own_fixed: int
    _planned_for: int
    room: Any
    share: Callable[[], None]
    _start_engine: Callable[[], None]
    _tidy: Callable[[], None]
    _move_in: Callable[[list[int | None]], None]
    graphs: Graphs | None

    def _session(self) -> OffloadSession:
        raise NotImplementedError

    @ordinary
    def _follow(self, guest: Guest, state: State) -> None:
        """The file and the engine have what the block's parameters are now."""
        if self._depth:
            raise VramkitError(
                f"a weight of block {guest.index} was changed within the call of another block; "
                "change weights between calls"
            )
        if state is State.WRITTEN:
            self._write_back(guest)
        else:
            self._rebuild()

    def _look_at_the_model(self) -> None:
        """Parameters that came or went since the last call: blocks and limit follow."""
        if self._open:
            self._tidy()
        if self._depth:
            return  # a block calls the model again
        others: dict[int, Tensor] = {}
        found, fixed = survey(self._model, self._moved, others)
        if found != len(self._moved) or self.engine.closed:
            self._rebuild()
        else:
            if fixed != self._own_fixed:
                self._stays(fixed)
            if self.placed is not None:
                self.placed.take(others.values())
        if self.pressure is not None and self.device.apart:
            self.pressure.look()

    def _stays(self, fixed: int) -> None:
        """Another part of the limit stays in memory."""
        self.graphs = None
        if self.turns is None:
            self._set_room(self._limit, fixed)
        else:
            self.turns.settle(self.turns.room, self.turns.fixed_bytes + fixed - self._own_fixed)
            self._own_fixed = fixed

    @ordinary
    def _set_room(self, limit: int, fixed: int) -> None:
        """Another limit, or another part of it that stays. BudgetError: all is as it was."""
        before = self._limit, self._own_fixed
        self._limit, self._own_fixed = limit, fixed
        try:
            with Terms(self._session()):
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
        self.share()

    @ordinary
    def _rebuild(self) -> None:
        """A new store and engine for parameters that are others now, or of another geometry."""
        parameters = self._owners.blocks_now(self._model, len(self._guests))
        for found in parameters:
            check_device(found, self.device)
        entries = [guest.entries for guest in self._guests]
        old = [guest.index for guest in self._guests]
        division, indices = division_of(self._model, parameters, entries, self.division, old)
        self.store.check()
        store = self.store.successor(division.blocks)
        self.engine.close()
        self.store.discard()
        self.division, self.store = division, store
        self._move_in(indices)
        others: dict[int, Tensor] = {}
        fixed = survey(self._model, self._moved, others)[1]
        if self.turns is not None:
            self.turns.settle(self.turns.room, self.turns.fixed_bytes + fixed - self._own_fixed)
        self._own_fixed = fixed
        if self.placed is not None:
            self.share()
            self.placed.take(others.values())
        with Terms(self._session()):
            self._start_engine()

    def _state(self, guest: Guest) -> State:
        """What was done to a block's parameters since it was last called, in whatever way."""
        changed = False
        for place, version, found in zip(guest.places, guest.versions, guest.geometry, strict=True):
            parameter = place.parameter
            pointer, dtype, shape, stride = found
            if parameter.dtype != dtype or parameter.shape != shape or not parameter.is_cpu:
                return State.OTHER
            if (
                parameter._version != version
                or parameter.data_ptr() != pointer
                or parameter.stride() != stride
            ):
                changed = True
        if changed:
            return State.WRITTEN
        if self._pages is None or not guest.nbytes:
            return State.SAME
        look = self._pages.look(guest.address, guest.nbytes)
        if look.present and not look.written:
            self._pages.drop(guest.address, guest.nbytes)  # it was read here, beside its calls
        return State.WRITTEN if look.written else State.SAME

    def _write_back(self, first: Guest) -> None:
        """Parameters that were changed since their blocks were last called go to the file."""
        others = (g for g in self._guests if g is not first and g.index is not None)
        self.store.check()
        try:
            for guest in [first, *(g for g in others if self._state(g) is State.WRITTEN)]:
                assert guest.index is not None
                self.store.rewrite(guest.index)
                index = guest.index
                guest.places = self.store.places[index]
                guest.home(self.store.views[index], self.store.mapped_places(index))
        finally:
            self.engine.close()
            self._start_engine()
