"""Which precision this machine's hardware runs natively, how full it is, and small experiments.

Importing this touches neither torch.cuda nor a driver; calling its functions may.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from .capabilities import of_device
from .precision import PrecisionMode
from .sizes import GIB

if TYPE_CHECKING:
    import torch

    from .model_manager import VRAMEfficientModelManager

# Total memory of a card as the driver reports it: a "12 GB" card has about 11.7 GiB, an "8 GB" card
# about 7.8. Compared with these, in GiB.
LARGE_CARD_GB = 11.0
MEDIUM_CARD_GB = 7.5


class VramUsage(NamedTuple):
    """What torch holds on the current CUDA device, in GiB; zeros where there is none."""

    allocated_gb: float
    reserved_gb: float


def has_native_bf16(device: str | torch.device | int | None = None) -> bool:
    """Whether a CUDA device computes in bfloat16 by itself (compute capability 8.0 or later).

    By the table of capabilities.py. torch.cuda.is_bf16_supported() also says yes where bfloat16 is
    emulated, and is not asked.
    """
    return of_device(device).native("bf16")


def get_optimal_precision() -> PrecisionMode:
    """FP32 without CUDA, BF16 where it is native (capability 8.0 or later), else FP16."""
    import torch

    if not torch.cuda.is_available():
        return PrecisionMode.FP32
    return PrecisionMode.BF16 if has_native_bf16() else PrecisionMode.FP16


def compute_dtype(
    mode: PrecisionMode | str, device: str | torch.device | None = None
) -> torch.dtype:
    """The dtype of a model's plain tensors in this mode on this device.

    `device` None means CUDA if there is any. That is the mode's own dtype, except for float16 in
    place of bfloat16 on a CUDA device that only emulates it.
    """
    import torch

    mode = PrecisionMode.parse(mode)
    dtype = mode.torch_dtype
    if device is None:
        on_cuda = torch.cuda.is_available()
    else:
        on_cuda = torch.device(device).type == "cuda"
    if dtype is not torch.bfloat16 or not on_cuda or has_native_bf16(device):
        return dtype
    return torch.float16


def setup_optimal_precision(manager: VRAMEfficientModelManager | None = None) -> PrecisionMode:
    """Set the manager (by default the global one) to `get_optimal_precision()`, and return that."""
    mode = get_optimal_precision()
    _manager(manager).set_precision_mode(mode)
    return mode


def configure_production_precision(
    manager: VRAMEfficientModelManager | None = None,
) -> PrecisionMode:
    """Set the manager (by default the global one) by the card's total memory; return the mode.

    ====================  =============================  =======================
    total memory          precision                      aggressive unloading
    ====================  =============================  =======================
    no CUDA               FP32                           unchanged
    11 GiB ("12 GB") up   BF16 if native, else FP16      off
    7.5 GiB ("8 GB") up   FP16                           off
    less                  FP16                           on
    ====================  =============================  =======================

    Aggressive unloading keeps one model at most and gives torch's cached memory back after each
    call (`VRAMEfficientModelManager.aggressive_unloading`).
    """
    import torch

    target = _manager(manager)
    mode = get_optimal_precision()
    if torch.cuda.is_available():
        total_gb = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
        if total_gb < LARGE_CARD_GB:
            mode = PrecisionMode.FP16
        target.aggressive_unloading = total_gb < MEDIUM_CARD_GB
    target.set_precision_mode(mode)
    return mode


def monitor_vram_usage() -> VramUsage:
    """Print and return what torch holds on the current CUDA device, in GiB."""
    import torch

    if not torch.cuda.is_available():
        print("CUDA is not available: no VRAM in use")
        return VramUsage(0.0, 0.0)
    usage = VramUsage(torch.cuda.memory_allocated() / GIB, torch.cuda.memory_reserved() / GIB)
    print(f"VRAM allocated: {usage.allocated_gb:.2f} GiB, reserved: {usage.reserved_gb:.2f} GiB")
    return usage


def run_with_precision(
    mode: PrecisionMode | str,
    x: Any,
    model: Any | None = None,
    *,
    manager: VRAMEfficientModelManager | None = None,
) -> Any:
    """Run a model once in another precision, without gradients, and return its output.

    Args:
        mode: The precision.
        x: A Tensor, a tuple (positional arguments) or a dict (keyword arguments). Floating-point
            tensors in it are cast to the compute dtype and moved to the model's device.
        model: A module, of which a copy is converted; it stays what it is. By default the
            manager's current model, which is reloaded in `mode` and stays loaded so until it is
            asked for again; the manager's settings stay what they are.
        manager: By default the global one.

    Raises RuntimeError if there is neither a model nor a current one.
    """
    import torch

    from .model_objects import apply_precision, device_of

    mode = PrecisionMode.parse(mode)
    if model is not None:
        changed = copy.deepcopy(model)
        dtype = apply_precision(changed, mode)
        with torch.no_grad():
            return _call(changed, x, dtype, device_of(changed))
    target = _manager(manager)
    name = target.get_current_model_type()
    if name is None:
        raise RuntimeError(
            "there is no current model to run: pass model=, or load one with manager.get(name)"
        )
    with target.lease(name, precision=mode) as loaded, torch.no_grad():
        device = device_of(loaded)
        return _call(loaded, x, compute_dtype(mode, device), device)


def calculate_quality_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far `b` is from the reference `a`, in percent: 100 ‖a - b‖ / ‖a‖, in double precision.

    Infinity if either holds NaN or infinity, or if only the reference is all zeros. Raises
    ValueError for different shapes.

    >>> calculate_quality_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    10.0
    """
    import torch

    if a.shape != b.shape:
        raise ValueError(f"the tensors' shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        return math.inf
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    reference = a.detach().to("cpu", wide)
    error = torch.linalg.vector_norm(reference - b.detach().to("cpu", wide)).item()
    scale = torch.linalg.vector_norm(reference).item()
    if scale == 0:
        return 0.0 if error == 0 else math.inf
    return 100.0 * float(error) / float(scale)


def _manager(manager: VRAMEfficientModelManager | None) -> VRAMEfficientModelManager:
    if manager is not None:
        return manager
    from . import model_manager

    shared: VRAMEfficientModelManager = model_manager.model_manager
    return shared


def _call(model: Any, x: Any, dtype: torch.dtype, device: torch.device | None) -> Any:
    import torch

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    if isinstance(x, dict):
        return model(**{key: cast(value) for key, value in x.items()})
    if isinstance(x, tuple):
        return model(*(cast(value) for value in x))
    return model(cast(x))
