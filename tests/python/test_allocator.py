"""The allocator simulator: against the naive oracle, against torch on the CPU, and bad input."""

from __future__ import annotations

import json
import random
import re
from array import array
from pathlib import Path
from typing import Any

import allocator_reference as reference
import pytest
import torch
import vramkit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vramkit import _core
from vramkit.allocator import (
    COMPLETE,
    EMPTY_CACHE,
    MIB,
    RELEASE,
    USE,
    Simulation,
    options_from_conf,
    simulate,
)
from vramkit.errors import EventError

Event = tuple[int, int, int, int]
# Where the rules change: both sides of each threshold.
EDGES = [0, 1, 511, 512, 513, MIB, MIB + 1, 2 * MIB, 10 * MIB - 1, 10 * MIB, 20 * MIB, 21 * MIB]


def random_trace(rng: random.Random, length: int) -> list[Event]:
    """A trace that can be: sizes of one of four kinds, some uses by other streams, some flushes."""
    streams, shares = rng.choice([1, 1, 3]), rng.random() < 0.4
    low, high = rng.choice([(0, 21), (18, 26), (5, 25), (20.5, 24.5), (23.5, 26.5)])
    few = [rng.randrange(1, 40 * MIB) for _ in range(5)] if rng.random() < 0.25 else []
    events: list[Event] = []
    alive: list[int] = []
    released: list[int] = []
    while len(events) < length:
        dice = rng.random()
        if shares and alive and dice < 0.08:
            events.append((rng.choice(alive), USE, rng.randrange(streams), 0))
        elif shares and released and dice < 0.12:
            events.append((released.pop(rng.randrange(len(released))), COMPLETE, 0, 0))
        elif dice < 0.125:
            events.append((0, EMPTY_CACHE, 0, 0))
        elif alive and dice < 0.5:
            released.append(alive.pop(rng.randrange(len(alive))))
            events.append((released[-1], RELEASE, 0, 0))
        else:
            size = int(2 ** rng.uniform(low, high))
            if few:
                size = rng.choice(few)
            elif rng.random() < 0.2:
                size = rng.choice(EDGES)
            alive.append(len(events))
            events.append((len(events), size, rng.randrange(streams), rng.randrange(9)))
    return events


def random_options(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options["limit"] = rng.choice([60, 120, 200, 333, 500]) * MIB
    if rng.random() < 0.3:
        options["device_memory"] = rng.choice([64, 150, 250]) * MIB
    if rng.random() < 0.35:
        options["expandable_segments"] = True
    if rng.random() < 0.4:
        options["garbage_collection_threshold"] = rng.choice([0.1, 0.5, 0.8])
    if rng.random() < 0.4:
        options["max_split_size"] = rng.choice([20, 21, 25, 32]) * MIB
        options["max_non_split_rounding_size"] = rng.choice([20, 24]) * MIB
    elif rng.random() < 0.3:
        options["large_segment_size"] = rng.choice([11, 16, 32]) * MIB
    if rng.random() < 0.4:
        tables = [[4], [16], [0] * 2 + [8] * 3 + [2] * 11, [256], [1]]
        options["roundup_power2_divisions"] = rng.choice(tables)
    return options


def layout(result: Simulation) -> list[tuple[object, ...]]:
    return [
        (
            *(s.serial, s.offset, s.bytes, s.stream, s.small, s.expandable),
            tuple(
                (b.offset, b.bytes, b.requested_bytes, b.state, -1 if b.event is None else b.event)
                for b in s.blocks
            ),
        )
        for s in result.segments()
    ]


def in_common(result: Simulation) -> reference.Result:
    """A simulation as the oracle says it."""
    oom = result.out_of_memory
    return reference.Result(
        peak_allocated=result.peak_allocated_bytes,
        peak_allocated_event=result.peak_allocated_event,
        reserved_at_peak=result.reserved_at_peak_bytes,
        peak_reserved=result.peak_reserved_bytes,
        peak_reserved_event=result.peak_reserved_event,
        allocated_at_peak_reserved=result.allocated_at_peak_reserved_bytes,
        alive_at_peak=[
            (b.id, b.bytes, b.requested_bytes, b.stream, b.tag, b.event)
            for b in result.peak_blocks()
        ],
        out_of_memory=oom and (oom.event, oom.reserved_bytes, oom.allocated_bytes),
        timeline=[(p.event, p.allocated_bytes, p.reserved_bytes) for p in result.timeline(None)],
        layout=layout(result),
        takes=result.device_allocations,
        gives=result.device_frees,
        retries=result.retries,
        awaiting=result.awaiting_bytes,
    )


@pytest.mark.parametrize("part", range(4))
def test_agrees_with_the_naive_reference(part: int) -> None:
    seen = dict.fromkeys(("oom", "retried", "swept", "oversized", "expanded", "waited"), 0)
    for seed in range(300 * part, 300 * part + 300):
        rng = random.Random(seed)
        options, events = random_options(rng), random_trace(rng, rng.choice([50, 150, 300]))
        expected = reference.replay(events, reference.Options(**options))
        assert in_common(simulate(events, **options)) == expected, f"seed {seed}, {options}"
        seen["oom"] += expected.out_of_memory is not None
        seen["retried"] += expected.retries > 1
        seen["swept"] += expected.swept > 0
        seen["oversized"] += expected.oversized > 0
        seen["expanded"] += "expandable_segments" in options and expected.gives > 0
        seen["waited"] += expected.awaiting > 0
    # The traces reach each of the rules, or the agreement would say little.
    assert all(count > 0 for count in seen.values()), seen


def check_invariants(result: Simulation, events: list[Event]) -> None:
    """What holds of every state: blocks tile segments, merging is complete, sums agree."""
    live: dict[int, tuple[int, int]] = {}
    for index, (block_id, size, _, _) in enumerate(events[: result.events]):
        if size > 0:
            live[block_id] = (index, size)
        elif size == RELEASE:
            live.pop(block_id, None)
    found: dict[int, int] = {}
    segments = result.segments()
    for segment in segments:
        place, before = segment.offset, None
        for block in segment.blocks:
            assert block.offset == place  # no overlap, no gap
            assert block.bytes >= max(512, block.requested_bytes)
            assert block.bytes % 512 == 0
            assert block.offset % 512 == 0
            place += block.bytes
            assert not (before == "free" and block.state == "free")
            before = block.state
            if block.state == "live":
                assert block.event is not None
                found[block.event] = block.requested_bytes
        assert place == segment.offset + segment.bytes
        assert segment.expandable or segment.bytes % MIB == 0
    assert found == dict(live.values())
    assert sum(s.bytes for s in segments) == result.reserved_bytes
    assert sum(s.allocated_bytes for s in segments) == result.allocated_bytes
    assert result.requested_bytes == sum(size for _, size in live.values())
    assert result.requested_bytes <= result.allocated_bytes
    for point in result.timeline(None):
        assert point.allocated_bytes <= point.reserved_bytes
    assert result.reserved_bytes >= result.allocated_bytes + result.awaiting_bytes
    assert 0 <= result.fragmentation <= 1
    at_peak = result.peak_blocks()
    assert sum(b.bytes for b in at_peak) == result.peak_allocated_bytes
    assert sum(b.requested_bytes for b in at_peak) == result.requested_at_peak_bytes
    assert [b.bytes for b in at_peak] == sorted((b.bytes for b in at_peak), reverse=True)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 400))
def test_invariants(seed: int, length: int) -> None:
    rng = random.Random(seed)
    options, events = random_options(rng), random_trace(rng, length)
    result = simulate(events, **options)
    check_invariants(result, events)
    again = simulate(events, **options)
    assert again.to_dict(max_points=None) == result.to_dict(max_points=None)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_all_released_and_emptied_nothing_is_reserved(seed: int) -> None:
    rng = random.Random(seed)
    events = [e for e in random_trace(rng, 200) if e[1] != EMPTY_CACHE]
    alive = {e[0] for e in events if e[1] >= 0} - {e[0] for e in events if e[1] == RELEASE}
    events += [(block, RELEASE, 0, 0) for block in sorted(alive)]
    for options in ({}, {"expandable_segments": True}):
        full = simulate(events, **options)
        assert full.allocated_bytes == 0
        assert full.reserved_bytes == full.peak_reserved_bytes > 0
        empty = simulate([*events, (0, EMPTY_CACHE, 0, 0)], **options)
        assert empty.reserved_bytes == 0
        assert empty.segments() == []
        if not options:  # those that expand map in several steps what they unmap in one
            assert empty.device_allocations == empty.device_frees


# --- The documented rules, one by one ----------------------------------------------------------


def peaks(*sizes: int, **options: Any) -> tuple[int, int]:
    result = simulate([(i, size, 0, 0) for i, size in enumerate(sizes)], **options)
    return result.peak_allocated_bytes, result.peak_reserved_bytes


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        # What is left of a large segment is split off above 1 MiB, and kept below.
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),
        (12 * MIB + 1, 12 * MIB + 512, 14 * MIB),
    ],
)
def test_one_request(size: int, allocated: int, reserved: int) -> None:
    assert peaks(size) == (allocated, reserved)


def test_the_constants_are_those_of_torchs_headers() -> None:
    header = Path(torch.__file__).with_name("include") / "c10" / "core" / "AllocatorConfig.h"
    if not header.is_file() or "kMinLargeAlloc" not in header.read_text():
        pytest.skip("this torch keeps the constants elsewhere, not in its headers")
    text = header.read_text()
    stated = {name: int(n) for name, n in re.findall(r"constexpr size_t (k\w+) = (\d+);", text)}
    smallest, segment = peaks(1)
    assert (stated["kMinBlockSize"], stated["kSmallBuffer"]) == (smallest, segment)
    assert peaks(stated["kSmallSize"])[1] == segment
    assert peaks(stated["kSmallSize"] + 1)[1] == _core.AllocatorConfig().large_segment_size
    assert f"large_segment_size_{{{_core.AllocatorConfig().large_segment_size}}}" in text
    alone = stated["kMinLargeAlloc"]
    assert (peaks(alone - 512)[1], peaks(alone)[1]) == (20 * MIB, alone)
    assert peaks(alone + 1)[1] == alone + stated["kRoundLarge"]


@pytest.mark.parametrize(
    ("divisions", "size", "rounded"),
    [
        (4, 1200 * 1024, 1280 * 1024),  # torch's own example, in KiB
        (4, 1024 * 1024, 1024 * 1024),
        (4, 2048, 2048),
        (4, 2049, 2560),
        (4, 2048 + 512, 2560),
        (1, 1025, 1536),
        (8, 4097, 4608),
        ({2: 4}, 5 * MIB + 1, 5 * MIB + 512),  # 4 MiB and more are not of the interval from 2 MiB
        ({2: 4}, 2 * MIB + 1, 2.5 * MIB),
        ({2: 4}, 1 * MIB + 1, 1.25 * MIB),  # before the first boundary: its value
        ({2: 4, ">": 2}, 5 * MIB + 1, 6 * MIB),
        ({64: 8, ">": 1}, 16 * MIB + 1, 18 * MIB),
    ],
)
def test_rounding_to_divisions_of_powers_of_two(divisions: Any, size: int, rounded: int) -> None:
    assert peaks(size, roundup_power2_divisions=divisions)[0] == rounded


def test_best_fit_takes_the_smallest_then_the_lowest() -> None:
    events = [(i, size * MIB, 0, 0) for i, size in enumerate((30, 14, 14, 40))]
    events += [(i, RELEASE, 0, 0) for i in range(4)]
    result = simulate([*events, (9, 13 * MIB + 512, 0, 0)])
    assert [s.allocated_bytes for s in result.segments()] == [0, 14 * MIB, 0, 0]


def test_streams_share_no_blocks() -> None:
    events = [(0, 5 * MIB, 1, 0), (0, RELEASE, 1, 0), (1, 5 * MIB, 2, 0)]
    assert simulate(events).peak_reserved_bytes == 40 * MIB
    assert simulate([(i, b, 1, 0) for i, b, _, _ in events]).peak_reserved_bytes == 20 * MIB


def test_a_block_used_by_another_stream_waits() -> None:
    shared = [(0, 5 * MIB, 1, 0), (0, USE, 2, 0), (0, RELEASE, 1, 0)]
    waiting = simulate([*shared, (1, 5 * MIB, 1, 0)])
    assert (waiting.allocated_bytes, waiting.awaiting_bytes) == (5 * MIB, 5 * MIB)
    assert waiting.segments()[0].blocks[0].state == "awaiting"
    assert waiting.segments()[0].blocks[1].state == "live"
    done = simulate([*shared, (0, COMPLETE, 0, 0), (1, 5 * MIB, 1, 0)])
    assert (done.allocated_bytes, done.awaiting_bytes) == (5 * MIB, 0)
    assert done.segments()[0].blocks[0].state == "live"
    # A use by its own stream is none; running out of memory waits for the others.
    own = simulate([shared[0], (0, USE, 1, 0), shared[2]])
    assert own.awaiting_bytes == 0
    pressed = simulate([*shared, (1, 30 * MIB, 1, 0), (0, COMPLETE, 0, 0)], limit=40 * MIB)
    assert (pressed.retries, pressed.reserved_bytes, pressed.awaiting_bytes) == (1, 30 * MIB, 0)


def test_out_of_memory_says_where_and_how_much() -> None:
    events = [(0, 30 * MIB, 0, 7), (1, 8 * MIB, 0, 8), (2, 60 * MIB, 5, 9), (2, RELEASE, 0, 0)]
    result = simulate(events, limit=100 * MIB)
    oom = result.out_of_memory
    assert oom is not None
    assert (oom.event, oom.id, oom.stream, oom.tag) == (2, 2, 5, 9)
    assert (oom.requested_bytes, oom.needed_bytes) == (60 * MIB, 60 * MIB)
    assert (oom.free_bytes, oom.reserved_bytes, oom.allocated_bytes) == (
        50 * MIB,
        50 * MIB,
        38 * MIB,
    )
    assert (result.events, result.retries) == (2, 1)
    assert "out of memory" in str(result)
    assert simulate(events, limit=110 * MIB).out_of_memory is None
    assert simulate(events, device_memory=100 * MIB).out_of_memory == oom


def test_memory_that_is_free_but_split_cannot_be_used_unless_segments_expand() -> None:
    def halves(size: int) -> list[Event]:
        rows = [(i, size, 0, 0) for i in range(8)] + [(i, RELEASE, 0, 0) for i in range(0, 8, 2)]
        return [*rows, (9, 2 * size, 0, 0)]

    events = halves(8 * MIB)  # two to a segment of 20 MiB: none of the four can be given back
    assert simulate(events, limit=80 * MIB).out_of_memory is not None
    # The segment that expands: 64 MiB, of which whole granules of 20 MiB are free nowhere.
    assert simulate(events, limit=100 * MIB, expandable_segments=True).peak_reserved_bytes == (
        80 * MIB
    )


def test_expandable_segments_grow_in_granules_and_give_whole_ones_back() -> None:
    rows = [(0, 25 * MIB, 0, 0), (1, 25 * MIB, 0, 0), (2, MIB, 0, 0), (3, 3 * MIB, 0, 0)]
    result = simulate(rows, expandable_segments=True)
    assert [(s.small, s.bytes) for s in result.segments()] == [
        (False, 60 * MIB),
        (True, 2 * MIB),
    ]
    emptied = simulate(
        [*rows, (0, RELEASE, 0, 0), (0, EMPTY_CACHE, 0, 0)], expandable_segments=True
    )
    # The first 20 of 25 MiB are a whole granule; the 7 MiB free at the end are not.
    assert [(s.offset, s.bytes, s.small) for s in emptied.segments()] == [
        (20 * MIB, 40 * MIB, False),
        (0, 2 * MIB, True),
    ]


def test_garbage_collection_gives_back_what_is_older_than_average() -> None:
    rows = [(i, 20 * MIB + 2 * MIB * i, 0, 0) for i in range(3)]
    rows += [(i, RELEASE, 0, 0) for i in range(2)]
    rows += [(3, 2 * MIB, 0, 0), (3, RELEASE, 0, 0), (4, 30 * MIB, 0, 0)]
    plain = simulate(rows, limit=200 * MIB)
    swept = simulate(rows, limit=200 * MIB, garbage_collection_threshold=0.1)
    assert (plain.device_frees, plain.reserved_bytes) == (0, 96 * MIB)
    # Both free segments were released before the last search, and reused neither is young.
    assert swept.device_frees > 0
    assert swept.retries == 0
    assert simulate(rows, garbage_collection_threshold=0.1).device_frees == 0  # no limit, no sweep


def test_oversize_blocks_are_neither_split_nor_given_to_small_requests() -> None:
    rows = [(0, 64 * MIB, 0, 0), (0, RELEASE, 0, 0), (1, 12 * MIB, 0, 0)]
    split = simulate(rows)
    assert [s.bytes for s in split.segments()] == [64 * MIB]
    kept = simulate(rows, max_split_size=32 * MIB)
    assert [s.bytes for s in kept.segments()] == [64 * MIB, 12 * MIB]
    near = [*rows[:2], (1, 44 * MIB + 512, 0, 0)]
    far = [*rows[:2], (1, 44 * MIB, 0, 0)]
    assert simulate(near, max_split_size=32 * MIB).reserved_bytes == 64 * MIB
    assert simulate(far, max_split_size=32 * MIB).reserved_bytes == 108 * MIB
    # Only as much goes back as the request needs, before all of it would.
    pressed = [(0, 64 * MIB, 0, 0), (1, 40 * MIB, 0, 0), (0, RELEASE, 0, 0), (1, RELEASE, 0, 0)]
    pressed += [(2, 12 * MIB, 0, 0)]
    result = simulate(pressed, max_split_size=32 * MIB, limit=110 * MIB)
    assert (result.device_frees, result.retries, result.reserved_bytes) == (1, 0, 76 * MIB)


# --- The CPU -----------------------------------------------------------------------------------


def test_cpu_caches_nothing_and_rounds_nothing() -> None:
    rows = [(0, 1000, 0, 1), (1, 30, 4, 2), (0, RELEASE, 0, 0), (2, 0, 0, 0), (1, USE, 3, 0)]
    rows += [(0, EMPTY_CACHE, 0, 0), (1, RELEASE, 0, 0), (1, COMPLETE, 0, 0)]
    result = simulate(rows, "cpu")
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (1030, 1030)
    assert (result.allocated_bytes, result.reserved_bytes, result.fragmentation) == (0, 0, 0.0)
    assert (result.device_allocations, result.device_frees) == (2, 2)
    assert [(b.id, b.bytes, b.tag) for b in result.peak_blocks()] == [(0, 1000, 1), (1, 30, 2)]
    assert result.segments() == []
    oom = simulate(rows, "cpu", limit=1029).out_of_memory
    assert oom is not None
    assert (oom.event, oom.free_bytes, oom.needed_bytes) == (1, 29, 30)


def profiled(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[Event], int]:
    """The allocations and releases of one call as rows, and the highest of their running total."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode():
        model(*inputs)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = model(*inputs)
            del out
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    found, stack = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while stack:
        node = stack.pop()
        stack.extend(node.children)
        kind, fields = node.typed
        if kind == _EventType.Allocation and fields.device.type == "cpu":
            found.append((node.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort()
    rows: list[Event] = []
    total = peak = 0
    alive: set[int] = set()
    for _, address, size in found:
        total += size
        peak = max(peak, total)
        if size > 0:
            alive.add(address)
            rows.append((address, size, 0, size))
        else:
            assert address in alive, "the call released what it had not allocated"
            alive.remove(address)
            rows.append((address, RELEASE, 0, 0))
    return rows, peak


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.recurrent = nn.LSTM(64, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolution(x).relu().flatten(2).transpose(1, 2).repeat(1, 1, 4)
        return self.recurrent(self.encoder(x))[0]


def test_same_peak_as_torchs_profiler_on_the_cpu() -> None:
    rows, peak = profiled(Block().eval(), torch.randn(2, 3, 12, 12))
    assert len(rows) > 50
    result = simulate(rows, "cpu")
    assert result.peak_allocated_bytes == result.peak_reserved_bytes == peak
    assert result.allocated_bytes == 0
    assert sum(b.tag for b in result.peak_blocks()) == peak


def test_same_peak_as_torchs_profiler_on_a_real_model(minilm_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(minilm_path).eval()
    tokens = torch.randint(5, 1000, (2, 48), generator=torch.Generator().manual_seed(0))
    rows, peak = profiled(model, tokens)
    assert len(rows) > 100
    assert simulate(rows, "cpu").peak_allocated_bytes == peak
    # What the same call would take on CUDA: no less than that, by rounding alone.
    check_invariants(simulate(rows), rows)


# --- Input and output --------------------------------------------------------------------------


def test_every_kind_of_buffer_is_read() -> None:
    numpy = pytest.importorskip("numpy")
    rows = [(0, 600, 0, 1), (1, 700, 0, 2), (0, RELEASE, 0, 0)]
    flat = array("q", [n for row in rows for n in row])
    matrix = numpy.array(rows, numpy.int64)
    expected = simulate(rows).to_dict()
    for events in (flat, matrix, torch.tensor(rows), iter(rows), memoryview(flat)):
        assert simulate(events).to_dict() == expected
    for nothing in ([], array("q"), numpy.empty((0, 4), numpy.int64)):
        empty = simulate(nothing)
        assert (empty.events, empty.peak_allocated_bytes, empty.timeline()) == (0, 0, [])
        assert empty.peak_allocated_event is None
        assert empty.fragmentation == 0.0
    readonly = matrix.copy()
    readonly.flags.writeable = False
    assert simulate(readonly).to_dict() == expected


def test_buffers_of_another_kind_are_refused() -> None:
    numpy = pytest.importorskip("numpy")
    config = _core.AllocatorConfig()
    for dtype in (numpy.int32, numpy.uint64, numpy.float64, ">i8"):
        with pytest.raises(TypeError, match="64-bit integers"):
            _core.replay(numpy.zeros((2, 4), dtype), config)
    for shape in ((2, 3), (3,), (1, 2, 4), ()):
        with pytest.raises(ValueError, match="shape"):
            _core.replay(numpy.zeros(shape, numpy.int64), config)
    wide = numpy.zeros((4, 8), numpy.int64)
    for strided in (wide[:, ::2], wide[:, :4], numpy.zeros((4, 8), numpy.int64).T[:, :]):
        if strided.shape[1] != 4:
            continue
        with pytest.raises(ValueError, match="contiguous"):
            _core.replay(strided, config)
    with pytest.raises(TypeError):
        _core.replay("events", config)
    with pytest.raises(ValueError, match="event 1 has 3 numbers"):
        simulate([(0, 1, 0, 0), (1, 2, 3)])
    with pytest.raises(TypeError):
        simulate([(0, 1.5, 0, 0)])
    with pytest.raises(OverflowError):
        simulate([(0, 1 << 63, 0, 0)])


@pytest.mark.parametrize(
    ("rows", "event", "text"),
    [
        ([(5, RELEASE, 0, 0)], 0, "block 5 is released but was never allocated"),
        (
            [(5, 8, 0, 0), (5, RELEASE, 0, 0), (5, RELEASE, 0, 0)],
            2,
            "block 5 is released but was released before; it was last allocated by event 0",
        ),
        ([(5, 8, 0, 0), (5, 8, 0, 0)], 1, "is allocated but still alive since event 0"),
        ([(5, 0, 0, 0), (5, 8, 0, 0)], 1, "is allocated but still alive since event 0"),
        ([(5, 8, 0, 0), (6, -5, 0, 0)], 1, "block 6 has -5 bytes"),
        ([(6, -(1 << 63), 0, 0)], 0, "sizes are 0 or more"),
        ([(6, (1 << 60) + 1, 0, 0)], 0, r"2\^60 at most"),
        ([(i, 1 << 60, 0, 0) for i in range(9)], 4, r"more than 2\^62 bytes"),
        ([(5, USE, 0, 0)], 0, "is used by a stream but was never allocated"),
        ([(5, COMPLETE, 0, 0)], 0, "is completed but was never allocated"),
        ([(5, 8, 0, 0), (5, COMPLETE, 0, 0)], 1, "is completed but was not released"),
        (
            [(5, 8, 0, 0), (5, USE, 1, 0), (5, RELEASE, 0, 0), (5, 8, 0, 0)],
            3,
            "awaiting another stream since event 0",
        ),
    ],
)
@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_events_that_cannot_be(rows: list[Event], event: int, text: str, target: str) -> None:
    if target == "cpu" and "awaiting" in text:
        assert simulate(rows, target).allocated_bytes == 8  # nothing waits there
        return
    with pytest.raises(EventError, match=text) as raised:
        simulate(rows, target)
    assert raised.value.event == event
    assert f"event {event}:" in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_the_largest_sizes_do_not_overflow() -> None:
    for options in ({}, {"expandable_segments": True}, {"roundup_power2_divisions": 4}):
        result = simulate([(i, 1 << 60, 0, 0) for i in range(3)], **options)
        assert result.peak_allocated_bytes == 3 << 60
        limited = simulate([(0, 1 << 60, 0, 0)], limit=1 << 40, **options)
        assert limited.out_of_memory is not None
    ids = [-(1 << 63), (1 << 63) - 1, 0, -1]
    rows = [(i, 100, i, i) for i in ids] + [(i, RELEASE, 0, 0) for i in ids]
    assert simulate(rows).peak_allocated_bytes == 2048
    assert [b.id for b in simulate(rows).peak_blocks()] == ids


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"limit": -1}, "limit is -1"),
        ({"device_memory": (1 << 60) + 1}, "device_memory"),
        ({"max_split_size": 19 * MIB}, "max_split_size is .* at least 20"),
        ({"max_split_size": 20 * MIB + 1}, "whole MiB"),
        ({"max_split_size": 30 * MIB, "large_segment_size": 32 * MIB}, "at least 32"),
        ({"max_non_split_rounding_size": 10 * MIB}, "max_non_split_rounding_size"),
        ({"large_segment_size": 10 * MIB}, "large_segment_size"),
        ({"garbage_collection_threshold": 1.0}, "garbage_collection_threshold"),
        ({"garbage_collection_threshold": float("nan")}, "garbage_collection_threshold"),
        ({"roundup_power2_divisions": 3}, "power of two"),
        ({"roundup_power2_divisions": [4, 4]}, "it has none, 1 for all sizes, or 16"),
        ({"roundup_power2_divisions": {3: 4}}, "powers of two"),
        ({"target": "tpu"}, "unknown kind of allocator 'tpu'"),
        ({"limit": "6"}, "cannot read the size"),
        ({"conf": "max_split_size_mb"}, "name:value"),
        ({"conf": "max_split_size_mb:many"}, "max_split_size_mb:many"),
        ({"conf": "expandable_segments:yes"}, "expandable_segments:yes"),
        ({"conf": "roundup_power2_divisions:[4:2"}, "no end of the list"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        simulate([], **options)


def test_torchs_settings_are_read() -> None:
    conf = (
        "max_split_size_mb:40, max_non_split_rounding_mb:30,garbage_collection_threshold:0.5,"
        "roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1],expandable_segments:True,"
        "pinned_use_background_threads:True,large_segment_size_mb:32,backend:native"
    )
    options = options_from_conf(conf)
    assert options == {
        "max_split_size": 40 * MIB,
        "max_non_split_rounding_size": 30 * MIB,
        "garbage_collection_threshold": 0.5,
        "roundup_power2_divisions": [8] * 7 + [2, 4, 2, 4] + [1] * 5,
        "expandable_segments": True,
        "large_segment_size": 32 * MIB,
    }
    config = _core.AllocatorConfig(**options)
    assert config.roundup_power2_divisions == options["roundup_power2_divisions"]
    assert config.max_split_size == 40 * MIB
    assert options_from_conf("") == {}
    assert options_from_conf("roundup_power2_divisions:8")["roundup_power2_divisions"] == [8]
    rows = [(0, 25 * MIB, 0, 0)]
    conf = "expandable_segments:True"
    assert simulate(rows, conf=conf).reserved_bytes == 40 * MIB
    assert simulate(rows, conf=conf, expandable_segments=False).reserved_bytes == 26 * MIB


@given(st.integers(0, 2**32), st.integers(1, 500), st.integers(1, 600))
@settings(max_examples=40, deadline=None)
def test_a_short_timeline_keeps_every_intervals_maximum(seed: int, length: int, most: int) -> None:
    events = random_trace(random.Random(seed), length)
    result = simulate(events)
    full, short = result.timeline(None), result.timeline(most)
    assert [p.event for p in full] == list(range(length))
    assert len(short) == min(length, most)
    assert max(p.allocated_bytes for p in short) == result.peak_allocated_bytes
    assert max(p.reserved_bytes for p in short) == result.peak_reserved_bytes
    base, extra = divmod(length, len(short))
    begin = 0
    for k, point in enumerate(short):
        part = full[begin : begin + base + (k < extra)]
        begin += len(part)
        assert point.allocated_bytes == max(p.allocated_bytes for p in part)
        assert point.reserved_bytes == max(p.reserved_bytes for p in part)
        assert point.event == next(
            p.event for p in part if p.allocated_bytes == point.allocated_bytes
        )


def test_results_are_plain_data_and_text() -> None:
    rows = [(0, 3 * MIB, 0, 4), (1, 6 * MIB, 0, 4), (2, 10, 0, 3), (1, RELEASE, 0, 0)]
    result = simulate(rows, "cuda:8.9", limit="1 GiB")
    data = json.loads(json.dumps(result.to_dict(max_points=2, most_blocks=1)))
    assert data["target"] == "cuda:8.9"
    assert data["peak_allocated_bytes"] == 9 * MIB + 512
    assert len(data["timeline"]) == 2
    assert [b["id"] for b in data["peak_blocks"]] == [1]
    assert data["out_of_memory"] is None
    assert result.bytes_by_tag() == {4: 9 * MIB, 3: 512}
    assert "4 events on cuda:8.9" in str(result)
    assert "9.0 MiB" in str(result)
    with pytest.raises(ValueError, match="max_points"):
        result.timeline(0)
    with pytest.raises(ValueError, match="most"):
        result.peak_blocks(-1)


def test_the_package_top_stays_as_it_is() -> None:
    assert not hasattr(vramkit, "simulate")
