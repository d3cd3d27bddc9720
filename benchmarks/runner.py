"""What every suite shares: timing in turn, the machine's limits, and the results file."""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import vramkit
from vramkit import _core

PEERS = ("torch", "bitsandbytes", "optimum-quanto", "torchao", "transformers")


def environment() -> dict[str, Any]:
    """Versions and the processor, so that a result says what it was taken on."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "vramkit": vramkit.__version__,
        "isa": _core.active_isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "processor": _processor(),
        "versions": versions,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_json(path: str, data: dict[str, Any]) -> None:
    """Write one result."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(data, indent=1) + "\n")


def in_turn(
    work: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 15,
    slowest: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each, called in turn so that a busy moment hits all alike.

    Each is called twice and timed the second time: what the one before it left behind (full
    caches, memory still to be written back, forgotten address translations) is not its own doing.
    `slowest` bounds the seconds spent on any one of them. `clock`: time.thread_time where one
    thread works and others' work on the machine should not count.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call()
    spent = dict.fromkeys(work, 0.0)
    for _ in range(repeats):
        for name, call in work.items():
            if spent[name] > slowest and len(times[name]) >= 3:
                continue
            begin = clock()
            call()
            start = clock()
            call()
            end = clock()
            times[name].append(end - start)
            spent[name] += end - begin
    return {name: median(values) for name, values in times.items()}


def read_rate(nbytes: int = 256 << 20) -> float:
    """Bytes per second of a streaming read from memory on torch's threads, measured now."""
    return float(torch.ops.vramkit._read_rate(_buffer(nbytes)))


@functools.cache
def _buffer(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes // 8, dtype=torch.int64)


def product_rate(dtype: torch.dtype) -> float:
    """Products per second of the dot-product instruction for `dtype`, operands in registers.

    On every thread that torch uses; float16 inputs are multiplied as float32.
    """
    return float(torch.ops.vramkit._product_rate(torch.empty(torch.get_num_threads(), dtype=dtype)))
