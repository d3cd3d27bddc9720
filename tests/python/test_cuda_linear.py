"""Products with stored weights on CUDA: the choice of a way, and on a GPU the ways themselves."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vramkit
from numerics import assert_within, linear_bound, tensor_core_bound
from torch import Tensor
from vramkit import _native, _routes
from vramkit._operators import StoredParts, encode, workspace_bytes
from vramkit._routes import FEW, TILES, Limits, Route, _cuda_route

FORMATS = ("fp16", "bf16", "fp8", "fp8_e5m2", "int8", "int4", "int4_g96", "int4_g32", "nf4",
           "nf4_dq", "fp4")  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = ((6, 1), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0))

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.HAS_CUDA_OPERATORS), reason="no GPU"
)
if os.environ.get("REQUIRE_GPU") == "1":
    assert torch.cuda.is_available()
    assert _native.HAS_CUDA_OPERATORS


def spec_of(name: str) -> list[int]:
    return vramkit.get_format(name).spec


def way(name: str, rows: int, dtype: torch.dtype = torch.bfloat16, *, cols: int = 4096,
        out: int = 4096, capability: tuple[int, int] = (9, 0)) -> Route:  # fmt: skip
    return _cuda_route(dtype, spec_of(name), rows, out, cols, capability)


# The choice


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_never_go_back_to_a_kernel_for_fewer(name: str, dtype: torch.dtype) -> None:
    order = {("packed", FEW): 0, ("packed", TILES): 1}
    for capability in CAPABILITIES:
        kinds = [way(name, rows, dtype, capability=capability) for rows in range(1, 300)]
        ranks = [order.get((r.kind, r.kernel), 2) for r in kinds]
        assert ranks == sorted(ranks)
        assert kinds[-1].kind in ("plain", "decode")
        assert all((r.kind == "plain") == (kinds[0].kind == "plain") for r in kinds)


def test_the_weight_itself_is_torchs() -> None:
    assert way("bf16", 1).kind == "plain"
    assert way("fp16", 1, torch.float16).kind == "plain"
    assert way("fp16", 1).kind == "packed"
    assert way("bf16", 1, torch.float32).kernel == FEW
    assert way("fp16", 30).kind == "decode"  # tiles take no 16-bit weights


def test_old_gpus_decode_what_their_tensor_cores_do_not_know() -> None:
    assert way("nf4", 1, torch.float16, capability=(7, 5)).kind == "packed"
    assert way("nf4", 1, torch.bfloat16, capability=(7, 5)).kind == "decode"
    assert way("nf4", 30, torch.float16, capability=(7, 5)).kind == "decode"
    assert way("int4_g32", 1, torch.float16, capability=(7, 5)).kind == "decode"
    assert way("nf4", 1, torch.float16, capability=(6, 1)).kind == "decode"


def test_groups_decide_which_kernel_can() -> None:
    assert way("int4", 1).kernel == FEW
    for name in ("int4_g96", "int4_g32", "int4_g16"):
        assert way(name, 1) == way(name, 1)._replace(kind="packed", kernel=TILES)
    assert way("nf4", 1, cols=4096 + 32).kind == "decode"  # blocks cross rows
    # A group as long as the row is a row's own scale, whatever its length.
    assert way("int4", 1, cols=100).kernel == FEW
    odd = list(spec_of("int4"))
    odd[3] = 24
    assert _cuda_route(torch.bfloat16, odd, 1, 64, 4096, (9, 0)).kind == "decode"


@pytest.mark.parametrize(("out", "cols"), [(16, 65536), (4096, 14336), (14336, 4096), (5, 8)])
def test_grids_are_large_enough_and_workspaces_small(out: int, cols: int) -> None:
    for rows, dtype in itertools.product((1, 2, 5, 33), DTYPES):
        route = way("int8", rows, dtype, out=out, cols=cols)
        assert route.kind == "packed"
        assert 1 <= route.warps <= 16
        assert 1 <= route.splits <= 16
        size = _routes.packed_workspace(route, dtype, rows, cols, out)
        assert size >= (4 * route.splits * rows * out if route.splits > 1 else 0)
        if dtype == torch.float32:
            assert size >= 6 * rows * cols
    assert way("int8", 1, out=16, cols=65536).splits > 1  # one tile alone would read slowly
    assert way("int8", 1, out=14336).splits == 1


@pytest.fixture
def measured_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    path = tmp_path / "routes.json"
    table = {"routes": {"9.0": {"4 bit": {"bfloat16": {"few": 1, "tiles": 3}}}}}
    path.write_text(json.dumps(table))
    monkeypatch.setenv("VRAMKIT_CUDA_ROUTES", str(path))
    _routes._table.cache_clear()
    yield
    _routes._table.cache_clear()


@pytest.mark.usefixtures("measured_table")
def test_a_measured_table_replaces_what_it_names() -> None:
    ways = [way("nf4", rows) for rows in (1, 2, 3, 4)]
    assert [(r.kind, r.kernel) for r in ways] == [
        ("packed", FEW), ("packed", TILES), ("packed", TILES), ("decode", FEW)
    ]  # fmt: skip
    assert _routes.limits(spec_of("nf4"), torch.bfloat16, (9, 0)) == Limits(1, 3)
    # 8.9 is an older GPU than the file speaks of.
    assert way("nf4", 4, capability=(8, 9)).kind == "packed"


def test_reports_name_the_ways() -> None:
    dtype = torch.bfloat16
    assert _routes.describe(spec_of("bf16"), dtype, 4096, (9, 0)) == "torch"
    assert "fused to" in _routes.describe(spec_of("nf4"), dtype, 4096, (9, 0))
    assert "fused" not in _routes.describe(spec_of("int4_g32"), dtype, 4096, (9, 0))
    assert _routes.describe(spec_of("nf4"), dtype, 4096, (6, 1)) == "panels + torch"


# Panels, which need no GPU to be right


@pytest.mark.parametrize("name", ["nf4", "int4", "int8", "fp8", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_make_up_the_whole_product(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_routes, "PANEL_BYTES", 1000)
    for cols, bias_dtype in ((64, dtype), (100, torch.float32), (64, None)):
        w = encode(torch.randn(300, cols), vramkit.get_format(name))
        x = torch.randn(7, cols).to(dtype)
        bias = None if bias_dtype is None else torch.randn(300).to(bias_dtype)
        room = torch.full((7, 310), 7.0, dtype=dtype)
        out = room[:, :300]
        assert _routes.panel_rows(300, cols, dtype.itemsize) == 128
        _routes.run(Route("decode"), x, *w.arguments[:4], bias, w.fmt.spec, out)
        dense = w.dense(torch.float32)
        exact = x.double() @ dense.double().t() + (0 if bias is None else bias.double())
        assert_within(out, exact, linear_bound(x, dense, bias, dtype, weight_rounded=True))
        assert bool((room[:, 300:] == 7).all())


def test_workspaces_of_tensors_that_are_not_there() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, rows, expected in (
            ("nf4", 1, 0),
            ("bf16", 500, 0),
            ("nf4", 500, _routes.panel_rows(8192, 4096, 2) * 4096 * 2),
        ):
            x = torch.empty(2, rows // 2 or 1, 4096, dtype=torch.bfloat16, device="cuda")
            x = x if rows > 1 else x[:1]
            args = (x, None, None, None, None, None, spec_of(name), 8192)
            assert workspace_bytes("linear", args) == expected
        x = torch.empty(1, 4096, device="cuda")
        args = (x, None, None, None, None, None, spec_of("int8"), 8192)
        assert workspace_bytes("linear", args) == 3 * 2 * 4096


@pytest.mark.skipif(not _native.HAS_CUDA_OPERATORS, reason="built without CUDA")
def test_operators_are_there_without_a_driver() -> None:
    for name in ("linear", "_linear_packed_out"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vramkit::{name}", "CUDA")


def test_the_benchmarks_rehearsal(capsys: pytest.CaptureFixture[str]) -> None:
    products = pytest.importorskip("benchmarks.gpu.products")
    result = products.run(True)
    assert "no measurements" in capsys.readouterr().out
    assert {r["format"] for r in result["products"]} == set(products.FORMATS)
    found = [
        {"format": "nf4", "dtype": "bfloat16", "rows": rows,
         "us": {"few, 8 warps": few, "tiles, 1 splits": tiles, "decode": 9.0}}
        for rows, few, tiles in ((1, 1.0, 2.0), (8, 3.0, 2.0), (64, 8.0, 4.0), (128, 20.0, 11.0))
    ]  # fmt: skip
    table = products.tuned(found, (9, 0))["routes"]["9.0"]
    assert table == {"4 bit": {"bfloat16": {"few": 1, "tiles": 64}}}


# On a GPU


def on_gpu(w: StoredParts) -> list[Tensor | None]:
    return [None if part is None else part.cuda() for part in w.arguments]


def bound_of(name: str, x: Tensor, dense: Tensor, bias: Tensor | None, decoded: bool) -> Tensor:
    """Integers are exact in x's type; other values, and decoded weights, are rounded to it."""
    exact = vramkit.get_format(name).family == "affine" and not decoded
    rounded = x.dtype != torch.float32 and not exact
    return tensor_core_bound(x, dense, bias, x.dtype, weight_rounded=rounded)


def check(name: str, dtype: torch.dtype, rows: int, cols: int, out: int, route: Route | None,
          *, bias: bool = True) -> None:  # fmt: skip
    torch.manual_seed(rows * 1000 + cols)
    w = encode(torch.randn(out, cols), vramkit.get_format(name))
    x = torch.randn(rows, cols).to(dtype)
    b = torch.randn(out) if bias else None
    dense = w.dense(torch.float32)
    exact = x.double() @ dense.double().t() + (0 if b is None else b.double())
    device_bias = None if b is None else b.cuda()
    if route is None:
        got = torch.ops.vramkit.linear(x.cuda(), *on_gpu(w), device_bias, w.fmt.spec, out)
    else:
        got = torch.empty(rows, out, dtype=dtype, device="cuda")
        _routes.run(route, x.cuda(), *on_gpu(w), device_bias, w.fmt.spec, got)
    decoded = route is None or route.kind == "decode"
    assert_within(got.cpu(), exact, bound_of(name, x, dense, b, decoded))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, dtype: torch.dtype) -> None:
    for rows, cols, out in ((1, 4096, 512), (3, 100, 33), (5, 640, 200), (17, 768, 96),
                            (65, 384, 130), (300, 576, 257)):  # fmt: skip
        check(name, dtype, rows, cols, out, None, bias=rows != 5)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_each_kernel_at_sizes_that_the_table_gives_to_others(name: str, dtype: torch.dtype) -> None:
    capability, _ = _routes.device_facts(torch.device("cuda:0"))
    if _routes.is_plain(spec_of(name), dtype):
        return
    few, tiles = _routes._kernels(spec_of(name), 768)
    if few and (capability >= (8, 0) or dtype == torch.float16):
        for warps, splits, rows in ((1, 1, 1), (4, 3, 9), (16, 2, 20)):
            check(name, dtype, rows, 768, 70, Route("packed", FEW, warps, splits))
    if tiles and capability >= (8, 0):
        for splits, rows in ((1, 1), (3, 6), (2, 40), (1, 129)):
            check(name, dtype, rows, 768, 130, Route("packed", TILES, 8, splits))


@needs_gpu
def test_any_address_and_strides() -> None:
    for name, dtype in itertools.product(("nf4", "nf4_dq", "int4", "int8"), DTYPES):
        w = encode(torch.randn(50, 192), vramkit.get_format(name))
        moved = []
        for part in w.arguments[:3]:
            if part is None:
                moved.append(None)
                continue
            room = torch.empty(part.numel() + 3, dtype=torch.uint8, device="cuda")
            room[3:].copy_(part.reshape(-1))
            moved.append(room[3:])
        table = w.arguments[3]
        wide = torch.randn(20, 205).to(dtype)
        for rows in (2, 20):
            x = wide[:rows, 3:195]
            got = torch.ops.vramkit.linear(
                wide.cuda()[:rows, 3:195], *moved, None if table is None else table.cuda(), None,
                w.fmt.spec, 50,
            )  # fmt: skip
            dense = w.dense(torch.float32)
            assert_within(
                got.cpu(), x.double() @ dense.double().t(), bound_of(name, x, dense, None, True)
            )


@needs_gpu
def test_the_same_bits_each_time_and_in_a_graph() -> None:
    w = encode(torch.randn(64, 4096), vramkit.get_format("nf4"))
    parts = on_gpu(w)
    for rows in (1, 12, 64):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        want = torch.ops.vramkit.linear(x, *parts, None, w.fmt.spec, 64)
        for _ in range(5):
            assert torch.equal(torch.ops.vramkit.linear(x, *parts, None, w.fmt.spec, 64), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.ops.vramkit.linear(x, *parts, None, w.fmt.spec, 64)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, want)


@needs_gpu
def test_gradients_compilation_and_nothing() -> None:
    layer = torch.nn.Linear(256, 96, device="cpu")
    model = torch.nn.Sequential(layer)
    vramkit.convert(model, "nf4")
    dense = model[0].weight.detach().clone() * 1.0
    model = model.cuda()
    x = torch.randn(3, 5, 256, device="cuda", requires_grad=True)
    y = model(x)
    assert y.shape == (3, 5, 96)
    y.sum().backward()
    want = torch.ones(15, 96) @ dense
    assert_within(
        x.grad.reshape(15, 256).cpu(), want, linear_bound(
            torch.ones(15, 96), dense.t().contiguous(), None, torch.float32)
    )  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    for shape in ((0, 256), (2, 0, 256)):
        assert model(torch.empty(shape, device="cuda")).shape == (*shape[:-1], 96)


@needs_gpu
def test_what_a_kernel_cannot_take_is_an_error() -> None:
    w = encode(torch.randn(64, 256), vramkit.get_format("int4_g32"))
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(2, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="multiples of 64"):
        _routes.run(Route("packed", FEW), x, *on_gpu(w), None, w.fmt.spec, out)
    with pytest.raises(RuntimeError, match="shape is"):
        _routes.run(Route("packed", FEW, 99), x, *on_gpu(w), None, w.fmt.spec, out)
    torch.cuda.synchronize()
