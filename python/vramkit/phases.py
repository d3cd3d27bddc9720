"""Pipelines: several models that are called in turn, and how much of them is there at a time.

The phases run on fake tensors under one recorder, so that what one leaves for the next counts for
as long as it lives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from .breaks import checked_sum
from .convert import Precision, convert
from .estimate_report import pipeline_html, pipeline_text
from .estimator import call_arguments, meta_copy, model_dtype, weight_bytes
from .intervals import interval_of
from .targets import Target, parse_target

if TYPE_CHECKING:
    from .recorder import Recorder
    from .tracing import Trace

Model = nn.Module | str | os.PathLike[str]
RESIDENT = ("all", "one")


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase: the bytes of weights that are there, and the most that calls hold besides."""

    name: str
    weights_bytes: int
    activations_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Weights that are there, and the phase's own peak."""
        return self.weights_bytes + self.activations_bytes


@dataclass
class PipelineEstimate:
    """Predicted memory of a pipeline, in bytes.

    Attributes:
        components: Weights of every component.
        phases: In the order in which they run.
        notes: What the figures leave out or assume.
        trace: Every allocation and release of the calls.
        activations_interval_bytes: (low, high) of the calls' highest point; None where nothing is
            known.
        interval_from: Where the interval comes from, or why there is none.
    """

    components: dict[str, int]
    phases: list[PhaseEstimate]
    notes: list[str] = field(default_factory=list)
    trace: Trace | None = field(default=None, repr=False)
    activations_interval_bytes: tuple[int, int] | None = None
    interval_from: str = ""

    @property
    def peak_bytes(self) -> int:
        """The highest of all phases."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def interval_bytes(self) -> tuple[int, int] | None:
        """(low, high) of peak_bytes; the calls' interval in proportion, on top of the weights."""
        if self.activations_interval_bytes is None or not self.phases:
            return None
        calls = max(phase.activations_bytes for phase in self.phases) or 1
        low, high = self.activations_interval_bytes
        return (
            max(p.weights_bytes + p.activations_bytes * low // calls for p in self.phases),
            max(p.weights_bytes - -p.activations_bytes * high // calls for p in self.phases),
        )

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data."""
        return {
            "peak_bytes": self.peak_bytes,
            "interval_bytes": self.interval_bytes,
            "interval_from": self.interval_from,
            "components": [
                {"name": name, "weights_bytes": n} for name, n in self.components.items()
            ],
            "phases": [
                {
                    "name": phase.name,
                    "weights_bytes": phase.weights_bytes,
                    "activations_bytes": phase.activations_bytes,
                    "peak_bytes": phase.peak_bytes,
                }
                for phase in self.phases
            ],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        return pipeline_text(self)

    def _repr_html_(self) -> str:
        return pipeline_html(self)

    def plot(self, limit: float | str | None = None) -> Any:
        """A matplotlib figure of what is alive over the phases, with the peak marked.

        `limit`, GiB as a number or text such as "6 GB", is drawn as a line.
        """
        from .report.timeline import pipeline_figure

        return pipeline_figure(self, limit)


def estimate_pipeline(
    components: Mapping[str, Model],
    phases: Sequence[tuple[str, Any]] | Callable[..., Any],
    *,
    precision: Mapping[str, Precision | None] | Precision | None = None,
    resident: str = "all",
    target: str | Target = "cpu",
    probe: bool = True,
) -> PipelineEstimate:
    """Predict what a pipeline of several models takes, phase by phase.

    Args:
        components: Modules or checkpoint folders by name.
        phases: Either a list of (component, inputs), inputs as for `estimate`; their results live
            until the pipeline ends. Or a function that is given the components as keyword
            arguments (without weights, to be called on tensors it makes itself) and calls them as
            the pipeline does; each call of a component is then a phase of its name.
        precision: One for all components, or by component.
        resident: "all" components stay; or "one": only that which runs is there.
        target: As for `estimate`.
        probe: As for `estimate`.

    Raises KeyError for a phase of an unknown component, ValueError as `estimate` does.
    """
    from .dry_run import DryRun
    from .probing import Store

    if resident not in RESIDENT:
        raise ValueError(f"resident is 'all' or 'one', not {resident!r}")
    aim = parse_target(target)
    skeletons = {}
    for name, model in components.items():
        chosen = precision.get(name) if isinstance(precision, Mapping) else precision
        skeletons[name] = _skeleton(model, chosen)
    weights = {name: weight_bytes(model) for name, model in skeletons.items()}
    dry = DryRun(skeletons, aim)
    ran: list[tuple[str, str]] = []
    play: Callable[[Recorder], Any]
    if callable(phases):
        play = _played_function(phases, skeletons, ran)
    else:
        for name, _ in phases:
            if name not in skeletons:
                raise KeyError(f"no component {name!r}; there are {sorted(skeletons)}")
        calls = [
            (name, dry.accept(call_arguments(inputs, model_dtype(skeletons[name]))))
            for name, inputs in phases
        ]
        play = _played_list(calls, skeletons, ran)
    store = Store() if probe and aim.kind == "cpu" else None
    learned = dry.learned(play, probe=probe, store=store)
    found = []
    for phase, component in ran:
        there = weights[component] if resident == "one" else sum(weights.values())
        found.append(PhaseEstimate(phase, there, learned.trace.peak(phase)))
    notes = learned.explain(probe)
    if resident == "one":
        notes.append("moving components in and out, while both are there in part, is not counted")
    checked_sum(sum(weights.values()) + learned.peak_bytes)
    interval, source = interval_of(learned.peak_bytes, learned.unprobed, aim.kind, False)
    return PipelineEstimate(weights, found, notes, learned.trace, interval, source)


def _skeleton(model: Model, precision: Precision | None) -> nn.Module:
    if isinstance(model, nn.Module):
        skeleton = meta_copy(model)
    else:
        from .skeleton import build_skeleton

        skeleton = build_skeleton(model)
    if precision is not None and str(precision).strip().lower() != "fp32":
        convert(skeleton, precision)
    return skeleton


def _names(counts: dict[str, int], component: str) -> str:
    counts[component] = counts.get(component, 0) + 1
    count = counts[component]
    return component if count == 1 else f"{component} ({count})"


def _played_list(
    calls: list[tuple[str, Any]], skeletons: dict[str, nn.Module], ran: list[tuple[str, str]]
) -> Callable[[Recorder], Any]:
    def play(recorder: Recorder) -> Any:
        ran.clear()
        counts: dict[str, int] = {}
        results = []
        for component, (args, kwargs) in calls:
            phase = _names(counts, component)
            ran.append((phase, component))
            recorder.begin(phase)
            results.append(skeletons[component](*args, **kwargs))
        return results

    return play


def _played_function(
    function: Callable[..., Any], skeletons: dict[str, nn.Module], ran: list[tuple[str, str]]
) -> Callable[[Recorder], Any]:
    def play(recorder: Recorder) -> Any:
        ran.clear()
        counts: dict[str, int] = {}
        handles = []
        for name, model in skeletons.items():

            def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
                phase = _names(counts, name)
                ran.append((phase, name))
                recorder.begin(phase)

            # On the components' roots only, where no fast path asks for hooks.
            handles.append(model.register_forward_pre_hook(enter))
        try:
            return function(**skeletons)
        finally:
            for handle in handles:
                handle.remove()

    return play
