"""A model that runs while most of its weights are elsewhere: its modules are lent their blocks.

The forward of each entry module is wrapped. While it runs, the parameters of its block are views
of the engine's slot; before and after, of the store, so that who looks at the model from outside
never sees a slot. Nor do gradients: what autograd keeps of a slot, it keeps as a view of the store.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _core
from ..errors import VramkitError
from ..sizes import parse_size
from .blocks import Division
from .pressure import Pressure, PressureEvent
from .report import Seen
from .store import BlockStore, Place

if TYPE_CHECKING:
    from .pipeline import Turns


class Lent:
    """A forward that runs inside `around`. Copies and files of its module hold the plain one."""

    def __init__(self, module: nn.Module, around: Callable[..., Any]) -> None:
        self.module = module
        self.inner = module.forward
        self.around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self.around(self.inner, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module))
        if copied is None:
            return self.inner
        return types.MethodType(type(self.module).forward, copied)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")  # the class's: a module is read before its state


class _Guest:
    """One block as the session sees it: its parameters, where they lie, who is inside."""

    def __init__(self, places: list[Place], views: list[Tensor]) -> None:
        self.places = places
        self.inside = 0
        self.slots: dict[int, list[Tensor]] = {}  # by address in the arena
        self.home(views)

    def home(self, views: list[Tensor]) -> None:
        """The views of the store, and the versions that the parameters had there."""
        self.views = views
        self.versions = [place.parameter._version for place in self.places]


class OffloadSession(Seen):
    """What `enable_vram_management` sets up for a model.

    One thread at a time is inside a block.

    Attributes:
        division: The blocks, their order, and the parameters that stay in memory, with reasons.
        fixed_bytes: What stays: parameters that are in no block, and buffers.
        room: Bytes that blocks may take: the limit less the buffer and `fixed_bytes`.
        pressure: What gives residents up when memory runs short, and takes them back; None: off.
        pressure_events: What it did.
    """

    def __init__(
        self,
        model: nn.Module,
        division: Division,
        store: BlockStore,
        make_engine: Callable[[int], _core.Engine],
        *,
        limit: int,
        buffer_bytes: int,
        fixed_bytes: int,
        turns: Turns | None = None,
    ) -> None:
        self.division, self.store, self._model = division, store, weakref.ref(model)
        self.fixed_bytes, self.buffer_bytes = fixed_bytes, buffer_bytes
        self._make_engine = make_engine
        self.turns = turns
        self._lock = threading.RLock() if turns is None else turns.lock
        self._guests = [
            _Guest(places, views) for places, views in zip(store.places, store.views, strict=True)
        ]
        self._wrapped: list[nn.Module] = []
        self.room = max(0, limit - buffer_bytes - fixed_bytes)
        self.pressure_events: list[PressureEvent] = []
        self.pressure: Pressure | None = Pressure(self)
        self._inside: list[int] = []  # blocks that are being called, before they are and after
        self._start_engine()
        for index, block in enumerate(division.blocks):
            for entry in block.entries:
                self._wrap(model.get_submodule(entry), entry, index)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is a resident one."""
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def _offloaded(self) -> nn.Module | None:
        return self._model() if self._wrapped else None

    def _start_engine(self) -> None:
        self._made_for: int | None = None  # until all of it is there
        for guest in self._guests:
            guest.slots = {}
        state = self.store.state
        self.engine = self._make_engine(self.room)
        if self._records:
            self.record(self._records)
        with torch.inference_mode(False):
            self._arena = torch.frombuffer(self.engine.view(), dtype=torch.uint8)
        self._made_for = state

    def _wrap(self, module: nn.Module, entry: str, index: int) -> None:
        def around(inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            outermost = not self._lock._is_owned()  # type: ignore[attr-defined]
            with self._lock:
                if outermost and self._inside:
                    self._tidy()
                self._enter(index)
                try:
                    with self._saved_tensors():
                        return self._apart(self._run(entry, inner, args, kwargs))
                finally:
                    self._leave(index)

        module.__dict__["forward"] = Lent(module, around)
        self._wrapped.append(module)

    def _run(
        self, entry: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.pressure is None:
            return inner(*args, **kwargs)
        repeatable = entry not in self.division.changing
        return self.pressure.run(inner, args, kwargs, repeatable=repeatable)

    def _enter(self, index: int) -> None:
        guest = self._guests[index]
        self._inside.append(index)
        guest.inside += 1
        if guest.inside > 1:
            return
        try:
            if self.turns is not None:
                self.turns.take(self)
            if self.pressure is not None:
                self.pressure.look()
            self._look_for_changes(index)
            address = self.engine.acquire(index)
        except BaseException:
            guest.inside -= 1
            self._give_back(index)  # a signal may come between a lease and its address
            raise  # and stays in `_inside`: the next call tidies up
        views = guest.slots.get(address)
        if views is None:
            start = address - self.engine.base
            with torch.inference_mode(False):  # else autograd refuses them for good
                run = self._arena[start : start + self.store.sizes[index]]
                views = guest.slots[address] = [place.view(run) for place in guest.places]
        for place, view in zip(guest.places, views, strict=True):
            place.parameter.data = view

    def _leave(self, index: int) -> None:
        guest = self._guests[index]
        guest.inside -= 1
        if guest.inside:
            self._inside.pop()
            return
        for place, view, version in zip(guest.places, guest.views, guest.versions, strict=True):
            if place.parameter._version != version:  # changed in the slot: the store learns of it
                view.copy_(place.parameter.data)
            place.parameter.data = view
        self.engine.release(index)
        self._inside.pop()

    def _tidy(self) -> None:
        """A signal broke the last call off between two steps of entering or leaving a block."""
        for index in set(self._inside):
            guest = self._guests[index]
            guest.inside = 0
            for place, view in zip(guest.places, guest.views, strict=True):
                lies = place.parameter.data_ptr() - self.engine.base
                if 0 <= lies < self.engine.reserved:
                    place.parameter.data = view
            self._give_back(index)
        if self.engine.closed or self._made_for != self.store.state:
            self.engine.close()
            self._start_engine()
        self._inside.clear()

    def _give_back(self, index: int) -> None:
        if self.engine.block_stats(index).state == _core.BlockStatus.in_use:
            self.engine.release(index)

    def _look_for_changes(self, index: int) -> None:
        """Parameters that were changed since the block was last called go to the store's file."""
        guest = self._guests[index]
        changed = False
        for place, view, version in zip(guest.places, guest.views, guest.versions, strict=True):
            parameter = place.parameter
            if parameter.dtype != view.dtype or parameter.shape != view.shape:
                raise VramkitError(
                    f"a parameter of block {index} is {parameter.dtype} {tuple(parameter.shape)} "
                    f"now and was {view.dtype} {tuple(view.shape)} when the model was offloaded; "
                    "disable the offloading first, and enable it again afterwards"
                )
            changed |= parameter._version != version or parameter.data_ptr() != view.data_ptr()
        if changed:
            self.store.check()
            try:
                self.store.rewrite(index)
                guest.home(self.store.views[index])
            finally:
                self.engine.close()
                self._start_engine()

    def _saved_tensors(self) -> Any:
        """Where gradients are on: what autograd keeps of a slot is kept as a view of the store."""
        if not torch.is_grad_enabled():
            return _NOTHING
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def pack(tensor: Tensor) -> Any:
            kept = self._in_store(tensor)
            if kept is not None:
                return (None, kept)
            # Detached: a result that keeps itself would be a cycle, which is never freed.
            return (outer[1], outer[0](tensor)) if outer else (None, tensor.detach())

        def unpack(packed: Any) -> Tensor:
            unpack_outer, value = packed
            return unpack_outer(value) if unpack_outer else value

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _in_store(self, tensor: Tensor) -> Tensor | None:
        """The same view of the store, for a tensor that lies in a slot."""
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
                    return view.as_strided(
                        tensor.shape,
                        tensor.stride(),
                        view.storage_offset() + offset // tensor.element_size(),
                    )
        raise VramkitError("autograd keeps a tensor in a slot whose block is not being called")

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

    @property
    def device_bytes(self) -> int:
        """What the model's weights take now: what stays, residents and slots."""
        return self.fixed_bytes + self.engine.stats().committed

    def resize(self, vram_limit: int | float | str) -> None:
        """Another limit: blocks leave memory, or stay there when they are next read.

        Raises BudgetError, with nothing changed, for less than one block needs.
        """
        self._alone("resize")
        room = parse_size(vram_limit) - self.buffer_bytes - self.fixed_bytes
        with self._lock:
            self.engine.resize(max(0, room))
            self.room = room

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
            self.store.check()
            self._tidy()
            for module in self._wrapped:
                module.__dict__.pop("forward", None)  # gone if a signal broke this off before
            self._wrapped = []
            self.engine.close()
            self.store.release()
            object.__setattr__(self._model(), "vramkit_session", None)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_NOTHING = _Nothing()
