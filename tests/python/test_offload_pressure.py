"""Memory that runs short while a model is offloaded: residents go and come, blocks run again."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit.doctor import available_memory
from vramkit.estimator import weight_bytes
from vramkit.offload.pressure import Pressure, PressureEvent, bytes_asked_for, is_out_of_memory

WIDTH = 64
IMPOSSIBLE = 1 << 50


class Block(nn.Module):
    """Asks for memory that is not there while `wants` says so; may change what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.wants: Callable[[], bool] = lambda: False
        self.runs = 0

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        self.runs += 1
        x = self.prepare(x)
        if self.wants():
            torch.empty(IMPOSSIBLE, dtype=torch.uint8)
        # The weights are read here, so that the whole module is a unit.
        return torch.relu(x @ self.linear.weight + self.linear.bias)


class InPlace(Block):
    def prepare(self, x: Tensor) -> Tensor:
        return x.add_(1)


class Random(Block):
    def prepare(self, x: Tensor) -> Tensor:
        return x + torch.rand(1)


class Chain(nn.Module):
    def __init__(self, kind: type[Block] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x, cache) if cache is not None else block(x)
        return x


def offloaded(folder: Path, kind: type[Block] = Block, **options: Any) -> tuple[Chain, Tensor]:
    """With room for three of its six blocks and two slots."""
    model, x = Chain(kind), torch.ones(2, WIDTH)
    limit = 5 * 20_480
    vramkit.enable_vram_management(model, f"{limit} B", 0, inputs=(x,), folder=folder, **options)
    assert model.vramkit_session.stats().residents == 3
    return model, x


def test_others_take_memory_and_give_it_back(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path)
    session = model.vramkit_session
    free = 1000
    events: list[PressureEvent] = []
    session.pressure = Pressure(
        session, events.append, low=30_000, high=60_000, seconds=0, free=lambda: free
    )
    with torch.inference_mode():
        expected = Chain()(x)
        before = session.stats()
        assert torch.equal(model(x), expected)
        after = session.stats()
        assert after.residents < before.residents
        assert after.committed <= after.limit < before.limit
        assert {e.kind for e in events} == {"given_up"}
        assert events[0].free_bytes == 1000
        free = 45_000  # within the band nothing moves
        model(x)
        limit = session.stats().limit
        model(x)
        assert session.stats().limit == limit
        free = 10**9
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert events[-1].kind == "regrown"
        assert session.stats().limit == session.room == before.limit
        model(x)
        assert session.stats().residents == before.residents
    assert session.pressure_events == events
    assert "given up" in str(events[0])
    assert "were free" in str(events[0])


def test_the_callback_of_enable(tmp_path: Path) -> None:
    events: list[PressureEvent] = []
    model, x = offloaded(tmp_path, pressure=events.append)
    assert model.vramkit_session.pressure is not None
    model.vramkit_session.disable()
    model, x = offloaded(tmp_path, pressure=False)
    assert model.vramkit_session.pressure is None
    model.blocks[0].wants = lambda: True
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        model(x)
    assert "residents" not in str(caught.value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_block_that_finds_no_memory_runs_again(tmp_path: Path, mode: Any) -> None:
    model, x = offloaded(tmp_path)
    session = model.vramkit_session
    with mode():
        expected = Chain()(x)
    block = model.blocks[3]
    most = session.stats().residents
    block.wants = lambda: session.stats().residents == most
    with mode():
        assert torch.equal(model(x), expected)
    assert block.runs == 2
    assert session.stats().residents < most
    assert [e.kind for e in session.pressure_events] == ["retried"]
    with mode():
        assert torch.equal(model(x), expected)
    assert block.runs == 3


def test_what_is_never_there_is_said_with_its_bytes(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path)
    block = model.blocks[3]
    block.wants = lambda: True
    with torch.inference_mode():
        expected = Chain()(x)
        for _ in range(2):  # the second time there are no residents from the start
            with pytest.raises(RuntimeError, match=f"{IMPOSSIBLE} B") as caught:
                model(x)
            assert "no resident block was left" in str(caught.value)
        assert block.runs == 3
        block.wants = lambda: False
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(InPlace, "changed what it was given"), (Random, "drawn random numbers")],
)
def test_a_block_that_cannot_be_repeated_is_not(
    tmp_path: Path, kind: type[Block], why: str
) -> None:
    model, x = offloaded(tmp_path, kind)
    block = model.blocks[3]
    for mode in (torch.inference_mode, torch.no_grad):
        block.wants = lambda: False
        model.vramkit_session.resize(f"{5 * 20_480} B")
        with mode(), torch.random.fork_rng():
            model(x.clone())
            block.runs, block.wants = 0, lambda: block.runs < 2
            with pytest.raises(RuntimeError, match=why):
                model(x.clone())
        assert block.runs == 1


def test_a_cache_that_a_block_may_have_changed(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path)
    block = model.blocks[3]
    block.wants = lambda: block.runs < 2
    with torch.inference_mode(), pytest.raises(RuntimeError, match="changed what it was given"):
        model(x, cache=object())


def test_other_errors_pass(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path)

    def broken() -> bool:
        raise RuntimeError("something else")

    model.blocks[3].wants = broken
    with pytest.raises(RuntimeError, match=r"^something else$"):
        model(x)
    assert model.blocks[3].runs == 1


def test_what_errors_say() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(IMPOSSIBLE, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert bytes_asked_for(caught.value) == IMPOSSIBLE
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
    assert is_out_of_memory(cuda)
    assert bytes_asked_for(cuda) == 5 << 29
    assert is_out_of_memory(MemoryError())
    assert bytes_asked_for(MemoryError()) is None
    assert not is_out_of_memory(ValueError("tried to allocate 3 bytes"))


def test_a_real_shortage(tmp_path: Path) -> None:
    """In a process that may not have more: a call's own memory, where residents lay."""
    code = f"""
    import resource, torch, vramkit
    from torch import nn
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(16)))
    x = torch.ones(8192, 1024)
    with torch.inference_mode():
        want = model(x)
        vramkit.enable_vram_management(model, "60 MB", 0, inputs=(x,), folder={str(tmp_path)!r})
        session = model.vramkit_session
        model(x[:8])
        before = session.stats().residents
        for line in open("/proc/self/status"):
            if line.startswith("VmData:"):
                used = int(line.split()[1]) * 1024
        # Room for two activations more than there are now; within a block there are three.
        most = used + (80 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        session.pressure._next = float("inf")  # only what fails counts here
        got = model(x)
        assert torch.equal(got, want)
        after = session.stats().residents
        print(before, after, [e.kind for e in session.pressure_events])
        assert after < before
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "retried" in done.stdout


def test_available_memory_knows_this_process_s_own_limit() -> None:
    code = """
    import resource
    from vramkit.doctor import available_memory
    before = available_memory()
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
    now = available_memory()
    assert now < 4 << 30 and now <= before, (before, now)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert (available_memory() or 0) > 0


def test_weights_are_what_they_were(tmp_path: Path) -> None:
    model, _ = offloaded(tmp_path)
    assert weight_bytes(model) == weight_bytes(Chain())
