"""Several components under one limit: each has all of the memory in its turn.

A component is divided when it is first called, by its own call or by that of one of its modules (a
decoder whose model is never called itself). Until then its parameters are views of a file, and
take no memory of the process. The engine of whoever is not called is parked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import BudgetError, VramkitError
from ..first_run import by_name
from ..model_objects import find_modules
from ..sizes import format_size, parse_size
from ..tensor_files import ModelFiles
from .blocks import Block
from .device import HOST, HostDevice, SeparateDevice
from .lent import Around, Lent, Uncompiled, not_a_graph
from .placed import Placed, hide_device, show_device
from .report import OffloadReport
from .session import OffloadSession
from .store import BlockStore
from .turns import Turn

# Parameters go to a shelf's file in groups of so many bytes: what is held in memory meanwhile.
GROUP = 64 << 20


class Turns:
    """The one room that several sessions share; one of them has memory at a time.

    Attributes:
        room: Bytes for all of them, at any time.
        buffer: Bytes that are kept free beside them.
        fixed_bytes: What always stays in memory, of all components.
        current: Whose turn it is.
        lock: Held while a block of any of them is called.
    """

    def __init__(self, room: int, buffer: int = 0) -> None:
        self.room, self.buffer, self.fixed_bytes = room, buffer, 0
        self.lock = Turn()
        self.sessions: list[OffloadSession] = []
        self.current: OffloadSession | None = None

    def take(self, session: OffloadSession) -> None:
        """It is `session`'s turn: whoever had one gives all memory back."""
        if self.current is session:
            return
        if self.current is not None:
            try:
                self.current.engine.park()
            except ValueError as error:
                raise VramkitError(
                    "components that take turns cannot call each other from within their blocks: "
                    f"{error}; offload them as one module"
                ) from error
        before, self.current = self.current, session
        session.share()
        if before is not None:
            before.device.unshare(before)

    def settle(self, room: int, fixed: int) -> None:
        """Another room for all; BudgetError, with nothing changed, where one of them needs more."""
        open_ones = [s for s in self.sessions if not s.engine.closed]  # others are made anew
        for session in open_ones:
            left = room - fixed - session.buffer_bytes
            least = session.engine.minimum
            if left < least:
                raise BudgetError(
                    f"of {format_size(room)}, {format_size(max(0, left))} are left for blocks "
                    "beside what always stays in memory, and a component that took its turn before "
                    f"needs {format_size(least)}",
                    least + fixed + session.buffer_bytes,
                )
        for session in open_ones:
            session.engine.resize(room - fixed - session.buffer_bytes)
        self.room, self.fixed_bytes = room, fixed
        if self.current is not None:
            self.current.share()


class Shelf:
    """Where the parameters of a component wait until it is divided: views of a file."""

    def __init__(self, module: nn.Module, folder: str, elsewhere: set[int]) -> None:
        groups: list[Block] = []
        self.parameters: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if id(parameter) in elsewhere:  # shared with a component that has it on its shelf
                continue
            elsewhere.add(id(parameter))
            self.parameters.append(parameter)
            size = parameter.numel() * parameter.element_size()
            if not groups or groups[-1].nbytes + size > GROUP:
                groups.append(Block([], [name], 0))
            groups[-1].parameters.append(name)
            groups[-1].nbytes += size
        BlockStore(module, groups, folder)
        self.files = ModelFiles.of(module)

    def waiting(self) -> Iterator[nn.Parameter]:
        """Those that are still here."""
        return (p for p in self.parameters if self.files.holds(p))

    def take_off(self) -> None:
        """All that is still here is in memory of its own again."""
        for parameter in list(self.waiting()):
            parameter.data = parameter.data.clone()


class PipelineSession:
    """What `enable_vram_management` sets up for a pipeline.

    Attributes:
        components: All, by name.
        moved: Those that are not in memory whole.
        sessions: The sessions so far, by name: of components, or of modules of theirs.
    """

    def __init__(
        self,
        pipeline: Any,
        components: Mapping[str, nn.Module],
        turns: Turns,
        folder: str,
        skip: Collection[str] = (),
        device: HostDevice = HOST,
    ) -> None:
        self.components, self.turns, self.device = dict(components), turns, device
        self._placed = Placed(device) if isinstance(device, SeparateDevice) else None
        self.moved = {name: m for name, m in components.items() if name not in skip}
        self.sessions: dict[str, OffloadSession] = {}
        self._pipeline = pipeline
        self._shelves: dict[str, Shelf] = {}
        self._armed: dict[int, Lent] = {}
        self._begin: dict[str, Callable[[nn.Module, Any], OffloadSession]] = {}
        total = _bytes_of(components.values())
        away = _bytes_of(self.moved.values(), buffers=False)
        if turns.room < total - away:
            raise BudgetError(
                f"{format_size(total - away)} always stay in memory, more than the "
                f"{format_size(turns.room)} that there are",
                total - away,
            )
        turns.fixed_bytes = total - away
        shelved: set[int] = set()
        try:
            for name, module in self.moved.items():
                self._shelves[name] = Shelf(module, folder, shelved)
            if self._placed is not None:
                device.share(self, 0)  # what torch has now is none of the pipeline's
                skipped = [m for name, m in components.items() if name in skip]
                self._placed.take(t for m in skipped for t in (*m.parameters(), *m.buffers()))
                for module in components.values():
                    show_device(module, device.torch)
        except BaseException:
            self.disable()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the pipeline is a resident one."""
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def watch(
        self, name: str, module: nn.Module, begin: Callable[[nn.Module, Any], OffloadSession]
    ) -> None:
        """Divide with `begin` whatever module of the component is called first from outside."""
        self._begin[name] = begin
        for path, inner in module.named_modules():
            if id(inner) in self._armed or next(inner.parameters(), None) is None:
                continue
            at = ".".join(part for part in (name, path) if part)
            self._armed[id(inner)] = Lent(inner, self._trigger(name, at, inner))

    def _trigger(self, name: str, path: str, module: nn.Module) -> Around:
        @not_a_graph
        def around(lent: Lent, args: Any, kwargs: Any) -> Any:
            with Uncompiled() as compiler:
                with self.turns.lock:
                    if id(module) in self._armed:
                        self._divide(name, path, module, by_name(module, args, kwargs))
                return compiler.again(module.forward, args, kwargs)

        return around

    def call(self, name: str, inputs: Any) -> None:
        """Divide a component for a call with these inputs, without running it."""
        with self.turns.lock:
            self._divide(name, name, self.moved[name], inputs)

    def _divide(self, name: str, path: str, module: nn.Module, inputs: Any) -> None:
        """Nothing of it, above it or below it is divided again."""
        component = self.moved[name]
        inside = {id(m) for m in module.modules()}
        above = {id(m) for m in component.modules() if any(x is module for x in m.modules())}
        disarmed = {key: self._armed.pop(key) for key in inside | above if key in self._armed}
        for lent in disarmed.values():
            lent.end(for_good=False)
        shelved = [(p, p.data) for p in module.parameters()]
        # From where its blocks are read: nothing is written a second time.
        mapped = [one for shelf in self._shelves.values() for one in shelf.files.mapped]
        object.__setattr__(module, "vramkit_files", ModelFiles(mapped, cache_bytes=0))
        try:
            self.sessions[path] = self._begin[name](module, inputs)
        except BaseException:
            for parameter, data in shelved:
                parameter.data = data
            for lent in disarmed.values():
                lent.begin()
            self._armed |= disarmed
            raise

    def names_taken(self, module: nn.Module) -> dict[str, str]:
        """Parameters of `module` that another session has already, with that as the reason."""
        taken = {
            id(place.parameter)
            for session in self.sessions.values()
            for places in session.store.places
            for place in places
        }
        why = "moves with another module"
        return {name: why for name, p in module.named_parameters() if id(p) in taken}

    def waiting_bytes(self, parameters: Collection[nn.Parameter]) -> int:
        """Bytes of these that are on a shelf still."""
        wanted = {id(p) for p in parameters}
        waiting = (p for shelf in self._shelves.values() for p in shelf.waiting())
        return sum(p.nbytes for p in waiting if id(p) in wanted)

    @property
    def fixed_bytes(self) -> int:
        """What always stays in memory: buffers, parameters in no block, skipped components."""
        return self.turns.fixed_bytes

    @property
    def device_bytes(self) -> int:
        """What all weights take now: what stays, and whoever has its turn."""
        committed = sum(s.engine.stats().committed for s in self.sessions.values())
        return self.turns.fixed_bytes + committed

    def stats(self) -> dict[str, OffloadReport]:
        """Reports by component (or module of one), of those called so far."""
        return {name: session.stats() for name, session in self.sessions.items()}

    def resize(self, vram_limit: int | float | str, vram_buffer: int | float | str = 0) -> None:
        """Another limit for all; BudgetError, with nothing changed, if it is too small."""
        with self.turns.lock:
            room = parse_size(vram_limit) - parse_size(vram_buffer)
            self.turns.settle(room, self.turns.fixed_bytes)

    def disable(self) -> None:
        """The pipeline as it was before: plain forwards, and parameters of its own in memory."""
        with self.turns.lock:
            for lent in self._armed.values():
                lent.end()
            self._armed = {}
            for session in self.sessions.values():
                session.turns = None
                session.disable()
            self.sessions = {}
            for shelf in self._shelves.values():
                shelf.take_off()
            self._shelves = {}
            if self._placed is not None:
                self._placed.undo()
            self.device.unshare(self)
            for component in self.components.values():
                hide_device(component)
                for module in component.modules():
                    module.__dict__.pop("vramkit_files", None)
            object.__setattr__(self._pipeline, "vramkit_session", None)


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    """The modules with parameters that an object holds, by the names it has for them.

    Raises TypeError where there are none.
    """
    found: dict[str, nn.Module] = {}
    named: Any = []
    if isinstance(pipeline, nn.Module):
        named = pipeline.named_children()
    elif hasattr(pipeline, "__dict__") and not isinstance(pipeline, type):
        held = getattr(pipeline, "components", None)
        named += [*(held.items() if isinstance(held, Mapping) else ())]
        named += getattr(pipeline, "__dict__", {}).items()
        named += [(type(m).__name__.lower(), m) for m in find_modules(pipeline)]
    seen: set[int] = set()
    for name, module in named:
        if not isinstance(module, nn.Module) or id(module) in seen:
            continue
        if next(module.parameters(), None) is None:
            continue
        if any(module is inner for other in found.values() for inner in other.modules()):
            continue
        seen.add(id(module))
        base, number = name, 2
        while name in found:
            name, number = f"{base}_{number}", number + 1
        found[name] = module
    if not found:
        raise TypeError(
            "offloading takes a module, or an object that holds modules with parameters, not "
            f"{type(pipeline).__name__}"
        )
    return found


def _bytes_of(modules: Collection[nn.Module], *, buffers: bool = True) -> int:
    sizes = {
        id(tensor): tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *(module.buffers() if buffers else ()))
    }
    return sum(sizes.values())
