"""300 gradients and parameters: norm, casts and AdamW, beside torch's and the device's copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vramkit.training import AdamW, cast_, gradient_norm

from benchmarks.training import VARIANTS, gradients, sizes, torch_passes

from .clock import Clock


def run(rehearse: bool) -> dict[str, Any]:
    """Milliseconds, the limit by the bytes moved, and torch's."""
    clock = Clock(rehearse)
    elements = 60_000 if rehearse else 200_000_000
    rate = clock.copy_rate()
    missed: list[str] = []
    data = {
        "elements": elements,
        "norm": norms(clock, elements, rate, missed),
        "adamw": steps(clock, elements, rate, missed),
        "casts": casts(clock, elements, rate),
    }
    return {"data": data, "missed": missed}


def norms(clock: Clock, elements: int, rate: float, missed: list[str]) -> dict[str, Any]:
    """Unscale, check, norm and clip, the host's waiting for the norm with it."""
    found = {}
    for name in ("fp32", "bf16"):
        tensors = [t.to(clock.device) for t in gradients(elements, name)]
        limit = sum(t.numel() * t.element_size() for t in tensors) / rate
        ours = clock.median(lambda n, ts=tensors: gradient_norm(ts, scale=1.0, clip=1e9))
        passes = torch_passes(tensors)
        peer = clock.median(lambda n, call=passes: call())
        found[name] = {"ours": ours, "torch": peer, "limit": limit}
        print(
            f"unscale + norm + clip, {name}: {ours * 1e3:.3f} ms, limit {limit * 1e3:.3f}, torch's "
            f"passes {peer * 1e3:.3f} ({peer / ours:.2f})"
        )
        if not clock.rehearse and peer < 3.0 * ours:
            missed.append(f"norm of {name}: {peer / ours:.2f} of 3 times torch's passes")
    return found


def steps(clock: Clock, elements: int, rate: float, missed: list[str]) -> dict[str, Any]:
    """AdamW in each variant; torch's fused one on float32 parameters."""
    found: dict[str, Any] = {}

    def make(dtype: torch.dtype) -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(n, dtype=dtype, device=clock.device)) for n in names]
        for p in made:
            p.grad = torch.full_like(p, 0.01)
        return made

    names = sizes(elements)
    fused = torch_step(clock, make(torch.float32))
    for name, (options, dtype, moved) in VARIANTS.items():
        optimizer = AdamW(make(dtype), lr=1e-4, **options)
        ours = clock.median(lambda n, one=optimizer: one.step(factor=1.0))
        limit = elements * (moved + dtype.itemsize) / rate
        found[name] = {"ours": ours, "limit": limit, "torch fp32 fused": fused}
        print(
            f"AdamW, {name}: {ours * 1e3:.3f} ms, limit {limit * 1e3:.3f}, torch's fused in fp32 "
            f"{fused * 1e3:.3f} ({fused / ours:.2f})"
        )
        del optimizer
        if name == "fp32" and not clock.rehearse and fused < ours:
            missed.append(f"AdamW: {fused / ours:.2f} of torch's fused step")
    return found


def torch_step(clock: Clock, parameters: list[nn.Parameter]) -> float:
    """Seconds of torch's fused AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return clock.median(lambda n: optimizer.step())


def casts(clock: Clock, elements: int, rate: float) -> dict[str, Any]:
    """float32 to bfloat16, to nearest and at random."""
    sources = [t.to(clock.device) for t in gradients(elements, "fp32")]
    targets = [torch.empty_like(t, dtype=torch.bfloat16) for t in sources]
    found = {
        "ours": clock.median(lambda n: cast_(sources, targets)),
        "ours, stochastic": clock.median(lambda n: cast_(sources, targets, seed=n)),
        "torch": clock.median(lambda n: torch._foreach_copy_(targets, sources)),
        "limit": elements * 6 / rate,
    }
    print("casts to bf16, ms: " + ", ".join(f"{k} {v * 1e3:.3f}" for k, v in found.items()))
    return found
