"""Budgets of memory that a test may hold."""

from __future__ import annotations

from typing import Any

import pytest


class Budget:
    """The most that torch may hold above what it held when this began.

    Attributes:
        limit_bytes: The budget.
        peak_bytes: What was held at most; None while it is being watched.
    """

    def __init__(self, limit: str | int | float, device: Any = None) -> None:
        import torch
        from vramkit.measure import PeakWatch
        from vramkit.sizes import parse_size

        self.limit_bytes = parse_size(limit)
        self.peak_bytes: int | None = None
        self._checked = False
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._watch: PeakWatch | None = PeakWatch()
        self._watch.device = torch.device(device)
        if self._watch.device.type == "cpu" and torch._C._autograd._profiler_enabled():
            raise RuntimeError(
                "a memory budget on a CPU counts by torch's profiler, which is running already: "
                "end that, or the other budget, first"
            )
        self._watch.start()

    def stop(self) -> None:
        """End the watch; no more than once."""
        watch, self._watch = self._watch, None
        if watch is not None:
            self.peak_bytes = watch.stop()

    def check(self) -> None:
        """Fail the test if the budget was passed."""
        if self._checked or self.peak_bytes is None:
            return
        self._checked = True
        from vramkit.sizes import format_size

        over = self.peak_bytes - self.limit_bytes
        if over > 0:
            share = f" ({over / self.limit_bytes:.1%})" if self.limit_bytes else ""
            pytest.fail(
                f"memory budget: torch held {format_size(self.peak_bytes)} at most, which is "
                f"{format_size(over)}{share} more than {format_size(self.limit_bytes)}",
                pytrace=False,
            )

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.stop()
        if kind is None:
            self.check()


class BudgetFactory:
    """What the fixture `memory_budget` is: called with a limit, it begins to watch.

    The limit is in bytes as text with a unit ("64 MiB", "1 GB"), or GiB as a number; `device` is
    "cpu" or "cuda", None for CUDA if there is any.
    """

    def __init__(self, budgets: list[Budget]) -> None:
        self._budgets = budgets

    def __call__(self, limit: str | int | float, device: Any = None) -> Budget:
        """Begin; raises ValueError for a limit that cannot be read, RuntimeError as torch does."""
        budget = Budget(limit, device)
        self._budgets.append(budget)
        return budget
