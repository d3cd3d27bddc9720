"""When memory runs short while a model is offloaded: what is given up, and taken back later.

Two things are told apart. Another process takes memory: what is free is looked at now and then,
between blocks, and residents go before the system swaps. An allocation fails within a block: as
many residents go as it asked for, and the block runs again, if nothing has changed meanwhile.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _core
from ..sizes import format_size

if TYPE_CHECKING:
    from .session import OffloadSession

# Free bytes are looked at this often: reading what the system says takes some 50 microseconds.
SECONDS = 0.25
# The band in which nothing changes: below it residents go, above it they come back.
LOW, HIGH = 256 << 20, 512 << 20


@dataclass(frozen=True)
class PressureEvent:
    """What a pressure callback is told.

    Attributes:
        kind: "given_up", "regrown", or "retried" (after an allocation had failed).
        bytes: That the engine has given back, or may take again.
        free_bytes: What was free when it was looked at; None after a failed allocation.
    """

    kind: str
    bytes: int
    free_bytes: int | None = None

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f", {format_size(self.free_bytes)} were free"
        return f"{self.kind.replace('_', ' ')}: {format_size(self.bytes)}{free}"


class Pressure:
    """Looks at what is free, and moves a session's residents accordingly.

    Args:
        session: Whose engine gives up and takes back.
        callback: Told of every event, on the thread that runs the model.
        low: Below so many free bytes residents are given up.
        high: Above so many, three times in a row, they come back; `high` stays free.
        free: Says how many bytes are free; None from it ends the looking.
    """

    def __init__(
        self,
        session: OffloadSession,
        callback: Callable[[PressureEvent], None] | None = None,
        *,
        low: int = LOW,
        high: int = HIGH,
        seconds: float = SECONDS,
        free: Callable[[], int | None] | None = None,
    ) -> None:
        self._session, self._callback = session, callback
        self._free = session.device.free_bytes if free is None else free
        self._gauge = _core.PressureGauge(low, high)
        self._seconds = seconds
        self._next = 0.0

    def look(self) -> None:
        """Between two blocks: give up or take back, if it is time to look again."""
        now = time.monotonic()
        if now < self._next:
            return
        free = self._free()
        self._next = now + self._seconds if free is not None else float("inf")
        if free is None:
            return
        change = self._gauge.observe(free)
        engine = self._session.engine
        if change < 0:
            self._session.device.empty_cache()
            given = engine.give_up(-change)
            if given:
                self._tell(PressureEvent("given_up", given, free))
        elif change > 0:
            limit = engine.stats().limit
            more = min(self._session.room, limit + change) - limit
            if more > 0:
                engine.resize(limit + more)
                self._tell(PressureEvent("regrown", more, free))

    def run(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        repeatable: bool,
    ) -> Any:
        """`forward`; where an allocation fails again, while there are residents to give up.

        Not where a second run would not be like the first: where the block changes what it is given
        or a buffer (`repeatable`, from the trace), gets an object that cannot be looked into (a
        cache of keys and values), or has drawn random numbers. The error, of the type that torch
        raised, says so.
        """
        random = self._session.device.random_state()
        before = _versions((args, kwargs))
        given = 0
        while True:
            try:
                return forward(*args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # Else what the forward had made so far lives as long as the error does.
                traceback.clear_frames(error.__traceback__)
                more = self._give_up_for(error)
                given += more
                why = None
                if not more:
                    why = "no resident block was left to be given up: lower vram_limit, or give "
                    why += "the call less to do"
                elif not repeatable or before is None or _versions((args, kwargs)) != before:
                    why = "the block was not run again: it may have changed what it was given"
                elif not torch.equal(self._session.device.random_state(), random):
                    why = "the block was not run again: it has drawn random numbers"
                if why is not None:
                    wanted = bytes_asked_for(error)
                    asked = "" if wanted is None else f" of {format_size(wanted)} ({wanted} B)"
                    text = f"{error}\nan allocation{asked} failed after {format_size(given)} of "
                    text += f"resident blocks had been given up; {why}"
                    raise type(error)(text) from error
            self._tell(PressureEvent("retried", more))

    def _give_up_for(self, error: BaseException) -> int:
        wanted = bytes_asked_for(error)
        engine, device = self._session.engine, self._session.device
        before = engine.stats()
        given = engine.give_up(wanted if wanted is not None else before.resident_bytes)
        if device.apart and given:
            self._session.grant(before.limit - engine.stats().limit)
            device.empty_cache()  # a cache in pieces may be what was too small
        return given

    def _tell(self, event: PressureEvent) -> None:
        self._session.pressure_events.append(event)
        if self._callback is not None:
            self._callback(event)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on the host or on a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)


def bytes_asked_for(error: BaseException) -> int | None:
    """The bytes of the allocation that failed, as torch's message says; None where it does not."""
    found = re.search(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error), re.IGNORECASE)
    if found is None:
        return None
    unit = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[found[2]]
    return int(float(found[1]) * unit)


def _versions(value: Any) -> list[int] | None:
    """How often each tensor of a call's arguments was changed; None if something is hidden.

    Tensors of inference mode do not count their changes.
    """
    found: list[int] = []

    def visit(value: Any) -> bool:
        if isinstance(value, Tensor):
            if not value.is_inference():
                found.append(value._version)
            return True
        if isinstance(value, Mapping):
            return all(visit(v) for v in value.values())
        if isinstance(value, (tuple, list)):
            return all(visit(v) for v in value)
        return value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype))

    return found if visit(value) else None
