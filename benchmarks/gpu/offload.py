"""Offloaded models beside the link's own rate and beside the resident model.

The engine alone and a model through `enable_vram_management`: with nothing to compute, in bytes per
second against a pinned copy; with products that take three times the copies, in time against the
resident model; calls that wait for the device in steady passes, by torch's profiler.
"""

from __future__ import annotations

from typing import Any

import torch
import vramkit
from torch import nn
from vramkit import _core

from .clock import Clock
from .limits import link

OF_LINK, OVER_RESIDENT = 0.9, 1.03
# Calls of CUDA's runtime that wait; the profiler names them so.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy ")


def run(rehearse: bool) -> dict[str, Any]:
    """The engine alone, then a model."""
    clock = Clock(rehearse)
    rate = link(clock)["to_device_gb_s"] * 1e9
    alone = engine_alone(clock, 6, (1 if rehearse else 128) << 20, rate)
    model = through_a_model(clock, rate)
    lines = [
        f"  {label:14} {row['transfer_gb_s']:>7.1f} GB/s, {row['of_link']:.2f} of the link "
        f"(wanted: {OF_LINK}); bound by arithmetic {row['over_resident']:.3f} of resident (wanted: "
        f"{OVER_RESIDENT})"
        for label, row in (("engine alone", alone), ("a model", model))
    ]
    if "waits" in model:
        lines.append(f"  calls that wait in three steady passes: {model['waits']} (wanted: 0)")
    missed: list[str] = []
    for label, row in (("engine alone", alone), ("a model", model)):
        if row["of_link"] < OF_LINK:
            missed.append(f"{label}: {row['of_link']:.2f} of the link")
        if row["over_resident"] > OVER_RESIDENT:
            missed.append(f"{label}: {row['over_resident']:.3f} of the resident model")
    if model.get("waits"):
        missed.append(f"a model: {model['waits']} calls wait for the device")
    missed = [] if rehearse else missed
    print("\n".join(lines))
    return {"data": {"engine": alone, "model": model}, "missed": missed}


def engine_alone(clock: Clock, count: int, nbytes: int, link_rate: float) -> dict[str, Any]:
    """Passes over blocks in pinned memory, of which a few fit."""
    device = "cpu" if clock.rehearse else "cuda:0"
    store = _core.HostStore(count * nbytes, device=device)
    torch.frombuffer(store, dtype=torch.uint8).zero_()
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
    engine = _core.Engine(
        [store.source()],
        specs,
        limit=4 * (nbytes + granularity),
        granularity=granularity,
        device=device,
    )
    stream = 0 if clock.rehearse else torch.cuda.current_stream().cuda_stream
    side = int((nbytes // 2) ** 0.5) // 64 * 64

    def passes(products: int, x: torch.Tensor) -> None:
        for block in range(count):
            address = engine.acquire(block, stream)
            weight = torch.utils.dlpack.from_dlpack(engine.window(address, nbytes))
            weight = weight[: 2 * side * side].view(torch.bfloat16).view(side, side)
            for _ in range(products):
                x = x @ weight
            engine.release(block, stream)

    one = torch.zeros(1, side, dtype=torch.bfloat16, device=clock.device)
    transfer = clock.median(lambda _: passes(0, one))
    x = torch.zeros(64 if clock.rehearse else 4096, side, dtype=torch.bfloat16, device=clock.device)
    weight = torch.zeros(side, side, dtype=torch.bfloat16, device=clock.device)
    product = clock.median(lambda _: x @ weight)
    products = max(1, round(3 * transfer / count / product))

    def resident() -> None:
        y = x
        for _ in range(count * products):
            y = y @ weight

    plain = clock.median(lambda _: resident())
    streamed = clock.median(lambda _: passes(products, x))
    stats = engine.stats()
    engine.close()
    rate = count * nbytes / transfer
    return {
        "blocks": count, "block_bytes": nbytes, "transfer_gb_s": rate / 1e9,
        "of_link": rate / link_rate, "over_resident": streamed / plain, "engine_waits": stats.waits,
        "displaced": stats.displaced,
    }  # fmt: skip


def through_a_model(clock: Clock, link_rate: float) -> dict[str, Any]:
    """Layers in bfloat16 within a third of their bytes, by `enable_vram_management`."""
    width, layers = (256, 24) if clock.rehearse else (8192, 24)
    few, many = (1, 64) if clock.rehearse else (1, 8192)
    device = clock.device
    with torch.no_grad():
        made = {"bias": False, "device": device, "dtype": torch.bfloat16}
        model = nn.Sequential(*[nn.Linear(width, width, **made) for _ in range(layers)])
        inputs = {
            rows: torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
            for rows in (few, many)
        }
        resident = {rows: clock.median(lambda _, x=x: model(x)) for rows, x in inputs.items()}
        nbytes = sum(p.nbytes for p in model.parameters())
        model = model.to("cpu")
        room = nbytes // 3 + 4 * many * width * 2 + (1 << 20 if clock.rehearse else 512 << 20)
        vramkit.enable_vram_management(
            model, f"{room} B", 0, inputs=(inputs[many],), device=str(device)
        )
        session = model.vramkit_session
        for _ in range(3):
            model(inputs[few])
        torch_copied = session.engine.stats().bytes_copied
        transfer = clock.median(lambda _: [model(inputs[few]) for _ in range(3)]) / 3
        rounds = 1 + (2 if clock.rehearse else 7)
        copied = (session.engine.stats().bytes_copied - torch_copied) / 3 / rounds
        streamed = clock.median(lambda _: model(inputs[many]))
        found = {
            "weights_bytes": nbytes, "limit_bytes": room, "pass_bytes": copied,
            "transfer_gb_s": copied / transfer / 1e9, "of_link": copied / transfer / link_rate,
            "resident_seconds": resident[many], "streamed_seconds": streamed,
            "over_resident": streamed / resident[many],
        }  # fmt: skip
        if not clock.rehearse:
            found["waits"] = waits_in(lambda: [model(inputs[few]) for _ in range(3)])
            found["graphs"] = with_graphs(clock, session, inputs[few])
        session.disable()
    return found


def waits_in(work: Any) -> int:
    """How many calls of CUDA's runtime waited for the device."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
    # The profiler itself waits once when it ends.
    names = [event.name for event in found.events()]
    return max(0, sum(name.startswith(WAITS) for name in names) - 1)


def with_graphs(clock: Clock, session: Any, x: torch.Tensor) -> dict[str, Any]:
    """Seconds of a pass whose blocks are graphs."""
    model = session._offloaded()
    try:
        session.capture((x,))
    except vramkit.VramkitError as error:
        return {"refused": str(error)}
    return {"seconds": clock.median(lambda _: model(x))}
