"""Who may synthesize now, who waits, and who is turned away."""

from __future__ import annotations

import asyncio

from ..errors import VramkitError


class BusyError(VramkitError, RuntimeError):
    """No room: `status` is 429 where the queue is full, 503 where waiting took too long."""

    def __init__(self, message: str, status: int, retry_after: int) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Admission:
    """At most `running` at once and `waiting` behind them, first come, first served.

    To be used from one event loop.
    """

    def __init__(self, running: int, waiting: int, timeout_seconds: float) -> None:
        self.limit = running
        self.most_waiting = waiting
        self.timeout_seconds = timeout_seconds
        self.running = 0
        self.closed = False
        self._queue: dict[int, asyncio.Future[None]] = {}
        self._next = 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    async def enter(self) -> None:
        """Return once this caller may run; it must call `leave`. Raises BusyError."""
        if self.closed:
            raise BusyError("the server is shutting down", 503, 5)
        if self.running < self.limit and not self._queue:
            self.running += 1
            return
        if len(self._queue) >= self.most_waiting:
            raise BusyError(
                f"too many requests: {self.running} are running and {len(self._queue)} are waiting",
                429,
                max(1, len(self._queue) // self.limit),
            )
        ticket, turn = self._next, asyncio.get_running_loop().create_future()
        self._next += 1
        self._queue[ticket] = turn
        try:
            # `wait` leaves the future alone, so that a turn given in the last moment is seen.
            await asyncio.wait((turn,), timeout=self.timeout_seconds)
        except asyncio.CancelledError:
            if turn.done() and turn.exception() is None:
                self.leave()
            raise
        finally:
            self._queue.pop(ticket, None)
        if not turn.done():
            raise BusyError(
                f"no turn came within {self.timeout_seconds:g} seconds", 503, self.limit * 5
            )
        turn.result()

    def leave(self) -> None:
        """One that ran is done: the longest waiting one takes its place."""
        for ticket, turn in self._queue.items():
            if not turn.done():
                del self._queue[ticket]
                turn.set_result(None)  # its place is this one: `running` stays
                return
        self.running -= 1

    def close(self) -> None:
        """Turn away all who wait and all who come; those who run go on."""
        self.closed = True
        for turn in self._queue.values():
            if not turn.done():
                turn.set_exception(BusyError("the server is shutting down", 503, 5))
        self._queue.clear()
