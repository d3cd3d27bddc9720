"""bitsandbytes on the CPU, its operators on its own code and on ours in turn; and training memory.

bitsandbytes repacks a `Linear4bit` on its first inference for an AVX-512 BF16 kernel of its own:
that is the layer measured as theirs. The peak of a training step with adapters is what torch's
allocator saw, weights included, with either library's 4-bit layers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import vramkit
from torch import Tensor, nn
from vramkit.interop import bitsandbytes as fast
from vramkit.measure import profiled_peak

ROWS = (1, 8, 64, 512)


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Milliseconds on both, and bytes of a training step; no figure is promised of either."""
    torch.set_num_threads(options.threads)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of each cast to float16
    size = options.size
    found: dict[str, Any] = {"operators": {}}
    print(f"{size} x {size}, {options.threads} threads; ms before and after enable(), ratio")
    for name, (before, after) in _operators(size).items():
        own, ours = _before_and_after(before, after)
        found["operators"][name] = {"bitsandbytes_seconds": own, "vramkit_seconds": ours}
        print(f"{name:44}{own * 1e3:>10.3f}{ours * 1e3:>10.3f}{own / ours:>9.2f}x", flush=True)
    found["training_step_peak_bytes"] = peaks = _training_peaks()
    for label, peak in peaks.items():
        print(f"training step, {label:28}{peak / 2**20:>10.1f} MiB at its peak")
    return found, []


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def _operators(size: int) -> dict[str, Pair]:
    """By name: a call for bitsandbytes' code and one for ours (mostly the same one)."""
    from bitsandbytes import functional as F

    x, weight = torch.randn(size, size), torch.randn(size, size) * 0.02
    half = weight.bfloat16()
    packed, state = F.quantize_4bit(half, quant_type="nf4")
    codes8, state8 = F.quantize_blockwise(weight)
    calls: dict[str, Callable[[], Any]] = {
        "quantize_4bit nf4 bf16": lambda: F.quantize_4bit(half, quant_type="nf4"),
        "dequantize_4bit nf4 bf16": lambda: F.dequantize_4bit(packed, state),
        "quantize_blockwise fp32": lambda: F.quantize_blockwise(weight),
        "dequantize_blockwise fp32": lambda: F.dequantize_blockwise(codes8, state8),
        "gemv_4bit nf4 bf16, 1 row": lambda: F.gemv_4bit(half[:1], packed.t(), state=state),
    }
    for rows in ROWS:
        a = torch.randint(-127, 128, (rows, size), dtype=torch.int8)
        b = torch.randint(-127, 128, (size, size), dtype=torch.int8)
        part = x[:rows].to(torch.float16)
        calls[f"int8_vectorwise_quant fp16, {rows} rows"] = lambda part=part: (
            F.int8_vectorwise_quant(part, threshold=6.0)
        )
        calls[f"int8_linear_matmul, {rows} rows"] = lambda a=a, b=b: F.int8_linear_matmul(a, b)
    pairs: dict[str, Pair] = {name: (call, call) for name, call in calls.items()}
    for rows in ROWS:
        given = x[:rows].bfloat16()
        fast.disable()
        theirs = _linear4bit(half)
        theirs(given[:1])  # repacks where the processor has the instructions
        fast.enable()
        pairs[f"Linear4bit nf4 bf16, {rows} rows"] = (
            _call(theirs, given),
            _call(_linear4bit(half), given),
        )
        layer = _linear8bit(weight)
        pairs[f"Linear8bitLt bf16, {rows} rows"] = _call(layer, given), _call(layer, given)
    return pairs


def _call(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: layer(x)


def _linear4bit(weight: Tensor, bias: bool = False) -> Any:
    import bitsandbytes as bnb

    rows, cols = weight.shape
    layer = bnb.nn.Linear4bit(
        cols, rows, bias=bias, compute_dtype=weight.dtype, quant_type="nf4",
        compress_statistics=False,
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    return layer.to("cpu").eval().requires_grad_(False)


def _linear8bit(weight: Tensor) -> Any:
    import bitsandbytes as bnb

    rows, cols = weight.shape
    layer = bnb.nn.Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    return layer.to("cpu").eval()


@torch.no_grad()
def _before_and_after(before: Callable[[], Any], after: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of each, in turn; half a second for each at most, but three calls."""
    times: tuple[list[float], list[float]] = ([], [])
    switches = (fast.disable, fast.enable)
    for repeat in range(22):
        for taken, switch, call in zip(times, switches, (before, after), strict=True):
            if sum(taken) > 0.5 and len(taken) >= 3:
                continue
            switch()
            start = time.perf_counter()
            call()
            if repeat:  # the first one warms up
                taken.append(time.perf_counter() - start)
    fast.disable()
    return median(times[0]), median(times[1])


class Adapted(nn.Module):
    """A frozen layer and an adapter of rank 8 beside it."""

    def __init__(self, base: nn.Module, size: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(size, 8, bias=False, dtype=torch.bfloat16)
        self.up = nn.Linear(8, size, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the adapter's."""
        out: Tensor = x + torch.nn.functional.silu(self.base(x) + self.up(self.down(x)))
        return out


class Step(nn.Module):
    """Forward and backward pass, as a call that can be measured."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> None:
        """Gradients of all adapters."""
        self.layers(x).float().square().mean().backward()


def _training_peaks(size: int = 2048, count: int = 6, tokens: int = 128) -> dict[str, int]:
    """Bytes of weights, gradients and what the step holds; input [tokens, size]."""
    weights = [torch.randn(size, size, dtype=torch.bfloat16) * 0.02 for _ in range(count)]
    x = torch.randn(tokens, size, dtype=torch.bfloat16)

    def ours(weight: Tensor) -> nn.Module:
        layer = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
        layer.weight.data = weight.clone()
        layer.requires_grad_(False)
        vramkit.convert(layer, "nf4")
        return layer

    def plain(weight: Tensor) -> nn.Module:
        layer = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
        layer.weight.data = weight.clone()
        return layer.requires_grad_(False)

    peaks = {}
    for label, make, on in (
        ("plain bf16", plain, False),
        ("bitsandbytes", _linear4bit, False),
        ("bitsandbytes, enable()", _linear4bit, True),
        ("vramkit nf4", ours, False),
    ):
        (fast.enable if on else fast.disable)()
        torch.manual_seed(0)
        step = Step([Adapted(make(weight), size) for weight in weights])
        step(x)
        for parameter in step.parameters():
            parameter.grad = None
        peaks[label] = _stored(step) + profiled_peak(step, (x,), {})
    fast.disable()
    return peaks


def _stored(model: nn.Module) -> int:
    """Bytes of parameters, and of bitsandbytes' scales, which are none."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
    return total
