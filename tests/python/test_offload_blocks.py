"""Blocks of a model: found by a trace, and enough for a call of every architecture of the zoo."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vramkit.offload.blocks import Block, Division, divide, touches_of
from zoo import ZOO, call


@contextmanager
def only_while_called(model: nn.Module, division: Division) -> Iterator[list[int]]:
    """Every block is NaN unless a module of its entries is being called; yields the calls."""
    parameters = dict(model.named_parameters())
    real = {n: parameters[n].detach().clone() for b in division.blocks for n in b.parameters}
    depth = [0] * len(division.blocks)
    calls: list[int] = []

    def set_to(block: Block, there: bool) -> None:
        for name in block.parameters:
            with torch.no_grad():
                parameters[name].data.copy_(
                    real[name] if there else torch.full_like(real[name], float("nan"))
                )

    def wrap(module: nn.Module, index: int) -> None:
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if depth[index] == 0:
                set_to(division.blocks[index], True)
                if calls[-1:] != [index]:
                    calls.append(index)
            depth[index] += 1
            try:
                return forward(*args, **kwargs)
            finally:
                depth[index] -= 1
                if depth[index] == 0:
                    set_to(division.blocks[index], False)

        module.__dict__["forward"] = run

    for index, block in enumerate(division.blocks):
        set_to(block, False)
        for entry in block.entries:
            wrap(model.get_submodule(entry), index)
    try:
        yield calls
    finally:
        for block in division.blocks:
            set_to(block, True)
            for entry in block.entries:
                del model.get_submodule(entry).__dict__["forward"]


def check_whole(model: nn.Module, division: Division) -> None:
    """Every parameter is in one block or stays; entries are not within each other."""
    names = [n for block in division.blocks for n in block.parameters]
    names += [name for name, _ in division.stays]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    entries = [e for block in division.blocks for e in block.entries]
    for block in division.blocks:
        assert block.nbytes == sum(sizes[n] for n in block.parameters)
    for a in entries:
        assert not any(b != a and b.startswith(a + ".") for b in entries)


# test_offload.py has others, with their bytes really gone.
SPECIES = [
    "gemma2", "mixtral", "gpt2", "wav2vec2, weight norm", "encodec, weight norm and lstm", "swin",
    "efficientnet", "unet 2d condition", "qwen-image transformer", "qwen-image vae",
    "attention with keys and values of other widths", "raw parameters",
]  # fmt: skip


@pytest.mark.parametrize("name", SPECIES)
def test_blocks_are_enough(name: str) -> None:
    if importlib.util.find_spec(ZOO[name].package) is None:
        pytest.skip(f"{ZOO[name].package} is not installed")
    torch.manual_seed(0)
    model, inputs = ZOO[name].build()
    model.eval()
    division = divide(model, touches_of(model, inputs))
    check_whole(model, division)
    torch.manual_seed(1)
    expected = call(model, inputs)
    with only_while_called(model, division) as calls:
        torch.manual_seed(1)
        found = call(model, inputs)
    assert torch.equal(found, expected)
    assert calls == division.order


def test_a_block_that_is_missing_shows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(3, 64)
    division = divide(model, touches_of(model, (x,)))
    assert [block.entries for block in division.blocks] == [["0"], ["1"]]
    division.blocks[1].entries = []
    with only_while_called(model, division):
        assert bool(call(model, (x,)).isnan().all())


class Shared(nn.Module):
    """Two layers with one weight, and a table of which the forward uses a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.table = nn.Parameter(torch.randn(9, 64))
        self.unused = nn.Linear(64, 64)
        self.counting = Counting()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.counting(self.second(torch.tanh(self.first(x))) + self.table[0])
        return out


class Counting(nn.Module):
    """Changes its parameter in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


def test_what_stays_and_what_is_shared() -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(3, 64)
    division = divide(model, touches_of(model, (x,)))
    check_whole(model, division)
    why = dict(division.stays)
    assert "model itself" in why["table"]
    assert "not used" in why["unused.weight"]
    assert "changes it" in why["counting.calls"]
    shared = next(b for b in division.blocks if "first.weight" in b.parameters)
    assert sorted(shared.entries) == ["first", "second"]
    assert set(shared.parameters) == {"first.weight", "first.bias", "second.bias"}
    entries = [entry for block in division.blocks for entry in block.entries]
    assert len(set(entries)) == len(entries)
    expected = call(model, (x,))
    model.counting.calls.zero_()
    with only_while_called(model, division):
        assert torch.equal(call(model, (x,)), expected)


@pytest.mark.parametrize("cap", [1, 70_000, 10**9])
def test_the_cap(cap: int) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(6)])
    division = divide(model, touches_of(model, (torch.randn(2, 128),)), cap)
    largest = 4 * (128 * 128 + 128)
    assert all(block.nbytes <= max(cap, largest) for block in division.blocks)
    assert len(division.blocks) == {1: 6, 70_000: 6, 10**9: 1}[cap]
