"""Dynamic INT8 and LLM.int8: operators, converted Linears, error on real weights, and the peers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from numerics import SAME_ROUNDINGS, UNIT, assert_within, gamma
from test_cuda import DEVICES
from test_real_weights import Setting
from torch import Tensor, nn
from torch.library import opcheck
from vramkit._operators import encode, workspace_bytes
from vramkit.estimator import estimate
from vramkit.layers import QuantizedLayer

ops = torch.ops.vramkit
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (3, 7, 63),
    (8, 33, 65),
    (9, 100, 384),
    (130, 70, 129),
    (2, 5, 4097),
]


def weight(rows: int, cols: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales, and codes * scales in float64."""
    parts = encode(torch.randn(rows, cols), vramkit.get_format("int8"))
    codes, scales = parts.codes.to(device), parts.scales.to(device)
    wide = scales.view(torch.float32).double()
    return codes, scales, codes.view(torch.int8).double() * wide


def rounded_rows(x: Tensor, threshold: float = 0.0) -> Tensor:
    """What the kernel makes of x, in float64: codes * absmax / 127, outlier columns as they are."""
    wide = x.float()
    large = wide.abs() >= threshold if threshold else torch.zeros_like(wide, dtype=torch.bool)
    absmax = wide.masked_fill(large, 0).abs().amax(-1, keepdim=True)
    factor = 127 / absmax.clamp(min=torch.finfo(torch.float32).tiny)
    codes = (wide * factor).round().clamp(-127, 127)
    columns = large.reshape(-1, x.shape[-1]).any(0)
    return torch.where(columns, wide.double(), codes.double() * absmax.double() / 127)


def bound(x: Tensor, w: Tensor, bias: Tensor | None, outliers: int = 0) -> Tensor:
    """Exact int32 sums: five float32 roundings of the product, then those of the outlier columns,
    of the bias and of the output's dtype."""
    product, magnitude = (x @ w.t()).abs(), x.abs() @ w.abs().t()
    total = product if bias is None else product + bias.double().abs()
    return (
        gamma(6) * total
        + (gamma(outliers + 4) * magnitude if outliers else 0)
        + 2 * UNIT[torch.float32] * total
    )


def outer(bound: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    return bound + UNIT[dtype] * (expected.abs() + bound) + 1e-7 * (dtype == torch.float16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "out", "cols"), SHAPES, ids=str)
def test_dynamic_product_against_float64(
    rows: int, out: int, cols: int, dtype: torch.dtype, device: str
) -> None:
    codes, scales, dense = weight(out, cols, device)
    x = torch.randn(rows, cols).to(device, dtype)
    for bias in (None, *(torch.randn(out).to(device, kind) for kind in (torch.float32, dtype))):
        y = ops.linear_int8(x, codes, scales, bias, 0.0, "none", out)
        assert y.dtype == dtype
        exact = rounded_rows(x)
        expected = exact @ dense.t() + (0 if bias is None else bias.double())
        assert_within(y, expected, outer(bound(exact, dense, bias), expected, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outliers", [0, 1, 5, 70])
@pytest.mark.parametrize("rows", [1, 9, 140])
def test_llm_int8_against_float64(
    rows: int, outliers: int, dtype: torch.dtype, device: str
) -> None:
    cols, out = 208, 80  # torch's product on CUDA takes multiples of 16 and 8
    codes, scales, dense = weight(out, cols, device)
    x = torch.randn(rows, cols).clamp(-5, 5).to(device, dtype)
    for column in torch.randperm(cols)[:outliers].tolist():
        x[torch.randint(rows, ()), column] = -6.0 if column % 2 else 40.0
    bias = torch.randn(out).to(device)
    y = ops.linear_int8(x, codes, scales, bias, 6.0, "none", out)
    exact = rounded_rows(x, 6.0)
    expected = exact @ dense.t() + bias.double()
    assert_within(y, expected, outer(bound(exact, dense, bias, outliers), expected, dtype))


def test_the_bounds_can_fail() -> None:
    codes, scales, dense = weight(8, 128)
    x = torch.randn(3, 128)
    exact = rounded_rows(x)
    codes[0, 0] ^= 1
    y = ops.linear_int8(x, codes, scales, None, 0.0, "none", 8)
    with pytest.raises(AssertionError, match="times its bound"):
        assert_within(y, exact @ dense.t(), bound(exact, dense, None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [11, 40])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_fused_activations(activation: str, rows: int, device: str) -> None:
    codes, scales, _ = weight(40, 96, device)
    x = torch.randn(rows, 96).to(device).requires_grad_()
    bias = torch.randn(40).to(device).requires_grad_()
    inner = ops.linear_int8(x, codes, scales, bias, 0.0, "none", 40)
    plain = {
        "gelu": lambda v: nn.functional.gelu(v),
        "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"),
        "silu": nn.functional.silu,
    }[activation]
    with torch.no_grad():
        v = inner.double()
        # Without the cancellation of 1 + erf and 1 + tanh, which even float64 shows.
        expected = {
            "gelu": v * 0.5 * torch.erfc(-v * 0.5**0.5),
            "gelu_tanh": v * torch.sigmoid(1.5957691216057308 * (v + 0.044715 * v**3)),
            "silu": v * torch.sigmoid(v),
        }[activation]
    fused = ops.linear_int8(x, codes, scales, bias, 0.0, activation, 40)
    # A few ulp of float32, and those of the exponent that an error function's tail consists of.
    room = 2.0**-21 * expected.abs() * (1 + v.abs() ** 3) + 1e-36
    assert_within(fused.detach(), expected, room)
    wanted = torch.autograd.grad(plain(inner).sum(), (x, bias))
    got = torch.autograd.grad(fused.sum(), (x, bias))
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=float(b.abs().max()) * 64 * 2.0**-24)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_those_of_the_decoded_weight(device: str) -> None:
    codes, scales, dense = weight(24, 50, device)
    x = torch.randn(2, 5, 50).to(device).requires_grad_()
    bias = torch.randn(24).to(device).requires_grad_()
    y = ops.linear_int8(x, codes, scales, bias, 6.0, "none", 24)
    grad = torch.randn_like(y)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    assert torch.allclose(grad_x.double(), grad.double() @ dense, rtol=0, atol=1e-4)
    assert torch.allclose(grad_bias, grad.sum((0, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    codes, scales, _ = weight(24, 50, device)
    for shape in ((3, 50), (2, 4, 50), (50,)):
        x = torch.randn(shape).to(device).requires_grad_()
        bias = torch.randn(24).to(device).requires_grad_()
        for threshold, activation in ((0.0, "none"), (2.0, "silu"), (6.0, "gelu")):
            args = (x, codes, scales, bias, threshold, activation, 24)
            opcheck(ops.linear_int8.default, args)
    opcheck(ops.quantize_rows.default, (torch.randn(4, 30).to(device), 2.0))
    a, b = (torch.randint(-128, 128, (n, 30), dtype=torch.int8).to(device) for n in (4, 7))
    opcheck(ops.int8_mm.default, (a, b))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0), (1, 1, 1), (17, 66, 2050), (50, 72, 160)]
)
def test_int8_mm(shape: tuple[int, int, int], device: str) -> None:
    m, n, k = shape
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    expected = (a.long() @ b.long().t()).int().to(device)
    a, b = a.to(device), b.to(device)
    assert torch.equal(ops.int8_mm(a, b), expected)
    assert torch.equal(ops.int8_mm(a.t().contiguous().t(), b), expected)
    wide = torch.zeros(n, 2 * k + 3, dtype=torch.int8, device=device)
    wide[:, 1 : 1 + k] = b
    assert torch.equal(ops.int8_mm(a, wide[:, 1 : 1 + k]), expected)


def test_int8_mm_refuses() -> None:
    a = torch.zeros(2, 8, dtype=torch.int8)
    with pytest.raises(TypeError, match="two int8 matrices"):
        ops.int8_mm(a, a.int())
    with pytest.raises(ValueError, match=r"\[M, K\] and \[N, K\]"):
        ops.int8_mm(a, a[:, :4])
    long = torch.zeros(1, 1 << 17, dtype=torch.int8)
    with pytest.raises(ValueError, match="overflow int32"):
        ops.int8_mm(long, long)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_quantized_rows_are_those_of_bitsandbytes(dtype: torch.dtype, threshold: float) -> None:
    import bitsandbytes.functional as bnb

    x = (torch.randn(37, 130) * 1.3).to(dtype)
    codes, absmax, columns = ops.quantize_rows(x, threshold)
    theirs, stats, outliers = bnb.int8_vectorwise_quant(x.clone(), threshold=threshold)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, stats)
    found = columns.nonzero().flatten()
    assert torch.equal(found, found[:0] if outliers is None else outliers)
    assert bool(found.numel()) == (threshold > 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype: torch.dtype, rows: int, device: str) -> None:
    codes, scales, _ = weight(24, 64, device)
    x = torch.randn(rows, 64).to(device, dtype)
    clean = ops.linear_int8(x, codes, scales, None, 0.0, "none", 24)
    x[1, 3], x[2, 4], x[3, 5] = torch.nan, torch.inf, -torch.inf
    y = ops.linear_int8(x, codes, scales, None, 0.0, "none", 24)
    assert y[1:4].isnan().all()
    assert torch.equal(y[[0, 4]], clean[[0, 4]])
    outlier = ops.linear_int8(x, codes, scales, None, 6.0, "none", 24)
    assert outlier[1].isnan().all()
    assert not outlier[2:4].isfinite().any()
    assert outlier[[0, 4]].isfinite().all()


@pytest.mark.parametrize("name", ["int8_dynamic", "llm_int8", "llm_int8@2.5"])
def test_converted_models(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(30, 48), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 30))
    plain = copy.deepcopy(model)
    report = vramkit.convert(model, name)
    assert [layer.format for layer in report.layers] == ["int8", name, name]
    layer: Any = model[1]
    assert layer.storage_format.activations == name.split("@")[0]
    ids = torch.randint(30, (3, 7))
    y = model(ids)
    error = float((y - plain(ids)).detach().norm() / plain(ids).norm())
    assert 0 < error < 0.03  # 8 bits on both sides of two products: about 1 % each
    with torch.inference_mode():
        assert torch.equal(model(ids), y)  # the short way and the dispatcher's
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(ids), y, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(model)(ids), y)
    vramkit.save(model, tmp_path / "m")
    again = vramkit.load(tmp_path / "m", factory=lambda: copy.deepcopy(plain))
    assert torch.equal(again(ids), y)
    assert [m.storage_format.name for m in again.modules() if isinstance(m, QuantizedLayer)] == [
        "int8",
        name,
        name,
    ]
    assert "int8" in vramkit.describe(model)[1].kernel
    vramkit.restore(model, "fp32")
    assert type(model[1]) is nn.Linear


def test_thresholds() -> None:
    fmt = vramkit.get_format("llm_int8")
    assert fmt.threshold == 6.0
    assert fmt.with_threshold(6.0) is fmt
    assert vramkit.get_format("llm_int8@5").threshold == 5.0
    for bad in ("llm_int8@0", "llm_int8@nan", "llm_int8@x"):
        with pytest.raises(ValueError, match="no storage format"):
            vramkit.get_format(bad)
    with pytest.raises(ValueError, match="only llm_int8"):
        vramkit.get_format("int8").with_threshold(5)


def test_bad_arguments() -> None:
    codes, scales, _ = weight(4, 8)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        ops.linear_int8(torch.zeros(2, 8).double(), codes, scales, None, 0.0, "none", 4)
    with pytest.raises(ValueError, match="gelu_tanh"):
        ops.linear_int8(torch.zeros(2, 8), codes, scales, None, 0.0, "relu", 4)
    with pytest.raises(ValueError, match="threshold"):
        ops.linear_int8(torch.zeros(2, 8), codes, scales, None, -1.0, "none", 4)


def test_long_rows_stay_plain() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear((1 << 17) + 1, 2), nn.Linear(2, 2))
    report = vramkit.convert(model, "int8_dynamic")
    assert [layer.name for layer in report.layers] == ["1"]
    assert any("overflow" in reason for _, reason, _ in report.left_out)


def test_the_estimate_knows_the_workspace() -> None:
    codes, scales, _ = weight(64, 256)
    x = torch.randn(40, 256)
    args = (x, codes, scales, None, 0.0, "none", 64)
    assert workspace_bytes("linear_int8", args) == 40 * (256 + 64 + 8)
    model = nn.Sequential(nn.Linear(256, 64))
    found = estimate(model, precision="int8_dynamic", inputs=x)
    assert found.activations_bytes >= 40 * 64 * 4 + 40 * (256 + 64 + 8)


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> Setting:
    return Setting(minilm_path)


def linears(model: Any, name: str) -> dict[str, str]:
    return {n: name for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_dynamic_int8_on_real_weights(minilm: Setting) -> None:
    """torchao 0.18's Int8DynamicActivationInt8Weight gives 0.0755 and 0.99628 here."""
    model = copy.deepcopy(minilm.reference)
    vramkit.convert(model, linears(model, "int8_dynamic"))
    assert minilm.error(model) <= 0.0755
    assert minilm.cosine(model) >= 0.9962


def test_llm_int8_on_real_weights(minilm: Setting) -> None:
    import bitsandbytes as bnb

    theirs = copy.deepcopy(minilm.reference)
    for parent in list(theirs.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer = bnb.nn.Linear8bitLt(
                    child.in_features, child.out_features, has_fp16_weights=False, threshold=6.0
                )
                layer.weight = bnb.nn.Int8Params(child.weight.data.clone(), requires_grad=False)
                layer.bias = nn.Parameter(child.bias.data.clone())
                setattr(parent, name, layer)
    model = copy.deepcopy(minilm.reference)
    vramkit.convert(model, linears(model, "llm_int8"))
    assert minilm.error(model) <= minilm.error(theirs.eval()) * SAME_ROUNDINGS
    for threshold in ("5.0", "3.0"):  # less is rounded
        finer = copy.deepcopy(minilm.reference)
        vramkit.convert(finer, linears(finer, f"llm_int8@{threshold}"))
        assert minilm.error(finer) <= minilm.error(model)
