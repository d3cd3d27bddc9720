"""Blocks of a model: found by a trace, and enough for a call of every architecture of the zoo."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
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


@pytest.mark.parametrize("name", ZOO)
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
