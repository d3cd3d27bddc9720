"""FP8 products: x quantized row by row to e4m3, multiplied with the stored FP8 weight as it is.

Opt-in, because it rounds activations: a weight in FP8 costs nothing more than its own rounding,
while a product in FP8 rounds x too. `enable_fp8_computation(model)` asks for it; a device without
FP8 matrix units then decodes the weight as ever, with one warning.

Error. Rounding to e4m3 changes a value by at most 2^-4 of it (2^-10 of the row's scale below
2^-6 of that), independent of the weight's rounding, so that the product's error is about that of
the weight in FP8, and both together about sqrt(2) of one. Sums are float32 throughout
(`use_fast_accum=False`).

Two ways to scale, both by torch._scaled_mm: where x is bfloat16 and the weight e4m3, scales by row
go into the product; else the product of the codes is computed in float32 and scaled afterwards, a
bounded number of rows at a time, because torch's kernels write float16 and float32 with scales by
row on some devices only, and take an e5m2 weight with none.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from . import _native  # noqa: F401  (defines the schemas)
from .capabilities import explain, multiplies
from .formats import StorageFormat, get_format

_ops = torch.ops.vramkit
# Codes and columns come in runs of 16 bytes in cuBLASLt's and CUTLASS' FP8 products.
_MULTIPLE = 16
# Rows up to which a kernel on the packed weight is faster: those are bound by the weight's bytes.
LEAST_ROWS = 64
# Bytes of a float32 product that waits for its scales.
_PRODUCT_BYTES = 64 << 20
_STORED = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def supported(device: torch.device, shape: tuple[int, int, int], fmt: StorageFormat) -> bool:
    """Whether `fp8_linear` takes this product: `shape` is (rows of x, out_features, in_features).

    The weight is in fp8 or fp8_e5m2 (a scale per row), out_features and in_features are multiples
    of 16, and the device is a CUDA device with FP8 matrix units (capability 8.9 or later).
    """
    return _takes(shape, fmt) and multiplies(device, "fp8")


def _takes(shape: tuple[int, int, int], fmt: StorageFormat) -> bool:
    rows, outs, cols = shape
    return (
        fmt.name in _STORED
        and rows > 0
        and outs > 0
        and cols > 0
        and (outs % _MULTIPLE == 0 and cols % _MULTIPLE == 0)
    )


def fp8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    fmt: StorageFormat | str = "fp8",
) -> Tensor:
    """x W^T + bias with x rounded to e4m3 by row; no derivative.

    Args:
        x: [..., in_features], float32, bfloat16 or float16; the result, [..., out_features], has
            its dtype. A row with NaN or infinity gives a row of NaN.
        codes: The weight's codes, uint8 [out_features, in_features].
        scales: Its row scales, float32, as bytes.
        bias: Of any floating-point dtype, or None.
        out_features: Rows of the weight.
        fmt: fp8 (e4m3) or fp8_e5m2.

    x is quantized by `torch.ops.vramkit.quantize`, whose bits are the same on every device. Raises
    ValueError for a shape or format that `supported` refuses on every device.
    """
    fmt = get_format(fmt)
    cols = x.shape[-1]
    matrix = x.reshape(-1, cols)
    rows = matrix.shape[0]
    if rows == 0 or out_features == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if not _takes((rows, out_features, cols), fmt):
        raise ValueError(
            f"an FP8 product takes weights in fp8 or fp8_e5m2 with rows and columns in multiples "
            f"of {_MULTIPLE}, not {fmt.name} [{out_features}, {cols}]"
        )
    row_codes, row_scales = quantize_rows(matrix)
    weight = codes.reshape(out_features, cols).view(_STORED[fmt.name]).t()
    weight_scales = scales.reshape(-1).view(torch.float32)
    if _scales_inside(x, fmt):
        inside = bias if bias is not None and bias.dtype == x.dtype else None
        out = torch._scaled_mm(
            row_codes,
            weight,
            scale_a=row_scales.reshape(-1, 1),
            scale_b=weight_scales.reshape(1, -1),
            bias=inside,
            out_dtype=x.dtype,
            use_fast_accum=False,
        )
        if bias is not None and inside is None:
            out += bias
    else:
        out = matrix.new_empty((rows, out_features))
        one = torch.ones((), dtype=torch.float32, device=x.device)
        step = max(1, _PRODUCT_BYTES // (4 * out_features))
        for first in range(0, rows, step):
            piece = slice(first, first + step)
            made = torch._scaled_mm(
                row_codes[piece],
                weight,
                scale_a=one,
                scale_b=one,
                out_dtype=torch.float32,
                use_fast_accum=False,
            )
            made *= row_scales[piece].reshape(-1, 1)
            made *= weight_scales
            if bias is not None:
                made += bias
            out[piece] = made
    return out.reshape(*x.shape[:-1], out_features)


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [rows, cols] and float32 scales [rows] of x, by the quantizer of weights.

    The scale of a row that holds NaN or infinity is NaN, so that all its products are.
    """
    fmt = get_format("fp8")
    codes, scales, _ = _ops.quantize(matrix, fmt.table_on(matrix.device), fmt.spec)
    found = scales.reshape(-1).view(torch.float32)
    # The quantizer is made for finite weights: what it gives for others is not relied on.
    finite = torch.isfinite(torch.linalg.vector_norm(matrix, torch.inf, dim=1))
    found = torch.where(finite, found, torch.nan)
    return codes.reshape(matrix.shape).view(torch.float8_e4m3fn), found


def _scales_inside(x: Tensor, fmt: StorageFormat) -> bool:
    """Whether the product itself takes scales by row: bfloat16, e4m3, on CUDA."""
    return x.is_cuda and x.dtype == torch.bfloat16 and fmt.name == "fp8"


def wants_fp8(layer: nn.Module) -> bool:
    """Whether products of this layer were asked for in FP8."""
    return bool(layer.__dict__.get("_fp8_computation", False))


def enable_fp8_computation(model: nn.Module) -> int:
    """Multiply in FP8 where weights are in FP8 and the hardware can; returns how many layers.

    From then on Linear layers in fp8 or fp8_e5m2 round their input's rows to e4m3 (each with a
    scale of its own) whenever a call has at least 64 rows, needs no gradient, and runs on a CUDA
    device of capability 8.9 or later. All other calls decode the weight, as without this. Where the
    model is on a device without FP8 matrix units, one RuntimeWarning says so, and results are the
    same as before. `disable_fp8_computation` takes it back; neither changes a stored bit.

    Raises ValueError where no layer is stored in FP8.
    """
    layers = _fp8_layers(model)
    if not layers:
        raise ValueError(
            "no Linear layer of this model is stored in fp8 or fp8_e5m2: "
            "vramkit.convert(model, 'fp8') first"
        )
    for layer in layers:
        layer.__dict__["_fp8_computation"] = True
    device = layers[0].codes.device  # type: ignore[union-attr]
    if not multiplies(device, "fp8"):  # type: ignore[arg-type]
        warnings.warn(_reason(device), RuntimeWarning, stacklevel=2)  # type: ignore[arg-type]
    return len(layers)


def disable_fp8_computation(model: nn.Module) -> int:
    """Take `enable_fp8_computation` back; returns how many layers had it."""
    layers = [layer for layer in model.modules() if wants_fp8(layer)]
    for layer in layers:
        del layer.__dict__["_fp8_computation"]
    return len(layers)


def _fp8_layers(model: nn.Module) -> list[nn.Module]:
    from .layers import QuantizedLinear

    return [
        layer
        for layer in model.modules()
        if isinstance(layer, QuantizedLinear) and layer.storage_format.name in _STORED
    ]


def _reason(device: torch.device) -> str:
    """Why there are no FP8 products on this device."""
    if device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available():
        where = explain(torch.cuda.get_device_capability(device))
    else:
        where = f"the model is on {device.type}"
    return (
        f"FP8 products need a CUDA device of capability 8.9 or later, and {where}: weights in FP8 "
        "are decoded, and activations keep their precision"
    )
