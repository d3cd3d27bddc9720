"""Which blocks of a model to checkpoint so that a training step fits a budget.

Two traces on fake tensors, one with all activations kept and one with every block checkpointed,
tell what each block keeps, what it needs while it runs forward and backward, and what the step
takes beside the blocks. `choose_checkpoints` picks; a third trace, of the choice, checks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BudgetError
from ..estimator import weight_bytes
from ..sizes import format_size, parse_size
from ..targets import Target
from ..tracing import CALL, MARK
from ..workspaces import work
from .checkpointing import (
    BlockCost,
    CheckpointChoice,
    CheckpointedBlock,
    _again,
    choose_checkpoints,
)
from .step_memory import Loss, Saver, TracedStep, chain_of, trace_step

if TYPE_CHECKING:
    from ..recorder import Recorder

_ROUNDS = 4
"""How often a choice is made again because its own trace needs more than its sum said."""


@dataclass
class CheckpointPlan:
    """Which blocks of a model are to be checkpointed, and what a step takes then.

    Bytes are those of weights and the step (activations, gradients, workspaces); the optimizer's
    state comes on top.
    """

    blocks: list[str]
    """All blocks, in the order in which they run."""
    choice: CheckpointChoice
    budget_bytes: int
    peak_bytes: int
    """By a trace of the step with this choice."""
    plain_peak_bytes: int
    """Without checkpoints."""
    extra_operations: float
    """Multiply-adds of the second passes."""
    costs: list[BlockCost] = field(default_factory=list, repr=False)

    @property
    def checkpointed(self) -> list[str]:
        """Names of the blocks that are."""
        return [n for n, c in zip(self.blocks, self.choice.checkpointed, strict=True) if c]

    def apply(self, model: nn.Module) -> nn.Module:
        """Put a `CheckpointedBlock` in each chosen block's place; returns the model.

        Raises ValueError, with nothing changed, where the model lacks one of the blocks.
        """
        modules = dict(model.named_modules())
        missing = [name for name in self.checkpointed if name not in modules]
        if missing:
            raise ValueError(f"this plan is of another model: it has no {', '.join(missing)}")
        for name in self.checkpointed:
            parent, _, key = name.rpartition(".")
            if not isinstance(modules[name], CheckpointedBlock):
                setattr(modules[parent], key, CheckpointedBlock(modules[name]))
        return model

    def __str__(self) -> str:
        return (
            f"{len(self.checkpointed)} of {len(self.blocks)} blocks checkpointed: "
            f"{format_size(self.peak_bytes)} in place of {format_size(self.plain_peak_bytes)}, "
            f"{format_size(self.budget_bytes)} allowed"
        )


def plan_checkpoints(
    model: nn.Module,
    inputs: Any,
    loss: Loss,
    budget: str | float,
    *,
    blocks: Sequence[str] | None = None,
    saver: Saver | None = None,
    target: str | Target = "cpu",
    probe: bool = True,
) -> CheckpointPlan:
    """Choose the blocks to checkpoint so that a step fits a budget with the least recomputation.

    Optimal for blocks that run one after the other and go backward in the reverse order, as far as
    bytes add up; other operators between them count too. The choice is traced again, and made
    again with less where it does not fit.

    Args:
        model: In training mode; left as it is (`CheckpointPlan.apply` changes it).
        inputs: One call's inputs, or their shapes, as for `vramkit.estimate`.
        loss: Makes a scalar of the model's output.
        budget: For weights, gradients and activations, as text with its unit or GiB.
        blocks: Names of modules that are called once each, in any order; by default those of the
            longest ModuleList or Sequential.
        saver: A context around forward and loss, as for `estimate_step`.
        target: As for `vramkit.estimate`.
        probe: Likewise.

    Raises BudgetError, with the bytes that would do, where no choice fits; ValueError for blocks
    that are not called exactly once, or lie within each other.

    >>> model = torch.nn.Sequential(*(
    ...     torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(4)))
    >>> loss = lambda y: y.square().mean()
    >>> plan = plan_checkpoints(model, (4096, 64), loss, "11 MB", probe=False)
    >>> len(plan.checkpointed) > 0 and plan.peak_bytes <= 11_000_000
    True
    """
    allowed = parse_size(budget)
    names = list(chain_of(model) if blocks is None else blocks)
    _check(model, names)
    weights = weight_bytes(model)

    def traced(choice: Sequence[bool]) -> _Marked:
        marks = _Marks(names, dict(zip(names, choice, strict=True)))
        step = trace_step(
            model, inputs, loss, saver=saver, target=target, probe=probe, within=marks.within
        )
        return _Marked(step, marks.order)

    plain = traced([False] * len(names))
    names = plain.order
    peak = plain.step.trace.peak()
    if weights + peak <= allowed:
        none = CheckpointChoice([False] * len(names), peak, 0.0)
        return CheckpointPlan(names, none, allowed, weights + peak, weights + peak, 0.0)
    again = traced([True] * len(names))
    costs, before = _costs(plain, again)
    room = allowed - weights - before
    least = 0
    for _ in range(_ROUNDS):
        try:
            choice = choose_checkpoints(costs, max(0, room))
        except BudgetError as error:
            needed = max(allowed - room + error.needed_bytes, least)
            raise BudgetError(
                f"no choice of checkpoints brings the step into {format_size(allowed)}: "
                f"{format_size(needed)} are the least (with {format_size(weights)} of weights)",
                needed,
            ) from None
        found = traced(choice.checkpointed[:-1]).step.trace.peak() + weights
        if found <= allowed:
            # The last cost is of what follows the blocks.
            choice = choice._replace(checkpointed=choice.checkpointed[:-1])
            extra = choice.extra_cost
            return CheckpointPlan(names, choice, allowed, found, weights + peak, extra, costs[:-1])
        least = found
        room -= found - allowed
    raise BudgetError(
        f"no choice of checkpoints was found for {format_size(allowed)}; {format_size(least)} "
        "would do",
        least,
    )


def _check(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown or not names:
        raise ValueError(f"no modules of these names: {unknown}" if names else "blocks is empty")
    for name in names:
        for other in names:
            if other.startswith(f"{name}."):
                raise ValueError(f"the blocks {name} and {other} lie within each other")
    if len(set(names)) != len(names):
        raise ValueError("a block is named twice")


@dataclass
class _Marked:
    """A traced step with marks around its blocks, and the order in which they ran."""

    step: TracedStep
    order: list[str]


class _Marks:
    """Marks in a trace: "begin i", "end i", "backward i" for the block i in order of calls."""

    def __init__(self, names: Sequence[str], again: dict[str, bool]) -> None:
        self.names, self.again = names, again
        self.order: list[str] = []

    @contextlib.contextmanager
    def within(self, skeleton: nn.Module, recorder: Recorder) -> Iterator[None]:
        """Wrap the forward methods of the skeleton's blocks."""
        self.order = []
        modules = dict(skeleton.named_modules())
        before = {name: modules[name].__dict__.get("forward") for name in self.names}
        for name in self.names:
            modules[name].__dict__["forward"] = self._marking(name, modules[name], recorder)
        try:
            yield
        finally:
            for name, forward in before.items():
                if forward is None:
                    del modules[name].__dict__["forward"]
                else:
                    modules[name].__dict__["forward"] = forward
        missing = sorted(set(self.names) - set(self.order))
        if missing:
            raise ValueError(f"blocks that the model does not call: {', '.join(missing)}")

    def _marking(self, name: str, module: nn.Module, recorder: Recorder) -> Callable[..., Any]:
        forward = module.forward
        mark = recorder.recording.mark

        def once_more(*args: Any, **kwargs: Any) -> Any:
            depth = len(recorder.stack)
            try:
                return forward(*args, **kwargs)
            finally:
                # A second pass is broken off where all is there that backward wants.
                del recorder.stack[depth:], recorder.linear[depth:]

        def run(*args: Any, **kwargs: Any) -> Any:
            if name in self.order:
                raise ValueError(f"the block {name} is called more than once: it cannot be one")
            number = len(self.order)
            self.order.append(name)
            mark(f"begin {number}")
            # Its own forward runs twice where it is checkpointed; this runs once.
            if self.again[name]:
                out = _again(module, once_more, args, kwargs)
            else:
                out = forward(*args, **kwargs)
            mark(f"end {number}")
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _grad: mark(f"backward {number}"))
                    break
            return out

        return run


def _costs(plain: _Marked, again: _Marked) -> tuple[list[BlockCost], int]:
    """Costs of the blocks and of what follows them, and the bytes before the first."""
    kept: list[list[int]] = []
    needs: list[list[int]] = []
    before = 0
    count = len(plain.order)
    for marked in (plain, again):
        trace = marked.step.trace
        live = [0, *trace.live()]
        place: dict[str, int] = {}
        for label, index in trace.marks:
            place.setdefault(label, index)
        starts = [place[f"begin {i}"] for i in range(count)]
        after = [*starts[1:], place[f"end {count - 1}"]]
        before = live[starts[0]]
        turns = [place.get(f"backward {i}", len(live) - 1) for i in range(count)]
        ends = [len(live) - 1, *turns[:-1]]
        kept.append([live[b] - live[a] for a, b in zip(starts, after, strict=True)])
        needs.append(
            [
                max(*live[start : stop + 1], *live[turn : max(turn, end) + 1]) - live[start]
                for start, stop, turn, end in zip(starts, after, turns, ends, strict=True)
            ]
        )
        rest = max(live[after[-1] : turns[-1] + 1]) - live[after[-1]]
        needs[-1].append(rest)
    operations = _operations(plain)
    costs = [
        BlockCost(kept[0][i], kept[1][i], operations[i], needs[0][i], needs[1][i])
        for i in range(count)
    ]
    # What follows the last block: the loss, and the way back to the block.
    costs.append(BlockCost(0, 0, 1.0, needs[0][count], needs[0][count]))
    return costs, before


def _operations(marked: _Marked) -> list[float]:
    """Multiply-adds of each block's forward pass."""
    recording = marked.step.recording
    found = [0.0] * len(marked.order)
    inside = -1
    for kind, number, _, _ in recording.steps:
        if kind == MARK:
            label = recording.labels[number]
            if label.startswith("begin "):
                inside = int(label.split()[1])
            elif label.startswith("end "):
                inside = -1
        elif kind == CALL and inside >= 0:
            call = recording.calls[number]
            if call is not None:
                found[inside] += work(call)
    return found
