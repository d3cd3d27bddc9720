"""What torch's operators allocate inside themselves, learned by running each distinct call once.

All probes of an estimate run under one profiler, between markers, on zeros. A probe takes no more
memory than its operator, and calls that would take long are not run: rules (`workspaces`) answer
for them. What was learned is kept in the user's cache folder, by torch version, thread count and
processor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .text_file import replace_text
from .tracing import Call, Geometry, Recording, geometries
from .workspaces import work

SCHEMA = "vramkit.probes/1"
# Multiply-adds of one probe, and of all in one estimate: about 0.1 s and 5 s on two cores. Counts
# and not clocks, so that the same estimate gives the same figures on a busy machine.
WORK_OF_ONE = 4e9
WORK_OF_ALL = 2e11
BYTES_OF_ONE = 1 << 25  # arguments and results; what is inside comes on top
# Whose operators may be run: they have no effect but their results. Others might write files, talk
# to other processes, or hold on to what they are given.
NAMESPACES = frozenset({"aten", "prims", "torchvision", "vramkit"})
_MARK = "vramkit probe "  # no operator is called so
KEPT = 20000  # calls in the file; the oldest go first


class Learned(NamedTuple):
    """One call's own allocations, and the strides of its results."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


@dataclass
class Probes:
    """What a set of probes found, and what it took.

    Attributes:
        found: By call.
        ran: Calls that were run now; the others came from the cache.
        seconds: Time of all of it.
        not_run: Calls that would take long or much memory, or are not torch's own operators.
        failed: (operator, reason) of calls that raised on zeros.
        notes: What went wrong with the cache.
    """

    found: dict[Call, Learned] = field(default_factory=dict)
    ran: int = 0
    seconds: float = 0.0
    work: float = 0.0
    not_run: set[Call] = field(default_factory=set)
    failed: dict[Call, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def strides(self) -> dict[Call, tuple[tuple[int, ...], ...]]:
        """Strides of every learned call's results."""
        return {call: learned.strides for call, learned in self.found.items()}

    def learn(self, recording: Recording, store: Store | None) -> None:
        """Find out about the calls of a recording that are not known yet."""
        start = time.perf_counter()
        wanted = []
        for call in recording.distinct():
            if call in self.found or call in self.failed:
                continue
            kept = store.get(call) if store is not None else None
            if kept is not None:
                self.found[call] = kept
                continue
            if call in self.not_run:
                continue
            cost = work(call)
            size = sum(g.nbytes for g in geometries(call.spec)) + sum(recording.results[call])
            if call.operator.namespace not in NAMESPACES:
                self.not_run.add(call)
                continue
            if cost > WORK_OF_ONE or size > BYTES_OF_ONE or self.work + cost > WORK_OF_ALL:
                self.not_run.add(call)
                continue
            self.work += cost
            wanted.append(call)
        if wanted:
            results = run_probes(wanted)
            self.failed.update({c: r for c, r in results.items() if isinstance(r, str)})
            good = {c: r for c, r in results.items() if isinstance(r, Learned)}
            self.found.update(good)
            self.ran += len(good)
            if store is not None:
                store.put(good)
        if store is not None:
            self.notes = list(dict.fromkeys(self.notes + store.notes))
        self.seconds += time.perf_counter() - start


def _built(spec: Any) -> Any:
    """Arguments for a description: zeros, which are valid indices and cheap pages."""
    if isinstance(spec, Geometry):
        flat = torch.zeros(spec.extent, dtype=spec.dtype)
        return torch.as_strided(flat, spec.shape, spec.stride)
    if isinstance(spec, tuple) and spec and spec[0] == "seq":
        return [_built(part) for part in spec[1:]]
    if isinstance(spec, tuple) and spec and spec[0] == "map":
        return {key: _built(part) for key, part in spec[1:]}
    if isinstance(spec, torch.device):
        return torch.device("cpu")
    return spec


@contextlib.contextmanager
def _profiled() -> Iterator[Any]:
    from torch.profiler import ProfilerActivity, profile

    from .measure import quiet_profiler

    with (
        quiet_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        yield profiler


def run_probes(calls: Sequence[Call]) -> dict[Call, Learned | str]:
    """Run every call once, each twice where the first may differ; all under one profiler.

    A call that raises is answered with what it said. The random state is left as it was.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    results: dict[Call, Learned | str] = {}
    strides: list[tuple[tuple[int, ...], ...] | None] = []
    state = torch.get_rng_state()
    try:
        with _disable_current_modes(), torch.inference_mode(), _profiled() as profiler:
            for number, call in enumerate(calls):
                try:
                    strides.append(_run_one(call, number))
                except Exception as error:  # of any operator, on zeros: the caller is told
                    strides.append(None)
                    results[call] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    finally:
        torch.set_rng_state(state)
    sizes = _windows(profiler, len(calls))
    for call, found, shape in zip(calls, sizes, strides, strict=True):
        if shape is not None:
            results[call] = Learned(tuple(found), shape)
    return results


def _run_one(call: Call, number: int) -> tuple[tuple[int, ...], ...]:
    args, kwargs = _built(call.spec[0]), _built(call.spec[1])
    with torch.profiler.record_function(f"{_MARK}{number}"):
        out = call.operator(*args, **kwargs)
    leaves = torch.utils._pytree.tree_leaves(out)
    return tuple(tuple(v.stride()) for v in leaves if isinstance(v, Tensor))


def _windows(profiler: Any, count: int) -> list[list[int]]:
    """Sizes of the memory events within each marker."""
    events = profiler.profiler.kineto_results.events()
    marks: list[tuple[int, int]] = [(0, 0)] * count
    memory = []
    for event in events:
        name = event.name()
        if name == "[memory]":
            memory.append((event.start_ns(), event.nbytes()))
        elif name.startswith(_MARK):
            marks[int(name.removeprefix(_MARK))] = (event.start_ns(), event.end_ns())
    memory.sort(key=lambda item: item[0])
    found: list[list[int]] = [[] for _ in range(count)]
    place = 0
    for number, (begin, end) in enumerate(marks):
        while place < len(memory) and memory[place][0] < begin:
            place += 1
        while place < len(memory) and memory[place][0] <= end:
            found[number].append(memory[place][1])
            place += 1
    return found


def cache_folder() -> Path:
    """Where probes are kept: `$XDG_CACHE_HOME/vramkit`, or `~/.cache/vramkit`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vramkit"


def processor() -> str:
    """What the system says of the processor: family, model and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = text.split("\n\n", 1)[0].splitlines()
    return "".join(line for line in lines if line.startswith(("model", "cpu family", "flags")))


class Store:
    """Learned calls in a JSON file of their own for each torch version, thread count, processor."""

    def __init__(self, folder: Path | None = None) -> None:
        self.notes: list[str] = []
        about = f"{torch.__version__} {torch.get_num_threads()} {processor()}"
        name = hashlib.blake2b(about.encode(), digest_size=8).hexdigest()
        self.path = (folder or cache_folder()) / f"probes-{name}.json"
        self.about = about
        self.calls: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text())
            if data["schema"] == SCHEMA and data["about"] == self.about:
                return dict(data["calls"])
            self.notes.append(f"{self.path} was written by another version, and was not used")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.notes.append(f"{self.path} could not be read ({error}); probes ran again")
        return {}

    @staticmethod
    def key(call: Call) -> str:
        """The call's name in the file."""
        text = f"{call.operator} {call.spec!r}"
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def get(self, call: Call) -> Learned | None:
        """What the file says of a call; None where it says nothing that can be used."""
        kept = self.calls.get(self.key(call))
        try:
            if kept is None:
                return None
            sizes, strides = kept
            learned = Learned(
                tuple(int(n) for n in sizes), tuple(tuple(int(n) for n in s) for s in strides)
            )
        except (TypeError, ValueError):
            return None
        return learned

    def put(self, found: dict[Call, Learned]) -> None:
        """Keep what was learned; a folder that cannot be written is noted."""
        for call, learned in found.items():
            self.calls[self.key(call)] = [learned.sizes, learned.strides]
        for key in list(self.calls)[: max(0, len(self.calls) - KEPT)]:
            del self.calls[key]
        data = {"schema": SCHEMA, "about": self.about, "calls": self.calls}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(data, separators=(",", ":")))
        except OSError as error:
            self.notes.append(f"probes were not kept: {error}")
