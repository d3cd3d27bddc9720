"""Activation checkpointing: blocks that compute their activations twice instead of keeping them.

Which blocks of a chain should, for a budget in bytes, is solved exactly: `choose_checkpoints`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import BudgetError

_MOST_STATES = 4096


class CheckpointedBlock(nn.Module):
    """A module whose activations are computed again in the backward pass.

    Non-reentrant, with the forward pass' random numbers, and batch statistics are counted once:
    running means and variances are what they would be without checkpointing. Keys of the state_dict
    are the module's own, behind ``module.``.

    >>> block = CheckpointedBlock(torch.nn.Linear(2, 2))
    >>> block(torch.ones(1, 2)).sum().backward()
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output."""
        if not (torch.is_grad_enabled() and self.training):
            return self.module(*args, **kwargs)
        return checkpoint(
            self.module,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(self.module)),
            **kwargs,
        )


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a second pass adds to running statistics, in place."""
    counted = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [(b, b.detach().clone()) for m in counted for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


class BlockCost(NamedTuple):
    """What a block of a chain costs a training step."""

    saved_bytes: int
    """Activations that its backward pass needs, where they are kept."""
    input_bytes: int
    """What is kept where they are not."""
    forward_cost: float
    """Of computing them again: seconds, or operations."""


class CheckpointChoice(NamedTuple):
    """Which blocks of a chain to checkpoint."""

    checkpointed: list[bool]
    """One per block."""
    peak_bytes: int
    """The most that is held at once, of saved activations."""
    extra_cost: float
    """Of the second passes, in `forward_cost`'s unit."""


def peak_bytes(blocks: Sequence[BlockCost], checkpointed: Sequence[bool]) -> int:
    """The most saved bytes at once: while a block goes backward, its own and all before it."""
    kept = peak = 0
    for block, again in zip(blocks, checkpointed, strict=True):
        # Computed again, a block's activations come beside its kept input.
        own = block.saved_bytes + (block.input_bytes if again else 0)
        peak = max(peak, kept + own)
        kept += block.input_bytes if again else block.saved_bytes
    return peak


def choose_checkpoints(blocks: Sequence[BlockCost], budget_bytes: int) -> CheckpointChoice:
    """The cheapest set of blocks to checkpoint so that a chain's activations fit a budget.

    Exact: a dynamic program over the chain keeps, of all choices so far, those that no other beats
    in both bytes and cost (past 4096 of them, the cheapest of each 1/4096 of the budget, which can
    only cost more than the optimum, never exceed the budget).

    Raises BudgetError, with the bytes that would do, where no choice fits.

    >>> blocks = [BlockCost(100, 10, 1.0), BlockCost(100, 10, 5.0)]
    >>> choose_checkpoints(blocks, 120).checkpointed
    [True, False]
    """
    # Kept bytes, cost, choice as a chain of pairs.
    states: list[tuple[int, float, Any]] = [(0, 0.0, None)]
    for block in blocks:
        grown: list[tuple[int, float, Any]] = []
        for kept, cost, choice in states:
            if kept + block.saved_bytes <= budget_bytes:
                grown.append((kept + block.saved_bytes, cost, (False, choice)))
            if kept + block.saved_bytes + block.input_bytes <= budget_bytes:
                total = cost + block.forward_cost
                grown.append((kept + block.input_bytes, total, (True, choice)))
        states = _undominated(grown, budget_bytes)
        if not states:
            least = _least_peak(blocks)
            raise BudgetError(
                f"no choice of checkpoints fits {budget_bytes} bytes of activations: "
                f"{least} bytes are the least",
                least,
            )
    _, cost, choice = min(states, key=lambda state: (state[1], state[0]))
    checkpointed: list[bool] = []
    while choice is not None:
        again, choice = choice
        checkpointed.append(again)
    checkpointed.reverse()
    return CheckpointChoice(checkpointed, peak_bytes(blocks, checkpointed), cost)


def _undominated(
    states: list[tuple[int, float, Any]], budget_bytes: int
) -> list[tuple[int, float, Any]]:
    states.sort(key=lambda state: (state[0], state[1]))
    best = float("inf")
    front = []
    for state in states:
        if state[1] < best:
            best = state[1]
            front.append(state)
    if len(front) <= _MOST_STATES:
        return front
    cells = {state[0] * _MOST_STATES // max(1, budget_bytes): state for state in reversed(front)}
    return sorted(cells.values(), key=lambda state: state[0])


def _least_peak(blocks: Sequence[BlockCost]) -> int:
    """The smallest budget with a choice: found by halving, as what fits less fits more."""
    low, high = 0, peak_bytes(blocks, [False] * len(blocks))
    while low < high:
        middle = (low + high) // 2
        if _fits(blocks, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(blocks: Sequence[BlockCost], budget_bytes: int) -> bool:
    kept = 0
    for block in blocks:
        own = block.saved_bytes + block.input_bytes
        if block.input_bytes < block.saved_bytes and kept + own <= budget_bytes:
            kept += block.input_bytes
        elif kept + block.saved_bytes <= budget_bytes:
            kept += block.saved_bytes
        else:
            return False
    return True
