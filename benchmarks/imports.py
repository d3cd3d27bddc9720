"""`import vramkit` after `import torch`: at most 120 ms, and nothing heavy comes along."""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from typing import Any

LIMIT_MS = 120
HEAVY = ("transformers", "matplotlib", "torch._dynamo", "sympy")
SCRIPT = f"""
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import vramkit
took = (time.perf_counter() - start) * 1e3
print(took, *[m for m in {HEAVY!r} if m in sys.modules and m not in before])
"""


def run(options: Any) -> tuple[dict[str, Any], list[str]]:
    """Nine fresh processes; the median counts."""
    times, heavy = [], set()
    for _ in range(9):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, check=True, text=True
        )
        took, *modules = done.stdout.split()
        times.append(float(took))
        heavy.update(modules)
    middle = median(times)
    print(f"import vramkit: median {middle:.1f} ms (limit {LIMIT_MS}), least {min(times):.1f}")
    missed = []
    if middle > LIMIT_MS:
        missed.append(f"import takes {middle:.0f} ms")
    missed += [f"import brings {name} along" for name in sorted(heavy)]
    return {"milliseconds": times, "median_ms": middle, "heavy": sorted(heavy)}, missed
