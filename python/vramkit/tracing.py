"""Every allocation and release of a call, in order, learned on fake tensors.

A dispatch mode below the model sees each operator and follows the storages of its results; what
the operator holds inside itself is put into its window afterwards, from a probe or from a rule.
The result is a Trace: plain events that an allocator's simulator can replay.
"""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

RELEASE = -1  # in the place of a size: the block is given back
COLUMNS = 4  # block, bytes or RELEASE, stream, tag


class Tag(NamedTuple):
    """What an allocation was for: the operator, the module's path ("" is the model), the phase."""

    operator: str
    module: str
    phase: str


@dataclass
class Trace:
    """Allocations and releases in the order in which they happen.

    Attributes:
        events: Flat int64 numbers, four for each event: block, bytes (RELEASE for a release),
            stream, index into `tags`. A block is allocated once and released at most once.
        tags: What the last column means.
        marks: (label, number of events before it) at every module's end and every phase's begin.
        outer: The last block that an operator returned; those above it lived within operators.
        cache: Blocks of a generation loop's cache.
    """

    events: array[int] = field(default_factory=lambda: array("q"))
    tags: list[Tag] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)
    outer: int = 0
    cache: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.events) // COLUMNS

    def numpy(self) -> np.ndarray[Any, Any]:
        """The events as an int64 array [n, 4] on the same memory."""
        import numpy

        return numpy.frombuffer(self.events, dtype=numpy.int64).reshape(-1, COLUMNS)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        numbers = iter(self.events)
        return zip(numbers, numbers, numbers, numbers, strict=True)

    def live(self) -> list[int]:
        """Live bytes after each event."""
        sizes: dict[int, int] = {}
        now, after = 0, []
        for block, size, _, _ in self:
            if size == RELEASE:
                now -= sizes.pop(block)
            else:
                sizes[block] = size
                now += size
            after.append(now)
        return after

    def peak(self, phase: str | None = None) -> int:
        """The most bytes alive at once; with `phase`, at that phase's own allocations."""
        if phase is not None:
            return self.phase_peaks().get(phase, 0)
        return max(self.live(), default=0)

    def phase_peaks(self) -> dict[str, int]:
        """The most bytes alive at each phase's own allocations, in order."""
        peaks = dict.fromkeys(self.phases(), 0)
        names = [tag.phase for tag in self.tags]
        for now, (_, size, _, tag) in zip(self.live(), self, strict=True):
            if size != RELEASE and now > peaks[names[tag]]:
                peaks[names[tag]] = now
        return peaks

    def phases(self) -> list[str]:
        """Names of the phases, in order."""
        return list(dict.fromkeys(tag.phase for tag in self.tags))

    def kind(self, block: int) -> str:
        """What a block is: "cache", "workspaces" (within an operator), or "activations"."""
        if block in self.cache:
            return "cache"
        return "workspaces" if block > self.outer else "activations"

    def kinds_at_peak(self) -> dict[str, int]:
        """Bytes alive at the peak by `kind`, all three of them."""
        sums = dict.fromkeys(("cache", "activations", "workspaces"), 0)
        for block, size, _ in self._at_peak():
            sums[self.kind(block)] += size
        return sums

    def alive_at(self, place: int) -> list[tuple[int, int, int]]:
        """(block, bytes, tag) of what is alive after the event `place`."""
        alive: dict[int, tuple[int, int]] = {}
        for index, (block, size, _, tag) in enumerate(self):
            if index > place:
                break
            if size == RELEASE:
                del alive[block]
            else:
                alive[block] = (size, tag)
        return [(block, size, tag) for block, (size, tag) in alive.items()]

    def _at_peak(self) -> list[tuple[int, int, int]]:
        after = self.live()
        return self.alive_at(after.index(max(after))) if after else []

    def alive_at_peak(self) -> dict[Tag, int]:
        """Bytes alive at the peak by what put them there, the largest first."""
        found: Counter[Tag] = Counter()
        for _, size, tag in self._at_peak():
            found[self.tags[tag]] += size
        return dict(found.most_common())

    def timeline(self) -> list[tuple[str, int]]:
        """(label, live bytes) at every mark."""
        after = [0, *self.live()]
        return [(label, after[place]) for label, place in self.marks]


class Call(NamedTuple):
    """One operator's call as a probe repeats it: tensors by their geometry, all else by value."""

    operator: Any
    spec: tuple[Any, ...]  # hashable; see `described`


class Geometry(NamedTuple):
    """What a probe needs to know of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last, elements that are shared counted once."""
        return self.extent * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Elements from the first to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    @property
    def numel(self) -> int:
        """Elements."""
        count = 1
        for n in self.shape:
            count *= n
        return count


class Unhashable(Exception):
    """A call that cannot be repeated from its description: a generator or a foreign object."""


_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout,
          torch.memory_format, type(None))  # fmt: skip


def described(value: Any) -> Any:
    """A hashable description of an operator's arguments; Unhashable where there is none."""
    if isinstance(value, Tensor):
        return Geometry(value.dtype, tuple(value.shape), tuple(value.stride()))
    if isinstance(value, (tuple, list)):
        return ("seq", *(described(v) for v in value))
    if isinstance(value, dict):
        return ("map", *((k, described(v)) for k, v in value.items()))
    if isinstance(value, _PLAIN):
        return value
    raise Unhashable(type(value).__name__)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in an operator's arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in tensors_in(part)]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_in(part)]
    return []


def geometries(spec: Any) -> Iterator[Geometry]:
    """All tensors of a description, in order."""
    if isinstance(spec, Geometry):
        yield spec
    elif isinstance(spec, tuple):
        for part in spec:
            yield from geometries(part)


# What an operator holds inside itself: sizes in order, negative where one is released. Results are
# those that stay. None means unknown.
Inside = Sequence[int]

CALL, ALLOC, FREE, MARK = range(4)


@dataclass
class Recording:
    """What a traced run did, before the insides of its operators are known."""

    steps: list[tuple[int, int, int, int]] = field(default_factory=list)
    calls: list[Call | None] = field(default_factory=list)
    results: dict[Call, tuple[int, ...]] = field(default_factory=dict)  # bytes of new results
    strides: dict[Call, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    declared: dict[int, int] = field(default_factory=dict)  # step's call: bytes it says it holds
    tags: dict[Tag, int] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    blocks: int = 0
    cache: set[int] = field(default_factory=set)  # blocks of a generation loop's cache

    def tag(self, tag: Tag) -> int:
        """The index of a tag."""
        return self.tags.setdefault(tag, len(self.tags))

    def mark(self, label: str) -> None:
        """Note that `label` ends, or begins, here."""
        self.labels.append(label)
        self.steps.append((MARK, len(self.labels) - 1, 0, 0))

    def allocate(self, nbytes: int, tag: int) -> int:
        """A new block's number."""
        self.blocks += 1
        self.steps.append((ALLOC, self.blocks, nbytes, tag))
        return self.blocks

    def free(self, block: int, tag: int) -> None:
        """The end of a block."""
        self.steps.append((FREE, block, 0, tag))

    def distinct(self) -> list[Call]:
        """The calls without repetitions, in order."""
        return list(dict.fromkeys(call for call in self.calls if call is not None))

    def bare_peak(self) -> int:
        """The most bytes alive at once, of results alone."""
        sizes: dict[int, int] = {}
        now = peak = 0
        for kind, block, nbytes, _ in self.steps:
            if kind == ALLOC:
                sizes[block] = nbytes
                now += nbytes
                peak = max(peak, now)
            elif kind == FREE:
                now -= sizes.pop(block, 0)
        return peak

    def differs(self, known: Mapping[Call, Sequence[tuple[int, ...]]]) -> bool:
        """Whether any result had other strides than those that are known now."""
        # Some fake operators return an empty tensor where the real one returns nothing.
        return any(
            tuple(old) != tuple(new)
            for call, seen in self.strides.items()
            for old, new in zip(seen, known.get(call, ()), strict=False)
        )

    def assemble(self, inside: Mapping[Call, Inside], without: set[int] | None = None) -> Trace:
        """The Trace, with what each operator holds inside put into its window.

        The blocks `without` are left out.
        """
        made = Trace(tags=list(self.tags), outer=self.blocks, cache=frozenset(self.cache))
        writer = _Writer(made, self.blocks, without or set())
        index = 0
        while index < len(self.steps):
            kind, number, nbytes, tag = self.steps[index]
            index += 1
            if kind == MARK:
                made.marks.append((self.labels[number], len(made)))
            elif kind == ALLOC:
                writer.allocate(number, nbytes, tag)
            elif kind == FREE:
                writer.free(number, tag)
            else:
                results = []
                while index < len(self.steps) and self.steps[index][0] == ALLOC:
                    results.append(self.steps[index][1:3])
                    index += 1
                call = self.calls[number]
                sizes = None if call is None else inside.get(call)
                if sizes is None:
                    sizes = [n for _, n in results]
                    if number in self.declared:
                        sizes += [self.declared[number], -self.declared[number]]
                writer.window(sizes, results, tag)
        return made


class _Writer:
    """Appends events; numbers the blocks that only a window knows."""

    def __init__(self, trace: Trace, blocks: int, without: set[int]) -> None:
        self.events = trace.events
        self.next = blocks
        self.without = without
        self.known: set[int] = set()

    def allocate(self, block: int, nbytes: int, tag: int) -> None:
        if nbytes > 0 and block not in self.without:
            self.known.add(block)
            self.events.extend((block, nbytes, 0, tag))

    def free(self, block: int, tag: int) -> None:
        if block in self.known:
            self.events.extend((block, RELEASE, 0, tag))

    def window(self, sizes: Inside, results: list[tuple[int, int]], tag: int) -> None:
        """One operator's own events; those that stay are its results, by size, then by order."""
        steps, staying = paired(sizes)
        names: dict[int, int] = {}
        left = list(results)
        for place in staying:
            same = next((r for r in left if r[1] == sizes[place]), None)
            if same is not None:
                names[place] = same[0]
                left.remove(same)
        for place in staying:
            if place not in names and left:
                names[place] = left.pop(0)[0]
        strays = []
        for place, begins in steps:
            if not begins:
                self.free(names[place], tag)
                continue
            if place not in names:
                self.next += 1
                names[place] = self.next
                if place in staying:
                    strays.append(place)
            self.allocate(names[place], sizes[place], tag)
        for place in strays:
            self.free(names[place], tag)
        for block, nbytes in left:
            self.allocate(block, nbytes, tag)


@functools.lru_cache(maxsize=4096)
def _paired(sizes: tuple[int, ...]) -> tuple[list[tuple[int, bool]], list[int]]:
    steps: list[tuple[int, bool]] = []
    waiting: dict[int, list[int]] = {}
    for place, size in enumerate(sizes):
        if size > 0:
            waiting.setdefault(size, []).append(place)
            steps.append((place, True))
        elif waiting.get(-size):
            # The latest of one size: they are the same to a sum, and temporaries nest.
            steps.append((waiting[-size].pop(), False))
    return steps, sorted(p for places in waiting.values() for p in places)


def paired(sizes: Inside) -> tuple[list[tuple[int, bool]], list[int]]:
    """((place, begins) in order, places that are never released) of a list of signed sizes."""
    return _paired(tuple(sizes))
