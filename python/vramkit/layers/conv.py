"""nn.Conv1d, 2d, 3d and their transposed forms with their weight in a storage format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import _convolution
from .._operators import _product_dtype, unobserved
from .base import QuantizedLayer, autocast_dtype, check_float, register_kind

# Looking these up takes a while too.
_CONV, _CONV_WHOLE = torch.ops.vramkit.conv.default, torch.ops.vramkit._conv_whole.default


class QuantizedConv(QuantizedLayer):
    """Mixin of all converted convolutions: the weight is decoded as it is used.

    x: [batch, in_channels, …] or [in_channels, …] in float32, bfloat16 or float16, contiguous or
    channels_last; y has x's dtype (autocast's where it is on) and memory format. Gradients flow to
    x and to the bias; the weight is decoded again for them. Stride, padding (numbers, "same",
    "valid", every padding mode), dilation and groups are those of the layer it was.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: Any
    bias: Tensor | None
    _reversed_padding_repeated_twice: list[int]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        x, batched = self._input(x)
        padding = [0] * len(self.stride)
        if self.padding_mode != "zeros":
            around = self._reversed_padding_repeated_twice
            x = functional.pad(x, around, mode=self.padding_mode)
        elif self.padding == "same" and any(
            (d * (k - 1)) % 2 for d, k in zip(self.dilation, self.kernel_size, strict=True)
        ):
            x = functional.pad(x, self._reversed_padding_repeated_twice)
        elif self.padding == "same":
            sizes = zip(self.dilation, self.kernel_size, strict=True)
            padding = [d * (k - 1) // 2 for d, k in sizes]
        elif not isinstance(self.padding, str):
            padding = list(self.padding)
        out = self._convolve(x, padding, False, [0] * len(self.stride))
        return out if batched else out.squeeze(0)

    def _input(self, x: Tensor) -> tuple[Tensor, bool]:
        """x in the compute dtype with a batch dimension, and whether it had one."""
        dtype = autocast_dtype(x)
        if x.dtype != dtype:
            x = x.to(dtype)
        check_float(x, f"a converted {self._base.__name__}")
        spatial = len(self.stride)
        batched = x.dim() == spatial + 2
        if not (batched or x.dim() == spatial + 1) or x.shape[-spatial - 1] != self.in_channels:
            raise RuntimeError(
                f"expected input [batch, {self.in_channels}{', …' * spatial}] or the same without "
                f"its batch, got {list(x.shape)} (a converted {self._base.__name__})"
            )
        return (x if batched else x.unsqueeze(0)), batched

    def _convolve(
        self, x: Tensor, padding: list[int], transposed: bool, output_padding: list[int]
    ) -> Tensor:
        stored, held = self._stored["weight"], self._parameters
        codes: Any
        scales: Any
        parts: tuple[Any, ...]
        if "codes" in held and "scales" in held and "extra" in held:  # a look-up by name is slow
            parts = held["codes"], held["scales"], held["extra"]
        else:  # whoever shards or offloads parameters may keep them elsewhere
            parts = self.codes, self.scales, self.extra
        codes, scales, extra = parts
        bias = self.bias
        fmt, shape = stored.fmt, list(stored.shape)
        stride, dilation = list(self.stride), list(self.dilation)
        # No CPU multiplies float16 at full rate or with wide sums: the operator takes float32.
        if fmt.family == "cast" and fmt.storage_dtype == x.dtype == _product_dtype(x):
            bias = None if bias is None else bias.to(x.dtype)
            weight = codes.view(x.dtype).view(shape)
            return torch.convolution(
                x, weight, bias, stride, padding, dilation, transposed, output_padding, self.groups
            )
        convolve = _CONV
        # The operator's Python half costs more than a small convolution.
        if unobserved(x, bias) and codes.is_cpu and _convolution.is_whole(x, fmt.spec, shape):
            convolve = _CONV_WHOLE
            bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        out: Tensor = convolve(
            x,
            codes,
            scales,
            extra,
            fmt.table_on(codes.device),
            bias,
            fmt.spec,
            shape,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            self.groups,
        )
        if not x.is_contiguous():  # torch keeps the order of most, not of all
            out = out.contiguous(memory_format=_convolution._layout(x))
        return out


class QuantizedConvTranspose(QuantizedConv):
    """Mixin of all converted transposed convolutions; their weight's rows are input channels."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The layer's output, of `output_size` where given."""
        if self.padding_mode != "zeros":
            raise ValueError("transposed convolutions have padding mode 'zeros' only")
        x, batched = self._input(x)
        assert not isinstance(self.padding, str)
        layer: Any = self
        extra = layer._output_padding(
            x if batched else x[0],
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.stride),
            self.dilation,
        )
        out = self._convolve(x, list(self.padding), True, list(extra))
        return out if batched else out.squeeze(0)


class QuantizedConv1d(QuantizedConv, nn.Conv1d):
    """A converted nn.Conv1d; see `QuantizedConv`."""


class QuantizedConv2d(QuantizedConv, nn.Conv2d):
    """A converted nn.Conv2d; see `QuantizedConv`."""


class QuantizedConv3d(QuantizedConv, nn.Conv3d):
    """A converted nn.Conv3d; see `QuantizedConv`."""


class QuantizedConvTranspose1d(QuantizedConvTranspose, nn.ConvTranspose1d):
    """A converted nn.ConvTranspose1d; see `QuantizedConvTranspose`."""


class QuantizedConvTranspose2d(QuantizedConvTranspose, nn.ConvTranspose2d):
    """A converted nn.ConvTranspose2d; see `QuantizedConvTranspose`."""


class QuantizedConvTranspose3d(QuantizedConvTranspose, nn.ConvTranspose3d):
    """A converted nn.ConvTranspose3d; see `QuantizedConvTranspose`."""


register_kind(nn.Conv1d, QuantizedConv1d)
register_kind(nn.Conv2d, QuantizedConv2d)
register_kind(nn.Conv3d, QuantizedConv3d)
register_kind(nn.ConvTranspose1d, QuantizedConvTranspose1d)
register_kind(nn.ConvTranspose2d, QuantizedConvTranspose2d)
register_kind(nn.ConvTranspose3d, QuantizedConvTranspose3d)
