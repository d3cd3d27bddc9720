"""Layers of torch that read their weights as tensors: nn.MultiheadAttention and nn.Bilinear.

They keep their own forward. The lazy weights decode where an operator reads them, and again in a
backward pass.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from .base import QuantizedLayer, autocast_dtype, check_float, register_kind


class QuantizedMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with its input projections stored (its out_proj is a Linear)."""


class QuantizedBilinear(QuantizedLayer, nn.Bilinear):
    """y = x1^T W x2 + b, with W decoded as it is used."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """The layer's output, [..., out_features]."""
        dtype = autocast_dtype(input1)
        x1, x2 = input1.to(dtype), input2.to(dtype) if input2.dtype == input1.dtype else input2
        check_float(x1, "a converted Bilinear")
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.bilinear(x1, x2, self.read("weight", dtype), bias)


register_kind(
    nn.MultiheadAttention,
    QuantizedMultiheadAttention,
    ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
)
register_kind(nn.Bilinear, QuantizedBilinear)
