"""Dynamic INT8 and LLM.int8 on the CPU against torch's quantize_dynamic and bitsandbytes, in turn.

Linear layers and recurrent ones (these against torch alone).

Weights come from memory (enough layers in turn that none is in cache) or stay in cache (one layer).
The limit is the larger of two times: the weight's bytes over the read rate, and the products over
the rate of a product that stays in the first-level cache, both measured in the same minute.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
import vramkit
from torch import nn

from .peers import torch_dynamic
from .runner import in_turn, product_rate, read_rate

# In and out features: a large layer, MiniLM's, SmolLM2's.
SHAPES = (
    *((4096, 4096), (384, 384), (384, 1536), (1536, 384)),
    *((576, 576), (576, 192), (576, 1536), (1536, 576)),
)
# Recurrent layers: a voice encoder's, a speller's (packages carry the weights), larger ones.
RECURRENT: tuple[tuple[str, type[nn.RNNBase], tuple[int, int, int], int], ...] = (
    ("LSTM 40-256 x 3, 160 steps", nn.LSTM, (40, 256, 3), 160),
    ("GRU 256-256, 12 steps", nn.GRU, (256, 256, 1), 12),
    ("LSTM 512-512, 50 steps", nn.LSTM, (512, 512, 1), 50),
    ("GRU 1024-1024, 20 steps", nn.GRU, (1024, 1024, 1), 20),
)
BATCHES = (1, 8, 64)
_CACHE_BYTES = 96 << 20
# Promised: time over torch's dynamic INT8 at most, by rows.
RATIOS = {1: 1.0, 8: 1.0, 64: 0.95, 512: 0.95}


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Milliseconds by shape, rows, threads and place of the weights; and the figures missed."""
    found: dict[str, Any] = {}
    missed: list[str] = []
    shapes = SHAPES if options.size == 4096 else ((options.size, options.size),)
    for threads, (cols, rows_out), cold in itertools.product(
        (1, options.threads) if options.threads > 1 else (1,), shapes, (False, True)
    ):
        torch.set_num_threads(threads)
        place = "memory" if cold else "cache"
        print(f"{cols} -> {rows_out}, {threads} threads, weights from {place}")
        print(f"{'rows':>6}{'ours ms':>10}{'llm ms':>10}{'torch ms':>10}{'ratio':>8}{'limit':>8}"
              f"{'bnb ms':>10}{'llm x':>8}{'error':>9}{'torch':>9}")  # fmt: skip
        for rows in options.rows:
            result = _one(cols, rows_out, rows, cold)
            key = f"{cols}x{rows_out} rows {rows} threads {threads} {place}"
            found[key] = result
            ratio = result["seconds"]["ours"] / result["seconds"]["torch"]
            if ratio > RATIOS.get(rows, 1.0):
                missed.append(f"{key}: {ratio:.2f} of torch's time")
            if result["errors"]["ours"] > result["errors"]["torch"]:
                missed.append(f"{key}: less accurate than torch")
    if options.size == 4096:
        for threads in (1, options.threads) if options.threads > 1 else (1,):
            torch.set_num_threads(threads)
            _recurrent(threads, found, missed)
    return found, missed


def _recurrent(threads: int, found: dict[str, Any], missed: list[str]) -> None:
    """Recurrent layers, their weights in cache."""
    print(f"recurrent layers, {threads} threads")
    print(f"{'layer':>30}{'batch':>6}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}"
          f"{'error':>9}{'torch':>9}")  # fmt: skip
    for (name, kind, sizes, steps), batch in itertools.product(RECURRENT, BATCHES):
        plain = nn.Sequential(kind(*sizes))
        x = torch.randn(steps, batch, sizes[0])
        layers = {"ours": copy.deepcopy(plain), "torch": torch_dynamic(plain, frozenset({kind}))}
        vramkit.convert(layers["ours"], "int8_dynamic")
        with torch.inference_mode():
            expected = copy.deepcopy(plain).double()(x.double())[0]
            errors = {
                what: float((layer(x)[0] - expected).norm() / expected.norm())
                for what, layer in layers.items()
            }
        seconds = in_turn(
            {what: _in_turn([layer], x) for what, layer in layers.items()}, repeats=25, slowest=0.4
        )
        ratio = seconds["ours"] / seconds["torch"]
        key = f"{name} batch {batch} threads {threads}"
        found[key] = {"seconds": seconds, "errors": errors}
        print(
            f"{name:>30}{batch:>6}{seconds['ours'] * 1e3:>10.3f}{seconds['torch'] * 1e3:>10.3f}"
            f"{ratio:>8.2f}{errors['ours']:>9.4f}{errors['torch']:>9.4f}"
        )
        if ratio > RATIOS.get(batch, 1.0):
            missed.append(f"{key}: {ratio:.2f} of torch's time")
        if errors["ours"] > errors["torch"]:
            missed.append(f"{key}: less accurate than torch")


def _one(cols: int, out: int, rows: int, cold: bool) -> dict[str, Any]:
    plain = nn.Linear(cols, out)
    x = torch.randn(rows, cols)
    count = max(2, -(-_CACHE_BYTES // (cols * out))) if cold else 1
    kinds = {"ours": _converted("int8_dynamic"), "llm": _converted("llm_int8"), "torch": _torch}
    layers = {name: [make(plain) for _ in range(count)] for name, make in kinds.items()}
    work = {name: _in_turn(made, x) for name, made in layers.items()}
    try:
        half = x.to(torch.bfloat16)
        work["bitsandbytes"] = _in_turn([_bitsandbytes(plain)], half)
    except ImportError as error:
        print(f"bitsandbytes: not measured ({error})")
    with torch.inference_mode():
        expected = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
        errors = {
            name: float((made[0](x) - expected).norm() / expected.norm())
            for name, made in layers.items()
        }
    rate, products = read_rate(), product_rate(torch.int8)
    seconds = in_turn(work, repeats=25, slowest=0.4)
    limit = max(cols * out / rate if cold else 0.0, rows * cols * out / products)
    ours, torchs = seconds["ours"], seconds["torch"]
    peer = seconds.get("bitsandbytes", float("nan"))
    print(
        f"{rows:>6}{ours * 1e3:>10.3f}{seconds['llm'] * 1e3:>10.3f}{torchs * 1e3:>10.3f}"
        f"{ours / torchs:>8.2f}{limit / ours:>8.2f}{peer * 1e3:>10.2f}"
        f"{peer / seconds['llm']:>8.1f}{errors['ours']:>9.4f}{errors['torch']:>9.4f}"
    )
    return {
        "seconds": seconds,
        "errors": errors,
        "limit_seconds": limit,
        "read_bytes_per_second": rate,
        "products_per_second": products,
    }


def _converted(name: str) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        model = nn.Sequential(copy.deepcopy(plain))
        vramkit.convert(model, name)
        return model

    return make


def _torch(plain: nn.Linear) -> nn.Module:
    return torch_dynamic(nn.Sequential(copy.deepcopy(plain)))


def _bitsandbytes(plain: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        plain.in_features, plain.out_features, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False)
    layer.bias = nn.Parameter(plain.bias.data.to(torch.bfloat16))
    made: nn.Module = layer.to("cpu").eval()
    return made


def _in_turn(layers: list[nn.Module], x: torch.Tensor) -> Callable[[], Any]:
    turn = itertools.cycle(layers)

    def call() -> Any:
        with torch.inference_mode():
            return next(turn)(x)

    return call
