"""A checkpoint's model without its memory, and which stored tensor belongs to which parameter."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .shards import Checkpoint

MANIFEST = "vramkit.json"  # marks a folder that vramkit wrote
_skeleton_lock = threading.Lock()


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
        model = _built_by(factory)
    if (folder / MANIFEST).is_file():
        return model.eval()
    checkpoint = Checkpoint(source)
    places = match_names(model, checkpoint)
    put = TensorPlaces(model)
    for name, parameter in list(model.named_parameters()):
        if name in places:
            put(name, checkpoint.meta(places[name]), parameter.requires_grad)
    return model.eval()


def _built_by(factory: Callable[[], nn.Module]) -> nn.Module:
    try:
        with _parameters_on_meta():
            return factory()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise CheckpointError(
            "the factory computes with its parameters' values while it builds the module "
            f"({str(error).splitlines()[0]}); here parameters have shapes but no values. Let the "
            "factory build plain layers, without a parametrization, and add such steps afterwards"
        ) from error


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


class TensorPlaces:
    """Puts tensors into a model: called with a name, a tensor, and whether it takes gradients.

    Where parameters lie is looked up once: in a model of many layers, doing so for each tensor
    takes longer than reading it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, leaf))

    def __call__(self, name: str, tensor: Tensor, requires_grad: bool = False) -> None:
        """Put `tensor` in the place of a parameter or buffer, and of all that share it."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self._model.get_submodule(owner_name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
            return
        places = self._places.pop(id(owner._parameters[leaf]))
        grad = requires_grad and tensor.is_floating_point()
        made = nn.Parameter(tensor, requires_grad=grad)
        for module, key in places:
            module._parameters[key] = made
        self._places[id(made)] = places


def set_tensor(model: nn.Module, name: str, tensor: Tensor, requires_grad: bool = False) -> None:
    """Put one tensor into a model whose layers change meanwhile."""
    TensorPlaces(model)(name, tensor, requires_grad)


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
