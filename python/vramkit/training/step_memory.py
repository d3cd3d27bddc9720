"""What a training step will take, before it runs: forward, loss and backward on fake tensors.

The same tracing as `vramkit.estimate`'s, with gradients: what autograd keeps, what savers make of
it and what backward operators hold inside themselves, allocation by allocation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..estimator import call_arguments, meta_copy, model_dtype, weight_bytes
from ..targets import Target, parse_target

if TYPE_CHECKING:
    from ..probing import Store
    from ..recorder import Recorder
    from ..tracing import Call, Recording, Trace

Loss = Callable[[Any], Tensor]
Saver = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


@dataclass
class StepEstimate:
    """Predicted memory of one training step, in bytes.

    A step is forward, loss and backward, begun without gradients; the optimizer's step allocates
    nothing beside its state (`vramkit.training.AdamW` and torch's fused optimizers).
    """

    weights_bytes: int
    """Parameters and buffers."""
    optimizer_bytes: int
    """State of the optimizer that was given."""
    gradients_bytes: int
    """Of all parameters that want one."""
    step_bytes: int
    """The most that the step itself holds at once: activations, gradients, workspaces."""
    notes: list[str] = field(default_factory=list)
    """What the figures assume."""
    trace: Trace | None = field(default=None, repr=False)
    """Every allocation and release of the step."""

    @property
    def peak_bytes(self) -> int:
        """Weights, optimizer state and the step."""
        return self.weights_bytes + self.optimizer_bytes + self.step_bytes


def estimate_step(
    model: nn.Module,
    inputs: Any,
    loss: Loss,
    *,
    saver: Saver | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    target: str | Target = "cpu",
    probe: bool = True,
) -> StepEstimate:
    """Predict the memory of a training step, without running it.

    Args:
        model: In the mode it trains in; a `MixedPrecisionWrapper`, `CheckpointedBlock`s and others
            are followed as they are. Left as it is.
        inputs: One call's inputs, or their shapes, as for `vramkit.estimate`.
        loss: Makes a scalar of the model's output. Its targets are part of it and are not counted.
        saver: A context around forward and loss: `lambda m: compress_activations(m, "int8")`.
        optimizer: Whose state, as it is now, is counted.
        target: As for `vramkit.estimate`.
        probe: Whether operators whose inner allocations are not known yet are run once, alone.

    Raises ValueError where control flow depends on values, as `vramkit.estimate` does.

    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    >>> found = estimate_step(model, (64, 256), lambda y: y.square().mean(), probe=False)
    >>> found.gradients_bytes == found.weights_bytes
    True
    """
    run = trace_step(model, inputs, loss, saver=saver, target=target, probe=probe)
    state = 0
    if optimizer is not None:
        state = sum(
            t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)
        )
    gradients = {id(p): p.nbytes for p in model.parameters() if p.requires_grad}
    return StepEstimate(
        weight_bytes(model),
        state,
        sum(gradients.values()),
        run.trace.peak(),
        run.notes,
        run.trace,
    )


@dataclass
class TracedStep:
    """A step that was followed: its trace, and the calls of its operators."""

    trace: Trace
    recording: Recording
    notes: list[str]


def trace_step(
    model: nn.Module,
    inputs: Any,
    loss: Loss,
    *,
    saver: Saver | None = None,
    target: str | Target = "cpu",
    probe: bool = True,
    within: Callable[[nn.Module, Recorder], contextlib.AbstractContextManager[Any]] | None = None,
) -> TracedStep:
    """Follow a step on fake tensors; `within` is entered around it, with the model's skeleton."""
    from ..dry_run import DryRun
    from ..probing import Store

    aim = parse_target(target)
    store = Store() if probe and aim.kind == "cpu" else None

    class Step(DryRun):
        """With gradients, where inference has none."""

        recorded: Recorder

        def record(self, play: Any, strides: Mapping[Call, Any]) -> Recorder:
            """What earlier probes found is known in the first pass: often one is enough."""
            known = _Known(store) if store is not None and not strides else strides
            return super().record(play, known)

        def _play(self, play: Any, recorder: Recorder) -> None:
            def with_gradients(recorder: Recorder) -> None:
                with torch.enable_grad():
                    play(recorder)

            self.recorded = recorder
            super()._play(with_gradients, recorder)

    skeleton = meta_copy(model)
    dry = Step({"": skeleton}, aim)
    for real, fake in zip(model.parameters(), skeleton.parameters(), strict=True):
        fake.requires_grad_(real.requires_grad)
    args, kwargs = dry.accept(call_arguments(inputs, model_dtype(model)))

    def play(recorder: Recorder) -> None:
        around = within(skeleton, recorder) if within is not None else contextlib.nullcontext()
        try:
            with around:
                with saver(skeleton) if saver is not None else contextlib.nullcontext():
                    value = loss(skeleton(*args, **kwargs))
                recorder.recording.mark("loss")
                value.backward()  # type: ignore[no-untyped-call]
                recorder.recording.mark("backward")
        finally:
            for parameter in skeleton.parameters():
                parameter.grad = None

    state = torch.get_rng_state()
    try:
        found = dry.learned(play, probe=probe, store=store)
    finally:
        torch.set_rng_state(state)
    return TracedStep(found.trace, dry.recorded.recording, found.explain(probe))


class _Known(dict[Any, Any]):
    """Strides of calls that a store of probes knows, looked up as they are asked for."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def get(self, call: Any, default: Any = None) -> Any:
        """Strides of the call's results, or `default`."""
        if call not in self:
            found = self.store.get(call)
            self[call] = None if found is None else found.strides
        known = self[call]
        return default if known is None else known


def chain_of(model: nn.Module) -> Sequence[str]:
    """Names of the blocks of the longest ModuleList or Sequential of a model, in order.

    Raises ValueError where there is none of two or more.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > max(1, len(found)):
            found = [f"{name}.{key}" if name else key for key in module._modules]
    if not found:
        raise ValueError(
            "the model has no ModuleList or Sequential of two modules or more: name its blocks "
            "(blocks=)"
        )
    return found
