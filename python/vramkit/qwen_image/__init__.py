"""Qwen-Image in less memory: diffusers' pipelines and DiffSynth's, by four documented modes.

>>> from vramkit import qwen_image
>>> print(qwen_image.recommend(12))
low_vram_fused: needs 5.5 GiB of 11.7 GiB
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configs import ModelConfig, from_pretrained, load_model
    from .keep import KEEP, KeepReport, measure_keep
    from .lora import LoraStack
    from .lora_files import read_lora
    from .management import Management, enable_vram_management
    from .modes import Mode, Recommendation, recommend
    from .pictures import ModeComparison, compare_modes
    from .tiling import Tiling, choose_tiling
    from .wrapper import QwenImage

# Loaded at first use, as in vramkit itself.
_LAZY = {
    "ModelConfig": "configs",
    "from_pretrained": "configs",
    "load_model": "configs",
    "KEEP": "keep",
    "KeepReport": "keep",
    "measure_keep": "keep",
    "LoraStack": "lora",
    "read_lora": "lora_files",
    "Management": "management",
    "enable_vram_management": "management",
    "Mode": "modes",
    "Recommendation": "modes",
    "recommend": "modes",
    "ModeComparison": "pictures",
    "compare_modes": "pictures",
    "Tiling": "tiling",
    "choose_tiling": "tiling",
    "QwenImage": "wrapper",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vramkit.qwen_image' has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


__all__ = [
    "KEEP",
    "KeepReport",
    "LoraStack",
    "Management",
    "Mode",
    "ModeComparison",
    "ModelConfig",
    "QwenImage",
    "Recommendation",
    "Tiling",
    "choose_tiling",
    "compare_modes",
    "enable_vram_management",
    "from_pretrained",
    "load_model",
    "measure_keep",
    "read_lora",
    "recommend",
]
