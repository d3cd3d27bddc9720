"""`ModelConfig` as DiffSynth has it, and loading by it: tensor by tensor, stored as they arrive.

What a file holds is stored in `offload_dtype` (FP8 with a scale per output row, not a bare cast)
and computed in `computation_dtype`; norms, biases and what is kept in 16 bit are never stored in
eight.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..candidates import candidates
from ..checkpoint import _FreedMemory as FreedMemory
from ..convert import (
    Precision,
    Progress,
    check_weight,
    encode_candidate,
    keep_ties,
    progress_bar,
    storage_format,
    swap_candidate,
)
from ..errors import CheckpointError
from ..formats import StorageFormat
from ..shards import Checkpoint
from ..skeleton import TensorPlaces, build_skeleton, match_names
from .keep import KEEP, MODULATION

_STORED: dict[torch.dtype, str | None] = {
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8_e5m2",
    torch.int8: "int8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: None,
}
_PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class ModelConfig:
    """Files of one component, how they are stored, and what is computed in.

    Attributes:
        path: A file, a folder, or a glob such as "transformer/*.safetensors", from `root` on.
        offload_dtype: What weights are stored in: a torch dtype (float8_e4m3fn, float8_e5m2, int8,
            bfloat16, float16, float32), or a precision's name such as "nf4". None: as in the files.
        computation_dtype: What is computed in, and what is not stored otherwise is cast to. None:
            the pipeline's `torch_dtype`, or as in the files.
        component: Which part of the pipeline it is; None: the folder's name, or its model's class.
        keep: Layers that stay in `computation_dtype`; None: `KEEP` for a transformer, else none.
        modulation: What a transformer's modulation layers are stored in, if not as `keep` says.
        factory: Builds the module, where its folder has no config.json.
        root: Where relative paths begin; None: the working folder.
    """

    path: str | os.PathLike[str]
    offload_dtype: torch.dtype | str | StorageFormat | None = None
    computation_dtype: torch.dtype | None = None
    component: str | None = None
    keep: Sequence[str] | None = None
    modulation: Precision | None = None
    factory: Callable[[], nn.Module] | None = field(default=None, repr=False)
    root: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        self.storage  # a wrong dtype is an error here, not after minutes of loading  # noqa: B018
        if self.computation_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                "computation_dtype is float32, float16 or bfloat16, not "
                f"{self.computation_dtype}; offload_dtype is what weights are stored in"
            )

    @property
    def storage(self) -> StorageFormat | None:
        """The format that `offload_dtype` means; None for plain storage."""
        asked = self.offload_dtype
        if isinstance(asked, torch.dtype):
            if asked not in _STORED:
                names = ", ".join(str(dtype) for dtype in _STORED)
                raise ValueError(f"weights cannot be stored in {asked}; choose among {names}")
            name = _STORED[asked]
            return None if name is None else storage_format(name)
        if asked is None or str(asked).strip().lower() == "fp32":
            return None
        return storage_format(asked)

    def files(self) -> list[Path]:
        """The files, sorted; FileNotFoundError where none matches."""
        pattern = os.path.join(self.root or "", os.fspath(self.path))
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "*.safetensors")
        found = sorted(Path(name) for name in glob.glob(pattern) if os.path.isfile(name))
        if not found:
            where = "" if os.path.isabs(pattern) else f" (from {os.getcwd()})"
            raise FileNotFoundError(f"no file matches {pattern!r}{where}")
        other = [file for file in found if file.suffix != ".safetensors"]
        if other:
            raise CheckpointError(f"{other[0]} is no safetensors file; pickled ones are not read")
        if len({file.parent for file in found}) > 1:
            raise CheckpointError(
                f"{pattern!r} matches files in several folders; one component each"
            )
        return found


def load_model(
    config: ModelConfig,
    *,
    torch_dtype: torch.dtype | None = None,
    progress: bool | Progress = False,
) -> nn.Module:
    """The module of a component, built without memory and filled tensor by tensor.

    The class is that of the folder's config.json (diffusers' or transformers'), or `factory`'s.
    Host memory stays under the loaded size, two of the largest tensors and about 100 MB. Raises
    FileNotFoundError where nothing matches, CheckpointError for files that are unsound, not all of
    the component's, or another model's, NonFiniteWeightError for what cannot be stored.
    """
    files = config.files()
    folder = files[0].parent
    checkpoint = _checkpoint(files)
    model = build_skeleton(checkpoint.path, config.factory or _builder(folder))
    compute = config.computation_dtype or torch_dtype
    places = match_names(model, checkpoint)
    chosen = _chosen(model, config, compute)
    put, freed = TensorPlaces(model), FreedMemory()
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
                parts = encode_candidate(candidate, tensor, fmt)
                del tensor
                freed.count(size)
                swap_candidate(candidate, parts)
                if compute is not None:
                    for user in candidate.users:
                        user.module.compute_dtype = compute  # type: ignore[assignment]
            else:
                if compute is not None and tensor.is_floating_point() and tensor.dtype != compute:
                    tensor = tensor.to(compute)
                    freed.count(size)
                put(name, tensor)
            advance(size, name)
    keep_ties(model)
    left = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    if left:
        raise CheckpointError(f"{checkpoint.path} has no values for {left[0]!r} of {len(left)}")
    return model.eval().requires_grad_(False)


def _checkpoint(files: list[Path]) -> Checkpoint:
    if len(files) == 1:
        return Checkpoint(files[0])
    found = Checkpoint(files[0].parent)
    beside = {file.name for file in files[0].parent.glob("*.safetensors")}
    if beside != {file.name for file in files}:
        raise CheckpointError(
            f"{files[0].parent} holds {len(beside)} safetensors files, of which {len(files)} were "
            "asked for: name one file, or all"
        )
    return found


def _builder(folder: Path) -> Callable[[], nn.Module]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, which says what model it holds; give factory="
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    name = config.get("_class_name")
    if name is None:
        return lambda: _transformers_model(folder)
    import diffusers

    cls: Any = getattr(diffusers, name, None)
    if cls is None:
        raise CheckpointError(f"{file}: diffusers {diffusers.__version__} has no {name!r}")
    return lambda: cls.from_config(config)  # type: ignore[no-any-return]


def _transformers_model(folder: Path) -> nn.Module:
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
    model: nn.Module = (
        transformers.AutoModel.from_config(config) if cls is None else cls._from_config(config)
    )
    return model


def _chosen(
    model: nn.Module, config: ModelConfig, compute: torch.dtype | None
) -> dict[str, tuple[Any, StorageFormat]]:
    """The layers to store, by the name of their weight, and how."""
    fmt = config.storage
    if fmt is None or (fmt.name in _PLAIN and compute in (None, _PLAIN[fmt.name])):
        return {}
    keep = config.keep
    if keep is None:
        keep = KEEP if hasattr(model, "transformer_blocks") else ()
    found = {c.full_name: (c, fmt) for c in candidates(model, keep)[0] if c.folding is None}
    if config.modulation is not None:
        wanted = storage_format(config.modulation)
        every = candidates(model)[0]
        found |= {c.full_name: (c, wanted) for c in every if _modulates(c.name)}
    return found


def _modulates(name: str) -> bool:
    from ..convert import matches

    return matches(name, MODULATION)


def from_pretrained(
    model_configs: Iterable[ModelConfig],
    *,
    torch_dtype: torch.dtype = torch.bfloat16,
    tokenizer: Any = None,
    processor: Any = None,
    scheduler: Any = None,
    vram_limit: int | float | str | None = None,
    vram_buffer: int | float | str = 0.5,
    progress: bool | Progress = False,
) -> Any:
    """A Qwen-Image pipeline of diffusers from its files, in our wrapper.

    Args:
        model_configs: One for each component: transformer, vae, and text_encoder where prompts are
            text.
        torch_dtype: What components compute in whose config does not say.
        tokenizer, processor: transformers' objects, or None where prompts come as embeddings. With
            a processor it is the editing pipeline.
        scheduler: None: diffusers' flow matching Euler scheduler with the settings of a `scheduler`
            folder beside the transformer's, or its defaults.
        vram_limit, vram_buffer: With a limit, `enable_vram_management` follows.

    Raises as `load_model`, and ValueError for components that are missing, given twice or unknown.
    """
    from .wrapper import QwenImage

    configs = list(model_configs)
    names = [_component(config) for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two configs are of the component {name!r}")
    lost = {"transformer", "vae"} - set(names)
    if lost:
        raise ValueError(f"no config is of the {min(lost)}; a pipeline needs transformer and vae")
    parts = {
        name: load_model(config, torch_dtype=torch_dtype, progress=progress)
        for name, config in zip(names, configs, strict=True)
    }
    import diffusers

    if scheduler is None:
        scheduler = _scheduler(configs[names.index("transformer")])
    given: dict[str, Any] = {
        "scheduler": scheduler,
        "text_encoder": parts.get("text_encoder"),
        "tokenizer": tokenizer,
        "transformer": parts["transformer"],
        "vae": parts["vae"],
    }
    if processor is not None:
        made: Any = diffusers.QwenImageEditPipeline(processor=processor, **given)
    else:
        made = diffusers.QwenImagePipeline(**given)
    pipe = QwenImage(made)
    if vram_limit is not None:
        pipe.enable_vram_management(vram_limit, vram_buffer)
    return pipe


_CLASSES = {
    "QwenImageTransformer2DModel": "transformer",
    "AutoencoderKLQwenImage": "vae",
    "Qwen2_5_VLForConditionalGeneration": "text_encoder",
}


def _component(config: ModelConfig) -> str:
    name = config.component or config.files()[0].parent.name
    if name in ("transformer", "text_encoder", "vae"):
        return name
    file = config.files()[0].parent / "config.json"
    if config.component is None and file.is_file():
        told = json.loads(file.read_text(encoding="utf-8"))
        classes = [told.get("_class_name"), *(told.get("architectures") or [])]
        known = [_CLASSES[c] for c in classes if c in _CLASSES]
        if known:
            return known[0]
    raise ValueError(
        f"{name!r} is no component; name one of transformer, text_encoder, vae (component=)"
    )


def _scheduler(config: ModelConfig) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = config.files()[0].parent.parent / "scheduler"
    if (folder / "scheduler_config.json").is_file():
        return FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    return FlowMatchEulerDiscreteScheduler()
