"""Hunyuan3D-Part in a model manager: P3-SAM and X-Part under the names its guide uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .precision import PrecisionMode

if TYPE_CHECKING:
    import torch

    from .model_manager import VRAMEfficientModelManager


def register_models(
    model_path: str = "tencent/Hunyuan3D-Part",
    *,
    manager: VRAMEfficientModelManager | None = None,
    p3sam: Callable[[], Any] | None = None,
    partformer: Callable[[], Any] | None = None,
) -> VRAMEfficientModelManager:
    """Register P3-SAM and X-Part for `get_p3sam_model` and `get_partformer_pipeline`.

    Args:
        model_path: What upstream's `from_pretrained` takes.
        manager: By default the global `vramkit.model_manager.model_manager`.
        p3sam: Makes P3-SAM's driver, in place of upstream's ``auto_mask.AutoMask()``.
        partformer: Makes the pipeline, in place of upstream's ``PartFormerPipeline``.

    Modules called `sonata` stay in float32 in every precision, as do, in float16, norms that it
    would break; parts that the pipeline's own `.to()` does not reach are converted and moved too.
    Nothing is loaded yet. Without upstream's packages and without loaders the first `get` is an
    ImportError that says what to install. Returns the manager.
    """
    from .lazy_systems import upstream

    if manager is None:
        from . import model_manager as module

        manager = module.model_manager
    assert manager is not None

    def load_p3sam() -> Any:
        return upstream("auto_mask", "AutoMask", "Hunyuan3D-Part's P3-SAM/demo on PYTHONPATH")()

    def load_partformer() -> Any:
        cls = upstream(
            "partgen.partformer_pipeline",
            "PartFormerPipeline",
            "Hunyuan3D-Part's XPart on PYTHONPATH",
        )
        return cls.from_pretrained(model_path=model_path)

    manager.register("p3sam", p3sam or load_p3sam, prepare=_prepare)
    manager.register("partformer", partformer or load_partformer, prepare=_prepare)
    return manager


def _prepare(obj: Any, mode: PrecisionMode, device: str | torch.device | None) -> None:
    from .lazy_partformer import sonata_islands
    from .parts import prepare

    prepare(obj, mode, device, islands=sonata_islands)
