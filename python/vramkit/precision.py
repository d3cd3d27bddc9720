"""What a user asks for: `PrecisionMode`, the names of precisions."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class PrecisionMode(str, Enum):
    """A precision by name. Members are strings: ``PrecisionMode.NF4 == "nf4"``.

    >>> PrecisionMode.parse("BF16")
    <PrecisionMode.BF16: 'bf16'>
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    FP8_E5M2 = "fp8_e5m2"
    INT8 = "int8"
    INT8_DYNAMIC = "int8_dynamic"
    LLM_INT8 = "llm_int8"
    INT4 = "int4"
    NF4 = "nf4"
    NF4_DQ = "nf4_dq"
    FP4 = "fp4"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, value: str | PrecisionMode) -> PrecisionMode:
        """The mode that `value` names, without regard to case.

        Raises ValueError, which lists the names, for anything else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                return cls(value.strip().lower())
            except ValueError:
                pass
        names = ", ".join(mode.value for mode in cls)
        raise ValueError(f"unknown precision {value!r}; the precisions are: {names}")

    @property
    def format_name(self) -> str | None:
        """Name of the storage format of converted weights; None where layers stay plain (fp32)."""
        if self is PrecisionMode.FP32:
            return None
        return self.value

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of what is not quantized: float32 and float16 for themselves, else bfloat16."""
        import torch

        if self is PrecisionMode.FP32:
            return torch.float32
        if self is PrecisionMode.FP16:
            return torch.float16
        return torch.bfloat16
