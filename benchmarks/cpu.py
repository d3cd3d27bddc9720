"""One Linear on the CPU: ours, torch and the peers in turn, with weights out of cache.

Enough layers are taken in turn that none is in cache when its turn comes. The limit is packed bytes
over the read rate that this machine reaches in the same minute.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import vramkit
from torch import nn

from .quality import _bitsandbytes_4bit, _quanto
from .runner import in_turn, read_rate

FORMATS = ("nf4", "int4", "int8", "fp8", "bf16")
PEERS: dict[str, tuple[str, ...]] = {
    "nf4": ("torch bf16", "bitsandbytes nf4"),
    "int4": ("torch bf16", "quanto qint4"),
    "int8": ("torch bf16", "quanto qint8"),
    "fp8": ("torch bf16", "quanto qfloat8"),
    "bf16": ("torch bf16",),
}
_CACHE_BYTES = 96 << 20  # more than the caches of the machines in use


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Milliseconds by format and rows. Nothing is promised yet: no figure can be missed."""
    torch.set_num_threads(options.threads)
    size = options.size
    plain = [nn.Linear(size, size, bias=False).to(torch.bfloat16) for _ in range(3)]
    found: dict[str, Any] = {}
    print(f"{size} x {size}, bf16 input, {options.threads} threads, weights from memory")
    print(
        f"{'format':8}{'rows':>6}{'ours ms':>10}{'limit ms':>10}{'of limit':>10}  peers: ms (ratio)"
    )
    for name, rows in itertools.product(FORMATS, options.rows):
        packed = vramkit.get_format(name).bytes((size, size)).total
        x = torch.randn(rows, size, dtype=torch.bfloat16)
        work = {"ours": _rotating(plain, x, lambda m, f=name: _ours(m, f), packed)}
        for peer in PEERS[name]:
            try:
                nbytes = 2 * size * size if peer == "torch bf16" else packed
                work[peer] = _rotating(plain, x, _peer(peer), nbytes)
            except ImportError as error:
                print(f"{peer}: not measured ({error})")
        rate = read_rate()
        times = in_turn(work)
        limit = packed / rate
        peers = "  ".join(
            f"{peer} {seconds * 1e3:.3f} ({seconds / times['ours']:.2f}x)"
            for peer, seconds in times.items()
            if peer != "ours"
        )
        ours = times["ours"]
        print(
            f"{name:8}{rows:>6}{ours * 1e3:>10.3f}{limit * 1e3:>10.3f}"
            f"{limit / ours:>10.2f}  {peers}"
        )
        found[f"{name} rows {rows}"] = {
            "seconds": times,
            "limit_seconds": limit,
            "read_bytes_per_second": rate,
        }
    return found, []


def _ours(model: nn.Module, name: str) -> nn.Module:
    vramkit.convert(model, name)
    return model


def _peer(name: str) -> Callable[[nn.Module], nn.Module]:
    if name == "torch bf16":
        return lambda model: model
    library, kind = name.split()
    if library == "bitsandbytes":
        return lambda model: _bitsandbytes_4bit(model, kind)
    return lambda model: _quanto(model, kind)


def _rotating(
    plain: list[nn.Linear], x: torch.Tensor, make: Callable[[nn.Module], nn.Module], nbytes: int
) -> Callable[[], Any]:
    """A call that runs the next of enough layers, so that its weight is not in cache."""
    count = max(2, -(-_CACHE_BYTES // nbytes))
    layers = []
    for i in range(count):
        source = plain[i % len(plain)]
        copy = nn.Linear(
            source.in_features, source.out_features, bias=False, dtype=source.weight.dtype
        )
        with torch.no_grad():
            copy.weight.copy_(source.weight)
        layers.append(make(nn.Sequential(copy)))
    turn = itertools.cycle(layers)

    def call() -> Any:
        with torch.inference_mode():
            return next(turn)(x)

    return call
