"""Checkpoints: reading, converting by stream, saving and loading.

A saved folder holds `model.safetensors` (the model's own tensor names; a converted layer has
`<layer>.codes`, `.scales`, `.extra` in place of `.weight`), `vramkit.json` (formats and shapes),
and transformers' `config.json` where the model has one. docs/checkpoints.md describes both files.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _core
from .bnb_config import QuantizationConfig, resolve
from .convert import (
    Candidate,
    Precision,
    Progress,
    candidates,
    check_weight,
    convert,
    encode_candidate,
    formats_for,
    keep_ties,
    progress_bar,
    swap_candidate,
)
from .errors import CheckpointError
from .formats import StorageFormat
from .layers.base import PART_NAMES, part_name
from .manifest import convert_as_saved, manifest_of, read_manifest, retype
from .shards import INDEX, SAFETENSORS_NAMES, WEIGHTS, Checkpoint
from .sizes import parse_size
from .skeleton import MANIFEST, TensorPlaces, build_skeleton, match_names, set_tensor
from .tensor_files import CACHE_BYTES, MappedTensors, ModelFiles, read_tensors
from .text_file import replace_text

if TYPE_CHECKING:
    from .plans import Plan


class _FreedMemory:
    """Gives heap pages that were freed back to the system, every 32 MiB.

    glibc keeps freed blocks below 32 MiB, and before 2.38 an aligned block does not fit into the
    hole that one of its own size left: reading tensor after tensor would grow to the file's size.
    Other C libraries have neither habit, nor this function.
    """

    EVERY = 32 << 20

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._pending = 0

    def count(self, nbytes: int) -> None:
        """Note that `nbytes` bytes of temporary tensors have been freed."""
        self._pending += nbytes
        if self._pending >= self.EVERY and self._trim is not None:
            self._trim(ctypes.c_size_t(0))
            self._pending = 0


@dataclass
class _Output:
    """What will lie in the written file: the model's tensors, converted ones as parts."""

    name: str
    tensor: Tensor  # on meta where it is still to be computed
    layer: Candidate | None = None
    fmt: StorageFormat | None = None


def load(
    path: str | os.PathLike[str],
    *,
    precision: Precision | Mapping[str, Precision | None] | QuantizationConfig | None = None,
    vram_limit: int | float | str | None = None,
    factory: Callable[[], nn.Module] | None = None,
    skip: Iterable[str] = (),
    progress: bool | Progress = False,
    mapped: bool = False,
    offload: bool | None = None,
    inputs: Any = None,
    vram_buffer: int | float | str = 0,
    folder: str | os.PathLike[str] | None = None,
    cache_limit: int | float | str = CACHE_BYTES / 2**30,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Build a model from a checkpoint, converting tensor by tensor on the way.

    Args:
        path: A folder that `save` or transformers wrote, or a safetensors file with `factory`.
        precision: Convert to this (a precision, one by layer, a `BitsAndBytesConfig`) while
            loading, as `convert` would; None: as stored.
        vram_limit: With `offload`, bounds the weights in memory. Else: choose formats so that the
            weights fit (a first pass reads the weights once to measure what each format would
            lose).
        factory: Builds the module, where the folder does not say what it is. Its parameters are
            never allocated.
        skip: Layers to leave plain.
        progress: True for a progress bar in bytes per second.
        mapped: The parameters are views of the mapped files, as in `vramkit.load_file`; nothing is
            read before it is used. Only for weights as stored.
        offload: Load as stored and offload as `enable_vram_management` does, straight from the
            checkpoint's files: the whole model is never in memory. None: yes where `inputs` are
            given, or there is a limit and the folder is converted already.
        inputs: Of the offloading, with `vram_buffer` and `folder`: see `enable_vram_management`.
        cache_limit: How much a cache in `folder` may hold (GiB, or text) of blocks whose tensors
            lie scattered in the checkpoint: they are gathered there once.
        device: Where the model computes. With offloading see `enable_vram_management`; else the
            whole model goes there, while converting tensor by tensor, so that neither memory holds
            more than it would alone.

    Host memory stays under the loaded size, two of the largest tensors and about 100 MB. Raises
    CheckpointError for an unsound or foreign checkpoint; nothing is left half-loaded. Offloading
    raises what `enable_vram_management` does, and BudgetError where the cache has no room.
    """
    if precision is not None and vram_limit is not None:
        raise ValueError("give precision or vram_limit, not both: a limit chooses the precisions")
    converted = (Path(path) / MANIFEST).is_file()
    if converted and precision is not None:
        raise ValueError(f"{path} is converted already; load it as it is, or convert its source")
    if offload is None:
        offload = inputs is not None or (converted and vram_limit is not None)
    if offload and precision is not None:
        raise ValueError(
            "offloading loads weights as they are stored; convert the checkpoint with "
            "convert_checkpoint, and load what that wrote"
        )
    if converted and vram_limit is not None and not offload:
        raise ValueError(f"{path} is converted already, so a limit has no formats to choose")
    place = None if device is None or offload else torch.device(device)
    if place is not None:
        torch.empty(0, device=place)  # a device that is not there is an error before all reading
    if mapped and not offload and (precision is not None or vram_limit is not None):
        raise ValueError("what is mapped stays as stored: it cannot be converted while loading")
    if offload or (precision is None and vram_limit is None):
        cache_bytes = parse_size(cache_limit)
        model = _load_as_stored(path, factory, progress, mapped, offload, cache_bytes)
        if offload:
            from .offload.manage import enable_vram_management

            return enable_vram_management(
                model, vram_limit, vram_buffer, inputs=inputs, folder=folder, device=device
            )
        return model if place is None else model.to(place)
    if vram_limit is not None:
        made = plan_checkpoint(path, vram_limit, factory=factory, skip=skip, progress=progress)
        precision = {entry.name: entry.format for entry in made.entries}
    wanted, skip, request = resolve(precision, skip)
    model = build_skeleton(path, factory)
    checkpoint = Checkpoint(path)
    places = match_names(model, checkpoint)
    chosen = _choose(model, wanted, skip)
    freed = _FreedMemory()
    with progress_bar(progress, checkpoint.nbytes, "load") as advance:
        done: set[int] = set()
        for name, value in list(model.state_dict(keep_vars=True).items()):
            if id(value) in done:
                continue
            done.add(id(value))
            if name in chosen:
                candidate, fmt = chosen[name]
                if name != candidate.source_names[0]:
                    continue  # folded with the first
                tensor, size = _read_weight(candidate, checkpoint, places)
                check_weight(candidate.name, tensor, fmt)
                parts = encode_candidate(candidate, tensor, fmt)
                if place is not None:
                    parts = parts.to(place)
                del tensor
                freed.count(size)
                swap_candidate(candidate, parts)
            else:
                tensor = checkpoint.read(places[name])
                size = tensor.nbytes
                grad = getattr(value, "requires_grad", False)
                set_tensor(model, name, tensor if place is None else tensor.to(place), grad)
            advance(size, name)
    keep_ties(model)
    if request is not None:
        request.finish(model)
    _check_complete(model, path)
    # What no file holds: buffers that are not kept.
    return model if place is None else model.to(place)


def _load_as_stored(
    path: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | None,
    progress: bool | Progress,
    mapped: bool,
    offload: bool,
    cache_bytes: int,
) -> nn.Module:
    folder = Path(path)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    checkpoint = Checkpoint(path if manifest is None else folder / WEIGHTS)
    model = build_skeleton(path, factory)
    if manifest is not None:
        retype(model, checkpoint)
        convert_as_saved(model, manifest, folder)
    places = match_names(model, checkpoint)
    wanted: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        wanted.setdefault(id(value), (name, value))
    for name, value in wanted.values():
        dtype = checkpoint.dtype(places[name])
        if manifest is not None and dtype != value.dtype:
            raise CheckpointError(f"{path}: {name!r} has dtype {dtype}, expected {value.dtype}")
    sources = list(dict.fromkeys(places[name] for name, _ in wanted.values()))
    if mapped or offload:
        files = MappedTensors(checkpoint)
        tensors = files.tensors(sources, moving=offload)
        object.__setattr__(model, "vramkit_files", ModelFiles(files.mapped, cache_bytes))
    else:
        tensors = read_tensors(checkpoint, sources, progress=progress)
    put = TensorPlaces(model)
    used: set[str] = set()
    for name, value in wanted.values():
        source = places[name]
        # Two parameters that are not tied may have one tensor in the file; buffers are written to.
        own = source in used or not isinstance(value, nn.Parameter)
        put(
            name,
            tensors[source].clone() if own else tensors[source],
            getattr(value, "requires_grad", False),
        )
        used.add(source)
    keep_ties(model)
    _check_complete(model, path)
    return model


def _choose(
    model: nn.Module,
    precision: Precision | Mapping[str, Precision | None] | None,
    skip: Iterable[str],
) -> dict[str, tuple[Candidate, StorageFormat]]:
    """(layer, format) by the names of what its weight is made of; tied ones under every name."""
    if precision is None:
        return {}
    found, _ = candidates(model, skip)
    if precision == "fp32":
        return {}
    chosen: dict[str, tuple[Candidate, StorageFormat]] = {}
    for candidate, fmt in formats_for(found, precision)[0]:
        for name in (*candidate.source_names, *(user.full_name for user in candidate.users[1:])):
            chosen[name] = (candidate, fmt)
    return chosen


def _read_weight(
    candidate: Candidate, checkpoint: Checkpoint, places: dict[str, str]
) -> tuple[Tensor, int]:
    """A candidate's plain weight, folded if need be, and how many bytes were read for it."""
    if candidate.folding is None:
        tensor = checkpoint.read(places[candidate.full_name])
        return tensor, tensor.nbytes
    size = 0
    for name, (_, owner, leaf) in zip(
        candidate.source_names, candidate.folding.sources, strict=True
    ):
        tensor = checkpoint.read(places[name])
        size += tensor.nbytes
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return candidate.weight, size


def plan_checkpoint(
    path: str | os.PathLike[str],
    vram_limit: int | float | str,
    *,
    factory: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> Plan:
    """As `vramkit.plan`, for a model whose weights are on disk: one weight in memory at a time."""
    from .planner import plan

    model = build_skeleton(path, factory)
    checkpoint = Checkpoint(path)
    places = match_names(model, checkpoint)

    freed = _FreedMemory()

    def read(candidate: Candidate) -> Tensor:
        freed.count(freed.EVERY)  # the weight before this one, and its form in each format
        return _read_weight(candidate, checkpoint, places)[0]

    return plan(model, vram_limit, read_weight=read, **options)


def _check_complete(model: nn.Module, path: str | os.PathLike[str]) -> None:
    left = [n for n, t in model.state_dict().items() if t.device.type == "meta"]
    if left:
        raise CheckpointError(f"{path}: nothing was loaded for {left[0]!r} ({len(left)} tensors)")


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, progress: bool | Progress = False
) -> Path:
    """Write `model` to `folder`; `load` gives it back bit for bit.

    The folder is made if needed. Each file is written beside its name and renamed, the weights
    last but one and the manifest last, so that an interrupted save leaves the old checkpoint or
    none. Raises OSError, with the bytes needed, where there is no room.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    unique: dict[int, str] = {}
    tensors: list[tuple[str, Tensor]] = []
    aliases: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in unique:
            aliases[name] = unique[id(value)]
            continue
        unique[id(value)] = name
        tensors.append((name, value.detach()))
    specs = [(name, _dtype_name(name, t), list(t.shape)) for name, t in tensors]
    manifest = manifest_of(model) | {"aliases": aliases}
    total = sum(t.nbytes for _, t in tensors)
    with _core.SafetensorsWriter(target / WEIGHTS, specs, {"format": "pt"}) as writer:
        with progress_bar(progress, total, "save") as advance:
            for name, tensor in tensors:
                plain = tensor.cpu().contiguous()
                writer.write(name, plain.data_ptr(), plain.nbytes)
                advance(plain.nbytes, name)
        # From here on the folder holds no checkpoint, until the new manifest stands.
        (target / MANIFEST).unlink(missing_ok=True)
        writer.commit()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_file") and hasattr(config, "architectures"):
        if not config.architectures:
            base = getattr(type(model), "_base", type(model))
            config.architectures = [base.__name__]
        replace_text(target / "config.json", config.to_json_string(use_diff=False))
    replace_text(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return target


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in SAFETENSORS_NAMES:
        raise ValueError(f"safetensors has no dtype for {name!r} ({tensor.dtype})")
    return SAFETENSORS_NAMES[tensor.dtype]


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    precision: Precision | Mapping[str, Precision | None] | QuantizationConfig,
    *,
    factory: Callable[[], nn.Module] | None = None,
    skip: Iterable[str] = (),
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Convert a checkpoint file to file, one tensor in memory at a time.

    Args:
        source: A transformers folder, or a safetensors file with `factory`.
        target: The folder to write; `load` reads it.
        precision: One precision or format, one by layer name (a plan's), or a
            `BitsAndBytesConfig`.
        factory: Builds the module where `source` does not say what it is.
        skip: Layers to leave plain.
        progress: True for a progress bar.

    Returns bytes before and after. Host memory stays under two of the largest tensors and about
    100 MB, whatever the model's size. An interrupted conversion leaves no checkpoint behind.
    """
    wanted, left_plain, _ = resolve(precision, skip)
    skeleton = build_skeleton(source, factory)
    checkpoint = Checkpoint(source)
    places = match_names(skeleton, checkpoint)
    chosen = _choose(skeleton, wanted, left_plain)
    outputs = _outputs(skeleton, chosen)
    folder = Path(target)
    into = folder / WEIGHTS if Path(source).is_file() else folder
    if into.exists() and into.samefile(source):
        raise ValueError(f"{into} is the source itself; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    structure = _converted_structure(skeleton, precision, skip)
    specs = []
    for output in outputs:
        if output.fmt is None:
            specs.append(
                (output.name, checkpoint.info(places[output.name]).dtype, list(output.tensor.shape))
            )
        else:
            assert output.layer is not None
            # On meta: shapes only.
            parts = encode_candidate(output.layer, output.layer.weight, output.fmt)
            specs += [
                (_part(output, leaf), "U8", list(getattr(parts, leaf).shape))
                for leaf in PART_NAMES
                if getattr(parts, leaf) is not None
            ]
    written = 0
    freed = _FreedMemory()
    with _core.SafetensorsWriter(folder / WEIGHTS, specs, {"format": "pt"}) as writer:
        with progress_bar(progress, checkpoint.nbytes, "convert") as advance:
            for output in outputs:
                if output.layer is None:
                    tensor = checkpoint.read(places[output.name])
                    size = tensor.nbytes
                else:
                    tensor, size = _read_weight(output.layer, checkpoint, places)
                written += _write_output(writer, output, tensor)
                del tensor
                freed.count(size)
                advance(size, output.name)
        (folder / MANIFEST).unlink(missing_ok=True)
        writer.commit()
    _copy_side_files(Path(source), folder)
    replace_text(folder / MANIFEST, json.dumps(structure, indent=1) + "\n")
    return {"original_bytes": checkpoint.nbytes, "converted_bytes": written}


def _outputs(
    skeleton: nn.Module, chosen: dict[str, tuple[Candidate, StorageFormat]]
) -> list[_Output]:
    outputs, seen = [], set()
    for name, value in skeleton.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        layer, fmt = chosen.get(name, (None, None))
        if layer is not None and name != layer.source_names[0]:
            continue  # folded with the first
        outputs.append(_Output(name, value.detach(), layer, fmt))
    return outputs


def _part(output: _Output, leaf: str) -> str:
    assert output.layer is not None
    user = output.layer.users[0]
    return user.full_name.removesuffix(user.leaf) + part_name(user.leaf, leaf)


def _write_output(writer: _core.SafetensorsWriter, output: _Output, tensor: Tensor) -> int:
    if output.fmt is None or output.layer is None:
        writer.write(output.name, tensor.data_ptr(), tensor.nbytes)
        return tensor.nbytes
    check_weight(output.layer.name, tensor, output.fmt)
    parts = encode_candidate(output.layer, tensor, output.fmt)
    for leaf in PART_NAMES:
        part = getattr(parts, leaf)
        if part is not None:
            writer.write(_part(output, leaf), part.data_ptr(), part.nbytes)
    return parts.nbytes


def _converted_structure(
    skeleton: nn.Module,
    precision: Precision | Mapping[str, Precision | None] | QuantizationConfig,
    skip: Iterable[str],
) -> dict[str, Any]:
    """The manifest of what is about to be written: the skeleton converted by shapes alone."""
    from .estimator import meta_copy

    copy = meta_copy(skeleton)
    convert(copy, precision, skip=skip)
    unique: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, value in copy.state_dict(keep_vars=True).items():
        if id(value) in unique:
            aliases[name] = unique[id(value)]
        else:
            unique[id(value)] = name
    return manifest_of(copy) | {"aliases": aliases}


def _copy_side_files(source: Path, target: Path) -> None:
    """Configuration, tokenizer and licence files, so that the folder stands on its own."""
    if not source.is_dir():
        return
    for file in source.iterdir():
        small = (
            file.suffix in (".json", ".txt", ".model", ".md", ".jinja") or file.name == "LICENSE"
        )
        if file.is_file() and small and file.name not in (INDEX, MANIFEST):
            shutil.copyfile(file, target / file.name)
