"""Predicted against measured peaks on the frozen zoo, beside the peers; tracing of large models.

Measured is the highest sum of the profiler's allocation events of one warm call on this CPU.
accelerate's figure is what its `estimate-memory` adds to the weights, the largest layer;
MemTracker's is from fake tensors. Both are compared in the same bytes: without the weights.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import vramkit
from torch import nn
from vramkit.estimator import call_arguments, meta_copy, weight_bytes
from vramkit.intervals import LEAST
from vramkit.measure import profiled_peak

from . import estimate_rules
from .estimate_zoo import CASES, Case, Inputs

PEERS = ("accelerate", "MemTracker")
# Promised: (share of cases, within), with probes and without any.
WITH_PROBES = ((0.90, 0.02), (1.00, 0.05))
WITHOUT = ((0.90, 0.10),)
SECONDS, MEGABYTES = 5.0, 100.0

LLAMA_7B = """
import transformers
config = transformers.LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    vocab_size=32000, dtype="bfloat16", use_cache=False)
build = lambda: transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
inputs = {"input_ids": (1, 2048)}
"""
QWEN_IMAGE_20B = """
import diffusers
build = lambda: diffusers.QwenImageTransformer2DModel(
    patch_size=2, in_channels=64, out_channels=16, num_layers=60, attention_head_dim=128,
    num_attention_heads=24, joint_attention_dim=3584, guidance_embeds=False,
    axes_dims_rope=(16, 56, 56)).to(torch.bfloat16).eval()
inputs = {
    "hidden_states": (1, 4096, 64), "encoder_hidden_states": (1, 128, 3584),
    "encoder_hidden_states_mask": torch.ones(1, 128, dtype=torch.long), "timestep": (1,),
    "img_shapes": [[(1, 64, 64)]]}
"""
LARGE = {"Llama 7 B, 2048 tokens": LLAMA_7B, "Qwen-Image transformer 20 B, 1024²": QWEN_IMAGE_20B}
# A first, tiny estimate brings in what is imported late; the large one is then timed alone.
LARGE_SCRIPT = """
import json, sys, threading, time, logging, warnings
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
import torch, vramkit
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) << 10
exec(sys.argv[1])
vramkit.estimate(torch.nn.Linear(4, 4), "nf4", (1, 4))
start = time.perf_counter()
with torch.device("meta"):
    model = build()
built = time.perf_counter() - start
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
start = time.perf_counter()
found = vramkit.estimate(model, None, inputs, probe=sys.argv[2] == "probe")
took = time.perf_counter() - start
print(json.dumps({"build_seconds": built, "seconds": took, "megabytes":
    (status("VmHWM") - before) / 1e6, "parameters": sum(p.numel() for p in model.parameters()),
    "weights_bytes": found.weights_bytes, "activations_bytes": found.activations_bytes,
    "events": len(found.trace), "probes": found.probes[0], "probe_seconds": found.probes[1]}))
"""


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """All cases, then random layers by rule, then the large models."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases = []
    print(f"{'case':36} {'measured':>9} {'probed':>8} {'by rule':>8} {'accelerate':>11} "
          f"{'MemTracker':>11}  {'trace':>6} {'probes':>7}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            try:
                row = one(case, Path(folder))
            except ImportError as error:
                print(f"{case.name:36} left out: {error}")
                continue
            cases.append(row)
            print(
                f"{case.name:36} {row['measured_bytes'] / 1e6:6.2f} MB {_percent(row, 'probed')} "
                f"{_percent(row, 'ruled')} {_percent(row, 'accelerate', 11)} "
                f"{_percent(row, 'MemTracker', 11)} {row['trace_seconds']:5.2f} s "
                f"{row['probe_seconds']:5.2f} s",
                flush=True,
            )
    shares = {name: summary(cases, name) for name in ("probed", "ruled", *PEERS)}
    for name, found in shares.items():
        print(f"{name:12} " + ", ".join(f"within {w} %: {s:.0%}" for w, s in found.items()))
    missed = [
        f"{name}: {share(cases, name, within):.1%} of the cases within {within:.0%}"
        for name, promises in (("probed", WITH_PROBES), ("ruled", WITHOUT))
        for least, within in promises
        if share(cases, name, within) < least
    ]
    for case in cases:
        low, high = case["ruled_interval_bytes"] or (0, 1 << 63)
        if not low <= case["measured_bytes"] <= high:
            missed.append(f"{case['name']}: measured outside the interval by rule")
    with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder)):
        rules = estimate_rules.measure()
    for kind, found in rules.items():
        print(
            f"{kind}: {found['count']} random layers, by rule within 10 % of a probe "
            f"{found['within_10_percent']:.0%}, from {found['least']:.3f} to {found['most']:.3f}"
        )
        if found["least"] < LEAST[kind]:
            missed.append(f"rules for {kind} miss more than intervals allow: {found['least']:.3f}")
    large = {name: large_model(text) for name, text in LARGE.items()}
    for name, found in large.items():
        print(
            f"{name}: {found['parameters'] / 1e9:.1f} B parameters, {found['seconds']:.2f} s, "
            f"{found['megabytes']:.0f} MB, activations {found['activations_bytes'] / 2**20:.0f} MiB"
            f" ({found['events']} events; built in {found['build_seconds']:.1f} s; with "
            f"{found['probes']} probes {found['probed_seconds']:.2f} s, "
            f"{found['probed_megabytes']:.0f} MB)"
        )
        if found["seconds"] > SECONDS:
            missed.append(f"{name} takes {found['seconds']:.1f} s to trace")
        if found["megabytes"] > MEGABYTES:
            missed.append(f"{name} takes {found['megabytes']:.0f} MB to trace")
    return {"cases": cases, "shares": shares, "rules": rules, "large": large}, missed


def one(case: Case, folder: Path) -> dict[str, Any]:
    """Measured and predicted bytes of one case; the probes' store begins empty for each."""
    torch.manual_seed(0)
    model, inputs = case.build()
    model.eval()
    measured = measure(model, inputs, case.generate)
    options: dict[str, Any] = {"generate": case.generate}
    with _cache_in(folder / str(abs(hash(case.name)))):
        start = time.perf_counter()
        probed = vramkit.estimate(model, None, inputs, **options)
        took = time.perf_counter() - start
    ruled = vramkit.estimate(model, None, inputs, probe=False, calibrated=False, **options)
    return {
        "name": case.name,
        "kind": case.kind,
        "measured_bytes": measured,
        "probed_bytes": probed.activations_bytes,
        "ruled_bytes": ruled.activations_bytes,
        "ruled_interval_bytes": ruled.activations_interval_bytes,
        "accelerate_bytes": accelerate_estimate(model),
        "MemTracker_bytes": None if case.generate else mem_tracker(model, inputs),
        "trace_seconds": took - probed.probes[1],
        "probe_seconds": probed.probes[1],
        "probes": probed.probes[0],
        "notes": probed.notes,
    }


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Probes are kept in this folder within it, so that nothing known from before helps."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def measure(model: nn.Module, inputs: Inputs, generate: int = 0) -> int:
    """The peak of one warm call, or of a whole greedy generation that nothing ends early."""
    args, kwargs = call_arguments(inputs, torch.float32)
    call: Any = model
    if generate:
        settings: Any = model.generation_config
        settings.eos_token_id = None
        loop: Any = model.generate

        def call(**given: Any) -> Any:
            return loop(**given, max_new_tokens=generate, do_sample=False)

    with torch.inference_mode():
        call(*args, **kwargs)
        return profiled_peak(call, args, kwargs)


def accelerate_estimate(model: nn.Module) -> int | None:
    """What accelerate's `estimate-memory` says beyond the weights: its largest layer."""
    try:
        from accelerate.utils import calculate_maximum_sizes
    except ImportError:
        return None
    _, (largest, _names) = calculate_maximum_sizes(model)
    return int(largest)


def mem_tracker(model: nn.Module, inputs: Inputs) -> int | None:
    """torch's MemTracker on fake tensors: its peak less parameters, buffers and inputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from vramkit.dry_run import fake_parameters

    skeleton = meta_copy(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fake_parameters(skeleton, fake)
    for parameter in skeleton.parameters():  # it hooks their gradients
        parameter.requires_grad_(parameter.is_floating_point())
    args, kwargs = call_arguments(inputs, torch.float32)
    take, leaves = torch.utils._pytree.tree_map, torch.utils._pytree.tree_leaves
    try:
        with fake, torch.no_grad():
            args, kwargs = take(
                lambda v: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v, (args, kwargs)
            )
            tracker = MemTracker()
            given = [v for v in leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            tracker.track_external(skeleton, *given)
            with tracker:
                out = skeleton(*args, **kwargs)
            del out
            peak = tracker.get_tracker_snapshot("peak")
    except Exception as error:  # it does not take every model; that is its result
        print(f"  MemTracker: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return None
    finally:
        gc.collect()
    total = sum(values["Total"] for values in peak.values())
    return int(total) - weight_bytes(model) - sum(v.nbytes for v in given)


def share(cases: list[dict[str, Any]], name: str, within: float) -> float:
    """Share of the cases whose prediction is off by no more than `within`; none counts as off."""
    close = [
        c
        for c in cases
        if c[f"{name}_bytes"] is not None
        and abs(c[f"{name}_bytes"] / c["measured_bytes"] - 1) <= within
    ]
    return len(close) / len(cases)


def summary(cases: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Shares within 2, 5 and 10 percent."""
    return {str(w): share(cases, name, w / 100) for w in (2, 5, 10)}


def _percent(row: dict[str, Any], name: str, width: int = 8) -> str:
    value = row[f"{name}_bytes"]
    if value is None:
        return f"{'—':>{width}}"
    return f"{100 * (value / row['measured_bytes'] - 1):+{width - 2}.2f} %"


def large_model(text: str) -> dict[str, Any]:
    """Seconds and host memory of tracing a large configuration, each in a process of its own."""
    found = []
    for how in ("rule", "probe"):
        with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder)):
            done = subprocess.run(
                [sys.executable, "-c", LARGE_SCRIPT, text, how],
                capture_output=True, check=True, text=True,
            )  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        **found[0],
        "probes": found[1]["probes"],
        "probed_seconds": found[1]["seconds"],
        "probed_megabytes": found[1]["megabytes"],
        "probed_activations_bytes": found[1]["activations_bytes"],
    }
