"""Two models' weights against each other, tensor by tensor, without a class that runs them.

A side is a checkpoint (a safetensors file, a folder of shards, a folder that vramkit converted) or
a module in memory. Stored layers are decoded; one tensor of each side is in memory at a time.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ._operators import StoredParts, _part_shapes, matrix_shape
from .errors import CheckpointError
from .formats import StorageFormat
from .layers import QuantizedLayer
from .layers.base import PART_NAMES, part_name
from .manifest import read_manifest
from .shards import WEIGHTS, Checkpoint
from .sizes import format_size
from .skeleton import MANIFEST

__all__ = ["TensorError", "WeightComparison", "compare_weights"]

# Elements compared at once: a few float64 copies of as many stay under 20 MB.
_CHUNK = 1 << 19
# What bitsandbytes and other tools store beside codes, which mean nothing without their tables.
_FOREIGN_PARTS = (".absmax", ".quant_map", ".SCB", ".qzeros", ".g_idx", ".weight_scale")


@dataclass(frozen=True)
class TensorError:
    """One weight of two models: ||b - a|| / ||a||, the cosine of the two, largest |b - a|.

    `formats` and `bytes` are of the first and of the second model; a format is a storage format's
    name, or a dtype's. NaN or infinity makes the errors infinite and the cosine 0.
    """

    name: str
    shape: tuple[int, ...]
    formats: tuple[str, str]
    bytes: tuple[int, int]
    relative_l2: float
    cosine: float
    max_error: float


@dataclass
class WeightComparison:
    """Two models' weights: all together, and by tensor in the order of the first model.

    `relative_l2` and `cosine` are of all weights that both have, as one vector; `bytes` and
    `reference_bytes` count every tensor of each model, as stored. `left_out` says (name, reason) of
    what could not be compared: tensors that one model lacks, or that have another shape.
    """

    relative_l2: float
    cosine: float
    max_error: float
    reference_bytes: int
    bytes: int
    tensors: list[TensorError] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether both have the same tensors with the same values."""
        return self.max_error == 0 and not self.left_out

    def worst(self, count: int = 10) -> list[TensorError]:
        """The tensors with the largest relative error that is not zero."""
        wrong = [tensor for tensor in self.tensors if tensor.relative_l2 > 0]
        return sorted(wrong, key=lambda tensor: -tensor.relative_l2)[:count]

    def to_dict(self) -> dict[str, Any]:
        """As plain data. JSON has no infinity: such a number is None here."""
        return {
            "kind": "weights",
            "identical": self.identical,
            "relative_l2": _plain(self.relative_l2),
            "cosine": self.cosine,
            "max_error": _plain(self.max_error),
            "reference_bytes": self.reference_bytes,
            "bytes": self.bytes,
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "reference_format": t.formats[0],
                    "format": t.formats[1],
                    "reference_bytes": t.bytes[0],
                    "bytes": t.bytes[1],
                    "relative_l2": _plain(t.relative_l2),
                    "cosine": t.cosine,
                    "max_error": _plain(t.max_error),
                }
                for t in self.tensors
            ],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }

    def __str__(self) -> str:
        ratio = f" ({self.bytes / self.reference_bytes:.1%})" if self.reference_bytes else ""
        text = (
            f"{len(self.tensors)} tensors: relative L2 {self.relative_l2:.4g}, cosine "
            f"{self.cosine:.6f}, largest error {self.max_error:.4g}; "
            f"{format_size(self.reference_bytes)} and {format_size(self.bytes)}{ratio}"
        )
        if self.left_out:
            text += f"\ntensors that could not be compared (see .left_out): {len(self.left_out)}"
        return text


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Source(Protocol):
    """The weights of one side, decoded one at a time."""

    label: str
    nbytes: int

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def format(self, name: str) -> str: ...

    def bytes_of(self, name: str) -> int: ...

    def read(self, name: str) -> Tensor: ...


class _Stored:
    """A checkpoint's weights."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        folder = Path(path)
        manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
        self._checkpoint = Checkpoint(folder if manifest is None else folder / WEIGHTS)
        self.label, self.nbytes = str(path), self._checkpoint.nbytes
        # name: (format, shape, names of codes, scales and extra)
        self._layers: dict[str, tuple[StorageFormat, tuple[int, ...], dict[str, str]]] = {}
        self._aliases: dict[str, str] = {}
        parts: set[str] = set()
        for layer, (fmt, shape, _) in (manifest or {"layers": {}})["layers"].items():
            name, stored = self._parts_of(layer, folder)
            self._layers[name] = fmt, shape, stored
            parts.update(stored.values())
        self._names = [name for name in self._checkpoint.names() if name not in parts]
        self._names += self._layers
        if manifest is not None:
            self._alias(manifest)

    def _parts_of(self, layer: str, folder: Path) -> tuple[str, dict[str, str]]:
        """The decoded tensor's name and its parts' of a layer as manifests name it."""
        prefix, _, leaf = layer.rpartition(".")
        for module, parameter in ((layer, "weight"), (prefix, leaf)):
            dot = f"{module}." if module else ""
            stored = {part: dot + part_name(parameter, part) for part in PART_NAMES}
            found = {part: name for part, name in stored.items() if name in self._checkpoint}
            if {"codes", "scales"} <= set(found):
                return dot + parameter, found
        raise CheckpointError(f"{folder}: its manifest lists {layer!r}, its weights lack its codes")

    def _alias(self, manifest: dict[str, Any]) -> None:
        """Shared tensors have each of their names."""
        for name, saved in manifest["aliases"].items():
            if saved in self._checkpoint and not name.endswith(tuple(PART_NAMES)):
                self._aliases[name] = saved
                self._names.append(name)
        for layer, source in manifest["tied"].items():
            target = next((n for n in (f"{source}.weight", source) if n in self._layers), None)
            if target is not None:
                name = f"{layer}.weight" if target.endswith(".weight") else layer
                self._aliases[name] = target
                self._names.append(name)

    def names(self) -> list[str]:
        return list(dict.fromkeys(self._names))

    def shape(self, name: str) -> tuple[int, ...]:
        name = self._aliases.get(name, name)
        if name in self._layers:
            return self._layers[name][1]
        return tuple(self._checkpoint.info(name).shape)

    def format(self, name: str) -> str:
        name = self._aliases.get(name, name)
        if name in self._layers:
            return self._layers[name][0].name
        return str(self._checkpoint.dtype(name)).removeprefix("torch.")

    def bytes_of(self, name: str) -> int:
        name = self._aliases.get(name, name)
        stored = self._layers[name][2].values() if name in self._layers else (name,)
        return sum(self._checkpoint.info(one).nbytes for one in stored)

    def read(self, name: str) -> Tensor:
        name = self._aliases.get(name, name)
        if name not in self._layers:
            return self._checkpoint.read(name)
        fmt, shape, stored = self._layers[name]
        parts = {part: self._checkpoint.read(one) for part, one in stored.items()}
        codes, scales, extra = (parts.get(part) for part in PART_NAMES)
        assert codes is not None
        assert scales is not None
        lead = self._lead(name, fmt, shape, codes, scales, extra)
        return StoredParts(fmt, shape, codes, scales, extra, lead).dense(torch.float32)

    def _lead(
        self,
        name: str,
        fmt: StorageFormat,
        shape: tuple[int, ...],
        codes: Tensor,
        scales: Tensor,
        extra: Tensor | None,
    ) -> int:
        """How many leading dimensions are rows: the first number that the parts' shapes fit."""
        none = torch.empty(0, dtype=torch.uint8)
        found = [tuple(t.shape) for t in (codes, scales, none if extra is None else extra)]
        for lead in range(1, max(2, len(shape))):
            wanted = list(_part_shapes(fmt.spec, *matrix_shape(shape, lead)))
            sizes_fit = [math.prod(s) for s in wanted] == [math.prod(s) for s in found]
            if sizes_fit and wanted[0] == found[0] and wanted[1] == found[1]:
                return lead
        raise CheckpointError(
            f"{self.label}: {name!r} has codes and scales of shapes {found[0]} and {found[1]}, "
            f"which {fmt.name} of {list(shape)} has not"
        )


class _InMemory:
    """A module's weights: its state dict, with stored layers decoded under their plain names."""

    def __init__(self, model: nn.Module) -> None:
        self.label = type(model).__name__
        self._plain: dict[str, Tensor] = {}
        self._layers: dict[str, tuple[QuantizedLayer, str]] = {}
        state = model.state_dict(keep_vars=True)
        self.nbytes = sum({id(t): t.nbytes for t in state.values()}.values())
        parts: set[str] = set()
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer):
                dot = f"{name}." if name else ""
                for leaf in module.stored_names:
                    self._layers[dot + leaf] = module, leaf
                    parts.update(dot + part_name(leaf, part) for part in PART_NAMES)
        self._plain = {name: t.detach() for name, t in state.items() if name not in parts}
        meta = [name for name, tensor in state.items() if tensor.device.type == "meta"]
        if meta:
            raise ValueError(f"{self.label}: {meta[0]!r} is on the meta device and has no values")

    def names(self) -> list[str]:
        return [*self._plain, *self._layers]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._layers:
            layer, leaf = self._layers[name]
            return tuple(layer.stored_parameter(leaf).shape)
        return tuple(self._plain[name].shape)

    def format(self, name: str) -> str:
        if name in self._layers:
            layer, leaf = self._layers[name]
            return layer.stored_parameter(leaf).fmt.name
        return str(self._plain[name].dtype).removeprefix("torch.")

    def bytes_of(self, name: str) -> int:
        if name in self._layers:
            layer, leaf = self._layers[name]
            return layer.parts_of(leaf).nbytes
        return self._plain[name].nbytes

    def read(self, name: str) -> Tensor:
        if name in self._layers:
            layer, leaf = self._layers[name]
            return layer.parts_of(leaf).dense(torch.float32).cpu()
        return self._plain[name].cpu()


def compare_weights(
    reference: nn.Module | str | os.PathLike[str], model: nn.Module | str | os.PathLike[str]
) -> WeightComparison:
    """Compare the weights of two models, each a checkpoint's path or a module in memory.

    Tensors belong together by name; a prefix that only one side's names have (as transformers'
    base models lack it) is passed over. Stored layers are decoded to float32; other dtypes are
    compared as they are. Outputs are compared by `vramkit.compare`.

    Raises CheckpointError for an unsound checkpoint, FileNotFoundError, and ValueError where the
    two have no tensor of one name and shape.

    >>> a, b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    >>> _ = b.load_state_dict(a.state_dict())
    >>> compare_weights(a, b).identical
    True
    >>> _ = vramkit.convert(b, "int8")
    >>> 0 < compare_weights(a, b).relative_l2 < 0.01
    True
    """
    first, second = _source(reference), _source(model)
    there = _matches(first.names(), second.names())
    total, found = _Sums(), []
    left_out: list[tuple[str, str]] = []
    for name in first.names():
        other = there.get(name)
        if other is None:
            left_out.append((name, f"only in {first.label}"))
        elif first.shape(name) != second.shape(other):
            shapes = f"{list(first.shape(name))} and {list(second.shape(other))}"
            left_out.append((name, f"the shapes are {shapes}"))
        elif _is_foreign(first, name) or _is_foreign(second, other):
            left_out.append((name, "codes of another library, which only it decodes"))
        else:
            a, b = first.read(name), second.read(other)
            sums = _Sums()
            sums.add(a, b)
            total.merge(sums)
            found.append(
                TensorError(
                    name,
                    first.shape(name),
                    (first.format(name), second.format(other)),
                    (first.bytes_of(name), second.bytes_of(other)),
                    sums.relative_l2,
                    sums.cosine,
                    sums.largest,
                )
            )
    taken = set(there.values())
    left_out += [(n, f"only in {second.label}") for n in second.names() if n not in taken]
    if not found:
        raise ValueError(
            f"{first.label} and {second.label} have no tensor of one name and shape to compare: "
            f"the first has {_some(first)}, the second {_some(second)}"
        )
    return WeightComparison(
        total.relative_l2,
        total.cosine,
        total.largest,
        first.nbytes,
        second.nbytes,
        found,
        left_out,
    )


def _source(model: nn.Module | str | os.PathLike[str]) -> _Source:
    return _InMemory(model) if isinstance(model, nn.Module) else _Stored(model)


def _some(source: _Source) -> str:
    names = source.names()
    return f"{names[0]!r} and {len(names) - 1} more" if names else "none"


def _is_foreign(source: _Source, name: str) -> bool:
    """Whether a tensor is, or lies beside, what only another library can decode."""
    if source.format(name) not in ("uint8", "int8", "int32"):
        return False
    names = set(source.names())
    stem = name.removesuffix(".weight").removesuffix(".qweight")
    return any(name.endswith(p) or name + p in names or stem + p in names for p in _FOREIGN_PARTS)


def _matches(first: list[str], second: list[str]) -> dict[str, str]:
    """{name in the first: name in the second}: the same, or but for one side's common prefix."""
    others = set(second)
    found = {name: name for name in first if name in others}
    rest = [name for name in first if name not in others]
    free = others - set(found.values())
    for longer, shorter, forward in ((rest, free, True), (sorted(free), set(rest), False)):
        pairs = [(name, tail) for name in longer for tail in _tails(name) if tail in shorter]
        prefixes = Counter(name.removesuffix(tail) for name, tail in pairs)
        if prefixes:
            prefix = prefixes.most_common(1)[0][0]
            good = [(n, t) for n, t in pairs if n == prefix + t]
            found |= dict(good) if forward else {t: n for n, t in good}
            break
    return found


def _tails(name: str) -> Iterator[str]:
    """The name without its first part, its first two parts, and so on."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


class _Sums:
    """Running sums of one tensor's error, or of all."""

    def __init__(self) -> None:
        self.signal = self.other = self.dot = self.noise = self.largest = 0.0
        self.finite = True

    def add(self, reference: Tensor, tensor: Tensor) -> None:
        a, b = reference.reshape(-1), tensor.reshape(-1)
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        for first in range(0, a.numel(), _CHUNK):
            r, y = (t[first : first + _CHUNK].to(wide) for t in (a, b))
            if not bool(torch.isfinite(r).all()) or not bool(torch.isfinite(y).all()):
                self.finite, self.largest = False, math.inf
                return
            self.signal += float(r.abs().square().sum())
            self.other += float(y.abs().square().sum())
            self.dot += float((r.conj() * y).sum().real)
            apart = (y - r).abs()
            self.noise += float(apart.square().sum())
            self.largest = max(self.largest, float(apart.max()))

    def merge(self, other: _Sums) -> None:
        self.signal += other.signal
        self.other += other.other
        self.dot += other.dot
        self.noise += other.noise
        self.largest = max(self.largest, other.largest)
        self.finite &= other.finite

    @property
    def relative_l2(self) -> float:
        if not self.finite:
            return math.inf
        if self.signal == 0:
            return 0.0 if self.noise == 0 else math.inf
        return math.sqrt(self.noise / self.signal)

    @property
    def cosine(self) -> float:
        if not self.finite:
            return 0.0
        if self.signal == 0 or self.other == 0:
            return float(self.signal == self.other)
        return max(-1.0, min(1.0, self.dot / math.sqrt(self.signal * self.other)))
