"""How far the rules for what operators hold inside are off: random layers, by rule and by probe.

Probes were exact for every model that was measured, so that they stand for a measurement here. The
layers are drawn from a fixed seed, and not from those that the rules were written by. The least
ratio of each kind is a bound of `vramkit.intervals`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import vramkit
from torch import nn

COUNT = 50  # layers of each kind
Layer = tuple[str, nn.Module, tuple[int, ...]]


def _log(draw: random.Random, low: int, high: int) -> int:
    """A size between the two, small ones as likely as large ones."""
    return round(low * (high / low) ** draw.random())


def recurrent(draw: random.Random) -> Layer:
    """An LSTM, GRU or Elman net."""
    cls = draw.choice((nn.LSTM, nn.GRU, nn.RNN))
    width, hidden = _log(draw, 8, 512), _log(draw, 8, 512)
    layers, both = draw.randint(1, 3), draw.random() < 0.4
    model = cls(width, hidden, layers, batch_first=True, bidirectional=both)
    shape = (_log(draw, 1, 16), _log(draw, 1, 40), width)
    return f"{cls.__name__} {width}->{hidden} x{layers}{' both ways' * both} {shape}", model, shape


def convolution(draw: random.Random) -> Layer:
    """A convolution in one to three dimensions, transposed, grouped or dilated perhaps."""
    rank = draw.choice((1, 2, 2, 3))
    transposed = draw.random() < 0.25
    groups = draw.choice((1, 1, 1, 2, 4))
    channels, out = (groups * _log(draw, 1, 256 // groups) for _ in range(2))
    if draw.random() < 0.15 and not transposed:
        groups = out = channels  # depthwise
    kernel, stride = draw.choice((1, 3, 3, 4, 5, 7)), draw.choice((1, 1, 2, 4))
    name = f"Conv{'Transpose' * transposed}{rank}d"
    model = getattr(nn, name)(
        channels, out, kernel, stride=stride, padding=kernel // 2, groups=groups
    )
    side = _log(draw, 7, (4096, 128, 24)[rank - 1])
    shape = (draw.choice((1, 1, 2, 4)), channels, *[side] * rank)
    return f"{name} {channels}->{out} k{kernel} s{stride} g{groups} {shape}", model, shape


def other(draw: random.Random) -> Layer:
    """A Linear with an activation, an encoder layer, causal attention, a norm of a turned input."""
    width, rows = 8 * _log(draw, 4, 96), _log(draw, 1, 512)
    heads = draw.choice([h for h in (1, 2, 4, 8) if width % h == 0])
    kind = draw.choice(("linear", "encoder", "causal", "norm"))
    if kind == "linear":
        model: nn.Module = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU())
    elif kind == "encoder":
        model = nn.TransformerEncoderLayer(
            width, heads, 2 * width, batch_first=True, norm_first=draw.random() < 0.5
        )
    elif kind == "causal":
        model = _Causal(heads)
    else:
        model = nn.Sequential(_Turned(), nn.LayerNorm(rows))
    shape = (_log(draw, 1, 8), rows, width)
    return f"{kind} {width} {heads} heads {shape}", model, shape


def half(draw: random.Random) -> Layer:
    """Products and causal attention in bfloat16, whose operands oneDNN packs."""
    width, rows = 8 * _log(draw, 2, 192), _log(draw, 1, 1024)
    heads = draw.choice([h for h in (1, 2, 4, 8) if width % h == 0])
    kind = draw.choice(("linear", "linear", "plain attention", "causal"))
    if kind == "linear":
        out = 8 * _log(draw, 2, 384)
        model: nn.Module = nn.Sequential(nn.Linear(width, out, bias=draw.random() < 0.5), nn.SiLU())
    else:
        rows = min(rows, 256)
        model = _Causal(heads) if kind == "causal" else _Plain(heads)
    shape = (_log(draw, 1, 8), rows, width)
    return f"{kind} {width} {heads} heads bf16 {shape}", _Half(model), shape


def resizing(draw: random.Random) -> Layer:
    """An upsampling of images, nearest or bilinear."""
    mode, side = draw.choice(("nearest", "bilinear")), _log(draw, 4, 96)
    shape = (draw.choice((1, 1, 4)), _log(draw, 1, 128), side, side)
    return f"resize {mode} {shape}", nn.Upsample(scale_factor=2, mode=mode), shape


class _Causal(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(split, split, split, is_causal=True)


class _Plain(_Causal):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        return (split @ split.transpose(2, 3)).softmax(-1) @ split


class _Half(nn.Module):
    """A module in bfloat16; with a parameter, so that its dtype is known."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.known = nn.Parameter(torch.zeros(1))
        self.inner = inner
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(x)
        return made


class _Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


KINDS: dict[str, Callable[[random.Random], Layer]] = {
    "recurrent": recurrent,
    "convolution": convolution,
    "resizing": resizing,
    "other": other,
    "half": half,
}


def layers(kind: str) -> Iterator[Layer]:
    """The `COUNT` layers of a kind, always the same."""
    draw = random.Random(f"vramkit rules {kind}")
    torch.manual_seed(0)
    for _ in range(COUNT):
        yield KINDS[kind](draw)


def measure() -> dict[str, Any]:
    """By kind: count, share within 10 %, extremes of rule / probe with their layers."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        ratios = []
        for name, model, shape in layers(kind):
            model.eval()
            probed = vramkit.estimate(model, None, shape, calibrated=False)
            if "probed" not in probed.interval_from:
                continue  # too large for a probe
            ruled = vramkit.estimate(model, None, shape, probe=False, calibrated=False)
            assert probed.activations_bytes is not None
            assert ruled.activations_bytes is not None
            ratios.append((ruled.activations_bytes / probed.activations_bytes, name))
        ratios.sort()
        found[kind] = {
            "count": len(ratios),
            "within_10_percent": sum(abs(r - 1) <= 0.1 for r, _ in ratios) / len(ratios),
            "least": ratios[0][0],
            "least_layer": ratios[0][1],
            "most": ratios[-1][0],
            "most_layer": ratios[-1][1],
            "quantiles": [
                ratios[round(q * (len(ratios) - 1))][0] for q in (0.05, 0.25, 0.5, 0.75, 0.95)
            ],
        }
    return found
