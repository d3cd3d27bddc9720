"""Recorded CUDA memory snapshots as traces, and what was recorded beside what is simulated.

`torch.cuda.memory._record_memory_history()` makes the allocator note what it does, and
`torch.cuda.memory._snapshot()` returns it as the dictionary whose schema that function documents.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .allocator import (
    COMPLETE,
    EMPTY_CACHE,
    RELEASE,
    USE,
    Simulation,
    options_from_conf,
    simulate,
)
from .sizes import format_size

# What a segment looked like: (stream, small, expandable, bytes), addresses left aside.
_Shape = tuple[int, bool, bool, int]
_REMARKS = frozenset({"snapshot", "annotate", "user_defined"})  # they move no memory
_TAKES = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass(frozen=True)
class RecordedTrace:
    """One device's trace in a snapshot, as events for `simulate` and as torch recorded it.

    events: rows of (block id, bytes, stream, tag), flat; the tag is the entry's index in the trace.
    Block ids count up, since addresses are used again. `unmatched` counts releases of what had been
    allocated before the recording began, which no event stands for. `failed` is the first
    allocation that ran out of memory, as (events before it, entry, bytes, stream); such allocations
    are no events. Sizes are bytes.
    """

    events: array[int]
    entries: int
    unmatched: int
    initial_reserved_bytes: int
    peak_requested_bytes: int
    peak_reserved_bytes: int
    device_allocations: int
    device_frees: int
    failed: tuple[int, int, int, int] | None
    reserved_bytes: int
    allocated_bytes: int
    segments: tuple[_Shape, ...]
    settings: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the recording began with an empty allocator, so that a replay can equal it."""
        return self.unmatched == 0 and self.initial_reserved_bytes == 0


@dataclass(frozen=True)
class Compared:
    """One figure: as recorded, and as simulated."""

    recorded: int
    simulated: int

    @property
    def equal(self) -> bool:
        """Whether they agree to the byte."""
        return self.recorded == self.simulated


@dataclass(frozen=True)
class SnapshotComparison:
    """A recording beside its simulation; `agrees` needs every figure and the segments equal."""

    recorded: RecordedTrace
    simulated: Simulation
    figures: Mapping[str, Compared]
    only_recorded: tuple[_Shape, ...]
    only_simulated: tuple[_Shape, ...]

    @property
    def agrees(self) -> bool:
        """Whether the simulator did what torch did."""
        return (
            self.recorded.complete
            and all(figure.equal for figure in self.figures.values())
            and not self.only_recorded
            and not self.only_simulated
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data for JSON."""
        return {
            "agrees": self.agrees,
            "complete": self.recorded.complete,
            "unmatched": self.recorded.unmatched,
            "initial_reserved_bytes": self.recorded.initial_reserved_bytes,
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
            "only_recorded": [list(shape) for shape in self.only_recorded],
            "only_simulated": [list(shape) for shape in self.only_simulated],
        }

    def __str__(self) -> str:
        rows = ["agrees" if self.agrees else "differs"]
        if not self.recorded.complete:
            rows.append(
                f"  the recording began late: {self.recorded.unmatched} releases of older blocks, "
                f"{format_size(self.recorded.initial_reserved_bytes)} reserved before it"
            )
        for name, figure in self.figures.items():
            mark = "" if figure.equal else f"  ({figure.simulated - figure.recorded:+d})"
            rows.append(
                f"  {name:24}{figure.recorded:>16} recorded {figure.simulated:>16} simulated{mark}"
            )
        for name, shapes in (("recorded", self.only_recorded), ("simulated", self.only_simulated)):
            for stream, small, expandable, size in shapes:
                kind = ("small" if small else "large") + (" expandable" if expandable else "")
                rows.append(f"  only {name}: {kind} segment, {format_size(size)}, stream {stream}")
        return "\n".join(rows)


def read_snapshot(snapshot: Mapping[str, Any], device: int = 0) -> RecordedTrace:
    """The trace of one device in a snapshot.

    A release that completed at once is one event; one that waited for other streams is a use, a
    release and, where it completed, a completion. Segments that went back are taken as an emptied
    cache, which is what running out of memory does too; not so where garbage collection or
    max_split_size give back a part, for an allocation: the replay has to find that by itself.
    Raises ValueError for what breaks the schema, with the entry's index, for private pools (CUDA
    graphs), which are not simulated, and where the device has no trace.
    """
    traces = _field(snapshot, "device_traces", "the snapshot", list)
    if not 0 <= device < len(traces) or not traces[device]:
        raise ValueError(
            f"the snapshot has no trace of device {device}; call "
            "torch.cuda.memory._record_memory_history() before what is to be recorded"
        )
    settings = snapshot.get("allocator_settings", {})
    reader = _Reader(traces[device], partial=_gives_back_parts(settings))
    reader.read()
    segments = [
        s
        for s in _field(snapshot, "segments", "the snapshot", list)
        if s.get("device", device) == device
    ]
    reserved = sum(_field(s, "total_size", "a segment", int) for s in segments)
    net = reader.reserved
    return RecordedTrace(
        events=reader.events,
        entries=len(traces[device]),
        unmatched=reader.unmatched,
        initial_reserved_bytes=reserved - net,
        peak_requested_bytes=reader.peak_requested,
        peak_reserved_bytes=reader.peak_reserved + reserved - net,
        device_allocations=reader.takes,
        device_frees=reader.gives,
        failed=reader.failed,
        reserved_bytes=reserved,
        allocated_bytes=sum(_field(s, "allocated_size", "a segment", int) for s in segments),
        segments=tuple(sorted(_shape(s) for s in segments)),
        settings=settings,
    )


def compare_snapshot(
    snapshot: Mapping[str, Any], device: int = 0, **options: Any
) -> SnapshotComparison:
    """Replays what a snapshot recorded, and puts both beside each other.

    options: as for `simulate`; what the snapshot says of the allocator's settings is used where
    they do not say otherwise. Limits are not in a snapshot: give `limit` or `device_memory` where
    memory ran out, or it is not looked at. What torch recorded is compared: the most that was
    reserved, what was taken from the device and given back how often, and at the end the segments
    and what is allocated in them.
    """
    recorded = read_snapshot(snapshot, device)
    merged = {**_recorded_options(recorded.settings), **options}
    simulated = simulate(recorded.events, "cuda", **merged)
    figures = {
        "peak_reserved_bytes": (recorded.peak_reserved_bytes, simulated.peak_reserved_bytes),
        "reserved_bytes": (recorded.reserved_bytes, simulated.reserved_bytes),
        "allocated_bytes": (recorded.allocated_bytes, simulated.allocated_bytes),
        "device_allocations": (recorded.device_allocations, simulated.device_allocations),
        "device_frees": (recorded.device_frees, simulated.device_frees),
    }
    if simulated.out_of_memory is not None:
        figures["out_of_memory_entry"] = (-1, simulated.out_of_memory.tag)
    elif recorded.failed is not None and {"limit", "device_memory"} & merged.keys():
        before, entry, size, stream = recorded.failed
        rows = recorded.events[: 4 * before] + array("q", (-1, size, stream, entry))
        oom = simulate(rows, "cuda", **merged).out_of_memory
        figures["out_of_memory_entry"] = (entry, -1 if oom is None else oom.tag)
    ours = Counter((s.stream, s.small, s.expandable, s.bytes) for s in simulated.segments())
    theirs = Counter(recorded.segments)
    return SnapshotComparison(
        recorded=recorded,
        simulated=simulated,
        figures={name: Compared(*pair) for name, pair in figures.items()},
        only_recorded=tuple(sorted((theirs - ours).elements())),
        only_simulated=tuple(sorted((ours - theirs).elements())),
    )


class _Reader:
    """Turns entries into events; what torch counted is counted alongside."""

    def __init__(self, entries: list[Mapping[str, Any]], *, partial: bool) -> None:
        self.entries = entries
        self.partial = partial  # whether segments may go back without all others
        self.events: array[int] = array("q")
        self.alive: dict[int, tuple[int, int, int]] = {}  # by address: id, bytes, stream
        self.waiting: dict[int, int] = {}  # by address: id, requested but not completed
        self.ids = self.unmatched = self.takes = self.gives = 0
        self.requested = self.peak_requested = self.reserved = self.peak_reserved = 0
        self.failed: tuple[int, int, int, int] | None = None

    def read(self) -> None:
        for index, entry in enumerate(self.entries):
            action = _field(entry, "action", f"entry {index}", str)
            if tuple(entry.get("pool_id", (0, 0))) != (0, 0):
                raise ValueError(
                    f"entry {index} is of the private pool {entry['pool_id']}; pools of CUDA "
                    "graphs and torch.cuda.MemPool are not simulated"
                )
            if action == "alloc":
                self.allocate(index, entry)
            elif action == "free_requested":
                self.request_release(index, entry)
            elif action == "free_completed":
                address = _field(entry, "addr", f"entry {index}", int)
                if address in self.waiting:
                    self.add(self.waiting.pop(address), COMPLETE, 0, index)
            elif action in _TAKES:
                self.change_reserved(index, entry, _TAKES[action])
            elif action == "oom":
                self.run_out(index, entry)
            elif action not in _REMARKS:
                raise ValueError(f"entry {index} has the action {action!r}, which is not known")

    def add(self, block: int, size: int, stream: int, tag: int) -> None:
        self.events.extend((block, size, stream, tag))

    def allocate(self, index: int, entry: Mapping[str, Any]) -> None:
        where = f"entry {index}"
        address, size = _field(entry, "addr", where, int), _field(entry, "size", where, int)
        stream = _field(entry, "stream", where, int)
        if address in self.alive:
            raise ValueError(f"entry {index} allocates the address {address:#x}, which is in use")
        # What ran out of memory waited for all other streams, and their blocks were used again.
        self.waiting.pop(address, None)
        self.alive[address] = (self.ids, size, stream)
        self.add(self.ids, size, stream, index)
        self.ids += 1
        self.requested += size
        self.peak_requested = max(self.peak_requested, self.requested)

    def request_release(self, index: int, entry: Mapping[str, Any]) -> None:
        address = _field(entry, "addr", f"entry {index}", int)
        if address not in self.alive:
            self.unmatched += 1
            return
        block, size, stream = self.alive.pop(address)
        self.requested -= size
        following = self.entries[index + 1] if index + 1 < len(self.entries) else {}
        if following.get("action") == "free_completed" and following.get("addr") == address:
            self.add(block, RELEASE, stream, index)
            return
        # The trace does not say which stream used it; any other than its own waits alike.
        self.add(block, USE, stream ^ 1, index)
        self.add(block, RELEASE, stream, index)
        self.waiting[address] = block

    def change_reserved(self, index: int, entry: Mapping[str, Any], sign: int) -> None:
        self.reserved += sign * _field(entry, "size", f"entry {index}", int)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.takes += sign > 0
        self.gives += sign < 0
        if sign < 0 and self.is_flush(index):
            self.add(0, EMPTY_CACHE, 0, index)

    def is_flush(self, index: int) -> bool:
        """Whether the cache is empty once this segment has gone back, the last of a series."""
        for entry in self.entries[index + 1 :]:
            action = entry.get("action")
            if _TAKES.get(str(action)) == -1:
                return False
            if action == "oom" or action in _TAKES:
                return not self.partial
            if action not in _REMARKS:
                break
        return True

    def run_out(self, index: int, entry: Mapping[str, Any]) -> None:
        if self.failed is None:
            size = _field(entry, "size", f"entry {index}", int)
            stream = _field(entry, "stream", f"entry {index}", int)
            self.failed = (len(self.events) // 4, index, size, stream)


def _field(where: Any, key: str, what: str, kind: type) -> Any:
    value = where.get(key) if isinstance(where, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} has no {key!r} that is {kind.__name__}; found {value!r}")
    return value


def _shape(segment: Mapping[str, Any]) -> _Shape:
    return (
        _field(segment, "stream", "a segment", int),
        _field(segment, "segment_type", "a segment", str) == "small",
        bool(segment.get("is_expandable", False)),
        _field(segment, "total_size", "a segment", int),
    )


def _recorded_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """torch's `allocator_settings` as options of `simulate`; unset ones are left out."""
    conf = settings.get("PYTORCH_ALLOC_CONF") or settings.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    options = options_from_conf(conf)
    # Its largest unsigned number, which means no limit, comes as -1.
    if settings.get("max_split_size", -1) > 0:
        options["max_split_size"] = settings["max_split_size"]
    for name in ("garbage_collection_threshold", "expandable_segments"):
        if name in settings:
            options[name] = settings[name]
    divisions = settings.get("roundup_power2_divisions", {})
    if any(divisions.values()):
        options["roundup_power2_divisions"] = {int(key): n for key, n in divisions.items()}
    return options


def _gives_back_parts(settings: Mapping[str, Any]) -> bool:
    options = _recorded_options(settings)
    return "max_split_size" in options or options.get("garbage_collection_threshold", 0) > 0
