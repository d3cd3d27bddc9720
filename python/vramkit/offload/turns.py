"""One thread at a time, also where the one that has the turn is inside compiled code.

Compiled code takes its turn by one operator and gives it back by another. Where something fails in
between, nobody gives it back; but the frame that ran the graph is then no longer running.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType

import torch

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_LOOK_AGAIN = 0.0005  # seconds


class Turn:
    """A lock that its thread may take again, and that compiled code may hold.

    Attributes:
        frame: Of the graph that holds the turn, if one does.
    """

    def __init__(self) -> None:
        self.frame: FrameType | None = None
        self._free = threading.Lock()
        self._owner: int | None = None
        self._count = 0

    def __enter__(self) -> None:
        # Not a Condition: a signal that comes while one is entered leaves it locked for ever.
        me = threading.get_ident()
        while True:
            with self._free:
                frame, owner = self.frame, self._owner
                others = owner is not None and owner != me
                if others and frame is not None and owner is not None and not runs(owner, frame):
                    self.frame = self._owner = owner = None
                if owner is None:
                    self._owner, self._count = me, 0
                if self._owner == me:
                    self._count += 1
                    return
            time.sleep(_LOOK_AGAIN)

    def __exit__(self, *error: object) -> None:
        self._give_back()

    def hold(self) -> None:
        """The graph that is running keeps the turn, until `let_go`; call it within the turn."""
        with self._free:
            self.frame = _frame_of_the_graph()
            self._count += 1

    def let_go(self) -> None:
        """The end of `hold`; nothing where the turn was taken from a graph that failed."""
        if self.frame is not None:
            self.frame = None
            self._give_back()

    def _give_back(self) -> None:
        with self._free:
            self._count -= 1
            if self._count == 0:
                self._owner = None


def _frame_of_the_graph() -> FrameType:
    """The innermost frame of code that is neither this package's nor torch's own."""
    here = os.path.dirname(os.path.abspath(__file__)) + os.sep
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, here)):
        frame = frame.f_back
    return frame


def runs(thread: int, frame: FrameType) -> bool:
    """Whether the thread is still inside the frame."""
    found = sys._current_frames().get(thread)
    while found is not None and found is not frame:
        found = found.f_back
    return found is not None
