"""`vramkit.sensitivity`: what each format would cost each layer, by weights, layers or the output.

The result is a table of predicted squared relative errors of the model's output: saved, printed,
and given to `vramkit.plan`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .candidates import Candidate
from .convert import (
    Precision,
    Progress,
    candidates,
    check_weight,
    format_in,
    progress_bar,
    reason_against,
    storage_format,
)
from .errors import CheckpointError, NonFiniteWeightError
from .formats import StorageFormat
from .planner import DEFAULT_FORMATS, weight_error
from .plans import fingerprint
from .running import Output, checked
from .sensitivity_store import Store, digest_of, store_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .calibration import Calibration
    from .plans import Plan

SCHEMA = "vramkit.sensitivity/1"
METHODS = ("weights", "layer", "output", "each")
Source = nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer: its name, class and shape, and the predicted error of each format.

    `errors` are squared errors of the model's output relative to the output's square, with this
    layer alone in that format. Formats that would not make the layer smaller, cannot hold its
    values or break the output are absent.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    errors: dict[str, float]


@dataclass
class Sensitivity:
    """Predicted errors of a model's output by layer and format; see `sensitivity`.

    Attributes:
        method: "weights", "layer", "output" or "each".
        formats: What was asked for.
        layers: In the model's order.
        fingerprint: Of the model's layers, as plans have it.
        batches: How many it was measured on.
        seconds: What it took.
        measured: Figures measured now; `reused` came from the cache.
        unreached: Layers that no batch called.
        notes: What went wrong with the cache.
    """

    method: str
    formats: list[str]
    layers: list[LayerSensitivity]
    fingerprint: str
    batches: int = 0
    seconds: float = 0.0
    measured: int = 0
    reused: int = 0
    unreached: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def layer(self, name: str) -> LayerSensitivity:
        """The layer `name`; KeyError if there is none of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} was measured")

    def loss(self, formats: Plan | Mapping[str, Precision | None]) -> float:
        """Predicted squared relative error of the output with layers in these formats.

        The sum over layers; what is not named, or None, stays as it is.
        """
        if not isinstance(formats, Mapping):
            formats = {entry.name: entry.format for entry in formats.entries}
        total = 0.0
        for name, precision in formats.items():
            if precision is None:
                continue
            errors, fmt = self.layer(name).errors, storage_format(precision).name
            if fmt not in errors:
                raise ValueError(f"{name!r} was not measured in {fmt}")
            total += errors[fmt]
        return total

    def check_model(self, found: Sequence[Candidate]) -> None:
        """ValueError, naming the first differences, if these are not the layers measured."""
        if fingerprint(found) == self.fingerprint:
            return
        here = {c.name: tuple(c.shape) for c in found}
        theirs = {layer.name: layer.shape for layer in self.layers}
        wrong = [f"{n!r} is not in this model" for n in theirs if n not in here]
        wrong += [
            f"{n!r} is {list(here[n])} here, {list(shape)} there"
            for n, shape in theirs.items()
            if n in here and here[n] != shape
        ]
        wrong += [f"{n!r} was not measured" for n in here if n not in theirs]
        raise ValueError(
            "this sensitivity was measured on a model with other layers or shapes: "
            + "; ".join(wrong[:3] or ["layers that were skipped differ"])
            + (f" ({len(wrong) - 3} more)" if len(wrong) > 3 else "")
            + ". Measure this model"
        )

    def chosen(self, formats: Iterable[Precision]) -> tuple[Precision, ...]:
        """The formats a plan may choose from: `plan`'s own defaults stand for all measured."""
        if formats is DEFAULT_FORMATS:
            return tuple(self.formats)
        asked = tuple(formats)
        missing = [f for f in (storage_format(p).name for p in asked) if f not in self.formats]
        if missing:
            raise ValueError(
                f"{missing[0]} is not among the formats measured ({', '.join(self.formats)}); "
                "measure again with formats="
            )
        return asked

    def costs(self) -> Callable[[Candidate, Tensor, StorageFormat], float | None]:
        """The errors as a plan asks for them; None where a layer cannot have a format."""
        table = {layer.name: layer.errors for layer in self.layers}

        def cost(candidate: Candidate, matrix: Tensor, fmt: StorageFormat) -> float | None:
            if candidate.name not in table:
                raise ValueError(
                    f"the layer {candidate.name!r} was left out when sensitivity was measured; "
                    "name it in skip="
                )
            return table[candidate.name].get(fmt.name)

        return cost

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        from . import __version__

        layers = [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers]
        rest = {k: v for k, v in vars(self).items() if k not in ("layers", "notes")}
        return {"schema": SCHEMA, "version": __version__, **rest, "layers": layers}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what `save` wrote; ValueError, with what is wrong, for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']!r}, expected {SCHEMA!r}")
            return cls(
                method=_among(METHODS, data["method"]),
                formats=[storage_format(str(f)).name for f in data["formats"]],
                layers=[_layer(item) for item in data["layers"]],
                fingerprint=str(data["fingerprint"]),
                batches=int(data["batches"]),
                seconds=float(data["seconds"]),
                measured=int(data["measured"]),
                reused=int(data["reused"]),
                unreached=[str(name) for name in data["unreached"]],
            )
        except KeyError as error:
            raise ValueError(f"{path} is no sensitivity: the field {error} is missing") from error
        except (TypeError, AttributeError, ArithmeticError, RecursionError, ValueError) as error:
            raise ValueError(f"{path} is no sensitivity: {error}") from error

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                layer.name,
                layer.kind,
                *(f"{layer.errors[f]:.1e}" if f in layer.errors else "-" for f in self.formats),
            )
            for layer in self.layers
        ]

    def __str__(self) -> str:
        rows = [("layer", "kind", *self.formats), *self._rows()]
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self._caption(), *lines])

    def _caption(self) -> str:
        how = {
            "weights": "by the errors of the weights",
            "layer": "by the errors of the layers' outputs",
            "output": "by the errors of the model's output",
            "each": "by the error of the model's output for every format",
        }[self.method]
        on = f" on {self.batches} batches" if self.batches else ""
        return (
            f"squared relative error of the output with one layer stored, {how}{on}; "
            f"{self.measured} measured and {self.reused} known, {self.seconds:.1f} s"
        )

    def _repr_html_(self) -> str:
        from .report.html import table

        return table(("layer", "kind", *self.formats), self._rows(), caption=self._caption())

    def plot(self) -> Figure:
        """A matplotlib figure: a map of layers by formats, the error as colour."""
        from .report.sensitivity_plot import sensitivity_figure

        return sensitivity_figure(self)


def _among(known: Sequence[str], value: Any) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)


def _layer(item: Mapping[str, Any]) -> LayerSensitivity:
    errors = {storage_format(str(f)).name: float(v) for f, v in item["errors"].items()}
    for name, value in errors.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"the error of {item['name']!r} in {name} is {value}")
    shape = tuple(int(n) for n in item["shape"])
    return LayerSensitivity(str(item["name"]), str(item["kind"]), shape, errors)


@torch.no_grad()
def sensitivity(
    model_or_checkpoint: Source,
    batches: Iterable[Any] | None = None,
    formats: Iterable[Precision] = DEFAULT_FORMATS,
    *,
    method: str = "auto",
    output: Output | None = None,
    calibration: Calibration | None = None,
    skip: Iterable[str] = (),
    factory: Callable[[], nn.Module] | None = None,
    progress: bool | Progress = False,
    cache: bool | str | os.PathLike[str] | None = True,
) -> Sensitivity:
    """Predict, for each layer and format, the error that storing it would add to the output.

    Args:
        model_or_checkpoint: A module (only read), a checkpoint folder, or a safetensors file with
            `factory`. A checkpoint is streamed by "weights" and "layer" (the parameters of one
            module at a time in memory) and loaded whole by the other methods.
        batches: Data like that of later use, as for `vramkit.compare`. None: "weights".
        formats: What to measure.
        method: "weights": ||W - W'||^2 / ||W||^2 of each weight, without data. "layer":
            ||f(x; W') - f(x; W)||^2 / ||f(x; W)||^2 of each layer's output on its own inputs, all
            formats in one pass of the model. "output": the error of the model's output with the
            layer in the coarsest format of each group (integers of 4 bits, of 8, and grids of
            floats), times what "layer" says of a format against that one: a loss linear in the
            layers' errors (Malinovskii et al. 2024, arXiv 2411.17525). "each": the error of the
            model's output for every layer and format. "auto": "weights" without batches, "layer"
            for a checkpoint, "output" for a module.
        output: What of the model's result is the output, as for `vramkit.compare`.
        calibration: A `Calibration` of this model: weights are rounded by it.
        skip: Layers to leave out.
        factory: Builds the module of a checkpoint without config.json.
        progress: True for a progress bar, or a function of (done, of how many, layer name).
        cache: Where figures are kept as they are measured, by the content of all they depend on,
            so that an interrupted call goes on: True for the user's cache folder, a folder, or
            None for nowhere.

    Raises ValueError for no batches, unknown formats or methods, CalibrationError where outputs are
    not finite or a weight is computed in the forward pass, CheckpointError for an unsound
    checkpoint. The model is left as it was.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval()
    >>> found = vramkit.sensitivity(model, formats=["int8", "int4"], cache=None)
    >>> found.layer("0").errors["int8"] < found.layer("0").errors["int4"]
    True
    """
    start = time.perf_counter()
    chosen = [storage_format(f) for f in _list_of(formats)]
    given = None if batches is None else list(checked(batches))
    by = _method(method, model_or_checkpoint, given, output, calibration)
    store = store_for(cache)
    model, read = _opened(model_or_checkpoint, factory, whole=by in ("output", "each"))
    found, _ = candidates(model, skip)
    made = measure_sensitivity(
        model,
        found,
        {c.name: chosen for c in found},
        given,
        method=by,
        output=output,
        calibration=calibration,
        progress=progress,
        store=store,
        read=read,
    )
    made.fingerprint = fingerprint(candidates(model)[0])
    made.formats = list(dict.fromkeys(fmt.name for fmt in chosen))
    made.seconds = time.perf_counter() - start
    return made


def _list_of(formats: Iterable[Precision]) -> list[Precision]:
    if isinstance(formats, (str, StorageFormat)):
        raise TypeError(f"formats is a list of formats, not one; write [{formats!r}]")
    asked = list(formats)
    if not asked:
        raise ValueError("no formats to measure")
    return asked


def _method(
    method: str,
    source: Source,
    batches: list[Any] | None,
    output: Output | None,
    calibration: Calibration | None,
) -> str:
    if method == "auto":
        if batches is None:
            method = "weights"
        else:
            method = "output" if isinstance(source, nn.Module) else "layer"
    if method not in METHODS:
        raise ValueError(f"method is auto, {', '.join(METHODS)}; got {method!r}")
    if method == "weights" and batches is not None:
        raise ValueError('method "weights" takes no data; leave batches out')
    if method != "weights" and batches is None:
        raise ValueError(f"method {method!r} measures on batches=, which is missing")
    if output is not None and method not in ("output", "each"):
        raise ValueError(f"output= says what to measure; method {method!r} never looks at it")
    if calibration is not None and method == "weights":
        raise ValueError("calibration= says how to round what is measured on batches=")
    return method


def _opened(
    source: Source, factory: Callable[[], nn.Module] | None, whole: bool
) -> tuple[nn.Module, Callable[[Candidate | str], Tensor] | None]:
    """The module, and how to read its weights where they stay in the checkpoint."""
    if isinstance(source, nn.Module):
        if factory is not None:
            raise ValueError("factory= builds the module of a checkpoint; this is a module")
        return source, None
    from .checkpoint import _FreedMemory, _read_weight, load
    from .shards import Checkpoint
    from .skeleton import MANIFEST, build_skeleton, match_names, set_tensor

    if (Path(source) / MANIFEST).is_file():
        raise CheckpointError(f"{source} is converted already; measure its source")
    if whole:
        return load(source, factory=factory), None
    model = build_skeleton(source, factory)
    checkpoint = Checkpoint(source)
    places = match_names(model, checkpoint)
    for name, _ in list(model.named_buffers()):
        if name in places:
            set_tensor(model, name, checkpoint.read(places[name]))
    freed = _FreedMemory()

    def read(what: Candidate | str) -> Tensor:
        freed.count(freed.EVERY)  # what was read before
        if isinstance(what, str):
            return checkpoint.read(places[what])
        return _read_weight(what, checkpoint, places)[0]

    return model, read


def measure_sensitivity(
    model: nn.Module,
    found: Sequence[Candidate],
    formats: Mapping[str, Sequence[StorageFormat]],
    batches: list[Any] | None,
    *,
    method: str,
    output: Output | None = None,
    calibration: Calibration | None = None,
    progress: bool | Progress = False,
    store: Store | None = None,
    read: Callable[[Candidate | str], Tensor] | None = None,
) -> Sensitivity:
    """As `sensitivity`, of these layers in these formats of each."""
    offered = {c.name: _offered(c, formats[c.name]) for c in found}
    count = 1 if batches is None else len(batches)
    steps = {"weights": 1, "layer": count, "output": count + 1, "each": 1}[method]
    unreached: list[str] = []
    with progress_bar(progress, len(found) * steps, "sensitivity", unit="layer") as advance:
        if method == "weights":
            errors = _by_weights(found, offered, store, read, advance)
        elif method == "each":
            from .output_errors import OutputErrors

            assert batches is not None
            outputs = OutputErrors(model, batches, output, calibration, store)
            errors = {}
            for candidate in found:
                weight, name = candidate.weight, candidate.name
                held = [f for f in offered[name] if _holds(name, weight, f)]
                errors[name] = {f.name: outputs.of(candidate, f) for f in held}
                advance(1, name)
        else:
            errors, unreached = _by_data(
                model, found, offered, batches or [], method, output, calibration, store, read,
                advance,
            )  # fmt: skip
    layers = [
        LayerSensitivity(
            c.name,
            c.kind,
            tuple(c.shape),
            {f: e for f, e in errors[c.name].items() if math.isfinite(e)},
        )
        for c in found
    ]
    made = Sensitivity(method, [], layers, "", batches=0 if batches is None else len(batches))
    made.unreached = unreached
    if store is not None:
        made.measured, made.reused, made.notes = store.measured, store.found, store.notes
    else:
        made.measured = sum(len(layer.errors) for layer in layers)
    return made


def _offered(candidate: Candidate, formats: Sequence[StorageFormat]) -> list[StorageFormat]:
    """The formats that make the layer smaller, as it would be stored."""
    offered: dict[str, StorageFormat] = {}
    for asked in formats:
        if reason_against(candidate, asked) is None:
            fmt = format_in(candidate, asked)
            if fmt.bytes(candidate.matrix_shape).total < candidate.original_bytes:
                offered[fmt.name] = fmt
    return list(offered.values())


def _holds(name: str, weight: Tensor, fmt: StorageFormat) -> bool:
    """Whether `fmt` can hold the weight; NonFiniteWeightError where none can."""
    try:
        check_weight(name, weight, fmt)
    except NonFiniteWeightError:
        check_weight(name, weight, storage_format("bf16"))
        return False
    return True


def _by_weights(
    found: Sequence[Candidate],
    offered: Mapping[str, Sequence[StorageFormat]],
    store: Store | None,
    read: Callable[[Candidate | str], Tensor] | None,
    advance: Callable[[int, str], None],
) -> dict[str, dict[str, float]]:
    from . import __version__

    errors: dict[str, dict[str, float]] = {}
    for candidate in found:
        name, shape = candidate.name, candidate.matrix_shape
        weight = read(candidate) if read is not None else candidate.weight
        matrix = weight.detach().reshape(shape)
        content = digest_of(matrix) if store is not None else ""
        errors[name] = {}
        for fmt in offered[name]:
            if not _holds(name, weight, fmt):
                continue
            key = digest_of("weights", __version__, content, fmt)
            known = store.get(key, 1) if store is not None else None
            if known is None:
                known = [weight_error(matrix, fmt)]
                if store is not None:
                    store.put(key, known)
            errors[name][fmt.name] = known[0]
        del weight, matrix  # before the next one is read
        advance(1, name)
    return errors


def _by_data(
    model: nn.Module,
    found: Sequence[Candidate],
    offered: Mapping[str, Sequence[StorageFormat]],
    batches: list[Any],
    method: str,
    output: Output | None,
    calibration: Calibration | None,
    store: Store | None,
    read: Callable[[Candidate | str], Tensor] | None,
    advance: Callable[[int, str], None],
) -> tuple[dict[str, dict[str, float]], list[str]]:
    from .layer_errors import layer_errors, warn_unreached
    from .output_errors import OutputErrors

    outputs = None
    if method == "output":  # first, for it finds fault with the batches at once
        outputs = OutputErrors(model, batches, output, calibration, store)
    local = layer_errors(
        model, found, offered, batches,
        calibration=calibration, store=store, read=read, advance=advance,
    )  # fmt: skip
    if outputs is None:
        warn_unreached(local.unreached)
        missing = [c for c in found if c.name in local.unreached]
        stand_in = _by_weights(missing, offered, store, read, lambda n, name: None)
        return local.errors | stand_in, local.unreached
    errors = {}
    for candidate in found:
        name = candidate.name
        errors[name] = _scaled(
            candidate, offered[name], local.errors[name], outputs, name in local.unreached
        )
        advance(1, name)
    return errors, local.unreached


def group_of(fmt: StorageFormat) -> tuple[str, int]:
    """What errs alike: integers of as many bits, or grids of floats (FP8, NF4, 16 bit)."""
    return ("affine", fmt.bits) if fmt.family == "affine" else ("float", 0)


def _scaled(
    candidate: Candidate,
    offered: Sequence[StorageFormat],
    local: Mapping[str, float],
    outputs: Any,
    unreached: bool,
) -> dict[str, float]:
    """The output's error measured once for each group of formats, and scaled within it."""
    groups: dict[tuple[str, int], list[StorageFormat]] = {}
    for fmt in offered:
        if unreached or fmt.name in local:
            groups.setdefault(group_of(fmt), []).append(fmt)
    errors: dict[str, float] = {}
    for members in groups.values():
        if unreached:
            errors |= {fmt.name: 0.0 for fmt in members}
            continue
        finite = [fmt for fmt in members if math.isfinite(local[fmt.name])]
        if not finite:
            continue
        coarsest = max(finite, key=lambda fmt: local[fmt.name])
        whole, part = outputs.of(candidate, coarsest), local[coarsest.name]
        for fmt in finite:
            errors[fmt.name] = whole * (local[fmt.name] / part) if part else 0.0
    return {fmt.name: errors[fmt.name] for fmt in offered if fmt.name in errors}
