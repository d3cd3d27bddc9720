"""Convolutions on the CPU: ours and torch's in bfloat16, in turn, by size, batch and layout.

Weights stay in cache, as torch's do: that favours torch, whose weights are twice the bytes. In the
rows channels_last torch's weight is in that order too.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import vramkit
from torch import Tensor, nn
from vramkit.layers.base import QuantizedLayer

from .runner import in_turn

FORMATS = ("int8", "fp8")
# Promised of Conv2d 3 x 3: time over torch's, bytes over torch's (the scales are the rest).
TIME, BYTES = 1.1, 0.51
CHANNELS, SPATIAL, BATCHES = (64, 128, 256), (56, 28, 14), (1, 8)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def cases() -> Iterator[tuple[str, nn.Module, Tensor, bool]]:
    """(name, plain layer, input, whether its figures are promised)."""
    for channels, side, batch in itertools.product(CHANNELS, SPATIAL, BATCHES):
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(batch, channels, side, side).to(memory_format=memory_format)
            layer = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=memory_format)
            yield f"2d 3x3 {channels} ch {side} px batch {batch} {layout}", layer, x, True
    for batch in BATCHES:
        layer = nn.Conv1d(256, 256, 3, padding=1)
        yield f"1d 3 256 ch 1024 long batch {batch}", layer, torch.randn(batch, 256, 1024), False
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(batch, 256, 28, 28).to(memory_format=memory_format)
            layer = nn.Conv2d(256, 256, 3, padding=1, groups=256)
            layer = layer.to(memory_format=memory_format)
            yield f"2d depthwise 256 ch 28 px batch {batch} {layout}", layer, x, False


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Milliseconds, ratios and bytes by case and format, and the promised figures missed."""
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    missed: list[str] = []
    print(f"bf16 input, {options.threads} threads; ratios are ours over torch's")
    print(f"{'case':46}{'torch ms':>10}" + "".join(f"{n + ' ms':>10}{'ratio':>7}" for n in FORMATS)
          + f"{'bytes':>8}")  # fmt: skip
    for name, plain, x, promised in cases():
        row = _one(plain.to(torch.bfloat16).eval(), x.to(torch.bfloat16))
        found[name] = row
        seconds = row["seconds"]
        columns = "".join(
            f"{seconds[fmt] * 1e3:>10.3f}{seconds[fmt] / seconds['torch bf16']:>7.2f}"
            for fmt in FORMATS
        )
        share = max(row["weight_bytes"][fmt] for fmt in FORMATS) / row["weight_bytes"]["torch bf16"]
        print(f"{name:46}{seconds['torch bf16'] * 1e3:>10.3f}{columns}{share:>8.3f}", flush=True)
        if not promised:
            continue
        missed += [
            f"{name}, {fmt}: {ratio:.2f} of torch's time"
            for fmt in FORMATS
            if (ratio := seconds[fmt] / seconds["torch bf16"]) > TIME
        ]
        if share > BYTES:
            missed.append(f"{name}: {share:.3f} of torch's bytes")
    return found, missed


def _one(plain: nn.Module, x: Tensor) -> dict[str, Any]:
    layers: dict[str, nn.Module] = {"torch bf16": plain}
    weight: Any = plain.weight
    nbytes = {"torch bf16": weight.numel() * weight.element_size()}
    for fmt in FORMATS:
        layer = copy.deepcopy(plain)
        vramkit.convert(layer, fmt)
        assert isinstance(layer, QuantizedLayer)
        layers[fmt], nbytes[fmt] = layer, layer.stored_bytes

    def call(layer: nn.Module) -> Tensor:
        with torch.inference_mode():
            made: Tensor = layer(x)
        return made

    work = {name: (lambda layer=layer: call(layer)) for name, layer in layers.items()}
    return {"seconds": in_turn(work, repeats=31, slowest=0.3), "weight_bytes": nbytes}
