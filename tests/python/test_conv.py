"""Converted convolutions: every option against torch in float64, gradients, layouts, slices."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import vramkit
from numerics import assert_within, product_bound
from torch import Tensor, nn
from torch.library import opcheck
from vramkit import QuantizedLayer, _convolution, _core

BUILTIN = [name for name, _ in _core.builtin_formats()]
OPTIONS: list[tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv1d, (6, 10, 3), {}, (2, 6, 17)),
    (nn.Conv1d, (6, 10, 1), {"bias": False}, (1, 6, 5)),
    (nn.Conv1d, (8, 8, 5), {"stride": 2, "padding": 3, "dilation": 2, "groups": 4}, (3, 8, 31)),
    (nn.Conv1d, (6, 10, 4), {"padding": "same"}, (2, 6, 17)),
    (nn.Conv1d, (6, 10, 3), {"padding": "same", "dilation": 3}, (2, 6, 17)),
    (nn.Conv1d, (6, 10, 3), {"padding": "valid"}, (6, 17)),
    (nn.Conv1d, (6, 10, 4), {"padding": "same", "padding_mode": "circular"}, (2, 6, 17)),
    (nn.Conv2d, (16, 32, 3), {"padding": 1}, (2, 16, 9, 7)),
    (nn.Conv2d, (16, 32, (3, 5)), {"stride": (2, 1), "padding": (0, 2)}, (16, 9, 7)),
    (nn.Conv2d, (16, 16, 3), {"groups": 16, "padding": 1}, (2, 16, 9, 7)),
    (nn.Conv2d, (16, 48, 3), {"groups": 16, "dilation": 2}, (2, 16, 9, 7)),
    (nn.Conv2d, (16, 32, 2), {"padding": "same"}, (2, 16, 9, 7)),
    (nn.Conv2d, (16, 32, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 16, 9, 7)),
    (nn.Conv2d, (16, 32, 3), {"padding": 2, "padding_mode": "replicate"}, (2, 16, 9, 7)),
    (nn.Conv2d, (16, 32, 3), {"padding": (1, 2), "padding_mode": "circular"}, (2, 16, 9, 7)),
    (nn.Conv2d, (16, 32, 3), {"padding": 1}, (0, 16, 9, 7)),
    (nn.Conv3d, (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 7, 6, 5)),
    (nn.Conv3d, (4, 6, (1, 2, 3)), {"padding": "same"}, (4, 7, 6, 5)),
    (nn.ConvTranspose1d, (6, 10, 4), {"stride": 3, "padding": 1, "output_padding": 2}, (2, 6, 9)),
    (nn.ConvTranspose1d, (6, 9, 4), {"stride": 2, "groups": 3, "bias": False}, (6, 9)),
    (nn.ConvTranspose1d, (6, 6, 3), {"dilation": 4, "output_padding": 3}, (2, 6, 9)),
    (nn.ConvTranspose2d, (16, 8, 3), {"stride": 2, "padding": 1, "dilation": 2}, (2, 16, 5, 6)),
    (nn.ConvTranspose2d, (16, 16, 2), {"stride": 2, "groups": 16}, (2, 16, 5, 6)),
    (nn.ConvTranspose3d, (4, 6, 3), {"stride": 2, "output_padding": 1}, (1, 4, 3, 4, 5)),
]  # fmt: skip


def label(option: Any) -> str:
    return f"{option[0].__name__}-{option[2]}"


def reference(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The plain layer with the decoded weight, in float64."""
    assert isinstance(layer, QuantizedLayer)
    plain = copy.deepcopy(layer)
    vramkit.restore(plain, "fp32")
    return plain.double()


def magnitudes(plain: nn.Module, x: Tensor) -> Tensor:
    other = copy.deepcopy(plain)
    for parameter in other.parameters():
        parameter.data.abs_()
    made: Tensor = other(x.double().abs()).detach()
    return made


def terms(layer: nn.Module) -> int:
    """Products in one sum, the bias among them."""
    weight = layer.weight
    return weight[0].numel() * (weight.shape[0] if "Transpose" in type(layer).__name__ else 1) + 1


def check(layer: nn.Module, x: Tensor) -> None:
    plain = reference(layer)
    y, expected = layer(x), plain(x.double()).detach()
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    bound = product_bound(
        magnitudes(plain, x),
        expected,
        terms(layer),
        x.dtype,
        exact_inputs=x.dtype != torch.bfloat16,
    )
    assert_within(y.detach(), expected, bound)


@pytest.mark.parametrize("option", OPTIONS, ids=label)
@pytest.mark.parametrize("name", ["int8", "nf4", "nf4_dq", "int4", "fp8", "bf16", "fp16"])
def test_options_against_float64(option: Any, name: str) -> None:
    kind, args, kwargs, shape = option
    layer = kind(*args, **kwargs)
    vramkit.convert(layer, name)
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(layer, kind)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(layer, torch.randn(shape).to(dtype))


def test_the_bound_can_fail() -> None:
    layer = nn.Conv2d(16, 32, 3)
    vramkit.convert(layer, "int8")
    x = torch.randn(2, 16, 9, 7)
    plain = reference(layer)
    layer.codes[0, 0] ^= 1
    expected = plain(x.double()).detach()
    bound = product_bound(magnitudes(plain, x), expected, terms(layer), x.dtype, exact_inputs=True)
    with pytest.raises(AssertionError, match="times its bound"):
        assert_within(layer(x).detach(), expected, bound)


@pytest.mark.parametrize("option", OPTIONS, ids=label)
def test_gradients(option: Any) -> None:
    kind, args, kwargs, shape = option
    layer = kind(*args, **kwargs)
    vramkit.convert(layer, "int8")
    plain = reference(layer)
    for parameter in plain.parameters():
        parameter.requires_grad_()
    x = torch.randn(shape, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    y, expected = layer(x), plain(wide)
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected.backward(grad.double())
    assert x.grad is not None
    assert wide.grad is not None
    # Each element is a sum of at most as many products as the weight has elements.
    weight = plain.weight
    assert isinstance(weight, Tensor)
    scale = weight.abs().max() * grad.abs().double().sum() / max(1, grad[:1].numel()) + 1
    assert x.grad.shape == wide.grad.shape
    if x.numel():
        assert float((x.grad - wide.grad).abs().max()) <= weight.numel() * 2.0**-24 * float(scale)
    if layer.bias is not None:
        assert torch.allclose(layer.bias.grad.double(), plain.bias.grad, rtol=1e-4, atol=1e-4)


def test_second_derivative() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    vramkit.convert(layer, "int8")
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    plain = reference(layer)
    wide = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(plain(wide).square().sum(), wide, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), wide)
    assert torch.allclose(second.double(), expected, rtol=1e-3, atol=1e-3)


def test_nothing_decoded_is_kept_for_backward() -> None:
    layer = nn.Conv2d(64, 64, 3)
    vramkit.convert(layer, "int8")
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(1, 64, 8, 8, requires_grad=True))
    assert sum(kept) <= layer.stored_bytes


@pytest.mark.parametrize("option", OPTIONS, ids=label)
@pytest.mark.parametrize("name", ["int8", "nf4_dq", "int4"])
def test_slices(option: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that do not fit a slice, cut in groups and within them."""
    kind, args, kwargs, shape = option
    layer = kind(*args, **kwargs)
    vramkit.convert(layer, name)
    x = torch.randn(shape)
    for slice_bytes in (1, 200, 1000):
        monkeypatch.setattr(_convolution, "SLICE_BYTES", slice_bytes)
        check(layer, x)
        check(layer, x.bfloat16())


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d])
def test_channels_last_is_kept(kind: Any) -> None:
    layer = kind(16, 32, 3)
    vramkit.convert(layer, "int8")
    spatial = (9, 7) if kind is not nn.Conv3d else (5, 9, 7)
    layout = torch.channels_last if kind is not nn.Conv3d else torch.channels_last_3d
    x = torch.randn(2, 16, *spatial)
    y, last = layer(x), layer(x.to(memory_format=layout))
    assert y.is_contiguous()
    assert last.is_contiguous(memory_format=layout)
    assert torch.allclose(y, last, rtol=1e-5, atol=1e-5)
    check(layer, x.to(memory_format=layout))
    check(layer, x.flip(0).transpose(-1, -2))


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_opcheck(name: str) -> None:
    for transposed in (False, True):
        layer: Any = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 16, 3)
        vramkit.convert(layer, name)
        fmt = layer.storage_format
        x = torch.randn(2, 8, 6, 7, requires_grad=True)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.detach().to(memory_format=layout).requires_grad_()
            for bias in (None, torch.randn(16, requires_grad=True)):
                args = (
                    given, *layer.parts.arguments, bias, fmt.spec, list(layer.weight_shape),
                    [2, 1], [1, 0], [1, 1], transposed, [0, 0], 1,
                )  # fmt: skip
                opcheck(torch.ops.vramkit.conv.default, args)
        rows, cols = layer.weight_shape[0], layer.weight_shape[1] * 9
        args = (*layer.parts.arguments, fmt.spec, rows, cols, 1, 3, torch.bfloat16)
        opcheck(torch.ops.vramkit.dequantize_rows.default, args)


@pytest.mark.parametrize("option", OPTIONS, ids=label)
def test_compiled_fullgraph(option: Any) -> None:
    kind, args, kwargs, shape = option
    layer = kind(*args, **kwargs).eval()
    vramkit.convert(layer, "nf4")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("option", OPTIONS, ids=label)
def test_inference_gives_the_operators_bits(option: Any) -> None:
    """Without gradients the dispatcher is passed by."""
    kind, args, kwargs, shape = option
    layer = kind(*args, **kwargs).eval()
    vramkit.convert(layer, "int8")
    x = torch.randn(shape)
    layouts = [x]
    if len(shape) - len(layer.stride) == 2 and len(shape) in (4, 5):
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        layouts.append(x.to(memory_format=last))
    for given in layouts:
        with torch.profiler.profile() as seen, torch.enable_grad():
            expected = layer(given.clone().requires_grad_()).detach()
        assert "vramkit::conv" in {event.key for event in seen.key_averages()}
        for mode in (torch.no_grad, torch.inference_mode):
            with torch.profiler.profile() as seen, mode():
                got = layer(given)
            if given.numel():
                assert "vramkit::conv" not in {event.key for event in seen.key_averages()}
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 16, 33])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (4, 4), (1, 7)], ids=str)
def test_decoding_for_channels_last(channels: int, kernel: tuple[int, int]) -> None:
    """The same values as torch's copy of the decoded weight, in the same order in memory."""
    for name in ("int8", "fp8", "int4", "bf16"):
        layer = nn.Conv2d(channels, 5, kernel)
        vramkit.convert(layer, name)
        fmt = layer.storage_format
        rows, cols, taps = 5, channels * math.prod(kernel), math.prod(kernel)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            dense = layer.parts.dense(dtype)
            for first, count in ((0, 5), (3, 2), (4, 0)):
                out = torch.empty(count, taps, channels, dtype=dtype)
                torch.ops.vramkit._dequantize_taps_out(
                    *layer.parts.arguments, fmt.spec, rows, cols, first, out
                )
                expected = dense[first : first + count].reshape(count, channels, taps)
                assert torch.equal(out, expected.transpose(1, 2))
    with pytest.raises(RuntimeError, match="rows asked for"):
        torch.ops.vramkit._dequantize_taps_out(
            *layer.parts.arguments, fmt.spec, rows, cols, 4, torch.empty(2, taps, channels)
        )


def test_autocast_and_output_size() -> None:
    layer = nn.Conv2d(8, 16, 3)
    vramkit.convert(layer, "int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 8, 5, 5)).dtype == torch.bfloat16
    up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
    plain = copy.deepcopy(up)
    vramkit.convert(up, "bf16")
    for shape, size in (((1, 8, 5, 5), [10, 9]), ((8, 5, 5), [10, 10]), ((8, 5, 5), [4, 10, 10])):
        x = torch.randn(shape)
        assert up(x, output_size=size).shape == plain(x, output_size=size).shape


def test_wrong_inputs() -> None:
    layer = nn.Conv2d(8, 16, 3)
    vramkit.convert(layer, "int8")
    for x in (torch.randn(1, 7, 5, 5), torch.randn(5, 5), torch.randn(1, 1, 8, 5, 5)):
        with pytest.raises(RuntimeError, match=r"\[batch, 8, …, …\]"):
            layer(x)
    with pytest.raises(RuntimeError, match="output"):
        layer(torch.randn(1, 8, 2, 2))
    with pytest.raises(TypeError, match="cast it first"):
        layer(torch.randn(1, 8, 5, 5).double())


def test_a_subclass_with_its_own_forward() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            mean = weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight - mean, self.bias)

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    for kind in (Standardized, Doubled):
        layer = kind(8, 16, 3)
        vramkit.convert(layer, "int8")
        x = torch.randn(2, 8, 6, 6)
        expected = reference(layer)(x.double())
        assert torch.allclose(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
