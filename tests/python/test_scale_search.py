"""Searched scales of int8 and int4: against brute force in float64, and against other tools."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit._operators import encode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def peers() -> Any:
    """benchmarks.weight_peers."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import weight_peers
    finally:
        sys.path.remove(str(ROOT))
    return weight_peers


@pytest.fixture(scope="module")
def weights(minilm_path: Path) -> list[Tensor]:
    """Every Linear weight of a real model."""
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(minilm_path, dtype=torch.float32)
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]


def row_errors(weight: Tensor, name: str) -> Tensor:
    """Squared error of each row, float64."""
    decoded = encode(weight, vramkit.get_format(name)).dense(torch.float32)
    return (decoded.double() - weight.double()).square().sum(1)


def least_int8(weight: Tensor) -> Tensor:
    """Least squared error of each row over 1,601 scales within 4 % of absmax / 127."""
    wide = weight.double()
    plain = wide.abs().amax(1, keepdim=True) / 127
    least = torch.full((len(wide),), float("inf"), dtype=torch.float64)
    for step in range(-1000, 601):
        scale = plain * (1 + step * 4e-5)
        codes = (wide / scale).round().clamp(-127, 127)
        least = torch.minimum(least, (wide - codes * scale).square().sum(1))
    return least


def test_int8_is_close_to_the_best_scale(weights: list[Tensor]) -> None:
    weight = weights[7][:128]
    searched, plain = row_errors(weight, "int8"), row_errors(weight, "int8_dynamic")
    least = least_int8(weight)
    print(f"of plain: {float((searched / plain).mean()):.4f}, {float((least / plain).mean()):.4f}")
    assert bool((searched <= plain * (1 + 1e-5)).all())  # the search sums in float32
    assert float(searched.sum()) <= 1.03 * float(least.sum())
    assert float(searched.sum()) <= 0.97 * float(plain.sum())


def test_int8_rows_that_nothing_can_improve() -> None:
    weight = torch.zeros(5, 48)
    weight[1] = torch.arange(48) - 20.0
    weight[1, 0] = 127.0  # exact in whole steps
    weight[2, 3] = 5e-39  # subnormal
    weight[3] = 1e-42
    weight[4, 1], weight[4, 2] = 3e38, -2.5e38
    searched = encode(weight, vramkit.get_format("int8"))
    plain = encode(weight, vramkit.get_format("int8_dynamic"))
    kept = [0, 1, 2, 3]
    assert torch.equal(searched.codes[kept], plain.codes[kept])
    assert torch.equal(searched.scales[kept], plain.scales[kept])
    assert bool(searched.dense(torch.float32).isfinite().all())


def test_int8_dynamic_keeps_the_scale_of_the_largest_magnitude(weights: list[Tensor]) -> None:
    weight = weights[3]
    for name in ("int8_dynamic", "llm_int8"):
        parts = encode(weight, vramkit.get_format(name))
        assert torch.equal(parts.scales.view(torch.float32)[:, 0], weight.abs().amax(1) / 127)


def least_int4(groups: Tensor) -> Tensor:
    """Least squared error of each group over 16 zero points and 121 scales, float64."""
    wide = groups.double()
    low, high = wide.amin(1, keepdim=True).clamp(max=0), wide.amax(1, keepdim=True).clamp(min=0)
    least = torch.full((len(wide),), float("inf"), dtype=torch.float64)
    for step in range(121):
        scale = ((high - low) / 15 * (0.5 + 0.005 * step)).half().double()
        levels = (wide / scale).round()
        for zero in range(16):
            decoded = levels.clamp(-zero, 15 - zero) * scale
            least = torch.minimum(least, (wide - decoded).square().sum(1))
    return least


def test_int4_is_close_to_the_best_scale_and_zero_point(weights: list[Tensor]) -> None:
    groups = weights[4][:200, :128].contiguous()
    searched, least = row_errors(groups, "int4"), least_int4(groups)
    print(f"of the least: {float(searched.sum() / least.sum()):.4f}")
    assert float(searched.sum()) <= 1.01 * float(least.sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_less_error_than_other_tools_at_no_more_bytes(
    bits: int, weights: list[Tensor], peers: Any
) -> None:
    name = "int4" if bits == 4 else "int8"
    fmt = vramkit.get_format(name)
    sample = weights[:13]
    power = sum(float(w.double().square().sum()) for w in sample)
    ours = sum(float(row_errors(w, name).sum()) for w in sample)
    print(f"{name:24} {(ours / power) ** 0.5:.5f}")
    for label in ("min-max", "HQQ 4 bits") if bits == 4 else ("absmax",):
        if label == "absmax":
            theirs = sum(float(row_errors(w, "int8_dynamic").sum()) for w in sample)
        else:
            peer = peers.PEERS[label]
            assert all(peer.stored(w.shape[1]) >= fmt.bits_per_weight(w.shape) for w in sample)
            theirs = sum(float((peer.decoded(w) - w).double().square().sum()) for w in sample)
        print(f"{label:24} {(theirs / power) ** 0.5:.5f}")
        assert ours < theirs
