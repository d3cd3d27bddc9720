"""Loading checkpoints, against safetensors' own reader and what memory and disk permit.

Files of 1.6 GB in several shapes: few large tensors, thousands of small ones, a converted model,
and one whose elements lie at odd addresses (as unpadded headers leave them). Beside them stand a
copy from memory to memory on as many threads as there are processors, direct reads of the same file
in a plain loop, and what it takes to touch so much fresh memory. "Touched" is what reads one byte
of each page, so that a mapped file is really there. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
import vramkit
from torch import Tensor, nn
from vramkit import _core

from .offload import _forget

GB = 1.6e9
PIECE = 8 << 20
THREADS = 2  # of the plain direct reads
LAYERS, WIDTH = 95, 4096  # of the converted model

# What is promised.
MAPPED_OVER_PEER = 1.1  # seconds, warm, every page touched
OF_COPY = 0.8  # bytes per second of a copy in memory, warm, into touched memory
OF_DISK = 0.9  # bytes per second of direct reads, cold
OVER_PEER_COLD = 1.25  # times faster than safetensors, every page touched
PEAK_OVER_STORED = 1.05  # bytes


def _factory() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def _write(path: Path, shape: tuple[int, ...], dtype: str, torch_dtype: torch.dtype) -> None:
    """Tensors of one shape, each different, up to the size of all."""
    count = 1
    for n in shape:
        count *= n
    base = torch.randn(count).to(torch_dtype).view(torch.uint8)
    tensors = int(GB / base.nbytes)
    specs = [(str(i), dtype, list(shape)) for i in range(tensors)]
    with _core.SafetensorsWriter(path, specs, {"format": "pt"}) as writer:
        for i in range(tensors):
            tensor = base.roll(4097 * i)
            writer.write(str(i), tensor.data_ptr(), tensor.nbytes)
        writer.commit()


def _write_odd(path: Path) -> None:
    """bfloat16 behind one byte."""
    base = torch.randn(4096, 4096).to(torch.bfloat16).view(torch.uint8).reshape(-1)
    count = int(GB / base.nbytes)
    specs = [("lead", "U8", [1])] + [(str(i), "BF16", [4096, 4096]) for i in range(count)]
    with _core.SafetensorsWriter(path, specs, {"format": "pt"}) as writer:
        writer.write("lead", base.data_ptr(), 1)
        for i in range(count):
            tensor = base.roll(4098 * i)
            writer.write(str(i), tensor.data_ptr(), tensor.nbytes)
        writer.commit()


def _write_converted(folder: Path) -> None:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    vramkit.convert(layer, "int8")
    vramkit.save(nn.Sequential(*(copy.deepcopy(layer[0]) for _ in range(LAYERS))), folder)


def _touched(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        int(tensor.view(torch.uint8).reshape(-1)[::4096].sum())


def _filled(size: int) -> None:
    """Memory in large pages, written to for the first time, on all threads."""
    torch.frombuffer(_core.HostStore(size), dtype=torch.uint8).fill_(1)


def _direct(path: Path) -> None:
    """Read the file once, past the page cache, `THREADS` threads and one piece at a time."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def work(thread: int) -> None:
        for at in range(thread * PIECE, size, THREADS * PIECE):
            if os.preadv(descriptor, [_buffers[thread]], at) != min(PIECE, size - at):
                raise OSError("a short read")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    os.close(descriptor)


_stores = [_core.HostStore(PIECE) for _ in range(THREADS)]
_buffers = [memoryview(store) for store in _stores]  # type: ignore[arg-type]


def _medians(
    work: dict[str, Callable[[], Any]], repeats: int, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median seconds of each, called in turn, and in the other order every second time."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats):
        for name in list(work)[:: 1 if repeat % 2 == 0 else -1]:
            if before is not None:
                before()
            begin = time.perf_counter()
            result = work[name]()
            seconds[name].append(time.perf_counter() - begin)
            del result  # giving memory back is not loading
    return {name: median(values) for name, values in seconds.items()}


def _back(size: int) -> None:
    """A virtual machine's memory comes from its host when it is touched, and goes back when unused.

    What is measured takes its memory from what was free just before, not from the host.
    """
    _filled(2 * size)


_PEAK = """
import json, sys
import torch, vramkit, vramkit.checkpoint, vramkit.layers
from benchmarks import loading
loading.LAYERS = int(sys.argv.pop())
_factory = loading._factory
def status(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
base = status("VmRSS:")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
path, folder = sys.argv[1:]
held = vramkit.load(folder, factory=_factory) if folder else vramkit.load_file(path)
print(status("VmHWM:") - base)
"""


def _peak(path: Path, folder: Path | None) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path), str(folder or ""), str(LAYERS)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def _measure(path: Path, folder: Path | None, repeats: int) -> dict[str, Any]:
    size = path.stat().st_size
    target = vramkit.load_file(path)
    found = safetensors.torch.load_file(path)
    if set(target) != set(found) or not all(
        torch.equal(target[name].view(torch.uint8), found[name].view(torch.uint8)) for name in found
    ):
        raise AssertionError("other bits than safetensors'")
    del found
    one = torch.empty(sum(t.nbytes for t in target.values()), dtype=torch.uint8)
    other = torch.ones_like(one)
    warm = _medians(
        {
            "memory to memory": lambda: one.copy_(other),
            "into touched memory": lambda: vramkit.load_file(path, into=target),
            "mapped, touched": lambda: _touched(vramkit.load_file(path, mapped=True)),
            "safetensors, touched": lambda: _touched(safetensors.torch.load_file(path)),
            "load_file": lambda: vramkit.load_file(path),
        }
        | ({"load": lambda: vramkit.load(folder, factory=_factory)} if folder else {}),
        repeats,
        lambda: _back(size),
    )

    def forget() -> None:
        _forget(path)
        _back(size)

    cold = _medians(
        {
            "direct reads": lambda: _direct(path),
            "fresh memory, filled": lambda: _filled(size),
            "into touched memory": lambda: vramkit.load_file(path, into=target),
            "load_file": lambda: vramkit.load_file(path),
            "safetensors, touched": lambda: _touched(safetensors.torch.load_file(path)),
        }
        | ({"load": lambda: vramkit.load(folder, factory=_factory)} if folder else {}),
        repeats,
        forget,
    )
    best = cold["load" if folder else "load_file"]
    # Both at once at best: the disk's time, and that of memory nobody has touched before.
    limit = max(cold["direct reads"], cold["fresh memory, filled"])
    return {
        "bytes": size,
        "tensors": len(_core.SafetensorsFile(path)),
        "warm_seconds": warm,
        "cold_seconds": cold,
        "mapped_over_safetensors": warm["mapped, touched"] / warm["safetensors, touched"],
        "of_copy": warm["memory to memory"] / warm["into touched memory"],
        "of_direct": cold["direct reads"] / cold["into touched memory"],
        "fresh_of_limit": limit / best,
        "fresh_of_direct": cold["direct reads"] / best,
        "faster_than_safetensors_cold": cold["safetensors, touched"] / best,
        "peak_over_stored": _peak(path, folder) / size,
    }


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measure, print, and return the figures and the promises that were missed."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    writers: dict[str, Callable[[Path], Any]] = {
        "48 of 16 M bfloat16": lambda p: _write(p, (4096, 4096), "BF16", torch.bfloat16),
        "6,103 of 64 k float32": lambda p: _write(p, (256, 256), "F32", torch.float32),
        "odd addresses": _write_odd,
        "95 layers in int8": lambda p: _write_converted(p.parent),
    }
    results, missed = {}, []
    for name, write in writers.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / "model.safetensors"
            write(path)
            converted = path.parent if (path.parent / "vramkit.json").is_file() else None
            result = results[name] = _measure(path, converted, options.repeats)
        _print(name, result)
        for key, bound, most in (
            ("mapped_over_safetensors", MAPPED_OVER_PEER, True),
            ("of_copy", OF_COPY, False),
            ("of_direct", OF_DISK, False),
            ("fresh_of_direct", OF_DISK, False),
            ("faster_than_safetensors_cold", OVER_PEER_COLD, False),
            ("peak_over_stored", PEAK_OVER_STORED, True),
        ):
            if result[key] > bound if most else result[key] < bound:
                missed.append(f"{name}: {key} is {result[key]:.2f}, not {bound}")
    return {"threads": options.threads, "files": results}, missed


def _print(name: str, result: dict[str, Any]) -> None:
    size = result["bytes"]
    print(f"{name}: {size / 1e9:.2f} GB, {result['tensors']} tensors")
    for state in ("warm", "cold"):
        for what, seconds in result[f"{state}_seconds"].items():
            print(f"  {state} {what:22} {seconds:.3f} s, {size / seconds / 1e9:5.1f} GB/s")
    print(
        f"  mapped {result['mapped_over_safetensors']:.2f} of safetensors' time;"
        f" into memory {result['of_copy']:.2f} of a copy's rate;"
        f" cold {result['of_direct']:.2f} of direct reads, into fresh memory"
        f" {result['fresh_of_direct']:.2f} ({result['fresh_of_limit']:.2f} of what first touch and"
        f" disk permit), {result['faster_than_safetensors_cold']:.2f} times safetensors;"
        f" peak {result['peak_over_stored']:.3f} of the stored bytes"
    )
