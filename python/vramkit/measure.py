"""What one real call takes: allocated bytes and time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from .estimator import call_arguments, model_dtype, weight_bytes


@dataclass(frozen=True)
class Measurement:
    """One call's memory, by the allocator's own events, and its median time in seconds."""

    weights_bytes: int
    activations_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Weights and what the call held at most."""
        return self.weights_bytes + self.activations_bytes


def call(model: nn.Module, inputs: Any, *, repeats: int = 3) -> Measurement:
    """Run `model` on `inputs` and measure it.

    On the CPU the peak is the highest sum of the profiler's allocation events; on CUDA it is
    torch's peak of allocated bytes above the level before the call. A first call warms up.
    """
    args, kwargs = call_arguments(inputs, model_dtype(model))
    with torch.inference_mode():
        model(*args, **kwargs)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(*args, **kwargs)
            _finish(model)
            seconds.append(time.perf_counter() - start)
        watch = PeakWatch(model)
        watch.start()
        try:
            model(*args, **kwargs)
        finally:
            peak = watch.stop()
    return Measurement(weight_bytes(model), peak, median(seconds))


def _finish(model: nn.Module) -> None:
    if any(p.is_cuda for p in model.parameters()):
        torch.cuda.synchronize()


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keeps the profiler from printing its start, its stop, and that it found no GPU."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    if before is None:
        os.environ[name] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


class PeakWatch:
    """The most that torch holds between `start` and `stop`, above the level at the start.

    On the CPU by the profiler's allocation events of all threads; on CUDA by torch's peak of
    allocated bytes, which it resets.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        devices = (p.device for p in model.parameters()) if model is not None else iter(())
        self.device = next(devices, torch.device("cpu"))
        self._before = 0
        self._profiler: Any = None

    def start(self) -> None:
        """Begin to watch; RuntimeError by torch if a profiler runs already."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        from torch.profiler import ProfilerActivity, profile

        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with quiet_profiler():
            self._profiler.__enter__()

    def stop(self) -> int:
        """End it, and give the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        profiler, self._profiler = self._profiler, None
        with quiet_profiler():
            profiler.__exit__(None, None, None)
        events = profiler.profiler.kineto_results.events()
        live = peak = 0
        for event in sorted(
            (e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()
        ):
            live += event.nbytes()
            peak = max(peak, live)
        return peak


def profiled_peak(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The highest sum of the profiler's allocation events during one call on the CPU, in bytes."""
    watch = PeakWatch()
    watch.start()
    try:
        out = model(*args, **kwargs)
        del out
    finally:
        peak = watch.stop()
    return peak
