"""The two models from their folders, converted tensor by tensor on the way in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..bnb_config import resolve
from ..candidates import candidates
from ..checkpoint import load
from ..convert import Progress, storage_format
from ..precision import PrecisionMode
from ..shards import Checkpoint
from ..skeleton import MANIFEST, TensorPlaces, build_skeleton, match_names
from .codec import CodecConfig, HeartCodec
from .model import HeartMuLa, HeartMuLaConfig

AnyModel = TypeVar("AnyModel", HeartMuLa, HeartCodec)
CONFIG = "config.json"


def model_factory(folder: Path) -> Callable[[], HeartMuLa]:
    """Builds the language model that a folder's configuration describes."""
    config = HeartMuLaConfig.from_file(folder / CONFIG)
    return lambda: HeartMuLa(config)


def codec_factory(folder: Path) -> Callable[[], HeartCodec]:
    """Builds the codec that a folder's configuration describes, its weight norms folded later."""
    config = CodecConfig.from_file(folder / CONFIG)
    return lambda: HeartCodec(config)


def formats_of(model: nn.Module, precision: Any) -> tuple[Any, Any]:
    """(format by layer, what else a config asked for) of a precision for the language model.

    The one-row embedding for "no text" stays plain. A format that rounds activations has no kernel
    for `audio_head`, which is multiplied by hand: its weight-only form takes its place.
    """
    wanted, skip, request = resolve(precision, ("unconditional_text_embedding",))
    fmt = storage_format(wanted)
    found, _ = candidates(model, skip)
    gathered = (nn.Embedding,)
    return {
        c.name: fmt.weight_only if c.leaf != "weight" or isinstance(c.module, gathered) else fmt
        for c in found
    }, request


def load_model(
    folder: Path,
    factory: Callable[[], AnyModel],
    precision: Any,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool | Progress = False,
) -> AnyModel:
    """A model in `precision` (None: plain, in `dtype`), in evaluation mode on its device.

    One tensor at a time is in memory beside what stays. A folder that was converted already is
    loaded as it is; a precision besides is a ValueError.
    """
    plain = _dtype_of(precision)
    if (folder / MANIFEST).is_file():
        if precision is not None:
            raise ValueError(f"{folder} is converted already: give no precision or config with it")
        model: Any = load(folder, factory=factory, progress=progress)
    elif precision is None or plain is not None:
        model = _load_plain(folder, factory, plain or dtype)
    else:
        by_layer, request = formats_of(build_skeleton(folder, factory), precision)
        model = load(folder, factory=factory, precision=by_layer, progress=progress)
        if request is not None:
            request.finish(model)
    model.to(dtype=plain or dtype)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _dtype_of(precision: Any) -> torch.dtype | None:
    """The dtype of a precision that keeps layers plain; None for others."""
    if not isinstance(precision, str):
        return None
    try:
        mode = PrecisionMode.parse(precision)
    except ValueError:
        return None  # the name of a storage format, or an error later on
    plain = (PrecisionMode.FP32, PrecisionMode.FP16, PrecisionMode.BF16)
    return mode.torch_dtype if mode in plain else None


def _load_plain(folder: Path, factory: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    model = build_skeleton(folder, factory)
    checkpoint = Checkpoint(folder)
    places = match_names(model, checkpoint)
    put = TensorPlaces(model)
    done: set[int] = set()
    for name, value in list(model.state_dict(keep_vars=True).items()):
        if id(value) not in done:
            done.add(id(value))
            tensor = checkpoint.read(places[name])
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
            put(name, tensor, False)
    for module in model.modules():  # weight norms: the same weights, computed once
        if parametrize.is_parametrized(module):
            for leaf in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, leaf)
    return model.requires_grad_(False)
