"""Products with stored weights on CUDA: which way each one goes, in one table, and the ways.

A route is chosen by compute capability, format, dtype and rows of x; `_cuda_route` is the one place
that chooses. The kernels are in csrc/cuda (gemv.hpp, mma_tiles.hpp), docs/cuda.md describes them.

The table was reasoned from a roofline (docs/cuda.md) and NOT MEASURED ON ANY GPU YET.
`python -m benchmarks.gpu.products --tune FILE` measures every way at every row count and writes the
table as JSON; the package reads it where the environment variable VRAMKIT_CUDA_ROUTES names it.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import _BITS, _BLOCK, _ENCODER, _ENCODER_BF16, _ENCODER_FP16, _GRAIN
from .formats import _GRAIN_ROW as _ROW
from .host_pool import new_tensor

_ops = torch.ops.vramkit

# The native kernels' numbers (csrc/cuda/products.hpp).
FEW, TILES = 0, 1
_FEW_ROWS, _FEW_COLUMNS, _FEW_SPAN = 16, 8, 64  # features, columns of x, elements of a step
_TILE_ROWS, _TILE_SPAN = 64, 128
_TILE_COLUMNS = (16, 64)
_SPLIT_PARTS = 3  # a float32 is the sum of three bfloat16

# Bytes of a decoded panel: it and the rows of x should fit into the cache of the larger GPUs.
PANEL_BYTES = 32 << 20
_PANEL_STEP = 128  # rows of a panel, at least and in multiples


class Limits(NamedTuple):
    """Rows of x up to which a kernel takes the packed weight; with more it is decoded."""

    few: int  # one warp has 16 features and a share of the columns (gemv.hpp)
    tiles: int  # 64 features x up to 64 rows of x share what is loaded (mma_tiles.hpp)


class Route(NamedTuple):
    """One product's way: `plain` (torch on the stored 16 bit), `packed` or `decode`."""

    kind: str
    kernel: int = FEW
    warps: int = 8
    splits: int = 1


# By the least compute capability, then by what the kernels make of a code, then by x's dtype.
# "4 bit", "8 bit" and "16 bit" are formats of that width; 16 bit is only asked where x has another
# dtype. A missing entry decodes. Not measured on any GPU yet.
_HALF = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_TABLE: dict[tuple[int, int], dict[str, dict[str, Limits]]] = {
    (8, 0): {
        "4 bit": {
            "bfloat16": Limits(few=4, tiles=160),
            "float16": Limits(few=4, tiles=160),
            "float32": Limits(few=2, tiles=42),
        },
        "8 bit": {
            "bfloat16": Limits(few=8, tiles=128),
            "float16": Limits(few=8, tiles=128),
            "float32": Limits(few=2, tiles=42),
        },
        "16 bit": {
            "bfloat16": Limits(few=8, tiles=8),
            "float16": Limits(few=8, tiles=8),
            "float32": Limits(few=2, tiles=2),
        },
    },
    # Before 8.0 tensor cores know float16 alone, and there are no asynchronous copies.
    (7, 5): {
        "4 bit": {"float16": Limits(few=8, tiles=0)},
        "8 bit": {"float16": Limits(few=8, tiles=0)},
    },
}


@functools.lru_cache(maxsize=1)
def _table() -> dict[tuple[int, int], dict[str, dict[str, Limits]]]:
    """The built-in table, with the entries of the file that VRAMKIT_CUDA_ROUTES names over it."""
    table = {
        capability: {k: dict(v) for k, v in kinds.items()} for capability, kinds in _TABLE.items()
    }
    path = os.environ.get("VRAMKIT_CUDA_ROUTES")
    if path:
        for key, kinds in json.loads(Path(path).read_text())["routes"].items():
            major, minor = key.split(".")
            entry = table.setdefault((int(major), int(minor)), {})
            for kind, dtypes in kinds.items():
                entry.setdefault(kind, {}).update({d: Limits(**v) for d, v in dtypes.items()})
    return table


def limits(spec: list[int], dtype: torch.dtype, capability: tuple[int, int]) -> Limits:
    """What the table says of a format and a dtype on this capability."""
    table = _table()
    known = [key for key in table if key <= capability]
    kinds = table[max(known)] if known else {}
    return kinds.get(f"{spec[_BITS]} bit", {}).get(_HALF[dtype], Limits(0, 0))


def is_plain(spec: list[int], dtype: torch.dtype) -> bool:
    """Whether the codes are the weight itself in this dtype."""
    stored = {_ENCODER_FP16: torch.float16, _ENCODER_BF16: torch.bfloat16}.get(spec[_ENCODER])
    return stored == dtype


def group_of(spec: list[int], cols: int) -> int:
    """Elements in a row that share a scale; `cols` where a whole row does, or where none is."""
    return spec[_BLOCK] if spec[_GRAIN] > _ROW else cols


def _kernels(spec: list[int], cols: int) -> tuple[bool, bool]:
    """Which kernels can take the format: (few, tiles)."""
    if spec[_GRAIN] == 3 and cols % spec[_BLOCK]:
        return False, False  # blocks cross rows
    group = group_of(spec, cols)
    whole = group >= cols
    return whole or group % _FEW_SPAN == 0, spec[_BITS] < 16 and (whole or group % 16 == 0)


def columns_for(dtype: torch.dtype, rows: int) -> int:
    """Columns that the kernels see of `rows` rows of x: a float32 is three bfloat16."""
    return rows * (_SPLIT_PARTS if dtype == torch.float32 else 1)


def _shape(kernel: int, out_features: int, cols: int, columns: int, parts: int,
           processors: int) -> tuple[int, int]:  # fmt: skip
    """(warps of a block, splits of the columns): enough of both to keep all processors reading."""
    if kernel == FEW:
        rows_each = _FEW_COLUMNS // parts * parts
        tiles = -(-out_features // _FEW_ROWS) * -(-columns // rows_each)
        warps = 8 if tiles >= 3 * processors else 16
        most = max(1, cols // (_FEW_SPAN * warps * 2))
        return warps, max(1, min(most, 8, 2 * processors // max(1, tiles)))
    width = tile_columns(columns)
    tiles = -(-out_features // _TILE_ROWS) * -(-columns // (width // parts * parts))
    most = max(1, cols // (_TILE_SPAN * 4))
    return 8, max(1, min(most, 16, 2 * processors // max(1, tiles)))


def tile_columns(columns: int) -> int:
    """Columns of x that a tile has."""
    return _TILE_COLUMNS[0] if columns <= _TILE_COLUMNS[0] else _TILE_COLUMNS[1]


def _cuda_route(
    dtype: torch.dtype,
    spec: list[int],
    rows: int,
    out_features: int,
    cols: int,
    capability: tuple[int, int],
    processors: int = 132,
) -> Route:
    """The way of one product: x [rows, cols] of `dtype`, a weight [out_features, cols] of `spec`.

    `processors` is the number of multiprocessors; it only shapes the grid.
    """
    if is_plain(spec, dtype):
        return Route("plain")
    most = limits(spec, dtype, capability)
    few, tiles = _kernels(spec, cols)
    for kernel, able, limit in ((FEW, few, most.few), (TILES, tiles, most.tiles)):
        # What only the tiles can take, they take from the first row on.
        if able and rows <= limit:
            columns = columns_for(dtype, rows)
            parts = _SPLIT_PARTS if dtype == torch.float32 else 1
            return Route(
                "packed", kernel, *_shape(kernel, out_features, cols, columns, parts, processors)
            )
    return Route("decode")


def packed_workspace(route: Route, dtype: torch.dtype, rows: int, cols: int,
                     out_features: int) -> int:  # fmt: skip
    """Bytes that a packed product needs: sums of the splits, and float32 x in three parts."""
    partial = route.splits * rows * out_features * 4 if route.splits > 1 else 0
    split = 0
    if dtype == torch.float32:
        split = rows * _SPLIT_PARTS * -(-cols // 8) * 8 * 2
    return partial + split


def panel_rows(out_features: int, cols: int, itemsize: int) -> int:
    """Rows of the weight that are decoded at a time."""
    fits = PANEL_BYTES // max(1, cols * itemsize) // _PANEL_STEP * _PANEL_STEP
    return min(out_features, max(_PANEL_STEP, fits))


def workspace_bytes(x: Tensor, bias: Tensor | None, spec: list[int], out_features: int) -> int:
    """Bytes that `linear` on CUDA holds besides its inputs and its output, at their highest."""
    cols = x.shape[-1]
    rows = x.numel() // cols if cols else 0
    if not rows or not out_features:
        return 0
    capability, processors = device_facts(x.device)
    route = _cuda_route(x.dtype, spec, rows, out_features, cols, capability, processors)
    if route.kind == "plain":
        return 0
    if route.kind == "packed":
        widened = 0 if bias is None or bias.dtype == torch.float32 else 4 * out_features
        return widened + packed_workspace(route, x.dtype, rows, cols, out_features)
    separable = spec[_GRAIN] != 3 or cols % spec[_BLOCK] == 0
    count = panel_rows(out_features, cols, x.element_size()) if separable else out_features
    return count * cols * x.element_size()


def device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors); of a device that is not here, those of an A100."""
    if not torch.cuda.is_available():
        return (8, 0), 108
    return _facts(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache(maxsize=64)
def _facts(index: int) -> tuple[tuple[int, int], int]:
    found = torch.cuda.get_device_properties(index)
    return (found.major, found.minor), found.multi_processor_count


def run_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    spec: list[int],
    out_features: int,
) -> Tensor:
    """x W^T + bias on CUDA, without autograd; see `torch.ops.vramkit.linear`."""
    cols = x.shape[-1]
    matrix = x if x.dim() == 2 else x.reshape(-1, cols)
    if cols > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    rows = matrix.shape[0]
    out = matrix.new_empty((rows, out_features))
    if out.numel():
        facts = device_facts(x.device)
        route = _cuda_route(x.dtype, spec, rows, out_features, cols, *facts)
        run(route, matrix, codes, scales, extra, table, bias, spec, out)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out_features)


def run(
    route: Route,
    matrix: Tensor,
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    spec: list[int],
    out: Tensor,
) -> None:
    """out = matrix W^T + bias by the way that `route` names."""
    rows, cols = matrix.shape
    if route.kind == "packed":
        wide = bias if bias is None or bias.dtype == torch.float32 else bias.to(torch.float32)
        size = packed_workspace(route, matrix.dtype, rows, cols, out.shape[1])
        workspace = codes.new_empty(size)
        shape = [route.kernel, route.warps, route.splits]
        _ops._linear_packed_out(
            matrix, codes, scales, extra, table, wide, spec, shape, workspace, out
        )
    elif route.kind == "plain":
        _product(matrix, codes.view(matrix.dtype).view(out.shape[1], cols), bias, out)
    else:
        decode_product(matrix, codes, scales, extra, table, bias, spec, out)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is not None and bias.dtype == x.dtype:
        torch.addmm(bias, x, weight.t(), out=out)
        return
    torch.mm(x, weight.t(), out=out)
    if bias is not None:
        out += bias


def decode_product(
    matrix: Tensor,
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    spec: list[int],
    out: Tensor,
) -> None:
    """out = matrix W^T + bias by torch's own product, with W decoded to x's dtype in panels."""
    total, cols = out.shape[1], matrix.shape[1]
    separable = spec[_GRAIN] != 3 or cols % spec[_BLOCK] == 0
    count = panel_rows(total, cols, matrix.element_size()) if separable else total
    room = new_tensor((count, cols), matrix.dtype, matrix.device)
    for first in range(0, total, count):
        last = min(total, first + count)
        weight = room[: last - first]
        _ops._dequantize_out(codes, scales, extra, table, spec, total, cols, first, weight)
        part = None if bias is None else bias[first:last]
        _product(matrix, weight, part, out[:, first:last])


def describe(spec: list[int], dtype: torch.dtype, cols: int, capability: tuple[int, int]) -> str:
    """One line for reports: which kernels run up to how many rows."""
    if is_plain(spec, dtype):
        return "torch"
    most = limits(spec, dtype, capability)
    few, tiles = _kernels(spec, cols)
    steps = []
    if few and most.few:
        steps.append(f"fused to {most.few} rows")
    if tiles and most.tiles > (most.few if few else 0):
        steps.append(f"tensor-core tiles to {most.tiles} rows")
    return ", then ".join([*steps, "panels + torch"])


__all__ = ["Limits", "Route", "_cuda_route", "describe", "limits", "run", "run_linear"]
