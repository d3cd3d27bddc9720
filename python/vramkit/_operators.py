"""Operators of `torch.ops.vramkit` that allocate, and what compilers need to know of all of them.

Schemas stand in csrc/ops/schema.hpp. Outputs are allocated here so that running out of memory keeps
torch's own exception; the kernels that fill them are native. Products with many rows go through
torch's own matrix product, one decoded panel of weight rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native, _routes  # noqa: F401  (_native defines the schemas)
from ._native import HAS_CUDA_OPERATORS, _core
from .formats import (
    _ENCODER,
    _ENCODER_BF16,
    _ENCODER_FP16,
    _GRAIN,
    _GRAIN_FLAT,
    _SCALE,
    _SCALE_F32,
    _SCALE_FORMAT,
    _SCALE_NESTED,
    StorageFormat,
)
from .host_pool import new_tensor

_ops = torch.ops.vramkit
_linear_out = _ops._linear_out.default
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Rows of x up to which a kernel takes the packed weight itself, by its unit and x's dtype; with
# more rows, decoding a panel of the weight for torch's own product is faster. Measured by
# `python -m benchmarks cpu` (benchmarks/README.md).
_FUSED_ROWS = {("avx512", torch.bfloat16): 96}
_FUSED_ROWS_ELSEWHERE = 8
# Without AVX-512 BF16 torch multiplies bfloat16 at a half to a quarter of float32's rate.
_BF16_PRODUCTS = "avx512" in _core.available_isas()
# Bytes of the decoded panels of all threads: they fit the shared cache.
_PANEL_BYTES = 8 << 20
_LEAST_PANEL_ROWS = 64  # with fewer rows torch's product is slow


def _native_format(spec: list[int], table: Tensor | None) -> _core.Format:
    return _core.Format(spec, [] if table is None else table.tolist())


def _part_shapes(
    spec: list[int], rows: int, cols: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes, scales and extra: [rows, …] wherever rows are separable, else flat."""
    # Sizes do not depend on the codebook's values; any valid ones do.
    table = [0.0] * (1 << spec[1]) if spec[0] == 1 else []
    native = _core.Format(spec, table)
    size = native.bytes([rows, cols])
    if not native.row_separable(cols) or rows == 0:
        return (size.codes,), (size.scales,), (size.extra,)
    nested = spec[_SCALE] == _SCALE_NESTED
    extra = (size.extra,) if nested or not size.extra else (rows, size.extra // rows)
    return (rows, size.codes // rows), (rows, size.scales // rows), extra


def _as_matrix(x: Tensor) -> Tensor:
    if x.dim() < 2:
        return x.reshape(1, -1)
    return x.reshape(x.shape[0], -1)


def _rows_of(x: Tensor, spec: list[int]) -> Tensor:
    """x as a matrix whose rows lie as kernels take them; a copy only where they do not."""
    matrix = _as_matrix(x)
    apart = matrix.shape[1] < 2 or matrix.stride(1) == 1
    return matrix if apart and _separable(spec, matrix.shape[1]) else matrix.contiguous()


def _quantize(x: Tensor, table: Tensor | None, spec: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    matrix = _rows_of(x, spec)
    rows, cols = matrix.shape
    direct = list(spec)
    nested = spec[_SCALE] == _SCALE_NESTED
    if nested:
        direct[_SCALE] = _SCALE_F32
    codes, scales, extra = (
        new_tensor(shape, torch.uint8, x.device) for shape in _part_shapes(direct, rows, cols)
    )
    _ops._quantize_out(matrix, table, direct, codes, scales, extra)
    if nested:
        scales, extra = _nest(scales)
    return codes, scales, extra


def _nest(scales: Tensor) -> tuple[Tensor, Tensor]:
    """float32 scales (as bytes) -> 8-bit codes of their distance from the mean, and its scales."""
    absmax = scales.reshape(-1).view(torch.float32)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    fmt = _SCALE_FORMAT
    codes, outer, _ = _quantize(absmax - offset, fmt.table_on(scales.device), fmt.spec)
    extra = torch.cat([outer.reshape(-1), offset.reshape(1).view(torch.uint8)])
    shape = (*scales.shape[:-1], scales.shape[-1] // 4)
    return codes.reshape(shape), extra


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels write where `dtype` is asked for: float64 is float32, widened afterwards."""
    return torch.float32 if dtype == torch.float64 else dtype


def _dequantize(
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    spec: list[int],
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = new_tensor(shape, _kernel_dtype(dtype), codes.device)
    if out.numel():
        matrix = _as_matrix(out)
        _ops._dequantize_out(codes, scales, extra, table, spec, *matrix.shape, 0, matrix)
    return out.to(dtype)


def _separable(spec: list[int], cols: int) -> bool:
    return spec[2] != 3 or cols % spec[3] == 0


def _dequantize_rows(
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    spec: list[int],
    rows: int,
    cols: int,
    first: int,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    if not _separable(spec, cols) and count < rows:
        # Blocks cross these rows, so that all are decoded; the copy lets go of the others.
        whole = _dequantize(codes, scales, extra, table, spec, [rows, cols], dtype)
        return whole[first : first + count].clone()
    out = new_tensor((count, cols), _kernel_dtype(dtype), codes.device)
    if out.numel():
        _ops._dequantize_out(codes, scales, extra, table, spec, rows, cols, first, out)
    return out.to(dtype)


def fused_rows(dtype: torch.dtype) -> int:
    """Rows of an input of `dtype` up to which its product takes the packed weight itself."""
    return _FUSED_ROWS.get((_core.active_isa(), dtype), _FUSED_ROWS_ELSEWHERE)


def _from_packed(spec: list[int], x: Tensor, count: int) -> bool:
    """Whether a product with `count` rows of x is left to the kernel on the packed weight."""
    most = _FUSED_ROWS_ELSEWHERE if _is_plain(spec, x) else fused_rows(x.dtype)
    return _separable(spec, x.shape[-1]) and count <= most


def _is_plain(spec: list[int], x: Tensor) -> bool:
    """Whether the codes are the weight itself in x's dtype, which torch multiplies at full rate."""
    stored = {_ENCODER_FP16: torch.float16, _ENCODER_BF16: torch.bfloat16}.get(spec[_ENCODER])
    return stored == x.dtype == _product_dtype(x)


def unobserved(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call on `x` may go to its kernel directly, past autograd and the dispatcher.

    `others` are the operator's further inputs that could need a gradient.

    Small layers take a few microseconds, as does that way: a plain CPU tensor with no gradient to
    record, no mode and no compiler that would want to see the call.
    """
    return (
        not torch.compiler.is_compiling()
        and not (
            torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))
        )
        and type(x) is Tensor
        and x.device.type == "cpu"
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


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
    """x W^T + bias without autograd; see `torch.ops.vramkit.linear`."""
    # Written for few steps: on a small layer each takes as long as some of the arithmetic.
    cols = x.shape[-1]
    matrix = x if x.dim() == 2 else x.reshape(-1, cols)
    if cols > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    count = matrix.shape[0]
    out = matrix.new_empty((count, out_features))
    if not out_features or not count:
        return out.reshape(*x.shape[:-1], out_features)
    if _from_packed(spec, x, count):
        wide = bias if bias is None or bias.dtype == torch.float32 else bias.to(torch.float32)
        _linear_out(matrix, codes, scales, extra, table, wide, spec, out)
    else:
        if _is_plain(spec, x):
            torch.mm(matrix, codes.view(x.dtype).t(), out=out)
        else:
            _panel_product(matrix, codes, scales, extra, table, spec, out)
        if bias is not None:
            out += bias
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out_features)


def _product_dtype(x: Tensor) -> torch.dtype:
    # No CPU multiplies float16 at full rate, few do bfloat16: float32 is faster, and loses nothing.
    slow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not _BF16_PRODUCTS)
    return torch.float32 if x.device.type == "cpu" and slow else x.dtype


def _panel_product(
    matrix: Tensor,
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    spec: list[int],
    out: Tensor,
) -> None:
    """out = matrix @ weight.T, with the weight decoded panel by panel."""
    rows, cols = out.shape[1], matrix.shape[1]
    dtype = _product_dtype(matrix)
    wide = matrix.to(dtype)
    if _separable(spec, cols):
        shape = _panel_workspace(rows, cols, matrix.shape[0], dtype, out.dtype)
        workspace = new_tensor(shape, torch.uint8, matrix.device)
        _ops._panel_product_out(wide, codes, scales, extra, table, spec, workspace, out)
        return
    weight = new_tensor((rows, cols), dtype, matrix.device)
    _ops._dequantize_out(codes, scales, extra, table, spec, rows, cols, 0, weight)
    if dtype == out.dtype:
        torch.mm(wide, weight.t(), out=out)
    else:
        out.copy_(torch.mm(wide, weight.t()))


def _panel_workspace(
    rows: int, cols: int, count: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[int, int]:
    """[tasks, bytes of each]: a thread's decoded panel, and its products where out is narrower."""
    tasks = max(1, min(torch.get_num_threads(), rows // _LEAST_PANEL_ROWS))
    each = -(-rows // tasks) + 15  # tasks begin at multiples of 16
    step = min(each, max(_LEAST_PANEL_ROWS, _PANEL_BYTES // max(1, tasks * cols * dtype.itemsize)))
    columns = cols if dtype == out_dtype else cols + count
    return tasks, -(-step * columns * dtype.itemsize // 64) * 64


def _embedding(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    spec: list[int],
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    rows, cols = shape
    flat = indices.reshape(-1)
    # On CUDA the kernel looks, and stops the device as torch's own: the host would have to wait.
    looks = flat.device.type == "cpu" and flat.numel() > 0
    if looks and (int(flat.min()) < 0 or int(flat.max()) >= rows):
        raise IndexError(f"index out of range: this embedding has {rows} rows")
    out = torch.empty((flat.shape[0], cols), dtype=_kernel_dtype(dtype), device=codes.device)
    if out.numel():
        if _separable(spec, cols):
            flat = flat.to(torch.int64).contiguous()
            _ops._embedding_out(flat, codes, scales, extra, table, spec, rows, out)
        else:
            whole = _dequantize(codes, scales, extra, table, spec, shape, out.dtype)
            torch.index_select(whole, 0, flat, out=out)
    return out.to(dtype).reshape(*indices.shape, cols)


def workspace_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Bytes that the operator `name` holds besides its inputs and its output, at their highest.

    The estimator asks; the figures follow the code above.
    """
    if name == "linear_int8":
        from ._operators_int8 import workspace_of as int8_workspace

        return int8_workspace(args)
    if name == "recurrent_int8":
        from ._recurrent import workspace_of

        return workspace_of(args)
    if name == "conv":
        from ._convolution import conv_workspace

        return conv_workspace(args)
    if name != "linear":
        return 0
    x, spec, out_features = args[0], args[6], args[7]
    if x.device.type == "cuda":
        return _routes.workspace_bytes(x, args[5], spec, out_features)
    cols = x.shape[-1]
    count = x.numel() // cols if cols else 0
    if _from_packed(spec, x, count):
        bias = args[5]
        return 0 if bias is None or bias.dtype == torch.float32 else 4 * out_features
    if _is_plain(spec, x):
        return 0
    dtype = _product_dtype(x)
    copies = 0 if dtype == x.dtype else count * cols * dtype.itemsize
    if _separable(spec, cols):
        return math.prod(_panel_workspace(out_features, cols, count, dtype, x.dtype)) + copies
    products = 0 if dtype == x.dtype else count * out_features * dtype.itemsize
    return out_features * cols * dtype.itemsize + copies + products


_library = torch.library.Library("vramkit", "IMPL")
# What CUDA has is in docs/gpu-status.md.
for _key in ("CPU", "CUDA") if HAS_CUDA_OPERATORS else ("CPU",):
    _library.impl("quantize", _quantize, _key)
    _library.impl("dequantize", _dequantize, _key)
    _library.impl("dequantize_rows", _dequantize_rows, _key)
    _library.impl("embedding", _embedding, _key)
_library.impl("linear", run_linear, "CPU")
if HAS_CUDA_OPERATORS:
    _library.impl("linear", _routes.run_linear, "CUDA")


@torch.library.register_fake("vramkit::quantize")
def _(x: Tensor, table: Tensor | None, spec: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = _as_matrix(x).shape
    codes, scales, extra = _part_shapes(spec, rows, cols)
    return tuple(x.new_empty(shape, dtype=torch.uint8) for shape in (codes, scales, extra))  # type: ignore[return-value]


@torch.library.register_fake("vramkit::dequantize")
def _(codes: Tensor, scales: Tensor, extra: Tensor | None, table: Tensor | None, spec: list[int],
      shape: list[int], dtype: torch.dtype) -> Tensor:  # fmt: skip
    return codes.new_empty(shape, dtype=dtype)


@torch.library.register_fake("vramkit::dequantize_rows")
def _(codes: Tensor, scales: Tensor, extra: Tensor | None, table: Tensor | None, spec: list[int],
      rows: int, cols: int, first: int, count: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    return codes.new_empty((count, cols), dtype=dtype)


@torch.library.register_fake("vramkit::linear")
def _(x: Tensor, codes: Tensor, scales: Tensor, extra: Tensor | None, table: Tensor | None,
      bias: Tensor | None, spec: list[int], out_features: int) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("vramkit::embedding")
def _(indices: Tensor, codes: Tensor, scales: Tensor, extra: Tensor | None, table: Tensor | None,
      spec: list[int], shape: list[int], dtype: torch.dtype) -> Tensor:  # fmt: skip
    return codes.new_empty((*indices.shape, shape[1]), dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, extra, table, bias, spec, out_features = inputs
    ctx.save_for_backward(codes, scales, extra, table)
    ctx.spec, ctx.shape = spec, [out_features, x.shape[-1]]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the weight is decoded again, not kept."""
    codes, scales, extra, table = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _ops.dequantize(codes, scales, extra, table, ctx.spec, ctx.shape, grad.dtype)
        grad_x = grad @ weight
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None


torch.library.register_autograd(
    "vramkit::linear", _backward, setup_context=_save_for_backward, lib=_library
)


class StoredParts:
    """The parts of one stored weight, as operators take them.

    Its rows are its first `lead` dimensions, its columns the others; every row has scales of its
    own (or, in flat formats, blocks run on across rows).
    """

    __slots__ = ("codes", "extra", "fmt", "lead", "scales", "shape")

    def __init__(
        self,
        fmt: StorageFormat,
        shape: tuple[int, ...],
        codes: Tensor,
        scales: Tensor,
        extra: Tensor | None,
        lead: int = 1,
    ) -> None:
        self.fmt, self.shape, self.lead = fmt, shape, lead
        self.codes, self.scales, self.extra = codes, scales, extra

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(
            part.numel() for part in (self.codes, self.scales, self.extra) if part is not None
        )

    def to(self, device: torch.device) -> StoredParts:
        """The same parts on `device`."""
        codes, scales, extra = (
            None if part is None else part.to(device)
            for part in (self.codes, self.scales, self.extra)
        )
        assert codes is not None
        assert scales is not None
        return StoredParts(self.fmt, self.shape, codes, scales, extra, self.lead)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scales, extra and table: what every operator on a stored weight begins with."""
        return self.codes, self.scales, self.extra, self.fmt.table_on(self.codes.device)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight."""
        rows, cols = matrix_shape(self.shape, self.lead)
        shape = list(self.shape) if self.lead == 1 else [rows, cols]
        out: Tensor = _ops.dequantize(*self.arguments, self.fmt.spec, shape, dtype)
        return out if self.lead == 1 else out.reshape(self.shape)

    def _leading(self) -> tuple[int, int, int]:
        """(rows, columns, rows for each index of the first dimension) that row access works with.

        Blocks of flat formats do not know rows: one row for each index needs the least alignment.
        """
        rows, cols = matrix_shape(self.shape, self.lead)
        each = rows // self.shape[0] if self.shape[0] else 1
        if self.fmt.spec[_GRAIN] == _GRAIN_FLAT:
            return self.shape[0], cols * each, 1
        return rows, cols, each

    def dense_slice(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Decoded indices [first, first + count) of the first dimension."""
        rows, cols, each = self._leading()
        out: Tensor = _ops.dequantize_rows(
            *self.arguments, self.fmt.spec, rows, cols, first * each, count * each, dtype
        )
        return out.reshape(count, *self.shape[1:])

    def gather(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded indices of the first dimension, [*indices.shape, …]; negative ones are errors."""
        rows, cols, each = self._leading()
        flat = indices.reshape(-1)
        if each > 1:
            within = torch.arange(each, device=flat.device)
            flat = (flat.to(torch.int64)[:, None] * each + within).reshape(-1)
        out: Tensor = _ops.embedding(flat, *self.arguments, self.fmt.spec, [rows, cols], dtype)
        return out.reshape(*indices.shape, *self.shape[1:])

    def matrix_at(self, index: int) -> StoredParts | None:
        """One index of the first dimension of a 3-D weight, still stored; None where no view is."""
        rows, cols = matrix_shape(self.shape, self.lead)
        each = rows // self.shape[0]
        if len(self.shape) != 3 or self.lead != 2 or self.fmt.nested or self.codes.dim() != 2:
            return None
        piece = slice(index * each, (index + 1) * each)
        extra = None if self.extra is None else self.extra[piece]
        return StoredParts(self.fmt, (each, cols), self.codes[piece], self.scales[piece], extra)


def matrix_shape(shape: Sequence[int], lead: int) -> tuple[int, int]:
    """(rows, columns) of a weight whose first `lead` dimensions are rows; one row where 1-D."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return math.prod(shape[:lead]), math.prod(shape[lead:])


def encode(
    weight: Tensor, fmt: StorageFormat, lead: int = 1, quantize: Any = _ops.quantize
) -> StoredParts:
    """Encode a weight (float32, bfloat16 or float16; any shape) natively into `fmt`.

    Its first `lead` dimensions are rows, each with scales of its own.
    """
    source = weight.detach()
    if source.dtype not in FLOATS:
        if not source.dtype.is_floating_point:
            raise TypeError(f"cannot quantize a weight of dtype {source.dtype}")
        source = source.to(torch.float32)
    if lead != 1:
        source = source.reshape(matrix_shape(source.shape, lead))
    codes, scales, extra = quantize(source, fmt.table_on(source.device), fmt.spec)
    found = extra if extra.numel() else None
    return StoredParts(fmt, tuple(weight.shape), codes, scales, found, lead)


def encode_again(value: Tensor, old: StoredParts) -> StoredParts:
    """Encode a new version of the weight `old` in its format; unchanged rows keep their bits."""
    parts = encode(value, old.fmt, old.lead)
    keep_rows(parts, value, old)
    return parts


def keep_rows(parts: StoredParts, value: Tensor, old: StoredParts) -> None:
    """Give rows of `value` that are what `old` decodes to their old codes and scales, in place.

    `parts` holds `value` encoded anew, in the same format: a search for better scales would have
    rounded those rows a second time.
    """
    rows, old_rows = matrix_shape(value.shape, old.lead), matrix_shape(old.shape, old.lead)
    row_by_row = parts.codes.dim() == 2 and old.codes.dim() == 2 and not old.fmt.nested
    if value.is_meta or old.codes.is_meta or not row_by_row or rows[1] != old_rows[1]:
        return
    count = min(rows[0], old_rows[0])
    before = old.dense(value.dtype).reshape(old_rows)[:count].to(value.device)
    same = (value.detach().reshape(rows)[:count] == before).all(1)
    for new, kept in zip(parts.arguments[:3], old.arguments[:3], strict=True):
        if new is not None and kept is not None:
            new.detach()[:count][same] = kept.detach()[:count][same].to(new.device)
