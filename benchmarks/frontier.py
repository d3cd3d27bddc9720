"""Bytes against quality on real weights: uniform formats, the planner's mixes, the picture.

On every real model, at the bytes of each uniform format: the error of the best uniform format that
fits, of our plans by weights and by data, of greedy and of random plans. The picture is of
all-MiniLM-L6-v2, converted whole, embeddings included; its measure is quality.py's.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from statistics import median
from typing import Any

import vramkit
from vramkit.demo import SentenceEmbedder, model_folder, tokenize
from vramkit.estimator import weight_bytes
from vramkit.sensitivity_store import store_for

from . import sensitivity_models
from .plan_judge import Formats, Judge, costs_of
from .quality import SENTENCES

UNIFORM = ("bf16", "int8", "fp8", "nf4", "nf4_dq", "fp4", "int4", "int4_g32")
# Where each label goes, in points from its square: several lie close together.
LABELS = {
    "bf16": (-12, 8), "int8": (8, -4), "fp8": (8, -3), "nf4": (8, -3), "nf4_dq": (-38, -14),
    "fp4": (8, -3), "int4": (-26, 5), "int4_g32": (8, -4),
}  # fmt: skip
# Formats for all layers in the table of all models, and random plans at each of their sizes.
COMPARED = ("bf16", "fp16", "int8", "fp8", "int4_g16", "int4_g32", "int4_g64", "int4", "nf4",
            "nf4_dq")  # fmt: skip
RANDOM, SEED = 8, 11
TIE = 1e-9  # the same plan, measured twice
SHARES = (0.135, 0.14, 0.15, 0.16, 0.17, 0.18, 0.19, 0.20, 0.22, 0.25, 0.28, 0.32, 0.38, 0.45)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "frontier.svg"


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """The picture's figures and every model's table; misses where a plan loses to what it beats."""
    results: dict[str, Any] = {}
    missed: list[str] = []
    if not options.models or "MiniLM" in options.models:
        results |= _picture(options, missed)
    results["models"] = {}
    for case in sensitivity_models.cases(options.models):
        print(f"\n{case.label}")
        results["models"][case.label] = _table(case, options.cache, missed)
    return results, missed


def _picture(options: Any, missed: list[str]) -> dict[str, Any]:
    """Least cosine by bytes, for uniform formats and for plans without and with data."""
    folder = model_folder()
    batch = tokenize(folder, SENTENCES)
    reference = SentenceEmbedder(vramkit.load(folder))
    total = weight_bytes(reference)
    recording = vramkit.record(reference, [batch])
    case = next(sensitivity_models.cases(["MiniLM"]))
    by_data = vramkit.sensitivity(reference, case.calibration, cache=options.cache or True)

    def cosine(model: Any) -> float:
        return vramkit.compare(recording, model, [batch]).cosine

    uniform = {}
    for name in UNIFORM:
        model = copy.deepcopy(reference)
        vramkit.convert(model, name)
        uniform[name] = (weight_bytes(model) / total, cosine(model))
    planned: dict[str, list[tuple[float, float]]] = {"weights": [], "data": []}
    for share in sorted({*SHARES, *(s for s, _ in uniform.values())}):
        for kind, found in (("weights", None), ("data", by_data)):
            plan = vramkit.plan(reference, f"{int(total * share)} B", sensitivity=found)
            model = plan.apply(copy.deepcopy(reference))
            planned[kind].append((plan.weights_bytes / total, cosine(model)))
            value = planned[kind][-1][1]
            for name, (size, other) in uniform.items():
                if size == share and other > value + 1e-4:
                    missed.append(
                        f"picture, uniform {name} at {size:.3f}: {other:.5f} > {value:.5f} "
                        f"planned by {kind}"
                    )
        values = "  ".join(f"by {kind} {rows[-1][1]:.5f}" for kind, rows in planned.items())
        print(f"plan {share:6.3f}: {values}", flush=True)
    for name, (size, value) in uniform.items():
        print(f"{name:10} {size:6.3f}: {value:.5f}")
    _draw(planned, uniform, total)
    return {
        "planned": planned["weights"],
        "planned_by_data": planned["data"],
        "uniform": uniform,
        "fp32_bytes": total,
    }


def _table(case: sensitivity_models.Case, cache: Any, missed: list[str]) -> list[dict[str, Any]]:
    """Relative L2 errors on the judge's inputs, at the bytes of each uniform format."""
    judge = Judge(case, store_for(cache))
    kept = cache or True
    tables = {
        "weights": vramkit.sensitivity(case.model, cache=kept),
        "data": vramkit.sensitivity(case.model, case.calibration, cache=kept),
    }
    fixed = weight_bytes(case.model) - sum(sizes[None] for sizes in judge.sizes.values())
    uniform = {name: judge.uniform(name) for name in COMPARED}
    errors = {name: judge.error(formats) for name, formats in uniform.items()}
    rows = []
    for budget in sorted({judge.bytes(formats) for formats in uniform.values()}):
        best = min(
            (errors[name], name)
            for name, formats in uniform.items()
            if judge.bytes(formats) <= budget
        )
        row: dict[str, Any] = {"bytes": budget, "best_uniform": best[1], "uniform": best[0]}
        plans: dict[str, Formats] = {}
        for kind, found in tables.items():
            plan = vramkit.plan(case.model, f"{budget + fixed} B", sensitivity=found)
            plans[f"planned_by_{kind}"] = {e.name: e.format for e in plan.entries}
        plans["greedy_by_data"] = judge.greedy(costs_of(tables["data"]), budget)
        row |= {name: judge.error(formats) for name, formats in plans.items()}
        generator = random.Random(SEED)
        drawn = [judge.error(judge.random(generator, budget)) for _ in range(RANDOM)]
        row |= {"random_best": min(drawn), "random_median": median(drawn)}
        rows.append(row)
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()),
            flush=True,
        )
        ours = row["planned_by_data"]
        for other in ("uniform", "greedy_by_data", "random_best"):
            if row[other] < ours * (1 - TIE):
                by = best[1] if other == "uniform" else other
                missed.append(
                    f"{case.label}, {budget} B: {by} errs {row[other]:.4g}, the plan {ours:.4g}"
                )
    return rows


def _draw(
    planned: dict[str, list[tuple[float, float]]],
    uniform: dict[str, tuple[float, float]],
    total: int,
) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "vramkit"  # the same picture for the same figures
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for kind, marker, colour, label in (
        ("weights", "-o", "#0072b2", "vramkit plan (mixed formats)"),
        ("data", "--^", "#009e73", "the same, by sensitivity on 64 sentences"),
    ):
        axes.plot(
            *zip(*[(s * 100, 1 - c) for s, c in planned[kind]], strict=True),
            marker,
            ms=4,
            color=colour,
            label=label,
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
    axes.set_xlim(11.5, 54)  # room for the labels
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
