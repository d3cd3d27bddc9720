"""Each of the five systems within a quarter of its weights: the same bits, the limit held.

Small models with random weights (`benchmarks.small_systems`), offloaded whole, in the mode in which
their guides want to save memory.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn

from benchmarks import small_heartmula
from benchmarks.small_systems import SYSTEMS, bytes_of


def watched(call: Any, session: Any) -> tuple[Any, int]:
    """What a call gives, and the most bytes of weights in memory when any module was called."""
    most = 0

    def look(module: nn.Module, args: Any) -> None:
        nonlocal most
        most = max(most, session.device_bytes)

    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        return call(), most


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_a_quarter_of_the_weights_at_a_time(name: str, tmp_path: Path) -> None:
    if name == "Qwen-Image":
        pytest.importorskip("diffusers")
    system = SYSTEMS[name]
    made = system.build(system.streamed, system.sizes["test"])
    nbytes, expected = bytes_of(made), system.call(made)
    limit = nbytes // 4
    session = system.stream(made, limit, str(tmp_path)).vramkit_session
    assert torch.equal(system.call(made), expected)  # divides each component, in its turn
    again, most = watched(lambda: system.call(made), session)
    assert torch.equal(again, expected)
    copied = sum(s.engine.stats().bytes_copied for s in session.sessions.values())
    print(f"{name}: {nbytes} B, limit {limit}, at most {most}, copied {copied} in two calls")
    assert session.fixed_bytes < most <= limit
    assert copied > nbytes // 2
    if name == "Qwen-Image":
        assert {"transformer", "vae.decoder"} <= set(session.sessions)
    for one in session.sessions.values():
        one.engine.check()
    session.disable()
    assert list(tmp_path.iterdir()) == []


class Stateful(nn.Module):
    """Called as caching decoders are: a list of ints that it moves on, an object that it fills."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def forward(self, x: Tensor, place: list[int], kept: list[Any], cache: Cache) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            kept[place[0]] = x
            cache.keys[cache.filled] = x.sum()
            place[0] += 1
            cache.filled += 1
        return x


class Cache:
    def __init__(self) -> None:
        self.keys, self.filled = torch.zeros(8), 0


@pytest.mark.parametrize("whole", [True, False], ids=["module", "pipeline"])
@pytest.mark.parametrize("named", [True, False])
def test_what_a_call_brings_is_changed_by_the_call_alone(
    whole: bool, named: bool, tmp_path: Path
) -> None:
    """A list of ints is no shape, and following a call neither fills its lists nor its caches."""
    model = Stateful()

    def call() -> tuple[Tensor, list[int], list[Any], Cache]:
        place, kept, cache = [0], [None] * 8, Cache()
        x = torch.full((2, 32), 0.5)
        with torch.no_grad():
            if named:
                return model(x, place=place, kept=kept, cache=cache), place, kept, cache
            return model(x, place, kept, cache), place, kept, cache

    expected = call()
    limit = f"{bytes_of(model) // 2} B"
    vramkit.enable_vram_management(
        model if whole else SimpleNamespace(model=model), limit, 0, folder=tmp_path
    )
    for _ in range(2):
        y, place, kept, cache = call()
        assert torch.equal(y, expected[0])
        assert place == [8]
        assert all(torch.equal(a, b) for a, b in zip(kept, expected[2], strict=True))
        assert cache.filled == 8
        assert torch.equal(cache.keys, expected[3].keys)


def test_an_input_that_cannot_be_copied_is_said(tmp_path: Path) -> None:
    model, cache = Stateful(), Cache()
    cache.keys, cache.lock = torch.zeros(24), threading.Lock()  # type: ignore[attr-defined]
    vramkit.enable_vram_management(model, f"{bytes_of(model) // 2} B", 0, folder=tmp_path)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="Cache cannot be copied"):
        model(torch.ones(2, 32), [0], [None] * 24, cache)


def test_a_pipeline_that_loads_by_turns_is_not_offloaded(tmp_path: Path) -> None:
    folder = small_heartmula.write(tmp_path, 128, 1)
    pipe = small_heartmula.load(folder, lazy_load=True)
    with pytest.raises(ValueError, match="lazy_load"):
        SYSTEMS["HeartMuLa"].stream(pipe, 10**6, str(tmp_path))
    small_heartmula.music(pipe)  # as it was
