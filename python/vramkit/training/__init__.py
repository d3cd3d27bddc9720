"""Mixed precision for training and streaming video."""

from __future__ import annotations

from .multi_tensor import GradientNorm, cast_, gradient_norm, scale_, square_sum
from .optimizer import AdamW
from .scaler import AdaptiveGradScaler, StepReport

__all__ = [
    "AdamW",
    "AdaptiveGradScaler",
    "GradientNorm",
    "StepReport",
    "cast_",
    "gradient_norm",
    "scale_",
    "square_sum",
]
