"""Encoding and decoding 16 M weights on the CPU, in memory already touched, beside a copy's rate.

Traffic is what has to be read and written once. The limit is a copy's: bytes read and written a
second, measured in the same minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import vramkit
from torch import Tensor

from .runner import in_turn

SHAPE = (4096, 4096)
FORMATS = (
    "bf16",
    "fp16",
    "fp8",
    "fp8_e5m2",
    "int8",
    "int4",
    "int4_g32",
    "nf4",
    "nf4_dq",
    "fp4",
)
CASTS = ("bf16", "fp16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Promised, as ours over the copy's traffic, and as times faster than the peer.
CAST_SHARE, DECODE_SHARE = 0.85, 0.8
FASTER = {("fp8", "decode", "bf16", "torch"): 10.0, ("nf4", "encode", "fp32", "bitsandbytes"): 50.0}


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Milliseconds, traffic and its share of a copy's, by format, direction and dtype."""
    found: dict[str, Any] = {}
    missed: list[str] = []
    pool = vramkit.HostPool()
    for threads in sorted({1, options.threads}):
        torch.set_num_threads(threads)
        print(f"\n{SHAPE[0]} x {SHAPE[1]}, {threads} threads")
        print(f"{'format':10}{'what':>16}{'ms':>9}{'GB/s':>8}{'of a copy':>11}  peers: ms (ratio)")
        for dtype_name, dtype in DTYPES.items():
            weight = torch.randn(SHAPE).to(dtype)
            for name in FORMATS:
                for what in ("encode", "decode"):
                    with pool:
                        result = _measure(name, what, weight)
                    key = f"{name} {what} {dtype_name} threads {threads}"
                    found[key] = result
                    _print(name, f"{what} {dtype_name}", result)
                    missed += [f"{key}: {text}" for text in _missed(name, what, dtype_name, result)]
    return found, missed


def _measure(name: str, what: str, weight: Tensor) -> dict[str, Any]:
    from vramkit._operators import encode

    fmt = vramkit.get_format(name)
    parts = encode(weight, fmt)
    if what == "encode":
        work: dict[str, Callable[[], Any]] = {"ours": lambda: encode(weight, fmt)}
    else:
        work = {"ours": lambda: parts.dense(weight.dtype)}
    work |= _peers(name, what, weight)
    # A copy that moves as many bytes as one pass over a float32 matrix and a bfloat16 one does.
    source, target = torch.ones(SHAPE), torch.empty(SHAPE)
    work["copy"] = lambda: target.copy_(source)
    seconds = in_turn(work, repeats=15, slowest=0.6)
    copied = 2 * source.nbytes / seconds.pop("copy")
    traffic = weight.nbytes + parts.nbytes
    rate = traffic / seconds["ours"]
    return {
        "seconds": seconds,
        "traffic_bytes": traffic,
        "traffic_bytes_per_second": rate,
        "copy_bytes_per_second": copied,
        "share": rate / copied,
    }


def _peers(name: str, what: str, weight: Tensor) -> dict[str, Callable[[], Any]]:
    plain = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}.get(name)
    found: dict[str, Callable[[], Any]] = {}
    if plain is not None and plain != weight.dtype:
        stored, target = weight.to(plain), torch.empty_like(weight)
        if what == "encode":
            found["torch"] = lambda: stored.copy_(weight)
        else:
            found["torch"] = lambda: target.copy_(stored)
    if name in ("nf4", "fp4"):
        try:
            import bitsandbytes.functional as functional
        except ImportError as error:
            print(f"bitsandbytes: not measured ({error})")
            return found
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=name)
        if what == "encode":
            found["bitsandbytes"] = lambda: functional.quantize_4bit(
                weight, blocksize=64, quant_type=name
            )
        else:
            found["bitsandbytes"] = lambda: functional.dequantize_4bit(codes, state)
    return found


def _print(name: str, what: str, result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    peers = "  ".join(
        f"{peer} {took * 1e3:.2f} ({took / seconds['ours']:.1f}x)"
        for peer, took in seconds.items()
        if peer != "ours"
    )
    print(
        f"{name:10}{what:>16}{seconds['ours'] * 1e3:>9.2f}"
        f"{result['traffic_bytes_per_second'] / 1e9:>8.1f}{result['share']:>11.2f}  {peers}",
        flush=True,
    )


def _missed(name: str, what: str, dtype: str, result: dict[str, Any]) -> Iterator[str]:
    least = DECODE_SHARE if what == "decode" else CAST_SHARE if name in CASTS else 0.0
    if result["share"] < least:
        yield f"{result['share']:.2f} of a copy's traffic, promised {least}"
    for peer, took in result["seconds"].items():
        promised = FASTER.get((name, what, dtype, peer))
        ratio = took / result["seconds"]["ours"]
        if promised is not None and ratio < promised:
            yield f"{ratio:.1f}x {peer}, promised {promised:.0f}x"
