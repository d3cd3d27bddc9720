"""How much work an operator is, and what it holds inside where no probe was made."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from .targets import Target
from .tracing import Call, Geometry, Inside, geometries


def work(call: Call) -> float:
    """Multiply-adds of a call, roughly; elements touched for all but products and convolutions."""
    tensors = list(geometries(call.spec))
    name = call.operator._schema.name.removeprefix("aten::")
    total = float(sum(g.numel for g in tensors))
    if not tensors:
        return 1.0
    if name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "_addmm_activation"):
        a, b = [g for g in tensors if len(g.shape) >= 2][-2:]
        return float(a.numel) * (b.shape[-1] if len(b.shape) > 1 else 1)
    if "convolution" in name:
        return _convolution_work(call.spec[0])
    if call.operator.namespace == "vramkit":
        # Rows of the input times the codes, which hold up to two weights in a byte.
        rows = tensors[0].numel / max(1, tensors[0].shape[-1] if tensors[0].shape else 1)
        return rows * 2 * max(g.numel for g in tensors[1:] or tensors)
    if "attention" in name:
        query, key = tensors[0], tensors[1]
        length = key.shape[-2] if len(key.shape) > 1 else 1
        return 2.0 * query.numel * length
    if name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        rows = tensors[0].numel / max(1, tensors[0].shape[-1])
        return rows * sum(g.numel for g in tensors[1:])
    if "rnn" in name or "lstm" in name or "gru" in name:
        rows = tensors[0].numel / max(1, tensors[0].shape[-1])
        return rows * sum(g.numel for g in tensors[1:])
    return total


def _convolution_work(args: tuple[Any, ...]) -> float:
    from math import prod

    x, weight = args[1], args[2]
    if not isinstance(x, Geometry) or not isinstance(weight, Geometry):
        return 1.0
    transposed = bool(args[7]) if len(args) > 7 else False
    if transposed:
        return float(x.numel) * prod(weight.shape[1:])
    stride = args[4][1:] if len(args) > 4 and isinstance(args[4], tuple) else (1,)
    return float(x.numel) / prod(stride) * weight.numel / max(1, weight.shape[1])


def inside_of(call: Call, results: tuple[int, ...], target: Target) -> Inside | None:
    """What a call allocates, by rule: signed sizes in order; None where only results are known.

    `results` are the bytes of the call's new results. The rules were read off torch's sources and
    compared with probes on one processor (AVX-512, oneDNN with channels in blocks of 16); other
    processors block differently.
    """
    name = call.operator._schema.name.removeprefix("aten::")
    args = call.spec[0][1:]
    if target.kind != "cpu":
        return None  # CUDA kernels read mixed dtypes directly; cuDNN's workspaces are not known
    if name == "convolution":
        return _convolution(args, results[0])
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return _flash(args, results)
    if name == "mkldnn_rnn_layer":
        return _recurrent(args, results)
    if name == "_transformer_encoder_layer_fwd":
        return _encoder_layer(args)
    if name == "_native_multi_head_attention":
        return _attention(args, results)
    if name == "logsumexp":
        return (results[0], args[0].numel * args[0].dtype.itemsize, -args[0].numel * _size(args[0]))
    if name in _POINTWISE:
        return _mixed(args, results)
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return _product(args, results)
    if name in ("native_layer_norm", "native_group_norm"):
        x = args[0]
        copied = x.stride != _strides(x.shape) and x.stride != _last_strides(x.shape)
        return (*results, x.numel * _size(x), -x.numel * _size(x)) if copied else None
    if name.startswith(("upsample_nearest2d", "_upsample_nearest_exact2d")):
        return _upsampled(args[0], results[0])
    return None


_POINTWISE = frozenset({
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "atan2", "fmod", "remainder", "lerp",
    "addcmul", "addcdiv", "eq", "ne", "lt", "le", "gt", "ge", "where", "add_", "sub_", "mul_",
    "div_", "logical_and", "logical_or", "bitwise_and", "bitwise_or",
})  # fmt: skip
_PACKED = 82752  # bytes of a thread's panels, at the sizes where they are full
_BLOCK = 16  # channels of oneDNN's blocked layouts with AVX-512


def _size(g: Geometry) -> int:
    return g.dtype.itemsize


def _mixed(args: tuple[Any, ...], results: tuple[int, ...]) -> Inside | None:
    """Operands of another dtype than the common one are cast first, at their own shape."""
    tensors = [g for g in args if isinstance(g, Geometry) and g.shape]
    if len({g.dtype for g in tensors if g.dtype != torch.bool}) < 2:
        return None
    common = tensors[0].dtype
    for g in tensors[1:]:
        common = torch.promote_types(common, g.dtype)
    casts = [g.numel * common.itemsize for g in tensors if g.dtype not in (common, torch.bool)]
    return (*casts, *results, *(-n for n in casts))


def _product(args: tuple[Any, ...], results: tuple[int, ...]) -> Inside | None:
    """oneDNN packs operands of bfloat16 by thread; other dtypes are multiplied where they lie."""
    a = next(g for g in args if isinstance(g, Geometry) and len(g.shape) > 1)
    if a.dtype != torch.bfloat16 or a.shape[-2] == 1:
        return None
    packed = torch.get_num_threads() * _PACKED
    return (*results, packed, -packed)


def _upsampled(x: Geometry, result: int) -> Inside | None:
    """Works with channels last: what comes otherwise is copied there, and the result back."""
    if x.stride == _last_strides(x.shape) or x.shape[1] < 4:
        return None
    if x.stride == _strides(x.shape):
        size = x.numel * _size(x)
        return (result, size, result, -result, -size)
    return (result, result, -result)


def _flash(args: tuple[Any, ...], results: tuple[int, ...]) -> Inside:
    """Each thread's block of scores, maxima, sums and outputs (FlashAttentionKernel.cpp)."""
    query, key = args[0], args[1]
    length, rows = key.shape[2], query.shape[2]
    split = 256 if rows >= 768 else 64 if rows >= 192 else 32
    q, kv = min(split, rows), min(512, length)
    threads = torch.get_num_threads()
    floats = threads * (q * kv + 2 * q + q * query.shape[3]) * 4
    reduced = threads * q * kv * _size(query) if _size(query) < 4 else 0
    extra = (floats, reduced) if reduced else (floats,)
    return (*results, *extra, *(-n for n in reversed(extra)))


def _recurrent(args: tuple[Any, ...], results: tuple[int, ...]) -> Inside:
    """Packed weights, the sum of the biases, and the gates of all steps."""
    x, w_ih, w_hh, bias = args[:4]
    gates = x.numel // max(1, x.shape[-1]) * w_ih.shape[0] * 4
    scratch = gates + 24 * args[5].numel * 4
    extra = [g.numel * _size(g) for g in (bias, w_ih, w_hh)] + [scratch]
    return (*(n for n in results if n), *extra, *(-n for n in reversed(extra)))


def _encoder_layer(args: tuple[Any, ...]) -> Inside:
    """The fused encoder layer: all heads' scores at once, and the wide middle."""
    x, heads, first = args[0], args[2], bool(args[8])
    one = x.numel * _size(x)
    rows, length = x.numel // x.shape[-1], x.shape[1]
    scores = rows * length * heads * _size(x)
    wide = rows * args[14].shape[0] * _size(x)
    attend = (3 * one, 3 * one, -3 * one, scores, -scores, one, one, -one, -3 * one)
    if first:
        return (one, *attend, -one, one, wide, one, -wide, -one, -one)
    return (*attend, one, -one, wide, one, -wide, one, -one, -one)


def _attention(args: tuple[Any, ...], results: tuple[int, ...]) -> Inside:
    """The fused multi-head attention: all heads' scores at once."""
    x, key, heads = args[0], args[1], args[4]
    one = x.numel * _size(x)
    scores = x.numel // x.shape[-1] * key.shape[1] * heads * _size(x)
    weights = tuple(n for n in results[1:] if n)
    return (one, one, one, 3 * one, -one, -one, -one, 3 * one, -3 * one, scores, one, one, -one,
            *weights, -scores, -3 * one)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _backend(*args: Any) -> str:
    """The name of torch's own choice among convolution backends."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), FakeTensorMode():
        made = [
            torch.empty_strided(g.shape, g.stride, dtype=g.dtype) if isinstance(g, Geometry) else g
            for g in args[:3]
        ]
        rest = [list(a[1:]) if isinstance(a, tuple) else a for a in args[3:9]]
        stride, padding, dilation, transposed, output_padding, groups = rest
        chosen = torch._C._select_conv_backend(
            *made, stride, padding, dilation, transposed, output_padding, groups,
            bias_sizes=None if made[2] is None else list(made[2].shape),
        )  # fmt: skip
    return str(chosen).rpartition(".")[2]


def _padded(channels: int) -> int:
    return -(-channels // _BLOCK) * _BLOCK


def _convolution(args: tuple[Any, ...], result: int) -> Inside:
    """oneDNN's reorders to blocked layouts and back, or the columns of an unrolled product."""
    x, weight = args[0], args[1]
    stride, transposed, groups = args[3][1:], bool(args[6]), args[8]
    size = _size(x)
    backend = _backend(*args)
    channels = x.shape[1]
    out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    spatial, one_by_one = weight.shape[2:], math.prod(weight.shape[2:]) == 1
    last = len(x.shape) == 4 and x.stride == _last_strides(x.shape) and channels > 1
    copied = [] if last or x.stride == _strides(x.shape) else [x.numel * size]
    # oneDNN's transposed backends have no name in Python.
    if "Mkldnn" not in backend and not transposed:
        places = result // size // max(1, out_channels)
        unrolled = not one_by_one or math.prod(stride) > 1
        columns = channels // groups * math.prod(spatial) * places * size
        inner = [*copied, columns] if unrolled and "Depthwise" not in backend else copied
        return (*inner, result, *(-n for n in reversed(inner)))
    weights = _padded(weight.shape[0]) * weight.numel // weight.shape[0] * size
    if channels >= _BLOCK and groups == 1:
        weights = weights // channels * _padded(channels)
    if last and not transposed:
        plain = [weight.numel * size] if not one_by_one and weight.shape[1] > 1 else []
        return (*plain, result, weights, -weights, *(-n for n in plain))
    inner = copied
    image = result // max(1, out_channels) * _padded(out_channels) // max(1, x.shape[0])
    if one_by_one and not transposed and size < 4:
        inner.append(torch.get_num_threads() * image // size * 4)  # accumulated in float32
    elif one_by_one and not transposed and math.prod(stride) > 1:
        inner.append(x.numel * size // math.prod(stride))
    if transposed:
        inner.append(image)
    if channels >= _BLOCK:
        inner.append(x.numel // channels * _padded(channels) * size)
    blocked = result // max(1, out_channels) * _padded(out_channels)
    inner.append(weights)
    released = [-n for n in reversed(inner)]
    after = (result, result, -result) if transposed else (result,)
    return (*inner, blocked, *released, *after, -blocked)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    made, step = [], 1
    for n in reversed(shape):
        made.append(step)
        step *= max(1, n)
    return tuple(reversed(made))


def _last_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides with the channels last, for images; plain contiguous ones for other shapes."""
    if len(shape) != 4:
        return _strides(shape)
    _, c, h, w = shape
    return (c * h * w, 1, c * w, c)
