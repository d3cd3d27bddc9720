"""The operator `vramkit::conv`: torch's convolutions on a stored weight.

The weight is decoded to the type of the product and given to torch's own convolution: whole where
it is small, else by slices of its first dimension, so that the workspace stays bounded. Gradients
to the input are the transposed convolution with the same stored weight, decoded again.

On a CPU decoding and convolution are one native call where they can be, and the decoding writes
the order of the input. Elsewhere (`native=False`) both are operators that every device has: the
weight is decoded in its own order, and torch's convolution reorders it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._native import HAS_CUDA_OPERATORS
from ._operators import _library, _ops, _product_dtype, _separable, matrix_shape

# Bytes of a decoded slice. Several times the shared cache, because torch reorders a weight in each
# call: larger slices mean fewer of those, and all layers of most models are one slice.
SLICE_BYTES = 16 << 20
# On a GPU a slice costs a launch of each kernel, and a few output channels leave most of it idle.
# Not measured: no GPU has run this.
CUDA_SLICE_BYTES = 64 << 20

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of the result: x's."""
    if x.is_contiguous():
        return torch.contiguous_format
    kind = _LAST.get(x.dim())
    if kind is not None and x.is_contiguous(memory_format=kind):
        return kind
    return torch.contiguous_format


def _output_size(
    x: Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[int]:
    batch, _, *spatial = x.shape
    sizes = [batch, shape[1] * groups if transposed else shape[0]]
    for k, size in enumerate(spatial):
        reach = dilation[k] * (shape[2 + k] - 1)
        if transposed:
            sizes.append((size - 1) * stride[k] - 2 * padding[k] + reach + output_padding[k] + 1)
        else:
            sizes.append((size + 2 * padding[k] - reach - 1) // stride[k] + 1)
    return sizes


def _slice_bytes(device: torch.device) -> int:
    return SLICE_BYTES if device.type == "cpu" else CUDA_SLICE_BYTES


def _pieces(shape: list[int], groups: int, itemsize: int, most: int) -> list[tuple[int, int, int]]:
    """(first row, rows, groups) of every slice: several whole groups, or a part of one."""
    rows, cols = matrix_shape(shape, 1)
    each = rows // groups
    fitting = max(1, most // max(1, cols * itemsize))
    if fitting >= each:
        step = fitting // each
        return [
            (g * each, min(step, groups - g) * each, min(step, groups - g))
            for g in range(0, groups, step)
        ]
    return [
        (g * each + first, min(fitting, each - first), 1)
        for g in range(groups)
        for first in range(0, each, fitting)
    ]


def is_whole(x: Tensor, spec: list[int], shape: list[int]) -> bool:
    """Whether `_conv_whole` can take this call as it is."""
    cols = math.prod(shape[1:])
    return (
        shape[0] * cols * x.dtype.itemsize <= SLICE_BYTES
        and x.dtype != torch.float16
        and x.numel() > 0
        and _separable(spec, cols)
    )


def _pieces_of(
    spec: list[int], shape: list[int], groups: int, itemsize: int, most: int
) -> list[tuple[int, int, int]]:
    """The slices of at most `most` bytes that a weight of `shape` is decoded in."""
    cols = math.prod(shape[1:])
    if shape[0] * cols * itemsize <= most or not _separable(spec, cols):
        return [(0, shape[0], groups)]
    return _pieces(shape, groups, itemsize, most)


def _decoded(
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    spec: list[int],
    shape: list[int],
    first: int,
    count: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    native: bool,
) -> Tensor:
    """Rows [first, first + count) of the weight, [count, *shape[1:]].

    Natively in the order of `layout`: torch would copy a weight that is not in its input's order.
    """
    rows, channels, *kernel = shape
    taps = math.prod(kernel)
    cols = channels * taps
    separable = _separable(spec, cols)
    ordered = layout != torch.contiguous_format and channels > 1 and taps > 1
    if native and ordered and separable:
        last = torch.empty((count, *kernel, channels), dtype=dtype, device=codes.device)
        _ops._dequantize_taps_out(
            codes, scales, extra, table, spec, rows, cols, first, last.view(count, taps, channels)
        )
        return last.movedim(-1, 1)
    weight = torch.empty((count, channels, *kernel), dtype=dtype, device=codes.device)
    out = weight.view(count, cols)
    _ops._dequantize_out(codes, scales, extra, table, spec, rows, cols, first, out)
    return weight


def _convolve(
    native: bool,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    spec: list[int],
    shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    sizes = _output_size(x, shape, stride, padding, dilation, transposed, output_padding, groups)
    layout = _layout(x)
    if min(sizes[1:]) <= 0:
        raise RuntimeError(
            f"a convolution of input {list(x.shape)} with a weight {shape} has output {sizes}"
        )
    if not x.numel():
        out = torch.zeros(sizes, dtype=x.dtype, device=x.device)
        if bias is not None:
            out += bias.to(x.dtype).reshape(-1, *[1] * len(stride))
        return out.contiguous(memory_format=layout)
    dtype = _product_dtype(x)
    pieces = _pieces_of(spec, shape, groups, dtype.itemsize, _slice_bytes(x.device))
    wide = x.to(dtype)

    def product(part: Tensor, first: int, count: int, n: int, add: Tensor | None) -> Tensor:
        weight = _decoded(
            codes, scales, extra, table, spec, shape, first, count, dtype, layout, native
        )
        return torch.convolution(
            part,
            weight,
            None if add is None else add.to(dtype),
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            n,
        )

    if native and len(pieces) == 1 and _separable(spec, math.prod(shape[1:])):
        out = _ops._conv_whole(
            wide, codes, scales, extra, table, None if bias is None else bias.to(dtype), spec,
            shape, stride, padding, dilation, transposed, output_padding, groups,
        )  # fmt: skip
    elif len(pieces) == 1:
        out = product(wide, 0, shape[0], groups, bias)
    elif transposed:
        out = _transposed_slices(wide, product, pieces, sizes, shape, groups, bias, layout)
    else:
        out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)
        each, channels = shape[0] // groups, shape[1]
        for first, count, n in pieces:
            group = first // each
            part = wide[:, group * channels : (group + n) * channels]
            add = None if bias is None else bias[first : first + count]
            out[:, first : first + count] = product(part, first, count, n, add)
    return out.to(x.dtype).contiguous(memory_format=layout)


def _conv(*args: Any) -> Tensor:
    """`vramkit::conv` on a CPU."""
    return _convolve(True, *args)


def _conv_by_torch(*args: Any) -> Tensor:
    """The same from operators that every device has."""
    return _convolve(False, *args)


def _transposed_slices(
    x: Tensor,
    product: Any,
    pieces: list[tuple[int, int, int]],
    sizes: list[int],
    shape: list[int],
    groups: int,
    bias: Tensor | None,
    layout: torch.memory_format,
) -> Tensor:
    """Rows are input channels here: the slices of one group add up, in float32."""
    each, channels = shape[0] // groups, shape[1]
    out = torch.empty(sizes, dtype=torch.float32, device=x.device, memory_format=layout).zero_()
    for first, count, n in pieces:
        group = first // each
        made = product(x[:, first : first + count], first, count, n, None)
        out[:, group * channels : (group + n) * channels] += made
    if bias is not None:
        out += bias.to(torch.float32).reshape(-1, *[1] * (len(sizes) - 2))
    return out


def _torch_copies(
    x: Tensor, shape: list[int], outputs: list[int], transposed: bool, groups: int, weight: int
) -> int:
    """Elements that torch's convolution holds on a CPU, by the library that it chooses.

    oneDNN copies input and weight into orders of its own; small inputs are unfolded instead
    (`use_mkldnn` in ATen's Convolution.cpp).
    """
    kernel = shape[2:]
    wide = len(kernel) > 1 and min(kernel[-2:]) > 3
    if groups > 1 or wide or x.shape[0] > 1 or x.numel() > 20480 or x.dtype != torch.float32:
        return x.numel() + weight
    places = math.prod(x.shape[2:]) if transposed else math.prod(outputs[2:])
    return shape[1] * math.prod(kernel) * places


def conv_workspace(args: tuple[Any, ...]) -> int:
    """Bytes that `conv` holds besides inputs and output, as the code above goes."""
    x, spec, shape = args[0], args[6], args[7]
    transposed, groups = args[11], args[13]
    dtype = _product_dtype(x)
    rows, cols = matrix_shape(shape, 1)
    pieces = _pieces_of(spec, shape, groups, dtype.itemsize, _slice_bytes(x.device))
    largest = max(count for _, count, _ in pieces)
    stride, padding, dilation = args[8:11]
    outputs = _output_size(x, shape, stride, padding, dilation, transposed, args[12], groups)
    count = math.prod(outputs)
    held = largest * cols * dtype.itemsize
    if x.device.type == "cpu":
        copies = _torch_copies(x, shape, outputs, transposed, groups, largest * cols)
        held += copies * dtype.itemsize
    elif _layout(x) != torch.contiguous_format:
        held += largest * cols * dtype.itemsize  # the weight in the input's order
    if dtype != x.dtype:
        held += x.numel() * dtype.itemsize
    if len(pieces) == 1:
        return held + (0 if dtype == x.dtype else count * dtype.itemsize)
    if transposed:
        share = max(n for _, _, n in pieces) / groups
        return held + 4 * count + int(share * count * dtype.itemsize)
    return held + count * dtype.itemsize * largest // rows


_library.impl("conv", _conv, "CPU")
if HAS_CUDA_OPERATORS:
    _library.impl("conv", _conv_by_torch, "CUDA")


@torch.library.register_fake("vramkit::conv")
def _(x: Tensor, codes: Tensor, scales: Tensor, extra: Tensor | None, table: Tensor | None,
      bias: Tensor | None, spec: list[int], shape: list[int], stride: list[int],
      padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int],
      groups: int) -> Tensor:  # fmt: skip
    sizes = _output_size(x, shape, stride, padding, dilation, transposed, output_padding, groups)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, extra, table, bias, *rest = inputs
    ctx.save_for_backward(codes, scales, extra, table)
    ctx.rest, ctx.sizes, ctx.has_bias = rest, list(x.shape), bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias: the convolution the other way round, on the stored weight."""
    codes, scales, extra, table = ctx.saved_tensors
    spec, shape, stride, padding, dilation, transposed, _, groups = ctx.rest
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        rest = [0] * len(stride)
        if not transposed:  # what the division by the stride dropped
            rest = [
                ctx.sizes[2 + k]
                - (grad.shape[2 + k] - 1) * stride[k]
                + 2 * padding[k]
                - dilation[k] * (shape[2 + k] - 1)
                - 1
                for k in range(len(stride))
            ]
        grad_x = _ops.conv(
            grad, codes, scales, extra, table, None, spec, shape, stride, padding, dilation,
            not transposed, rest, groups,
        )  # fmt: skip
        if transposed and list(grad_x.shape[2:]) != ctx.sizes[2:]:
            # An output padding of a stride or more (allowed below a dilation) was zeros.
            for k in range(len(stride)):
                grad_x = grad_x.narrow(2 + k, 0, ctx.sizes[2 + k])
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, None, None, None, None, grad_bias, *[None] * 8


torch.library.register_autograd(
    "vramkit::conv", _backward, setup_context=_save_for_backward, lib=_library
)
