"""Recorded CUDA snapshots: read, replayed and compared.

No GPU made these: they are written by hand from the schema that torch.cuda.memory._snapshot
documents, with addresses and segments as the allocator's rules give them. The last test records
a real run, where there is a CUDA device.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from conftest import RunPython
from vramkit.allocator import COMPLETE, EMPTY_CACHE, MIB, RELEASE, USE, simulate
from vramkit.allocator_snapshot import compare_snapshot, read_snapshot

A, B = 0x7F0000000000, 0x7F0010000000


def entry(action: str, addr: int, size: int, stream: int = 0) -> dict[str, Any]:
    place = {"device_free": addr} if action == "oom" else {"addr": addr}
    return {"action": action, **place, "size": size, "stream": stream, "frames": [], "time_us": 1}


def segment(
    address: int, size: int, allocated: int, kind: str = "large", stream: int = 0, **more: Any
) -> dict[str, Any]:
    return {
        "device": 0,
        "address": address,
        "total_size": size,
        "stream": stream,
        "segment_type": kind,
        "segment_pool_id": (0, 0),
        "allocated_size": allocated,
        "active_size": allocated,
        "blocks": [],
        "is_expandable": False,
        **more,
    }


def released(addr: int, size: int) -> list[dict[str, Any]]:
    return [entry("free_requested", addr, size), entry("free_completed", addr, size)]


def snapshot(
    trace: list[dict[str, Any]], segments: list[dict[str, Any]], **settings: Any
) -> dict[str, Any]:
    return {
        "segments": segments,
        "device_traces": [trace, []],
        "allocator_settings": {
            "PYTORCH_CUDA_ALLOC_CONF": "",
            "max_split_size": -1,
            "garbage_collection_threshold": 0.0,
            "expandable_segments": False,
            "roundup_power2_divisions": {str(1 << i): 0 for i in range(16)},
            **settings,
        },
    }


def usual() -> dict[str, Any]:
    """Small and large segments, addresses used again, and a cache emptied on the way."""
    trace = [
        entry("segment_alloc", A, 2 * MIB),
        entry("alloc", A, 1000),
        entry("segment_alloc", B, 20 * MIB),
        entry("alloc", B, 3 * MIB),
        entry("alloc", B + 3 * MIB, 5 * MIB),
        *released(B, 3 * MIB),
        entry("alloc", B, 3 * MIB - 100),
        *released(B, 3 * MIB - 100),
        *released(B + 3 * MIB, 5 * MIB),
        entry("segment_free", B, 20 * MIB),
        entry("segment_alloc", B, 12 * MIB),
        entry("alloc", B, 12 * MIB - 512),
        entry("snapshot", 0, 0),
    ]
    return snapshot(trace, [segment(A, 2 * MIB, 1024, "small"), segment(B, 12 * MIB, 12 * MIB)])


def test_a_recording_becomes_events() -> None:
    trace = read_snapshot(usual())
    rows = [tuple(trace.events[i : i + 4]) for i in range(0, len(trace.events), 4)]
    assert rows == [
        (0, 1000, 0, 1),
        (1, 3 * MIB, 0, 3),
        (2, 5 * MIB, 0, 4),
        (1, RELEASE, 0, 5),
        (3, 3 * MIB - 100, 0, 7),
        (3, RELEASE, 0, 8),
        (2, RELEASE, 0, 10),
        (0, EMPTY_CACHE, 0, 12),
        (4, 12 * MIB - 512, 0, 14),
    ]
    assert trace.complete
    assert trace.entries == 16
    assert trace.peak_requested_bytes == max(1000 + 8 * MIB, 1000 + 12 * MIB - 512)
    assert trace.peak_reserved_bytes == 22 * MIB
    assert (trace.device_allocations, trace.device_frees) == (3, 1)
    assert (trace.reserved_bytes, trace.allocated_bytes) == (14 * MIB, 12 * MIB + 1024)
    assert trace.failed is None


def test_the_simulation_agrees_with_what_was_recorded() -> None:
    comparison = compare_snapshot(usual())
    assert comparison.agrees, str(comparison)
    assert str(comparison).startswith("agrees")
    data = json.loads(json.dumps(comparison.to_dict()))
    assert data["figures"]["peak_reserved_bytes"] == {
        "recorded": 22 * MIB,
        "simulated": 22 * MIB,
    }
    assert comparison.simulated.peak_blocks()[0].tag == 14  # the entry that allocated it


@pytest.mark.parametrize("figure", ["segment", "allocated", "peak"])
def test_differences_are_found(figure: str) -> None:
    other = usual()
    if figure == "segment":
        other["segments"][0]["stream"] = 3
    elif figure == "allocated":
        other["segments"][1]["allocated_size"] -= 512
    else:
        other["device_traces"][0][2]["size"] = 22 * MIB
        other["device_traces"][0][12]["size"] = 22 * MIB
    comparison = compare_snapshot(other)
    assert not comparison.agrees
    assert str(comparison).startswith("differs")
    unequal = [name for name, pair in comparison.figures.items() if not pair.equal]
    if figure == "segment":
        assert comparison.only_recorded == ((3, True, False, 2 * MIB),)
        assert comparison.only_simulated == ((0, True, False, 2 * MIB),)
        assert "only recorded: small segment, 2.0 MiB, stream 3" in str(comparison)
    elif figure == "allocated":
        assert unequal == ["allocated_bytes"]
    else:
        assert unequal == ["peak_reserved_bytes"]
        assert f"({-2 * MIB:+d})" in str(comparison)


def test_the_recorded_settings_are_used() -> None:
    trace = [
        entry("segment_map", A, 40 * MIB),  # in one step, where nothing is mapped yet
        entry("alloc", A, 25 * MIB),
        entry("alloc", A + 25 * MIB, 3 * MIB),
        *released(A, 25 * MIB),
        entry("segment_unmap", A, 20 * MIB),
    ]
    held = [segment(A + 20 * MIB, 20 * MIB, 3 * MIB, is_expandable=True)]
    recorded = snapshot(trace, held, expandable_segments=True)
    comparison = compare_snapshot(recorded)
    assert comparison.agrees, str(comparison)
    assert not compare_snapshot(recorded, expandable_segments=False).agrees
    rounded = snapshot(
        [entry("segment_alloc", A, 20 * MIB), entry("alloc", A, 5 * MIB)],
        [segment(A, 20 * MIB, 6 * MIB)],
        roundup_power2_divisions={str(1 << i): 2 for i in range(16)},
    )
    assert compare_snapshot(rounded).agrees
    shared = snapshot(
        [entry("segment_alloc", A, 32 * MIB), entry("alloc", A, 5 * MIB)],
        [segment(A, 32 * MIB, 5 * MIB)],
        PYTORCH_CUDA_ALLOC_CONF="large_segment_size_mb:32",
    )
    assert compare_snapshot(shared).agrees


def test_a_release_that_waits_for_another_stream() -> None:
    trace = [
        entry("segment_alloc", A, 20 * MIB, 7),
        entry("alloc", A, 3 * MIB, 7),
        entry("free_requested", A, 3 * MIB, 7),
        entry("alloc", A + 3 * MIB, 3 * MIB, 7),
        entry("free_completed", A, 3 * MIB, 7),
        entry("alloc", A, 3 * MIB // 2, 7),
    ]
    recorded = snapshot(trace, [segment(A, 20 * MIB, 9 * MIB // 2, stream=7)])
    rows = read_snapshot(recorded).events
    kinds = [rows[i + 1] for i in range(0, len(rows), 4)]
    assert kinds == [3 * MIB, USE, RELEASE, 3 * MIB, COMPLETE, 3 * MIB // 2]
    comparison = compare_snapshot(recorded)
    assert comparison.agrees, str(comparison)
    blocks = comparison.simulated.segments()[0].blocks
    assert [(b.offset, b.state) for b in blocks] == [
        (0, "live"),
        (3 * MIB // 2, "free"),
        (3 * MIB, "live"),
        (6 * MIB, "free"),
    ]


def short_of_memory() -> dict[str, Any]:
    trace = [
        entry("segment_alloc", A, 30 * MIB),
        entry("alloc", A, 30 * MIB),
        entry("segment_alloc", B, 20 * MIB),
        entry("alloc", B, 20 * MIB),
        *released(A, 30 * MIB),
        entry("segment_free", A, 30 * MIB),
        entry("oom", 40 * MIB, 50 * MIB),
        *released(B, 20 * MIB),
    ]
    # The allocator has 60 MiB, of which the 20 MiB are in use: 50 MiB cannot be.
    return snapshot(trace, [segment(B, 20 * MIB, 0)])


def test_running_out_of_memory_is_compared_where_the_limit_is_known() -> None:
    recorded = short_of_memory()
    trace = read_snapshot(recorded)
    assert trace.failed == (4, 7, 50 * MIB, 0)
    without = compare_snapshot(recorded)
    assert without.agrees, str(without)
    assert "out_of_memory_entry" not in without.figures
    limited = compare_snapshot(recorded, limit=60 * MIB)
    assert limited.agrees, str(limited)
    assert limited.figures["out_of_memory_entry"].recorded == 7
    roomy = compare_snapshot(recorded, limit=90 * MIB)
    assert not roomy.agrees
    assert roomy.figures["out_of_memory_entry"].simulated == -1
    tight = compare_snapshot(recorded, limit=25 * MIB)
    assert tight.figures["out_of_memory_entry"].recorded == -1
    assert tight.figures["out_of_memory_entry"].simulated == 1


def test_a_recording_that_began_late_is_said_to_be_incomplete() -> None:
    late = usual()
    late["device_traces"][0] = late["device_traces"][0][2:]
    trace = read_snapshot(late)
    assert (trace.unmatched, trace.initial_reserved_bytes) == (0, 2 * MIB)
    assert trace.peak_reserved_bytes == 22 * MIB
    comparison = compare_snapshot(late)
    assert not comparison.agrees
    assert "the recording began late" in str(comparison)
    late["device_traces"][0] = late["device_traces"][0][3:]
    assert read_snapshot(late).unmatched == 2


def test_parts_that_go_back_for_an_allocation_are_left_to_the_replay() -> None:
    trace = [
        entry("segment_alloc", A, 64 * MIB),
        entry("alloc", A, 64 * MIB),
        entry("segment_alloc", B, 40 * MIB),
        entry("alloc", B, 40 * MIB),
        *released(A, 64 * MIB),
        *released(B, 40 * MIB),
        entry("segment_free", B, 40 * MIB),
        entry("segment_alloc", 2 * B, 12 * MIB),
        entry("alloc", 2 * B, 12 * MIB),
    ]
    held = [segment(A, 64 * MIB, 0), segment(2 * B, 12 * MIB, 12 * MIB)]
    recorded = snapshot(trace, held, max_split_size=32 * MIB)
    assert EMPTY_CACHE not in read_snapshot(recorded).events
    comparison = compare_snapshot(recorded, limit=110 * MIB)
    assert comparison.agrees, str(comparison)
    assert not compare_snapshot(recorded).agrees  # nothing presses without the limit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("device_traces"), "the snapshot has no 'device_traces'"),
        (lambda s: s.pop("segments"), "the snapshot has no 'segments'"),
        (lambda s: s["device_traces"][0].clear(), "no trace of device 0"),
        (lambda s: s["device_traces"][0][3].pop("addr"), "entry 3 has no 'addr' that is int"),
        (lambda s: s["device_traces"][0][3].update(size="big"), "entry 3 has no 'size'"),
        (lambda s: s["device_traces"][0][3].update(action="leak"), "entry 3 .* 'leak'"),
        (lambda s: s["device_traces"][0][3].update(pool_id=(0, 1)), "entry 3 .* private pool"),
        (lambda s: s["device_traces"][0][4].update(addr=B), "entry 4 allocates .* in use"),
        (lambda s: s["segments"][0].pop("total_size"), "a segment has no 'total_size'"),
    ],
)
def test_snapshots_that_break_the_schema(change: Any, text: str) -> None:
    broken = copy.deepcopy(usual())
    change(broken)
    with pytest.raises(ValueError, match=text):
        compare_snapshot(broken)
    with pytest.raises(ValueError, match="no trace of device 5"):
        read_snapshot(usual(), device=5)


def test_a_simulation_recorded_as_a_snapshot_agrees_with_itself() -> None:
    rows = [(i, (i * 7919 % 23 + 1) * 300_000, 0, 0) for i in range(40)]
    rows += [(i, RELEASE, 0, 0) for i in range(0, 40, 3)]
    result = simulate(rows)
    addresses: dict[int, int] = {}
    trace, place = [], A
    for s in result.segments():
        trace.append(entry("segment_alloc", place, s.bytes))
        addresses[s.serial] = place
        place += 1 << 32
    for i, size, _, _ in rows:
        addr = (1 << 40) + (i << 32)
        trace += [entry("alloc", addr, size)] if size > 0 else released(addr, rows[i][1])
    held = [
        segment(addresses[s.serial], s.bytes, s.allocated_bytes, "small" if s.small else "large")
        for s in result.segments()
    ]
    comparison = compare_snapshot(snapshot(trace, held))
    assert comparison.agrees, str(comparison)


RECORD = """
import sys
import torch
from vramkit.allocator_snapshot import compare_snapshot

conf = sys.argv[1]
torch.cuda.memory._record_memory_history()
model = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for rows in (4, 16, 9, 30):
    model(torch.randn(rows, 200, 512, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if rows == 9:
        torch.cuda.empty_cache()
comparison = compare_snapshot(torch.cuda.memory._snapshot(), conf=conf)
print(comparison)
sys.exit(0 if comparison.agrees else 1)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "conf", ["", "expandable_segments:True", "roundup_power2_divisions:4,max_split_size_mb:64"]
)
def test_a_real_recording_agrees(conf: str, run_python: RunPython) -> None:
    run_python(RECORD, conf, env={"PYTORCH_ALLOC_CONF": conf})
