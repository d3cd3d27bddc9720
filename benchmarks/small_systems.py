"""The five systems at a small scale under one interface: built in a mode, called, streamed.

Weights are random: what these models show is plumbing, bytes and time, never quality. Structures
are the published ones (classes of diffusers, transformers and this package where there are any).
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vramkit
from torch import Tensor
from vramkit.lazy_partformer import sonata_islands
from vramkit.model_objects import tensors_of

from . import small_chatterbox, small_heartmula, small_hunyuan3d, small_qwen

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class SmallSystem:
    """A system whose objects are alike in every process, but for the mode.

    Attributes:
        name: The system's.
        modes: Of weights, the plain one first; each is one row of the table.
        streamed: The one in which `low_vram` is shown.
        build: An object in a mode, at sizes of `sizes`.
        call: One call; its output is the same bits whenever weights are.
        outcome: The output that modes are compared by, with no choice of tokens in between.
        sizes: "test" (about a second), "small" (the table), "large" (`low_vram` on the scale).
    """

    name: str
    modes: tuple[str, ...]
    streamed: str
    build: Callable[[str, Sizes], Any]
    call: Callable[[Any], Tensor]
    sizes: Mapping[str, Sizes]
    outcome: Callable[[Any], Tensor] | None = None
    stream: Callable[[Any, int, str | None], Any] = field(
        default=lambda made, limit, folder: vramkit.enable_vram_management(
            made, f"{limit} B", 0, folder=folder
        )
    )

    def judged(self, made: Any) -> Tensor:
        """What modes are compared by."""
        with torch.inference_mode():
            return (self.outcome or self.call)(made).float()


def bytes_of(made: Any) -> int:
    """Weights and buffers of an object."""
    found = getattr(made, "components", None)  # what it holds behind handles
    held = types.SimpleNamespace(**found) if isinstance(found, Mapping) else made
    return sum(t.nbytes for t in tensors_of(held))


# --- Hunyuan3D-Part ----------------------------------------------------------------------------


def _hunyuan(made: Any, mode: str) -> Any:
    from vramkit.parts import prepare

    prepare(made, mode, None, islands=sonata_islands)
    return made


def _p3sam(mode: str, sizes: Sizes) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = small_hunyuan3d.AutoMask(small_hunyuan3d.P3Sam(sizes["dim"], sizes["depth"]).eval())
    made.count = sizes["points"]  # type: ignore[attr-defined]
    return _hunyuan(made, mode)


@torch.inference_mode()
def _masks(made: Any) -> Tensor:
    points = torch.rand(made.count, 3, generator=torch.Generator().manual_seed(1))
    masks: Tensor = made.model(points, points[:16]).float()
    return masks


def _xpart(mode: str, sizes: Sizes) -> Any:
    return _hunyuan(small_hunyuan3d.partformer(**sizes), mode)


def _parts(made: Any) -> Tensor:
    shape, (_, _, latents) = made(num_inference_steps=2)
    return torch.cat((shape.float().flatten(), latents.float().flatten()))


HUNYUAN_MODES = ("fp32", "fp16", "bf16", "fp8", "int8", "nf4")
P3SAM = SmallSystem(
    "P3-SAM",
    HUNYUAN_MODES,
    "fp32",
    _p3sam,
    _masks,
    {
        "test": {"dim": 64, "depth": 8, "points": 100},
        "small": {"dim": 256, "depth": 16, "points": 500},
        "large": {"dim": 512, "depth": 16, "points": 200},
    },
)
XPART = SmallSystem(
    "X-Part",
    HUNYUAN_MODES,
    "bf16",
    _xpart,
    _parts,
    {
        "test": {"dim": 64, "depth": 5, "context": 48},
        "small": {"dim": 256, "depth": 9, "context": 192},
        "large": {"dim": 512, "depth": 9, "context": 384},
    },
)


# --- HeartMuLa ---------------------------------------------------------------------------------

MULA_OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp8": {"dtype": torch.bfloat16, "precision": "fp8"},
    "int8": {"dtype": torch.bfloat16, "precision": "int8"},
    "load_in_8bit": {"dtype": torch.bfloat16, "bnb_config": {"load_in_8bit": True}},
    "load_in_4bit": {
        "dtype": torch.bfloat16,
        "bnb_config": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
    },
}


def _mula(mode: str, sizes: Sizes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        small_heartmula.write(Path(folder), **sizes)
        return small_heartmula.load(Path(folder), **MULA_OPTIONS[mode])


HEARTMULA = SmallSystem(
    "HeartMuLa",
    tuple(MULA_OPTIONS),
    "bf16",
    _mula,
    small_heartmula.music,
    {
        "test": {"dim": 128, "layers": 4},
        "small": {"dim": 512, "layers": 4},
        "large": {"dim": 768, "layers": 6},
    },
    outcome=small_heartmula.logits,
)


# --- Qwen-Image --------------------------------------------------------------------------------

QWEN_OPTIONS: dict[str, dict[str, Any]] = {
    "original": {},
    "fp8": {},
    "fp8, modulation int8": {"modulation": "int8"},
    "int8": {"precision": "int8"},
    "nf4": {"precision": "nf4"},
}


def _qwen(mode: str, sizes: Sizes) -> Any:
    from vramkit.qwen_image import QwenImage

    text = sizes["heads"] * 64
    with torch.random.fork_rng():
        model = small_qwen.transformer(sizes["layers"], sizes["heads"], 64, text)
        made = small_qwen.pipeline(model)
    return QwenImage(made, "original" if mode == "original" else "fp8", **QWEN_OPTIONS[mode])


def _image(made: Any) -> Tensor:
    text = made.transformer.txt_norm.weight.shape[0]
    return small_qwen.image_of(made, text)


def _stream_qwen(made: Any, limit: int, folder: str | None) -> Any:
    made.enable_vram_management(f"{limit} B", 0, stay=(), folder=folder)
    return made.pipeline


QWEN = SmallSystem(
    "Qwen-Image",
    tuple(QWEN_OPTIONS),
    "fp8",
    _qwen,
    _image,
    {
        "test": {"layers": 3, "heads": 2},
        "small": {"layers": 6, "heads": 8},
        "large": {"layers": 8, "heads": 8},
    },
    stream=_stream_qwen,
)


# --- Chatterbox --------------------------------------------------------------------------------

CHATTERBOX_OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"int8": True},
    "int8, S3Gen bfloat16": {"int8": True, "s3gen_dtype": "bfloat16"},
}


def _chatterbox(mode: str, sizes: Sizes) -> Any:
    from vramkit.chatterbox import prepare

    made = small_chatterbox.SmallChatterbox(**sizes)
    prepare(made, **CHATTERBOX_OPTIONS[mode])
    return made


@torch.inference_mode()
def _speech(made: Any) -> Tensor:
    return made.generate()


CHATTERBOX = SmallSystem(
    "Chatterbox",
    tuple(CHATTERBOX_OPTIONS),
    "int8",
    _chatterbox,
    _speech,
    {
        "test": {"width": 128, "layers": 4},
        "small": {"width": 256, "layers": 6},
        "large": {"width": 1024, "layers": 5},
    },
    outcome=lambda made: made.logits(),
)

SYSTEMS = {one.name: one for one in (P3SAM, XPART, HEARTMULA, QWEN, CHATTERBOX)}
