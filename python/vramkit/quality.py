"""What a change of a model cost: its outputs against those of a reference, layer by layer too.

Sums are kept in float64 and taken batch by batch, so that the outputs of a whole data set never lie
in memory together, except in a `Recording`, whose purpose that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .recording import LayerOutputs, Recording
from .running import Output, Runner, checked, default_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "LayerError", "Recording", "compare", "default_output", "record"]

Metric = Callable[[Any], float]

# Elements compared at once: two float64 copies of as many stay under 20 MB whatever the outputs.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LayerError:
    """Error of one layer's outputs, that of the layers before it included.

    `cosine` is the least over the layer's output vectors.
    """

    name: str
    relative_l2: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """How far a model's outputs y lie from a reference's r, and how long both took.

    Attributes:
        relative_l2: ||y - r|| / ||r|| over all values of all batches.
        cosine: The least cosine similarity over vectors along the last dimension. An output of one
            dimension, or whose last dimension is 1, is one vector.
        cosine_mean: The mean of those cosines.
        sqnr_db: 10 log10(sum r^2 / sum (y - r)^2); infinite where the outputs are the same.
        max_error: The largest |y - r|.
        seconds, reference_seconds: Median time of a batch, after one call that is not counted.
        layers: Error by layer, in the order of the reference's calls.
        left_out: (layer, reason) of every layer asked for that could not be compared.
        nonfinite_values, reference_nonfinite_values: How many values of y, and of r, are NaN or
            infinite. If any is, relative_l2 and max_error are infinite, sqnr_db is minus infinity,
            and the cosine of the vector that holds it counts as 0, so that no check can pass by
            comparing with NaN.
    """

    relative_l2: float
    cosine: float
    cosine_mean: float
    sqnr_db: float
    max_error: float
    seconds: float
    reference_seconds: float
    layers: list[LayerError] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    batches: int = 0
    vectors: int = 0
    nonfinite_values: int = 0
    reference_nonfinite_values: int = 0
    task_metric: float | None = None
    reference_task_metric: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data. JSON has no infinity: such a number is None here."""
        data = {k: _plain(v) for k, v in vars(self).items() if k not in ("layers", "left_out")}
        data["layers"] = [{k: _plain(v) for k, v in vars(e).items()} for e in self.layers]
        data["left_out"] = [{"name": name, "reason": reason} for name, reason in self.left_out]
        return data

    def plot(self) -> Figure:
        """A matplotlib figure of the error by layer and the summary."""
        from .report.plots import comparison_figure

        return comparison_figure(self)

    def __str__(self) -> str:
        plural = "" if self.batches == 1 else "es"
        lines = [
            f"relative L2 {self.relative_l2:.4g}, cosine {self.cosine:.6f} least and "
            f"{self.cosine_mean:.6f} mean, SQNR {self.sqnr_db:.1f} dB, largest error "
            f"{self.max_error:.4g}",
            f"{self.seconds:.4g} s per batch, reference {self.reference_seconds:.4g} s "
            f"({self.batches} batch{plural}, {self.vectors} vectors)",
        ]
        if self.nonfinite_values or self.reference_nonfinite_values:
            lines.append(
                f"NaN or infinity: {self.nonfinite_values} values of the model's outputs, "
                f"{self.reference_nonfinite_values} of the reference's"
            )
        if self.task_metric is not None or self.reference_task_metric is not None:
            ours, theirs = (
                "not measured" if v is None else f"{v:.6g}"
                for v in (self.task_metric, self.reference_task_metric)
            )
            lines.append(f"task metric {ours}, reference {theirs}")
        if self.layers:
            worst = max(self.layers, key=lambda e: e.relative_l2)
            lines.append(
                f"{len(self.layers)} layers, the largest relative L2 {worst.relative_l2:.4g} "
                f"in {worst.name}"
            )
        if self.left_out:
            lines.append(f"layers that could not be compared (see .left_out): {len(self.left_out)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from .report.html import table

        rows = [(e.name, f"{e.relative_l2:.4g}", f"{e.cosine:.6f}") for e in self.layers]
        if not rows:
            rows = [("outputs", f"{self.relative_l2:.4g}", f"{self.cosine:.6f}")]
        return table(("layer", "relative L2", "least cosine"), rows, caption=str(self))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ErrorSums:
    """Running sums of the error of one output, or of one layer's."""

    def __init__(self) -> None:
        self.signal = self.noise = self.max_error = self.cosine_sum = 0.0
        self.cosine = math.inf
        self.vectors = self.nonfinite = self.reference_nonfinite = 0

    def add(self, reference: Tensor, output: Tensor, what: str) -> None:
        """Count `output` against `reference`; ValueError, which names `what`, if shapes differ."""
        if reference.shape != output.shape:
            raise ValueError(
                f"{what} has shape {tuple(output.shape)}, the reference's "
                f"{tuple(reference.shape)}; compare models on the same batches"
            )
        if reference.numel() == 0:
            raise ValueError(f"{what} has shape {tuple(output.shape)}: nothing to compare")
        r, y = _as_vectors(reference), _as_vectors(output)
        step = max(1, _CHUNK // r.shape[1])
        for first in range(0, r.shape[0], step):
            self._add_rows(r[first : first + step], y[first : first + step])

    def _add_rows(self, r: Tensor, y: Tensor) -> None:
        dot, rr, yy = torch.zeros(3, r.shape[0], dtype=torch.float64).unbind()
        bad = torch.zeros(r.shape[0], dtype=torch.bool)
        for first in range(0, r.shape[1], _CHUNK):
            a = r[:, first : first + _CHUNK].double()
            b = y[:, first : first + _CHUNK].double()
            a_wrong, b_wrong = ~a.isfinite(), ~b.isfinite()
            self.reference_nonfinite += int(a_wrong.sum())
            self.nonfinite += int(b_wrong.sum())
            bad |= (a_wrong | b_wrong).any(dim=1)
            difference = b - a
            self.noise += float(difference.square().sum())
            self.max_error = max(self.max_error, float(difference.abs().max()))
            dot += (a * b).sum(dim=1)
            rr += a.square().sum(dim=1)
            yy += b.square().sum(dim=1)
        self.signal += float(rr.sum())
        # Two zero vectors agree; a zero vector agrees with no other.
        cosines = (dot / (rr.sqrt() * yy.sqrt())).clamp(-1.0, 1.0)
        cosines = torch.where((rr == 0) | (yy == 0), (rr == yy).double(), cosines)
        cosines = torch.where(bad, torch.zeros_like(cosines), cosines)
        self.cosine = min(self.cosine, float(cosines.min()))
        self.cosine_sum += float(cosines.sum())
        self.vectors += len(cosines)

    @property
    def finite(self) -> bool:
        """Whether every value seen was finite."""
        return not (self.nonfinite or self.reference_nonfinite)

    @property
    def relative_l2(self) -> float:
        """||y - r|| / ||r||: 0 for equal outputs, infinite for NaN or where only r is zero."""
        if not self.finite:
            return math.inf
        if self.noise == 0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf

    @property
    def sqnr_db(self) -> float:
        """Signal to error in decibels."""
        ratio = self.relative_l2
        return math.inf if ratio == 0 else -20.0 * math.log10(ratio)


def _as_vectors(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU as rows of vectors (see Comparison.cosine)."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).flatten(-2)
    if tensor.ndim < 2 or tensor.shape[-1] == 1:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1])


class LiveReference:
    """A reference model that is run beside the model."""

    def __init__(self, model: Any, output: Output | None) -> None:
        self.model = model
        self.runner = Runner(model, output, "reference")

    def layer_names(self) -> list[str]:
        """The layers that it can give outputs of."""
        return [name for name, _ in self.runner.layers()]

    def output(self, index: int, batch: Any) -> Tensor:
        """Its output for a batch."""
        return self.runner.run(batch)

    def layer_outputs(self, index: int, batch: Any, wanted: set[str]) -> LayerOutputs:
        """Copies of the outputs of each call of each layer, in the order of the first calls."""
        kept: LayerOutputs = {}

        def take(name: str, output: Any) -> None:
            # A copy: the model may go on to change the tensor in place.
            kept.setdefault(name, []).append(_layer_tensor(output).detach().cpu().clone())

        self.runner.run_layers(batch, take, wanted)
        return kept

    def finish(self, batches: int) -> None:
        """Nothing is left over: it ran on what the model ran on."""

    @property
    def seconds(self) -> float:
        """Median time of a batch."""
        return self.runner.seconds

    def task_metric(self, metric: Metric | None) -> float | None:
        """The metric of the model."""
        return _measure(metric, self.model)


class RecordedReference:
    """A reference of which a recording was kept."""

    def __init__(self, recording: Recording, batches: Iterable[Any], per_layer: bool) -> None:
        self.recording = recording
        self.seconds = recording.seconds
        if isinstance(batches, Sized) and len(batches):
            self.finish(len(batches))
        if per_layer and not recording.layers:
            raise ValueError(
                "the recording holds no outputs of layers; make it with record(per_layer=True)"
            )

    def layer_names(self) -> list[str]:
        """The layers that were recorded."""
        return list(dict.fromkeys(name for layers in self.recording.layers for name in layers))

    def output(self, index: int, batch: Any) -> Tensor:
        """The recorded output for a batch."""
        if index >= len(self.recording.outputs):
            raise ValueError(
                f"more batches than the {len(self.recording.outputs)} that were recorded; "
                "compare on the same batches"
            )
        return self.recording.outputs[index]

    def layer_outputs(self, index: int, batch: Any, wanted: set[str]) -> LayerOutputs:
        """The recorded outputs of the layers."""
        return {n: o for n, o in self.recording.layers[index].items() if n in wanted}

    def finish(self, batches: int) -> None:
        """ValueError if the model ran on fewer or more batches than the recording has."""
        if batches != len(self.recording.outputs):
            raise ValueError(
                f"{batches} batches, but {len(self.recording.outputs)} were recorded; "
                "compare on the same batches"
            )

    def task_metric(self, metric: Metric | None) -> float | None:
        """The metric that was taken when the recording was made."""
        return self.recording.task_metric


def _measure(metric: Metric | None, model: Any) -> float | None:
    if metric is None:
        return None
    with torch.inference_mode():
        return float(metric(model))


def _layer_tensor(output: Any) -> Tensor:
    """The tensor to compare in a layer's output; an empty one where there is none."""
    try:
        return default_output(output)
    except TypeError:
        return torch.empty(0)


def _select(names: Iterable[str] | None, known: list[str]) -> set[str]:
    """The `known` layers that `names` asks for; ValueError for a pattern that matches none."""
    from .convert import matches

    if names is None:
        return set(known)
    if isinstance(names, str):
        raise TypeError(f"names= is a list of layers; write [{names!r}]")
    patterns = list(names)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            raise ValueError(
                f"no layer with parameters is named {pattern!r}; the names are those of the "
                "model's named_modules()"
            )
    return {name for name in known if matches(name, patterns)}


class LayerErrors:
    """Errors of the layers over the batches, and why some could not be compared."""

    def __init__(
        self,
        source: LiveReference | RecordedReference,
        runner: Runner,
        names: Iterable[str] | None,
    ) -> None:
        self.source, self.runner = source, runner
        theirs, ours = source.layer_names(), [name for name, _ in runner.layers()]
        wanted = _select(names, [*theirs, *(n for n in ours if n not in set(theirs))])
        self.sums: dict[str, ErrorSums] = {}
        self.reasons = {n: "not in the model" for n in theirs if n in wanted - set(ours)}
        self.reasons |= {n: "not in the reference" for n in ours if n in wanted - set(theirs)}
        self.wanted = wanted - set(self.reasons)

    def add(self, index: int, batch: Any) -> None:
        """Run the model on a batch, comparing each layer's output as it appears."""
        expected = self.source.layer_outputs(index, batch, self.wanted)
        calls = dict.fromkeys(expected, 0)
        for name in expected:
            self.sums.setdefault(name, ErrorSums())

        def take(name: str, output: Any) -> None:
            call = calls.get(name, 0)
            calls[name] = call + 1
            if call >= len(expected.get(name, ())):
                return
            try:
                self.sums[name].add(expected[name][call], _layer_tensor(output), "its output")
            except ValueError as error:
                self.reasons.setdefault(name, str(error))

        self.runner.run_layers(batch, take, self.wanted)
        for name, count in calls.items():
            before = len(expected.get(name, ()))
            if count != before:
                self.reasons.setdefault(
                    name, f"called {count} times by the model, {before} times by the reference"
                )

    def errors(self) -> list[LayerError]:
        """The layers that could be compared on every batch, in the order of their calls."""
        return [
            LayerError(name, sums.relative_l2, sums.cosine)
            for name, sums in self.sums.items()
            if name not in self.reasons
        ]

    def left_out(self) -> list[tuple[str, str]]:
        """(name, reason) of the others."""
        never = sorted(self.wanted - set(self.sums) - set(self.reasons))
        return [*self.reasons.items(), *((name, "never called") for name in never)]


def record(
    reference: Any,
    batches: Iterable[Any],
    *,
    output: Output | None = None,
    per_layer: bool = False,
    names: Iterable[str] | None = None,
    task_metric: Metric | None = None,
) -> Recording:
    """Keep a model's outputs, for `compare` when two models do not fit in memory at once.

    The arguments are those of `compare`. Outputs are kept on the CPU in their own dtype; with
    `per_layer` those of every layer are too, which can take far more memory than the model.

    >>> model = torch.nn.Linear(8, 4).eval()
    >>> recording = vramkit.record(model, [torch.ones(2, 8)])
    >>> vramkit.compare(recording, model, [torch.ones(2, 8)]).relative_l2
    0.0
    """
    source = LiveReference(reference, output)
    wanted: set[str] = set()
    if per_layer or names is not None:
        wanted = _select(names, source.layer_names())
    recording = Recording()
    for index, batch in enumerate(checked(batches)):
        recording.outputs.append(source.output(index, batch).clone())
        if wanted:
            recording.layers.append(source.layer_outputs(index, batch, wanted))
    recording.seconds = source.seconds
    recording.task_metric = _measure(task_metric, reference)
    return recording


def compare(
    reference: Any,
    model: Any,
    batches: Iterable[Any],
    *,
    output: Output | None = None,
    per_layer: bool = False,
    names: Iterable[str] | None = None,
    task_metric: Metric | None = None,
) -> Comparison:
    """Measure how far a model's outputs are from a reference's, and how long both take.

    Args:
        reference: The model to compare with, or what `record` kept of it.
        model: Any module or callable. Neither model is changed, nor its training mode.
        batches: Inputs: each a Tensor, a tuple (positional) or a dict (keywords). They are moved
            to the device of each model.
        output: Maps what a model returns to the tensor to compare; see `default_output`. Leave out
            here what should not count: padding, and values that are infinite on purpose.
        per_layer: Also compare the output of each module that holds parameters, in one more call
            per batch that is not timed. Layers are matched by name; an error includes what the
            layers before passed on.
        names: Only these layers (implies per_layer): names, parents, last parts or globs.
        task_metric: Maps a model to a number, such as an accuracy, that is reported for both.

    Raises ValueError where the outputs' shapes or the numbers of batches differ, TypeError for
    batches or outputs of a type that it cannot use.

    >>> first, second = torch.nn.Linear(8, 4).eval(), torch.nn.Linear(8, 4).eval()
    >>> vramkit.compare(first, second, [torch.ones(2, 8)]).cosine < 1
    True
    """
    by_layer = per_layer or names is not None
    runner = Runner(model, output, "model")
    source: LiveReference | RecordedReference
    if isinstance(reference, Recording):
        source = RecordedReference(reference, batches, by_layer)
    else:
        source = LiveReference(reference, output)
    layers = LayerErrors(source, runner, names) if by_layer else None
    total, count = ErrorSums(), 0
    for count, batch in enumerate(checked(batches), 1):
        expected = source.output(count - 1, batch)
        total.add(expected, runner.run(batch), f"the model's output for batch {count - 1}")
        if layers is not None:
            layers.add(count - 1, batch)
    source.finish(count)
    return Comparison(
        relative_l2=total.relative_l2,
        cosine=total.cosine,
        cosine_mean=total.cosine_sum / total.vectors,
        sqnr_db=total.sqnr_db,
        max_error=total.max_error if total.finite else math.inf,
        seconds=runner.seconds,
        reference_seconds=source.seconds,
        layers=layers.errors() if layers is not None else [],
        left_out=layers.left_out() if layers is not None else [],
        batches=count,
        vectors=total.vectors,
        nonfinite_values=total.nonfinite,
        reference_nonfinite_values=total.reference_nonfinite,
        task_metric=_measure(task_metric, model),
        reference_task_metric=source.task_metric(task_metric),
    )
