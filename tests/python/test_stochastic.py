"""Stochastic rounding: the bits of an independent reference, a mean without error, the same bits
for the same seed, and what cannot be rounded so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import vramkit
from numerics import UNIT, mean_bound
from torch import nn
from vramkit._stochastic import encode_rounded

CASTS = ("fp16", "bf16")
SCALED = ("fp8", "fp8_e5m2", "int8", "int8_dynamic")
MOST = {"fp8": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0, "int8_dynamic": 127.0}
MASK = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox 4x32-10 of counters uint64 [..., 4], after the paper's definition."""
    a, b, c, d = (counter[..., i].astype(np.uint64) for i in range(4))
    for turn in range(10):
        low = np.uint64((seed + 0x9E3779B9 * turn) & 0xFFFFFFFF)
        high = np.uint64(((seed >> 32) + 0xBB67AE85 * turn) & 0xFFFFFFFF)
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (
            (second >> np.uint64(32)) ^ b ^ low,
            second & MASK,
            (first >> np.uint64(32)) ^ d ^ high,
            first & MASK,
        )
    return np.stack([a, b, c, d], axis=-1)


def words(rows: int, cols: int, seed: int) -> np.ndarray:
    quads = -(-cols // 4)
    counter = np.zeros((rows, quads, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(quads, dtype=np.uint64)
    counter[..., 2] = np.arange(rows, dtype=np.uint64)[:, None]
    return philox(counter, seed).reshape(rows, -1)[:, :cols]


def grid_of(name: str) -> np.ndarray:
    """Magnitudes of the target in order, float64; their index is the code."""
    if name == "fp16":
        return np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    if name == "bf16":
        bits = np.arange(0x7F80, dtype=np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    if name.startswith("int8"):
        return np.arange(128, dtype=np.float64)
    codes = torch.arange(0x7F if name == "fp8" else 0x7C, dtype=torch.uint8)
    dtype = torch.float8_e4m3fn if name == "fp8" else torch.float8_e5m2
    return codes.view(dtype).to(torch.float64).numpy()


def expected(name: str, y: np.ndarray, random: np.ndarray) -> np.ndarray:
    """The magnitudes' codes of y, float32, that stochastic rounding takes with these words."""
    grid = grid_of(name)
    size = np.abs(y).astype(np.float64)
    below = np.clip(np.searchsorted(grid, size, side="right") - 1, 0, len(grid) - 2)
    share = np.minimum((size - grid[below]) / (grid[below + 1] - grid[below]), 1.0)
    normal = {"fp16": 2.0**-14, "bf16": 0.0, "fp8": 2.0**-6, "fp8_e5m2": 2.0**-14}
    dropped = {"fp16": 13, "bf16": 16, "fp8": 20, "fp8_e5m2": 21}
    counted = np.where(size >= normal.get(name, np.inf), dropped.get(name, 24), 24)
    compared = (random >> (32 - counted).astype(np.uint64)).astype(np.float64)
    up = np.floor(share * 2.0**counted) + compared >= 2.0**counted
    return below + up


def weight(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + cols)
    x = torch.randn(rows, cols, generator=generator)
    # Small ones too, down to where the formats have no normal numbers.
    scale = torch.randint(0, 20, (rows, cols), generator=generator)
    return torch.ldexp(x, -scale)


@pytest.mark.parametrize("seed", [0, 1, 0x1234_5678_9ABC_DEF0, 2**64 - 1])
@pytest.mark.parametrize("name", CASTS + SCALED)
def test_bits_of_an_independent_reference(name: str, seed: int) -> None:
    x = weight(5, 203)
    parts = encode_rounded(x, vramkit.get_format(name), rounding="stochastic", seed=seed)
    y = x.numpy()
    if name in SCALED:
        absmax = np.abs(y).max(axis=1, keepdims=True)
        most = np.float32(MOST[name])
        scale = parts.scales.view(torch.float32).numpy()
        np.testing.assert_array_equal(scale, absmax / most)
        y = y * (most / absmax)
    magnitude = expected(name, y, words(5, 203, seed))
    if name in CASTS:
        codes = parts.codes.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(codes, magnitude + np.where(y < 0, 0x8000, 0))
    elif name.startswith("int8"):
        codes = parts.codes.view(torch.int8).numpy()
        np.testing.assert_array_equal(codes, np.where(y < 0, -magnitude, magnitude))
    else:
        codes = parts.codes.numpy()
        np.testing.assert_array_equal(codes, magnitude + np.where(np.signbit(y), 0x80, 0))


@pytest.mark.parametrize("name", CASTS + SCALED)
def test_the_mean_of_many_roundings_is_the_number(name: str) -> None:
    count = 20_000
    x = weight(1, 64)
    rows = x.expand(count, -1).contiguous()
    parts = encode_rounded(rows, vramkit.get_format(name), rounding="stochastic", seed=11)
    values = parts.dense(torch.float32).double()
    mean = values.mean(0)
    unit = float(x.abs().amax()) / MOST[name] if name in SCALED else 1.0
    grid = torch.from_numpy(grid_of(name)) * unit
    below = torch.searchsorted(grid, x[0].double().abs(), right=True).clamp(1, len(grid) - 1) - 1
    step = grid[below + 1] - grid[below]
    # The random part; 24 compared bits of a step; the roundings of scale, factor and products.
    bound = step * (mean_bound(count) + 2.0**-24) + 5 * UNIT[torch.float32] * x[0].double().abs()
    assert bool(((mean - x[0].double()).abs() <= bound).all())
    nearest = encode_rounded(rows[:1], vramkit.get_format(name)).dense(torch.float32)[0].double()
    # To nearest the error keeps its sign: the bound is not what any rounding would meet.
    assert bool(((nearest - x[0].double()).abs() > bound).any())


def test_seeds_decide_and_threads_do_not() -> None:
    fmt = vramkit.get_format("fp8")
    x = weight(300, 129)

    def codes(seed: int) -> torch.Tensor:
        return encode_rounded(x, fmt, rounding="stochastic", seed=seed).codes

    first = codes(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(first, codes(7))
    finally:
        torch.set_num_threads(threads)
    changed = float((first != codes(8)).double().mean())
    # Two independent roundings of a fraction p differ with probability 2 p (1 - p): 1/3 on average
    # of evenly spread fractions; subnormals and exact numbers are few here.
    assert 0.25 < changed < 0.4


def test_what_is_exact_stays_and_what_is_not_finite_too() -> None:
    x = torch.tensor([[0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan, 65504.0]])
    for name in CASTS:
        fmt = vramkit.get_format(name)
        source = x if name == "fp16" else x[:, :-1]
        for seed in range(8):
            got = encode_rounded(source, fmt, rounding="stochastic", seed=seed).codes
            assert torch.equal(got, encode_rounded(source, fmt).codes)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    halves = halves.reshape(256, 256)
    fmt = vramkit.get_format("bf16")
    got = encode_rounded(halves, fmt, rounding="stochastic", seed=5).codes
    assert torch.equal(got, encode_rounded(halves, fmt).codes)


def test_convert_and_set_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data.copy_(model[0].weight)
    source = model[0].weight.detach().clone()
    vramkit.convert(model, "int8", rounding="stochastic", seed=9)
    first, second = (layer.codes for layer in model)
    assert not torch.equal(first, second)  # each layer has a seed of its own
    fmt = vramkit.get_format("int8")
    assert torch.equal(first, encode_rounded(source, fmt, rounding="stochastic", seed=9).codes)
    vramkit.set_weight(model[1], source, rounding="stochastic", seed=9)
    assert torch.equal(first, second)


def test_small_updates_are_kept_on_average() -> None:
    layer: Any = nn.Linear(64, 64, bias=False)
    layer.weight.data.fill_(1.0)
    vramkit.convert(layer, "bf16")
    lost = 2.0**-11  # an eighth of the distance from 1 to the next bfloat16
    vramkit.set_weight(layer, torch.ones(64, 64) + lost)
    assert torch.equal(layer.weight[:], torch.ones(64, 64))
    vramkit.set_weight(layer, torch.ones(64, 64) + lost, rounding="stochastic", seed=1)
    mean = float(layer.weight[:].double().mean())
    assert abs(mean - (1 + lost)) <= 2.0**-7 * mean_bound(64 * 64)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "nf4_dq"])
def test_formats_that_round_to_nearest_are_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=f"{name} rounds to nearest only"):
        vramkit.convert(model, name, rounding="stochastic")
    assert type(model[0]) is nn.Linear


def test_bad_arguments() -> None:
    model = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="rounding is one of nearest, stochastic"):
        vramkit.convert(model, "int8", rounding="up")
    with pytest.raises(ValueError, match="a seed is an integer from 0"):
        vramkit.convert(model, "int8", rounding="stochastic", seed=-1)
    with pytest.raises(ValueError, match="leave out calibration"):
        vramkit.convert(model, "int8", rounding="stochastic", calibration=[torch.zeros(1, 64)])
    assert type(model) is nn.Linear


def test_the_operator_is_sound() -> None:
    fmt = vramkit.get_format("fp8")
    torch.library.opcheck(
        torch.ops.vramkit.quantize_stochastic.default,
        (weight(3, 20), fmt.table_on(torch.device("cpu")), fmt.spec, 3),
    )


def test_rows_need_not_be_contiguous() -> None:
    wide = weight(9, 300)
    part = wide[:, 3:203]
    for name in (*CASTS, *SCALED, "int4", "nf4"):
        fmt = vramkit.get_format(name)
        got, want = (vramkit._operators.encode(x, fmt) for x in (part, part.contiguous()))
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scales, want.scales)
        if name in CASTS + SCALED:
            got, want = (
                encode_rounded(x, fmt, rounding="stochastic", seed=2)
                for x in (part, part.contiguous())
            )
            assert torch.equal(got.codes, want.codes)
