"""The offload engine from Python: what arrives, what is refused, and waits that Ctrl-C ends."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vramkit import _core
from vramkit.errors import BudgetError, FileChangedError, VramkitError

PAGE = 4096
BLOCK = 4 * PAGE


def make(path: Path, count: int = 6, **options: object) -> tuple[_core.Engine, torch.Tensor]:
    """An engine over one file of `count` blocks, and what is in them."""
    data = torch.randint(0, 256, (count, BLOCK), dtype=torch.uint8)
    path.write_bytes(data.numpy().tobytes())
    blocks = [
        _core.BlockSpec(f"block{i}", BLOCK, [_core.Extent(0, i * BLOCK, 0, BLOCK)])
        for i in range(count)
    ]
    defaults = {"limit": 3 * BLOCK, "piece": PAGE, "granularity": PAGE, "poison": True}
    engine = _core.Engine([_core.FileSource(str(path))], blocks, **(defaults | options))  # type: ignore[arg-type]
    return engine, data


def content(engine: _core.Engine, address: int, nbytes: int = BLOCK) -> torch.Tensor:
    """What lies at an address that acquire() returned."""
    whole = torch.frombuffer(engine.view(), dtype=torch.uint8)
    return whole[address - engine.base :][:nbytes]


def test_blocks_are_there_when_called(tmp_path: Path) -> None:
    engine, data = make(tmp_path / "blocks", timeline=100)
    assert len(engine) == 6
    for _ in range(3):
        for block in range(6):
            address = engine.acquire(block)
            assert torch.equal(content(engine, address), data[block])
            engine.release(block)
    engine.check()
    stats = engine.stats()
    assert stats.committed <= stats.limit == 3 * BLOCK
    assert stats.acquires == 18 == stats.hits + stats.waits
    assert sum(stats.bytes_by_path.values()) == stats.bytes_copied
    assert stats.bytes_copied >= (6 + 5 + 5) * BLOCK  # one block stays
    assert engine.block_stats(0).acquires == 3
    kinds = {record[0] for record in engine.timeline()}
    assert kinds <= {"copy", "wait", "use"}
    assert "use" in kinds
    engine.close()
    assert engine.closed
    assert engine.stats().committed == 0


def test_straight_from_a_checkpoint(tmp_path: Path) -> None:
    tensors = {
        f"layer{i}.{name}": torch.randn(33, 65).to(dtype)
        for i in range(4)
        for name, dtype in (("weight", torch.bfloat16), ("scale", torch.float32))
    }
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path)
    checkpoint = _core.SafetensorsFile(path)
    blocks, places = [], []
    for i in range(4):
        names = [f"layer{i}.weight", f"layer{i}.scale"]
        infos = [checkpoint.info(name) for name in names]
        layout = _core.block_layout(
            [
                (0, info.begin, info.end - info.begin, tensors[n].element_size())
                for n, info in zip(names, infos, strict=True)
            ]
        )
        assert layout.direct
        assert all(e.block_offset % PAGE == e.source_offset % PAGE for e in layout.extents)
        blocks.append(_core.BlockSpec(f"layer{i}", layout.bytes, layout.extents))
        places.append(dict(zip(names, layout.places, strict=True)))
    engine = _core.Engine([_core.FileSource(path)], blocks, limit=1 << 16, granularity=PAGE)
    for block in (2, 0, 3, 1, 2):
        address = engine.acquire(block)
        for name, place in places[block].items():
            want = tensors[name]
            got = content(engine, address + place, want.nbytes).view(want.dtype).view(want.shape)
            assert torch.equal(got, want)
        engine.release(block)
    assert engine.stats().staging == 0


def test_memory_is_kept_alive_and_views_keep_the_engine(tmp_path: Path) -> None:
    store = _core.HostStore(2 * BLOCK, PAGE)
    tensor = torch.frombuffer(store, dtype=torch.uint8)
    tensor.random_(0, 256)
    plain = torch.randint(0, 256, (BLOCK,), dtype=torch.uint8)
    sources = [store.source(), _core.MemorySource(plain.data_ptr(), BLOCK, plain)]
    blocks = [
        _core.BlockSpec("stored", 2 * BLOCK, [_core.Extent(0, 0, 0, 2 * BLOCK)]),
        _core.BlockSpec("plain", BLOCK, [_core.Extent(1, 0, 0, BLOCK)]),
    ]
    engine = _core.Engine(sources, blocks, limit=4 * BLOCK, granularity=PAGE)
    want = tensor.clone(), plain.clone()
    tensor[0] += 1  # a change of the source is seen by the next load
    want[0][0] += 1
    del store, tensor, plain, sources
    gc.collect()
    view = content(engine, engine.acquire(0), 2 * BLOCK)
    other = content(engine, engine.acquire(1))
    del engine
    gc.collect()
    assert torch.equal(view, want[0])
    assert torch.equal(other, want[1])


def test_a_source_that_changed_is_loaded_again() -> None:
    store = _core.HostStore(BLOCK, PAGE)
    tensor = torch.frombuffer(store, dtype=torch.uint8)
    block = _core.BlockSpec("b", BLOCK, [_core.Extent(0, 0, 0, BLOCK)], _core.Residence.resident)
    engine = _core.Engine([store.source()], [block], limit=BLOCK, granularity=PAGE)
    tensor.fill_(1)
    assert content(engine, engine.acquire(0))[5] == 1
    with pytest.raises(ValueError, match="in use"):
        engine.invalidate(0)
    engine.release(0)
    tensor.fill_(2)
    engine.invalidate(0)
    assert content(engine, engine.acquire(0))[5] == 2
    engine.release(0)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="too small") as caught:
        make(tmp_path / "blocks", limit=BLOCK - 1)
    assert caught.value.needed_bytes == BLOCK
    with pytest.raises(FileNotFoundError):
        _core.FileSource(str(tmp_path / "nothing"))
    engine, _ = make(tmp_path / "blocks")
    with pytest.raises(ValueError, match="no block 6"):
        engine.acquire(6)
    with pytest.raises(ValueError, match="not in use"):
        engine.release(0)
    with pytest.raises(BudgetError):
        engine.resize(engine.minimum - 1)
    os.truncate(tmp_path / "blocks", BLOCK)
    with pytest.raises(FileChangedError, match="bytes when it was opened"):
        engine.acquire(5)
    engine.check()
    with pytest.raises(ValueError, match="16"):
        _core.PressureGauge(16, 8)


def test_limits_move(tmp_path: Path) -> None:
    engine, data = make(tmp_path / "blocks", limit=6 * BLOCK)
    for block in range(6):
        engine.acquire(block)
        engine.release(block)
    assert engine.stats().residents == 6
    assert engine.give_up(2 * BLOCK) >= 2 * BLOCK
    assert engine.stats().committed <= 4 * BLOCK
    for block in range(6):
        assert torch.equal(content(engine, engine.acquire(block)), data[block])
        engine.release(block)
    engine.resize(100 * BLOCK)
    assert engine.stats().residents == 6


def test_waiting_lets_others_run(tmp_path: Path) -> None:
    engine, data = make(tmp_path / "blocks", limit=BLOCK)
    engine.acquire(0)

    def release_later() -> None:
        time.sleep(0.1)  # needs the GIL, which the waiting thread must not hold
        engine.release(0)

    thread = threading.Thread(target=release_later)
    results: list[int] = []

    def call() -> None:
        results.append(engine.acquire(1))

    waiting = threading.Thread(target=call)
    thread.start()
    waiting.start()
    thread.join()
    waiting.join(30)
    assert torch.equal(content(engine, results[0]), data[1])
    engine.release(1)


def test_ctrl_c_ends_a_wait_and_leaves_the_engine_usable(tmp_path: Path) -> None:
    engine, data = make(tmp_path / "blocks", limit=BLOCK)
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        engine.acquire(0)
        held.set()
        let_go.wait(30)
        engine.release(0)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.acquire(1)
    timer.join()
    let_go.set()
    thread.join()
    engine.check()
    for block in range(6):
        assert torch.equal(content(engine, engine.acquire(block)), data[block])
        engine.release(block)


def test_a_forked_process_is_told(tmp_path: Path) -> None:
    engine, _ = make(tmp_path / "blocks")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            engine.acquire(0)
        except VramkitError as error:
            code = 0 if "forked" in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_block_files(tmp_path: Path) -> None:
    data = torch.randint(0, 256, (50_000,), dtype=torch.uint8)
    (tmp_path / "data").write_bytes(data.numpy().tobytes())
    files = [_core.FileSource(str(tmp_path / "data"))]
    layout = _core.block_layout([(0, 11, 4_000, 1), (0, 40_003, 5_000, 1)], packed=True)
    block = _core.BlockSpec("a", layout.bytes, layout.extents)
    cache = _core.BlockCache(str(tmp_path / "cache"), 1 << 20)
    built = cache.open(files, [block])
    assert built.built
    assert not cache.open(files, [block]).built
    stored = _core.BlockSpec(
        "a", layout.bytes, [_core.Extent(0, built.offsets[0], 0, layout.bytes)]
    )
    engine = _core.Engine([_core.FileSource(built.path)], [stored], limit=1 << 16, granularity=PAGE)
    address = engine.acquire(0)
    assert torch.equal(content(engine, address + layout.places[0], 4_000), data[11:4_011])
    assert torch.equal(content(engine, address + layout.places[1], 5_000), data[40_003:45_003])
    assert cache.trim(0) == cache.bytes > 0  # in use
    del built
    gc.collect()
    assert cache.trim(0) == 0
