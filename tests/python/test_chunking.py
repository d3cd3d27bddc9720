"""Chunks of an axis: the estimator's size, the same results, a measured peak under the limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_systems import P3Sam
from torch import Tensor, nn
from vramkit import measure
from vramkit.chunking import chunk_axis, dominant_axis
from vramkit.errors import BudgetError

POINTS, PROMPTS = 400, 64
SHAPES = {"points": (POINTS, 3), "prompts": (PROMPTS, 3)}


def inputs() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=made) for name, shape in SHAPES.items()}


def weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def test_the_axis_that_dominates() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Linear(8, 256)

        def forward(self, small: Tensor, large: Tensor) -> Tensor:
            return self.lift(large).relu().sum() + small.sum()

    shapes = {"small": (4, 8), "large": (64, 8)}
    assert dominant_axis(Wide(), shapes, {"small": 0, "large": 0}) == "large"
    assert dominant_axis(Wide(), ((4, 8), (64, 8)), {0: 0, 1: 0}) == 1


@torch.no_grad()
def test_prompts_of_p3sam() -> None:
    """Same masks; the measured peak is under the limit, and one prompt more would not be."""
    model = P3Sam()
    given = inputs()
    expected = model(**given)
    whole = measure.call(model, given).peak_bytes
    limit = weights(model) + (whole - weights(model)) // 4
    choice = chunk_axis(model, SHAPES, f"{limit} B", {"prompts": 0})
    assert choice.whole == PROMPTS
    assert 1 < choice.size < PROMPTS // 2
    assert choice.out_axes == [1]
    assert choice.peak_bytes <= limit < choice.whole_peak_bytes
    found = model(**given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    took = measure.call(model, given).peak_bytes
    assert took <= limit
    assert choice.peak_bytes == pytest.approx(took, rel=0.1)
    fewer = {**given, "prompts": given["prompts"][:3]}
    assert model(**fewer).shape == (POINTS, 3)
    assert str(choice.size) in str(choice)
    with pytest.raises(TypeError, match="prompts"):
        model(given["points"], given["prompts"])
    choice.undo()
    choice.undo()
    assert "forward" not in vars(model)


def test_all_at_once_where_it_fits_and_gradients() -> None:
    model = P3Sam()
    assert chunk_axis(model, SHAPES, 1, {"prompts": 0}).size == PROMPTS
    other = P3Sam()
    other.load_state_dict(model.state_dict())
    other.forward = None  # type: ignore[assignment, method-assign]
    del other.forward
    choice = chunk_axis(other, SHAPES, f"{weights(other) + 9_000_000} B", {"prompts": 0})
    assert choice.size < PROMPTS
    for each in (model, other):
        each(**inputs()).square().mean().backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)


class Mixes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(0)


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


class Grid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.t()


@pytest.mark.parametrize(
    ("model", "axis", "words"),
    [
        (Mixes(), {0: 0}, "depend on each other"),
        (Sums(), {0: 0}, "no tensor of the result"),
        (Grid(), {0: 0}, "not put together"),
        (Mixes(), {"y": 0}, "no dimension 0 of an argument 'y'"),
        (Mixes(), {0: 5}, "no dimension 5"),
    ],
)
def test_refused(model: nn.Module, axis: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chunk_axis(model, (torch.randn(8, 4),), 1, axis)
    assert "forward" not in vars(model)


def test_one_element_does_not_fit() -> None:
    model = P3Sam()
    with pytest.raises(BudgetError, match="one element") as caught:
        chunk_axis(model, SHAPES, f"{weights(model)} B", {"prompts": 0})
    assert caught.value.needed_bytes > weights(model)
    assert "forward" not in vars(model)
