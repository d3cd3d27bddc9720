"""Conversion of live models: choose a format for each layer, encode natively, swap in place."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._operators import StoredParts, encode
from ._operators_int8 import LONGEST_ROW
from ._stochastic import check_rounding, encode_rounded
from .bnb_config import QuantizationConfig, resolve
from .candidates import Candidate, Parameters, User, candidates, matches
from .errors import NonFiniteWeightError
from .formats import StorageFormat, get_format
from .layers import QuantizedLayer, find_kind, is_layer_weight, swap, unswap
from .layers.base import PART_NAMES, part_name
from .precision import PrecisionMode
from .sizes import format_size

if TYPE_CHECKING:
    from .calibration import Calibration

__all__ = ["Candidate", "candidates", "convert", "matches", "restore", "set_weight"]

Precision = str | PrecisionMode | StorageFormat
Progress = Callable[[int, int, str], None]


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

    `left_out` holds (name, reason, bytes) of every parameter that keeps its plain form; `folded`
    holds (name, what) of every weight that was computed, by weight norm for example, and is plain
    storage now; `uncalibrated`, where calibration data was given, (name, reason) of layers that
    were rounded without it.
    """

    layers: list[LayerReport] = field(default_factory=list)
    left_out: list[tuple[str, str, int]] = field(default_factory=list)
    folded: list[tuple[str, str]] = field(default_factory=list)
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
            "folded": [{"name": name, "what": what} for name, what in self.folded],
            "uncalibrated": [
                {"name": name, "reason": reason} for name, reason in self.uncalibrated
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers converted: {format_size(self.original_bytes)} -> "
            f"{format_size(self.bytes)}, coverage {self.coverage_bytes_fraction:.2%} of the bytes"
        ]
        for what in dict.fromkeys(what for _, what in self.folded):
            lines.append(f"  folded: {sum(w == what for _, w in self.folded)} by {what}")
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
    known = {name for c in found for user in c.users for name in (user.layer_name, user.name)}
    unknown = set(precision) - known
    if unknown:
        raise ValueError(
            f"no layer to convert is named {sorted(unknown)[0]!r} (of {len(unknown)} such names); "
            "the names are those of the model's named_modules(), or of parameters other than weight"
        )


def precision_of(
    precision: Mapping[str, Precision | None], candidate: Candidate
) -> Precision | None:
    """What `precision` says of a candidate: by its names, else by its modules'."""
    names = [user.layer_name for user in candidate.users] + [user.name for user in candidate.users]
    return next((precision[name] for name in names if name in precision), None)


def formats_for(
    found: list[Candidate], precision: Precision | Mapping[str, Precision | None]
) -> tuple[list[tuple[Candidate, StorageFormat]], dict[str, str]]:
    """The layers to convert with their formats, and by name the reason to leave others out."""
    if isinstance(precision, Mapping):
        check_names(precision, found)
    else:
        storage_format(precision)
    chosen, left = [], {}
    for candidate in found:
        wanted = precision_of(precision, candidate) if isinstance(precision, Mapping) else precision
        if wanted is None or wanted == PrecisionMode.FP32:
            left[candidate.name] = "no format chosen for it"
            continue
        fmt = storage_format(wanted)
        reason = reason_against(candidate, fmt)
        if reason is None:
            chosen.append((candidate, format_in(candidate, fmt)))
        else:
            left[candidate.name] = reason
    return chosen, left


def _multiplies(user: User, fmt: StorageFormat) -> bool:
    """Whether this use of a weight is a product that can quantize its other side as `fmt` does."""
    layer = is_layer_weight(user.module, user.leaf)
    kind = find_kind(user.module) if layer else None
    return fmt.activations in getattr(kind, "activation_modes", ("",))


def reason_against(candidate: Candidate, fmt: StorageFormat) -> str | None:
    """Why a candidate cannot have a format that quantizes activations; None where it can."""
    if not fmt.activations:
        return None
    for user in candidate.users:
        gathers = isinstance(user.module, (nn.Embedding, nn.EmbeddingBag))
        if not (gathers or _multiplies(user, fmt)):
            return f"{fmt.name} quantizes activations, which {candidate.kind} has no kernel for"
    if candidate.matrix_shape[1] > LONGEST_ROW:
        return f"int32 sums of more than {LONGEST_ROW} products could overflow"
    return None


def format_in(candidate: Candidate, fmt: StorageFormat) -> StorageFormat:
    """`fmt` itself, or its weight-only form where nothing multiplies the weight."""
    return fmt if any(_multiplies(user, fmt) for user in candidate.users) else fmt.weight_only


def storage_format(precision: Precision) -> StorageFormat:
    """The format that a precision stores weights in; ValueError where it has none."""
    if isinstance(precision, StorageFormat):
        return precision
    if not isinstance(precision, str):
        raise TypeError(
            f"a precision is a name, a PrecisionMode or a StorageFormat, not {precision!r}"
        )
    if str(precision).strip().lower() == PrecisionMode.FP32:
        raise ValueError("fp32 is plain storage: use vramkit.restore(model, 'fp32')")
    return get_format(precision)


@torch.no_grad()
def convert(
    model: nn.Module,
    precision: Precision | Mapping[str, Precision | None] | QuantizationConfig,
    *,
    skip: Iterable[str] = (),
    parameters: Parameters = True,
    calibration: Calibration | Iterable[Any] | None = None,
    calibration_memory: str | float = "1 GiB",
    rounding: str = "nearest",
    seed: int = 0,
    progress: bool | Progress = False,
) -> ConversionReport:
    """Store the weights of `model`'s layers in another format, in place.

    Converted are the weights of Linear, Bilinear, Embedding, EmbeddingBag, convolutions and
    transposed ones of 1 to 3 dimensions, LSTM, GRU, RNN and their cells, the input projections of
    MultiheadAttention, and raw parameters such as stacked experts (docs/layers.md). What is tied
    stays tied. Weight norm, spectral norm and parametrizations are folded first.

    Args:
        model: Any module.
        precision: One precision or format for all, or one by name (others stay plain). A layer's
            `weight` has the layer's name, any other parameter its own; the name of a module with
            several stands for all of them. Or transformers' `BitsAndBytesConfig`, or any object
            with its fields (docs/interop.md): honoured, or refused by the field's name.
        skip: What to leave plain: full names, parents, last parts ("lm_head") or globs.
        parameters: Raw parameters outside torch's own layers. True: those of two dimensions or
            more and at least 16,384 elements; False: none; names or globs: those, of any size.
        calibration: Batches like those of later use (Tensors, tuples or dicts), or a `Calibration`
            collected on this model: codes are then chosen for the least error of the layers'
            outputs on such inputs (docs/calibration.md). Layers that no batch reaches are rounded
            to nearest, with a warning and in the report.
        calibration_memory: What the collected data may take (GiB, or a string with its unit); the
            batches are run once for each group of layers that fits it.
        rounding: "nearest", or "stochastic": up or down at random, so that the error's mean is 0
            (docs/formats.md); for fp16, bf16, fp8, fp8_e5m2 and the int8 formats.
        seed: Of stochastic rounding: the same bits on every device for the same seed.
        progress: True for a progress bar, or a function of (bytes done, bytes in all, layer name).

    int8_dynamic and llm_int8 quantize the activations of Linear and recurrent layers too;
    embeddings are int8 there, other layers stay plain. `get_format("llm_int8")` has a method
    `with_threshold` for LLM.int8's outlier threshold (6.0), as has the name "llm_int8@5.0".

    Every weight is encoded before the first layer changes: after an error or an interrupt the model
    is what it was. Raises NonFiniteWeightError for NaN, infinity or overflow, and ValueError for an
    unknown precision or layer name (PrecisionConfigError for a config that cannot be honoured).

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> vramkit.convert(model, "nf4").bytes
    2560
    """
    check_rounding(rounding, seed)
    if rounding != "nearest" and calibration is not None:
        raise ValueError("calibrated codes are chosen, not rounded: leave out calibration=")
    wanted, skip, request = resolve(precision, skip)
    on_cpu = request.on_cpu(model) if request is not None else []
    found, left_out = candidates(model, (*skip, *on_cpu), parameters)
    chosen, reasons = formats_for(found, wanted)
    left_out += [
        (c.full_name, reasons[c.name], c.original_bytes) for c in found if c.name in reasons
    ]
    for candidate, fmt in chosen:
        check_weight(candidate.name, candidate.weight, fmt)
    report = ConversionReport(left_out=left_out)
    report.folded = [(c.name, c.folding.kind) for c, _ in chosen if c.folding is not None]
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
        for number, (candidate, fmt) in enumerate(chosen):
            parts = encode_rounded(
                candidate.weight, fmt, candidate.lead, rounding=rounding, seed=seed + number
            )
            encoded.append((candidate, parts))
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
    if request is not None:
        request.finish(model, on_cpu)
    if "peft.tuners.lora.model" in sys.modules:
        from .interop.peft import register

        register()  # adapters that are made on these layers can merge
    return report


def encode_candidate(candidate: Candidate, weight: Tensor, fmt: StorageFormat) -> StoredParts:
    """Encode a candidate's weight; on the meta device, only the shapes."""
    return encode(weight, fmt, candidate.lead)


def swap_candidate(candidate: Candidate, parts: StoredParts) -> None:
    """Swap a candidate's module, and those tied to it, onto `parts`; fold it first if need be."""
    dtype = candidate.weight.dtype
    if candidate.folding is not None:
        candidate.folding.apply()
    first = swap(candidate.module, parts, dtype, name=candidate.leaf)
    for user in candidate.users[1:]:
        swap(user.module, parts, dtype, (first, candidate.leaf), user.leaf)


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
        owner, leaf = _owner(module, target)
        source_owner, source_leaf = _owner(module, source)
        if owner is None or source_owner is None:
            yield target, source
            continue
        for part in PART_NAMES:
            if owner._parameters.get(part_name(leaf, part)) is not None:
                yield (
                    target.removesuffix(leaf) + part_name(leaf, part),
                    source.removesuffix(source_leaf) + part_name(source_leaf, part),
                )


def _owner(module: nn.Module, name: str) -> tuple[QuantizedLayer | None, str]:
    """The layer that stores parameter `name`, and what it calls it; None where none does."""
    owner_name, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(owner_name)
    except AttributeError:
        return None, leaf
    stored = isinstance(owner, QuantizedLayer) and leaf in owner.stored_names
    return (owner if stored else None), leaf  # type: ignore[return-value]


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
            plain = {}
            for name in module.stored_names:
                key = id(module.stored_part(name, "codes"))
                if key not in made:
                    dense = module.dense_weight(target, name)
                    made[key] = nn.Parameter(dense, requires_grad=False)
                plain[name] = made[key]
            unswap(module, plain)
    if target is not None:
        model.to(target)
    _plain_ties(model)
    return model


def _plain_ties(model: nn.Module) -> None:
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict) and any(k.endswith("codes") for k in keys):
                plain = {
                    _plain_name(k): _plain_name(v)
                    for k, v in keys.items()
                    if not k.endswith(("scales", "extra"))
                }
                setattr(module, attribute, plain)


def _plain_name(name: str) -> str:
    """`head.codes` -> `head.weight`; `experts.down_proj_codes` -> `experts.down_proj`."""
    return re.sub(r"(^|\.)codes$", r"\1weight", name).removesuffix("_codes")


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
def set_weight(
    layer: nn.Module,
    tensor: Tensor,
    name: str = "weight",
    *,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """Give a layer a new weight (or parameter `name`) of the same shape; a stored one is encoded.

    `rounding` and `seed` are `convert`'s: with "stochastic", and another seed each time, a weight
    that is updated again and again keeps on average what its format is too coarse for.

    Raises ValueError for another shape, NonFiniteWeightError for what the format cannot hold.
    """
    check_rounding(rounding, seed)
    weight: Any = getattr(layer, name)
    shape = tuple(weight.shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"expected a weight of shape {shape}, got {tuple(tensor.shape)}")
    if isinstance(layer, QuantizedLayer) and name in layer.stored_names:
        stored = layer.stored_parameter(name)
        check_weight(type(layer).__name__, tensor, stored.fmt)
        device = layer.stored_part(name, "codes").device
        parts = encode_rounded(
            tensor.to(device), stored.fmt, stored.lead, rounding=rounding, seed=seed
        )
        for part in PART_NAMES:
            value = getattr(parts, part)
            if value is not None:
                layer.stored_part(name, part).copy_(value)
    else:
        weight.copy_(tensor)
