"""Run PyTorch models in less memory than they ask for, and measure what it cost.

>>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU())
>>> vramkit.convert(model, "nf4").coverage_bytes_fraction > 0.99
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _operators as _operators
from .convert import ConversionReport, convert, restore, set_weight
from .errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    NonFiniteWeightError,
    PrecisionConfigError,
    PrunedModuleError,
    ReadOnlyWeightError,
    StaleHandleError,
    VramkitError,
)
from .formats import StorageFormat, format_names, get_format, register_format
from .host_pool import HostPool
from .layers import QuantizedLayer, writable
from .precision import PrecisionMode
from .sizes import format_size, parse_size

if TYPE_CHECKING:
    from ._scaled import disable_fp8_computation, enable_fp8_computation
    from .attention import disable_fp8_attention, enable_fp8_attention, fp8_attention_of
    from .calibration import Calibration
    from .checkpoint import convert_checkpoint, load, save
    from .estimator import MemoryEstimate, estimate
    from .first_run import FirstRun, MemoryEstimateWarning
    from .inspection import ModelInfo, describe
    from .lazy_pipeline import LazyPipeline
    from .model_manager import VRAMEfficientModelManager
    from .offload.manage import enable_vram_management
    from .phases import PipelineEstimate, estimate_pipeline
    from .planner import fit, plan
    from .plans import Plan
    from .quality import Comparison, Recording, compare, record
    from .rates import Rates, measure_rates
    from .recommendation import recommend
    from .sensitivities import sensitivity
    from .sensitivity_table import Sensitivity
    from .tensor_files import load_file
    from .verification import Verification, keep_measurement, verify

__version__ = "0.1.0"

# Loaded at first use, so that `import vramkit` stays fast. No module may bear the name of one of
# these functions: importing it would put the module in the function's place.
_LAZY = {
    "Calibration": "calibration",
    "convert_checkpoint": "checkpoint",
    "load": "checkpoint",
    "save": "checkpoint",
    "ModelInfo": "inspection",
    "describe": "inspection",
    "MemoryEstimate": "estimator",
    "estimate": "estimator",
    "FirstRun": "first_run",
    "MemoryEstimateWarning": "first_run",
    "PipelineEstimate": "phases",
    "estimate_pipeline": "phases",
    "Plan": "plans",
    "fit": "planner",
    "plan": "planner",
    "disable_fp8_attention": "attention",
    "enable_fp8_attention": "attention",
    "fp8_attention_of": "attention",
    "disable_fp8_computation": "_scaled",
    "enable_fp8_computation": "_scaled",
    "LazyPipeline": "lazy_pipeline",
    "enable_vram_management": "offload.manage",
    "Rates": "rates",
    "measure_rates": "rates",
    "recommend": "recommendation",
    "Sensitivity": "sensitivity_table",
    "sensitivity": "sensitivities",
    "Comparison": "quality",
    "Recording": "quality",
    "compare": "quality",
    "record": "quality",
    "VRAMEfficientModelManager": "model_manager",
    "load_file": "tensor_files",
    "Verification": "verification",
    "keep_measurement": "verification",
    "verify": "verification",
}


# Systems with a module of their own, as attributes too.
_MODULES = ("chatterbox", "heartmula", "hunyuan3d", "qwen_image")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module 'vramkit' has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


__all__ = [
    "BudgetError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "ConversionReport",
    "FirstRun",
    "HostPool",
    "LazyPipeline",
    "MemoryEstimate",
    "MemoryEstimateWarning",
    "ModelInfo",
    "NonFiniteWeightError",
    "PipelineEstimate",
    "Plan",
    "PrecisionConfigError",
    "PrecisionMode",
    "PrunedModuleError",
    "QuantizedLayer",
    "Rates",
    "ReadOnlyWeightError",
    "Recording",
    "Sensitivity",
    "StaleHandleError",
    "StorageFormat",
    "VRAMEfficientModelManager",
    "Verification",
    "VramkitError",
    "compare",
    "convert",
    "convert_checkpoint",
    "describe",
    "disable_fp8_attention",
    "disable_fp8_computation",
    "enable_fp8_attention",
    "enable_fp8_computation",
    "enable_vram_management",
    "estimate",
    "estimate_pipeline",
    "fit",
    "format_names",
    "format_size",
    "fp8_attention_of",
    "get_format",
    "keep_measurement",
    "load",
    "load_file",
    "measure_rates",
    "parse_size",
    "plan",
    "recommend",
    "record",
    "register_format",
    "restore",
    "save",
    "sensitivity",
    "set_weight",
    "verify",
    "writable",
]
