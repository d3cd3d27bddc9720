"""What the device itself can do: copies within it, the link both ways, its tensor cores."""

from __future__ import annotations

from typing import Any

import torch
from vramkit import _core

from .clock import Clock


def run(rehearse: bool) -> dict[str, Any]:
    """Rates of this device, which the other modules' figures are held against."""
    clock = Clock(rehearse)
    data = {"copy_gb_s": clock.copy_rate() / 1e9, **link(clock), **tensor_cores(clock)}
    lines = [
        f"copy within the device {data['copy_gb_s']:.1f} GB/s; link: to the device "
        f"{data['to_device_gb_s']:.1f}, to the host {data['to_host_gb_s']:.1f}",
        "large products, TFLOP/s: "
        + ", ".join(f"{k} {v}" for k, v in data["tensor_cores_tflops"].items()),
    ]
    print("\n".join(lines))
    return {"data": data, "missed": []}


def link(clock: Clock) -> dict[str, float]:
    """GB/s of pinned memory's copies, each way alone."""
    nbytes = (4 if clock.rehearse else 512) << 20
    store = _core.HostStore(nbytes, device="cpu" if clock.rehearse else "cuda:0")
    pinned = torch.frombuffer(store, dtype=torch.uint8)
    pinned.fill_(1)
    there = torch.empty(nbytes, dtype=torch.uint8, device=clock.device)
    to_device = clock.median(lambda n: there.copy_(pinned, non_blocking=True))
    to_host = clock.median(lambda n: pinned.copy_(there, non_blocking=True))
    return {"to_device_gb_s": nbytes / to_device / 1e9, "to_host_gb_s": nbytes / to_host / 1e9}


def tensor_cores(clock: Clock) -> dict[str, Any]:
    """TFLOP/s of torch's own large products; a reason where a device or a torch has none."""
    n = 128 if clock.rehearse else 8192
    flops = 2 * n**3
    device = clock.device
    bf16 = [torch.randn(n, n, device=device).bfloat16() for _ in range(2)]
    int8 = [torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2)]

    def fp8() -> Any:
        a = bf16[0].to(torch.float8_e4m3fn)
        b = bf16[1].to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)

    works = {
        "bf16": lambda: lambda: bf16[0] @ bf16[1],
        "fp8": fp8,
        "int8": lambda: lambda: torch._int_mm(int8[0], int8[1].t()),
    }
    found: dict[str, Any] = {}
    for name, make in works.items():
        try:
            work = make()
            seconds = clock.median(lambda n, work=work: work())
        except RuntimeError as error:  # a GPU that has no such product, or this processor
            found[name] = f"none: {str(error).splitlines()[0][:80]}"
            continue
        found[name] = round(flops / seconds / 1e12, 3)
    return {"tensor_cores_tflops": found}
