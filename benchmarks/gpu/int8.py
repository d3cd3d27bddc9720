"""Dynamic INT8, LLM.int8 and recurrent layers on a GPU, beside what users have without them.

python -c "from benchmarks.gpu.int8 import run; run(rehearse=False)"

Linear layers against torch's bfloat16 product, LLM.int8 against bitsandbytes where it is installed,
LSTM and GRU against torch's own (cuDNN, float32 and float16). All in CUDA graphs too, where a call
from Python takes longer than its work. Layers take turns, so that no cache holds their weights.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import vramkit
from torch import nn

ROWS = (1, 16, 64, 512, 4096)
SHAPES = ((4096, 4096), (4096, 14336))
# Layers, input, units, steps.
RECURRENT: tuple[tuple[str, type[nn.RNNBase], int, int, int], ...] = (
    ("LSTM 512-512, 50 steps", nn.LSTM, 512, 512, 50),
    ("GRU 1024-1024, 20 steps", nn.GRU, 1024, 1024, 20),
)
BATCHES = (1, 8, 64)
# Promised: bfloat16's time over int8_dynamic's, at this many rows.
WANTED = {512: 1.3}
_ROUNDS = 7
_COLD_BYTES = 256 << 20  # of weights that take turns

Call = Callable[[], Any]


def seconds_of(work: Call, device: torch.device) -> float:
    """The median of several runs."""
    times = []
    for _ in range(2):
        work()
    for _ in range(_ROUNDS):
        if device.type == "cpu":
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graphed(work: Call, device: torch.device) -> Call:
    """The same as one launch; itself where there are no graphs."""
    if device.type == "cpu":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def converted(plain: nn.Module, name: str, device: torch.device) -> nn.Module:
    """A copy in that format, on the device. (Weights are encoded on the CPU.)"""
    model = nn.Sequential(copy.deepcopy(plain))
    vramkit.convert(model, name)
    return model.to(device).eval()


def bitsandbytes_layer(plain: nn.Linear, device: torch.device) -> nn.Module | None:
    """Its Linear8bitLt, or None where it is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    layer = bnb.nn.Linear8bitLt(
        plain.in_features, plain.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False)
    made: nn.Module = layer.to(device).eval()
    return made


def linear(rows: int, cols: int, out: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of each kind of layer, called, and in a graph where it can be captured."""
    plain = nn.Linear(cols, out, bias=False)
    kinds: dict[str, Callable[[], nn.Module | None]] = {
        "bf16": lambda: copy.deepcopy(plain).to(device, torch.bfloat16),
        "int8_dynamic": lambda: converted(plain, "int8_dynamic", device),
        "llm_int8": lambda: converted(plain, "llm_int8", device),
        "llm_int8, 4 outliers": lambda: converted(plain, "llm_int8", device),
        "bitsandbytes": lambda: bitsandbytes_layer(plain, device),
    }
    found = []
    for name, make in kinds.items():
        first = make()
        if first is None:
            print("bitsandbytes: not installed, not measured")
            continue
        small = device.type == "cpu"
        count = 2 if small else max(2, min(16, _COLD_BYTES // (cols * out)))
        layers = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        x = torch.randn(rows, cols, dtype=torch.bfloat16).clamp_(-5, 5)
        if name.endswith("outliers"):
            x[:, :: cols // 4] = 20.0
        x = x.to(device)
        turn = itertools.cycle(layers)

        def once(turn: Any = turn, x: torch.Tensor = x) -> Any:
            return next(turn)(x)

        def all_of(layers: Any = layers, x: torch.Tensor = x) -> None:
            for layer in layers:
                layer(x)

        seconds = seconds_of(once, device)
        # bitsandbytes looks at its outliers on the host, which no graph can record.
        in_graph = None
        if name != "bitsandbytes":
            in_graph = seconds_of(graphed(all_of, device), device) / count
        found.append(
            {"name": name, "rows": rows, "cols": cols, "out": out, "seconds": seconds,
             "graph_seconds": in_graph}
        )  # fmt: skip
    return found


def recurrent(
    name: str, kind: type[nn.RNNBase], features: int, units: int, steps: int, batch: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of a layer in int8_dynamic and as torch has it, called and in a graph."""
    plain = kind(features, units).eval()
    x = torch.randn(steps, batch, features, device=device)
    layers = {
        "int8_dynamic": (converted(plain, "int8_dynamic", device), x),
        "float32": (copy.deepcopy(plain).to(device), x),
        "float16": (copy.deepcopy(plain).to(device, torch.float16), x.half()),
    }
    row: dict[str, Any] = {"name": name, "batch": batch}
    for what, (layer, given) in layers.items():

        def once(layer: nn.Module = layer, given: torch.Tensor = given) -> Any:
            return layer(given)

        row[what] = seconds_of(once, device)
        row[f"{what}, graph"] = seconds_of(graphed(once, device), device)
    return row


def run(rehearse: bool) -> dict[str, Any]:
    """Measure and print; `rehearse` runs all of it, small and on the CPU, which measures nothing.

    Returns the rows of both tables, and the promised figures that were missed.
    """
    device = torch.device("cpu" if rehearse else "cuda:0")
    if rehearse:
        print("REHEARSAL on a CPU: these are no measurements")
    shapes = ((64, 96),) if rehearse else SHAPES
    missed: list[str] = []
    layers: list[dict[str, Any]] = []
    print("linear layers, bfloat16 in       us   in a graph   times bf16")
    with torch.inference_mode():
        for (cols, out), rows in itertools.product(shapes, (1, 40) if rehearse else ROWS):
            made = linear(rows, cols, out, device)
            bf16 = next(row for row in made if row["name"] == "bf16")
            for row in made:
                best = row["graph_seconds"] or row["seconds"]
                row["times_bf16"] = bf16["graph_seconds"] / best
                in_graph = "" if row["graph_seconds"] is None else f"{best * 1e6:.1f}"
                print(
                    f"  {cols} -> {out}, {rows:>4} rows, {row['name']:<22}"
                    f"{row['seconds'] * 1e6:>9.1f}{in_graph:>10}{row['times_bf16']:>8.2f}"
                )
                wanted = WANTED.get(rows, 0.0) if row["name"] == "int8_dynamic" else 0.0
                if not rehearse and row["times_bf16"] < wanted:
                    missed.append(
                        f"int8_dynamic, {cols} -> {out}, {rows} rows: {row['times_bf16']:.2f} "
                        f"times bf16 (wanted: {wanted})"
                    )
            layers += made
        small = (("LSTM 8-8, 3 steps", nn.LSTM, 8, 8, 3),)
        steps = []
        print("recurrent layers, us in a graph   int8_dynamic   float32   float16")
        for case, batch in itertools.product(small if rehearse else RECURRENT, BATCHES):
            row = recurrent(*case, batch, device)
            times = "".join(
                f"{row[f'{what}, graph'] * 1e6:>12.1f}"
                for what in ("int8_dynamic", "float32", "float16")
            )
            print(f"  {row['name']:<24} batch {row['batch']:>3} {times}")
            steps.append(row)
    for line in missed:
        print("MISSED", line)
    return {"rehearsal": rehearse, "linear": layers, "recurrent": steps, "missed": missed}
