"""Offloaded models, from Python: `enable_vram_management` against resident models and accelerate.

A chain of MLPs 2048 -> 8192 -> 2048 in bfloat16, 67 MB each, as plain torch modules, and stored as
int8 and nf4. What is called cold has its file out of the page cache and all streamed blocks absent.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import vramkit
from torch import Tensor, nn
from vramkit.estimator import weight_bytes

WIDTH, HIDDEN = 2048, 8192

# What is promised; times over the limit, rates over the disk's, ratios between formats.
WARM_OVER_LIMIT = 1.25
COLD_OVER_DISK = 0.9
COLD_OVER_ACCELERATE = 1.4
FEWER_BYTES = {"int8": 1.95, "nf4": 3.5}  # 2 and 4, less the scales
COMPUTE_BOUND = 1.08
SLOTS = 2  # that the smallest limit has room for


class Mlp(nn.Module):
    """One layer of the chain."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Up, ReLU, down."""
        return self.down(torch.relu(self.up(x)))


def chain(layers: int) -> nn.Module:
    """Layers with weights of their own, at little cost."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2 * WIDTH * HIDDEN, generator=generator) * WIDTH**-0.5
    base = weights.to(torch.bfloat16)
    with torch.device("meta"):
        model = nn.Sequential(*[Mlp() for _ in range(layers)])
    for i, layer in enumerate(model):
        own = base.roll(4097 * i)
        layer.up.weight = nn.Parameter(own[: WIDTH * HIDDEN].view(HIDDEN, WIDTH), False)
        layer.down.weight = nn.Parameter(own[WIDTH * HIDDEN :].view(WIDTH, HIDDEN), False)
    return model.eval()


def offloaded(model: nn.Module, folder: Path, x: Tensor, share: float = 0.0) -> nn.Module:
    """A copy of `model` with two slots, and residents for a share of its bytes."""
    one = copy.deepcopy(model)
    folder.mkdir()
    try:
        vramkit.enable_vram_management(one, "1 B", 0, inputs=(x,), folder=folder)
        raise AssertionError("a limit of one byte was accepted")
    except vramkit.BudgetError as error:
        least = error.needed_bytes
    room = SLOTS * least + int(share * weight_bytes(one)) + (4 << 20)
    vramkit.enable_vram_management(one, f"{room} B", 0, inputs=(x,), folder=folder)
    return one


def forget(folder: Path) -> None:
    """Empty the page cache of a folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Case:
    """A model that is called, and what has to be done for a cold call."""

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        self.model, self.folder = model, folder
        self.session = getattr(model, "vramkit_session", None)

    def call(self, x: Tensor) -> Tensor:
        """One forward."""
        out: Tensor = self.model(x)
        return out

    def cool(self) -> None:
        """The file leaves the page cache, streamed blocks leave their slots."""
        if self.folder is not None:
            forget(self.folder)
        if self.session is not None:
            engine = self.session.engine
            for block in range(len(engine)):
                if not engine.block_stats(block).resident:
                    engine.invalidate(block)
            forget(self.folder) if self.folder is not None else None

    def settle(self) -> None:
        """Wait until nothing is being copied."""
        if self.session is None:
            return
        seen = -1
        while seen != (now := self.session.engine.stats().copy_ns):
            seen = now
            time.sleep(0.02)

    def stream(self) -> None:
        """All blocks, without arithmetic."""
        engine = self.session.engine  # type: ignore[union-attr]
        for block in range(len(engine)):
            engine.acquire(block)
            engine.release(block)


def timed(
    work: dict[str, tuple[Case, Callable[[], Any]]], repeats: int, cold: bool
) -> dict[str, dict[str, float]]:
    """Median seconds and processor seconds, called in turn; warm ones once before."""
    from .offload import processor_seconds

    wall: dict[str, list[float]] = {name: [] for name in work}
    processor: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + (0 if cold else 1)):
        for name, (case, call) in work.items():
            if cold:
                case.cool()
            used, begin = processor_seconds(), time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            used = processor_seconds() - used
            case.settle()
            if cold or turn:
                wall[name].append(seconds)
                processor[name].append(used)
    return {
        name: {"seconds": median(wall[name]), "processor": median(processor[name])} for name in work
    }


@contextmanager
def accelerated(model: nn.Module, folder: Path) -> Iterator[nn.Module]:
    """A copy of the model that accelerate keeps on the disk."""
    from accelerate import disk_offload

    one = copy.deepcopy(model)
    disk_offload(one, offload_dir=str(folder), execution_device=torch.device("cpu"))
    yield one
    del one


def limit(resident: dict[str, float], stream: dict[str, float], cores: int) -> float:
    """The longest of the arithmetic, the copies, and both on all processors."""
    compute = resident["seconds"]
    return max(compute, stream["seconds"], (cores * compute + stream["processor"]) / cores)


def run_models(
    options: argparse.Namespace, folder: Path, direct_rate: float
) -> tuple[dict[str, Any], list[str]]:
    """All figures of offloaded models, printed; and the promises that were missed."""
    cores, repeats, layers = options.threads, options.repeats, options.layers
    x = torch.randn(options.rows, WIDTH).to(torch.bfloat16)
    plain = chain(layers)
    nbytes = weight_bytes(plain)
    cases = {"resident": Case(plain)}
    cases["offloaded"] = Case(offloaded(plain, folder / "all", x), folder / "all")
    cases["half resident"] = Case(offloaded(plain, folder / "half", x, 0.5), folder / "half")
    if not options.alone:
        with accelerated(plain, folder / "accelerate") as one:
            cases["accelerate"] = Case(one, folder / "accelerate")
    for name in FEWER_BYTES:
        packed = copy.deepcopy(plain)
        vramkit.convert(packed, name)
        cases[f"{name} resident"] = Case(packed)
        cases[f"{name} offloaded"] = Case(offloaded(packed, folder / name, x), folder / name)
    os.sync()
    for name, case in cases.items():
        of = name.split()[0] if name.split()[0] in FEWER_BYTES else ""
        expected = cases[f"{of} resident".strip()].call(x)
        if not torch.equal(case.call(x), expected):
            raise AssertionError(f"{name} computes something else")

    every = {name: (case, lambda case=case: case.call(x)) for name, case in cases.items()}
    streams = {
        f"{name}, no arithmetic": (case, case.stream)
        for name, case in cases.items()
        if case.session is not None
    }
    before = {n: c.session.engine.stats().commits for n, c in cases.items() if c.session}
    warm = timed({**every, **streams}, repeats, cold=False)
    taken = {n: cases[n].session.engine.stats().commits - before[n] for n in before}
    on_disk = {name: pair for name, pair in every.items() if pair[0].folder is not None}
    cold = timed(on_disk, max(3, repeats // 2), cold=True)
    reports = {name: case.session.stats() for name, case in cases.items() if case.session}
    passes = {name: report.pass_bytes for name, report in reports.items()}

    many = torch.randn(options.many_rows, WIDTH).to(torch.bfloat16)
    bound_work = {
        name: (cases[name], lambda case=cases[name]: case.call(many))
        for name in ("resident", "offloaded")
    }
    compute_bound = timed(bound_work, max(3, repeats // 2), cold=False)

    bound = limit(warm["resident"], warm["offloaded, no arithmetic"], cores)
    result: dict[str, Any] = {
        "bytes": nbytes,
        "layers": layers,
        "limit_bytes": reports["offloaded"].vram_limit,
        "pass_bytes": passes,
        "warm": warm,
        "bound_seconds": bound,
        "over_bound": warm["offloaded"]["seconds"] / bound,
        "cold": cold,
        "cold_bytes_per_second": {n: passes[n] / cold[n]["seconds"] for n in passes},
        "direct_bytes_per_second": direct_rate,
        "rows_compute_bound": options.many_rows,
        "compute_bound": compute_bound,
        "commits_in_steady_passes": taken,
        "waited_seconds": {
            name: {b.name: round(b.wait_seconds, 6) for b in report.blocks}
            for name, report in reports.items()
        },
    }
    print(
        f"models: {nbytes / 1e9:.2f} GB, {options.rows} rows; in memory at most "
        f"{reports['offloaded'].vram_limit / 1e6:.0f} MB"
    )
    for name, times in warm.items():
        text = f"  {name:28} {times['seconds']:.3f} s, processor {times['processor']:.3f} s"
        if name in cold:
            text += f"; cold {cold[name]['seconds']:.3f} s"
        if name in passes:
            text += f", {passes[name] / 1e9:.2f} GB a pass"
        print(text)
    print(f"  limit {bound:.3f} s: offloaded takes {result['over_bound']:.2f} of it")
    missed = _missed(result, cold, passes, taken)
    return result, missed


def _missed(
    result: dict[str, Any],
    cold: dict[str, dict[str, float]],
    passes: dict[str, int],
    taken: dict[str, int],
) -> list[str]:
    missed = []

    def promise(holds: bool, text: str) -> None:
        print(f"  {text}")
        if not holds:
            missed.append(f"models: {text}")

    over = result["over_bound"]
    promise(over <= WARM_OVER_LIMIT, f"warm {over:.2f} of the limit ({WARM_OVER_LIMIT})")
    rate = result["cold_bytes_per_second"]["offloaded"] / result["direct_bytes_per_second"]
    promise(rate >= COLD_OVER_DISK, f"cold {rate:.2f} of direct reads ({COLD_OVER_DISK})")
    if "accelerate" in cold:
        faster = cold["accelerate"]["seconds"] / cold["offloaded"]["seconds"]
        promise(
            faster >= COLD_OVER_ACCELERATE,
            f"cold {faster:.2f} times as fast as accelerate ({COLD_OVER_ACCELERATE})",
        )
        warm = result["warm"]
        faster = warm["accelerate"]["seconds"] / warm["offloaded"]["seconds"]
        promise(faster > 1, f"warm {faster:.2f} times as fast as accelerate (1)")
    for name, least in FEWER_BYTES.items():
        fewer = passes["offloaded"] / passes[f"{name} offloaded"]
        promise(fewer >= least, f"{name} copies {fewer:.2f} times fewer bytes ({least})")
        # Where arithmetic takes longer than the disk, that bounds it.
        packed = cold[f"{name} offloaded"]["seconds"]
        faster = cold["offloaded"]["seconds"] / packed
        floor = result["warm"][f"{name} resident"]["seconds"]
        at_best = passes[f"{name} offloaded"] / result["direct_bytes_per_second"]
        reach = max(floor, at_best) / packed
        promise(
            faster >= 0.9 * least or reach >= COLD_OVER_DISK * 0.9,
            f"{name} cold {faster:.2f} times as fast ({0.9 * least:.2f}), {reach:.2f} of what its "
            f"bytes and its arithmetic permit ({COLD_OVER_DISK * 0.9:.2f})",
        )
    copied = passes["half resident"] / passes["offloaded"]
    spent = cold["half resident"]["seconds"] / cold["offloaded"]["seconds"]
    promise(
        spent <= copied * 1.15,
        f"half resident copies {copied:.2f} of the bytes and takes {spent:.2f} of the time, cold",
    )
    slower = result["compute_bound"]["offloaded"]["seconds"]
    slower /= result["compute_bound"]["resident"]["seconds"]
    rows = result["rows_compute_bound"]
    promise(slower <= COMPUTE_BOUND, f"{rows} rows {slower:.3f} of resident ({COMPUTE_BOUND})")
    promise(not any(taken.values()), f"memory was taken {sum(taken.values())} times while steady")
    return missed


def run_larger(options: argparse.Namespace, folder: Path, direct_rate: float) -> dict[str, Any]:
    """Four times as many layers: what stands in turn above is measured one after another."""
    layers = 4 * options.layers
    x = torch.randn(options.rows, WIDTH).to(torch.bfloat16)
    model = chain(layers)
    nbytes = weight_bytes(model)
    found: dict[str, Any] = {"bytes": nbytes, "layers": layers}

    def measure(name: str, case: Case) -> None:
        work = {name: (case, lambda: case.call(x))}
        os.sync()
        found[name] = {"warm": timed(work, 3, cold=False)[name]}
        if case.folder is not None:
            found[name]["cold"] = timed(work, 3, cold=True)[name]
        print(f"  {name}: {found[name]}")

    print(f"{nbytes / 1e9:.2f} GB in {layers} layers")
    measure("resident", Case(model))
    where = folder / "large"
    where.mkdir()
    vramkit.enable_vram_management(
        model, f"{found['bytes'] // 6 + (4 << 20)} B", 0, inputs=(x,), folder=where
    )
    measure("offloaded", Case(model, where))
    report = model.vramkit_session.stats()
    found["limit_bytes"], found["pass_bytes"] = report.vram_limit, report.pass_bytes
    rate = report.pass_bytes / found["offloaded"]["cold"]["seconds"]
    found["of_direct"] = rate / direct_rate
    print(f"  cold {rate / 1e9:.2f} GB/s, {found['of_direct']:.2f} of direct reads")
    model.vramkit_session.disable()
    if not options.alone:
        with accelerated(model, folder / "large-accelerate") as one:
            del model
            measure("accelerate", Case(one, folder / "large-accelerate"))
    return found
