"""Calls of an offloaded model as CUDA graphs (`session.capture`)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from stand_in import (
    WIDTH,
    Block,
    Model,
    StandIn,
    offloaded,
    on,
    result,
)
from torch import Tensor
from vramkit import enable_vram_management
from vramkit.errors import VramkitError
from vramkit.estimator import weight_bytes
from vramkit.offload.device import SeparateDevice


def test_graphs_of_blocks(where: SeparateDevice, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = Model(), torch.randn(3, WIDTH)
    resident = on(model, where)
    session = offloaded(model, (x,), where, tmp_path)
    found = session.capture((x,))
    assert set(found.values()) == {"captured"}
    for seed in range(3):
        torch.manual_seed(seed)
        y = torch.randn(3, WIDTH)
        kept = result(model, (y,))
        assert torch.equal(kept, result(resident, (y,), where.torch))
    other = torch.randn(5, WIDTH)  # no graph is of this shape
    assert torch.equal(result(model, (other,)), result(resident, (other,), where.torch))
    model.blocks[1].scale = resident.blocks[1].scale = 2.0  # nor of this
    assert torch.equal(result(model, (y,)), result(resident, (y,), where.torch))
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(2)
        resident.blocks[0].up.weight.mul_(2)
    assert torch.equal(result(model, (y,)), result(resident, (y,), where.torch))
    assert session.graphs is None


def test_graphs_are_replayed_where_they_fit(fake: StandIn, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), fake, tmp_path)
    modules = len(session.capture((x,)))
    assert fake.graphs == modules
    fake.events.clear()
    first = result(model, (x,))
    assert fake.events.count("replayed") == modules
    with torch.no_grad():
        kept = model.blocks[0](x)
        saved = kept.clone()
        model.blocks[0](torch.randn(3, WIDTH))
    assert torch.equal(kept, saved)  # a result is the caller's
    fake.events.clear()
    result(model, (torch.randn(2, WIDTH),))
    out = model(x)  # with gradients
    assert fake.events.count("replayed") == 0
    assert torch.equal(out.detach(), first)
    model.train()
    assert fake.events.count("replayed") == 0
    session.resize(f"{session.limit_bytes + 4096} B")
    assert torch.equal(result(model, (x,)), first)


def test_calls_that_are_no_graphs_say_why(fake: StandIn, tmp_path: Path) -> None:
    class Cache:
        def __init__(self) -> None:
            self.seen = 0

    class Odd(Block):
        def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
            return super().forward(x)

    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x)

    class Mixed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1], self.blocks[2] = Odd(), Counting()

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            cache = Cache()
            for block in self.blocks:
                x = block(x, cache) if isinstance(block, Odd) else block(x)
            return x + self.bias

    model, x = Mixed(), torch.randn(3, WIDTH)
    plain = copy.deepcopy(model)
    session = offloaded(model, (x,), fake, tmp_path)
    found = session.capture((x,))
    assert "object of type Cache" in found["blocks.1"]
    assert "changes what it is given" in found["blocks.2"]
    assert found["blocks.0"] == "captured"
    assert torch.equal(result(model, (x,)), result(plain, (x,)))
    assert model.blocks[2].count.item() == 5


def test_a_plan_that_is_not_steady_is_refused(fake: StandIn, tmp_path: Path) -> None:
    class Fickle(Model):
        calls = 0

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            Fickle.calls += 1
            blocks = list(self.blocks)
            for block in blocks if Fickle.calls % 2 else reversed(blocks):
                x = block(x)
            return x + self.bias

    model, x = Fickle(), torch.randn(3, WIDTH)
    session = offloaded(model, (x,), fake, tmp_path, share=0)
    with pytest.raises(VramkitError, match="in different places, or in another order"):
        session.capture((x,))
    assert session.graphs is None
    assert fake.graphs == 0


def test_graphs_are_for_gpus(tmp_path: Path) -> None:
    model, x = Model(), torch.randn(3, WIDTH)
    enable_vram_management(model, weight_bytes(model) / 2**30, 0, inputs=(x,), folder=tmp_path)
    with pytest.raises(ValueError, match="offloaded to a GPU"):
        model.vramkit_session.capture((x,))
