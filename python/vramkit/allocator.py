"""What an allocator makes of a trace: peaks, fragmentation, what was alive, where memory runs out.

A trace is rows of (block id, bytes, stream, tag): bytes >= 0 allocates, `RELEASE` releases, and
`USE`, `COMPLETE` and `EMPTY_CACHE` are the other things that happen to a caching allocator. The
native simulator replays it by the rules of torch's CUDA caching allocator, or of its CPU allocator,
which caches nothing; docs/allocator.md has the rules and where they come from.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch

from ._native import _core
from .sizes import format_size, parse_size

RELEASE = -1
USE = -2  # the block is used by `stream` too (Tensor.record_stream)
COMPLETE = -3  # the other streams are through with a block that was released
EMPTY_CACHE = -4  # torch.cuda.empty_cache()

MIB = 1 << 20
Event: TypeAlias = tuple[int, int, int, int]
Events: TypeAlias = Any  # an int64 buffer [n, 4], a torch tensor of that, or rows of four integers

# Settings in torch's PYTORCH_ALLOC_CONF that change which memory is used on a device, by the
# option here; the others (pinned_*, backend, …) do not.
_SIZES_IN_CONF = {
    "max_split_size_mb": "max_split_size",
    "max_non_split_rounding_mb": "max_non_split_rounding_size",
    "large_segment_size_mb": "large_segment_size",
}


@dataclass(frozen=True)
class AllocatedBlock:
    """A block that was alive when most was allocated; `event` is the index of its allocation."""

    id: int
    bytes: int
    requested_bytes: int
    stream: int
    tag: int
    event: int


@dataclass(frozen=True)
class SegmentBlock:
    """A block of a segment at the end; `event` is the index of its allocation, None if free."""

    offset: int
    bytes: int
    requested_bytes: int
    state: str  # "free", "live", or "awaiting" another stream
    event: int | None


@dataclass(frozen=True)
class Segment:
    """Memory taken from the device, or one mapped run of an expandable segment."""

    serial: int
    offset: int
    bytes: int
    stream: int
    small: bool
    expandable: bool
    blocks: tuple[SegmentBlock, ...]

    @property
    def allocated_bytes(self) -> int:
        """What live blocks take of it."""
        return sum(b.bytes for b in self.blocks if b.state == "live")


@dataclass(frozen=True)
class OutOfMemory:
    """The allocation that failed, after all cached memory had been given back."""

    event: int
    id: int
    requested_bytes: int
    needed_bytes: int  # from the device: the segment for it
    free_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    stream: int
    tag: int


@dataclass(frozen=True)
class TimelinePoint:
    """The most of an interval of events; `event` is the first with that much allocated."""

    event: int
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Simulation:
    """What a trace came to. Sizes are bytes; of several events at a peak the first is named.

    `fragmentation` is 1 - allocated / reserved at the peak of what was reserved: the share of that
    memory which no live block held. `events` counts those replayed: all, unless memory ran out.
    """

    target: str
    events: int
    peak_allocated_bytes: int
    peak_allocated_event: int | None
    reserved_at_peak_bytes: int
    requested_at_peak_bytes: int
    peak_reserved_bytes: int
    peak_reserved_event: int | None
    allocated_at_peak_reserved_bytes: int
    fragmentation: float
    allocated_bytes: int
    reserved_bytes: int
    requested_bytes: int
    awaiting_bytes: int
    device_allocations: int
    device_frees: int
    retries: int
    out_of_memory: OutOfMemory | None
    native: _core.ReplayResult = field(repr=False, compare=False)

    def timeline(self, max_points: int | None = 1000) -> list[TimelinePoint]:
        """The course of events, of at most `max_points` intervals; None: every event.

        An interval keeps its maxima, so that no peak is lost.
        """
        return [TimelinePoint(*point) for point in self.native.timeline(max_points)]

    def peak_blocks(self, most: int | None = None) -> list[AllocatedBlock]:
        """What was alive at the peak of what was allocated, largest first."""
        names = AllocatedBlock.__dataclass_fields__
        return [
            AllocatedBlock(**{name: getattr(block, name) for name in names})
            for block in self.native.peak_blocks(most)
        ]

    def segments(self) -> list[Segment]:
        """What the process holds at the end, in the order in which it was taken."""
        return [
            Segment(
                s.serial,
                s.offset,
                s.bytes,
                s.stream,
                s.small,
                s.expandable,
                tuple(
                    SegmentBlock(
                        b.offset,
                        b.bytes,
                        b.requested_bytes,
                        b.state,
                        b.event if b.event >= 0 else None,
                    )
                    for b in s.blocks
                ),
            )
            for s in self.native.segments
        ]

    def bytes_by_tag(self) -> dict[int, int]:
        """Bytes of the blocks alive at the peak, by tag, most first."""
        sums: dict[int, int] = {}
        for block in self.native.peak_blocks():
            sums[block.tag] = sums.get(block.tag, 0) + block.bytes
        return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))

    def to_dict(
        self, *, max_points: int | None = 200, most_blocks: int | None = 50
    ) -> dict[str, Any]:
        """All of it as plain data for JSON, of timeline and blocks at the peak as much as said."""
        data = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("native", "out_of_memory")
        }
        data["out_of_memory"] = asdict(self.out_of_memory) if self.out_of_memory else None
        data["segments"] = [asdict(segment) for segment in self.segments()]
        data["peak_blocks"] = [asdict(block) for block in self.peak_blocks(most_blocks)]
        data["timeline"] = [asdict(point) for point in self.timeline(max_points)]
        return data

    def __str__(self) -> str:
        rows = [
            ("allocated at most", f"{format_size(self.peak_allocated_bytes)}"),
            ("reserved at most", f"{format_size(self.peak_reserved_bytes)}"),
            ("fragmentation", f"{self.fragmentation:.1%} of what was reserved then"),
            (
                "at the end",
                f"{format_size(self.allocated_bytes)} allocated, "
                f"{format_size(self.reserved_bytes)} reserved",
            ),
            (
                "from the device",
                f"{self.device_allocations} times, {self.device_frees} given back, "
                f"{self.retries} retries",
            ),
        ]
        if self.out_of_memory:
            oom = self.out_of_memory
            rows.append(
                (
                    "out of memory",
                    f"event {oom.event}: {format_size(oom.requested_bytes)} wanted, for which the "
                    f"device must give {format_size(oom.needed_bytes)}, "
                    f"{format_size(oom.free_bytes)} free",
                )
            )
        head = f"{self.events} events on {self.target}"
        return "\n".join([head, *(f"  {name:18} {text}" for name, text in rows)])


def simulate(
    events: Events,
    target: str = "cuda",
    *,
    limit: int | str | None = None,
    device_memory: int | str | None = None,
    conf: str = "",
    **options: Any,
) -> Simulation:
    """Replays `events` through a model of the allocator of `target`.

    events: rows of (block id, bytes, stream, tag), as a C-contiguous int64 buffer [n, 4] (NumPy,
    ``array('q')``), a CPU tensor of that, or any iterable of rows. target: "cuda" or "cpu"; what
    follows a colon ("cuda:8.9") changes nothing here. limit: what the process may reserve, in bytes
    or as text ("6 GB"); device_memory: what the device has. conf: settings as in torch's
    PYTORCH_ALLOC_CONF. options: torch's names, sizes in bytes (max_split_size,
    max_non_split_rounding_size, large_segment_size, garbage_collection_threshold,
    expandable_segments, roundup_power2_divisions); they go before `conf`.

    Raises EventError, a ValueError whose `event` is an index, for a trace that cannot be;
    ValueError and TypeError for other shapes, dtypes and options.

    >>> s = simulate([(0, 3 << 20, 0, 0), (1, 100, 0, 0), (0, RELEASE, 0, 0)])
    >>> s.peak_allocated_bytes, s.peak_reserved_bytes, s.allocated_bytes
    (3146240, 23068672, 512)
    """
    kind = target.partition(":")[0]
    merged = {**options_from_conf(conf), **options}
    divisions = merged.get("roundup_power2_divisions")
    if divisions is not None:
        merged["roundup_power2_divisions"] = _divisions(divisions)
    config = _core.AllocatorConfig(
        kind, limit=_bytes(limit), device_memory=_bytes(device_memory), **merged
    )
    return _simulation(_core.replay(_buffer(events), config), target)


def _simulation(native: _core.ReplayResult, target: str) -> Simulation:
    apart = ("target", "native", "out_of_memory")
    names = [name for name in Simulation.__dataclass_fields__ if name not in apart]
    oom = native.out_of_memory
    return Simulation(
        target=target,
        native=native,
        out_of_memory=None
        if oom is None
        else OutOfMemory(**{n: getattr(oom, n) for n in OutOfMemory.__dataclass_fields__}),
        **{name: getattr(native, name) for name in names},
    )


def _bytes(size: int | str | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size


def _buffer(events: Events) -> Any:
    if isinstance(events, torch.Tensor):
        # A tensor has no buffer of its own; this view of it needs NumPy, as torch's does.
        return events.detach().cpu().numpy()
    try:
        memoryview(events)
    except TypeError:
        return _rows(events)
    return events


def _rows(events: Iterable[Sequence[int]]) -> array[int]:
    flat = array("q")
    for index, row in enumerate(events):
        if len(row) != 4:
            raise ValueError(
                f"event {index} has {len(row)} numbers; it has 4: block id, bytes, stream, tag"
            )
        flat.extend(operator.index(number) for number in row)
    return flat


def _divisions(value: int | Sequence[int] | Mapping[int | str, int]) -> list[int]:
    """torch's roundup_power2_divisions: a number for all, or {MiB from which: divisions}.

    As in torch, sizes before the first boundary take the first's value, a boundary's value holds
    for its interval alone, and the key ">" sets all after the last boundary.
    """
    if isinstance(value, int):
        return [value]
    if not isinstance(value, Mapping):
        return list(value)
    table, last = [0] * 16, 0
    for position, (key, divisions) in enumerate(value.items()):
        if key == ">":
            table[last + 1 :] = [divisions] * (15 - last)
            continue
        boundary = int(key)
        if boundary < 1 or boundary & (boundary - 1):
            raise ValueError(
                f"roundup_power2_divisions begins an interval at {boundary} MiB; "
                "intervals begin at powers of two"
            )
        last = min(boundary.bit_length() - 1, 15)
        if position == 0:
            table[:last] = [divisions] * last
        table[last] = divisions
    return table


def options_from_conf(conf: str) -> dict[str, Any]:
    """The options of `simulate` that a text for torch's PYTORCH_ALLOC_CONF sets.

    >>> options_from_conf("expandable_segments:True,max_split_size_mb:128")
    {'expandable_segments': True, 'max_split_size': 134217728}

    Settings that change no device memory (pinned memory and such) are left out. Raises ValueError
    for text that is not a list of settings.
    """
    options: dict[str, Any] = {}
    for name, text in _settings(conf):
        try:
            if name in _SIZES_IN_CONF:
                options[_SIZES_IN_CONF[name]] = int(text) * MIB
            elif name == "garbage_collection_threshold":
                options[name] = float(text)
            elif name == "expandable_segments":
                options[name] = {"True": True, "False": False}[text]
            elif name == "roundup_power2_divisions":
                options[name] = _divisions(_intervals(text))
        except (ValueError, KeyError) as error:
            raise ValueError(f"cannot read {name}:{text} in the allocator's settings") from error
    return options


def _settings(conf: str) -> Iterable[tuple[str, str]]:
    """(name, value) of each setting; a value in brackets keeps its commas."""
    rest = "".join(conf.split())
    while rest:
        name, colon, rest = rest.partition(":")
        if rest.startswith("["):
            text, close, rest = rest[1:].partition("]")
            if not close or (rest and not rest.startswith(",")):
                raise ValueError(
                    f"no end of the list of {name!r} in the allocator's settings {conf!r}"
                )
            rest = rest[1:]
        else:
            text, _, rest = rest.partition(",")
        if not colon or not name or not text:
            raise ValueError(
                f"cannot read the allocator's settings {conf!r}; they are name:value, with commas"
            )
        yield name, text


def _intervals(text: str) -> Any:
    if ":" not in text:
        return int(text)
    pairs = (part.partition(":") for part in text.split(","))
    return {key if key == ">" else int(key): int(value) for key, _, value in pairs}
