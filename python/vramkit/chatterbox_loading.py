"""Chatterbox's networks from its files, each tensor brought to its final format as it is read.

Upstream's own loading holds every file in float32 beside the networks it fills. Here upstream's
classes are built without memory for parameters, and upstream's object is put together from them.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import _FreedMemory
from .checkpoint import load as load_checkpoint
from .convert import ConversionReport, convert
from .errors import CheckpointError
from .estimator import meta_copy
from .precision import PrecisionMode
from .shards import Checkpoint
from .skeleton import TensorPlaces, build_skeleton, match_names

CONDITIONS = "conds.pt"
TOKENIZER = "tokenizer.json"
# (attribute, upstream's class, file, whether upstream demands that file and class agree exactly)
NETWORKS = (
    ("ve", "VoiceEncoder", "ve.safetensors", True),
    ("t3", "T3", "t3_cfg.safetensors", True),
    ("s3gen", "S3Gen", "s3gen.safetensors", False),
)
_CLASSES = ("ChatterboxTTS", "Conditionals", "EnTokenizer", *(cls for _, cls, _, _ in NETWORKS))


@dataclass
class _Network:
    """One network, without memory until it is read."""

    name: str
    file: Path
    skeleton: nn.Module
    # Buffers that upstream computes where the file lacks them: (module, name).
    computed: list[tuple[nn.Module, str]]

    @property
    def float32_bytes(self) -> int:
        tensors = [*self.skeleton.parameters(), *self.skeleton.buffers()]
        return sum(t.numel() * (4 if t.is_floating_point() else t.itemsize) for t in tensors)


def can_stream(upstream: types.ModuleType) -> bool:
    """Whether this version of `chatterbox.tts` has the parts that streaming puts together."""
    return all(hasattr(upstream, name) for name in _CLASSES)


def downloaded(upstream: types.ModuleType) -> Path:
    """The folder that upstream's own download fills."""
    wanted = [*(file for _, _, file, _ in NETWORKS), TOKENIZER, CONDITIONS]
    paths = [upstream.hf_hub_download(repo_id=upstream.REPO_ID, filename=file) for file in wanted]
    return Path(paths[-1]).parent


def stream(
    upstream: types.ModuleType,
    folder: str | os.PathLike[str],
    device: str,
    dtypes: Mapping[str, torch.dtype],
    layers: Callable[[str, nn.Module], list[str]],
) -> tuple[Any, dict[str, ConversionReport], dict[str, int]]:
    """Upstream's object on `device`, with bytes as float32 and a report by converted network.

    `dtypes` are of what stays plain, by network. `layers` names those of a network that are
    quantized. Files are checked against the classes before any tensor is read. Raises
    FileNotFoundError for a file that is missing, CheckpointError for one that is unsound or of
    another version.
    """
    root = Path(folder)
    for file in (*(file for _, _, file, _ in NETWORKS), TOKENIZER):
        if not (root / file).is_file():
            raise FileNotFoundError(f"{root} holds no {file}, which Chatterbox needs")
    networks = [
        _network(getattr(upstream, cls), name, root / file, exact)
        for name, cls, file, exact in NETWORKS
    ]
    tokenizer = upstream.EnTokenizer(str(root / TOKENIZER))
    conditions = None
    if (root / CONDITIONS).is_file():
        conditions = upstream.Conditionals.load(root / CONDITIONS, map_location="cpu").to(device)
    place = torch.device(device)
    reports: dict[str, ConversionReport] = {}
    sizes: dict[str, int] = {}
    made: dict[str, nn.Module] = {}
    for network in networks:
        name = network.name
        sizes[name] = network.float32_bytes
        chosen = dict.fromkeys(layers(name, network.skeleton), PrecisionMode.INT8_DYNAMIC)
        if chosen:
            reports[name] = convert(meta_copy(network.skeleton), chosen)
        made[name] = _read(network, chosen, dtypes[name], place)
    tts = upstream.ChatterboxTTS(
        made["t3"], made["s3gen"], made["ve"], tokenizer, device, conds=conditions
    )
    return tts, reports, sizes


def _network(cls: Callable[[], nn.Module], name: str, file: Path, exact: bool) -> _Network:
    checkpoint = Checkpoint(file)
    computed: list[tuple[nn.Module, str]] = []

    def build() -> nn.Module:
        module = cls()
        for missing in () if exact else getattr(module, "ignore_state_dict_missing", ()):
            owner_name, _, leaf = missing.rpartition(".")
            owner = module.get_submodule(owner_name)
            if missing not in checkpoint and leaf in owner._buffers:
                # Left out of what the file must have, until it is read.
                owner._non_persistent_buffers_set.add(leaf)
                computed.append((owner, leaf))
        return module

    skeleton = build_skeleton(file, build)
    if exact:
        used = set(match_names(skeleton, checkpoint).values())
        foreign = [key for key in checkpoint.names() if key not in used]
        if foreign:
            raise CheckpointError(
                f"{file} holds {foreign[0]!r} ({len(foreign)} such tensors), which "
                f"{type(skeleton).__name__} has not; it belongs to another version"
            )
    return _Network(name, file, skeleton, computed)


def _read(
    network: _Network, chosen: dict[str, PrecisionMode], dtype: torch.dtype, place: torch.device
) -> nn.Module:
    module = network.skeleton
    if chosen:
        load_checkpoint(network.file, factory=lambda: module, precision=chosen, device=place)
    else:
        _read_plain(module, Checkpoint(network.file), dtype, place)
    for owner, leaf in network.computed:
        owner._non_persistent_buffers_set.discard(leaf)
    # What no file holds, and of converted networks what stays plain.
    return module.to(dtype=dtype).to(place).eval()


def _read_plain(
    module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, place: torch.device
) -> None:
    places = match_names(module, checkpoint)
    put, freed = TensorPlaces(module), _FreedMemory()
    done: set[int] = set()
    for name, value in list(module.state_dict(keep_vars=True).items()):
        if id(value) in done:
            continue
        done.add(id(value))
        tensor = checkpoint.read(places[name])
        size = tensor.nbytes
        tensor = tensor.to(place, dtype if tensor.is_floating_point() else tensor.dtype)
        put(name, tensor, value.requires_grad)
        freed.count(size)
