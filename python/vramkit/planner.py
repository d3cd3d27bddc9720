"""Plans: the storage format of every layer, chosen so that all fits and the least is lost."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import _core
from .convert import (
    Candidate,
    ConversionReport,
    LayerReport,
    Precision,
    Progress,
    candidates,
    check_weight,
    convert,
    format_in,
    progress_bar,
    reason_against,
    storage_format,
)
from .errors import BudgetError, VramkitError
from .estimator import MemoryEstimate, estimate, weight_bytes
from .formats import StorageFormat
from .sizes import format_size, parse_size

if TYPE_CHECKING:
    from .calibration import Calibration
    from .running import Output

SCHEMA = "vramkit.plan/1"
# Enough elements that a weight's error is known to well under a percent, whatever its size.
SAMPLE_ELEMENTS = 1 << 22
# What a plan chooses from by default, besides leaving a layer as it is.
DEFAULT_FORMATS = (
    "bf16",
    "fp16",
    "int8",
    "fp8",
    "int4_g16",
    "int4_g32",
    "int4_g64",
    "int4",
    "nf4",
    "nf4_dq",
)


@dataclass(frozen=True)
class PlanEntry:
    """One layer of a plan.

    `format` is None where the layer stays as it is. `error` is the relative squared error of the
    stored weight, ||W - W'||^2 / ||W||^2; of a plan by data, that of the model's output with this
    layer alone stored.
    """

    name: str
    kind: str
    format: str | None
    bytes: int
    original_bytes: int
    error: float
    tier: str = "resident"


@dataclass
class Plan:
    """Which format each layer gets under a limit; print it, edit `entries`, save it, apply it.

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

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters and buffers under this plan."""
        return self.fixed_bytes + sum(entry.bytes for entry in self.entries)

    @property
    def original_bytes(self) -> int:
        """Bytes of all parameters and buffers before."""
        return self.fixed_bytes + sum(entry.original_bytes for entry in self.entries)

    def counts(self) -> dict[str, tuple[int, int]]:
        """(layers, bytes) by format; layers that stay as they are count as "plain"."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self.entries:
            layers, size = found.get(entry.format or "plain", (0, 0))
            found[entry.format or "plain"] = (layers + 1, size + entry.bytes)
        return found

    def explain(self, name: str) -> str:
        """Why the layer `name` has the format it has."""
        for entry in self.entries:
            if entry.name == name:
                kept = entry.format or "its own dtype"
                return (
                    f"{name} ({entry.kind}) is stored in {kept}: "
                    f"{format_size(entry.original_bytes)} -> {format_size(entry.bytes)}, relative "
                    f"squared error {entry.error:.3g} of a total of "
                    f"{sum(e.error for e in self.entries):.3g}. Within "
                    f"{format_size(self.limit_bytes - self.buffer_bytes)}, "
                    + (
                        "no other choice"
                        if self.optimal
                        else f"no choice known (gap {self.gap:.2g})"
                    )
                    + " for all layers together has a smaller sum of errors."
                )
        raise KeyError(f"the plan has no layer {name!r}")

    def apply(
        self,
        model: nn.Module,
        *,
        calibration: Calibration | Iterable[Any] | None = None,
        progress: bool | Progress = False,
    ) -> nn.Module:
        """Convert `model` in place as planned, and return it; `calibration` as for `convert`.

        Raises ValueError if the plan was made for a model with other layers or shapes.
        """
        found, _ = candidates(model)
        here = fingerprint(found)
        if here != self.fingerprint:
            raise ValueError(
                "this plan was made for a model with other layers or shapes "
                f"(fingerprint {self.fingerprint}, this model's is {here}); plan this model"
            )
        self.convert(model, calibration=calibration, progress=progress)
        return model

    def convert(
        self,
        model: nn.Module,
        *,
        calibration: Calibration | Iterable[Any] | None = None,
        progress: bool | Progress = False,
    ) -> ConversionReport:
        """As `apply`, without the check; returns the conversion's report."""
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
        return {
            "schema": SCHEMA,
            "limit_bytes": self.limit_bytes,
            "buffer_bytes": self.buffer_bytes,
            "fixed_bytes": self.fixed_bytes,
            "weights_bytes": self.weights_bytes,
            "original_bytes": self.original_bytes,
            "bound": self.bound,
            "optimal": self.optimal,
            "gap": self.gap,
            "fingerprint": self.fingerprint,
            "estimate": self.estimate.to_dict() if self.estimate else None,
            "formats": self.formats,
            "left_out": [list(item) for item in self.left_out],
            "entries": [asdict(entry) for entry in self.entries],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        text = json.dumps(self.to_dict(), indent=2)
        temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote. Raises ValueError for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"{path}: schema {data['schema']!r}, expected {SCHEMA!r}")
            entries = [PlanEntry(**entry) for entry in data["entries"]]
            for entry in entries:
                if entry.format is not None:
                    storage_format(entry.format)
            return cls(
                entries=entries,
                limit_bytes=int(data["limit_bytes"]),
                buffer_bytes=int(data["buffer_bytes"]),
                fixed_bytes=int(data["fixed_bytes"]),
                fingerprint=str(data["fingerprint"]),
                bound=str(data["bound"]),
                optimal=bool(data["optimal"]),
                gap=float(data["gap"]),
                formats=list(data["formats"]),
                left_out=[(str(n), str(why), int(size)) for n, why, size in data["left_out"]],
            )
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no plan: {error!r}") from error

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


def weight_error(weight: torch.Tensor, fmt: StorageFormat) -> float:
    """||W - W'||^2 / ||W||^2 of storing `weight` in `fmt`, in float64 (0 for a zero weight).

    Of a large weight, evenly spaced rows of about `SAMPLE_ELEMENTS` elements stand for all.
    """
    from ._operators import encode

    matrix = weight.detach().reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)
    rows, cols = matrix.shape
    wanted = max(1, SAMPLE_ELEMENTS // max(1, cols))
    if rows > wanted:
        matrix = matrix[torch.arange(wanted, device=matrix.device) * rows // wanted]
    matrix = matrix.to(torch.float32).contiguous()
    parts = encode(matrix, fmt)
    sums = torch.ops.vramkit._squared_error(
        matrix, parts.codes, parts.scales, parts.extra, fmt.table_on(matrix.device), None, fmt.spec
    )
    error, power = (float(v) for v in sums)
    return error / power if power else 0.0


@torch.no_grad()
def plan(
    model: nn.Module,
    vram_limit: int | float | str,
    *,
    vram_buffer: int | float | str = 0,
    inputs: Any = None,
    formats: Iterable[Precision] = DEFAULT_FORMATS,
    skip: Iterable[str] = (),
    batches: Iterable[Any] | None = None,
    output: Output | None = None,
    calibration: Calibration | None = None,
    progress: bool | Progress = False,
    read_weight: Callable[[Candidate], torch.Tensor] | None = None,
) -> Plan:
    """Choose the format of every layer so that the model fits and its weights change least.

    Args:
        model: The module to plan for; it is only read.
        vram_limit: The limit: a number of GiB, or text such as "6 GB" or "512 MiB".
        vram_buffer: Kept free within the limit.
        inputs: One call's inputs, for the estimate of the peak (see `estimate`).
        formats: What to choose from, besides leaving a layer as it is.
        skip: Layers to leave plain, as in `convert`.
        batches: Data like that of later use, to measure on: a layer then counts by the error of the
            model's output with this layer alone stored. One pass for each layer and format; some
            hundred samples will do.
        output: What of the model's result is the output, as for `vramkit.compare`.
        calibration: A `Calibration` collected on this model, if `apply` will be given it: what is
            measured is then rounded by it.
        progress: True for a progress bar over the bytes analysed.
        read_weight: Gives a layer's weight where the model has none in memory.

    The sum over layers of the relative squared errors is minimized exactly: a multiple-choice
    knapsack, solved natively with byte-exact sizes. On a CPU the limit bounds the weights; on CUDA,
    weights and the call's own memory together.

    Raises BudgetError, which says the smallest limit that would do, if nothing fits.
    """
    limit, buffer = parse_size(vram_limit), parse_size(vram_buffer)
    found, left_out = candidates(model, skip)
    chosen = [storage_format(f) for f in formats]
    original = sum(c.original_bytes for c in found)
    fixed = weight_bytes(model) - original
    activations = 0
    on_device = any(p.is_cuda for p in model.parameters())
    if on_device and inputs is not None:
        activations = estimate(model, inputs=inputs).activations_bytes or 0
    cost: Cost = _weight_cost
    if batches is not None:
        if read_weight is not None:
            raise ValueError("batches= needs the model's weights in memory")
        from .sensitivity import OutputErrors

        measured = OutputErrors(model, batches, output, calibration)

        def cost(candidate: Candidate, matrix: torch.Tensor, fmt: StorageFormat) -> float:
            return measured.of(candidate, fmt)

    elif calibration is not None or output is not None:
        raise ValueError(
            "calibration= and output= say how to measure on batches=, which is missing"
        )
    groups: list[list[tuple[int, float]]] = []
    options: list[list[StorageFormat | None]] = []
    with progress_bar(progress, original * len(chosen), "analyse") as advance:
        for candidate in found:
            weight = read_weight(candidate) if read_weight else candidate.weight
            check_weight(candidate.name, weight, storage_format("bf16"))
            group, names = _choices(candidate, weight, chosen, cost, advance)
            del weight  # before the next one is read
            groups.append(group)
            options.append(names)
    budget = limit - buffer - fixed - activations
    try:
        result = _core.plan_choices(groups, budget)
    except BudgetError as error:
        smallest = error.needed_bytes + limit - budget
        raise BudgetError(
            f"no choice of formats fits {format_size(limit)}: the smallest limit that would do is "
            f"{format_size(smallest)} ({smallest} B), of which {format_size(fixed)} are norms, "
            f"biases, buffers and layers that stay plain, {format_size(buffer)} buffer"
            + (f" and {format_size(activations)} the call's own memory" if activations else ""),
            smallest,
        ) from None
    entries = []
    for candidate, group, names, index in zip(found, groups, options, result.choices, strict=True):
        fmt = names[index]
        entries.append(
            PlanEntry(
                name=candidate.name,
                kind=candidate.kind,
                format=None if fmt is None else fmt.name,
                bytes=group[index][0],
                original_bytes=candidate.original_bytes,
                error=group[index][1],
            )
        )
    made = Plan(
        entries=entries,
        limit_bytes=limit,
        buffer_bytes=buffer,
        fixed_bytes=fixed,
        fingerprint=fingerprint(candidates(model)[0]),
        bound="peak" if on_device and inputs is not None else "weights",
        optimal=result.optimal,
        gap=(result.cost - result.lower_bound) / result.cost if result.cost else 0.0,
        formats=[fmt.name for fmt in chosen],
        left_out=left_out,
    )
    if inputs is not None:
        by_name: Mapping[str, Precision | None] = {e.name: e.format for e in entries}
        made.estimate = estimate(model, by_name, inputs)
    return made


Cost = Callable[[Candidate, torch.Tensor, StorageFormat], float]


def _weight_cost(candidate: Candidate, matrix: torch.Tensor, fmt: StorageFormat) -> float:
    return weight_error(matrix, fmt)


def _choices(
    candidate: Candidate,
    weight: torch.Tensor,
    formats: Sequence[StorageFormat],
    cost: Cost,
    advance: Any,
) -> tuple[list[tuple[int, float]], list[StorageFormat | None]]:
    """(bytes, error) of leaving the layer as it is, and of every format that makes it smaller."""
    group: list[tuple[int, float]] = [(candidate.original_bytes, 0.0)]
    names: list[StorageFormat | None] = [None]
    matrix = weight.reshape(candidate.matrix_shape)
    for asked in formats:
        if reason_against(candidate, asked) is not None:
            advance(candidate.original_bytes, candidate.name)
            continue
        fmt = format_in(candidate, asked)
        size = fmt.bytes(matrix.shape).total
        if size < candidate.original_bytes:
            try:
                check_weight(candidate.name, weight, fmt)
            except VramkitError:
                advance(candidate.original_bytes, candidate.name)
                continue  # this format cannot hold the weight; the others are still offered
            group.append((size, cost(candidate, matrix, fmt)))
            names.append(fmt)
        advance(candidate.original_bytes, candidate.name)
    return group, names


def fit(
    model: nn.Module,
    vram_limit: int | float | str,
    *,
    vram_buffer: int | float | str = 0,
    inputs: Any = None,
    formats: Iterable[Precision] = DEFAULT_FORMATS,
    skip: Iterable[str] = (),
    progress: bool | Progress = False,
) -> nn.Module:
    """Plan and convert in one step: `model`, changed in place so that it fits; see `plan`.

    The plan stays readable as ``model.vramkit_plan``.
    """
    made = plan(
        model,
        vram_limit,
        vram_buffer=vram_buffer,
        inputs=inputs,
        formats=formats,
        skip=skip,
        progress=progress,
    )
    made.apply(model, progress=progress)
    object.__setattr__(model, "vramkit_plan", made)
    return model
