"""Decoding and offloading on a GPU, beside what the device itself can do, measured in the same run.

python -m benchmarks.gpu.bench [--rehearse] [--json FILE] [--table FILE]

Limits: bytes per second of a copy within the device (read and written), and of copies from pinned
memory to it. Decoding counts the bytes it reads and writes, from buffers that take turns so that no
cache holds them. Offloading counts the bytes that blocks asked for, over whole passes, once with
nothing to compute and once with products that take longer than the copies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vramkit
from vramkit import _core

FORMATS = ("bf16", "fp8", "int8", "int4", "nf4", "nf4_dq")
ROUNDS = 7


class Clock:
    """Seconds that work on a device takes, by its own events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, work: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, work: Callable[[int], object]) -> float:
        """Of several runs, which are told their number so that they can change buffers."""
        work(0)
        return statistics.median(self.once(lambda n=n: work(n)) for n in range(1, ROUNDS + 1))


def limits(clock: Clock, nbytes: int) -> dict[str, float]:
    """GB/s of copies within the device and from pinned memory."""
    device = clock.device
    buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(4)]
    copy = clock.median(lambda n: buffers[n % 2].copy_(buffers[2 + n % 2]))
    store = _core.HostStore(nbytes, device=str(device) if device.type == "cuda" else "cpu")
    pinned = torch.frombuffer(store, dtype=torch.uint8)
    pinned.fill_(1)
    link = clock.median(lambda n: buffers[n % 4].copy_(pinned, non_blocking=True))
    return {"copy_gb_s": 2 * nbytes / copy / 1e9, "link_gb_s": nbytes / link / 1e9}


def decoding(clock: Clock, rows: int, cols: int, copy_rate: float) -> list[dict[str, Any]]:
    """Rate of each format's decoder, and its share of the copy rate."""
    device = clock.device
    results = []
    for name in FORMATS:
        fmt = vramkit.get_format(name)
        table = fmt.table_on(torch.device("cpu"))
        parts = torch.ops.vramkit.quantize(torch.randn(rows, cols) * 0.02, table, fmt.spec)
        stored = sum(part.numel() for part in parts)
        written = 2 * rows * cols
        # Enough copies that they do not fit into any cache at once.
        count = max(2, min(16, (256 << 20) // (stored + written)))
        weights = [tuple(part.to(device, copy=True) for part in parts) for _ in range(count)]
        outs = [torch.empty(rows, cols, dtype=torch.bfloat16, device=device) for _ in range(count)]
        codebook = fmt.table_on(device)

        def decode(
            n: int,
            weights: Any = weights,
            outs: Any = outs,
            fmt: Any = fmt,
            codebook: Any = codebook,
        ) -> None:
            codes, scales, extra = weights[n % len(weights)]
            torch.ops.vramkit._dequantize_out(
                codes,
                scales,
                extra,
                codebook,
                fmt.spec,
                rows,
                cols,
                0,
                outs[n % len(outs)],
            )

        seconds = clock.median(decode)
        rate = (stored + written) / seconds / 1e9
        results.append(
            {
                "format": name,
                "rows": rows,
                "cols": cols,
                "seconds": seconds,
                "gb_s": rate,
                "of_copy": rate / copy_rate,
            }
        )
    return results


def offloading(clock: Clock, count: int, nbytes: int, link_rate: float) -> dict[str, Any]:
    """Passes over blocks in pinned memory, two of which fit: rate, and time beside residents."""
    device = clock.device
    on_gpu = device.type == "cuda"
    name = "cuda:0" if on_gpu else "cpu"
    store = _core.HostStore(count * nbytes, device=name)
    torch.frombuffer(store, dtype=torch.uint8).fill_(3)
    specs = [
        _core.BlockSpec(
            f"block{i}",
            nbytes,
            [_core.Extent(0, i * nbytes, 0, nbytes)],
            _core.Residence.streamed,
        )
        for i in range(count)
    ]
    granularity = 2 << 20
    limit = 4 * (nbytes + granularity)
    engine = _core.Engine(
        [store.source()], specs, limit=limit, granularity=granularity, device=name
    )
    stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
    side = int((nbytes // 2) ** 0.5) // 64 * 64

    def run(products: int, x: torch.Tensor) -> None:
        for block in range(count):
            address = engine.acquire(block, stream)
            weight = torch.from_dlpack(engine.window(address, nbytes))
            weight = weight[: 2 * side * side].view(torch.bfloat16).view(side, side)
            for _ in range(products):
                x = x @ weight
            engine.release(block, stream)

    one = torch.zeros(1, side, dtype=torch.bfloat16, device=device)
    transfer = clock.median(lambda _: run(0, one))
    # As many rows that the products take some three times as long as the copies.
    rows = 4096 if on_gpu else 64
    x = torch.zeros(rows, side, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(side, side, dtype=torch.bfloat16, device=device)
    product = clock.median(lambda _: x @ weight)
    products = max(1, round(3 * transfer / count / product))

    def resident() -> None:
        y = x
        for _ in range(count * products):
            y = y @ weight

    alone = clock.median(lambda _: resident())
    streamed = clock.median(lambda _: run(products, x))
    stats = engine.stats()
    result = {
        "blocks": count,
        "block_bytes": nbytes,
        "transfer_bound_gb_s": count * nbytes / transfer / 1e9,
        "of_link": count * nbytes / transfer / 1e9 / link_rate,
        "compute_bound_over_resident": streamed / alone,
        "waits": stats.waits,
        "displaced": stats.displaced,
    }
    engine.close()
    return result


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU: no measurement")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.rehearse else "cuda:0")
    clock = Clock(device)
    small = arguments.rehearse
    found = limits(clock, (4 if small else 512) << 20)
    shapes = [(64, 256)] if small else [(4096, 14336), (16384, 16384)]
    decoders = [row for shape in shapes for row in decoding(clock, *shape, found["copy_gb_s"])]
    blocks = offloading(clock, 6, (1 if small else 128) << 20, found["link_gb_s"])
    lines = [
        f"copy within the device {found['copy_gb_s']:.1f} GB/s, from pinned memory "
        f"{found['link_gb_s']:.1f} GB/s",
        "decoding to bfloat16         GB/s  of the copy rate (wanted: 0.85)",
    ]
    for row in decoders:
        lines.append(
            f"  {row['format']:8} {row['rows']:>6} x {row['cols']:<6} {row['gb_s']:>8.1f}  "
            f"{row['of_copy']:.2f}"
        )
    lines.append(
        f"offload: {blocks['transfer_bound_gb_s']:.1f} GB/s, {blocks['of_link']:.2f} of the link "
        f"(wanted: 0.90); with arithmetic {blocks['compute_bound_over_resident']:.3f} of resident "
        "(wanted: 1.03)"
    )
    if small:
        lines.insert(0, "REHEARSAL on a CPU: these are no measurements")
    print("\n".join(lines))
    if arguments.table:
        arguments.table.write_text("\n".join(lines) + "\n")
    if arguments.json:
        result = {"rehearsal": small, "limits": found, "decoding": decoders, "offload": blocks}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
