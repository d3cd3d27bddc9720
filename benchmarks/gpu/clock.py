"""What every module of the GPU's benchmarks shares: time on the device, buffers that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ROUNDS = 7
# All copies of a buffer together are to be so much larger than a GPU's cache that it holds none.
BEYOND_CACHES = 512 << 20


class Clock:
    """Seconds that work on a device takes, by its own events on a GPU."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda:0")

    def once(self, work: Callable[[], object]) -> float:
        """Of one run, from when the device is idle."""
        if self.rehearse:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, work: Callable[[int], object], rounds: int = ROUNDS) -> float:
        """Of several runs, which are told their number so that they can change buffers."""
        work(0)
        rounds = 2 if self.rehearse else rounds
        return statistics.median(self.once(lambda n=n: work(n)) for n in range(1, rounds + 1))

    def copies(self, nbytes: int) -> int:
        """How many buffers of this size no cache holds; few where nothing is measured."""
        return 2 if self.rehearse else max(2, min(64, -(-BEYOND_CACHES // max(1, nbytes))))

    def copy_rate(self) -> float:
        """Bytes per second of a copy within the device, read and written."""
        nbytes = (4 if self.rehearse else 512) << 20
        buffers = [torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(4)]
        return 2 * nbytes / self.median(lambda n: buffers[n % 2].copy_(buffers[2 + n % 2]))
