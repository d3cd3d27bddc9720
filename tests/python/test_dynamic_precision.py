"""Formats that follow the free memory: down under pressure, up with a margin, always exact."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import vramkit
from torch import nn
from vramkit.candidates import candidates
from vramkit.dynamic_precision import DynamicPrecision, PrecisionChange
from vramkit.errors import BudgetError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 128)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)) for _ in range(4)
        )
        self.head = nn.Linear(128, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


IDS = torch.arange(6)[None]


class Memory:
    """A card of which all but `total` is taken; weights count against it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.follower: DynamicPrecision | None = None

    def free(self) -> int:
        held = self.follower.bytes if self.follower is not None else 0
        return self.total - held


def weights_in(model: nn.Module, formats: dict[str, str]) -> nn.Module:
    """Direct conversion of the plain model: block by block, as named."""
    named = {
        candidate.name: formats[block]
        for candidate in candidates(model)[0]
        for block in formats
        if candidate.name == block or candidate.name.startswith(block + ".")
    }
    vramkit.convert(model, named)
    return model


@pytest.fixture
def plain() -> Net:
    torch.manual_seed(0)
    return Net()


def following(model: Net, memory: Memory, **options: object) -> DynamicPrecision:
    made = DynamicPrecision(model, free=memory.free, reserve="0 B", **options)  # type: ignore[arg-type]
    memory.follower = made
    return made


def test_down_and_up_with_hysteresis(plain: Net) -> None:
    original = copy.deepcopy(plain)
    memory = Memory(10**9)
    changes: list[PrecisionChange] = []
    with following(plain, memory, on_change=changes.append) as follower:
        best = follower.bytes
        assert set(follower.formats().values()) == {"bf16"}
        assert set(follower.formats()) == {"embedding", *(f"layers.{i}" for i in range(4))}
        plain(IDS)
        assert changes == []
        memory.total = int(best * 0.7)
        plain(IDS)
        down = follower.formats()
        assert changes
        assert follower.bytes <= memory.total
        assert {c.before for c in changes} == {"bf16"}
        reference = weights_in(copy.deepcopy(original), down)
        torch.testing.assert_close(plain(IDS), reference(IDS), rtol=0, atol=0)
        # Room for the next step up, but not for the margin besides: nothing moves.
        count = len(changes)
        steps = [c.bytes_before - c.bytes_after for c in changes]
        memory.total = follower.bytes + min(steps)
        plain(IDS)
        assert len(changes) == count
        memory.total = int(1.11 * best)
        plain(IDS)
        assert set(follower.formats().values()) == {"bf16"}
        assert follower.bytes == best
        reference = weights_in(copy.deepcopy(original), follower.formats())
        torch.testing.assert_close(plain(IDS), reference(IDS), rtol=0, atol=0)
    count = len(changes)
    memory.total = 1000
    plain(IDS)  # no longer followed
    assert len(changes) == count


def test_memory_that_comes_and_goes_recodes_nothing(plain: Net) -> None:
    memory = Memory(10**9)
    changes: list[PrecisionChange] = []
    with following(plain, memory, on_change=changes.append) as follower:
        memory.total = int(follower.bytes * 0.8)
        plain(IDS)
        count, held = len(changes), follower.bytes
        for wobble in (1.0, 1.05, 1.0, 1.08, 1.02):
            memory.total = int(held * wobble)
            plain(IDS)
        assert len(changes) == count
    with following(Net(), Memory(10**9), margin=0.0):
        pass


def test_least_loss_first(plain: Net) -> None:
    """A block whose weights the next format holds exactly gives its bytes before others."""
    with torch.no_grad():
        for layer in (plain.layers[2][0], plain.layers[2][2]):
            layer.weight.copy_(layer.weight.sign() * 127)  # int8 holds it exactly
    memory = Memory(10**9)
    with following(plain, memory) as follower:
        memory.total = follower.bytes - 1
        follower.adjust()
        assert [b for b, f in follower.formats().items() if f != "bf16"] == ["layers.2"]


def test_nothing_fits(plain: Net, tmp_path: Path) -> None:
    memory = Memory(10**9)
    with following(plain, memory, folder=tmp_path) as follower:
        memory.total = 1000
        with pytest.raises(BudgetError, match="smallest formats"):
            follower.adjust()
        assert set(follower.formats().values()) == {"nf4"}
        with pytest.warns(RuntimeWarning, match="smallest formats"):
            plain(IDS)
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_not_during_a_call(plain: Net) -> None:
    memory = Memory(10**9)
    with following(plain, memory) as follower:
        seen: list[str] = []

        def hook(*_: object) -> None:
            with pytest.raises(RuntimeError, match="running"):
                follower.adjust()
            seen.append("called")

        plain.layers[0].register_forward_hook(hook)
        plain(IDS)
        assert seen == ["called"]
        with pytest.raises(IndexError):
            plain(torch.tensor([[99]]))
        follower.adjust()  # a call that failed is not running


def test_ties_hold(plain: Net) -> None:
    memory = Memory(10**9)
    with following(plain, memory) as follower:
        memory.total = follower.bytes // 3
        plain(IDS)
        assert plain.head.codes is plain.embedding.codes


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        (("int8",), "two formats"),
        (("int8", "bf16"), "largest to smallest"),
        (("bf16", "int8_dynamic"), "activations"),
    ],
)
def test_bad_formats(plain: Net, formats: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DynamicPrecision(plain, formats)
    assert type(plain.head) is nn.Linear
