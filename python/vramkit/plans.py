"""Plan objects: what each layer gets, why, as a file, compared, and applied."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .convert import (
    Candidate,
    ConversionReport,
    LayerReport,
    Progress,
    candidates,
    convert,
)
from .estimator import MemoryEstimate
from .rates import PLAIN, Rates
from .sizes import format_size
from .text_file import replace_text

if TYPE_CHECKING:
    from .calibration import Calibration
    from .plan_table import PlanTable

SCHEMA = "vramkit.plan/2"
TIERS = ("device", "host", "disk")
# What an entry calls a layer that stays on the device.
RESIDENT = "resident"


class Option(NamedTuple):
    """A format that a layer could have; `format` None: as it is."""

    format: str | None
    bytes: int
    error: float


@dataclass(frozen=True)
class PlanEntry:
    """One layer of a plan.

    `format` is None where the layer stays as it is. `error` is the relative squared error of the
    stored weight, ||W - W'||^2 / ||W||^2; of a plan by data, that of the model's output with this
    layer alone stored. `tier` is "resident" on the device, or "host" or "disk", from where it is
    streamed; `backing` says where a resident of a component that takes turns waits.
    """

    name: str
    kind: str
    format: str | None
    bytes: int
    original_bytes: int
    error: float
    tier: str = RESIDENT
    component: str = ""
    backing: str | None = None
    shape: tuple[int, ...] = ()
    options: tuple[Option, ...] = ()

    @property
    def place(self) -> tuple[str | None, str]:
        """(format, tier)."""
        return self.format, self.tier

    def seconds(self, rates: Rates, rows: int) -> float:
        """Arithmetic of one pass; lookups count as none."""
        elements = math.prod(self.shape)
        if self.kind.startswith("Embedding") or not elements:
            return 0.0
        plain = PLAIN[max(1, round(self.original_bytes / elements))]
        return rates.seconds(self.format or plain, elements, rows)


@dataclass(frozen=True)
class PlanPhase:
    """One component's turn (or the whole model's): what it takes on the device, and how long.

    `seconds` is of all its `passes`, with what its turn loads; None without rates.
    """

    name: str
    fixed_bytes: int
    activations_bytes: int = 0
    slot_bytes: int = 0
    device_bytes: int = 0
    passes: int = 1
    seconds: float | None = None


class PlanDifference(NamedTuple):
    """What `Plan.diff` gives: (layer, (format, tier) here, there), and sums there minus here."""

    changes: list[tuple[str, tuple[str | None, str], tuple[str | None, str]]]
    bytes: int
    error: float

    def __str__(self) -> str:
        if not self.changes:
            return "the plans agree"
        lines = [f"{len(self.changes)} layers differ: {self.bytes:+d} B, error {self.error:+.3g}"]
        for name, ours, theirs in self.changes:
            lines.append(f"  {name}: {_words(*ours)} -> {_words(*theirs)}")
        return "\n".join(lines)


def _words(fmt: str | None, tier: str) -> str:
    return (fmt or "plain") + ("" if tier == RESIDENT else f" on {tier}")


@dataclass
class Plan:
    """Which format and place each layer gets under a limit; print it, save it, apply it.

    `bound` says what the limit was held against: "weights" on a CPU, "peak" where the call's own
    memory was counted in. `optimal` says whether no better plan exists; else `gap` bounds the rest.
    """

    entries: list[PlanEntry]
    limit_bytes: int
    buffer_bytes: int
    fixed_bytes: int
    fingerprint: str
    bound: str = "weights"
    optimal: bool = True
    gap: float = 0.0
    estimate: MemoryEstimate | None = None
    formats: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str, int]] = field(default_factory=list)
    prefer: str = "quality"
    tiers: tuple[str, ...] = ("device",)
    slots: int = 2
    rows: int = 1
    max_quality_loss: float | None = None
    host_limit_bytes: int | None = None
    host_bytes: int = 0
    phases: list[PlanPhase] = field(default_factory=list)
    rates: Rates | None = None
    edited: list[str] = field(default_factory=list)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters and buffers under this plan."""
        return self.fixed_bytes + sum(entry.bytes for entry in self.entries)

    @property
    def original_bytes(self) -> int:
        """Bytes of all parameters and buffers before."""
        return self.fixed_bytes + sum(entry.original_bytes for entry in self.entries)

    @property
    def device_bytes(self) -> int:
        """What the limit bounds: of the phases, the one that takes most."""
        if not self.phases:
            return self.weights_bytes
        return max(phase.device_bytes for phase in self.phases)

    @property
    def streams(self) -> bool:
        """Whether some layers are not on the device all the time."""
        return len(self.phases) > 1 or any(e.tier != RESIDENT for e in self.entries)

    @property
    def loss(self) -> float:
        """The sum of the layers' errors."""
        return sum(entry.error for entry in self.entries)

    @property
    def seconds(self) -> float | None:
        """Expected seconds of all passes and turns; None without rates."""
        known = [phase.seconds for phase in self.phases]
        return None if not known or None in known else sum(s for s in known if s is not None)

    def counts(self) -> dict[str, tuple[int, int]]:
        """(layers, bytes) by format; layers that stay as they are count as "plain"."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self.entries:
            layers, size = found.get(entry.format or "plain", (0, 0))
            found[entry.format or "plain"] = (layers + 1, size + entry.bytes)
        return found

    def entry(self, name: str) -> PlanEntry:
        """The layer `name`; KeyError if the plan has none of that name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"the plan has no layer {name!r}")

    def explain(self, name: str) -> str:
        """Why the layer `name` has its format and place, and what the choices beside it cost."""
        e = self.entry(name)
        allowed = self.limit_bytes - self.buffer_bytes
        proof = "no other choice" if self.optimal else f"no choice known (gap {self.gap:.2g})"
        goal = {
            "quality": "has a smaller sum of errors",
            "balanced": "has a smaller sum of loss and time, each against its scale",
            "speed": "takes less time, a hundredth of the loss counted in",
        }[self.prefer]
        lines = [
            f"{name} ({e.kind}) is stored in {e.format or 'its own dtype'}: "
            f"{format_size(e.original_bytes)} -> {format_size(e.bytes)}, relative squared error "
            f"{e.error:.3g} of a total of {self.loss:.3g}. Within {format_size(allowed)}, {proof} "
            f"for all layers together {goal}."
        ]
        if e.tier != RESIDENT:
            lines.append(f"It stays on the {e.tier} and is streamed through a slot{self._link(e)}.")
        elif len(self.tiers) > 1 and self.rates is not None:
            lines.append(
                "It stays on the device: streaming it would copy "
                f"{format_size(e.bytes)} in every pass{self._link(e)}."
            )
        phase = next((p for p in self.phases if p.name == e.component), None)
        left = allowed - (self.device_bytes if phase is None else phase.device_bytes)
        better = [o for o in e.options if o.error < e.error]
        cheaper = [o for o in e.options if o.bytes < e.bytes]
        if better:
            o = min(better, key=lambda o: (o.bytes, o.error))
            more = o.bytes - e.bytes
            lines.append(
                f"The next better, {o.format or 'plain'}, would take {format_size(more)} more "
                f"({more:+d} B; {format_size(left)} are free) and lower the error by "
                f"{e.error - o.error:.3g}."
            )
        if cheaper:
            o = min(cheaper, key=lambda o: (o.error, o.bytes))
            lines.append(
                f"The next cheaper, {o.format or 'plain'}, would save "
                f"{format_size(e.bytes - o.bytes)} and raise the error by {o.error - e.error:.3g}."
            )
        return " ".join(lines)

    def _link(self, e: PlanEntry) -> str:
        if self.rates is None or not self.rates.link_bytes_per_second:
            return ""
        seconds = e.bytes / self.rates.link_bytes_per_second
        if e.tier == "disk" and self.rates.disk_bytes_per_second:
            seconds = max(seconds, e.bytes / self.rates.disk_bytes_per_second)
        return f", {seconds:.3g} s beside the arithmetic"

    def diff(self, other: Plan) -> PlanDifference:
        """Where `other` differs; ValueError if it is of another model."""
        check_same([(e.name, e.shape) for e in self.entries], other)
        pairs = list(zip(self.entries, other.entries, strict=True))
        changes = [(a.name, a.place, b.place) for a, b in pairs if a.place != b.place]
        return PlanDifference(
            changes, other.weights_bytes - self.weights_bytes, other.loss - self.loss
        )

    def table(self) -> PlanTable:
        """What is possible for this model: modes, bytes, loss, seconds, and smallest limits."""
        from .plan_table import table_of

        return table_of(self)

    def check_model(self, model: nn.Module) -> None:
        """ValueError, naming the first differences, if `model` has other layers or shapes."""
        found, _ = candidates(model)
        if fingerprint(found) == self.fingerprint:
            return
        skipped = {name for name, why, _ in self.left_out if why == "skipped on request"}
        here = [(c.name, c.shape) for c in found if c.full_name not in skipped]
        check_same(here, self)
        raise ValueError(
            "this plan was made for a model with other layers or shapes "
            f"(fingerprint {self.fingerprint}, this model's is {fingerprint(found)}); plan this "
            "model"
        )

    def apply(
        self,
        model: nn.Module,
        *,
        calibration: Calibration | Iterable[Any] | None = None,
        progress: bool | Progress = False,
        inputs: Any = None,
        folder: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
    ) -> nn.Module:
        """Convert `model` in place as planned, and return it; `calibration` as for `convert`.

        What the plan streams, or lets take turns, is offloaded as by `enable_vram_management`,
        whose `inputs`, `folder` and `device` these are (with turns, `inputs` is a dict by
        component). ``model.vramkit_session`` is the session. A model of which nothing is streamed
        moves to `device`.

        Raises ValueError if the plan was made for a model with other layers or shapes, or where a
        call cannot be followed, BudgetError if modules that move as one need more than was planned:
        with `inputs` now, with the model as it was, else at its first call.
        """
        self.check_model(model)
        turns = len(self.phases) > 1
        from .offload.device import device_for

        on = device_for(device)
        if not self.streams:
            self.convert(model, calibration=calibration, progress=progress)
            return model if device is None else model.to(on.torch)
        from .offload import planned

        planned.check_reach(model, on, turns)
        division = None
        if inputs is not None and not turns:
            division = planned.check(self, model, inputs, on)
        before, _ = candidates(model)
        self.convert(model, calibration=calibration, progress=progress)
        planned.stream(self, model, before, inputs, division, folder, on)
        return model

    def convert(
        self,
        model: nn.Module,
        *,
        calibration: Calibration | Iterable[Any] | None = None,
        progress: bool | Progress = False,
    ) -> ConversionReport:
        """Apply the formats alone, without any check; returns the conversion's report."""
        formats = {e.name: e.format for e in self.entries}
        return convert(model, formats, calibration=calibration, progress=progress)

    def report(self) -> ConversionReport:
        """What applying the plan does, in bytes, as `convert` would report it."""
        report = ConversionReport(left_out=list(self.left_out))
        for e in self.entries:
            if e.format is None:
                report.left_out.append((e.name, "the plan leaves it plain", e.original_bytes))
            else:
                report.layers.append(
                    LayerReport(e.name, e.kind, e.format, e.bytes, e.original_bytes)
                )
        return report

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data; keys named `*_bytes` are bytes."""
        from . import __version__

        return {
            "schema": SCHEMA,
            "version": __version__,
            "limit_bytes": self.limit_bytes,
            "buffer_bytes": self.buffer_bytes,
            "fixed_bytes": self.fixed_bytes,
            "weights_bytes": self.weights_bytes,
            "original_bytes": self.original_bytes,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "host_limit_bytes": self.host_limit_bytes,
            "bound": self.bound,
            "prefer": self.prefer,
            "tiers": list(self.tiers),
            "slots": self.slots,
            "rows": self.rows,
            "max_quality_loss": self.max_quality_loss,
            "loss": self.loss,
            "seconds": self.seconds,
            "optimal": self.optimal,
            "gap": self.gap,
            "fingerprint": self.fingerprint,
            "estimate": self.estimate.to_dict() if self.estimate else None,
            "formats": self.formats,
            "left_out": [list(item) for item in self.left_out],
            "phases": [asdict(phase) for phase in self.phases],
            "rates": self.rates.to_dict() if self.rates else None,
            "entries": [asdict(entry) for entry in self.entries],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; a plan can be edited there: an entry's `format` and `tier`."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        replace_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote, edited by hand perhaps.

        Bytes and errors of entries with another format are taken from the entry's options; the
        names of such layers are in `edited`. Raises ValueError for what is no plan (it says what
        is wrong) and BudgetError if the edited plan exceeds its limit.
        """
        from .plan_file import read_plan

        return read_plan(path)

    def __str__(self) -> str:
        limit = self.limit_bytes - self.buffer_bytes
        lines = [
            f"{format_size(self.original_bytes)} -> {format_size(self.weights_bytes)} of weights "
            f"within {format_size(limit)} ({'optimal' if self.optimal else f'gap {self.gap:.2g}'})"
        ]
        for name, (layers, size) in sorted(self.counts().items(), key=lambda item: -item[1][1]):
            lines.append(f"  {name:10} {layers:4} layers  {format_size(size):>10}")
        lines.append(
            f"  {'fixed':10} {'':4}         {format_size(self.fixed_bytes):>10}  "
            "(norms, biases, buffers)"
        )
        for tier in ("host", "disk"):
            away = [e for e in self.entries if e.tier == tier]
            if away:
                held = format_size(sum(e.bytes for e in away))
                lines.append(f"{len(away)} layers, {held}, are streamed from the {tier}")
        for phase in self.phases if len(self.phases) > 1 or len(self.tiers) > 1 else []:
            slots = f", {self.slots} slots of {format_size(phase.slot_bytes)}"
            took = "" if phase.seconds is None else f", {phase.seconds:.3g} s expected"
            lines.append(
                f"{phase.name or 'device'}: {format_size(phase.device_bytes)}"
                + (slots if phase.slot_bytes else "")
                + took
            )
        if self.bound == "weights":
            lines.append("the limit bounds the weights; the call's own memory comes on top")
        if self.estimate is not None and self.estimate.peak_bytes is not None:
            lines.append(f"estimated peak of one call: {format_size(self.estimate.peak_bytes)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from .report.html import table

        rows = [
            (e.name, e.kind, e.format or "plain", format_size(e.bytes), f"{e.error:.2e}", e.tier)
            for e in self.entries
        ]
        headers = ("layer", "kind", "format", "bytes", "relative squared error", "tier")
        return table(headers, rows, caption=str(self))

    def plot(self) -> Any:
        """A matplotlib figure: bytes by layer, coloured by format."""
        from .report.plots import plan_figure

        return plan_figure(self)


def fingerprint(found: Sequence[Candidate]) -> str:
    """A short hash of the layers' names and shapes: a plan fits a model if these agree."""
    text = json.dumps([[c.name, list(c.shape)] for c in found])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same(here: Sequence[tuple[str, tuple[int, ...]]], plan: Plan) -> None:
    """ValueError that names the first layers of `plan` which `here` lacks, or has otherwise."""
    ours, theirs = dict(here), {e.name: tuple(e.shape) for e in plan.entries}
    found = []
    for name, shape in theirs.items():
        if name not in ours:
            found.append(f"the plan has {name!r}, the model does not")
        elif shape and ours[name] and tuple(ours[name]) != shape:
            found.append(f"{name!r} is {list(shape)} in the plan, {list(ours[name])} in the model")
    found += [f"the model has {name!r}, the plan does not" for name in ours if name not in theirs]
    if found:
        more = f" ({len(found) - 3} more)" if len(found) > 3 else ""
        raise ValueError(
            "this plan was made for a model with other layers or shapes: "
            + "; ".join(found[:3])
            + more
            + ". Plan this model"
        )
