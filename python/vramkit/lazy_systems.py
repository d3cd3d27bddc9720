"""Lazy wrappers of the other systems' own pipelines: thin, upstream's code does the work.

Each imports its package at the first use, or takes a `loader` in its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from .lazy_pipeline import LazyPipeline


def upstream(module: str, name: str, package: str) -> Any:
    """The class `name` of an upstream module; ImportError says what to install."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{module}.{name} is not there ({error}): install {package}, or pass loader="
        ) from error


class LazyP3SAM(LazyPipeline):
    """P3-SAM's `AutoMask`, whose encoder `sonata` stays float32; `pipe.predict_aabb(mesh)`.

    Args:
        ckpt_path: Of the weights, as upstream takes it.
        loader: Makes the object, in place of upstream's ``auto_mask.AutoMask``.
        auto_mask: Further arguments of upstream's class (point_num, prompt_num, …).
        options: As for `LazyPipeline`.
    """

    def __init__(
        self,
        ckpt_path: str | None = None,
        *,
        loader: Callable[..., Any] | None = None,
        auto_mask: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        def load() -> Any:
            cls = upstream(
                "auto_mask",
                "AutoMask",
                "Hunyuan3D-Part's P3-SAM (github.com/Tencent-Hunyuan/Hunyuan3D-Part; put its "
                "folder P3-SAM/demo on PYTHONPATH)",
            )
            return cls(ckpt_path=ckpt_path, **(auto_mask or {}))

        from .lazy_partformer import sonata_islands

        super().__init__(loader or load, **{"islands": sonata_islands, **options})


class LazyHeartMuLa(LazyPipeline):
    """HeartMuLa's music pipeline; `vramkit.heartmula` serves it where heartlib is not installed.

    Args:
        path: The folder of the checkpoints.
        version: "3B" or "7B".
        bnb_config: A `BitsAndBytesConfig` for the language model. The codec stays float32.
        loader: Makes the pipeline, in place of ours or heartlib's.
        pipeline: Further arguments of `from_pretrained`.
        options: As for `LazyPipeline`.
    """

    def __init__(
        self,
        path: str,
        version: str = "3B",
        *,
        bnb_config: Any = None,
        loader: Callable[..., Any] | None = None,
        pipeline: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        def load() -> Any:
            from .heartmula import HeartMuLaGenPipeline

            return HeartMuLaGenPipeline.from_pretrained(
                path, version=version, bnb_config=bnb_config, **(pipeline or {})
            )

        super().__init__(loader or load, **options)


class LazyQwenImage(LazyPipeline):
    """diffusers' Qwen-Image pipeline (`QwenImagePipeline`, or another class by name).

    Args:
        path: A repository's name or a folder, as diffusers takes it.
        pipeline_class: The name of the class in diffusers.
        torch_dtype: The dtype that diffusers loads in, by name.
        loader: Makes the pipeline, in place of diffusers'.
        options: As for `LazyPipeline`; precision by component: {"transformer": "fp8"}.
    """

    def __init__(
        self,
        path: str = "Qwen/Qwen-Image",
        *,
        pipeline_class: str = "QwenImagePipeline",
        torch_dtype: str = "bfloat16",
        loader: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        def load() -> Any:
            import torch

            cls = upstream("diffusers", pipeline_class, "diffusers (pip install diffusers)")
            return cls.from_pretrained(path, torch_dtype=getattr(torch, torch_dtype))

        super().__init__(loader or load, **options)


class LazyChatterbox(LazyPipeline):
    """Chatterbox's `ChatterboxTTS`; `pipe.generate(text)`.

    Args:
        path: A folder of weights; None: what upstream downloads.
        loader: Makes the object, in place of upstream's ``chatterbox.tts.ChatterboxTTS``.
        options: As for `LazyPipeline`; precision by component: {"t3": "int8"}.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        loader: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        def load(device: Any = None) -> Any:
            cls = upstream(
                "chatterbox.tts", "ChatterboxTTS", "chatterbox-tts (pip install chatterbox-tts)"
            )
            place = "cpu" if device is None else str(device)
            return cls.from_pretrained(place) if path is None else cls.from_local(path, place)

        super().__init__(loader or load, **options)
