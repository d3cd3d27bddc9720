"""Work over a model's 300 gradients and parameters: ours and torch's passes, beside the memory.

Tensors of odd sizes, more bytes than the caches hold. The limit of a pass is the bytes that it must
move, read or written, over the rate at which torch sums a buffer, measured in turn with the rest.
One thread is timed by its own processor time, several by the clock on the wall.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vramkit.training import AdamW, cast_, gradient_norm, scale_

from .runner import in_turn

TENSORS = 300
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What is promised, against torch's passes one after another.
NORM_RATIO = 3.0
STEP_RATIO = 1.0
# The share of the memory's rate that counts as reaching it.
AT_RATE = 0.8


def timed(work: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, and under "byte" those of reading one."""
    alone = torch.get_num_threads() == 1
    buffer = torch.ones(16 << 20, dtype=torch.int64)
    times = in_turn(
        {**work, "byte": buffer.sum},
        repeats=9,
        slowest=1.0,
        clock=time.thread_time if alone else time.perf_counter,
    )
    times["byte"] /= buffer.numel() * buffer.element_size()
    return times


def sizes(elements: int) -> list[int]:
    """Odd sizes from a few hundred elements to some hundred thousand, `elements` together."""
    weights = [1.0 / (1 + k % 25) ** 1.5 for k in range(TENSORS)]
    total = sum(weights)
    return [int(elements * w / total) // 2 * 2 + 1 for w in weights]


def gradients(elements: int, name: str) -> list[Tensor]:
    """Random gradients of one dtype, or of all three in turn."""
    kinds = list(DTYPES.values()) if name == "mixed" else [DTYPES[name]]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, generator=generator).to(kinds[k % len(kinds)])
        for k, n in enumerate(sizes(elements))
    ]


def torch_passes(tensors: list[Tensor]) -> Callable[[], Tensor]:
    """Unscaling with its check, the norm, and clipping, as a training loop calls them.

    Scale and clip are such that nothing changes: the passes are the same.
    """
    by_dtype = [[t for t in tensors if t.dtype == d] for d in DTYPES.values()]
    lists = [ts for ts in by_dtype if ts]
    one = torch.ones((), device=tensors[0].device)

    def run() -> Tensor:
        found = torch.zeros_like(one)
        for ts in lists:
            torch._amp_foreach_non_finite_check_and_unscale_(ts, found, one)
        norms = [n.float() for ts in lists for n in torch._foreach_norm(ts)]
        total = torch.linalg.vector_norm(torch.stack(norms))
        factor = torch.clamp(1e9 / (total + 1e-6), max=1.0)
        for ts in lists:
            torch._foreach_mul_(ts, factor.to(ts[0].dtype))
        return total

    return run


def norms(elements: int) -> tuple[dict[str, Any], list[str]]:
    """Unscale, check, norm and clip: one read, where the step takes the factor."""
    found, missed = {}, []
    print(
        f"unscale + inf/nan check + norm + clip, {TENSORS} tensors, {elements / 1e6:.0f} M elements"
    )
    heads = ("ours ms", "limit", "GB/s", "+ pass", "torch", "ratio")
    print(f"{'gradients':12}" + "".join(f"{head:>8}" for head in heads))
    for name in (*DTYPES, "mixed"):
        tensors = gradients(elements, name)
        nbytes = sum(t.numel() * t.element_size() for t in tensors)

        def with_pass(tensors: list[Tensor] = tensors) -> None:
            gradient_norm(tensors, scale=1.0, clip=1e9)
            scale_(tensors, 0.99999994)  # for a step that takes no factor

        times = timed(
            {
                "ours": lambda ts=tensors: gradient_norm(ts, scale=1.0, clip=1e9),
                "ours with a scaling pass": with_pass,
                "torch": torch_passes(tensors),
            }
        )
        limit = nbytes * times.pop("byte")
        ratio = times["torch"] / times["ours"]
        found[name] = {
            **times,
            "limit": limit,
            "bytes": nbytes,
            "ratio": ratio,
            "ratio with a scaling pass": times["torch"] / times["ours with a scaling pass"],
        }
        print(
            f"{name:12}{times['ours'] * 1e3:8.2f}{limit * 1e3:8.2f}"
            f"{nbytes / times['ours'] / 1e9:8.1f}{times['ours with a scaling pass'] * 1e3:8.2f}"
            f"{times['torch'] * 1e3:8.2f}{ratio:8.2f}"
        )
        if ratio < NORM_RATIO:
            missed.append(f"norm of {name}: {ratio:.2f} of {NORM_RATIO} times torch's passes")
        if limit / times["ours"] < AT_RATE:
            missed.append(f"norm of {name}: {limit / times['ours']:.0%} of the memory's rate")
    return found, missed


# Options of our AdamW by name, the parameters' dtype, and bytes moved for each of them beside the
# gradient's: weights and what is kept with them, and state, each read and written (a copy of a
# master is only written).
VARIANTS: dict[str, tuple[dict[str, Any], torch.dtype, int]] = {
    "fp32": ({}, torch.float32, 8 + 16),
    "fp32, amsgrad": ({"amsgrad": True}, torch.float32, 8 + 24),
    "fp32, 8-bit state": ({"state_bits": 8}, torch.float32, 8 + 4),
    "bf16, fp32 masters": ({"masters": "fp32"}, torch.bfloat16, 10 + 16),
    "bf16, compensated": ({"masters": "compensated"}, torch.bfloat16, 8 + 16),
    "bf16, compensated, 8-bit state": (
        {"masters": "compensated", "state_bits": 8},
        torch.bfloat16,
        8 + 4,
    ),
    "bf16, stochastic rounding": ({"rounding": "stochastic"}, torch.bfloat16, 4 + 16),
    "fp16, fp32 masters": ({"masters": "fp32"}, torch.float16, 10 + 16),
}


def ours(elements: int, options: dict[str, Any], dtype: torch.dtype) -> Callable[[], object]:
    """A step of our AdamW on parameters of its own."""
    parameters = [nn.Parameter(torch.randn(n).to(dtype)) for n in sizes(elements)]
    for p in parameters:
        p.grad = torch.randn(p.shape).to(dtype)
    optimizer = AdamW(parameters, lr=1e-4, **options)
    return lambda: optimizer.step(factor=1.0)


def theirs(elements: int, options: dict[str, Any], dtype: torch.dtype) -> Callable[[], object]:
    """torch's fused AdamW, on float32 masters where parameters have 16 bits."""
    halves = [torch.randn(n).to(dtype) for n in sizes(elements)]
    parameters = [nn.Parameter(h.float()) for h in halves]
    sources = [torch.randn(p.shape).to(dtype) for p in parameters]
    for p, g in zip(parameters, sources, strict=True):
        p.grad = g.float()
    amsgrad = options.get("amsgrad", False)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, amsgrad=amsgrad)

    def run() -> None:
        if dtype == torch.float32:
            optimizer.step()
            return
        torch._foreach_copy_([p.grad for p in parameters], sources)
        optimizer.step()
        torch._foreach_copy_(halves, [p.detach() for p in parameters])

    return run


def steps(elements: int) -> tuple[dict[str, Any], list[str]]:
    """A step of AdamW in each variant, beside torch's."""
    found, missed = {}, []
    print(f"\na step of AdamW, {TENSORS} tensors, {elements / 1e6:.0f} M parameters")
    print(f"{'parameters':32}{'ours ms':>9}{'limit':>8}{'torch fused':>13}{'ratio':>7}")
    for name, (options, dtype, moved) in VARIANTS.items():
        times = timed(
            {"ours": ours(elements, options, dtype), "torch": theirs(elements, options, dtype)}
        )
        limit = elements * (moved + dtype.itemsize) * times.pop("byte")
        ratio = times["torch"] / times["ours"]
        found[name] = {**times, "limit": limit, "ratio": ratio}
        print(
            f"{name:32}{times['ours'] * 1e3:9.1f}{limit * 1e3:8.1f}{times['torch'] * 1e3:13.1f}"
            f"{ratio:7.2f}"
        )
        if ratio < STEP_RATIO:
            missed.append(f"AdamW, {name}: {ratio:.2f} of {STEP_RATIO} times torch's fused step")
    return found, missed


def whole(elements: int) -> dict[str, Any]:
    """All of a step after the backward pass: unscale, check, norm, clip and AdamW."""
    names = sizes(elements)
    mine = [nn.Parameter(torch.randn(n)) for n in names]
    other = [nn.Parameter(p.detach().clone()) for p in mine]
    for p, q in zip(mine, other, strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    optimizer, peer = AdamW(mine, lr=1e-4), torch.optim.AdamW(other, lr=1e-4, fused=True)
    passes = torch_passes([q.grad for q in other if q.grad is not None])
    own = [p.grad for p in mine if p.grad is not None]

    def run() -> None:
        optimizer.step(factor=gradient_norm(own, scale=1.0, clip=1e9).factor)

    def run_peer() -> None:
        passes()
        peer.step()

    times = timed({"ours": run, "torch": run_peer})
    del times["byte"]
    ratio = times["torch"] / times["ours"]
    print(
        f"\nunscale, check, norm, clip and AdamW, fp32: ours {times['ours'] * 1e3:.1f} ms, torch "
        f"{times['torch'] * 1e3:.1f} ms, {ratio:.2f} times"
    )
    return {**times, "ratio": ratio}


def casts(elements: int) -> dict[str, Any]:
    """float32 to 16 bits over a list, to nearest and at random, beside torch's."""
    sources = gradients(elements, "fp32")
    found = {}
    print(f"\ncasts of {TENSORS} tensors from fp32, ms: ours, at random, torch; limit")
    for name in ("bf16", "fp16"):
        targets = [torch.empty_like(t, dtype=DTYPES[name]) for t in sources]
        times = timed(
            {
                "ours": lambda ts=targets: cast_(sources, ts),
                "ours, stochastic": lambda ts=targets: cast_(sources, ts, seed=1),
                "torch": lambda ts=targets: torch._foreach_copy_(ts, sources),
            }
        )
        limit = elements * 6 * times.pop("byte")
        found[name] = {**times, "limit": limit}
        print(
            f"{name:8}" + "".join(f"{t * 1e3:9.1f}" for t in times.values()) + f"{limit * 1e3:9.1f}"
        )
    return found


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Seconds of each, and the promises that were missed."""
    torch.set_num_threads(options.threads)
    elements = options.elements
    norm, missed = norms(elements)
    step, missed_steps = steps(elements)
    result = {
        "threads": options.threads,
        "elements": elements,
        "norm": norm,
        "adamw": step,
        "whole step": whole(elements),
        "casts": casts(elements),
    }
    return result, missed + missed_steps
