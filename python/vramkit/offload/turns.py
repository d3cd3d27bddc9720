"""One thread at a time, also where the one that has the turn is inside compiled code.

Compiled code takes its turn by one operator and gives it back by another. Where something fails in
between, nobody gives it back; but the frame that ran the graph is then no longer running.
"""

from __future__ import annotations

import os
import sys
import threading
from types import FrameType

import torch

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_LOOK_AGAIN = 0.05  # seconds until one who waits for compiled code looks whether it still runs


class Turn:
    """A lock that its thread may take again, and that compiled code may hold.

    Attributes:
        frame: Of the graph that holds the turn, if one does.
    """

    def __init__(self) -> None:
        self.frame: FrameType | None = None
        self._free = threading.Condition()
        self._owner: int | None = None
        self._count = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._free:
            while self._owner is not None and self._owner != me:
                if self.frame is not None and not _runs(self._owner, self.frame):
                    self.frame, self._count = None, 0
                    break
                self._free.wait(_LOOK_AGAIN if self.frame is not None else None)
            self._owner = me
            self._count += 1

    def __exit__(self, *error: object) -> None:
        self._give_back()

    def hold(self) -> None:
        """The graph that is running keeps the turn, until `let_go`; call it within the turn."""
        with self._free:
            self.frame = _frame_of_the_graph()
            self._count += 1
            self._free.notify_all()  # who waits has to look at the frame from now on

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
                self._free.notify()


def _frame_of_the_graph() -> FrameType:
    """The innermost frame of code that is neither this package's nor torch's own."""
    here = os.path.dirname(os.path.abspath(__file__)) + os.sep
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, here)):
        frame = frame.f_back
    return frame


def _runs(thread: int, frame: FrameType) -> bool:
    """Whether the thread is still inside the frame."""
    found = sys._current_frames().get(thread)
    while found is not None and found is not frame:
        found = found.f_back
    return found is not None
