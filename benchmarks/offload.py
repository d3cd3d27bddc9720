"""The offload engine against the rates of the machine, all measured in the same run.

24 blocks of an MLP 2048 -> 8192 -> 2048 in bfloat16 (1.61 GB) lie in one file. The engine streams
them through its slots: from the page cache, and past it from the disk. Beside it stand what a copy
of memory, a read from the page cache and direct reads reach in plain loops, and what the arithmetic
takes with all blocks resident. A copying engine cannot be faster than the longest of the
arithmetic, the copies, and both together on all processors. Whole models, packed ones, and
accelerate's come after that: offload_models.py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from vramkit import _core

from .offload_models import processor_seconds, run_larger, run_models

BLOCKS = 24
WIDTH, HIDDEN = 2048, 8192
BLOCK = 2 * WIDTH * HIDDEN * 2  # bytes
PIECE = 8 << 20
THREADS = 2

# What is promised: the engine's time over the limit (warm), its rate over the disk's (cold).
WARM_OVER_LIMIT = 1.25
COLD_OVER_DISK = 0.9


def _write(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2 * WIDTH * HIDDEN, generator=generator) * WIDTH**-0.5
    base = weights.to(torch.bfloat16)
    with path.open("wb") as file:
        for block in range(BLOCKS):  # each of its own, at little cost
            file.write(base.roll(4097 * block).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def _forget(path: Path) -> None:
    """Empty the page cache of the file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _engine(path: Path, resident: int = 0) -> _core.Engine:
    blocks = [
        _core.BlockSpec(str(i), BLOCK, [_core.Extent(0, i * BLOCK, 0, BLOCK)])
        for i in range(BLOCKS)
    ]
    return _core.Engine(
        [_core.FileSource(str(path))], blocks, limit=(2 + resident) * BLOCK, threads=THREADS
    )


def _touch(engine: _core.Engine) -> None:
    for block in range(BLOCKS):
        engine.acquire(block)
        engine.release(block)


def _read_all(path: Path, flags: int) -> None:
    """Read the file once into touched memory, `THREADS` threads and one piece at a time."""
    descriptor = os.open(path, os.O_RDONLY | flags)

    def work(thread: int) -> None:
        buffer = _buffers[thread]
        for piece in range(thread, BLOCKS * BLOCK // PIECE, THREADS):
            if os.preadv(descriptor, [buffer], piece * PIECE) != PIECE:
                raise OSError("a short read")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    os.close(descriptor)


# In large pages, as the engine's places are.
_stores = [_core.HostStore(PIECE) for _ in range(THREADS)]
_buffers = [memoryview(store) for store in _stores]  # type: ignore[arg-type]


def _mlp(x: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    half = WIDTH * HIDDEN
    up, down = block[:half].view(HIDDEN, WIDTH), block[half:].view(WIDTH, HIDDEN)
    return torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(x, up)), down)


def _forward(engine: _core.Engine, views: dict[int, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for block in range(BLOCKS):
        address = engine.acquire(block)
        if address not in views:
            whole = torch.frombuffer(engine.view(), dtype=torch.uint8)
            start = address - engine.base
            views[address] = whole[start : start + BLOCK].view(torch.bfloat16)
        x = _mlp(x, views[address])
        engine.release(block)
    return x


def _times(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each, and of processor time, called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    processor: dict[str, list[float]] = {name: [] for name in work}
    for name in work:
        work[name]()
    for _ in range(repeats):
        for name, call in work.items():
            used, begin = processor_seconds(), time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
            processor[name].append(processor_seconds() - used)
    return {
        name: {"seconds": median(seconds[name]), "processor": median(processor[name])}
        for name in work
    }


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measure, print, and return the figures and the promises that were missed."""
    torch.set_num_threads(options.threads)
    result, missed = _run_engine(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, torch.no_grad():
        if options.larger:
            result["larger"] = run_larger(options, Path(folder))
        else:
            result["models"], more = run_models(options, Path(folder))
            missed += more
    return result, missed


def _run_engine(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    cores = options.threads
    total = BLOCKS * BLOCK
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, torch.inference_mode():
        path = Path(folder) / "blocks"
        _write(path)
        _read_all(path, 0)
        x = torch.randn(options.rows, WIDTH).to(torch.bfloat16)
        model = [
            torch.from_file(str(path), shared=False, size=total // 2, dtype=torch.bfloat16)[
                i * BLOCK // 2 : (i + 1) * BLOCK // 2
            ].clone()
            for i in range(BLOCKS)
        ]
        target = torch.empty_like(model[0])

        def resident() -> torch.Tensor:
            y = x
            for block in model:
                y = _mlp(y, block)
            return y

        def copies() -> None:
            for block in model:
                target.copy_(block)

        engine, half = _engine(path), _engine(path, BLOCKS // 2)
        views: dict[int, torch.Tensor] = {}
        half_views: dict[int, torch.Tensor] = {}
        if not torch.equal(_forward(engine, views, x), resident()):
            raise AssertionError("the offloaded model computes something else")
        warm = _times(
            {
                "memory to memory": copies,
                "page cache to memory": lambda: _read_all(path, 0),
                "engine, no arithmetic": lambda: _touch(engine),
                "resident": resident,
                "engine": lambda: _forward(engine, views, x),
                "engine, half resident": lambda: _forward(half, half_views, x),
            },
            options.repeats,
        )
        stats = engine.stats()

        def cold(call: Callable[[], Any]) -> float:
            _forget(path)
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin

        direct_seconds, engine_seconds = [], []
        for repeat in range(options.repeats):
            # In turn: a disk that is a file elsewhere may be cached there by whoever came first.
            if repeat % 2 == 0:
                direct_seconds.append(cold(lambda: _read_all(path, os.O_DIRECT)))
            engine_seconds.append(cold(lambda: _touch(engine)))
            if repeat % 2 == 1:
                direct_seconds.append(cold(lambda: _read_all(path, os.O_DIRECT)))
        paths = engine.stats().bytes_by_path
    compute, copy = warm["resident"]["seconds"], warm["engine, no arithmetic"]
    together = (cores * compute + copy["processor"]) / cores
    bound = max(compute, copy["seconds"], together)
    result = {
        "bytes": total,
        "rows": options.rows,
        "limit_bytes": stats.limit,
        "warm": warm,
        "bound_seconds": bound,
        "over_bound": warm["engine"]["seconds"] / bound,
        "cold": {
            "direct_bytes_per_second": total / median(direct_seconds),
            "engine_bytes_per_second": total / median(engine_seconds),
            "of_direct": median(direct_seconds) / median(engine_seconds),
            "bytes_by_path": paths,
        },
    }
    print(f"{total / 1e9:.2f} GB in {BLOCKS} blocks, {options.rows} rows, {cores} threads")
    for name, times in warm.items():
        print(
            f"  {name:24} {times['seconds']:.3f} s, processor {times['processor']:.3f} s,"
            f" {total / times['seconds'] / 1e9:.1f} GB/s"
        )
    print(f"  limit {bound:.3f} s: the engine takes {result['over_bound']:.2f} of it")
    cold_result: dict[str, Any] = result["cold"]  # type: ignore[assignment]
    print(
        f"  cold: direct reads {cold_result['direct_bytes_per_second'] / 1e9:.2f} GB/s, engine"
        f" {cold_result['engine_bytes_per_second'] / 1e9:.2f} GB/s,"
        f" {cold_result['of_direct']:.2f} of it"
    )
    missed = []
    if result["over_bound"] > WARM_OVER_LIMIT:
        missed.append(f"warm: {result['over_bound']:.2f} of the limit, not {WARM_OVER_LIMIT}")
    if cold_result["of_direct"] < COLD_OVER_DISK:
        missed.append(f"cold: {cold_result['of_direct']:.2f} of direct reads")
    return result, missed
