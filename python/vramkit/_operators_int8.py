"""Operators that quantize activations: dynamic INT8 and LLM.int8, and exact int8 products.

Rows of x (tokens) are quantized to int8 by their own absmax, multiplied exactly with the stored
int8 weight, and scaled, all in one native call. LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339)
leaves the columns that hold a magnitude of `threshold` or more to a product in float32.

On CUDA few rows are one native call as well; many go through torch's own product of the codes,
between a kernel that rounds x and one that scales the sums. The bits are the same either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native  # noqa: F401  (defines the schemas)
from ._native import HAS_CUDA_OPERATORS
from ._operators import FLOATS, _library, unobserved
from .formats import get_format

_ops = torch.ops.vramkit
_linear_int8_out = _ops._linear_int8_out.default
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")
# Products longer than this could leave int32 (csrc/cpu/int8.hpp).
LONGEST_ROW = 1 << 17
_BLOCK = 2048  # columns of quantized x that lie together, and their padding: as in int8.hpp
# Rows of x up to which our CUDA kernel multiplies codes itself, reading the weight once. Reckoned
# from the bytes that it reads of both, not measured. (torch's product takes no fewer than 17.)
_DIRECT_ROWS = 32
# Of the int32 sums between torch's product and their scaling: what a GPU's cache holds.
_SUMS_BYTES = 32 << 20
_LEAST_SUM_ROWS = 256


def workspace_bytes(rows: int, cols: int, threshold: float) -> int:
    """Bytes of quantized rows with their absmax and sum, and of a mark per column."""
    if cols >= _BLOCK:
        stride = _BLOCK + 64
    else:
        stride = (cols + 63) // 64 * 64 + (0 if cols % 128 else 64)
    blocks = max(1, -(-cols // _BLOCK))
    return rows * (blocks * stride + 8) + (cols if threshold > 0 else 0)


def cuda_workspace_bytes(rows: int, cols: int, threshold: float) -> int:
    """The same on CUDA (csrc/cuda/ops/int8.hpp), where outlier columns are listed too."""

    def up(count: int) -> int:
        return -(-count // 16) * 16

    return rows * up(cols) + up(rows * 4) + (up(cols * 4 + 4) + cols if threshold > 0 else 0)


def _for_torch(rows: int, cols: int, out_features: int) -> bool:
    """Whether a product on CUDA is left to torch's own, of those that it takes."""
    return rows > _DIRECT_ROWS and cols > 0 and cols % 16 == 0 and out_features % 8 == 0


def _sum_rows(rows: int, out_features: int) -> int:
    """Rows that torch's product is given at a time."""
    most = _SUMS_BYTES // (4 * max(1, out_features)) // 16 * 16
    return min(rows, max(_LEAST_SUM_ROWS, most))


def product_bytes(rows: int, cols: int, out_features: int, threshold: float, device: str) -> int:
    """Bytes that a product of `rows` rows holds besides its inputs and its output."""
    if device != "cuda":
        return workspace_bytes(rows, cols, threshold)
    sums = 0
    if _for_torch(rows, cols, out_features):
        sums = 4 * _sum_rows(rows, out_features) * out_features
    return cuda_workspace_bytes(rows, cols, threshold) + sums


def workspace_of(args: tuple[Any, ...]) -> int:
    """The same of `linear_int8`'s arguments."""
    x, bias, threshold, out_features = args[0], args[3], args[4], args[6]
    cols = x.shape[-1]
    device = x.device.type
    narrow = bias is not None and bias.dtype != torch.float32 and device != "cuda"
    found = product_bytes(x.numel() // cols if cols else 0, cols, out_features, threshold, device)
    return found + (4 * out_features if narrow else 0)


def _activation_index(activation: str) -> int:
    try:
        return ACTIVATIONS.index(activation)
    except ValueError:
        raise ValueError(
            f"unknown activation {activation!r}; the fused ones are: {', '.join(ACTIVATIONS)}"
        ) from None


def consecutive(matrix: Tensor) -> Tensor:
    """`matrix` with the elements of a row beside each other, as kernels read them."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def run_linear_int8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    threshold: float,
    activation: str,
    out_features: int,
) -> Tensor:
    """activation(x W^T + bias) without autograd; see `torch.ops.vramkit.linear_int8`.

    x: [..., in_features], float32, bfloat16 or float16; the result has its dtype. codes: the int8
    weight as uint8 [out_features, in_features]; scales: its float32 row scales as bytes.
    `threshold` 0 is dynamic INT8; above it, LLM.int8. A row of x with NaN (without a threshold,
    with infinity too) gives a row of NaN.
    """
    index = _activation_index(activation)
    if x.dtype not in FLOATS:
        raise TypeError(f"linear_int8 takes float32, bfloat16 or float16 input, got {x.dtype}")
    if not threshold >= 0.0:
        raise ValueError(f"the threshold must be 0 (none) or positive, got {threshold}")
    cols = x.shape[-1]
    if cols > LONGEST_ROW:
        raise ValueError(
            f"int8 products of {cols} columns could overflow int32; at most {LONGEST_ROW} are taken"
        )
    # Written for few steps: on a small layer each takes as long as some of the arithmetic.
    matrix = x
    if x.dim() != 2:
        matrix = x.reshape(-1, cols) if cols else x.reshape(x.shape[:-1].numel(), 0)
    matrix = consecutive(matrix)
    rows = matrix.shape[0]
    out = matrix.new_empty((rows, out_features))
    if matrix.is_cuda:
        _linear_on_cuda(matrix, codes, scales, bias, threshold, index, out)
    else:
        workspace = codes.new_empty(workspace_bytes(rows, cols, threshold))
        wide = bias if bias is None or bias.dtype == torch.float32 else bias.to(torch.float32)
        _linear_int8_out(matrix, codes, scales, wide, threshold, index, workspace, out)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out_features)


def _linear_on_cuda(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    threshold: float,
    activation: int,
    out: Tensor,
) -> None:
    """out = activation(x W^T + bias). Nothing waits for the device."""
    rows, cols = x.shape
    out_features = out.shape[1]
    if bias is not None and bias.dtype not in FLOATS:
        bias = bias.to(torch.float32)
    workspace = x.new_empty(cuda_workspace_bytes(rows, cols, threshold), dtype=torch.uint8)
    if not _for_torch(rows, cols, out_features) or codes.data_ptr() % 16:
        _linear_int8_out(x, codes, scales, bias, threshold, activation, workspace, out)
        return
    _ops._round_int8_out(x, threshold, workspace)
    rounded = workspace[: rows * cols].view(torch.int8).view(rows, cols)
    weight = codes.view(torch.int8).view(out_features, cols).t()
    step = _sum_rows(rows, out_features)
    sums = x.new_empty((step, out_features), dtype=torch.int32)
    for begin in range(0, rows, step):
        first = min(begin, rows - step)  # the last ones overlap: torch takes no short rest
        torch._int_mm(rounded[first : first + step], weight, out=sums)
        _ops._scale_int8_out(
            sums, x, first, codes, scales, bias, threshold, activation, workspace, out
        )


def _quantize_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """codes int8 [rows, cols], absmax float32 [rows], bool [cols]: columns with an outlier.

    What bitsandbytes' int8_vectorwise_quant gives: elements of magnitude >= threshold (if that is
    positive) are left out of the absmax, and their columns are zero in every row.
    """
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise TypeError(
            f"quantize_rows takes a float32, bfloat16 or float16 matrix, got {x.dtype} "
            f"{list(x.shape)}"
        )
    matrix = consecutive(x)
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=x.device)
    absmax = torch.empty(matrix.shape[0], dtype=torch.float32, device=x.device)
    columns = torch.empty(matrix.shape[1], dtype=torch.uint8, device=x.device)
    _ops._quantize_rows_out(matrix, threshold, codes, absmax, columns)
    return codes, absmax, columns.view(torch.bool)


def _int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [N, K] transposed, both int8, exact in int32.

    Rows may be any distance apart; where elements of a row are not consecutive, they are copied.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"int8_mm takes two int8 matrices, got {a.dtype} and {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"int8_mm takes [M, K] and [N, K], got {list(a.shape)} and {list(b.shape)}"
        )
    if a.shape[1] >= LONGEST_ROW:
        raise ValueError(
            f"int8 products of {a.shape[1]} columns could overflow int32; "
            f"fewer than {LONGEST_ROW} are taken"
        )
    out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    a, b = consecutive(a), consecutive(b)
    if (
        a.is_cuda
        and _for_torch(a.shape[0], a.shape[1], b.shape[0])
        and a.is_contiguous()
        and b.is_contiguous()
        and not (a.data_ptr() | b.data_ptr()) % 16
    ):
        torch._int_mm(a, b.t(), out=out)
    else:
        _ops._int8_mm_out(a, b, out)
    return out


for _key in ("CPU", "CUDA") if HAS_CUDA_OPERATORS else ("CPU",):
    _library.impl("linear_int8", run_linear_int8, _key)
    _library.impl("quantize_rows", _quantize_rows, _key)
    _library.impl("int8_mm", _int8_mm, _key)


@torch.library.register_fake("vramkit::linear_int8")
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float,
      activation: str, out_features: int) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("vramkit::quantize_rows")
def _(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0],), dtype=torch.float32),
        x.new_empty((x.shape[1],), dtype=torch.bool),
    )


@torch.library.register_fake("vramkit::int8_mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, bias, threshold, activation, out_features = inputs
    # The activation's derivative needs what went into it, which is computed again.
    again = activation != "none"
    ctx.save_for_backward(codes, scales, x if again else None, bias if again else None)
    ctx.threshold, ctx.activation = threshold, activation
    ctx.shape = [out_features, x.shape[-1]]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding of x: the product's gradients by the decoded weight."""
    codes, scales, x, bias = ctx.saved_tensors
    if ctx.activation != "none":
        inner = _ops.linear_int8(x, codes, scales, bias, ctx.threshold, "none", ctx.shape[0])
        grad = _through_activation(grad, inner, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        spec = get_format("int8").spec
        weight = _ops.dequantize(codes, scales, None, None, spec, ctx.shape, grad.dtype)
        grad_x = grad @ weight
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_bias, None, None, None


def _through_activation(grad: Tensor, inner: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "silu":
        out: Tensor = aten.silu_backward(grad, inner)
    else:
        kind = "tanh" if activation == "gelu_tanh" else "none"
        out = aten.gelu_backward(grad, inner, approximate=kind)
    return out


torch.library.register_autograd(
    "vramkit::linear_int8", _backward, setup_context=_save_for_backward, lib=_library
)


def linear_int8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    threshold: float,
    activation: str,
    out_features: int,
) -> Tensor:
    """`torch.ops.vramkit.linear_int8`, without its dispatch where nothing looks on."""
    if unobserved(x, bias):
        return run_linear_int8(x, codes, scales, bias, threshold, activation, out_features)
    out: Tensor = _ops.linear_int8(x, codes, scales, bias, threshold, activation, out_features)
    return out
