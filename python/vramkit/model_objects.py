"""What a model manager does to the objects it holds: find their modules, convert, weigh, let go.

An object is a module, or any object that holds modules in its attributes (a pipeline).
"""

from __future__ import annotations

import os
import types
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .hardware import compute_dtype
from .precision import PrecisionMode

PLAIN_MODES = (PrecisionMode.FP32, PrecisionMode.FP16, PrecisionMode.BF16)

# Attributes of a module that torch's own traversal covers already.
_REGISTERED = {"_modules", "_parameters", "_buffers"}
_DEPTH = 4  # of plain objects within plain objects
_FOREIGN = ("ModelHandle", "VRAMEfficientModelManager")
# Values that cannot lead to a model, and that it would be costly or wrong to walk through.
_OPAQUE = (
    str, bytes, int, float, complex, bool, type(None), type, torch.Tensor, torch.dtype,
    torch.device, types.ModuleType, types.FunctionType, types.BuiltinFunctionType,
    types.MethodType, Path,
)  # fmt: skip


@dataclass(frozen=True)
class TensorShape:
    """Shape of a weight or buffer, and the bytes of one element as it was stored."""

    shape: tuple[int, ...]
    itemsize: int
    floating: bool

    def bytes_at(self, dtype: torch.dtype) -> int:
        """Bytes once floating-point tensors have this dtype."""
        count = 1
        for size in self.shape:
            count *= size
        return count * (dtype.itemsize if self.floating else self.itemsize)


def named_roots(obj: Any) -> list[tuple[str, nn.Module]]:
    """The modules that an object is or holds, by their paths in it; see `find_modules`.

    An object that is a module itself has the path "".
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    inside: set[int] = set()
    pending = deque([("", obj, 0)])

    def held(path: str, items: Iterable[tuple[Any, Any]], depth: int) -> None:
        dot = path + "." if path else ""
        pending.extend((f"{dot}{key}", value, depth) for key, value in items)

    while pending:
        path, value, depth = pending.popleft()
        # By type(): a handle says that it is of its model's class.
        opaque = isinstance(value, _OPAQUE) or type(value).__name__ in _FOREIGN
        if id(value) in seen or opaque:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append((path, value))
            for name, module in value.named_modules():
                if module is not value:
                    inside.add(id(module))
                seen.add(id(module))
                own = ((k, v) for k, v in vars(module).items() if k not in _REGISTERED)
                held(".".join(part for part in (path, name) if part), own, depth + 1)
        elif isinstance(value, dict):
            held(path, value.items(), depth)
        elif isinstance(value, (list, tuple, set, frozenset)):
            held(path, enumerate(value), depth)
        elif hasattr(value, "__dict__") and depth < _DEPTH:
            held(path, vars(value).items(), depth + 1)
    return [(path, module) for path, module in found if id(module) not in inside]


def find_modules(obj: Any) -> list[nn.Module]:
    """The modules that an object is or holds, none of them a registered child of another.

    Follows attributes, lists, tuples and dicts, through plain objects (four deep) and through what
    modules keep outside torch's registration (which `.to()` does not reach). Managers and handles
    are not followed: what they stand for is theirs.
    """
    return [module for _, module in named_roots(obj)]


def tensors_of(obj: Any) -> Iterator[torch.Tensor]:
    """Parameters and buffers of all modules of an object, shared ones once."""
    seen: set[int] = set()
    for module in find_modules(obj):
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def device_of(obj: Any) -> torch.device | None:
    """The device of the first weight; None without any."""
    return next((tensor.device for tensor in tensors_of(obj)), None)


def shapes_of(obj: Any) -> list[TensorShape]:
    """Shapes of all weights and buffers of an object."""
    return [_shape_of(tensor) for tensor in tensors_of(obj)]


def _shape_of(tensor: torch.Tensor) -> TensorShape:
    return TensorShape(tuple(tensor.shape), tensor.element_size(), tensor.is_floating_point())


def is_converted(obj: Any) -> bool:
    """Whether an object holds layers that store their weights in a vramkit format."""
    from .layers import QuantizedLayer

    return any(isinstance(m, QuantizedLayer) for root in find_modules(obj) for m in root.modules())


def apply_precision(
    obj: Any, mode: PrecisionMode, device: str | torch.device | None = None
) -> torch.dtype:
    """Convert every module of an object in place; return the dtype of its plain tensors.

    With a `device` the modules are moved there afterwards, so that no more than the converted
    bytes are ever taken on it. Where bf16 is not native on CUDA, float16 takes its place, with a
    warning.
    """
    modules = find_modules(obj)
    dtype = compute_dtype(mode, device if device is not None else device_of(obj))
    if mode is PrecisionMode.BF16 and dtype is not torch.bfloat16:
        warnings.warn(
            "bf16 was asked for, but this CUDA device has no native bfloat16 (it came with compute "
            "capability 8.0); float16 is used",
            RuntimeWarning,
            stacklevel=2,
        )
    for module in modules:
        if mode in PLAIN_MODES and is_converted(module):
            from .convert import restore

            restore(module, dtype)
        module.to(dtype=dtype)
        if mode not in PLAIN_MODES:
            from .convert import convert

            convert(module, mode)
        if device is not None:
            module.to(device=device)
    return dtype


@dataclass(frozen=True)
class Storages:
    """The memory of an object's tensors, watched without keeping it alive."""

    watched: Sequence[tuple[StorageWeakRef, int]]
    nbytes: int

    @classmethod
    def of(cls, obj: Any) -> Storages:
        """The storages of an object's weights and buffers, each once."""
        watched: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors_of(obj):
            if tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in watched:
                watched[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return cls(list(watched.values()), sum(n for _, n in watched.values()))

    def freed_bytes(self) -> int:
        """Bytes of those storages that are gone by now."""
        return sum(nbytes for ref, nbytes in self.watched if ref.expired())


def checkpoint_shapes(path: str | os.PathLike[str]) -> list[TensorShape]:
    """Shapes of a checkpoint's tensors from the headers of its safetensors files alone."""
    from .shards import Checkpoint

    checkpoint = Checkpoint(path)
    return [_shape_of(checkpoint.meta(name)) for name in checkpoint.names()]


def bytes_in(obj: Any, mode: PrecisionMode, device: str | torch.device | None) -> int:
    """Bytes that an unconverted object's weights would take in this mode; the object stays as is.

    `obj` may be on the meta device.
    """
    from .convert import convert
    from .estimator import meta_copy, weight_bytes

    if device is None:
        found = device_of(obj)
        device = "cpu" if found is None or found.type == "meta" else found
    dtype = compute_dtype(mode, device)
    if mode in PLAIN_MODES:
        return sum(shape.bytes_at(dtype) for shape in shapes_of(obj))
    total = 0
    for module in find_modules(obj):
        skeleton = meta_copy(module)
        # As apply_precision does, but on shapes alone.
        skeleton.to(dtype=dtype)
        convert(skeleton, mode)
        total += weight_bytes(skeleton)
    return total


def declared_shapes(shapes: Mapping[str, Iterable[int]]) -> list[TensorShape]:
    """Shapes that a loader declares; they count as floating-point weights."""
    return [TensorShape(tuple(int(n) for n in shape), 4, True) for shape in shapes.values()]
