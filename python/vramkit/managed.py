"""What a model manager keeps about each model: its record, its events, and what it will weigh."""

from __future__ import annotations

import contextlib
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import StaleHandleError
from .hardware import compute_dtype
from .precision import PrecisionMode

if TYPE_CHECKING:
    import os

    import torch
    from torch import nn

    from .model_handle import ModelHandle
    from .model_manager import VRAMEfficientModelManager
    from .model_objects import Storages, TensorShape

# (what a loader returned, the precision, the device): converts it in place and moves it.
Prepare = Callable[[Any, PrecisionMode, "str | torch.device | None"], object]

EVENTS = ("loading", "loaded", "evicting", "evicted", "failed")


@dataclass(frozen=True)
class ManagerEvent:
    """What observers are told.

    `bytes`: of the weights when loaded or evicting; really freed when evicted; else 0.
    `seconds`: of a load that has ended. `error`: what a load failed with.
    """

    kind: str
    name: str
    precision: PrecisionMode
    bytes: int = 0
    seconds: float = 0.0
    error: BaseException | None = None


@dataclass
class Component:
    """A registered model. What is below `loader` changes only under the manager's lock."""

    id: int
    name: str
    loader: Callable[[], Any]
    precision: PrecisionMode | None
    checkpoint: str | os.PathLike[str] | None
    model: Any = None
    handle: ModelHandle | None = None
    storages: Storages | None = None
    generation: int = 0
    mode: PrecisionMode | None = None  # of the model in memory
    shapes: list[TensorShape] | None = None  # before conversion, from the latest load
    measured: dict[PrecisionMode, int] = field(default_factory=dict)
    inputs: Any = None  # of an example call, for estimates of its peak
    prepare: Prepare | None = None  # in place of the usual conversion
    estimates: dict[PrecisionMode, dict[str, Any]] = field(default_factory=dict)


class Load:
    """Source of handles: one load of one component. Holds neither manager nor model."""

    def __init__(self, manager: VRAMEfficientModelManager, component: Component, generation: int):
        self.name = component.name
        self._manager = weakref.ref(manager)
        self._id = component.id
        self._generation = generation

    @contextlib.contextmanager
    def lease(self) -> Iterator[Any]:
        """The model for the length of the with block; StaleHandleError if this load is gone."""
        manager = self._manager()
        if manager is None:
            raise StaleHandleError(
                f"the manager of {self.name!r} is gone, and its models with it; keep a reference "
                "to the manager for as long as its handles are used"
            )
        with manager._leased(self.name, self._id, self._generation) as model:
            yield model

    def loaded(self) -> bool:
        """Whether this load is still in memory."""
        manager = self._manager()
        return manager is not None and manager._is_loaded(self._id, self._generation)


def known_bytes(
    component: Component, mode: PrecisionMode, device: str | torch.device | None
) -> tuple[int | None, str]:
    """Bytes of a component's weights in a mode, and how that is known or why it is not."""
    try:
        return _computed_bytes(component, mode, device)
    except (OSError, ValueError) as error:
        return None, f"its weights cannot be sized: {error}"


def _computed_bytes(
    component: Component, mode: PrecisionMode, device: str | torch.device | None
) -> tuple[int | None, str]:
    from .model_objects import PLAIN_MODES, bytes_in, checkpoint_shapes, declared_shapes
    from .skeleton import MANIFEST

    measured, shapes = component.measured.get(mode), component.shapes
    if measured is not None:
        return measured, "measured when it was loaded"
    source = "from the shapes of its last load"
    if component.checkpoint is not None and (Path(component.checkpoint) / MANIFEST).is_file():
        return None, "its checkpoint is converted already; known once it has been loaded"
    if shapes is None and component.checkpoint is not None:
        source = "from the checkpoint's header"
        if mode in PLAIN_MODES:
            shapes = checkpoint_shapes(component.checkpoint)
    elif shapes is None and getattr(component.loader, "shapes", None) is not None:
        source = "from the shapes its loader declares"
        shapes = declared_shapes(component.loader.shapes)  # type: ignore[attr-defined]
    if mode in PLAIN_MODES and shapes is not None:
        dtype = compute_dtype(mode, device or "cpu")
        return sum(shape.bytes_at(dtype) for shape in shapes), source
    model = component.model
    if model is not None and component.mode in PLAIN_MODES:
        return bytes_in(model, mode, device), "from the shapes of the model in memory"
    if component.checkpoint is not None:
        return _converted_bytes(component.checkpoint, mode, device, bytes_in)
    if shapes is not None:
        return None, f"which layers {mode.value} converts is known once it has been loaded so"
    return None, "not loaded yet, and neither a checkpoint nor its loader says its shapes"


def _converted_bytes(
    checkpoint: str | os.PathLike[str],
    mode: PrecisionMode,
    device: str | torch.device | None,
    bytes_in: Callable[..., int],
) -> tuple[int | None, str]:
    """Bytes of a checkpoint whose layers are converted, if it says what model it holds."""
    if not (Path(checkpoint) / "config.json").is_file():
        return None, f"the checkpoint has no config.json to say which layers {mode.value} converts"
    if importlib.util.find_spec("transformers") is None:
        return None, f"transformers is needed to know which layers {mode.value} converts"
    from .skeleton import build_skeleton

    return bytes_in(build_skeleton(checkpoint), mode, device), "from the checkpoint's header"


CALL_KEYS = ("activations_bytes", "peak_bytes", "interval_bytes")


def known_call(
    component: Component, mode: PrecisionMode, device: str | torch.device | None
) -> dict[str, Any]:
    """What a call on the component's example inputs takes: `CALL_KEYS` and "call_source".

    The keys are None where nothing says what a call is, or the model cannot be traced; then
    "call_source" says why. An answer is kept for as long as the component is registered.
    """
    if mode in component.estimates:
        return component.estimates[mode]
    nothing = dict.fromkeys(CALL_KEYS)
    if component.inputs is None:
        why = "no example inputs: register(…, inputs=…) makes activations and the peak known"
        return {**nothing, "call_source": why}
    try:
        skeleton, source = _skeleton_in(component, mode, device)
        if skeleton is None:
            return {**nothing, "call_source": source}
        from .estimator import estimate

        found = estimate(skeleton, None, component.inputs, target=_target(device))
    except (OSError, ValueError, RuntimeError, TypeError, ImportError) as error:
        return {**nothing, "call_source": f"its call cannot be traced: {error}"}
    answer: dict[str, Any] = {key: getattr(found, key) for key in CALL_KEYS}
    answer["interval_bytes"] = found.interval_bytes and list(found.interval_bytes)
    answer["call_source"] = f"traced {source}; interval: {found.interval_from}"
    component.estimates[mode] = answer
    return answer


def _target(device: str | torch.device | None) -> str:
    return "cuda" if device is not None and str(device).startswith("cuda") else "cpu"


def _skeleton_in(
    component: Component, mode: PrecisionMode, device: str | torch.device | None
) -> tuple[nn.Module | None, str]:
    """(the model as it will be in `mode`, without memory, or None; where from or why not)."""
    from torch import nn

    from .estimator import meta_copy
    from .model_objects import PLAIN_MODES, apply_precision
    from .skeleton import MANIFEST, build_skeleton

    model = component.model
    if isinstance(model, nn.Module) and (component.mode is mode or component.mode in PLAIN_MODES):
        skeleton, source = meta_copy(model), "on the shapes of the model in memory"
        if component.mode is mode:
            return skeleton, source
    elif model is not None and not isinstance(model, nn.Module):
        return None, "it is an object of several modules: vramkit.estimate_pipeline traces such"
    elif component.checkpoint is None:
        return None, "not loaded yet, and no checkpoint says what model it is"
    elif not (Path(component.checkpoint) / "config.json").is_file():
        return None, "not loaded yet, and the checkpoint has no config.json to say what model it is"
    elif (Path(component.checkpoint) / MANIFEST).is_file():
        return None, "its checkpoint is converted already; known once it has been loaded"
    else:
        skeleton = build_skeleton(component.checkpoint)
        source = "on the checkpoint's header and configuration"
    apply_precision(skeleton, mode)
    return skeleton, source
