"""Estimates held against a real run, and what such runs measured, kept for later estimates.

A measurement is known by what it is of: the model (its classes, shapes and formats), the shapes of
the inputs, the device, and the versions of torch and of this package. Each is a small file of its
own in the user's cache folder, named by that and by the figure, so that several processes may write
at once without a lock. A file that cannot be read is said to be so, and is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layers import QuantizedLayer
from .probing import cache_folder, processor
from .sizes import format_size
from .text_file import replace_text

if TYPE_CHECKING:
    from .estimator import MemoryEstimate

SCHEMA = "vramkit.measured/1"
KEPT = 16  # figures of one identity; the oldest go first


@dataclass(frozen=True)
class Calibrated:
    """The real runs that an estimate takes its activations from.

    Attributes:
        when: Time of the latest run, UTC, ISO 8601.
        device: Where they ran.
        predicted_bytes: What was predicted for them.
        least_bytes, most_bytes: What they measured; the estimate takes the most.
    """

    when: str
    device: str
    predicted_bytes: int
    least_bytes: int
    most_bytes: int


@dataclass(frozen=True)
class Verification:
    """One real run beside its estimate; bytes are those of the call, weights not counted.

    Attributes:
        predicted_bytes: As predicted, without what earlier runs measured.
        measured_bytes: The most that the run held at once.
        weights_bytes: Of the estimate; exact.
        interval_bytes: (low, high) that was given for the call; None where there was none.
        kept: Whether later estimates of the same call will use the measurement.
        seconds: Of the run; None for a measurement that was handed in.
        notes: What went wrong with the cache.
    """

    predicted_bytes: int
    measured_bytes: int
    weights_bytes: int
    interval_bytes: tuple[int, int] | None = None
    kept: bool = False
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Predicted by measured; infinite where nothing was held and something predicted."""
        if not self.measured_bytes:
            return float("inf") if self.predicted_bytes else 1.0
        return self.predicted_bytes / self.measured_bytes

    @property
    def within(self) -> bool | None:
        """Whether the measurement lies in the interval; None where there was none."""
        if self.interval_bytes is None:
            return None
        return self.interval_bytes[0] <= self.measured_bytes <= self.interval_bytes[1]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "ratio": self.ratio, "within": self.within}

    def __str__(self) -> str:
        predicted, measured = (
            f"{format_size(n + self.weights_bytes)} ({format_size(n)} besides the weights)"
            for n in (self.predicted_bytes, self.measured_bytes)
        )
        lines = [f"predicted    {predicted}", f"measured     {measured}"]
        off = "nothing was held" if self.ratio == float("inf") else f"{self.ratio - 1:+.2%}"
        inside = {None: "no interval was given", True: "within the interval"}.get(
            self.within, "outside the interval"
        )
        lines.append(f"predicted by measured, of the call alone: {off}; {inside}")
        if self.kept:
            lines.append("later estimates of this call use the measurement")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def verify(
    model: nn.Module,
    inputs: Any,
    *,
    estimate: MemoryEstimate | None = None,
    keep: bool = True,
) -> Verification:
    """Run `model` on `inputs`, measure what the call holds, and compare with the estimate.

    Args:
        model: The module as it will be used: converted, on its device, in its mode.
        inputs: Real tensors, as for `estimate`.
        estimate: The one to compare with; None: one is made for the model as it is.
        keep: Whether later estimates of this call use what was measured.

    The measurement is `vramkit.measure.call`'s: on a CPU the profiler's allocation events, on CUDA
    torch's peak of allocated bytes (blocks rounded up to 512). Raises ValueError where the inputs
    are shapes only, and what the model raises.

    >>> vramkit.verify(torch.nn.Linear(64, 32), torch.zeros(4, 64), keep=False).measured_bytes
    512
    """
    from .estimator import call_arguments, model_dtype
    from .estimator import estimate as predict
    from .measure import call

    leaves = torch.utils._pytree.tree_leaves(call_arguments(inputs, model_dtype(model)))
    if any(isinstance(v, Tensor) and v.device.type == "meta" for v in leaves):
        raise ValueError(
            "a real run needs real inputs: give tensors with values in place of shapes"
        )
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError("a real run needs a model with weights; this one is on the meta device")
    made = estimate
    if made is None:
        made = predict(model, None, inputs, target=target_of(model), calibrated=False)
    measured = call(model, inputs, repeats=1)
    found = keep_measurement(made, measured.activations_bytes, keep=keep)
    return Verification(**{**vars(found), "seconds": measured.seconds})


def keep_measurement(
    estimate: MemoryEstimate, measured_activations_bytes: int, *, keep: bool = True
) -> Verification:
    """Keep what a real run of the estimate's call held at most, weights and inputs not counted.

    Later estimates of the same model, formats, shapes, device and versions that predict the same
    use it, and say so. With `keep=False` only the comparison is made. A cache folder that cannot be
    written is noted. Raises ValueError for a negative count, and for an estimate without inputs.
    """
    bytes_ = measured_activations_bytes
    if isinstance(bytes_, bool) or not isinstance(bytes_, int) or bytes_ < 0:
        raise ValueError(f"measured bytes are a whole number from 0 on, got {bytes_!r}")
    if not estimate.identity or estimate.predicted_bytes is None:
        raise ValueError(
            "this estimate is of weights alone, so that no run can be compared with it; give "
            "estimate(inputs=…)"
        )
    notes = Measured(estimate.identity).put(estimate, bytes_) if keep else []
    return Verification(
        predicted_bytes=estimate.predicted_bytes,
        measured_bytes=bytes_,
        weights_bytes=estimate.weights_bytes,
        interval_bytes=estimate.activations_interval_bytes,
        kept=keep and not notes,
        notes=notes,
    )


def target_of(model: nn.Module) -> str:
    """The target, as `estimate` takes it, of the device that a model's parameters are on."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}.{minor}"


def device_name(target: str) -> str:
    """The device here that stands for a target: the CUDA device's name, or the processor's."""
    if target.startswith("cuda"):
        return torch.cuda.get_device_name() if torch.cuda.is_available() else target
    return f"CPU, {torch.get_num_threads()} threads"


def identity(model: nn.Module, args: Any, kwargs: Mapping[str, Any], target: str, more: str) -> str:
    """A name for a call: of which model, with which shapes, where, and by which versions.

    `model` may have fake parameters; `more` is what else changes the call. Values of tensors are
    not part of it.
    """
    from . import __version__

    about = [__version__, torch.__version__, target, more]
    if target == "cpu":
        about += [str(torch.get_num_threads()), processor()]
    state: list[Any] = []
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        formats = ""
        if isinstance(module, QuantizedLayer):
            formats = f"{module.format_names} {module.compute_dtype}"
        state.append((name, kind, formats, module.training))
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        state.append((name, str(value.dtype), tuple(value.shape)))
    leaves, spec = torch.utils._pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
    given = [
        (str(v.dtype), tuple(v.shape))
        if isinstance(v, Tensor)
        else repr(v)
        if isinstance(v, (bool, int, float, str, type(None), torch.dtype))
        else type(v).__qualname__
        for v in leaves
    ]
    text = json.dumps([about, state, given, str(spec)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Measured:
    """The files of one identity."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.name = name
        self.folder = (folder or cache_folder()) / "measured"
        self.notes: list[str] = []

    def _paths(self) -> list[Path]:
        def age(path: Path) -> float:
            try:
                return path.stat().st_mtime
            except OSError:  # gone by now: another process made room
                return 0.0

        return sorted(self.folder.glob(f"{self.name}-*.json"), key=age)

    def runs(self) -> list[dict[str, Any]]:
        """All that can be read, oldest first; what cannot is in `notes`."""
        found = []
        for path in self._paths():
            try:
                data = json.loads(path.read_text())
                if data["schema"] != SCHEMA or data["identity"] != self.name:
                    raise ValueError("it is not what its name says")
                for key in ("predicted_bytes", "measured_bytes"):
                    if type(data[key]) is not int or data[key] < 0:
                        raise ValueError(f"{key} is {data[key]!r}")
                found.append({**data, "when": str(data["when"]), "device": str(data["device"])})
            except FileNotFoundError:
                continue  # another process made room in between
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.notes.append(f"{path} could not be read ({error}), and was not used")
        return found

    def put(self, estimate: MemoryEstimate, measured: int) -> list[str]:
        """Write one measurement; returns what went wrong."""
        data = {
            "schema": SCHEMA,
            "identity": self.name,
            "predicted_bytes": estimate.predicted_bytes,
            "measured_bytes": measured,
            "device": device_name(estimate.target),
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        path = self.folder / f"{self.name}-{estimate.predicted_bytes}-{measured}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(data))
            for old in self._paths()[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            return [f"the measurement was not kept: {error}"]
        return []

    def applied(self, predicted: int) -> tuple[Calibrated | None, list[str]]:
        """What runs measured of which the same was predicted, and sentences on it."""
        runs = self.runs()
        same = [run for run in runs if run["predicted_bytes"] == predicted]
        if not same:
            lines = list(self.notes)
            if runs:
                last = runs[-1]
                lines.append(
                    f"a real run of these shapes ({last['when']}) held "
                    f"{format_size(last['measured_bytes'])} where "
                    f"{format_size(last['predicted_bytes'])} were predicted; now the prediction is "
                    "another (other values or options), so it was not used"
                )
            return None, lines
        figures = [run["measured_bytes"] for run in same]
        last = max(same, key=lambda run: run["when"])
        used = Calibrated(last["when"], last["device"], predicted, min(figures), max(figures))
        sentence = (
            f"activations are those of a real run on {used.device} ({used.when}), which held "
            f"{used.most_bytes} bytes where {predicted} were predicted; calibrated=False gives the "
            "prediction"
        )
        return used, [sentence, *self.notes]
