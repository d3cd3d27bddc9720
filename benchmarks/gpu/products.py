"""Products with stored weights on a GPU: every way of one, at every number of rows of x.

    python -m benchmarks.gpu.products [--rehearse] [--json FILE] [--tune FILE]

Beside them torch's product of the same weight in bfloat16, bitsandbytes' NF4 where it is installed,
and the rate of copies within the device. Weights take turns so that no cache holds them, calls are
replayed from a graph so that launching costs little, and the share of the copy rate counts packed
bytes alone. --tune writes the table that python/vramkit/_routes.py reads where the environment
variable VRAMKIT_CUDA_ROUTES names the file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vramkit
from torch import Tensor
from vramkit import _routes

FORMATS = ("nf4", "nf4_dq", "int4", "int8", "fp8")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
# (out, in) features: a Linear of an 8 B model, and 100 MB of packed four-bit codes.
SHAPES = ((4096, 14336), (14336, 4096), (16384, 12288))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPEATS = 5
# More than any cache: what a round of calls reads.
ROUND_BYTES = 256 << 20
MOST_BUFFERS = 8
# Of the copy rate, by one row's packed bytes: from 100 MB on, and below.
LARGE_SHARE, SMALL_SHARE = 0.85, 0.65

Call = Callable[[int], object]


def seconds_of(call: Call, buffers: int, device: torch.device) -> float:
    """Median seconds of one call; `call` is told which of the buffers it takes."""
    if device.type == "cpu":
        call(0)
        begin = time.perf_counter()
        for n in range(buffers):
            call(n)
        return (time.perf_counter() - begin) / buffers
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for n in range(buffers):
            call(n)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(buffers):
            call(n)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / buffers)
    return statistics.median(times)


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes per second of copies within the device, read and written."""
    buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(4)]
    seconds = seconds_of(lambda n: buffers[n % 2].copy_(buffers[2 + n % 2]), 4, device)
    return 2 * nbytes / seconds


class Stored:
    """One weight several times over, packed, for products to take turns with."""

    def __init__(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        self.fmt = vramkit.get_format(name)
        self.shape = shape
        self.nbytes = self.fmt.bytes(shape).total
        self.buffers = max(2, min(MOST_BUFFERS, -(-ROUND_BYTES // self.nbytes)))
        generator = torch.Generator().manual_seed(0)
        # One sixteenth of the rows, repeated: encoding is not what is measured.
        few = torch.randn(max(1, shape[0] // 16), shape[1], generator=generator) * 0.02
        parts = torch.ops.vramkit.quantize(few, self.fmt.table_on(few.device), self.fmt.spec)
        sizes = self.fmt.bytes(shape)
        whole = [
            part.reshape(-1).repeat(-(-size // max(1, part.numel())))[:size]
            for part, size in zip(parts, (sizes.codes, sizes.scales, sizes.extra), strict=True)
        ]
        self.parts = [[part.to(device, copy=True) for part in whole] for _ in range(self.buffers)]
        self.table = self.fmt.table_on(device)

    def arguments(self, n: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        codes, scales, extra = self.parts[n % self.buffers]
        return codes, scales, extra if extra.numel() else None, self.table


def candidates(
    stored: Stored, dtype: torch.dtype, rows: int, device: torch.device
) -> dict[str, _routes.Route]:
    """The ways that can take this product, by name."""
    out_features, cols = stored.shape
    spec = stored.fmt.spec
    found = {"decode": _routes.Route("decode")}
    if device.type == "cpu":  # the kernels are a GPU's
        return found
    capability, processors = _routes.device_facts(device)
    few, tiles = _routes._kernels(spec, cols)
    columns = _routes.columns_for(dtype, rows)
    parts = _routes.columns_for(dtype, 1)
    if capability < (8, 0) and dtype != torch.float16:
        return found
    if few and columns <= 24:
        for warps in (4, 8, 16):
            _, splits = _routes._shape(_routes.FEW, out_features, cols, columns, parts, processors)
            found[f"few, {warps} warps"] = _routes.Route("packed", _routes.FEW, warps, splits)
    if tiles and columns <= 1024 and capability >= (8, 0):
        shape = _routes._shape(_routes.TILES, out_features, cols, columns, parts, processors)
        for splits in sorted({1, shape[1], 2 * shape[1]}):
            found[f"tiles, {splits} splits"] = _routes.Route("packed", _routes.TILES, 8, splits)
    return found


def bitsandbytes_call(weight: Tensor, x: Tensor) -> Call | None:
    """bitsandbytes' NF4 product of the same sizes, where it is installed."""
    try:
        module = importlib.import_module("bitsandbytes")
    except ImportError:
        return None
    packed = [
        module.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4") for _ in range(2)
    ]

    def call(n: int) -> object:
        data, state = packed[n % 2]
        return module.matmul_4bit(x, data.t(), quant_state=state)

    return call


def one_product(
    stored: Stored, dense: list[Tensor], dtype: torch.dtype, rows: int, rate: float
) -> dict[str, Any]:
    """Every way's microseconds for x [rows, in], and torch's with the decoded weight."""
    device = dense[0].device
    out_features, cols = stored.shape
    x = torch.randn(rows, cols, device=device).to(dtype)
    out = torch.empty(rows, out_features, dtype=dtype, device=device)
    times = {}
    for name, route in candidates(stored, dtype, rows, device).items():

        def call(n: int, route: _routes.Route = route) -> None:
            _routes.run(route, x, *stored.arguments(n), None, stored.fmt.spec, out)

        times[name] = 1e6 * seconds_of(call, stored.buffers, device)
    best = min(times, key=lambda name: times[name])
    # torch in the dtype that it multiplies best: bfloat16, unless x is float32.
    wide = x if dtype == torch.float32 else x.to(dense[0].dtype)
    weights = [w.to(wide.dtype) for w in dense] if wide.dtype != dense[0].dtype else dense
    torch_us = 1e6 * seconds_of(
        lambda n: wide @ weights[n % len(weights)].t(), len(weights), device
    )
    result: dict[str, Any] = {
        "format": stored.fmt.name,
        "out": out_features,
        "in": cols,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "us": times,
        "best": best,
        "torch_us": torch_us,
        "of_torch": times[best] / torch_us,
        "of_copy": stored.nbytes / (times[best] * 1e-6) / rate,
    }
    if stored.fmt.name == "nf4" and dtype == torch.bfloat16 and device.type == "cuda":
        other = bitsandbytes_call(dense[0], wide)
        if other is not None:
            result["bitsandbytes_us"] = 1e6 * seconds_of(other, 2, device)
    return result


def tuned(found: list[dict[str, Any]], capability: tuple[int, int]) -> dict[str, Any]:
    """Limits for the table of routes: rows up to which each kernel is the fastest, over shapes."""
    kinds: dict[str, dict[str, dict[str, int]]] = {}
    keys = {(f"{vramkit.get_format(r['format']).bits} bit", r["dtype"]) for r in found}
    for kind, dtype in sorted(keys):
        few = tiles = 0
        few_open = tiles_open = True
        for rows in sorted({r["rows"] for r in found}):
            total = dict.fromkeys(("few", "tiles", "decode"), 0.0)
            for r in found:
                mine = f"{vramkit.get_format(r['format']).bits} bit" == kind
                if not mine or r["dtype"] != dtype or r["rows"] != rows:
                    continue
                for way in total:
                    ways = [us for name, us in r["us"].items() if name.startswith(way)]
                    total[way] += min(ways, default=float("inf"))
            few_open = few_open and total["few"] < min(total["tiles"], total["decode"])
            tiles_open = tiles_open and min(total["few"], total["tiles"]) < total["decode"]
            few = rows if few_open else few
            tiles = rows if tiles_open else tiles
        kinds.setdefault(kind, {})[dtype] = {"few": few, "tiles": tiles}
    return {"routes": {f"{capability[0]}.{capability[1]}": kinds}}


def line_of(r: dict[str, Any]) -> str:
    peer = f"{r['bitsandbytes_us']:>9.1f}" if "bitsandbytes_us" in r else f"{'':9}"
    return (
        f"  {r['format']:7} {r['out']:>6} x {r['in']:<6} {r['dtype']:9} {r['rows']:>5} "
        f"{r['us'][r['best']]:>9.1f} {r['torch_us']:>9.1f} {r['of_torch']:>6.2f} "
        f"{r['of_copy']:>6.2f} {peer}  {r['best']}"
    )


def run(rehearse: bool) -> dict[str, Any]:
    """Measure and print; the results, what was promised and missed, and a tuned table."""
    device = torch.device("cpu" if rehearse else "cuda:0")
    shapes = ((64, 128),) if rehearse else SHAPES
    rows_list = (1, 4, 32) if rehearse else ROWS
    rate = copy_rate(device, (1 if rehearse else 256) << 20)
    if rehearse:
        print("REHEARSAL on a CPU: these are no measurements")
    print(f"products: copy within the device {rate / 1e9:.1f} GB/s")
    print(
        f"  {'format':7} {'out x in':15} {'x':9} {'rows':>5} {'us':>9} {'torch us':>9} "
        f"{'ratio':>6} {'memory':>6} {'bnb us':>9}  fastest way"
    )
    found = []
    for shape in shapes:
        count = 2 if rehearse else max(2, min(4, -(-ROUND_BYTES // (2 * shape[0] * shape[1]))))
        dense = [
            torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02 for _ in range(count)
        ]
        for name in FORMATS:
            stored = Stored(name, shape, device)
            for dtype in DTYPES if name in ("nf4", "int8") else DTYPES[:1]:
                # float16 and float32 only where their limits lie.
                most = max(rows_list) if dtype == torch.bfloat16 else 128
                for rows in rows_list:
                    if rows > most or (dtype != torch.bfloat16 and shape != shapes[0]):
                        continue
                    found.append(one_product(stored, dense, dtype, rows, rate))
                    print(line_of(found[-1]), flush=True)
            del stored
        del dense
    missed = []
    for r in found:
        if rehearse or r["dtype"] != "bfloat16":
            continue
        what = f"{r['format']} {r['out']} x {r['in']}, {r['rows']} rows"
        share = LARGE_SHARE if r["out"] * r["in"] == 16384 * 12288 else SMALL_SHARE
        if r["rows"] == 1 and r["of_copy"] < share:
            missed.append(f"{what}: {r['of_copy']:.2f} of the copy rate, wanted {share}")
        ceiling = 1.0 if r["rows"] <= 64 else (1.4 if r["rows"] <= 1024 else 1.1)
        if r["of_torch"] > ceiling:
            missed.append(f"{what}: {r['of_torch']:.2f} of torch's time, wanted {ceiling}")
        if "bitsandbytes_us" in r and r["bitsandbytes_us"] < 1.5 * r["us"][r["best"]]:
            missed.append(f"{what}: not 1.5 times as fast as bitsandbytes")
    for text in missed:
        print(f"  MISSED {text}")
    facts = (0, 0) if rehearse else _routes.device_facts(device)[0]
    return {
        "rehearsal": rehearse,
        "copy_gb_s": rate / 1e9,
        "products": found,
        "missed": missed,
        "tuned": tuned(found, facts),
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU: no measurement")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tune", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.rehearse)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.tune:
        arguments.tune.write_text(json.dumps(result["tuned"], indent=1) + "\n")


if __name__ == "__main__":
    main()
