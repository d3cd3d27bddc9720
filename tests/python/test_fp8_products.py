"""Products in FP8: rounding by row, scales in and after the product, opt-in."""

from __future__ import annotations

import warnings

import pytest
import torch
import vramkit
from numerics import UNIT, accumulation_bound, assert_within
from torch import nn
from vramkit import _scaled
from vramkit._operators import encode
from vramkit._scaled import (
    disable_fp8_computation,
    enable_fp8_computation,
    fp8_linear,
    quantize_rows,
    supported,
    wants_fp8,
)

CUDA = torch.device("cuda", 0)


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends a CUDA device of capability 8.9."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 9))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as float64, its rows rounded to e4m3 with a scale of their own: by torch's own cast."""
    scale = x.float().abs().amax(1, keepdim=True) / 448
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    x = torch.randn(33, 64).to(dtype)
    x[3] *= 1000
    x[5] = 0
    codes, scales = quantize_rows(x)
    made = codes.double() * scales.double()[:, None]
    step = x.double().abs().clamp(min=2.0**-6 * x.double().abs().amax(1, keepdim=True) / 448)
    assert float(((made - x.double()).abs() - 2.0**-4 * step).max()) <= 1e-7 * float(x.abs().max())
    # A division and a multiplication by the scale differ where they hit a rounding boundary.
    assert float((made != rounded(x)).double().mean()) < 0.01
    assert not made[5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_against_float64(fmt: str, dtype: torch.dtype, with_bias: bool) -> None:
    weight, x = torch.randn(48, 64), torch.randn(2, 35, 64).to(dtype)
    bias = torch.randn(48).to(dtype) if with_bias else None
    parts = encode(weight, vramkit.get_format(fmt))
    made = fp8_linear(x, parts.codes, parts.scales, bias, 48, fmt)
    assert made.dtype == dtype
    flat = x.reshape(-1, 64)
    codes, scales = quantize_rows(flat)
    a = codes.double() * scales.double()[:, None]
    w = parts.codes.view(_scaled._STORED[fmt]).double()
    w = w * parts.scales.reshape(-1).view(torch.float32).double()[:, None]
    assert torch.equal(w.float(), parts.dense(torch.float32))
    expected = a @ w.t() + (0 if bias is None else bias.double())
    magnitude = a.abs() @ w.abs().t() + (0 if bias is None else bias.double().abs())
    bound = (accumulation_bound(64) + 4 * UNIT[torch.float32]) * magnitude
    bound = bound + UNIT[dtype] * expected.abs()
    assert_within(made.reshape(-1, 48), expected, bound)


def test_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(32, 64), torch.randn(19, 64)
    parts = encode(weight, vramkit.get_format("fp8"))
    whole = fp8_linear(x, parts.codes, parts.scales, None, 32)
    monkeypatch.setattr(_scaled, "_PRODUCT_BYTES", 4 * 32 * 5)
    assert torch.allclose(fp8_linear(x, parts.codes, parts.scales, None, 32), whole, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_nan(bad: float) -> None:
    weight, x = torch.randn(16, 32), torch.randn(4, 32)
    parts = encode(weight, vramkit.get_format("fp8"))
    x[2, 7] = bad
    made = fp8_linear(x, parts.codes, parts.scales, None, 16)
    assert made[2].isnan().all()
    assert made[[0, 1, 3]].isfinite().all()


def test_what_is_refused() -> None:
    parts = encode(torch.randn(20, 32), vramkit.get_format("fp8"))
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(torch.randn(2, 32), parts.codes, parts.scales, None, 20)
    parts = encode(torch.randn(16, 32), vramkit.get_format("int8"))
    with pytest.raises(ValueError, match="not int8"):
        fp8_linear(torch.randn(2, 32), parts.codes, parts.scales, None, 16, "int8")
    assert fp8_linear(torch.randn(0, 32), parts.codes, parts.scales, None, 16).shape == (0, 16)


@pytest.mark.usefixtures("ada")
def test_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = vramkit.get_format("fp8")
    assert supported(CUDA, (64, 48, 64), fp8)
    assert supported(CUDA, (1, 48, 64), vramkit.get_format("fp8_e5m2"))
    assert not supported(torch.device("cpu"), (64, 48, 64), fp8)
    assert not supported(CUDA, (64, 40, 64), fp8)
    assert not supported(CUDA, (64, 48, 40), fp8)
    assert not supported(CUDA, (64, 48, 64), vramkit.get_format("int8"))
    assert not supported(CUDA, (0, 48, 64), fp8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 6))
    assert not supported(CUDA, (64, 48, 64), fp8)


def test_opt_in_says_when_it_cannot() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 16))
    with pytest.raises(ValueError, match="no Linear layer of this model is stored in fp8"):
        enable_fp8_computation(model)
    vramkit.convert(model, {"0": "fp8", "2": "int8"})
    x = torch.randn(128, 64)
    before = model(x)
    with pytest.warns(RuntimeWarning, match="capability 8.9 or later, and the model is on cpu"):
        assert enable_fp8_computation(model) == 1
    assert wants_fp8(model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), before)
    assert disable_fp8_computation(model) == 1
    assert disable_fp8_computation(model) == 0


def test_layers_take_it_for_many_rows_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is said to have FP8; the product itself runs here."""
    monkeypatch.setattr(_scaled, "multiplies", lambda device, fmt: True)
    layer = nn.Linear(64, 48)
    vramkit.convert(layer, "fp8")
    x = torch.randn(_scaled.LEAST_ROWS, 64)
    plain, few = layer(x), layer(x[:8])
    enable_fp8_computation(layer)
    with torch.no_grad():
        made = layer(x)
        expected = fp8_linear(x, layer.codes, layer.scales, layer.bias, 48)
        assert torch.equal(made, expected)
        assert not torch.equal(made, plain)
        # Rounding both sides: about sqrt(2) of e4m3's 2.6 % for one, on normal numbers.
        assert float((made - plain).norm() / plain.norm()) < 0.05
        assert torch.equal(layer(x[:8]), few)
    again = layer(x.requires_grad_())
    assert torch.allclose(again, plain)
    again.sum().backward()
    assert x.grad is not None
    disable_fp8_computation(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), plain)
    enable_fp8_computation(layer)
    vramkit.convert(vramkit.restore(layer), "fp8")
    assert not wants_fp8(layer)
