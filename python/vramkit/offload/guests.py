"""A block as a session sees it: its parameters, where they lie, who is inside."""

from __future__ import annotations

import enum
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ..errors import BudgetError
from ..sizes import format_size
from .places import Place

if TYPE_CHECKING:
    from .session import OffloadSession


class State(enum.Enum):
    """Of a block's parameters, against what its store and the engine have."""

    SAME = enum.auto()
    WRITTEN = enum.auto()
    OTHER = enum.auto()  # of another dtype, shape or device


class Guest:
    """One block as the session sees it: its parameters, where they lie, who is inside."""

    def __init__(self, entries: Sequence[nn.Module], label: str) -> None:
        self.entries, self.label = list(entries), label
        self.index: int | None = None  # in the engine; None: it has no parameters any more
        self.inside = 0
        # Where it lies in the engine while somebody is inside, and how much of it.
        self.at = self.nbytes_there = 0
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


class Open(NamedTuple):
    """A call of a block that has begun; `frame` is None where compiled code has it."""

    guest: Guest
    thread: int
    frame: types.FrameType | None


class Terms:
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
