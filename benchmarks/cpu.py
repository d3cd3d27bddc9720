"""One Linear on the CPU: ours, torch and the peers in turn, beside the limit of the machine.

Weights come from memory (enough layers in turn that none is in cache) or stay in cache (one layer).
The limit is the larger of two times, both measured in the same minute: the packed bytes over the
read rate (nothing where the weight is in cache), and the products over the rate of the dot-product
instruction, to which formats with a scale for each block of a row add an FMA a block.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import vramkit
from torch import nn

from .peers import MAKERS
from .runner import in_turn, product_rate, read_rate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
FORMATS = ("nf4", "nf4_dq", "fp4", "int4", "int4_g32", "int8", "fp8", "fp8_e5m2", "bf16", "fp16")
PEERS: dict[str, tuple[str, ...]] = {
    "nf4": ("bitsandbytes nf4", "bitsandbytes nf4, not repacked"),
    "int4": ("torch int4pack", "quanto qint4"),
    "int8": ("torch int8pack", "quanto qint8", "torchao int8"),
    "fp8": ("quanto qfloat8", "torchao float8"),
}
# (in, out) features of Linears in SmolLM2-135M and in Qwen-Image's transformer.
SHAPES = ((4096, 4096), (576, 1536), (3072, 12288))
_CACHE_BYTES = 96 << 20  # more than the caches of the machines in use
# The share of the best rate of products seen so far that a case must have had to count.
_UNDISTURBED = 0.8
# Elements that one dot-product instruction takes; a scale costs one FMA beside them.
_LANES = 32


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    cols: int
    out: int
    name: str
    dtype: str
    rows: int
    threads: int
    cold: bool

    @property
    def key(self) -> str:
        """Its name in the results."""
        place = "memory" if self.cold else "cache"
        return (
            f"{self.name} {self.cols}x{self.out} {self.dtype} rows {self.rows} "
            f"threads {self.threads} {place}"
        )

    @property
    def packed(self) -> int:
        """Bytes of the stored weight."""
        return vramkit.get_format(self.name).bytes((self.out, self.cols)).total

    @property
    def baseline(self) -> str:
        """torch's own product: of the input's dtype, float16 against float32."""
        return "torch bf16" if self.dtype == "bf16" else "torch fp32"


def cases(options: Any) -> Iterator[Case]:
    """Everything at 4096 x 4096; other shapes and dtypes where a promise or a user needs them."""
    threads = sorted({1, options.threads})
    size = options.size
    for count, cold in itertools.product(threads, (True, False)):
        for name, rows in itertools.product(options.formats or FORMATS, options.rows):
            yield Case(size, size, name, "bf16", rows, count, cold)
    if options.quick:
        return
    for name, dtype, rows in itertools.product(
        options.formats or ("nf4", "int4", "int8", "fp8"), ("fp32", "fp16"), options.rows
    ):
        yield Case(size, size, name, dtype, rows, options.threads, True)
    if size != SHAPES[0][0]:
        return
    for (cols, out), cold in itertools.product(SHAPES[1:], (True, False)):
        for name, rows in itertools.product(
            options.formats or ("nf4", "int4", "int8", "fp8"), options.rows
        ):
            yield Case(cols, out, name, "bf16", rows, options.threads, cold)


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Milliseconds by case, with the limit; and the promised figures that were missed."""
    found: dict[str, Any] = {}
    missed: list[str] = []
    best: dict[tuple[int, str], float] = {}
    group = None
    for case in cases(options):
        torch.set_num_threads(case.threads)
        heading = (case.cols, case.out, case.dtype, case.threads, case.cold)
        if heading != group:
            group = heading
            place = "memory" if case.cold else "cache"
            print(
                f"\n{case.cols} -> {case.out}, {case.dtype} input, {case.threads} threads, {place}"
            )
            print(
                f"{'format':10}{'rows':>5}{'ours ms':>9}{'limit':>9}{'share':>7}  peers: ms (ratio)"
            )
        result = measure(case)
        kind = case.threads, case.dtype
        for _ in range(2):
            best[kind] = max(best.get(kind, 0.0), result["products_per_second"])
            if result["products_per_second"] >= _UNDISTURBED * best[kind]:
                break
            print("  the machine was busy with something else; again:")
            result = measure(case)
        result["disturbed"] = result["products_per_second"] < _UNDISTURBED * best[kind]
        found[case.key] = result
        if result["disturbed"]:
            continue
        missed += [f"{case.key}: {text}" for text in _missed(case, result)]
    return found, missed


def measure(case: Case) -> dict[str, Any]:
    """Seconds of ours and the peers, in turn, and the limit of the same minute."""
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.rows, case.cols).to(dtype)
    held = torch.float32 if dtype == torch.float16 else dtype
    x_plain = x.to(held)
    work = {
        "ours": _rotating(case, held, case.name, x),
        case.baseline: _rotating(case, held, "plain", x_plain),
    }
    for peer in PEERS.get(case.name, ()) if dtype != torch.float16 else ():
        try:
            work[peer] = _rotating(case, held, peer, x)
        except (ImportError, RuntimeError) as error:
            print(f"{peer}: not measured ({error})")
    rate, products = read_rate(), product_rate(x_plain.dtype)
    seconds = in_turn(work, repeats=21, slowest=0.5)
    rate, products = max(rate, read_rate()), max(products, product_rate(x_plain.dtype))
    memory = case.packed / rate if case.cold else 0.0
    ports = case.rows * case.cols * case.out * (1 + _scale_work(case)) / products
    ours = seconds["ours"]
    peers = "  ".join(
        f"{peer} {took * 1e3:.3f} ({took / ours:.2f}x)"
        for peer, took in seconds.items()
        if peer != "ours"
    )
    share = max(memory, ports) / ours
    print(
        f"{case.name:10}{case.rows:>5}{ours * 1e3:>9.3f}{max(memory, ports) * 1e3:>9.3f}"
        f"{share:>7.2f}  {peers}",
        flush=True,
    )
    return {
        "seconds": seconds,
        "memory_limit_seconds": memory,
        "port_limit_seconds": ports,
        "share": share,
        "read_bytes_per_second": rate,
        "products_per_second": products,
    }


def _scale_work(case: Case) -> float:
    """FMAs for scales as a share of the dot products: one for each block of a row."""
    fmt = vramkit.get_format(case.name)
    if case.dtype != "bf16" or case.rows > 8 or not 0 < fmt.block < case.cols:
        return 0.0
    return _LANES / fmt.block


def _missed(case: Case, result: dict[str, Any]) -> Iterator[str]:
    """What the project promises of this case and did not hold."""
    seconds = result["seconds"]
    ours = seconds["ours"]

    def slower(peer: str, least: float) -> Iterator[str]:
        if peer in seconds and seconds[peer] / ours < least:
            yield f"{seconds[peer] / ours:.2f}x {peer}, promised {least:.2f}x"

    if case.dtype == "bf16" and case.cold and case.rows in (1, 8):
        least = 0.75 if case.rows == 1 else 0.65
        if result["share"] < least:
            yield f"{result['share']:.2f} of the limit, promised {least}"
    if case.rows in (64, 512):
        yield from slower(case.baseline, 1 / 1.1)
    if case.name == "nf4" and case.rows == 1 and case.dtype == "bf16":
        yield from slower("bitsandbytes nf4, not repacked", 30)
        yield from slower("bitsandbytes nf4", 1)
        if case.cold:
            yield from slower("torch bf16", 3)
    if case.dtype == "bf16" and case.rows == 1:
        yield from slower("quanto qfloat8", 60)
        yield from slower("torchao float8", 80)
    if case.dtype == "bf16":
        yield from slower("torch int8pack", 2 if case.rows == 512 else 1)
        yield from slower("torch int4pack", 2 if case.rows == 512 else 1)


def _rotating(case: Case, held: torch.dtype, what: str, x: torch.Tensor) -> Callable[[], Any]:
    """A call that runs the next of enough layers, so that its weight is in memory, or of one."""
    nbytes = case.cols * case.out * held.itemsize if what == "plain" else case.packed
    count = max(2, -(-_CACHE_BYTES // nbytes)) if case.cold else 1
    layers = _layers(case.cols, case.out, held, what, count)
    with torch.inference_mode():
        for layer in layers:  # some repack their weight at the first call
            layer(x)
    turn = itertools.cycle(layers)

    def call() -> Any:
        with torch.inference_mode():
            return next(turn)(x)

    return call


@functools.lru_cache(maxsize=8)  # as many as a case has: the next one has other rows
def _layers(cols: int, out: int, held: torch.dtype, what: str, count: int) -> list[nn.Module]:
    """`count` layers with one random weight: plain, in a storage format, or a peer's."""
    weight = torch.randn(out, cols).mul_(cols**-0.5).to(held)
    made = []
    for _ in range(count):
        layer = nn.utils.skip_init(nn.Linear, cols, out, bias=False, dtype=held)
        with torch.no_grad():
            layer.weight.copy_(weight)
        model: nn.Module = nn.Sequential(layer)
        if what in MAKERS:
            model = MAKERS[what](model)
        elif what != "plain":
            vramkit.convert(model, what)
        made.append(model)
    return made
