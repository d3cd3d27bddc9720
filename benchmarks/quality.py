"""Error on real weights, by format and by budget, beside the peers: first all-MiniLM-L6-v2's.

The measure is that of the peers' table in docs/quality.md: 16 short sentences, mean-pooled and
normalized embeddings, relative L2 over all and the least cosine, against float32. Four more models
are in quality_models.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import vramkit
from torch import nn
from vramkit.demo import SentenceEmbedder, model_folder, tokenize
from vramkit.estimator import weight_bytes
from vramkit.measure import call

from . import peers, quality_models

SENTENCES = (
    "The cat sat on the mat.",
    "A quick brown fox jumps over the lazy dog.",
    "Interest rates rose again this quarter.",
    "He plays the violin in an orchestra.",
    "The recipe calls for two eggs and butter.",
    "Quantum computers use superposition.",
    "The train to Vienna leaves at nine.",
    "She was elected mayor of the city.",
    "Volcanoes erupt when magma rises.",
    "The stock market fell sharply today.",
    "My phone battery drains too fast.",
    "Children learn languages quickly.",
    "The museum opens at ten on Sundays.",
    "A new vaccine was approved last week.",
    "The river floods every spring.",
    "Machine learning models need data.",
)
# Budget as a share of the float32 bytes -> least cosine promised.
BUDGETS = {0.25: 0.998, 0.20: 0.996, 0.15: 0.965}
# Ours against each peer's format of the same size: (ours, peer).
PAIRS = (
    ("nf4", "bitsandbytes nf4"),
    ("fp4", "bitsandbytes fp4"),
    ("int8", "torch quantize_dynamic"),
    ("int8", "quanto qint8"),
    ("int8", "bitsandbytes int8"),
    ("fp8", "quanto qfloat8"),
    ("int4", "quanto qint4"),
)


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Tables on the terminal, the same as data, and what was missed."""
    folder = model_folder()
    batch = tokenize(folder, SENTENCES)
    reference = SentenceEmbedder(vramkit.load(folder))
    recording = vramkit.record(reference, [batch])
    missed: list[str] = []

    def error_of(model: nn.Module) -> dict[str, float]:
        found = vramkit.compare(recording, SentenceEmbedder(model), [batch])
        return {"relative_l2": found.relative_l2, "cosine": found.cosine}

    rows = {}
    print(f"{'Linears only':28}{'bits/weight':>12}{'relative L2':>13}{'least cosine':>14}")
    for name in vramkit.format_names():
        model = copy.deepcopy(reference.model)
        vramkit.convert(model, name, skip=["embeddings"])
        bits = vramkit.get_format(name).bits_per_weight((384, 384))
        rows[name] = error_of(model) | {"bits_per_weight": bits}
        _print_row(name, rows[name])
    for name, make in _peers().items():
        try:
            rows[name] = error_of(make(copy.deepcopy(reference.model)))
        except (ImportError, RuntimeError) as error:  # absent, or it does not run under this torch
            print(f"{name:28} not measured: {error}")
            continue
        _print_row(name, rows[name])
    for ours, peer in PAIRS:
        # Equal codes give equal errors up to the order of float32 sums.
        if peer in rows and rows[ours]["relative_l2"] > rows[peer]["relative_l2"] * 1.005:
            missed.append(
                f"{ours} {rows[ours]['relative_l2']:.4f} > {peer} {rows[peer]['relative_l2']:.4f}"
            )
    budgets = _budgets(reference.model, batch, error_of, missed)
    models = quality_models.run()
    return {"formats": rows, "budgets": budgets, "models": models}, missed


def _print_row(name: str, row: dict[str, float]) -> None:
    bits = f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else ""
    print(f"{name:28}{bits:>12}{row['relative_l2']:>13.4f}{row['cosine']:>14.5f}")


def _budgets(
    reference: nn.Module,
    batch: dict[str, torch.Tensor],
    error_of: Callable[[nn.Module], dict[str, float]],
    missed: list[str],
) -> dict[str, Any]:
    total = weight_bytes(reference)
    found: dict[str, Any] = {}
    print(
        f"\n{'planned budget':28}{'bytes':>12}{'relative L2':>13}{'least cosine':>14}"
        f"{'promised':>10}"
        f"{'peak, estimated/measured':>26}"
    )
    for share, promised in BUDGETS.items():
        plan = vramkit.plan(reference, f"{int(total * share)} B", inputs=batch)
        model = plan.apply(copy.deepcopy(reference))
        row = error_of(model)
        measured = call(model, batch)
        assert plan.estimate is not None
        assert plan.estimate.peak_bytes is not None
        ratio = plan.estimate.peak_bytes / measured.peak_bytes
        exact = plan.weights_bytes == measured.weights_bytes
        label = f"{share:.0%} of fp32"
        print(
            f"{label:28}{plan.weights_bytes:>12}{row['relative_l2']:>13.4f}{row['cosine']:>14.5f}"
            f"{promised:>10}{ratio:>26.4f}"
        )
        found[label] = row | {
            "weights_bytes": plan.weights_bytes,
            "promised_cosine": promised,
            "peak_ratio": ratio,
            "formats": {name: n for name, (n, _) in plan.counts().items()},
        }
        if row["cosine"] < promised:
            missed.append(f"{label}: least cosine {row['cosine']:.5f} < {promised}")
        if abs(ratio - 1) > 0.05 or not exact:
            missed.append(f"{label}: estimate off (peak ratio {ratio:.3f}, weights exact: {exact})")
    return found


def _peers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        "bitsandbytes nf4": lambda m: peers.bitsandbytes_4bit(m, "nf4", packed=False),
        "bitsandbytes fp4": lambda m: peers.bitsandbytes_4bit(m, "fp4", packed=False),
        "bitsandbytes int8": peers.bitsandbytes_8bit,
        "quanto qint8": lambda m: peers.quanto(m, "qint8"),
        "quanto qfloat8": lambda m: peers.quanto(m, "qfloat8"),
        "quanto qint4": lambda m: peers.quanto(m, "qint4"),
        "torch quantize_dynamic": peers.torch_dynamic,
    }
