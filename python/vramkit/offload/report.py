"""What an offloaded model says of itself: figures, a timeline, a picture, a live view.

`Seen` is the part of a session that answers; it changes nothing, and costs nothing unless asked.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .. import _core
from ..rates import Rates
from ..sizes import format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..report.live import Watch
    from .blocks import Division
    from .device import HostDevice
    from .store import BlockStore

RECORDS = 20_000  # kept of a timeline by default: 40 bytes each
_DISK_BYTES, _PIECE, _THREADS = 256 << 20, 8 << 20, 2  # read to measure a disk


class Moment(NamedTuple):
    """One stretch of a timeline; times count from when the blocks' engine was made.

    Attributes:
        kind: "copy" (of one piece), "wait" (of a call, for its block) or "use" (of a block).
        block: Its index in the division.
        thread: Of a copy, the engine's; -1 for those that call the model.
    """

    kind: str
    block: int
    thread: int
    begin_ns: int
    end_ns: int


@dataclass(frozen=True)
class BlockReport:
    """One block: where it lies, and how its calls went.

    `slot` is None for residents; `wait_seconds` is the time that calls waited for it.
    """

    name: str
    nbytes: int
    resident: bool
    slot: int | None
    acquires: int
    hits: int
    wait_seconds: float
    loads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "nbytes"}
        return {**data, "bytes": self.nbytes}


@dataclass(frozen=True)
class OffloadReport:
    """What offloading takes and does; counts and times since it began, or since the blocks were
    last made anew because weights were changed from outside.

    Attributes:
        vram_limit: The user's limit; what follows down to `resident_bytes` is bytes, or counts.
        buffer_bytes: Of it, kept free.
        fixed_bytes: Of it, parameters that are in no block, and buffers.
        limit: Of it, what is left for blocks: slots, residents and staging never exceed it.
        committed: What they take now.
        arena_bytes: The address range that they lie in, most of it without memory.
        staging: For direct reads that must not write to their place.
        slots: Places that streamed blocks take turns in, of `slot_bytes` together.
        residents: Blocks that stay, of `resident_bytes` together.
        pass_bytes: What one pass copies once the residents are there.
        acquires: Calls of blocks; of these `hits` found theirs there, `waits` took `wait_ns`.
        loads: Blocks that arrived, of which `dropped` went unused; others were `cancelled` before
            the end, `failed`, or `displaced` into a slot that is not their own.
        given_up: Residents that had to go; `regrown` ones came back.
        bytes_copied: In `active_ns`, the time during which anything was copied; `copy_ns` is that
            of all threads.
        bytes_by_path: Of these, from host "memory", the page cache ("cached"), past it
            ("direct"), or "plain".
        commits: How often memory was taken from the system.
        link_rate: Measured bytes per second of memory, None if unknown.
        disk_rate: Measured bytes per second of the disk past the page cache, None if unknown.
        blocks: Each block.
        stays: (parameter, reason, bytes) of what is in no block.
    """

    vram_limit: int
    buffer_bytes: int
    fixed_bytes: int
    limit: int
    committed: int
    arena_bytes: int
    staging: int
    slots: int
    slot_bytes: int
    residents: int
    resident_bytes: int
    pass_bytes: int
    acquires: int
    hits: int
    waits: int
    wait_ns: int
    loads: int
    dropped: int
    cancelled: int
    failed: int
    displaced: int
    given_up: int
    regrown: int
    bytes_copied: int
    bytes_by_path: dict[str, int]
    copy_ns: int
    active_ns: int
    commits: int
    link_rate: float | None
    disk_rate: float | None
    blocks: list[BlockReport]
    stays: list[tuple[str, str, int]]

    @property
    def rate(self) -> float:
        """Bytes per second while anything was copied; 0 before the first copy."""
        return self.bytes_copied / (self.active_ns / 1e9) if self.active_ns else 0.0

    @property
    def of_measured(self) -> float | None:
        """The rate as a share of what the measured rates permit; None where one is unknown."""
        paths = self.bytes_by_path
        needs = [
            (paths["memory"] + paths["cached"], self.link_rate),
            (paths["direct"] + paths["plain"], self.disk_rate),
        ]
        if not self.active_ns or any(n and not rate for n, rate in needs):
            return None
        return sum(n / rate for n, rate in needs if rate) / (self.active_ns / 1e9)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: keys `*_bytes` are bytes, `*_seconds` seconds."""
        rename = {"limit": "blocks_limit_bytes", "committed": "committed_bytes",
                  "vram_limit": "vram_limit_bytes", "staging": "staging_bytes",
                  "link_rate": "link_bytes_per_second",
                  "disk_rate": "disk_bytes_per_second"}  # fmt: skip
        data: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name.endswith("_ns"):
                data[f.name[:-3] + "_seconds"] = value / 1e9
            else:
                data[rename.get(f.name, f.name)] = value
        data["bytes_per_second"], data["of_measured"] = self.rate, self.of_measured
        data["blocks"] = [block.to_dict() for block in self.blocks]
        data["stays"] = [{"name": n, "reason": r, "bytes": b} for n, r, b in self.stays]
        return data

    def _figures(self) -> list[tuple[str, str]]:
        """(what, how much) in words."""
        limit = f"{format_size(self.vram_limit)}: {format_size(self.fixed_bytes)} always there, "
        limit += f"{format_size(self.buffer_bytes)} buffer, {format_size(self.limit)} for blocks"
        total, streamed = sum(b.nbytes for b in self.blocks), len(self.blocks) - self.residents
        blocks = f"{len(self.blocks)} of {format_size(total)}: {self.residents} resident "
        blocks += f"({format_size(self.resident_bytes)}), {streamed} in turn in {self.slots} slots "
        blocks += f"({format_size(self.slot_bytes)})"
        memory = f"{format_size(self.committed)} of an arena of {format_size(self.arena_bytes)}"
        if self.staging:
            memory += f", {format_size(self.staging)} of it staging"
        calls = f"{self.acquires}: {self.hits} found their block there, {self.waits} waited "
        calls += f"{self.wait_ns / 1e9:.3f} s in all"
        worst = max(self.blocks, key=lambda block: block.wait_seconds, default=None)
        if worst is not None and worst.wait_seconds > 0:
            calls += f" (most, {worst.wait_seconds:.3f} s, for {shortened(worst.name)})"
        paths = [f"{format_size(n)} {path}" for path, n in self.bytes_by_path.items() if n]
        copied = f"{format_size(self.bytes_copied)} ({', '.join(paths) or 'nothing yet'})"
        if self.active_ns:
            copied += f" in {self.active_ns / 1e9:.3f} s: {self.rate / 1e9:.2f} GB/s"
        found = [
            ("limit", limit),
            ("blocks", blocks),
            ("memory of blocks now", memory),
            ("one pass copies", format_size(self.pass_bytes)),
            ("calls of blocks", calls),
            ("copied", copied),
            ("measured rates", self._rates_in_words()),
        ]
        odd = [(n, getattr(self, n)) for n in
               ("dropped", "cancelled", "failed", "displaced", "given_up", "regrown")]  # fmt: skip
        if any(n for _, n in odd):
            found.append(("loads", ", ".join(f"{n} {name}" for name, n in odd if n)))
        if self.stays:
            found.append(("stays in memory", ", ".join(self._reasons())))
        return found

    def _rates_in_words(self) -> str:
        named = [("memory", self.link_rate), ("disk", self.disk_rate)]
        text = ", ".join(f"{n} {r / 1e9:.2f} GB/s" if r else f"{n} unknown" for n, r in named)
        if self.of_measured is not None:
            return f"{text}: the copies reach {self.of_measured:.0%}"
        return f"{text} (stats(measure=True) measures them)" if "unknown" in text else text

    def _reasons(self) -> Iterable[str]:
        totals: dict[str, list[int]] = {}
        for _, reason, nbytes in self.stays:
            total = totals.setdefault(reason, [0, 0])
            total[0], total[1] = total[0] + 1, total[1] + nbytes
        for reason, (count, nbytes) in totals.items():
            yield f"{count} {reason} ({format_size(nbytes)})"

    def __str__(self) -> str:
        figures = self._figures()
        width = max(len(name) for name, _ in figures)
        return "\n".join(f"{name:{width}}  {value}" for name, value in figures)

    def _repr_html_(self) -> str:
        from ..report.html import table

        rows = [
            (
                shortened(b.name),
                format_size(b.nbytes),
                "resident" if b.resident else f"slot {b.slot}",
                b.acquires,
                b.hits,
                f"{b.wait_seconds:.4f} s",
                b.loads,
            )
            for b in self.blocks
        ]
        headers = ("block", "bytes", "place", "calls", "hits", "waited", "loads")
        parts = [table(("offloading", ""), self._figures())]
        parts.append(_folded(f"All {len(rows)} blocks", table(headers, rows)))
        if self.stays:
            stays = [(name, reason, format_size(n)) for name, reason, n in self.stays]
            kept = table(("parameter", "reason", "bytes"), stays)
            parts.append(_folded(f"All {len(stays)} parameters that stay", kept))
        return "".join(parts)


def _folded(label: str, content: str) -> str:
    return f"<details><summary>{escape(label)}</summary>{content}</details>"


def shortened(name: str, room: int = 32) -> str:
    """A block's name, which lists its modules, as its first module and how many follow.

    >>> shortened("layers.0, layers.1, layers.2")
    'layers.0 and 2 more'
    """
    first, *more = name.split(", ")
    if len(first) > room:
        first = f"…{first[1 - room :]}"
    return f"{first} and {len(more)} more" if more else first


def copied_in_a_pass(
    order: Sequence[int], sizes: Sequence[int], slots: Sequence[int | None]
) -> int:
    """Bytes that a pass copies when it follows another: `slots` are those of blocks, None at home.

    A block that has a slot for itself is copied once and stays.

    >>> copied_in_a_pass([0, 1, 2, 3], [10, 20, 30, 40], [None, 0, 1, 0])
    60
    """
    there: dict[int, int] = {}
    copied = 0
    for _ in range(2):
        copied = 0
        for block in order:
            slot = slots[block]
            if slot is not None and there.get(slot) != block:
                there[slot] = block
                copied += sizes[block]
    return copied


def disk_rate(path: str | os.PathLike[str]) -> float | None:
    """Bytes per second of reading a file past the page cache; None where that cannot be done.

    At most 256 MiB of it are read, in pieces of 8 MiB by two threads.
    """
    total = os.stat(path).st_size // _PIECE * _PIECE or os.stat(path).st_size // 4096 * 4096
    total = min(total, _DISK_BYTES)
    direct = getattr(os, "O_DIRECT", None)
    if direct is None or total == 0:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | direct)
    except OSError:
        return None  # a file system without direct reads: unknown, and reported so
    failed: list[OSError] = []

    def read(thread: int) -> None:
        with mmap.mmap(-1, min(_PIECE, total)) as buffer:
            try:
                for at in range(thread * len(buffer), total, _THREADS * len(buffer)):
                    os.preadv(descriptor, [buffer], at)
            except OSError as error:
                failed.append(error)

    threads = [
        threading.Thread(target=read, args=(i,), name="vramkit-measure") for i in range(_THREADS)
    ]
    try:
        os.fsync(descriptor)  # what is still to be written is not the reads' doing
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.close(descriptor)
    return None if failed else total / (time.perf_counter() - start)


class Seen:
    """The part of a session that shows what it does."""

    division: Division
    store: BlockStore
    engine: _core.Engine
    device: HostDevice
    buffer_bytes: int
    _records = 0
    _rates: Rates | None = None

    @property
    def fixed_bytes(self) -> int:
        """What always stays in memory."""
        raise NotImplementedError

    def _offloaded(self) -> nn.Module | None:
        """The model, as long as it is offloaded by this session."""
        raise NotImplementedError

    def stats(self, *, rates: Rates | None = None, measure: bool = False) -> OffloadReport:
        """Memory, hits, waits, copies: print it, show it in a notebook, `to_dict()` for JSON.

        Args:
            rates: What the machine's memory and disk reach, to compare with; kept.
            measure: Measure them now, which takes a second; kept.

        Nothing is measured unasked: rates are unknown until then, and the report says so.
        """
        if measure:
            disk = disk_rate(self.store.path) if self.store.reads_files else None
            link = self.device.link_rate()
            rates = Rates(link_bytes_per_second=link, disk_bytes_per_second=disk or 0.0)
        if rates is not None:
            self._rates = rates
        engine = self.engine
        raw = engine.stats()
        blocks, slots = [], []
        for index, block in enumerate(self.division.blocks):
            one = engine.block_stats(index)
            slots.append(None if one.resident else engine.slot_of(index))
            name = ", ".join(block.entries)
            blocks.append(
                BlockReport(name, one.bytes, one.resident, slots[-1], one.acquires, one.hits,
                            one.wait_ns / 1e9, one.loads)
            )  # fmt: skip
        model = self._offloaded()
        parameters = dict(model.named_parameters()) if model is not None else {}
        same = {f.name for f in fields(OffloadReport)} & set(dir(raw))
        return OffloadReport(
            vram_limit=raw.limit + self.fixed_bytes + self.buffer_bytes,
            buffer_bytes=self.buffer_bytes,
            fixed_bytes=self.fixed_bytes,
            arena_bytes=engine.reserved,
            pass_bytes=copied_in_a_pass(self.division.order, [b.nbytes for b in blocks], slots),
            link_rate=(self._rates.link_bytes_per_second or None) if self._rates else None,
            disk_rate=(self._rates.disk_bytes_per_second or None) if self._rates else None,
            blocks=blocks,
            stays=[
                (name, reason, parameters[name].nbytes if name in parameters else 0)
                for name, reason in self.division.stays
            ],
            **{name: getattr(raw, name) for name in same},
        )

    def record(self, records: int = RECORDS) -> None:
        """Keep the latest `records` copies, waits and calls of blocks from now on; 0 for none.

        Until then, nothing is kept and it costs nothing.
        """
        self.engine.keep_timeline(records)
        self._records = records

    def timeline(self) -> list[Moment]:
        """What was recorded, by its begin. Raises ValueError where `record` was not called."""
        if not self._records:
            raise ValueError(
                "there is no timeline: call record(), then the model, then ask for it again"
            )
        return [Moment(*entry) for entry in self.engine.timeline()]

    def latest(self, passes: int) -> list[Moment]:
        """Of the timeline what belongs to the latest passes, as far as it was recorded."""
        if passes < 1:
            raise ValueError(f"the latest {passes} passes: 1 or more can be shown")
        found = self.timeline()
        count = passes * max(1, len(self.division.order))
        uses = [moment for moment in found if moment.kind == "use"][-count:]
        if not uses:
            return found
        begin = uses[0].begin_ns
        waits = [m for m in found if m.kind == "wait" and m.block == uses[0].block]
        begin = max([m.begin_ns for m in waits if m.end_ns <= begin], default=begin)
        before = [m for m in found if m.kind == "use" and m.end_ns < uses[0].begin_ns]
        begin = max(begin, before[-1].end_ns) if before else begin
        return [m for m in found if m.end_ns > begin and m.begin_ns < uses[-1].end_ns]

    def picture(self, passes: int = 2) -> Figure:
        """The latest passes: when each thread and each block was computing, copying, waiting.

        A matplotlib figure that notebooks show; `.savefig(path)` writes it. Raises ValueError
        where `record` was not called, ImportError without matplotlib.
        """
        from ..report.offload_picture import timeline_figure

        return timeline_figure(self.latest(passes), self.stats())

    def chrome_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write what was recorded for chrome://tracing or Perfetto; the file appears whole.

        Raises ValueError where `record` was not called, OSError where it cannot be written.
        """
        from ..report.offload_picture import write_trace

        return write_trace(path, self.timeline(), self.stats())

    def watch(self, interval: float = 0.5) -> Watch:
        """Show `stats()` in a notebook, anew every `interval` seconds while anything changes.

        Returns what can be stopped: ``watch.stop()``, or ``with session.watch(): ...``. It stops
        by itself when the offloading ends. Raises ImportError without IPython, RuntimeError
        where no notebook or IPython runs.
        """
        from ..report.live import Watch

        return Watch(self, interval)
