"""Conversion of live models: choose a format for each layer, encode natively, swap in place."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._operators import StoredParts, encode
from .errors import NonFiniteWeightError
from .formats import StorageFormat, get_format
from .layers import QuantizedLayer, find_kind, swap, unswap
from .precision import PrecisionMode
from .sizes import format_size

if TYPE_CHECKING:
    from .calibration import Calibration

Precision = str | PrecisionMode | StorageFormat
Progress = Callable[[int, int, str], None]

# Routers of mixtures of experts: a few bytes, and a rounded one sends tokens to other experts.
SENSITIVE = (r"(^|\.)router(\.|$)", r"(^|\.)gate$", r"(^|\.)shared_expert_gate$")


@dataclass(frozen=True)
class LayerReport:
    """One converted layer: its name, class, format, and bytes before and after."""

    name: str
    kind: str
    format: str
    bytes: int
    original_bytes: int


@dataclass
class ConversionReport:
    """What a conversion did, in bytes.

    `left_out` holds (name, reason, bytes) of every parameter that keeps its plain form, and
    `uncalibrated`, where calibration data was given, (name, reason) of layers rounded without it.
    """

    layers: list[LayerReport] = field(default_factory=list)
    left_out: list[tuple[str, str, int]] = field(default_factory=list)
    uncalibrated: list[tuple[str, str]] = field(default_factory=list)

    @property
    def original_bytes(self) -> int:
        """Bytes of all parameters before."""
        return sum(r.original_bytes for r in self.layers) + sum(n for _, _, n in self.left_out)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters after."""
        return sum(r.bytes for r in self.layers) + sum(n for _, _, n in self.left_out)

    @property
    def coverage_bytes_fraction(self) -> float:
        """Share of the original parameter bytes that are now in a storage format."""
        total = self.original_bytes
        return sum(r.original_bytes for r in self.layers) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; keys named `*_bytes` are bytes."""
        return {
            "original_bytes": self.original_bytes,
            "converted_bytes": self.bytes,
            "coverage_bytes_fraction": self.coverage_bytes_fraction,
            "layers": [vars(layer) for layer in self.layers],
            "left_out": [
                {"name": name, "reason": reason, "left_out_bytes": n}
                for name, reason, n in self.left_out
            ],
            "uncalibrated": [
                {"name": name, "reason": reason} for name, reason in self.uncalibrated
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers converted: {format_size(self.original_bytes)} -> "
            f"{format_size(self.bytes)}, coverage {self.coverage_bytes_fraction:.2%} of the bytes"
        ]
        reasons: dict[str, tuple[int, int]] = {}
        for _, reason, n in self.left_out:
            count, size = reasons.get(reason, (0, 0))
            reasons[reason] = (count + 1, size + n)
        lines += [f"  left out: {c} ({format_size(n)}): {r}" for r, (c, n) in reasons.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from .report.html import table

        rows = [
            (r.name, r.kind, r.format, format_size(r.original_bytes), format_size(r.bytes))
            for r in self.layers
        ]
        return table(("layer", "kind", "format", "before", "after"), rows, caption=str(self))

    def plot(self) -> Any:
        """A matplotlib figure: bytes by layer, before and after, coloured by format."""
        from .report.plots import plan_figure

        return plan_figure(
            SimpleNamespace(entries=self.layers, weights_bytes=self.bytes, limit_bytes=None)
        )


@dataclass
class Candidate:
    """A layer that can be converted, with every module that shares its weight."""

    name: str
    module: nn.Module
    tied: list[tuple[str, nn.Module]]

    @property
    def weight(self) -> Tensor:
        """The plain weight."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def kind(self) -> str:
        """Name of the layer's class."""
        return type(self.module).__name__

    @property
    def original_bytes(self) -> int:
        """Bytes of the plain weight."""
        return self.weight.numel() * self.weight.element_size()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's `name` is one of `patterns`: full name, parent, last part(s), or glob."""
    for pattern in patterns:
        if (
            name == pattern
            or name.startswith(pattern + ".")
            or name.endswith("." + pattern)
            or fnmatch.fnmatchcase(name, pattern)
        ):
            return True
    return False


def candidates(
    model: nn.Module, skip: Iterable[str] = ()
) -> tuple[list[Candidate], list[tuple[str, str, int]]]:
    """The layers of `model` that can be converted, and (name, reason, bytes) of what cannot.

    Modules that share a weight are one candidate. A weight that something else shares too (a layer
    without a converted form, a raw parameter) is left out.
    """
    skip = list(skip)
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module_name, leaf, module))
    found, left_out = [], []
    for users in owners.values():
        name, leaf, module = users[0]
        parameter = module._parameters[leaf]
        assert parameter is not None
        reason = _reason_to_leave(users, skip)
        if reason is None:
            tied = [(n, m) for n, _, m in users[1:]]
            found.append(Candidate(name, module, tied))
        else:
            full = f"{name}.{leaf}" if name else leaf
            left_out.append((full, reason, parameter.numel() * parameter.element_size()))
    return found, left_out


def _reason_to_leave(users: list[tuple[str, str, nn.Module]], skip: list[str]) -> str | None:
    for name, leaf, module in users:
        if isinstance(module, QuantizedLayer) and leaf != "bias":
            return "already converted"
        if leaf == "bias":
            return "biases stay plain"
        if find_kind(module) is None:
            return f"{type(module).__name__} stays plain"
        if leaf != "weight":
            return f"a parameter named {leaf!r} stays plain"
        if getattr(module, "max_norm", None) is not None:
            return "an embedding with max_norm changes its weight in use"
        if matches(name, skip):
            return "skipped on request"
        if any(re.search(pattern, name) for pattern in SENSITIVE):
            return "sensitive: routers stay plain"
        parameter = module._parameters[leaf]
        assert parameter is not None
        if not parameter.is_floating_point():
            return f"dtype {parameter.dtype} is no float"
        if parameter.numel() == 0:
            return "empty"
    return None


def check_weight(name: str, weight: Tensor, fmt: StorageFormat) -> None:
    """Raise NonFiniteWeightError, with the layer's name, for what `fmt` cannot hold."""
    if weight.device.type == "meta" or weight.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(weight.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise NonFiniteWeightError(
            f"the weight of {name!r} holds NaN or infinity; repair it or name it in skip="
        )
    limit = {"fp16": 65504.0, "int4": 65504.0 * 15}.get(fmt.name.split("_g")[0])
    if limit is not None and max(-low, high, high - low) > limit:
        raise NonFiniteWeightError(
            f"the weight of {name!r} reaches {max(-low, high):.4g}, more than {fmt.name} holds; "
            "choose bf16 or another format for it, or name it in skip="
        )


def check_names(precision: Mapping[str, Precision | None], found: list[Candidate]) -> None:
    """Raise ValueError for a name in `precision` that no layer has."""
    unknown = set(precision) - {c.name for c in found}
    if unknown:
        raise ValueError(
            f"no layer to convert is named {sorted(unknown)[0]!r} (of {len(unknown)} such names); "
            "the names are those of the model's named_modules()"
        )


def _formats_for(
    found: list[Candidate], precision: Precision | Mapping[str, Precision | None]
) -> list[tuple[Candidate, StorageFormat]]:
    if not isinstance(precision, Mapping):
        fmt = storage_format(precision)
        return [(c, fmt) for c in found]
    check_names(precision, found)
    chosen = []
    for candidate in found:
        wanted = precision.get(candidate.name)
        if wanted is not None and wanted != PrecisionMode.FP32:
            chosen.append((candidate, storage_format(wanted)))
    return chosen


def storage_format(precision: Precision) -> StorageFormat:
    """The format that a precision stores weights in; ValueError where it has none."""
    if isinstance(precision, StorageFormat):
        return precision
    if not isinstance(precision, str):
        raise TypeError(
            f"a precision is a name, a PrecisionMode or a StorageFormat, not {precision!r}"
        )
    if isinstance(precision, PrecisionMode) or precision.strip().lower() in list(PrecisionMode):
        mode = PrecisionMode.parse(precision)
        if mode is PrecisionMode.FP32:
            raise ValueError("fp32 is plain storage: use vramkit.restore(model, 'fp32')")
        if mode in (PrecisionMode.INT8_DYNAMIC, PrecisionMode.LLM_INT8):
            raise ValueError(
                f"{mode.value} quantizes activations, which this version does not do; "
                "int8 stores weights in the same bytes"
            )
    return get_format(precision)


@torch.no_grad()
def convert(
    model: nn.Module,
    precision: Precision | Mapping[str, Precision | None],
    *,
    skip: Iterable[str] = (),
    calibration: Calibration | Iterable[Any] | None = None,
    calibration_memory: str | float = "1 GiB",
    progress: bool | Progress = False,
) -> ConversionReport:
    """Store the weights of `model`'s layers in another format, in place.

    Args:
        model: Any module. Linear and Embedding layers are converted; tied ones stay tied.
        precision: One precision or format for all, or one by layer name (others stay plain).
        skip: Layers to leave plain: full names, parents, last parts ("lm_head") or globs.
        calibration: Batches like those of later use (Tensors, tuples or dicts), or a `Calibration`
            collected on this model: codes are then chosen for the least error of the layers'
            outputs on such inputs (docs/calibration.md). Layers that no batch reaches are rounded
            to nearest, with a warning and in the report.
        calibration_memory: What the collected data may take (GiB, or a string with its unit); the
            batches are run once for each group of layers that fits it.
        progress: True for a progress bar, or a function of (bytes done, bytes in all, layer name).

    Every weight is encoded before the first layer changes: after an error or an interrupt the model
    is what it was. Raises NonFiniteWeightError for NaN, infinity or overflow, and ValueError for an
    unknown precision or layer name.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> vramkit.convert(model, "nf4").bytes
    2560
    """
    found, left_out = candidates(model, skip)
    chosen = _formats_for(found, precision)
    names = {c.name for c, _ in chosen}
    left_out += [
        (f"{c.name}.weight", "no format chosen for it", c.original_bytes)
        for c in found
        if c.name not in names
    ]
    for candidate, fmt in chosen:
        check_weight(candidate.name, candidate.weight, fmt)
    report = ConversionReport(left_out=left_out)
    encoded: list[tuple[Candidate, StoredParts]] = []
    total = sum(c.original_bytes for c, _ in chosen)
    with progress_bar(progress, total, "convert") as advance:
        if calibration is not None:
            from .calibration import encode_calibrated

            encoded, report.uncalibrated = encode_calibrated(
                model,
                chosen,
                calibration,
                memory=calibration_memory,
                done=lambda candidate: advance(candidate.original_bytes, candidate.name),
            )
            chosen = []
        for candidate, fmt in chosen:
            encoded.append((candidate, encode_weight(candidate.weight, fmt)))
            advance(candidate.original_bytes, candidate.name)
    for candidate, parts in encoded:
        report.layers.append(
            LayerReport(
                candidate.name,
                candidate.kind,
                parts.fmt.name,
                parts.nbytes,
                candidate.original_bytes,
            )
        )
        swap_candidate(candidate, parts)
    keep_ties(model)
    return report


def encode_weight(weight: Tensor, fmt: StorageFormat) -> StoredParts:
    """Encode a weight; on the meta device, only the shapes."""
    return encode(weight, fmt)


def swap_candidate(candidate: Candidate, parts: StoredParts) -> None:
    """Swap a candidate's module, and those tied to it, onto `parts`."""
    dtype = candidate.weight.dtype
    first = swap(candidate.module, parts, dtype)
    for _, module in candidate.tied:
        swap(module, parts, dtype, share=first)


def keep_ties(model: nn.Module) -> None:
    """Rewrite transformers' maps of tied keys from `.weight` to the parts that are tied now.

    save_pretrained drops the shared copies by these maps, and refuses a model that lacks them.
    """
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict) and keys:
                setattr(module, attribute, dict(_tied_pairs(module, keys)))


def _tied_pairs(module: nn.Module, keys: dict[str, str]) -> Iterator[tuple[str, str]]:
    for target, source in keys.items():
        owner_name, _, leaf = target.rpartition(".")
        try:
            owner: nn.Module | None = module.get_submodule(owner_name)
        except AttributeError:
            owner = None
        if leaf == "weight" and isinstance(owner, QuantizedLayer):
            source_owner = source.rpartition(".")[0]
            for part, value in owner._parameters.items():
                if part != "bias" and value is not None:
                    yield f"{owner_name}.{part}", f"{source_owner}.{part}"
        else:
            yield target, source


class progress_bar:
    """A context that gives `advance(bytes, layer name)`: a bar, a caller's function, or nothing."""

    def __init__(self, progress: bool | Progress, total: int, label: str, unit: str = "B") -> None:
        self.total, self.done, self.bar = total, 0, None
        self.callback = progress if callable(progress) else None
        if progress is True:
            from tqdm.auto import tqdm

            in_bytes = unit == "B"
            self.bar = tqdm(
                total=total or None,
                unit=unit,
                unit_scale=in_bytes,
                unit_divisor=1024 if in_bytes else 1000,
                desc=label,
            )

    def advance(self, n: int, name: str) -> None:
        """Count `n` more bytes."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        if self.callback is not None:
            self.callback(self.done, self.total, name)

    def __enter__(self) -> Callable[[int, str], None]:
        return self.advance

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


@torch.no_grad()
def restore(model: nn.Module, dtype: str | PrecisionMode | torch.dtype | None = None) -> nn.Module:
    """Turn converted layers back into the plain layers they were, in place, layer by layer.

    Args:
        model: A model with converted layers; plain layers are cast to `dtype` too.
        dtype: fp32, fp16 or bf16 (or the torch dtype). None: each layer's compute dtype.

    The bits that the format dropped do not return: a restored weight is the decoded one.
    """
    target = None if dtype is None else _plain_dtype(dtype)
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if isinstance(module, QuantizedLayer):
            key = id(module._parameters["codes"])
            if key not in made:
                dense = module.dense_weight(target)
                made[key] = nn.Parameter(dense, requires_grad=False)
            unswap(module, made[key])
    if target is not None:
        model.to(target)
    _plain_ties(model)
    return model


def _plain_ties(model: nn.Module) -> None:
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict) and any(k.endswith(".codes") for k in keys):
                plain = {
                    re.sub(r"\.codes$", ".weight", k): re.sub(r"\.codes$", ".weight", v)
                    for k, v in keys.items()
                    if not k.endswith((".scales", ".extra"))
                }
                setattr(module, attribute, plain)


def _plain_dtype(dtype: str | PrecisionMode | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"restore to float32, float16 or bfloat16, not {dtype}")
        return dtype
    mode = PrecisionMode.parse(dtype)
    if mode not in (PrecisionMode.FP32, PrecisionMode.FP16, PrecisionMode.BF16):
        raise ValueError(f"restore gives plain layers: fp32, fp16 or bf16, not {mode.value}")
    return mode.torch_dtype


@torch.no_grad()
def set_weight(layer: nn.Module, tensor: Tensor) -> None:
    """Give a layer a new weight of the same shape; a converted layer encodes it.

    Raises ValueError for another shape, NonFiniteWeightError for what the format cannot hold.
    """
    weight: Any = layer.weight
    shape = tuple(weight.shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"expected a weight of shape {shape}, got {tuple(tensor.shape)}")
    if isinstance(layer, QuantizedLayer):
        check_weight(type(layer).__name__, tensor, layer.storage_format)
        parts = encode(tensor.to(layer.codes.device), layer.storage_format)
        for name in ("codes", "scales", "extra"):
            part = getattr(parts, name)
            if part is not None:
                getattr(layer, name).copy_(part)
    else:
        layer.weight.copy_(tensor)  # type: ignore[operator]
