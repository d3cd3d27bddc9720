"""bitsandbytes' operators, computed by vramkit's native kernels.

One function per operator, with that operator's own arguments; `bitsandbytes.py` registers them.
Where bitsandbytes' own CPU results are bits (codes, absmax), these are the same bits.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _operators  # noqa: F401  (registers vramkit's operators)
from ..formats import _GRAIN_FLAT, _SCALE_F32, _SCALE_FORMAT, _SCALE_NESTED, get_format

_ops = torch.ops.vramkit
_CODEBOOK, _MIDPOINT, _GRAIN_GROUP = 1, 0, 2
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Below this bitsandbytes takes a block for empty (its clamp of absmax).
_SMALLEST = 1e-38
# The least number of elements that a row of the matrix handed to a kernel should have.
_LONG_ROW = 4096
NESTED_BLOCK = 256


def _spec(bits: int, block: int, scale: int = _SCALE_F32) -> list[int]:
    return [_CODEBOOK, bits, _GRAIN_FLAT, block, scale, _MIDPOINT, 0]


def _check_input(name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} takes float32, bfloat16 or float16, got {x.dtype}")


def _table4(quant_type: str) -> Tensor:
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    table = get_format(quant_type).table_on(torch.device("cpu"))
    assert table is not None
    return table


def _rows_of(count: int, block: int) -> tuple[int, int]:
    """A matrix over `count` elements whose rows are whole blocks, or one row where none are."""
    if count % block:
        return 1, count
    blocks = count // block
    per_row = math.gcd(blocks, max(1, _LONG_ROW // block))
    return blocks // per_row, per_row * block


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as a flat run of bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# --- 4 bit -------------------------------------------------------------------------------------


def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Packed codes [(n + 1) // 2, 1], viewed as `quant_storage`, and absmax, float32 [blocks]."""
    _check_input("quantize_4bit", A)
    table = _table4(quant_type)
    flat = A.contiguous().reshape(-1)
    count = flat.numel()
    whole = count - count % blocksize
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32)
    if whole:
        matrix = flat[:whole].view(_rows_of(whole, blocksize))
        _ops._quantize_out(
            matrix,
            table,
            _spec(4, blocksize),
            packed[: whole // 2],
            _bytes(absmax[: whole // blocksize]),
            packed.new_empty(0),
        )
    if whole < count:
        packed[whole // 2 :], absmax[-1] = _short_block(flat[whole:], table)
    packed = packed.unsqueeze(1)
    if quant_storage != torch.uint8:
        packed = packed.view(-1).view(quant_storage).unsqueeze(1)
    return packed, absmax


def _short_block(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The last, partial block: it is divided by its (clamped) absmax, not multiplied by 1 / it."""
    values = x.float()
    absmax = values.abs().max().clamp(min=_SMALLEST)
    scaled = torch.clamp(values / absmax, -1, 1)
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    order = torch.argsort(table, stable=True)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    codes = order[torch.bucketize(scaled, bounds)].to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def _decode_out(codes: Tensor, absmax: Tensor, table: Tensor, spec: list[int], out: Tensor) -> None:
    """Decode into `out` (contiguous, any shape)."""
    rows, cols = _rows_of(out.numel(), spec[3])
    if out.numel():
        _ops._dequantize_out(
            codes, _bytes(absmax), None, table, spec, rows, cols, 0, out.view(rows, cols)
        )


def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The decoded values, `shape` in `dtype`."""
    out = torch.empty(tuple(shape), dtype=dtype)
    dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, out)
    return out


def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """`dequantize_4bit` into `out`."""
    _check_out(out, tuple(shape), dtype)
    target = out if out.is_contiguous() else torch.empty(tuple(shape), dtype=dtype)
    codes = _bytes(A)[: (target.numel() + 1) // 2]
    _decode_out(codes, absmax.float(), _table4(quant_type), _spec(4, blocksize), target)
    if target is not out:
        out.copy_(target)


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(
            f"expected out of shape {shape} in {dtype}, got {tuple(out.shape)} in {out.dtype}"
        )


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """A [..., K] times the 4-bit weight [N, K], from its packed bytes."""
    _check_input("gemm_4bit", A)
    table = _table4(quant_type)
    scales, extra, kind = _bytes(absmax.float()), None, _SCALE_F32
    if absmax_8bit is not None:
        assert absmax_code is not None
        assert absmax_offset is not None
        if torch.equal(absmax_code, _nested_table()):
            kind, scales = _SCALE_NESTED, _bytes(absmax_8bit)
            extra = torch.cat([_bytes(absmax.float()), _bytes(absmax_offset.reshape(1).float())])
        else:
            wide = dequantize_blockwise(
                absmax_8bit, absmax, absmax_code, NESTED_BLOCK, torch.float32
            )
            scales = _bytes(wide + absmax_offset.float())
    return _linear(A, B, shapeB, scales, extra, table, bias, _spec(4, blocksize, scale=kind))


def _nested_table() -> Tensor:
    table = _SCALE_FORMAT.table_on(torch.device("cpu"))
    assert table is not None
    return table


def _linear(
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    spec: list[int],
) -> Tensor:
    if len(shape) != 2 or A.shape[-1] != shape[1]:
        raise ValueError(
            f"a weight of shape [N, K] takes inputs [..., K]; got {list(shape)}, {list(A.shape)}"
        )
    codes = _bytes(B)[: (shape[0] * shape[1] + 1) // 2]
    out: Tensor = _ops.linear(A, codes, scales, extra, table, bias, spec, shape[0])
    return out


def gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    """A [..., K] times the 4-bit weight [N, K] of table `code`."""
    _check_input("gemv_4bit", A)
    table = code.to(torch.float32).contiguous()
    return _linear(A, B, shapeB, _bytes(absmax.float()), None, table, None, _spec(4, blocksize))


def gemv_4bit_out(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out: Tensor,
) -> None:
    """`gemv_4bit` into `out`."""
    _check_out(out, (*A.shape[:-1], shapeB[0]), A.dtype)
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def is_cpu_packed(absmax: Tensor, shape: Sequence[int], block: int) -> bool:
    """Whether absmax is [K / block, N], as it is beside weights packed for its AVX-512 kernel."""
    return absmax.dim() == 2 and tuple(absmax.shape) == (shape[1] // block, shape[0])


# Rows and columns of one tile of that layout: 32 weight rows, a pair of columns each; a byte holds
# element i in the low and element i + 32 in the high nibble of the tile's 64.
_TILE_ROWS, _TILE_HALF = 32, 32


def unpack_cpu_layout(B: Tensor, absmax: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Packed bytes and absmax in the usual order, from the layout of its AVX-512 kernel."""
    rows, cols = shape
    tiles = _bytes(B).view(-1, _TILE_HALF)
    elements = torch.cat([tiles & 15, tiles >> 4], dim=1)
    elements = elements.view(rows // _TILE_ROWS, cols // 2, _TILE_ROWS, 2)
    pairs = elements.transpose(1, 2).reshape(-1, 2)
    packed = pairs[:, 0] << 4 | pairs[:, 1]
    return packed.unsqueeze(1), absmax.t().reshape(-1).float()


# --- blockwise 8 bit ---------------------------------------------------------------------------

_bounds: OrderedDict[bytes, Tensor] = OrderedDict()
_KEPT_BOUNDS = 16


def grid_bounds(code: Tensor) -> Tensor:
    """The 255 bounds of bitsandbytes' CPU quantizer for a sorted table of 256.

    It rounds x / absmax to one of 65,536 evenly spaced points of [-1, 1] and takes the nearest
    value of that point from a lookup table. The code is then the number of bounds below
    x / absmax, bound k being the largest float32 that still gets a code of k or less.
    """
    points = torch.arange(65536, dtype=torch.float32)
    grid = torch.tensor(-1.0) + (2.0 * points) / 65535
    lookup = torch.bucketize(grid, 0.5 * (code[:-1] + code[1:]))
    targets = torch.arange(255)
    low = torch.full((255,), -0x3F800000)  # -1.0, in the order of floats
    high = torch.full((255,), 0x3F800000)
    for _ in range(33):
        middle = (low + high + 1).div(2, rounding_mode="floor")
        bits = torch.where(middle < 0, (-middle) - 0x80000000, middle).to(torch.int32)
        value = bits.view(torch.float32)
        # One rounding at the end, as the fused multiply-add of its code.
        index = ((value + 1.0).double() * 32767.5 + 0.5).float().to(torch.int64)
        below = lookup[index.clamp(max=65535)] <= targets
        low = torch.where(below, middle, low)
        high = torch.where(below, high, middle - 1)
    bits = torch.where(low < 0, (-low) - 0x80000000, low).to(torch.int32)
    found = bits.view(torch.float32).clone()
    # Where not even -1 gets so small a code, nothing may.
    first = lookup[0] <= targets
    return torch.where(first, found, torch.tensor(-math.inf))


def _bounds_of(code: Tensor) -> Tensor:
    key = code.numpy().tobytes()
    bounds = _bounds.get(key)
    if bounds is None:
        bounds = grid_bounds(code)
        _bounds[key] = bounds
        while len(_bounds) > _KEPT_BOUNDS:
            _bounds.popitem(last=False)
    return bounds


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """uint8 codes of A's shape and absmax, float32 [blocks]; `code` is a sorted table of 256."""
    _check_input("quantize_blockwise", A)
    _check_code(code)
    source = A.contiguous()
    codes = torch.empty(A.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-A.numel() // blocksize), dtype=torch.float32)
    table = code.to(torch.float32).contiguous()
    _ops._quantize_bounds_out(source, _bounds_of(table), blocksize, codes, absmax)
    return codes, absmax


def _check_code(code: Tensor) -> None:
    if code.numel() != 256:
        raise ValueError(f"a blockwise code has 256 values, got {code.numel()}")


def dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """code[A] * absmax of its block, in `dtype`."""
    out = torch.empty(A.shape, dtype=dtype)
    dequantize_blockwise_out(A, absmax, code, blocksize, dtype, out)
    return out


def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    """`dequantize_blockwise` into `out`."""
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be uint8, got {A.dtype}")
    _check_code(code)
    _check_out(out, tuple(A.shape), dtype)
    target = out if out.is_contiguous() else torch.empty(A.shape, dtype=dtype)
    spec = _spec(8, blocksize)
    if blocksize % 2:  # flat blocks are even; a row's groups need not be
        spec[2] = _GRAIN_GROUP
    table = code.to(torch.float32).contiguous()
    if float(table.abs().max()) <= 1.0:
        _decode_out(_bytes(A), absmax.float(), table, spec, target)
    else:  # formats hold tables of [-1, 1]: these two products round alike
        scales = absmax.float().repeat_interleave(blocksize)[: A.numel()].view(A.shape)
        target.copy_(table[A.to(torch.int64)] * scales)
    if target is not out:
        out.copy_(target)
