"""Memory of an offloaded model's GPU: torch's share, what fails to be had, what others take."""

from __future__ import annotations

import copy
import gc
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import (
    BLOCKS,
    MIB,
    WIDTH,
    Model,
    StandIn,
    offloaded,
    result,
)
from torch import Tensor
from vramkit import enable_vram_management
from vramkit.errors import BudgetError, FileChangedError
from vramkit.estimator import weight_bytes
from vramkit.offload.pressure import Pressure


def test_torchs_share_is_capped_and_given_back(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    # Of what torch has, the model's bias and buffer are a part: the stand-in's memory is theirs.
    fake.tensors, fake.part = 5000 + 2 * 4 * WIDTH, 0.5
    session = offloaded(model, (x,), fake, tmp_path)
    limit = session.limit_bytes
    assert session.buffer_bytes > 0  # a call's own memory is part of it
    assert fake.bytes == 5000 + limit - session.engine.stats().limit
    fake.tensors = 9000  # what is in the share is not counted twice
    session.resize(f"{limit + 4096 * 4} B")
    assert fake.bytes == 5000 + limit + 4096 * 4 - session.engine.stats().limit
    other = Model()
    second = offloaded(other, (x,), fake, tmp_path)
    both = sum(s.limit_bytes - s.engine.stats().limit for s in (session, second))
    assert fake.bytes == 5000 + both
    second.disable()
    fake.cached = fake.bytes + 1
    session.resize(f"{limit} B")
    assert fake.cached == 0
    session.disable()
    assert fake.part == 0.5
    with pytest.raises(BudgetError):
        enable_vram_management(model, "1 B", 0, inputs=(x,), folder=tmp_path, device=fake)
    assert fake.part == 0.5
    session = offloaded(model, (x,), fake, tmp_path)
    assert fake.part < 0.5
    del model, session
    gc.collect()
    assert fake.part == 0.5


def test_a_failed_start_leaves_all_as_it_was(
    fake: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    before = [(id(t), t.data_ptr()) for t in model.parameters()]
    limit = weight_bytes(model) + MIB

    def fails(mapping: mmap.mmap) -> object:
        raise MemoryError("no memory could be pinned")

    monkeypatch.setattr(fake, "pin", fails)
    with pytest.raises(MemoryError, match="pinned"):
        enable_vram_management(model, f"{limit} B", 0, inputs=(x,), folder=tmp_path, device=fake)
    assert before == [(id(t), t.data_ptr()) for t in model.parameters()]
    monkeypatch.undo()

    def breaks(fraction: float) -> None:
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(fake, "set_fraction", breaks)
    with pytest.raises(RuntimeError, match="fell off"):
        enable_vram_management(model, f"{limit} B", 0, inputs=(x,), folder=tmp_path, device=fake)
    monkeypatch.undo()
    assert torch.equal(result(model, (x,)), expected)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_what_the_host_has_no_room_for_stays_in_a_file(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    fake.room = weight_bytes(model) // 2
    session = offloaded(model, (x,), fake, tmp_path, share=0)
    assert set(session.store.origins()) == {"memory", "own"}
    assert fake.pinned <= 2 * (fake.room + 4096 * BLOCKS)  # twice: the first limit did not do
    for _ in range(2):
        assert torch.equal(result(model, (x,)), expected)
    paths = session.engine.stats().bytes_by_path
    assert paths["memory"] > 0
    assert paths["memory"] < sum(paths.values())
    with torch.no_grad():
        model.blocks[5].up.weight.zero_()
        model.blocks[0].up.weight.zero_()
    assert torch.equal(result(model, (x,)), result(copy.deepcopy(model), (x,)))
    assert set(session.store.origins()) == {"memory", "own"}


class Hungry(Model):
    """Takes more than torch's share, as often as it is told."""

    hungry = 0

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_pre_hook(lambda m, args: None)
        inner = self.blocks[3].down.forward

        def forward(x: Tensor) -> Tensor:
            if Hungry.hungry > 0:
                Hungry.hungry -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 KiB.")
            return inner(x)

        self.blocks[3].down.forward = forward


def test_an_allocation_that_fails_takes_residents(fake: StandIn, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Hungry(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    session = offloaded(model, (x,), fake, tmp_path, share=0.6)
    result(model, (x,))
    before, cap = session.stats(), fake.bytes
    assert before.residents > 0
    Hungry.hungry = 1
    fake.events.clear()
    assert torch.equal(result(model, (x,)), expected)
    given = before.limit - session.stats().limit
    assert given > 0
    assert fake.bytes == cap + given  # what was given up is what the allocation may take
    assert "empty" in fake.events
    assert [e.kind for e in session.pressure_events] == ["retried"]
    Hungry.hungry = 1000
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"allocation of .*\(32768 B\) failed"):
            result(model, (x,))
    finally:
        Hungry.hungry = 0
    assert torch.equal(result(model, (x,)), expected)
    session.disable()
    assert fake.part == 1.0


def test_others_take_the_devices_memory(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    session = offloaded(model, (x,), fake, tmp_path, share=0.6)
    result(model, (x,))
    before, cap = session.stats(), fake.bytes
    session.pressure = Pressure(session, low=30_000, high=60_000, seconds=0)
    fake.free = 1000
    assert torch.equal(result(model, (x,)), expected)
    assert session.stats().limit < before.limit
    assert fake.bytes == cap  # it is for others, not for torch
    fake.free = 1 << 30
    for _ in range(4):
        assert torch.equal(result(model, (x,)), expected)
    assert [e.kind for e in session.pressure_events] == ["given_up", "regrown"]
    assert session.stats().limit == before.limit


def test_an_engine_without_memory_empties_torchs_cache_once(
    fake: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    expected = result(model, (x,))
    session = offloaded(model, (x,), fake, tmp_path)
    real, failures = session.engine.acquire, 1

    class Engine:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def __len__(self) -> int:
            return len(engine)

        def acquire(self, block: int, stream: int) -> int:
            nonlocal failures
            if failures:
                failures -= 1
                raise MemoryError("stand-in: no memory: taking a segment of 4096 bytes failed")
            return real(block, stream)

    engine = session.engine
    monkeypatch.setattr(session, "engine", Engine())
    fake.events.clear()
    assert torch.equal(result(model, (x,)), expected)
    assert fake.events.count("empty") == 1
    failures = 2
    with pytest.raises(torch.OutOfMemoryError, match="segment of 4096 bytes"):
        result(model, (x,))
    assert torch.equal(result(model, (x,)), expected)


def test_memory_that_somebody_writes_to_is_an_error(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), fake, tmp_path)
    memory = session.store._homes[0].memory
    assert memory is not None
    os.pwrite(memory.descriptor, b"x", 0)
    with pytest.raises(FileChangedError):
        session.disable()
