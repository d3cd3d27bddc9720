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
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _core
from ._operators import encode
from .convert import (
    Candidate,
    Precision,
    Progress,
    candidates,
    check_names,
    check_weight,
    convert,
    keep_ties,
    progress_bar,
    storage_format,
    swap_candidate,
)
from .errors import CheckpointError
from .formats import StorageFormat, get_format, register_format
from .layers import QuantizedLayer
from .layers.base import PART_NAMES

if TYPE_CHECKING:
    from .planner import Plan

SCHEMA = "vramkit.checkpoint/1"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "vramkit.json"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_skeleton_lock = threading.Lock()


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


class Checkpoint:
    """The tensors of a safetensors file, or of the shards that an index lists, by name.

    Only headers are read at first. Raises CheckpointError for a file that is not sound, a shard
    that is missing, or an index that disagrees with its shards.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files: dict[str, _core.SafetensorsFile] = {}
        for file in self._shards():
            opened = _core.SafetensorsFile(file)
            for name in opened.names():
                if name in self._files:
                    raise CheckpointError(f"{file}: tensor {name!r} is in another shard too")
                self._files[name] = opened
        self._check_index()

    def _shards(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FileNotFoundError(f"no checkpoint at {self.path}: no such file or folder")
        self._weight_map = self._read_index()
        if self._weight_map is not None:
            shards = [self.path / name for name in sorted(set(self._weight_map.values()))]
            for shard in shards:
                if not shard.is_file():
                    raise CheckpointError(
                        f"{self.path / INDEX} lists the shard {shard.name!r}, which is missing; "
                        "download it again"
                    )
            return shards
        if (self.path / WEIGHTS).is_file():
            return [self.path / WEIGHTS]
        others = sorted(self.path.glob("*.safetensors"))
        if not others:
            raise CheckpointError(
                f"{self.path} holds no safetensors file (expected {WEIGHTS} or {INDEX}); "
                "pickled checkpoints are not read: convert them with safetensors' own tool"
            )
        return others

    def _read_index(self) -> dict[str, str] | None:
        file = self.path / INDEX
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is no index of shards: {error!r}") from error
        for name, shard in found.items() if isinstance(found, dict) else [("", None)]:
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise CheckpointError(
                    f"{file}: the shard of {name!r} must be the name of a file beside it, "
                    f"got {shard!r}"
                )
        return dict(found)

    def _check_index(self) -> None:
        listed = getattr(self, "_weight_map", None)
        if listed is not None:
            lost = sorted(set(listed) - set(self._files))
            if lost:
                raise CheckpointError(
                    f"{self.path / INDEX} lists {lost[0]!r} ({len(lost)} such tensors), which "
                    "its shards do not hold"
                )

    def names(self) -> list[str]:
        """Names of all tensors, in the order of their bytes."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def info(self, name: str) -> _core.TensorInfo:
        """Name, dtype, shape and bytes of a tensor."""
        if name not in self._files:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}")
        return self._files[name].info(name)

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype of a tensor; CheckpointError where torch has none."""
        info = self.info(name)
        if info.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {info.dtype}, which torch has no type for"
            )
        return _DTYPES[info.dtype]

    def meta(self, name: str) -> Tensor:
        """A tensor of that shape and dtype without memory."""
        return torch.empty(self.info(name).shape, dtype=self.dtype(name), device="meta")

    def read(self, name: str) -> Tensor:
        """The tensor, in fresh memory."""
        out = torch.empty(self.info(name).shape, dtype=self.dtype(name))
        self._files[name].read_into(name, out.data_ptr(), out.nbytes)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self._files)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it, every new parameter moves to the meta device as it is registered.

    Buffers stay real, because modules compute them when they are built and no checkpoint holds
    those that are not persistent. Memory that a parameter had before was never touched.
    """
    with _skeleton_lock:
        plain = nn.Module.register_parameter

        def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and param.device.type != "meta":
                shape = torch.empty_like(param, device="meta", requires_grad=False)
                param = nn.Parameter(shape, requires_grad=param.requires_grad)
            plain(module, name, param)

        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = plain  # type: ignore[method-assign]


def build_skeleton(
    source: str | os.PathLike[str], factory: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """The model of a checkpoint with its parameters on the meta device, in evaluation mode.

    Without `factory`, `source` is a folder with transformers' `config.json`. The dtype is the
    checkpoint's.
    """
    folder = Path(source)
    if factory is None:
        model = _from_transformers_config(folder)
    else:
        with _parameters_on_meta():
            model = factory()
    if (folder / MANIFEST).is_file():
        return model.eval()
    checkpoint = Checkpoint(source)
    places = match_names(model, checkpoint)
    for name, parameter in list(model.named_parameters()):
        if name in places:
            _set(model, name, checkpoint.meta(places[name]), parameter.requires_grad)
    return model.eval()


def _from_transformers_config(folder: Path) -> nn.Module:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, which says what model it holds; pass a factory that "
            "builds the module"
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    with _parameters_on_meta():
        model: nn.Module
        if cls is not None:
            model = cls._from_config(config)
        else:
            model = transformers.AutoModel.from_config(config)
    return model


def _set(model: nn.Module, name: str, tensor: Tensor, requires_grad: bool = False) -> None:
    """Put `tensor` in the place of a parameter or buffer, and of every module that shares it."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return
    old = owner._parameters[leaf]
    grad = requires_grad and tensor.is_floating_point()
    made = nn.Parameter(tensor, requires_grad=grad)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = made


def match_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name of every parameter and persistent buffer of `model`.

    Names agree, or differ by the base model's prefix, as transformers' do. Tied names need one
    entry. Raises CheckpointError for tensors that are missing or have another shape.
    """
    prefix = getattr(model, "base_model_prefix", "") or ""
    renamed, rebuilt = _transformers_names(model, checkpoint)
    places: dict[str, str] = {}
    shared: dict[int, str] = {}
    missing = []
    for name, value in model.state_dict(keep_vars=True).items():
        options = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        found = next((option for option in options if option in checkpoint), renamed.get(name))
        if found is None:
            missing.append((name, id(value)))
            continue
        shape = checkpoint.info(found).shape
        if list(value.shape) != list(shape):
            raise CheckpointError(
                f"{checkpoint.path}: {found!r} has shape {shape}, the model's {name!r} has "
                f"{list(value.shape)}"
            )
        places[name] = found
        shared[id(value)] = found
    lost = []
    for name, key in missing:
        if key in shared:
            places[name] = shared[key]
        else:
            lost.append(name)
    if lost and rebuilt:
        raise CheckpointError(
            f"{checkpoint.path} stores {sorted(rebuilt)[0]!r} and others in a layout that "
            "transformers rebuilds as it loads. Load it with from_pretrained, then use "
            "vramkit.convert and vramkit.save; what was saved so loads tensor by tensor"
        )
    if lost:
        raise CheckpointError(
            f"{checkpoint.path} lacks {lost[0]!r} ({len(lost)} of the model's tensors); it belongs "
            "to another model or another version of its class"
        )
    return places


def _transformers_names(
    model: nn.Module, checkpoint: Checkpoint
) -> tuple[dict[str, str], set[str]]:
    """transformers' own renamings: {model's name: checkpoint's}, and what is more than renamed.

    Newer classes split and rename what older checkpoints hold; the rules come with transformers.
    """
    if not (hasattr(model, "config") and hasattr(model, "base_model_prefix")):
        return {}, set()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5, names in files were those of the classes
        return {}, set()
    model_: Any = model
    rules = get_model_conversion_mapping(model_)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters: list[Any] = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    known = model.state_dict()
    renamed, rebuilt = {}, set()
    for name in checkpoint.names():
        target, converter = rename_source_key(
            name, renamings, converters, model_.base_model_prefix, known
        )
        if converter is not None:
            rebuilt.add(name)
        elif target != name:
            renamed[target] = name
    return renamed, rebuilt


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
    precision: Precision | Mapping[str, Precision | None] | None = None,
    vram_limit: int | float | str | None = None,
    factory: Callable[[], nn.Module] | None = None,
    skip: Iterable[str] = (),
    progress: bool | Progress = False,
) -> nn.Module:
    """Build a model from a checkpoint, converting tensor by tensor on the way.

    Args:
        path: A folder that `save` or transformers wrote, or a safetensors file with `factory`.
        precision: Convert to this while loading, as `convert` would; None: as stored.
        vram_limit: Choose formats so that the weights fit (a first pass reads the weights once to
            measure what each format would lose).
        factory: Builds the module, where the folder does not say what it is. Its parameters are
            never allocated.
        skip: Layers to leave plain.
        progress: True for a progress bar.

    Host memory stays under the loaded size, two of the largest tensors and about 100 MB. Raises
    CheckpointError for an unsound or foreign checkpoint; nothing is left half-loaded.
    """
    if precision is not None and vram_limit is not None:
        raise ValueError("give precision or vram_limit, not both: a limit chooses the precisions")
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        if precision is not None or vram_limit is not None:
            raise ValueError(
                f"{folder} is converted already; load it as it is, or convert its source"
            )
        return _load_converted(folder, factory, progress)
    if vram_limit is not None:
        made = plan_checkpoint(path, vram_limit, factory=factory, skip=skip, progress=progress)
        precision = {entry.name: entry.format for entry in made.entries}
    model = build_skeleton(path, factory)
    checkpoint = Checkpoint(path)
    places = match_names(model, checkpoint)
    chosen = _choose(model, precision, skip)
    freed = _FreedMemory()
    with progress_bar(progress, checkpoint.nbytes, "load") as advance:
        done: set[int] = set()
        for name, value in list(model.state_dict(keep_vars=True).items()):
            if id(value) in done:
                continue
            done.add(id(value))
            tensor = checkpoint.read(places[name])
            size = tensor.nbytes
            if name in chosen:
                candidate, fmt = chosen[name]
                check_weight(candidate.name, tensor, fmt)
                parts = encode(tensor, fmt)
                del tensor
                freed.count(size)
                swap_candidate(candidate, parts)
            else:
                _set(model, name, tensor, getattr(value, "requires_grad", False))
            advance(size, name)
    keep_ties(model)
    _check_complete(model, path)
    return model


def _choose(
    model: nn.Module,
    precision: Precision | Mapping[str, Precision | None] | None,
    skip: Iterable[str],
) -> dict[str, tuple[Candidate, StorageFormat]]:
    """(layer, format) by the name of its weight; tied layers under every name."""
    if precision is None:
        return {}
    found, _ = candidates(model, skip)
    if isinstance(precision, Mapping):
        check_names(precision, found)
    chosen: dict[str, tuple[Candidate, StorageFormat]] = {}
    for candidate in found:
        wanted = precision.get(candidate.name) if isinstance(precision, Mapping) else precision
        if wanted is None or wanted == "fp32":
            continue
        fmt = storage_format(wanted)
        for name in (candidate.name, *(n for n, _ in candidate.tied)):
            chosen[f"{name}.weight" if name else "weight"] = (candidate, fmt)
    return chosen


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
        name = f"{candidate.name}.weight" if candidate.name else "weight"
        freed.count(freed.EVERY)  # the weight before this one, and its form in each format
        return checkpoint.read(places[name])

    return plan(model, vram_limit, read_weight=read, **options)


def _check_complete(model: nn.Module, path: str | os.PathLike[str]) -> None:
    left = [n for n, t in model.state_dict().items() if t.device.type == "meta"]
    if left:
        raise CheckpointError(f"{path}: nothing was loaded for {left[0]!r} ({len(left)} tensors)")


def _manifest(model: nn.Module) -> dict[str, Any]:
    layers, formats, tied = {}, {}, {}
    owners: dict[int, str] = {}
    builtin = {name for name, _ in _core.builtin_formats()}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLayer):
            continue
        key = id(module._parameters["codes"])
        if key in owners:
            tied[name] = owners[key]
            continue
        owners[key] = name
        fmt = module.storage_format
        layers[name] = {
            "format": fmt.name,
            "shape": list(module.weight_shape),
            "compute_dtype": str(module.compute_dtype).removeprefix("torch."),
        }
        if fmt.name not in builtin:
            formats[fmt.name] = {
                "table": list(fmt.native.table),
                "block": fmt.block,
                "nested": fmt.nested,
            }
    return {"schema": SCHEMA, "layers": layers, "tied": tied, "formats": formats}


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
    manifest = _manifest(model) | {"aliases": aliases}
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
        _write_text(target / "config.json", config.to_json_string(use_diff=False))
    _write_text(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return target


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _NAMES:
        raise ValueError(f"safetensors has no dtype for {name!r} ({tensor.dtype})")
    return _NAMES[tensor.dtype]


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise CheckpointError(f"{file}: schema {data['schema']!r}, expected {SCHEMA!r}")
        for name, about in data["formats"].items():
            register_format(name, about["table"], block=about["block"], nested=about["nested"])
        layers = {
            name: (
                get_format(about["format"]),
                tuple(int(n) for n in about["shape"]),
                _dtype_named(about["compute_dtype"]),
            )
            for name, about in data["layers"].items()
        }
        tied, aliases = dict(data["tied"]), dict(data.get("aliases", {}))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is no manifest of vramkit: {error!r}") from error
    return {"layers": layers, "tied": tied, "aliases": aliases}


def _load_converted(
    folder: Path, factory: Callable[[], nn.Module] | None, progress: bool | Progress
) -> nn.Module:
    manifest = _read_manifest(folder)
    checkpoint = Checkpoint(folder / WEIGHTS)
    model = build_skeleton(folder, factory)
    _retype(model, checkpoint, manifest)
    try:
        convert(model, {name: fmt for name, (fmt, _, _) in manifest["layers"].items()})
    except ValueError as error:
        raise CheckpointError(f"{folder} belongs to another model: {error}") from error
    for name, (_, shape, dtype) in manifest["layers"].items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        if tuple(layer.weight_shape) != shape:
            raise CheckpointError(
                f"{folder}: {name!r} was saved with shape {shape}, the model has "
                f"{tuple(layer.weight_shape)}"
            )
        layer.compute_dtype = dtype
    modules = dict(model.named_modules())
    for name, source_name in manifest["tied"].items():
        other, source = modules.get(name), modules.get(source_name)
        if not isinstance(other, QuantizedLayer) or not isinstance(source, QuantizedLayer):
            raise CheckpointError(
                f"{folder} belongs to another model: it ties {name!r} to {source_name!r}, "
                "which are not both converted layers here"
            )
        other.compute_dtype = source.compute_dtype
    places = match_names(model, checkpoint)
    with progress_bar(progress, checkpoint.nbytes, "load") as advance:
        done: set[int] = set()
        for name, value in list(model.state_dict(keep_vars=True).items()):
            if id(value) in done:
                continue
            done.add(id(value))
            tensor = checkpoint.read(places[name])
            if tensor.dtype != value.dtype:
                raise CheckpointError(
                    f"{folder}: {name!r} has dtype {tensor.dtype}, expected {value.dtype}"
                )
            _set(model, name, tensor, getattr(value, "requires_grad", False))
            advance(tensor.nbytes, name)
    keep_ties(model)
    _check_complete(model, folder)
    return model


def _retype(model: nn.Module, checkpoint: Checkpoint, manifest: dict[str, Any]) -> None:
    """Give the skeleton's plain tensors the dtypes they were saved with."""
    for name, value in list(model.state_dict(keep_vars=True).items()):
        if name in checkpoint and value.device.type == "meta":
            _set(model, name, checkpoint.meta(name), getattr(value, "requires_grad", False))


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    precision: Precision | Mapping[str, Precision | None],
    *,
    factory: Callable[[], nn.Module] | None = None,
    skip: Iterable[str] = (),
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Convert a checkpoint file to file, one tensor in memory at a time.

    Args:
        source: A transformers folder, or a safetensors file with `factory`.
        target: The folder to write; `load` reads it.
        precision: One precision or format, or one by layer name (a plan's).
        factory: Builds the module where `source` does not say what it is.
        skip: Layers to leave plain.
        progress: True for a progress bar.

    Returns bytes before and after. Host memory stays under two of the largest tensors and about
    100 MB, whatever the model's size. An interrupted conversion leaves no checkpoint behind.
    """
    skeleton = build_skeleton(source, factory)
    checkpoint = Checkpoint(source)
    places = match_names(skeleton, checkpoint)
    chosen = _choose(skeleton, precision, skip)
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
            parts = encode(output.tensor, output.fmt)  # on meta: shapes only
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
                tensor = checkpoint.read(places[output.name])
                size = tensor.nbytes
                written += _write_output(writer, output, tensor)
                del tensor
                freed.count(size)
                advance(size, output.name)
        (folder / MANIFEST).unlink(missing_ok=True)
        writer.commit()
    _copy_side_files(Path(source), folder)
    _write_text(folder / MANIFEST, json.dumps(structure, indent=1) + "\n")
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
        outputs.append(_Output(name, value.detach(), layer, fmt))
    return outputs


def _part(output: _Output, leaf: str) -> str:
    return output.name.removesuffix("weight") + leaf


def _write_output(writer: _core.SafetensorsWriter, output: _Output, tensor: Tensor) -> int:
    if output.fmt is None or output.layer is None:
        writer.write(output.name, tensor.data_ptr(), tensor.nbytes)
        return tensor.nbytes
    check_weight(output.layer.name, tensor, output.fmt)
    parts = encode(tensor, output.fmt)
    for leaf in PART_NAMES:
        part = getattr(parts, leaf)
        if part is not None:
            writer.write(_part(output, leaf), part.data_ptr(), part.nbytes)
    return parts.nbytes


def _converted_structure(
    skeleton: nn.Module,
    precision: Precision | Mapping[str, Precision | None],
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
    return _manifest(copy) | {"aliases": aliases}


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
