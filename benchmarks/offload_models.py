"""Offloaded models, from Python: `enable_vram_management` against resident models and accelerate.

A chain of MLPs 2048 -> 8192 -> 2048 in bfloat16, 67 MB each, as plain torch modules, and stored as
int8 and nf4. What is called cold has its file out of the page cache and all streamed blocks absent.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import vramkit
from torch import Tensor, nn
from vramkit import _core
from vramkit.estimator import weight_bytes

WIDTH, HIDDEN = 2048, 8192
PIECE = 8 << 20

# What is promised; times over the limit, rates over the disk's, ratios between formats.
WARM_OVER_LIMIT = 1.25
COLD_OVER_DISK = 0.9
COLD_OVER_ACCELERATE = 1.4
FEWER_BYTES = {"int8": 1.95, "nf4": 3.5}  # 2 and 4, less the scales
COMPUTE_BOUND = 1.08
PACKED_REACH = 0.8  # of the longer of arithmetic and direct reads, which share processors
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


def forget(path: str | os.PathLike[str]) -> None:
    """Empty the page cache of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def processor_seconds() -> float:
    """What this process has taken of all processors."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def disk_rate(path: str | os.PathLike[str]) -> float:
    """Bytes per second of reading a file past the page cache, with two threads."""
    total = os.stat(path).st_size // PIECE * PIECE
    if total == 0:
        raise ValueError(f"{path} is too small to be measured")
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def work(thread: int) -> None:
        buffer = memoryview(_buffers[thread])  # type: ignore[arg-type]
        for at in range(thread * PIECE, total, 2 * PIECE):
            if os.preadv(descriptor, [buffer], at) != PIECE:
                raise OSError("a short read")

    begin = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    seconds = time.perf_counter() - begin
    os.close(descriptor)
    return total / seconds


_buffers = [_core.HostStore(PIECE) for _ in range(2)]  # in large pages, as the engine's places


class Case:
    """A model that is called, and what has to be done for a cold call."""

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        self.model, self.folder = model, folder
        self.session = getattr(model, "vramkit_session", None)

    def call(self, x: Tensor) -> Tensor:
        """One forward."""
        out: Tensor = self.model(x)
        return out

    @property
    def files(self) -> list[str]:
        """What its weights are read from."""
        if self.session is not None:
            return [str(self.session.store.path)]
        return [str(path) for path in sorted(self.folder.iterdir())] if self.folder else []

    @property
    def cold_calls(self) -> int:
        """After how many calls it is not cold any more."""
        return 1 if self.session is None else 2

    def cool(self) -> None:
        """The file leaves the page cache, streamed blocks leave their slots."""
        if self.session is not None:
            engine = self.session.engine
            for block in range(len(engine)):
                if not engine.block_stats(block).resident:
                    engine.invalidate(block)
        for path in self.files:
            forget(path)

    def read_directly(self) -> float:
        """Bytes per second of reading its largest file past the page cache."""
        return disk_rate(max(self.files, key=lambda path: os.stat(path).st_size))

    def settle(self) -> None:
        """Wait until nothing is being copied."""
        if self.session is None:
            return
        engine = self.session.engine
        moving = (_core.BlockStatus.requested, _core.BlockStatus.copying)
        while any(engine.block_stats(i).state in moving for i in range(len(engine))):
            time.sleep(0.01)

    def stream(self) -> None:
        """All blocks, without arithmetic."""
        engine = self.session.engine  # type: ignore[union-attr]
        for block in range(len(engine)):
            engine.acquire(block)
            engine.release(block)


Times = dict[str, dict[str, float]]


def timed(work: dict[str, tuple[Case, Callable[[], Any]]], repeats: int) -> Times:
    """Median seconds and processor seconds of each, called in turn, once before that."""
    wall: dict[str, list[float]] = {name: [] for name in work}
    processor: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, (case, call) in work.items():
            used, begin = processor_seconds(), time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            used = processor_seconds() - used
            case.settle()
            if turn:
                wall[name].append(seconds)
                processor[name].append(used)
    return {
        name: {"seconds": median(wall[name]), "processor": median(processor[name])} for name in work
    }


def timed_cold(cases: dict[str, Case], x: Tensor, repeats: int) -> Times:
    """Median seconds of a cold call, and of reading the same file directly right beside it.

    A disk that others share is twice as fast at one moment as at another, so that each case has
    its own rate beside it, before it and after it by turns. Sessions are called twice, because the
    end of a call brings the first block of the next, and read past the page cache; accelerate fills
    it, so it is called once.
    """
    found: dict[str, dict[str, list[float]]] = {n: {"seconds": [], "direct": []} for n in cases}

    def measure(name: str, case: Case) -> None:
        case.cool()
        begin = time.perf_counter()
        for _ in range(case.cold_calls):
            case.call(x)
        found[name]["seconds"].append((time.perf_counter() - begin) / case.cold_calls)
        case.settle()

    for turn in range(repeats):
        for name, case in cases.items():
            if turn % 2:
                measure(name, case)
            case.cool()
            found[name]["direct"].append(case.read_directly())
            if not turn % 2:
                measure(name, case)
    return {
        name: {
            "seconds": median(times["seconds"]),
            "direct_bytes_per_second": median(times["direct"]),
        }
        for name, times in found.items()
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


def run_models(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
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
    warm = timed({**every, **streams}, repeats)
    taken = {n: cases[n].session.engine.stats().commits - before[n] for n in before}
    on_disk = {name: case for name, case in cases.items() if case.folder is not None}
    cold = timed_cold(on_disk, x, options.cold_repeats)
    reports = {name: case.session.stats() for name, case in cases.items() if case.session}
    passes = {name: report.pass_bytes for name, report in reports.items()}

    many = torch.randn(options.many_rows, WIDTH).to(torch.bfloat16)
    bound_work = {
        name: (cases[name], lambda case=cases[name]: case.call(many))
        for name in ("resident", "offloaded")
    }
    compute_bound = timed(bound_work, max(3, repeats // 2))

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
        "cold_of_direct": {
            n: passes[n] / cold[n]["seconds"] / cold[n]["direct_bytes_per_second"] for n in passes
        },
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
            text += f" beside {cold[name]['direct_bytes_per_second'] / 1e9:.2f} GB/s"
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
    rate = result["cold_of_direct"]["offloaded"]
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
    for name in [*FEWER_BYTES, "half resident"]:
        case = name if name == "half resident" else f"{name} offloaded"
        copied = passes["offloaded"] / passes[case]
        promise(
            copied >= FEWER_BYTES.get(name, 1.9),
            f"{name} copies {copied:.2f} times fewer bytes ({FEWER_BYTES.get(name, 1.9)})",
        )
        # At one and the same rate of the disk. Where arithmetic takes longer, that bounds it.
        seconds = {
            n: cold[n]["seconds"] * cold[n]["direct_bytes_per_second"] for n in ("offloaded", case)
        }
        arithmetic = result["warm"]["resident" if case == name else f"{name} resident"]["seconds"]
        at_best = max(arithmetic, passes[case] / cold[case]["direct_bytes_per_second"])
        reach = at_best / cold[case]["seconds"]
        promise(
            reach >= PACKED_REACH,
            f"{name} cold {seconds['offloaded'] / seconds[case]:.2f} times as fast, {reach:.2f} of "
            f"what its bytes and its arithmetic permit ({PACKED_REACH})",
        )
    slower = result["compute_bound"]["offloaded"]["seconds"]
    slower /= result["compute_bound"]["resident"]["seconds"]
    rows = result["rows_compute_bound"]
    promise(slower <= COMPUTE_BOUND, f"{rows} rows {slower:.3f} of resident ({COMPUTE_BOUND})")
    promise(not any(taken.values()), f"memory was taken {sum(taken.values())} times while steady")
    return missed


def run_larger(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Four times as many layers: what stands in turn above is measured one after another."""
    layers = 4 * options.layers
    x = torch.randn(options.rows, WIDTH).to(torch.bfloat16)
    model = chain(layers)
    nbytes = weight_bytes(model)
    found: dict[str, Any] = {"bytes": nbytes, "layers": layers}

    def measure(name: str, case: Case) -> None:
        os.sync()
        found[name] = {"warm": timed({name: (case, lambda: case.call(x))}, 3)[name]}
        if case.folder is not None:
            found[name]["cold"] = timed_cold({name: case}, x, options.cold_repeats)[name]
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
    cold = found["offloaded"]["cold"]
    rate = report.pass_bytes / cold["seconds"]
    found["of_direct"] = rate / cold["direct_bytes_per_second"]
    print(f"  cold {rate / 1e9:.2f} GB/s, {found['of_direct']:.2f} of direct reads")
    model.vramkit_session.disable()
    if not options.alone:
        with accelerated(model, folder / "large-accelerate") as one:
            del model
            measure("accelerate", Case(one, folder / "large-accelerate"))
    return found
