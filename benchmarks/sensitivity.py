"""Whether sensitivity predicts: rank correlation of predicted and measured errors of random plans.

On each real model twice 24 random plans are measured end to end, on inputs that the sensitivity was
not measured on.
"""

from __future__ import annotations

import random
from typing import Any

import vramkit
from vramkit.planner import DEFAULT_FORMATS
from vramkit.sensitivity_store import store_for

from . import sensitivity_models
from .plan_judge import Formats, Judge, rank_correlation

PLANS, PROMISED, SEED = 24, 0.9, 5
# Measured too where it takes no more than so many calls of the model.
EACH_CALLS = 800


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Rank correlations by model and method, and those below what is promised."""
    results: dict[str, Any] = {}
    missed: list[str] = []
    for case in sensitivity_models.cases(options.models):
        judge = Judge(case, store_for(options.cache))
        tables = measured(case, options.cache)
        row: dict[str, Any] = {"layers": len(judge.found), "kinds": {}}
        row["seconds"] = {method: found.seconds for method, found in tables.items()}
        for kind, plans in random_plans(judge).items():
            row["kinds"][kind] = found = _ranked(judge, tables, plans)
            low, high = (f(plan["error"] for plan in found["plans"]) for f in (min, max))
            ranks = found["rank_correlation"]
            shown = "  ".join(f"{method} {rank:.3f}" for method, rank in ranks.items())
            print(f"{case.label:20}{kind:4} errors {low:.4f} to {high:.4f}: {shown}", flush=True)
            if kind == "few":
                missed += [
                    f"{case.label}: rank correlation {rank:.3f} by {method!r}"
                    for method, rank in ranks.items()
                    if rank < PROMISED
                ]
        results[case.label] = row
    return results, missed


def _ranked(
    judge: Judge, tables: dict[str, vramkit.Sensitivity], plans: list[Formats]
) -> dict[str, Any]:
    errors = [judge.error(plan) for plan in plans]
    predicted = {name: [found.loss(plan) for plan in plans] for name, found in tables.items()}
    return {
        "rank_correlation": {n: rank_correlation(p, errors) for n, p in predicted.items()},
        "plans": [
            {"bytes": judge.bytes(plan), "error": error} | {n: p[i] for n, p in predicted.items()}
            for i, (plan, error) in enumerate(zip(plans, errors, strict=True))
        ],
    }


def measured(case: sensitivity_models.Case, cache: Any) -> dict[str, vramkit.Sensitivity]:
    """The model's sensitivity by every method that is affordable."""
    found = {"weights": vramkit.sensitivity(case.model, cache=cache)}
    for method in ("layer", "output"):
        found[method] = vramkit.sensitivity(
            case.model, case.calibration, method=method, cache=cache, progress=False
        )
    if sum(len(layer.errors) for layer in found["weights"].layers) <= EACH_CALLS:
        found["each"] = vramkit.sensitivity(
            case.model, case.calibration, method="each", cache=cache
        )
    return found


def random_plans(judge: Judge) -> dict[str, list[Formats]]:
    """Two kinds of random plans: of a few formats each, and of all formats at once.

    "few": each plan draws two to four formats, and each layer one of these; sizes and errors range
    widely. "all": each layer draws from all formats, with odds by size so that the plans' bytes are
    spread from the least possible to half of what the model takes; such plans lie close together.
    """
    generator = random.Random(SEED)
    few = []
    for _ in range(PLANS):
        formats = generator.sample(DEFAULT_FORMATS, generator.randint(2, 4))
        few.append(
            {
                name: generator.choice([f for f in formats if f in sizes] or [None])
                for name, sizes in judge.sizes.items()
            }
        )
    smallest = sum(min(sizes.values()) for sizes in judge.sizes.values())
    half = sum(sizes[None] for sizes in judge.sizes.values()) / 2
    steps = [(half / smallest) ** ((i + 0.5) / PLANS) for i in range(PLANS)]
    return {"few": few, "all": [judge.random(generator, int(smallest * s)) for s in steps]}
