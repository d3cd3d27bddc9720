"""Bytes against quality on real weights: uniform formats, the planner's mixes, the picture.

The whole of all-MiniLM-L6-v2 is converted, embeddings included; the measure is quality.py's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import vramkit
from vramkit.demo import SentenceEmbedder, model_folder, tokenize
from vramkit.estimator import weight_bytes

from .quality import SENTENCES

UNIFORM = ("bf16", "int8", "fp8", "nf4", "nf4_dq", "fp4", "int4", "int4_g32")
# Where each label goes, in points from its square: several lie close together.
LABELS = {
    "bf16": (-34, 4), "int8": (8, -4), "fp8": (8, -3), "nf4": (8, -3), "nf4_dq": (-38, -14),
    "fp4": (8, -3), "int4": (-26, 5), "int4_g32": (8, -4),
}  # fmt: skip
SHARES = (0.135, 0.14, 0.15, 0.16, 0.17, 0.18, 0.19, 0.20, 0.22, 0.25, 0.28, 0.32, 0.38, 0.45)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "frontier.svg"


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Least cosine by bytes; misses where a uniform format beats the plan of its own size."""
    folder = model_folder()
    batch = tokenize(folder, SENTENCES)
    reference = SentenceEmbedder(vramkit.load(folder))
    total = weight_bytes(reference)
    recording = vramkit.record(reference, [batch])

    def cosine(model: Any) -> float:
        return vramkit.compare(recording, SentenceEmbedder(model), [batch]).cosine

    uniform = {}
    for name in UNIFORM:
        model = copy.deepcopy(reference.model)
        vramkit.convert(model, name)
        uniform[name] = (weight_bytes(model) / total, cosine(model))
    planned, missed = [], []
    for share in sorted({*SHARES, *(s for s, _ in uniform.values())}):
        plan = vramkit.plan(reference.model, f"{int(total * share)} B")
        model = plan.apply(copy.deepcopy(reference.model))
        planned.append((plan.weights_bytes / total, cosine(model)))
        print(f"plan {share:6.3f}: {planned[-1][1]:.5f}")
        for name, (size, value) in uniform.items():
            if size == share and value > planned[-1][1] + 1e-4:
                missed.append(
                    f"uniform {name} at {size:.3f}: {value:.5f} > planned {planned[-1][1]:.5f}"
                )
    for name, (size, value) in uniform.items():
        print(f"{name:10} {size:6.3f}: {value:.5f}")
    _draw(planned, uniform, total)
    return {"planned": planned, "uniform": uniform, "fp32_bytes": total}, missed


def _draw(
    planned: list[tuple[float, float]], uniform: dict[str, tuple[float, float]], total: int
) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "vramkit"  # the same picture for the same figures
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    axes.plot(
        *zip(*[(s * 100, 1 - c) for s, c in planned], strict=True),
        "-o",
        ms=4,
        color="#0072b2",
        label="vramkit plan (mixed formats)",
    )
    axes.scatter(
        *zip(*[(s * 100, 1 - c) for s, c in uniform.values()], strict=True),
        s=46,
        marker="s",
        color="#d55e00",
        label="one format for all layers",
        zorder=3,
    )
    for name, (size, value) in uniform.items():
        axes.annotate(
            name,
            (size * 100, 1 - value),
            xytext=LABELS[name],
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_xscale("log")
    ticks = (13, 15, 20, 25, 30, 40, 50)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    axes.set_xlabel(f"weights, % of float32 ({total / 1e6:.1f} MB)")
    axes.set_ylabel("1 - least sentence cosine  (lower is better)")
    axes.set_title("all-MiniLM-L6-v2: what each byte buys")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})
