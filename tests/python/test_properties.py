"""Operators over shapes, strides, dtypes and formats that nobody chose: hypothesis does.

References are torch in float64 on the decoded weight, slices of that weight, and, for encoding,
every code that the format has. NaN and infinity are checked on each instruction set.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import vramkit
from conftest import RunPython
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import UNIT, assert_within, linear_bound
from torch import Tensor
from vramkit import _core
from vramkit._operators import StoredParts, encode, fused_rows

ops = torch.ops.vramkit
BUILTIN = [name for name, _ in _core.builtin_formats()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
sizes = st.sampled_from([1, 2, 7, 16, 31, 33, 63, 64, 65, 128, 130, 257])
layouts = st.sampled_from(["contiguous", "transposed", "every other", "padded", "reversed rows"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values [rows, cols] at other strides, with NaN around them."""
    rows, cols = x.shape
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every other":
        wide = torch.full((rows, 2 * cols), torch.nan, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "padded":
        wide = torch.full((rows + 2, cols + 5), torch.nan, dtype=x.dtype)
        wide[1 : rows + 1, 3 : cols + 3] = x
        return wide[1 : rows + 1, 3 : cols + 3]
    if layout == "reversed rows":  # rows that lie in another order than they are read
        return x.flip(0).contiguous().index_select(0, torch.arange(rows - 1, -1, -1))
    return x.contiguous()


@dataclass
class Case:
    """One weight, with rows of zeros in it, and what it is multiplied with."""

    fmt: str
    rows: int
    cols: int
    count: int
    dtype: torch.dtype
    layout: str
    bias: bool
    seed: int

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.randn(self.rows, self.cols, generator=self._random()) * 0.1
        made[self.seed % 3 :: 3] = 0.0
        return made.to(dtype)

    def x(self) -> Tensor:
        made = torch.randn(self.count, self.cols, generator=self._random())
        return laid_out(made.to(self.dtype), self.layout)

    def _random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


cases = st.builds(
    Case,
    fmt=st.sampled_from(BUILTIN),
    rows=sizes,
    cols=sizes,
    count=st.sampled_from([0, 1, 2, 7, 8, 9, 31, 33, 65]),
    dtype=st.sampled_from(DTYPES),
    layout=layouts,
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)


def linear(x: Tensor, w: StoredParts, bias: Tensor | None = None) -> Tensor:
    out: Tensor = ops.linear(x, *w.arguments, bias, w.fmt.spec, w.shape[0])
    return out


@settings(max_examples=200, deadline=None)
@given(cases)
def test_linear(case: Case) -> None:
    w = encode(case.weight(), vramkit.get_format(case.fmt))
    dense = w.dense(torch.float32).double()
    x, bias = case.x(), torch.randn(case.rows) if case.bias else None
    y = linear(x, w, bias)
    assert y.shape == (case.count, case.rows)
    assert y.dtype == case.dtype
    expected = x.double() @ dense.t()
    if bias is not None:
        expected = expected + bias.double()
    # A product of bfloat16 may take the decoded weight in bfloat16.
    rounded = case.dtype == torch.bfloat16
    assert_within(y, expected, linear_bound(x, dense, bias, case.dtype, weight_rounded=rounded))
    # A sum of zeros is zero, however many rows of x there are.
    empty = (dense == 0).all(1)
    rest = torch.zeros(case.rows) if bias is None else bias
    assert torch.equal(y[:, empty], rest[empty].to(case.dtype).expand(case.count, -1))


@settings(max_examples=100, deadline=None)
@given(cases)
def test_decoding(case: Case) -> None:
    """All dtypes are the float32 values rounded once; rows and gathered rows are parts of them."""
    w = encode(case.weight(), vramkit.get_format(case.fmt))
    dense = w.dense(torch.float32)
    assert torch.equal(w.dense(case.dtype), dense.to(case.dtype))
    first = case.seed % case.rows
    count = min(case.count, case.rows - first)
    args = (*w.arguments, w.fmt.spec)
    part = ops.dequantize_rows(*args, case.rows, case.cols, first, count, case.dtype)
    assert torch.equal(part, dense[first : first + count].to(case.dtype))
    generator = torch.Generator().manual_seed(case.seed)
    indices = torch.randint(case.rows, (case.count, 3), generator=generator)
    for given_ in (indices, indices.t(), indices[:, ::2], indices.to(torch.int32)):
        rows = ops.embedding(given_, *args, [case.rows, case.cols], case.dtype)
        assert torch.equal(rows, dense[given_].to(case.dtype))


def every_value(w: StoredParts) -> Tensor:
    """[codes, *shape]: what each element would be under each code, on the scales that are there."""
    values = []
    bits = w.fmt.spec[1]
    for code in range(2**bits):
        if w.fmt.family == "affine" and code == 128:
            continue  # -128 is never written
        byte = code * 17 if bits == 4 else code
        codes = torch.full_like(w.codes, byte)
        values.append(StoredParts(w.fmt, w.shape, codes, w.scales, w.extra).dense(torch.float32))
    return torch.stack(values)


@settings(max_examples=100, deadline=None)
@given(cases)
def test_encoding(case: Case) -> None:
    """Strides change no bit, and no other code would be nearer, on the same scales."""
    fmt = vramkit.get_format(case.fmt)
    x = case.weight(case.dtype)
    w = encode(x, fmt)
    other = encode(laid_out(x, case.layout), fmt)
    assert torch.equal(other.codes, w.codes)
    assert torch.equal(other.scales, w.scales)
    assert other.extra is w.extra or torch.equal(other.extra, w.extra)
    dense, x = w.dense(torch.float32), x.float()
    if fmt.storage_dtype is not None:
        assert torch.equal(dense, x.to(fmt.storage_dtype).float())
        return
    values = every_value(w)
    if fmt.nested:
        # Codes are chosen on scales that are not nested yet: within their error of the nearest.
        exact = encode(x, vramkit.get_format("nf4"))
        assert torch.equal(exact.codes, w.codes)
        return
    best = (values - x).abs().nan_to_num(math.inf).amin(0)
    # x is scaled by a rounded reciprocal and compared with rounded bounds: a few units of the
    # largest value, whose double two codes about as near may differ by.
    largest = values.abs().nan_to_num(0.0, posinf=0.0).amax(0)
    assert_within((dense - x).abs() - best, torch.zeros_like(x), 8 * UNIT[torch.float32] * largest)


@pytest.mark.parametrize("isa", _core.available_isas())
def test_nan_and_infinity_as_torch_has_them(isa: str, run_python: RunPython) -> None:
    """Where NaN and infinities come out is where torch's product of the decoded weight has them."""
    script = """
import sys
import torch, vramkit
from vramkit import _core
from vramkit._operators import encode
assert _core.active_isa() == sys.argv[1]
ops, tried = torch.ops.vramkit, 0
torch.manual_seed(0)
def pattern(y):
    return torch.stack([y.isnan(), y == torch.inf, y == -torch.inf])
for name, _ in _core.builtin_formats():
    for rows, cols in ((33, 96), (7, 65), (65, 257)):
        weight = torch.randn(rows, cols) * 0.1
        weight[::5] = 0.0  # rows of zeros: infinity times zero is NaN
        weight[:, ::7] = 0.0
        w = encode(weight, vramkit.get_format(name))
        dense = w.dense(torch.float32)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for count in (1, 5, 9, 40):
                x = torch.randn(count, cols).to(dtype)
                for bad in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf],
                            [torch.inf, torch.inf]):
                    for place in (0, cols // 2, cols - 1):
                        given = x.clone()
                        row = place % count
                        for k, value in enumerate(bad):
                            given[row, (place + 3 * k) % cols] = value
                        bias = torch.randn(rows)
                        y = ops.linear(given, *w.arguments, bias, w.fmt.spec, rows)
                        # In float32, where the decoded weight is exact and no sum overflows.
                        expected = given.float() @ dense.t() + bias
                        tried += 1
                        assert torch.equal(pattern(y), pattern(expected)), (
                            name, rows, cols, dtype, count, bad, place)
assert tried == len(_core.builtin_formats()) * 3 * 3 * 4 * 5 * 3, tried
"""
    run_python(script, isa, env={"VRAMKIT_ISA": isa})


@pytest.mark.parametrize("name", BUILTIN)
def test_activations_that_are_not_finite_through_layers(name: str) -> None:
    """Of convolutions too: in the places where torch's layer with the decoded weight has them."""
    layers: list[tuple[torch.nn.Module, tuple[int, ...]]] = [
        (torch.nn.Linear(65, 33), (9, 65)),
        (torch.nn.Conv2d(8, 16, 3, padding=1), (2, 8, 9, 7)),
        (torch.nn.Conv1d(8, 16, 3, groups=4), (2, 8, 31)),
    ]
    for layer, shape in layers:
        vramkit.convert(layer, name)
        twin = vramkit.restore(copy.deepcopy(layer), "fp32")
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(shape)
            x.view(-1)[x.numel() // 3] = bad
            y, expected = layer(x), twin(x)
            assert not y.isfinite().all()
            for places in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(places(y), places(expected))


def available_gib() -> float:
    """GiB that are free, within the limits of a container where there are any."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free / 2**30


def sparse(count: int) -> Tensor:
    """Bytes of zero whose pages take memory only where they are written (calloc's)."""
    return torch.from_numpy(np.zeros(count, np.uint8))


@pytest.mark.parametrize("name", ["int4", "int8", "bf16"])
def test_beyond_2_to_the_31_elements(name: str) -> None:
    """The last rows of a weight of 2.3 * 10^9 elements, decoded, gathered and multiplied."""
    needed = 12.0
    if available_gib() < needed:
        pytest.skip(f"needs {needed} GiB of memory for what is read of 2.3 * 10^9 elements")
    rows, cols, last = 70_016, 33_024, 5
    assert rows * cols > 2**31
    fmt = vramkit.get_format(name)
    small = encode(torch.randn(last, cols), fmt)
    size = fmt.bytes((rows, cols))
    codes = sparse(size.codes).view(rows, -1)
    scales = sparse(size.scales)
    extra = sparse(size.extra) if size.extra else None
    codes.view(-1)[codes.numel() - small.codes.numel() :] = small.codes.reshape(-1)
    scales[scales.numel() - small.scales.numel() :] = small.scales.reshape(-1)
    if extra is not None and small.extra is not None:
        extra[extra.numel() - small.extra.numel() :] = small.extra.reshape(-1)
    large = StoredParts(fmt, (rows, cols), codes, scales, extra)
    expected = small.dense(torch.float32)
    args = (*large.arguments, fmt.spec)
    got = ops.dequantize_rows(*args, rows, cols, rows - last, last, torch.float32)
    assert torch.equal(got, expected)
    indices = torch.arange(rows - last, rows)
    assert torch.equal(
        ops.embedding(indices, *args, [rows, cols], torch.bfloat16), expected.bfloat16()
    )
    # From the packed bytes, and by decoded panels.
    for count, dtype in ((1, torch.bfloat16), (fused_rows(torch.float16) + 1, torch.float16)):
        x = torch.randn(count, cols).to(dtype)
        y = linear(x, large)
        assert not y[:, : rows - last].any()
        assert_within(
            y[:, rows - last :],
            x.double() @ expected.double().t(),
            linear_bound(x, expected, None, dtype, weight_rounded=dtype == torch.bfloat16),
        )
