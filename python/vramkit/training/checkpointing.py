"""Activation checkpointing: blocks that compute their activations twice instead of keeping them.

Which blocks of a chain should, for a budget in bytes, is solved exactly: `choose_checkpoints`.
`plan_checkpoints` measures a model's blocks for it, on fake tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import BudgetError

_MOST_STATES = 4096


class CheckpointedBlock(nn.Module):
    """A module whose activations are computed again in the backward pass.

    Non-reentrant, with the forward pass' random numbers, and batch statistics are counted once:
    running means and variances are what they would be without checkpointing. The state_dict is the
    module's own, and its attributes can be read as if it were there itself.

    >>> block = CheckpointedBlock(torch.nn.Linear(2, 2))
    >>> block(torch.ones(1, 2)).sum().backward()
    >>> list(block.state_dict()), block.in_features
    (['weight', 'bias'], 2)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.register_load_state_dict_pre_hook(_as_modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output."""
        if not (torch.is_grad_enabled() and self.training):
            return self.module(*args, **kwargs)
        return _again(self.module, self.module, args, kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)


def _as_modules(_block: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keys of the module, as the wrapper has them."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)


def _again(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `forward` returns, its activations computed again in the backward pass."""
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module)),
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
    need_bytes: int | None = None
    """The most beside what the blocks before it keep, in its own forward and backward pass, where
    its activations are kept; None: `saved_bytes`."""
    need_again_bytes: int | None = None
    """The same where they are not; None: `saved_bytes` and `input_bytes`."""

    def kept(self, again: bool) -> int:
        """Bytes from its forward pass to its backward pass."""
        return self.input_bytes if again else self.saved_bytes

    def need(self, again: bool) -> int:
        """The most at once, beside what the blocks before it keep."""
        if again:
            whole = self.saved_bytes + self.input_bytes
            return whole if self.need_again_bytes is None else self.need_again_bytes
        return self.saved_bytes if self.need_bytes is None else self.need_bytes


class CheckpointChoice(NamedTuple):
    """Which blocks of a chain to checkpoint."""

    checkpointed: list[bool]
    """One per block."""
    peak_bytes: int
    """The most that is held at once, of saved activations."""
    extra_cost: float
    """Of the second passes, in `forward_cost`'s unit."""


def peak_bytes(blocks: Sequence[BlockCost], checkpointed: Sequence[bool]) -> int:
    """The most bytes at once: each block's own need, and what all before it keep."""
    kept = peak = 0
    for block, again in zip(blocks, checkpointed, strict=True):
        peak = max(peak, kept + block.need(again))
        kept += block.kept(again)
    return max(peak, kept)


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
            for again in (False, True):
                after = kept + block.kept(again)
                if max(after, kept + block.need(again)) <= budget_bytes:
                    total = cost + (block.forward_cost if again else 0.0)
                    grown.append((after, total, (again, choice)))
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
    """Whether any choice does: of those that fit so far, only the one that keeps least matters."""
    kept = 0
    for block in blocks:
        after = [
            kept + block.kept(again)
            for again in (False, True)
            if max(kept + block.need(again), kept + block.kept(again)) <= budget_bytes
        ]
        if not after:
            return False
        kept = min(after)
    return True
