"""Operators of torch.ops.vramkit: opcheck, products against float64, gradients, compilers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import vramkit
from numerics import UNIT, assert_within, gamma, linear_bound
from torch import Tensor
from torch.library import opcheck
from vramkit import _core, _operators
from vramkit._operators import StoredParts, encode, workspace_bytes

ops = torch.ops.vramkit
BUILTIN = [name for name, _ in _core.builtin_formats()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored(name: str, rows: int, cols: int, scale: float = 1.0) -> StoredParts:
    return encode(torch.randn(rows, cols) * scale, vramkit.get_format(name))


def parts_of(w: StoredParts) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return w.codes, w.scales, w.extra, w.fmt.table_on(w.codes.device)


def linear(x: Tensor, w: StoredParts, bias: Tensor | None = None) -> Tensor:
    out: Tensor = ops.linear(x, *parts_of(w), bias, w.fmt.spec, w.shape[0])
    return out


@pytest.mark.parametrize("cols", [128, 100])
@pytest.mark.parametrize("name", BUILTIN)
class TestOpcheck:
    """Schema, fake implementation, autograd registration and AOT dispatch, by torch's checker."""

    def test_quantize(self, name: str, cols: int) -> None:
        fmt = vramkit.get_format(name)
        for shape in ((24, cols), (cols,), (3, 4, cols)):
            x = torch.randn(shape)
            opcheck(ops.quantize.default, (x, fmt.table_on(x.device), fmt.spec))

    def test_dequantize(self, name: str, cols: int) -> None:
        w = stored(name, 24, cols)
        for dtype in DTYPES:
            opcheck(ops.dequantize.default, (*parts_of(w), w.fmt.spec, [24, cols], dtype))

    def test_linear(self, name: str, cols: int) -> None:
        w = stored(name, 24, cols)
        for shape in ((3, cols), (2, 9, cols)):
            x = torch.randn(shape, requires_grad=True)
            bias = torch.randn(24, requires_grad=True)
            opcheck(ops.linear.default, (x, *parts_of(w), bias, w.fmt.spec, 24))
            opcheck(ops.linear.default, (x, *parts_of(w), None, w.fmt.spec, 24))

    def test_embedding(self, name: str, cols: int) -> None:
        w = stored(name, 24, cols)
        indices = torch.tensor([[1, 2, 23], [0, 1, 1]])
        for dtype in DTYPES:
            args = (indices, *parts_of(w), w.fmt.spec, [24, cols], dtype)
            opcheck(ops.embedding.default, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize(
    ("rows", "cols"), [(96, 128), (33, 100), (7, 63), (65, 384), (1, 1), (5, 1), (1, 257)], ids=str
)
def test_linear_against_float64(name: str, dtype: torch.dtype, rows: int, cols: int) -> None:
    w = stored(name, rows, cols)
    dense = w.dense(torch.float32)
    bias = torch.randn(rows)
    for count in (1, 3, 8, 9, 33):
        x = torch.randn(count, cols).to(dtype)
        # A product of bfloat16 may take the decoded weight in bfloat16.
        rounded = dtype == torch.bfloat16
        for b in (None, bias, bias.to(dtype)):
            y = linear(x, w, b)
            assert y.dtype == dtype
            expected = x.double() @ dense.double().t()
            if b is not None:
                expected = expected + b.double()
            bound = linear_bound(x, dense, b, dtype, weight_rounded=rounded)
            assert_within(y, expected, bound)


@pytest.mark.parametrize("name", ["nf4", "int8", "bf16", "fp16"])
def test_processors_without_bfloat16_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows are multiplied in float32 there: the weight is not rounded on the way."""
    monkeypatch.setattr(_operators, "_BF16_PRODUCTS", False)
    monkeypatch.setattr(_operators, "_FUSED_ROWS", {})
    w = stored(name, 65, 384)
    dense = w.dense(torch.float32)
    x = torch.randn(33, 384, dtype=torch.bfloat16)
    y = linear(x, w)
    assert y.dtype == torch.bfloat16
    expected = x.double() @ dense.double().t()
    assert_within(y, expected, linear_bound(x, dense, None, torch.bfloat16))


@pytest.mark.parametrize("count", [3, 40])
def test_linear_is_not_far_better_than_its_bound_by_luck(count: int) -> None:
    """The bound can fail: a weight off by one code in one place exceeds it."""
    w = stored("int8", 8, 128)
    x = torch.randn(count, 128)
    dense = w.dense(torch.float32)
    w.codes[0, 0] ^= 1
    bound = linear_bound(x, dense, None, torch.float32)
    with pytest.raises(AssertionError, match="times its bound"):
        assert_within(linear(x, w), x.double() @ dense.double().t(), bound)


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("count", [4, 20])
def test_layouts_of_x(name: str, count: int) -> None:
    """Transposed, strided, sliced, expanded and 3-D inputs give the bits of contiguous ones."""
    w = stored(name, 40, 96)
    x = torch.randn(count, 96)
    expected = linear(x, w)
    padded = torch.full((count, 200), torch.nan)
    padded[:, 4:100] = x
    every_other = torch.full((count, 192), torch.nan)
    every_other[:, ::2] = x
    assert torch.equal(linear(x.t().contiguous().t(), w), expected)
    assert torch.equal(linear(padded[:, 4:100], w), expected)
    assert torch.equal(linear(every_other[:, ::2], w), expected)
    assert torch.equal(linear(x.view(2, count // 2, 96), w), expected.view(2, count // 2, 40))
    for row in (x[0], x[0].expand(count, 96)):
        out = linear(row, w)
        assert out.shape == (*row.shape[:-1], 40)
        assert torch.allclose(out, expected[0].expand(out.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)], ids=str)
@pytest.mark.parametrize("name", BUILTIN)
def test_no_rows(name: str, shape: tuple[int, ...]) -> None:
    w = stored(name, 40, 96)
    x = torch.empty(shape, requires_grad=True)
    y = linear(x, w, torch.ones(40))
    assert y.shape == (*shape[:-1], 40)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("name", BUILTIN)
def test_nan_and_infinity_reach_the_output(name: str, count: int, dtype: torch.dtype) -> None:
    w = stored(name, 33, 96, scale=0.1)
    x = torch.randn(count, 96).to(dtype)
    x[0, 95] = torch.nan
    x[1, 0] = torch.inf
    y = linear(x, w)
    reference = x[1].float() * w.dense(torch.float32)
    assert bool(y[0].isnan().all())
    assert torch.equal(y[1].isnan(), reference.sum(-1).isnan())
    assert bool((y[1].isnan() | y[1].isinf()).all())
    assert bool(y[2:].isfinite().all())


@pytest.mark.parametrize("name", [n for n in BUILTIN if n not in ("fp16", "bf16")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_weights_never_decode_to_finite_ones(name: str, bad: float) -> None:
    x = torch.randn(4, 128)
    x[1, 3] = bad
    dense = encode(x, vramkit.get_format(name)).dense(torch.float32)
    assert not dense[1, 3].isfinite()
    if name != "nf4_dq":  # there the mean of all scales is lost with one of them
        assert bool(dense[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("cols", [96, 100])
class TestGradients:
    def test_against_float64(self, name: str, cols: int) -> None:
        for count in (3, 20):
            w = stored(name, 40, cols)
            dense = w.dense(torch.float32)
            x = torch.randn(count, cols, requires_grad=True)
            bias = torch.randn(40, requires_grad=True)
            grad = torch.randn(count, 40)
            linear(x, w, bias).backward(grad)
            assert x.grad is not None
            assert bias.grad is not None
            expected = grad.double() @ dense.double()
            assert_within(x.grad, expected, linear_bound(grad, dense.t(), None, torch.float32))
            # A sum over `count` rows, in any order.
            bound = gamma(count) * grad.double().abs().sum(0)
            assert_within(bias.grad, grad.double().sum(0), bound)

    def test_low_precision(self, name: str, cols: int) -> None:
        w = stored(name, 40, cols)
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.randn(9, cols, dtype=dtype, requires_grad=True)
            grad = torch.randn(9, 40, dtype=dtype)
            linear(x, w).backward(grad)
            assert x.grad is not None
            assert x.grad.dtype == dtype
            dense = w.dense(torch.float32)
            expected = grad.double() @ dense.double()
            bound = linear_bound(grad, dense.t(), None, dtype, weight_rounded=True)
            assert_within(x.grad, expected, bound)

    def test_numerically(self, name: str, cols: int) -> None:
        """The layer is linear: a finite difference of any width is the product itself."""
        w = stored(name, 8, cols)
        x = torch.randn(2, cols, requires_grad=True)
        grad = torch.randn(2, 8)
        linear(x, w).backward(grad)
        step = torch.randn(2, cols)
        with torch.no_grad():
            rise = ((linear(x + step, w) - linear(x, w)).double() * grad.double()).sum()
        assert x.grad is not None
        predicted = (x.grad.double() * step.double()).sum()
        dense = w.dense(torch.float32)
        size = grad.double().abs() * ((x.abs() + step.abs()).double() @ dense.double().abs().t())
        assert abs(float(rise - predicted)) <= 4 * gamma(cols + 8) * float(size.sum().detach())


def test_no_gradient_where_none_is_needed() -> None:
    w = stored("nf4", 16, 64)
    x, bias = torch.randn(3, 64), torch.zeros(16, requires_grad=True)
    assert not linear(x, w).requires_grad
    linear(x, w, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((16,), 3.0))


@pytest.mark.parametrize("name", BUILTIN)
def test_gradients_after_a_first_use_in_inference_mode(name: str) -> None:
    """What inference mode makes, autograd cannot save: nothing of it may be kept."""
    with torch.inference_mode():
        w0 = stored(name, 16, 64)
        linear(torch.randn(2, 64), w0)
    w = stored(name, 16, 64)
    x = torch.randn(2, 64, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is not None


def test_double_backward_matches() -> None:
    w = stored("int8", 8, 64)
    dense = w.dense(torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    y = torch.randn(3, 64, requires_grad=True)
    mine = torch.autograd.grad((linear(x, w) ** 2).sum(), x, create_graph=True)[0]
    theirs = torch.autograd.grad(((y @ dense.t()) ** 2).sum(), y, create_graph=True)[0]
    with torch.no_grad():
        y.copy_(x)
    theirs = torch.autograd.grad(((y @ dense.t()) ** 2).sum(), y, create_graph=True)[0]
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize(("rows", "cols"), [(40, 96), (40, 100), (9, 63)], ids=str)
class TestEmbedding:
    def test_rows_of_the_decoded_weight(self, name: str, rows: int, cols: int) -> None:
        w = stored(name, rows, cols)
        indices = torch.randint(rows, (3, 5))
        for dtype in DTYPES:
            for kind in (torch.int64, torch.int32):
                got = ops.embedding(indices.to(kind), *parts_of(w), w.fmt.spec, [rows, cols], dtype)
                assert torch.equal(got, w.dense(dtype)[indices])

    def test_indices_out_of_range(self, name: str, rows: int, cols: int) -> None:
        w = stored(name, rows, cols)
        for bad in (-1, rows):
            args = (*parts_of(w), w.fmt.spec, [rows, cols], torch.float32)
            with pytest.raises(IndexError, match=f"{rows} rows"):
                ops.embedding(torch.tensor([0, bad]), *args)

    def test_no_indices(self, name: str, rows: int, cols: int) -> None:
        w = stored(name, rows, cols)
        none = torch.empty((2, 0), dtype=torch.int64)
        got = ops.embedding(none, *parts_of(w), w.fmt.spec, [rows, cols], torch.float32)
        assert got.shape == (2, 0, cols)


@pytest.mark.parametrize("name", BUILTIN)
def test_compiled_fullgraph(name: str) -> None:
    w = stored(name, 24, 96)
    bias = torch.randn(24)

    def run(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        args = (*parts_of(w), w.fmt.spec)
        rows = ops.embedding(indices, *args, [24, 96], torch.float32)
        return torch.relu(linear(x, w, bias)) * 2, rows + 1

    torch._dynamo.reset()  # each format is a graph of its own, and the number of graphs is limited
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, indices = torch.randn(3, 96), torch.tensor([3, 0])
    for mine, plain in zip(compiled(x, indices), run(x, indices), strict=True):
        assert torch.equal(mine, plain)
    leaf = x.clone().requires_grad_()
    compiled(leaf, indices)[0].sum().backward()
    other = x.clone().requires_grad_()
    run(other, indices)[0].sum().backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("name", BUILTIN)
def test_meta_tensors_have_the_real_ones_shapes(name: str) -> None:
    fmt = vramkit.get_format(name)
    for shape in ((24, 96), (9, 63), (1, 1), (3, 4, 40)):
        real = ops.quantize(torch.randn(shape), fmt.table_on(torch.device("cpu")), fmt.spec)
        meta = ops.quantize(torch.empty(shape, device="meta"), None, fmt.spec)
        assert [(p.shape, p.dtype) for p in meta] == [(p.shape, p.dtype) for p in real]
        assert all(p.device.type == "meta" for p in meta)
        dense = ops.dequantize(*meta, None, fmt.spec, list(shape), torch.bfloat16)
        assert (dense.shape, dense.dtype, dense.device.type) == (shape, torch.bfloat16, "meta")
        if len(shape) == 2:
            x = torch.empty((2, 5, shape[1]), device="meta")
            assert ops.linear(x, *meta, None, None, fmt.spec, shape[0]).shape == (2, 5, shape[0])


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("cols", [96, 100])
def test_squared_error(name: str, cols: int) -> None:
    x = torch.randn(40, cols)
    w = encode(x, vramkit.get_format(name))
    codes, scales, extra, table = parts_of(w)
    dense = w.dense(torch.float32)
    importance = torch.rand(cols)
    for weights in (None, importance):
        got = ops._squared_error(x, codes, scales, extra, table, weights, w.fmt.spec)
        by_column = torch.ones(cols, dtype=torch.float64) if weights is None else weights.double()
        error = ((x.double() - dense.double()).square() * by_column).sum()
        power = (x.double().square() * by_column).sum()
        # Sums of 4000 float64 terms in another order.
        assert got.tolist() == pytest.approx([float(error), float(power)], rel=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    before = torch.get_num_threads()
    x = torch.randn(6, 512)
    weight = torch.randn(300, 512)
    results = []
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            for name in BUILTIN:
                w = encode(weight, vramkit.get_format(name))
                results.append((w.codes, w.scales, w.dense(torch.bfloat16), linear(x, w)))
    finally:
        torch.set_num_threads(before)
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestChecks:
    """Wrong parts are refused before memory is touched."""

    def test_short_codes(self) -> None:
        w = stored("nf4", 8, 64)
        with pytest.raises(RuntimeError, match=r"codes holds \d+ bytes where the format needs"):
            ops.dequantize(w.codes[:4].contiguous(), *parts_of(w)[1:], w.fmt.spec, [8, 64],
                           torch.float32)  # fmt: skip

    def test_missing_zero_points(self) -> None:
        w = stored("int4", 8, 64)
        with pytest.raises(RuntimeError, match="third part"):
            ops.dequantize(w.codes, w.scales, None, None, w.fmt.spec, [8, 64], torch.float32)

    def test_missing_table(self) -> None:
        w = stored("nf4", 8, 64)
        with pytest.raises(RuntimeError, match="table of 16 values, got 0"):
            ops.dequantize(w.codes, w.scales, None, None, w.fmt.spec, [8, 64], torch.float32)

    def test_scales_of_another_dtype(self) -> None:
        w = stored("nf4", 8, 64)
        args = (w.codes, w.scales.view(torch.float32), None, w.fmt.table_on(w.codes.device))
        with pytest.raises(RuntimeError, match="uint8"):
            ops.dequantize(*args, w.fmt.spec, [8, 64], torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
    def test_dtype_of_x(self, dtype: torch.dtype) -> None:
        with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
            linear(torch.ones(2, 64, dtype=dtype), stored("nf4", 8, 64))

    def test_spec_of_another_length(self) -> None:
        w = stored("nf4", 8, 64)
        with pytest.raises((RuntimeError, ValueError), match="7 numbers"):
            ops.dequantize(*parts_of(w), [1, 4], [8, 64], torch.float32)

    def test_integer_weights(self) -> None:
        with pytest.raises(TypeError, match="int64"):
            encode(torch.ones(4, 4, dtype=torch.int64), vramkit.get_format("nf4"))

    def test_float64_weights_are_encoded_as_float32(self) -> None:
        x = torch.randn(4, 64, dtype=torch.float64)
        fmt = vramkit.get_format("nf4")
        assert torch.equal(encode(x, fmt).codes, encode(x.float(), fmt).codes)


def profiled_peak(call: Callable[[], Tensor]) -> int:
    """The highest sum of live bytes that the profiler sees during a call, its result included."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = call()
    assert isinstance(y, Tensor)
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("count", [4, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [512, 500])
def test_workspace_is_what_a_call_allocates(cols: int, dtype: torch.dtype, count: int) -> None:
    """The estimator's figure against the profiler's, for both paths of a product."""
    w = stored("nf4", 1500, cols)
    bias = torch.randn(1500).to(dtype)
    x = torch.randn(count, cols).to(dtype)
    args = (x, *parts_of(w), bias, w.fmt.spec, 1500)
    expected = count * 1500 * dtype.itemsize + workspace_bytes("linear", args)
    peak = profiled_peak(lambda: ops.linear(*args))
    # torch's own bfloat16 product may hold scratch of its own, in plain layers as well.
    separable = w.fmt.row_separable(cols)
    dense, out = torch.randn(1500, cols).to(dtype), torch.empty(count, 1500, dtype=dtype)
    fused = separable and count <= 8
    scratch = 0 if fused else profiled_peak(lambda: torch.mm(x, dense.t(), out=out))
    # Each thread multiplies on its own.
    assert expected <= peak <= expected + torch.get_num_threads() * scratch


def test_unit_roundoffs() -> None:
    """The tolerances' own constants: 1 + u rounds to 1, 1 + 2u does not."""
    for dtype, u in UNIT.items():
        one = torch.tensor(1.0, dtype=torch.float64)
        assert (one + u).to(dtype) == 1.0
        assert (one + 2 * u).to(dtype) > 1.0
