"""Mixed precision for training and streaming video."""

from __future__ import annotations

from ..hardware import get_optimal_precision
from .activations import SavedActivations, compress_activations
from .attention import MixedPrecisionAttention, fp32_attention
from .checkpoint_plan import CheckpointPlan, plan_checkpoints
from .checkpointing import (
    BlockCost,
    CheckpointChoice,
    CheckpointedBlock,
    choose_checkpoints,
    peak_bytes,
)
from .helpers import (
    async_inference,
    make_tensor_core_friendly,
    optimize_conv_memory_format,
    optimized_inference,
    stable_cross_entropy,
    stable_huber_loss,
    stable_l1_loss,
    stable_mse_loss,
)
from .islands import Island, measured_islands, rule_islands
from .lsd import LSD
from .multi_tensor import GradientNorm, cast_, gradient_norm, scale_, square_sum
from .offloading import OffloadedActivations, offload_activations
from .optimizer import AdamW
from .pool import MemoryPool, PoolStats
from .report import Week1Report, generate_week1_report
from .scaler import AdaptiveGradScaler, StepReport
from .step_memory import StepEstimate, estimate_step
from .suite import (
    BenchmarkResult,
    benchmark_model_precision,
    drift,
    true_scale,
    week1_final_benchmark,
)
from .video import MixedPrecisionLSD
from .wrapper import MixedPrecisionWrapper

__all__ = [
    "LSD",
    "AdamW",
    "AdaptiveGradScaler",
    "BenchmarkResult",
    "BlockCost",
    "CheckpointChoice",
    "CheckpointPlan",
    "CheckpointedBlock",
    "GradientNorm",
    "Island",
    "MemoryPool",
    "MixedPrecisionAttention",
    "MixedPrecisionLSD",
    "MixedPrecisionWrapper",
    "OffloadedActivations",
    "PoolStats",
    "SavedActivations",
    "StepEstimate",
    "StepReport",
    "Week1Report",
    "async_inference",
    "benchmark_model_precision",
    "cast_",
    "choose_checkpoints",
    "compress_activations",
    "drift",
    "estimate_step",
    "fp32_attention",
    "generate_week1_report",
    "get_optimal_precision",
    "gradient_norm",
    "make_tensor_core_friendly",
    "measured_islands",
    "offload_activations",
    "optimize_conv_memory_format",
    "optimized_inference",
    "peak_bytes",
    "plan_checkpoints",
    "rule_islands",
    "scale_",
    "square_sum",
    "stable_cross_entropy",
    "stable_huber_loss",
    "stable_l1_loss",
    "stable_mse_loss",
    "true_scale",
    "week1_final_benchmark",
]
