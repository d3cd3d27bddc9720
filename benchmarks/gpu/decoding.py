"""Decoders and casts, beside a copy's rate measured in the same run."""

from __future__ import annotations

from typing import Any

import torch
import vramkit

from .clock import Clock

FORMATS = ("bf16", "fp8", "int8", "int4", "nf4", "nf4_dq")
WANTED = 0.85


def run(rehearse: bool) -> dict[str, Any]:
    """Bytes read and written per second, and their share of a copy's."""
    clock = Clock(rehearse)
    shapes = [(64, 256)] if rehearse else [(4096, 14336), (16384, 16384)]
    copy_rate = clock.copy_rate()
    rows = [decode(clock, name, *shape, copy_rate) for shape in shapes for name in FORMATS]
    rows += [cast(clock, name, *shapes[-1], copy_rate) for name in ("fp16", "bf16")]
    lines = [f"{'':24} GB/s  of a copy's {copy_rate / 1e9:.1f} (wanted: {WANTED})"]
    for row in rows:
        label = f"{row['what']} {row['rows']} x {row['cols']}"
        lines.append(f"  {label:26} {row['gb_s']:>8.1f}  {row['of_copy']:.2f}")
    missed = [
        f"{r['what']}: {r['of_copy']:.2f} of a copy"
        for r in rows
        if r["of_copy"] < WANTED and not rehearse
    ]
    print("\n".join(lines))
    return {"data": {"copy_gb_s": copy_rate / 1e9, "rows": rows}, "missed": missed}


def decode(clock: Clock, name: str, rows: int, cols: int, copy_rate: float) -> dict[str, Any]:
    """To bfloat16, from weights that take turns."""
    device = clock.device
    fmt = vramkit.get_format(name)
    table = fmt.table_on(torch.device("cpu"))
    parts = torch.ops.vramkit.quantize(torch.randn(rows, cols) * 0.02, table, fmt.spec)
    stored = sum(part.numel() * part.element_size() for part in parts if part is not None)
    nbytes = stored + 2 * rows * cols
    count = clock.copies(nbytes)
    weights = [
        tuple(part if part is None else part.to(device, copy=True) for part in parts)
        for _ in range(count)
    ]
    outs = [torch.empty(rows, cols, dtype=torch.bfloat16, device=device) for _ in range(count)]
    codebook = fmt.table_on(device)

    def work(n: int) -> None:
        codes, scales, extra = weights[n % count]
        torch.ops.vramkit._dequantize_out(
            codes, scales, extra, codebook, fmt.spec, rows, cols, 0, outs[n % count]
        )

    return rated(f"decode {name}", rows, cols, nbytes, clock.median(work), copy_rate)


def cast(clock: Clock, name: str, rows: int, cols: int, copy_rate: float) -> dict[str, Any]:
    """From float32 to a format of 16 bits."""
    fmt = vramkit.get_format(name)
    nbytes = 6 * rows * cols
    weights = [torch.randn(rows, cols, device=clock.device) for _ in range(clock.copies(nbytes))]
    table = fmt.table_on(clock.device)
    seconds = clock.median(
        lambda n: torch.ops.vramkit.quantize(weights[n % len(weights)], table, fmt.spec)
    )
    return rated(f"cast {name}", rows, cols, nbytes, seconds, copy_rate)


def rated(
    what: str, rows: int, cols: int, nbytes: int, seconds: float, copy_rate: float
) -> dict[str, Any]:
    """One line of the result."""
    rate = nbytes / seconds
    return {"what": what, "rows": rows, "cols": cols, "seconds": seconds, "gb_s": rate / 1e9,
            "of_copy": rate / copy_rate}  # fmt: skip
