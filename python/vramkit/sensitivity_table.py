"""The table that `vramkit.sensitivity` makes, by layer and format: text, file, costs of a plan."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .candidates import Candidate
from .convert import Precision, storage_format
from .formats import StorageFormat
from .planner import DEFAULT_FORMATS
from .plans import fingerprint
from .text_file import replace_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .plans import Plan

SCHEMA = "vramkit.sensitivity/1"
METHODS = ("weights", "layer", "output", "each")


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
        replace_text(path, text + "\n")

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
