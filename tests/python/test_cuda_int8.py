"""Dynamic INT8, LLM.int8 and recurrent layers on CUDA.

On a GPU: the CPU's own bits, whichever way a product takes (test_int8.py and
test_recurrent_int8.py run there too), on any stream, in a graph, and without waiting. Without one:
which way a product takes, with torch standing in for the two kernels around torch's product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vramkit
from test_cuda import bits, needs_gpu, needs_operators
from test_int8 import DTYPES, weight
from test_recurrent_int8 import MODES, stored
from torch import Tensor, nn
from vramkit import _operators_int8 as int8
from vramkit._operators import workspace_bytes
from vramkit._recurrent import GATES, steps_bytes

ops = torch.ops.vramkit
ROWS = (1, 2, 8, 9, 16, 17, 32, 33, 100)
# (out features, columns): torch's product takes the first and the second.
SHAPES = ((64, 128), (136, 1040), (33, 65), (72, 100), (6, 4100))


def same(mine: Tensor, theirs: Tensor) -> None:
    """Equal bits; of NaN, that both are."""
    mine, theirs = mine.cpu(), theirs.cpu()
    assert mine.dtype == theirs.dtype
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(bits(mine.nan_to_num(0.0)), bits(theirs.nan_to_num(0.0)))


def inputs(rows: int, cols: int, dtype: torch.dtype, threshold: float) -> Tensor:
    x = torch.randn(rows, cols)
    if threshold and cols > 20:
        x[:, torch.randperm(cols)[:19]] *= 9  # more outlier columns than a tile takes at a time
    if rows > 2 and cols:
        x[1, 0] = torch.nan
    return x.to(dtype)


# Without a GPU


@needs_operators
def test_operators_are_there_without_a_driver() -> None:
    for name in (
        *("linear_int8", "_linear_int8_out", "_round_int8_out", "_scale_int8_out"),
        *("quantize_rows", "int8_mm", "recurrent_int8", "_recurrent_int8_steps_out"),
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vramkit::{name}", "CUDA"), name


def parts_of(workspace: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Codes and absmax in a workspace, as csrc/cuda/ops/int8.hpp lays them out."""
    stride = -(-cols // 16) * 16
    codes = workspace[: rows * stride].view(torch.int8).view(rows, stride)
    absmax = workspace[rows * stride :][: rows * 4].view(torch.float32)
    return codes, absmax


@pytest.fixture
def stand_ins() -> Iterator[list[int]]:
    """Both kernels in torch, on the CPU, without outliers; yields where each scaling began."""
    firsts: list[int] = []

    def rounded(x: Tensor, threshold: float, workspace: Tensor) -> None:
        codes, absmax = parts_of(workspace, *x.shape)
        found, largest, _ = ops.quantize_rows(x, threshold)
        codes[:, : x.shape[1]] = found
        absmax.copy_(largest)

    def scaled(
        sums: Tensor, x: Tensor, first: int, codes: Tensor, scales: Tensor, bias: Tensor | None,
        threshold: float, activation: int, workspace: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        firsts.append(first)
        absmax = parts_of(workspace, *x.shape)[1][first : first + sums.shape[0], None]
        value = sums.float() * scales.view(torch.float32).reshape(1, -1) * (absmax / 127)
        out[first : first + sums.shape[0]] = value if bias is None else value + bias.float()

    library = torch.library.Library("vramkit", "IMPL")
    library.impl("_round_int8_out", rounded, "CPU")
    library.impl("_scale_int8_out", scaled, "CPU")
    yield firsts
    library._destroy()


@pytest.mark.parametrize("rows", [33, 256, 300, 1000])
def test_many_rows_go_through_torchs_product(
    rows: int, stand_ins: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_SUMS_BYTES", 1)
    codes, scales, _ = weight(24, 48)
    x, bias = torch.randn(rows, 48), torch.randn(24)
    out = torch.full((rows, 24), torch.nan)
    int8._linear_on_cuda(x, codes, scales, bias, 0.0, 0, out)
    assert torch.equal(out, ops.linear_int8(x, codes, scales, bias, 0.0, "none", 24))
    # Pieces of 256 rows; the last one begins early enough to be whole.
    assert stand_ins == [min(at, max(0, rows - 256)) for at in range(0, rows, 256)]


@pytest.mark.parametrize(
    ("rows", "out", "cols"), [(32, 24, 48), (64, 20, 48), (64, 24, 40), (64, 24, 0)]
)
def test_what_torch_does_not_take_is_ours(
    rows: int, out: int, cols: int, stand_ins: list[int]
) -> None:
    codes, scales, _ = weight(out, cols) if cols else (torch.zeros(out, 0).byte(), None, None)
    if scales is None:
        scales = torch.zeros(out, 4, dtype=torch.uint8)
    result = torch.empty(rows, out)
    # The CPU's kernel of that name, which wants a larger workspace, is what is reached.
    if cols:
        with pytest.raises(RuntimeError, match="workspace is too small"):
            int8._linear_on_cuda(torch.randn(rows, cols), codes, scales, None, 0.0, 0, result)
    else:
        assert not int8._for_torch(rows, cols, out)
    assert not stand_ins


def test_the_estimate_knows_what_cuda_holds() -> None:
    x = torch.empty(100, 50, device="meta")
    assert int8.cuda_workspace_bytes(100, 50, 0.0) == 100 * 64 + 400
    assert int8.cuda_workspace_bytes(3, 50, 6.0) == 3 * 64 + 16 + 208 + 50
    # 33 rows or more leave int32 sums between torch's product and their scaling.
    assert int8.product_bytes(64, 48, 24, 0.0, "cuda") == 64 * 48 + 256 + 4 * 64 * 24
    assert int8.product_bytes(32, 48, 24, 0.0, "cuda") == 32 * 48 + 128
    assert int8.product_bytes(64, 48, 24, 0.0, "cpu") == int8.workspace_bytes(64, 48, 0.0)
    assert workspace_bytes("linear_int8", (x, None, None, None, 0.0, "none", 7)) > 0
    assert steps_bytes(5, 32, False, 0.0) == 5 * 32 + 32
    assert steps_bytes(5, 32, True, 0.0) == 5 * 32 * 4 + 5 * 32 + 32


def test_the_benchmark_rehearses(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu.int8 import run

    found = run(rehearse=True)
    assert found["rehearsal"]
    assert {row["name"] for row in found["linear"]} >= {"int8_dynamic", "llm_int8", "bf16"}
    assert "REHEARSAL" in capsys.readouterr().out


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0, 0.5])
def test_products_have_the_cpus_bits(threshold: float, dtype: torch.dtype) -> None:
    for out, cols in SHAPES:
        codes, scales, _ = weight(out, cols)
        for rows in ROWS:
            x = inputs(rows, cols, dtype, threshold)
            bias = torch.randn(out).to(dtype)
            for activation in ("none", "silu", "gelu", "gelu_tanh")[: 4 if rows in (9, 33) else 1]:
                rest = (bias, threshold, activation, out)
                want = ops.linear_int8(x, codes, scales, *rest)
                rest = (bias.cuda(), *rest[1:])
                same(ops.linear_int8(x.cuda(), codes.cuda(), scales.cuda(), *rest), want)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_rows_have_the_cpus_bits(dtype: torch.dtype) -> None:
    for rows, cols in ((1, 1), (5, 7), (9, 384), (3, 1030), (4, 8200), (0, 8), (8, 0)):
        for threshold in (0.0, 2.0):
            x = inputs(rows, cols, dtype, threshold)
            wide = torch.zeros(rows, cols + 3, dtype=dtype, device="cuda")
            wide[:, 1 : cols + 1] = x.cuda()  # rows a way apart, at no address that vectors like
            want = ops.quantize_rows(x, threshold)
            for mine in (x.cuda(), wide[:, 1 : cols + 1]):
                for a, b in zip(ops.quantize_rows(mine, threshold), want, strict=True):
                    same(a, b) if a.is_floating_point() else torch.testing.assert_close(a.cpu(), b)


@needs_gpu
def test_pieces_and_addresses_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales, _ = weight(64, 128)
    x = inputs(700, 128, torch.bfloat16, 6.0)
    want = ops.linear_int8(x, codes, scales, None, 6.0, "none", 64)
    monkeypatch.setattr(int8, "_SUMS_BYTES", 1)
    moved = [
        torch.empty(p.numel() + 3, dtype=torch.uint8, device="cuda")[3:] for p in (codes, scales)
    ]
    for to, part in zip(moved, (codes, scales), strict=True):
        to.copy_(part.reshape(-1))
    for parts in ((codes.cuda(), scales.cuda()), (moved[0].view(64, 128), moved[1].view(64, 4))):
        for rows in (20, 700):
            got = ops.linear_int8(x[:rows].cuda(), *parts, None, 6.0, "none", 64)
            if rows == 700:
                same(got, want)
            else:
                same(got, ops.linear_int8(x[:rows], codes, scales, None, 6.0, "none", 64))


@needs_gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("reverse", [False, True])
def test_recurrences_have_the_cpus_bits(mode: str, threshold: float, reverse: bool) -> None:
    for features, units, batch, steps in (
        (24, 32, 3, None),
        (48, 100, 40, None),
        (7, 17, 4, [4, 3, 1]),
    ):
        for projected in (0, 9) if mode == "LSTM" else (0,):
            state = projected or units
            ih, hh = (stored(GATES[mode] * units, n)[:2] for n in (features, state))
            hr = stored(projected, units)[:2] if projected else (None, None)
            x = torch.randn(5 * batch if steps is None else sum(steps), features)
            h, c = torch.randn(batch, state), torch.randn(batch, units)
            given = (
                x,
                h,
                c if mode == "LSTM" else None,
                *ih,
                *hh,
                *hr,
                torch.randn(GATES[mode] * units),
                None,
            )

            def run(given: Any, steps: Any = steps) -> Any:
                return ops.recurrent_int8(given[0], steps, *given[1:], mode, threshold, reverse)

            on_gpu = [None if t is None else t.cuda() for t in given]
            for mine, theirs in zip(run(on_gpu), run(given), strict=True):
                same(mine, theirs)


@needs_gpu
@pytest.mark.parametrize("name", ["int8_dynamic", "llm_int8@2.0"])
def test_nothing_waits_and_graphs_replay(name: str) -> None:
    model = nn.ModuleDict(
        {"linear": nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)),
         "lstm": nn.LSTM(64, 48, 2, proj_size=16), "gru": nn.GRU(64, 32)}
    )  # fmt: skip
    vramkit.convert(model, name)
    model.cuda()
    x = torch.randn(6, 9, 64, device="cuda") * 2

    def run() -> list[Tensor]:
        y = model["linear"](x)
        return [model["linear"](x[0]), y, model["lstm"](y)[0], model["gru"](y)[0]]

    with torch.inference_mode():
        want = run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        # Other outlier columns than when it was captured.
        first = [tensor.clone() for tensor in captured]
        x.copy_(x.flip(-1))
        graph.replay()
        turned = run()
    torch.cuda.synchronize()
    for a, b, c, d in zip(want, again, other, first, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, d)
    for a, b in zip(captured, turned, strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_bad_arguments_leave_the_device_well() -> None:
    codes, scales, _ = weight(8, 32, "cuda")
    x = torch.randn(2, 32, device="cuda")
    with pytest.raises(RuntimeError, match="not on the device"):
        ops.linear_int8(x, codes.cpu(), scales, None, 0.0, "none", 8)
    with pytest.raises(RuntimeError, match="do not have the size"):
        ops.linear_int8(x[:, :16], codes, scales, None, 0.0, "none", 8)
    assert ops.linear_int8(x, codes, scales, None, 0.0, "none", 8).isfinite().all()
