"""bitsandbytes' int8 operators on vramkit's native kernels; see `_blockwise.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _operators  # noqa: F401  (registers vramkit's operators)
from ..formats import get_format
from ._blockwise import _bytes, _check_input, _check_out

_ops = torch.ops.vramkit
# Row and column statistics are absolute maxima of codes up to 127 each.
_PER_PRODUCT = 1.0 / (127.0 * 127.0)
# Elements that are quantized at a time.
_CHUNK = 1 << 18


def _integer_product(A: Tensor, B: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K] transposed: int32 [M, N], exact."""
    out: Tensor = _ops.int8_mm(A, B)
    return out


def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """int8 [..., K] times int8 [N, K] transposed: int32 [..., N]."""
    for name, tensor in (("A", A), ("B", B)):
        if tensor.dtype != torch.int8:
            raise ValueError(f"{name} must be int8, got {tensor.dtype}")
    matrix = A.reshape(-1, A.shape[-1]).contiguous()
    if not matrix.numel() or not B.numel():
        return torch.zeros((*A.shape[:-1], B.shape[0]), dtype=torch.int32)
    return _integer_product(matrix, B.contiguous()).reshape(*A.shape[:-1], B.shape[0])


def int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    """`int8_linear_matmul` into `out`."""
    _check_out(out, (*A.shape[:-1], B.shape[0]), torch.int32)
    out.copy_(int8_linear_matmul(A, B))


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A * row_stats * col_stats / 127**2 + bias in float32, then `dtype` (float16 by default).

    The constant is 1 / 127**2; bitsandbytes' own CPU code has 1.8e-5 of it more.
    """
    if A.dtype != torch.int32:
        raise ValueError(f"A must be int32, got {A.dtype}")
    for name, stats in (("row_stats", row_stats), ("col_stats", col_stats)):
        if stats.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {stats.dtype}")
    wide = A.reshape(-1, A.shape[-1]) * (row_stats.reshape(-1, 1) * _PER_PRODUCT)
    wide *= col_stats.reshape(1, -1)
    if bias is not None:
        wide += bias
    return wide.to(dtype or torch.float16).reshape(A.shape)


def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The product of two int8 matrices and what its codes stand for, in `dtype`."""
    return int8_mm_dequant(int8_linear_matmul(A, B), row_stats, col_stats, dtype, bias)


def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`int8_scaled_mm` plus the product of the outlier columns in A's dtype; and those columns."""
    out = int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    if outlier_cols is None or not outlier_cols.numel():
        return out, A.new_empty(0)
    outliers = A[:, outlier_cols].contiguous()
    columns = int8_vectorwise_dequant(CB[:, outlier_cols].contiguous(), SCB).to(A.dtype)
    return out.addmm(outliers, columns.t()), outliers


def _quantize_rows(A: Tensor, absmax: Tensor) -> Tensor:
    """rint(A * factor) with factor = 127 * (1 / absmax of its row); rows of zeros give zeros.

    bitsandbytes rounds that factor twice, as here; vramkit's own int8 divides, which takes another
    code where a value lies at the middle between two.
    """
    codes = torch.empty(A.shape, dtype=torch.int8)
    factor = torch.where(absmax > 0, absmax.reciprocal() * 127.0, torch.zeros(()))
    step = max(1, _CHUNK // max(1, A.shape[1]))
    wide = torch.empty((min(step, A.shape[0]), A.shape[1]), dtype=torch.float32)
    for first in range(0, A.shape[0], step):  # a chunk stays in the cache for its three passes
        rows = A[first : first + step]
        part = wide[: rows.shape[0]].copy_(rows)
        part.mul_(factor[first : first + step, None]).round_()
        codes[first : first + step] = part
    return codes


def _row_absmax(A: Tensor) -> Tensor:
    if not A.shape[-1]:
        return torch.zeros(A.shape[0])
    low, high = torch.aminmax(A, dim=1)
    return torch.maximum(high, -low).float()


def int8_vectorwise_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes by row, row absmax, and the columns that hold an |x| >= threshold.

    Such values count for no absmax, and their columns are zero where there is more than one row.
    """
    _check_input("int8_vectorwise_quant", A)
    codes, stats, outliers = _ops.quantize_rows(A.reshape(-1, A.shape[-1]), threshold)
    columns = outliers.nonzero().view(-1) if threshold > 0.0 else None
    return codes.reshape(A.shape), stats, columns


def int8_double_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A quantized by row and by column: codes, codes, row absmax, column absmax, outlier columns.

    bitsandbytes has no CPU code for this one: a weight in training needs it.
    """
    rows, row_stats, columns = int8_vectorwise_quant(A, threshold)
    matrix = A.reshape(-1, A.shape[-1])
    if columns is not None and columns.numel():
        matrix = matrix.masked_fill(matrix.abs() >= threshold, 0)
    turned = matrix.t().contiguous()
    col_stats = _row_absmax(turned)
    by_column = _quantize_rows(turned, col_stats).t().contiguous().reshape(A.shape)
    return rows, by_column, row_stats, col_stats, columns


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """A * stats / 127 by row, in float32."""
    if A.dtype != torch.int8:
        raise ValueError(f"A must be int8, got {A.dtype}")
    out = torch.empty(A.shape, dtype=torch.float32)
    if A.numel():
        rows = A.reshape(-1, A.shape[-1])
        scales = _bytes(stats.reshape(-1).float() * 7.874015718698502e-3)
        _ops._dequantize_out(
            _bytes(A), scales, None, None, get_format("int8").spec, *rows.shape, 0,
            out.view(rows.shape),
        )  # fmt: skip
    return out
