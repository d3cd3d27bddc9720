"""Submodules that a pipeline never calls: found by tracing, taken out on request, put back exactly.

A model that ships an encoder and a decoder, of which a pipeline uses one, keeps the other's weights
in memory for nothing. Taking them out changes no result of the calls that were traced.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from . import _core
from .errors import PrunedModuleError
from .islands import modules_by_path
from .shards import SAFETENSORS_NAMES, Checkpoint
from .sizes import format_size


class _Touched(TorchDispatchMode):
    """Notes the storages of every tensor that reaches an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(args)
        self._note(tuple((kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def _note(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self.storages.add(value.untyped_storage()._cdata)
            elif isinstance(value, (list, tuple)):
                self._note(value)


def _own_tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for kept in (module._parameters, module._buffers):
        for name, tensor in kept.items():
            if tensor is not None:
                yield kept, name, tensor


def _bytes(module: nn.Module) -> int:
    return sum({id(t): t.nbytes for m in module.modules() for _, _, t in _own_tensors(m)}.values())


def never_called(obj: Any, call: Callable[[], Any]) -> dict[str, int]:
    """Bytes by path of the outermost submodules that `call` neither calls nor reads a weight of.

    Args:
        obj: A module, or an object that holds modules.
        call: Runs it as it will be run later on, with every branch that later runs may take. It
            runs for real, once, without gradients.

    Modules without weights are not listed.
    """
    called: set[int] = set()
    hook = register_module_forward_pre_hook(lambda module, _args: called.add(id(module)))
    touched = _Touched()
    try:
        with torch.no_grad(), touched:
            call()
    finally:
        hook.remove()

    def used(module: nn.Module) -> bool:
        return any(
            id(inner) in called
            or any(
                t.untyped_storage()._cdata in touched.storages for _, _, t in _own_tensors(inner)
            )
            for inner in module.modules()
        )

    found: dict[str, int] = {}
    outer: set[int] = set()
    for path, module in modules_by_path(obj):
        if id(module) in outer or used(module):
            continue
        outer.update(id(inner) for inner in module.modules())
        size = _bytes(module)
        if size:
            found[path] = size
    return found


@dataclass
class Pruned:
    """Submodules that were taken out: `modules` are their bytes by path; `restore` undoes it."""

    modules: dict[str, int]
    file: Path | None = None
    _taken: list[tuple[dict[str, Any], str, Tensor, int]] = field(default_factory=list, repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)
    _devices: dict[int, torch.device] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """Bytes that were taken out."""
        return sum(self.modules.values())

    def restore(self) -> int:
        """Put every weight back, bit for bit, and return how many bytes; once more is 0."""
        if not self._taken or self.file is None:
            return 0
        stored = Checkpoint(self.file)
        total = 0
        read: dict[int, Tensor] = {}
        for kept, name, shape, index in self._taken:
            if index not in read:
                data = stored.read(str(index)).to(self._devices[index])
                if isinstance(shape, nn.Parameter):
                    data = nn.Parameter(data, requires_grad=shape.requires_grad)
                read[index] = data
                total += data.nbytes
            kept[name] = read[index]
        for hook in self._hooks:
            hook.remove()
        self._taken, self._hooks = [], []
        self.file.unlink(missing_ok=True)
        return total

    def __str__(self) -> str:
        lines = [f"{len(self.modules)} submodules, {format_size(self.bytes)}, never called"]
        lines += [f"  {path}: {format_size(n)}" for path, n in self.modules.items()]
        return "\n".join(lines)


def prune(
    obj: Any, call: Callable[[], Any], *, folder: str | os.PathLike[str] | None = None
) -> Pruned:
    """Take the weights of submodules that `call` never uses out of memory, until `restore`.

    Args:
        obj: A module, or an object that holds modules; changed in place.
        call: As for `never_called`.
        folder: Where the weights wait, in one file. None: the folder of temporary files.

    A pruned module keeps its place, with weights that have shapes and no memory; calling it raises
    PrunedModuleError, which names it. Weights that a module outside shares stay. Nothing is changed
    if the file cannot be written (OSError).
    """
    paths = never_called(obj, call)
    modules = dict(modules_by_path(obj))
    inside = {id(m) for path in paths for m in modules[path].modules()}
    shared = {id(t) for m in modules.values() if id(m) not in inside for _, _, t in _own_tensors(m)}
    taken: list[tuple[dict[str, Any], str, Tensor, int]] = []
    originals: dict[int, Tensor] = {}
    order: dict[int, int] = {}
    for path in paths:
        for module in modules[path].modules():
            for kept, name, tensor in _own_tensors(module):
                if id(tensor) in shared or tensor.device.type == "meta":
                    continue
                index = order.setdefault(id(tensor), len(order))
                originals[index] = tensor
                taken.append((kept, name, tensor, index))
    pruned = Pruned(paths, _write(originals, folder) if originals else None)
    pruned._devices = {index: tensor.device for index, tensor in originals.items()}
    shapes: dict[int, Tensor] = {}
    for kept, name, tensor, index in taken:
        if index not in shapes:
            made: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            shapes[index] = made
        kept[name] = shapes[index]
        pruned._taken.append((kept, name, shapes[index], index))
    for path in paths:
        pruned._hooks.append(modules[path].register_forward_pre_hook(_Refusal(path)))
    return pruned


class _Refusal:
    """The hook of a pruned module."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        raise PrunedModuleError(
            f"{self.path or 'this module'} was pruned, because the traced call never used it; call "
            "restore() on what prune returned, and prune with a call that uses it"
        )


def _write(tensors: dict[int, Tensor], folder: str | os.PathLike[str] | None) -> Path:
    handle, name = tempfile.mkstemp(suffix=".safetensors", prefix="vramkit-pruned-", dir=folder)
    os.close(handle)
    specs = [(str(i), SAFETENSORS_NAMES[t.dtype], list(t.shape)) for i, t in tensors.items()]
    try:
        with _core.SafetensorsWriter(name, specs, {}) as writer:
            for index, tensor in tensors.items():
                plain = tensor.detach().cpu().contiguous()
                writer.write(str(index), plain.data_ptr(), plain.nbytes)
            writer.commit()
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)
