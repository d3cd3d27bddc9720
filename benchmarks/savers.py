"""Training with memory savers: loss curves against float32's, peak memory against its estimate.

Two models: the LSD video model at base width 16 on squares that move, and a small Llama on the text
of an installed licence, byte by byte. Each learns in fp32, bf16, and fp16 with AdaptiveGradScaler,
with each saver, from several seeds. "Noise" is the spread of the float32 curves over the seeds: a
run is within it if its final loss, over all seeds, is no further from float32's than that spread.
Measured is the profiler's highest sum of allocations during one step, from forward to the
optimizer's; estimated is `estimate_step`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import files
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from vramkit.errors import BudgetError
from vramkit.measure import PeakWatch
from vramkit.training import (
    LSD,
    AdamW,
    AdaptiveGradScaler,
    CheckpointPlan,
    MixedPrecisionWrapper,
    compress_activations,
    estimate_step,
    offload_activations,
    plan_checkpoints,
    stable_cross_entropy,
    stable_mse_loss,
)

PRECISIONS = ("fp32", "bf16", "fp16")
LEAST_BYTES = 4096  # the models are small: so are their activations
WITHIN = 0.05  # promised of estimates
SAVERS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda _: contextlib.nullcontext(),
    "checkpoints": lambda _: contextlib.nullcontext(),
    "16 bit": lambda m: compress_activations(m, "bf16", least_bytes=LEAST_BYTES),
    "int8": lambda m: compress_activations(m, "int8", least_bytes=LEAST_BYTES),
    "fp8": lambda m: compress_activations(m, "fp8", least_bytes=LEAST_BYTES),
    "offload": lambda m: offload_activations(m, least_bytes=LEAST_BYTES),
}

Batch = tuple[Any, Callable[[Any], Tensor]]  # inputs, and the loss of the model's output


@dataclass
class Case:
    """A model, what it learns from, and how long."""

    build: Callable[[], nn.Module]
    batches: Callable[[int], Callable[[], Batch]]  # by seed
    blocks: Callable[[nn.Module], list[str]]
    steps: int
    rate: float
    scale: float = 2.0**16  # of the first loss in fp16


def licence(most: int = 200_000) -> Tensor:
    """The longest licence that comes with torch, as bytes."""
    found = [f for f in files("torch") or [] if f.name.upper().startswith("LICENSE")]
    texts = [f.locate().read_bytes() for f in found]  # type: ignore[attr-defined]
    return torch.frombuffer(bytearray(max(texts, key=len)[:most]), dtype=torch.uint8).long()


class Llama(nn.Module):
    """Three layers of 64, over bytes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
            max_position_embeddings=64,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits of the next bytes."""
        out: Tensor = self.model(input_ids=codes, use_cache=False).logits
        return out


def text_batches(seed: int, rows: int = 8, length: int = 64) -> Callable[[], Batch]:
    """Pieces of the licence."""
    text, generator = licence(), torch.Generator().manual_seed(seed)

    def batch() -> Batch:
        first = torch.randint(len(text) - length - 1, (rows, 1), generator=generator)
        codes = text[first + torch.arange(length + 1)]
        targets = codes[:, 1:].flatten()
        return (codes[:, :-1].contiguous(),), lambda y: stable_cross_entropy(
            y.flatten(0, 1), targets
        )

    return batch


def video_batches(seed: int, rows: int = 4, side: int = 16) -> Callable[[], Batch]:
    """Two frames with squares that move, to the next frame."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.arange(side)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def batch() -> Batch:
        place, move = numbers(0, side, rows, 3, 2), numbers(-2, 3, rows, 3, 2)
        size = numbers(3, 8, rows, 3, 1, 1)
        frames = []
        for time_step in range(3):
            at = (place + time_step * move) % side
            inside = [((grid - at[..., i, None]) % side < size[..., 0]).float() for i in range(2)]
            frames.append(inside[0][..., :, None] * inside[1][..., None, :])
        previous, now, following = frames
        return (now, 1.0, previous), lambda y: stable_mse_loss(y, following)

    return batch


def lsd_blocks(model: nn.Module) -> list[str]:
    """All of the LSD's convolution stacks and transformers."""
    kinds = ("ConvStack", "SpatialTransformer")
    return [n for n, m in model.named_modules() if type(m).__name__ in kinds]


CASES = {
    "llama": Case(
        Llama,
        text_batches,
        lambda m: [n for n, x in m.named_modules() if type(x).__name__ == "LlamaDecoderLayer"],
        20,
        3e-3,
    ),
    "lsd": Case(lambda: LSD(16), video_batches, lsd_blocks, 40, 3e-3, 2.0**7),
}


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """All models, precisions, savers and seeds."""
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    missed: list[str] = []
    for name in options.models or CASES:
        case = CASES[name]
        if options.steps:
            case = replace(case, steps=options.steps)
        start = time.perf_counter()
        plan = planned(case)
        print(f"{name}: {plan}")
        rows = []
        for precision in PRECISIONS:
            for saver in SAVERS:
                rows.append(one(case, precision, saver, plan, options.seeds))
                print(line(name, rows[-1]), flush=True)
        missed += [f"{name}: {text}" for text in judged(rows)]
        results[name] = {
            "checkpointed": plan.checkpointed,
            "blocks": len(plan.blocks),
            "budget_bytes": plan.budget_bytes,
            "steps": case.steps,
            "rows": rows,
            "seconds": time.perf_counter() - start,
        }
    return results, missed


def planned(case: Case) -> CheckpointPlan:
    """Half of what checkpoints can save in float32: the mean of the plain and the least peak."""
    torch.manual_seed(0)
    model = case.build().train()
    inputs, loss = case.batches(0)()
    blocks = case.blocks(model)
    by_rule: dict[str, Any] = {"blocks": blocks, "probe": False}
    plain = plan_checkpoints(model, inputs, loss, "1 TB", **by_rule).peak_bytes
    try:
        plan_checkpoints(model, inputs, loss, "1 B", **by_rule)
    except BudgetError as error:
        least = error.needed_bytes
    return plan_checkpoints(model, inputs, loss, f"{(plain + least) // 2} B", **by_rule)


def one(case: Case, precision: str, saver: str, plan: CheckpointPlan, seeds: int) -> dict[str, Any]:
    """Loss curves over the seeds, and the memory of a step."""
    curves, seconds, skipped = [], [], 0
    row: dict[str, Any] = {"precision": precision, "saver": saver}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = case.build().train()
        if saver == "checkpoints":
            plan.apply(model)
        wrapped = MixedPrecisionWrapper(model, precision)
        optimizer = AdamW(wrapped.parameters(), lr=case.rate)
        scaler = AdaptiveGradScaler(case.scale, enabled=precision == "fp16")
        batch = case.batches(seed)
        curve = []

        for number in range(case.steps):
            inputs, loss = batch()
            watch = PeakWatch()
            watched = seed == 0 and number == case.steps - 1
            if watched:
                watch.start()
            start = time.perf_counter()
            with SAVERS[saver](wrapped):
                value = loss(wrapped(*inputs))
            scaler.scale_and_step(optimizer, value, clip=1.0)
            curve.append(value.item())
            del value
            seconds.append(time.perf_counter() - start)
            if watched:
                row["measured_bytes"] = watch.stop()
            optimizer.zero_grad()
        if seed == 0:
            found = estimate_step(wrapped, inputs, loss, saver=SAVERS[saver], optimizer=optimizer)
            row["estimated_bytes"] = found.step_bytes
            row["weights_bytes"] = found.weights_bytes
            row["gradients_bytes"] = found.gradients_bytes
            row["optimizer_bytes"] = found.optimizer_bytes
        curves.append(curve)
        skipped += scaler.skipped
        row["fallbacks"] = row.get("fallbacks", 0) + len(wrapped.fallbacks)
    last = max(1, case.steps // 4)
    row.update(
        curves=[[round(v, 5) for v in curve] for curve in curves],
        final=[mean(curve[-last:]) for curve in curves],
        first=mean(curve[0] for curve in curves),
        skipped=skipped,
        seconds=sorted(seconds)[len(seconds) // 2],
    )
    return row


def line(name: str, row: dict[str, Any]) -> str:
    """A row as text."""
    measured, estimated = row["measured_bytes"], row["estimated_bytes"]
    return (
        f"{name:6} {row['precision']:5} {row['saver']:12} loss {row['first']:.4f} -> "
        f"{mean(row['final']):.4f}  step {measured / 1e6:7.3f} MB, estimated "
        f"{estimated / measured - 1:+.2%}  {row['seconds']:.2f} s  skipped {row['skipped']}"
    )


def judged(rows: list[dict[str, Any]]) -> list[str]:
    """Adds to each row how far it is from float32; what breaks a promise."""
    reference = rows[0]["final"]
    noise = max(reference) - min(reference)
    bad = []
    for row in rows:
        what = f"{row['precision']} {row['saver']}"
        row["noise"] = noise
        row["distance"] = mean(row["final"]) - mean(reference)
        if abs(row["distance"]) > noise:
            bad.append(f"{what}: {row['distance']:+.4f} from float32's loss, noise {noise:.4f}")
        if not mean(row["final"]) < row["first"]:
            bad.append(f"{what}: learned nothing")
        if abs(row["estimated_bytes"] / row["measured_bytes"] - 1) > WITHIN:
            bad.append(
                f"{what}: estimated {row['estimated_bytes']}, measured {row['measured_bytes']}"
            )
    return bad
