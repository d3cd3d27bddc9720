"""The allocator simulator: events replayed per second, by trace and by allocator.

The traces have a million events: layers that allocate and release in the order of a forward and a
backward pass, and blocks of random sizes released in random order with 100 to 100,000 alive, which
keeps the free lists long. No peer is known that replays torch's allocator; the naive reference of
the tests is timed beside it on a part of the trace.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from array import array
from pathlib import Path
from statistics import median
from typing import Any

from vramkit import _core

EVENTS = 1_000_000
PROMISED = 1_000_000  # events a second, in every case
GIB = 1 << 30

ALLOCATORS: dict[str, dict[str, Any]] = {
    "cuda": {},
    "cuda, expandable segments": {"expandable_segments": True},
    "cuda, max_split_size and sweeps": {
        "limit": 64 * GIB,
        "max_split_size": 64 << 20,
        "garbage_collection_threshold": 0.5,
    },
    "cpu": {"kind": "cpu"},
}


def steps() -> array[int]:
    """Training steps of 200 layers: activations held until the backward pass, and workspaces."""
    generator, rows = random.Random(0), array("q")
    sizes = [
        generator.choice((1, 4, 16)) * generator.randrange(1 << 10, 1 << 20) for _ in range(200)
    ]
    block = 0
    while len(rows) < 4 * EVENTS:
        held = []
        for layer, size in enumerate(sizes):
            rows.extend((block, size, 0, layer, block + 1, size // 3, 0, layer))
            rows.extend((block + 1, -1, 0, layer))
            held.append(block)
            block += 2
        for layer in reversed(range(len(sizes))):
            rows.extend((block, sizes[layer], 0, layer, held[layer], -1, 0, layer))
            rows.extend((block, -1, 0, layer))
            block += 1
    return rows[: 4 * EVENTS]


def shuffled(alive: int) -> array[int]:
    """Sizes from 64 bytes to 64 MiB by their logarithm, released in random order."""
    generator, rows = random.Random(alive), array("q")
    live: list[int] = []
    block = 0
    while len(rows) < 4 * EVENTS:
        if live and (len(live) >= alive or generator.random() < 0.45):
            place = generator.randrange(len(live))
            live[place], live[-1] = live[-1], live[place]
            rows.extend((live.pop(), -1, 0, 0))
        else:
            live.append(block)
            rows.extend((block, int(2 ** generator.uniform(6, 26)), 0, block % 97))
            block += 1
    return rows


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Events per second, by trace and allocator."""
    traces = {"training steps": steps()}
    traces |= {f"random, {n} alive": shuffled(n) for n in (100, 10_000, 100_000)}
    found: dict[str, Any] = {}
    missed: list[str] = []
    print(f"{EVENTS} events\n{'trace':22}{'allocator':34}{'seconds':>9}{'events/s':>12}")
    for trace, rows in traces.items():
        for name, settings in ALLOCATORS.items():
            if trace.endswith("100000 alive") and "limit" in settings:
                continue  # does not fit below the limit
            config = _core.AllocatorConfig(**settings)
            seconds = _seconds(rows, config)
            result = _core.replay(rows, config)
            rate = result.events / seconds
            found[f"{trace}: {name}"] = {
                "seconds": seconds,
                "events": result.events,
                "events_per_second": rate,
                "peak_allocated_bytes": result.peak_allocated_bytes,
                "peak_reserved_bytes": result.peak_reserved_bytes,
                "fragmentation": result.fragmentation,
                "device_allocations": result.device_allocations,
            }
            print(f"{trace:22}{name:34}{seconds:>9.3f}{rate:>12,.0f}", flush=True)
            if result.events != EVENTS:
                missed.append(f"{trace}: {name}: ran out of memory, replayed {result.events}")
            if rate < PROMISED:
                missed.append(f"{trace}: {name}: {rate:,.0f} events/s, promised {PROMISED:,}")
    naive = _naive(traces["training steps"], 6000)
    if naive is not None:
        found["naive reference, events per second"] = naive
        ours = found["training steps: cuda"]["events_per_second"]
        print(
            f"the tests' naive reference: {naive:,.0f} events/s, {ours / naive:,.0f} times slower"
        )
    return found, missed


def _seconds(rows: array[int], config: _core.AllocatorConfig, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        _core.replay(rows, config)
        times.append(time.perf_counter() - start)
    return median(times)


def _naive(rows: array[int], count: int) -> float | None:
    path = Path(__file__).resolve().parents[1] / "tests" / "python" / "allocator_reference.py"
    spec = importlib.util.spec_from_file_location("allocator_reference", path)
    if not path.is_file() or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    events = [tuple(rows[i : i + 4]) for i in range(0, 4 * count, 4)]
    start = time.perf_counter()
    module.replay(events, module.Options())
    return count / (time.perf_counter() - start)
