"""The manifest of a saved folder: which layers are converted, to what, and which share their parts.

docs/checkpoints.md describes the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _core
from .candidates import User
from .convert import convert
from .errors import CheckpointError
from .formats import get_format, register_format
from .layers import QuantizedLayer
from .shards import Checkpoint
from .skeleton import MANIFEST, TensorPlaces

SCHEMA = "vramkit.checkpoint/1"


def manifest_of(model: nn.Module) -> dict[str, Any]:
    """What `save` writes of a model; the names of shared tensors are added there."""
    layers, formats, tied = {}, {}, {}
    owners: dict[int, str] = {}
    builtin = {name for name, _ in _core.builtin_formats()}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLayer):
            continue
        for leaf in module.stored_names:
            key, user = id(module.stored_part(leaf, "codes")), User(name, leaf, module).layer_name
            if key in owners:
                tied[user] = owners[key]
                continue
            owners[key] = user
            stored = module.stored_parameter(leaf)
            fmt = stored.fmt
            layers[user] = {
                "format": fmt.name,
                "shape": list(stored.shape),
                "compute_dtype": str(stored.dtype).removeprefix("torch."),
            }
            asked = getattr(module, "computes_in", None)
            if asked is not None:
                layers[user]["computes_in"] = str(asked).removeprefix("torch.")
            if fmt.name not in builtin and not fmt.activations:
                formats[fmt.name] = {
                    "table": list(fmt.native.table),
                    "block": fmt.block,
                    "nested": fmt.nested,
                }
    return {"schema": SCHEMA, "layers": layers, "tied": tied, "formats": formats}


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype


def read_manifest(folder: Path) -> dict[str, Any]:
    """The layers, ties and aliases of a folder; its formats are registered."""
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
        computes_in = {
            name: _dtype_named(about["computes_in"])
            for name, about in data["layers"].items()
            if "computes_in" in about
        }
        tied, aliases = dict(data["tied"]), dict(data.get("aliases", {}))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is no manifest of vramkit: {error!r}") from error
    return {"layers": layers, "tied": tied, "aliases": aliases, "computes_in": computes_in}


def convert_as_saved(model: nn.Module, manifest: dict[str, Any], folder: Path) -> None:
    """Give a skeleton the converted layers that a manifest lists, with their compute dtypes."""
    wanted = {name: fmt for name, (fmt, _, _) in manifest["layers"].items()}
    # Parameters that only a caller's `parameters=` made storable, and none besides.
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights = {f"{name}.weight" if name else "weight" for name in wanted}
    try:
        convert(model, wanted, parameters=sorted(names & (weights | set(wanted))))
    except ValueError as error:
        raise CheckpointError(f"{folder} belongs to another model: {error}") from error
    stored = {
        User(name, leaf, module).layer_name: module.stored_parameter(leaf)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
        for leaf in module.stored_names
    }
    for name, (_, shape, dtype) in manifest["layers"].items():
        if name not in stored:
            raise CheckpointError(f"{folder}: {name!r} was saved converted, and stays plain here")
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{folder}: {name!r} was saved with shape {shape}, the model has "
                f"{stored[name].shape}"
            )
        stored[name].dtype = dtype
    for name, asked in manifest["computes_in"].items():
        object.__setattr__(model.get_submodule(name), "computes_in", asked)
    for name, source_name in manifest["tied"].items():
        if name not in stored or source_name not in stored:
            raise CheckpointError(
                f"{folder} belongs to another model: it ties {name!r} to {source_name!r}, "
                "which are not both converted layers here"
            )
        stored[name].dtype = stored[source_name].dtype


def retype(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the skeleton's plain tensors the dtypes they were saved with."""
    put = TensorPlaces(model)
    for name, value in list(model.state_dict(keep_vars=True).items()):
        if name in checkpoint and value.device.type == "meta":
            put(name, checkpoint.meta(name), getattr(value, "requires_grad", False))
