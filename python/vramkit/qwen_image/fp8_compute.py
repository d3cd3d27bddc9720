"""Products in FP8: activations rounded per row as they arrive, weights as they are stored.

x is scaled so that the largest magnitude of each row is E4M3's largest value, 448, and rounded; the
product's sums are float32 (torch's `_scaled_mm`), and both scales, the activation row's and the
weight row's, are applied to them. Units for it exist from compute capability 8.9 on.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import QuantizedLinear

CAPABILITY = (8, 9)
_MULTIPLE = 16  # of both sides of a weight, which the products ask for


@dataclass(frozen=True)
class Fp8Compute:
    """What became of a wish for products in FP8: how many layers have them, and why not all."""

    layers: int
    reason: str

    @property
    def effective(self) -> bool:
        """Whether any layer multiplies in FP8."""
        return self.layers > 0


def fp8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """x W^T + b with both sides in E4M3 and sums in float32.

    x: [..., in] in any float; codes: uint8 bits of E4M3, [out, in]; scales: float32 bits, a row
    each. The result is bfloat16 until it is cast to x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    largest = rows.abs().amax(1, keepdim=True).float()
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp_min(2.0**-126)
    small = (rows.float() / scale).to(torch.float8_e4m3fn)
    weight = codes.reshape(out_features, -1).view(torch.float8_e4m3fn)
    by_row = scales.reshape(-1).view(torch.float32).reshape(1, -1)
    out = torch._scaled_mm(
        small, weight.t(), scale_a=scale, scale_b=by_row, out_dtype=torch.bfloat16
    )
    out = out.to(x.dtype)
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.reshape(*x.shape[:-1], out_features)


class _Fp8Forward:
    """Mixed into a converted Linear's class: its forward, with products in FP8."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return fp8_linear(x, self.codes, self.scales, self.bias, self.out_features)


@cache
def _computing(base: type) -> type:
    return type(base.__name__, (_Fp8Forward, base), {"__module__": base.__module__})


def can_compute(device: torch.device) -> str:
    """Why a device has no products in FP8; empty where it has."""
    if device.type != "cuda":
        return f"{device.type} has no FP8 matrix units"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        found, wanted = (".".join(map(str, c)) for c in (capability, CAPABILITY))
        return f"FP8 matrix units come with compute capability {wanted}; this device has {found}"
    return ""


def switch(module: nn.Module) -> int:
    """Give every Linear that is stored in E4M3, and whose sizes allow it, products in FP8."""
    count = 0
    for layer in module.modules():
        if not isinstance(layer, QuantizedLinear) or isinstance(layer, _Fp8Forward):
            continue
        whole = layer.in_features % _MULTIPLE == 0 == layer.out_features % _MULTIPLE
        if layer.storage_format.name == "fp8" and whole:
            base: Any = type(layer)
            layer.__class__ = _computing(base)
            count += 1
    return count


def switch_back(module: nn.Module) -> None:
    """Weights are decoded again, and products are those of the activations' dtype."""
    for layer in module.modules():
        if isinstance(layer, _Fp8Forward):
            layer.__class__ = next(c for c in type(layer).__mro__[1:] if c is not _Fp8Forward)


def enable_fp8_computation(module: nn.Module) -> Fp8Compute:
    """Products in FP8 where the hardware has them; elsewhere a warning, and products as before."""
    parameter = next(module.parameters(), None)
    reason = can_compute(torch.device("cpu") if parameter is None else parameter.device)
    layers = 0
    if not reason:
        layers = switch(module)
        if not layers:
            reason = "no layer is stored in fp8 with sizes that are multiples of 16"
    if reason:
        text = f"products stay in the activations' dtype, with FP8 weights decoded: {reason}"
        warnings.warn(text, stacklevel=3)
    return Fp8Compute(layers, reason)
