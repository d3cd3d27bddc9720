"""`LazyPartFormerPipeline`: Hunyuan3D-Part's X-Part, loaded at its first use in a precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .bnb_config import is_config
from .islands import AUTO, modules_by_path
from .lazy_pipeline import LazyPipeline, parse_dtype
from .lazy_systems import upstream

if TYPE_CHECKING:
    import torch

    from .parts import Islands


def sonata_islands(obj: Any) -> list[str | type]:
    """Modules called `sonata`, which upstream runs in float32, and what float16 breaks."""
    found = (path for path, _ in modules_by_path(obj) if path.rpartition(".")[2] == "sonata")
    return [AUTO, *found]


class LazyPartFormerPipeline(LazyPipeline):
    """X-Part by the interface of its guide: nothing is loaded before the first use.

    Args:
        model_path: What upstream's `from_pretrained` takes: a repository's name or a folder.
        dtype: A torch dtype, its name, a precision ("fp16", "nf4"), a `BitsAndBytesConfig`, or a
            dict of them by component ("model", "vae", "conditioner", "bbox_predictor", "").
        enable_mixed_precision: Run calls under autocast, with the islands in float32. Without a
            CUDA device a warning, and calls run as they are.
        verbose: Print what is loaded and freed.
        loader: Makes the pipeline, in place of upstream's
            ``partgen.partformer_pipeline.PartFormerPipeline.from_pretrained``.
        islands: Modules that stay in float32. By default those called `sonata`, where there are
            any, and for float16 the norms that it breaks.
        options: As for `LazyPipeline`: device, budget, keep, progress.

    Raises ValueError for an unknown dtype, when it is made; ImportError that says what to install,
    when it is first used without upstream's package and without `loader`.
    """

    def __init__(
        self,
        model_path: str = "tencent/Hunyuan3D-Part",
        dtype: Any = "fp32",
        enable_mixed_precision: bool = False,
        verbose: bool = True,
        *,
        loader: Callable[..., Any] | None = None,
        islands: Islands | None = None,
        **options: Any,
    ) -> None:
        precision = _precision(dtype)

        def load() -> Any:
            cls = upstream(
                "partgen.partformer_pipeline",
                "PartFormerPipeline",
                "Hunyuan3D-Part's XPart (github.com/Tencent-Hunyuan/Hunyuan3D-Part; put its folder "
                "XPart on PYTHONPATH)",
            )
            return cls.from_pretrained(model_path=model_path, verbose=verbose)

        super().__init__(
            loader or load,
            precision=precision,
            islands=sonata_islands if islands is None else islands,
            verbose=verbose,
            **options,
        )
        self._model_path = model_path
        self._mixed = bool(enable_mixed_precision)

    @property
    def model_path(self) -> str:
        """What `from_pretrained` will be given."""
        return self._model_path

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of plain tensors at the next load (of the part "" where there are several)."""
        wanted = self._precision
        if isinstance(wanted, dict):
            wanted = wanted.get("", "fp32")
        from .hardware import compute_dtype

        return compute_dtype("bf16" if is_config(wanted) else wanted, self._manager.device)

    def _around(self, loaded: Any) -> AbstractContextManager[Any]:
        if not self._mixed:
            return super()._around(loaded)
        from .islands import autocast_for
        from .model_objects import device_of

        return autocast_for(device_of(loaded), self.dtype)


def _precision(dtype: Any) -> Any:
    if is_config(dtype):
        return dtype
    if isinstance(dtype, dict):
        return {name: _precision(value) for name, value in dtype.items()}
    return parse_dtype(dtype)
