"""One system within a quarter of its weights, in a process of its own: peak, bytes, bits, time.

`python -m benchmarks.systems_low_vram SYSTEM SIZE yes|no`: offloaded, or resident, to show that the
measurement can fail. Peaks are anonymous and mapped pages above the level after imports and a first
use, sampled once a millisecond while calls run; building the model, which here begins with random
weights in memory, is not in them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from .runner import in_turn
from .small_systems import SYSTEMS, SmallSystem, bytes_of

TIMES = 4  # how many times the limit the weights are


def _pages(keys: tuple[str, ...] = ("RssAnon", "RssFile")) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.split(":")[0] in keys)


def _settle() -> None:
    """What is free goes back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """The most pages at once."""

    def __enter__(self) -> Peak:
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, _pages())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, _pages())


def _first_use(system: SmallSystem, folder: str) -> None:
    """What a first use brings in for good: imports, threads' stacks."""
    made = system.build(system.streamed, system.sizes["test"])
    held = system.stream(made, bytes_of(made) // 2, folder)
    system.call(made)
    held.vramkit_session.disable()


def measure(system: SmallSystem, size: str, offloads: bool, folder: str) -> dict[str, Any]:
    """The figures of one run; bits and times against a resident object built afterwards."""
    _first_use(system, folder)
    _settle()
    base = _pages()
    made = system.build(system.streamed, system.sizes[size])
    weights = bytes_of(made)
    limit = weights // TIMES
    found: dict[str, Any] = {"weights_bytes": weights, "limit_bytes": limit}
    session = None
    if offloads:
        session = system.stream(made, limit, folder).vramkit_session
    _settle()
    with Peak() as first:  # divides each component in its turn
        system.call(made)
    _settle()
    before = _copied(session)
    with Peak() as steady:
        output = system.call(made)
    found |= {"first_peak_bytes": first.most - base, "peak_bytes": steady.most - base}
    if session is None:
        return found
    found["copied_bytes"] = _copied(session) - before
    found["always_in_memory_bytes"] = session.fixed_bytes
    resident = system.build(system.streamed, system.sizes[size])
    found["bit_equal"] = bool(torch.equal(system.call(resident), output))
    times = {"resident": lambda: system.call(resident), "low_vram": lambda: system.call(made)}
    found["seconds"] = in_turn(times, repeats=7 if size != "test" else 1, slowest=30.0)
    found["seconds_ratio"] = found["seconds"]["low_vram"] / found["seconds"]["resident"]
    return found


def _copied(session: Any) -> int:
    if session is None:
        return 0
    return sum(one.engine.stats().bytes_copied for one in session.sessions.values())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        data = measure(SYSTEMS[sys.argv[1]], sys.argv[2], sys.argv[3] == "yes", scratch)
    print(json.dumps(data))
