"""nn.Linear with its weight in a storage format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._operators import FLOATS, run_linear, unobserved
from .._operators_int8 import linear_int8, run_linear_int8
from .._scaled import LEAST_ROWS, fp8_linear, supported, wants_fp8
from .base import (
    QuantizedLayer,
    autocast_dtype,
    check_float,
    in_transform,
    no_transform,
    register_kind,
)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """y = x W^T + b, with W decoded as it is used.

    x: [..., in_features] in float32, bfloat16 or float16; y has x's dtype (autocast's where it is
    on). Products accumulate in float32. Gradients flow to x and to the bias. In formats with
    activations (int8_dynamic, llm_int8) the rows of x are quantized and products are exact int32.
    """

    activation_modes = ("", "int8_dynamic", "llm_int8")
    # Asked for by a config (bnb_4bit_compute_dtype): x is cast to it, and y back. Autocast wins.
    computes_in: torch.dtype | None = None
    in_features: int
    out_features: int
    bias: nn.Parameter | None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, [..., out_features]."""
        asked = self.computes_in
        if asked is not None and x.dtype != asked and not torch.is_autocast_enabled(x.device.type):
            return self.forward(x.to(asked)).to(x.dtype)
        fmt = self._stored["weight"].fmt
        # Past what module look-ups take: small layers need a few microseconds.
        # Whoever shards, offloads or parametrizes may keep parameters elsewhere, or as other types.
        own: dict[str, Any] = self._parameters
        if (
            type(own.get("codes")) is nn.Parameter
            and own["codes"].is_cpu
            and "bias" in own
            and unobserved(x, own["bias"])
            and x.shape[-1:] == (self.in_features,)
            and x.dtype in FLOATS
            and not torch.is_autocast_enabled("cpu")
            and "_fp8_computation" not in self.__dict__
        ):
            codes, scales, bias = own["codes"], own["scales"], own["bias"]
            if fmt.activations:
                return run_linear_int8(
                    x, codes, scales, bias, fmt.threshold, "none", self.out_features
                )
            table = fmt.table_on(codes.device)
            return run_linear(
                x, codes, scales, own["extra"], table, bias, fmt.spec, self.out_features
            )
        dtype = autocast_dtype(x)
        if x.dtype != dtype:
            x = x.to(dtype)
        check_float(x, "a converted Linear")
        if x.shape[-1:] != (self.in_features,):
            raise RuntimeError(
                f"expected input [..., {self.in_features}], got {list(x.shape)} "
                f"(a converted Linear of {self.in_features} to {self.out_features} features)"
            )
        if in_transform():
            if fmt.activations:
                raise no_transform(fmt)
            bias = self.bias if self.bias is None else self.bias.to(x.dtype)
            return functional.linear(x, self.dense_weight(x.dtype), bias)
        if fmt.activations:
            return linear_int8(
                x, self.codes, self.scales, self.bias, fmt.threshold, "none", self.out_features
            )
        if wants_fp8(self) and self._in_fp8(x):
            return fp8_linear(x, self.codes, self.scales, self.bias, self.out_features, fmt)
        out: Tensor = torch.ops.vramkit.linear(
            x,
            self.codes,
            self.scales,
            self.extra,
            fmt.table_on(self.codes.device),
            self.bias,
            fmt.spec,
            self.out_features,
        )
        return out

    def _in_fp8(self, x: Tensor) -> bool:
        """Whether a product that was asked for in FP8 is one here; it has no derivative."""
        bias = self.bias
        if torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return False
        rows = x.numel() // max(1, self.in_features)
        shape = (rows, self.out_features, self.in_features)
        return rows >= LEAST_ROWS and supported(x.device, shape, self._stored["weight"].fmt)

    def _resized(self) -> None:
        self.out_features, self.in_features = self.weight_shape


register_kind(nn.Linear, QuantizedLinear)
