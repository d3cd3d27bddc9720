"""The GPU's benchmarks, one after another: each beside what the device itself can do.

python -m benchmarks.gpu.bench [MODULE …] [--rehearse] [--json FILE] [--table FILE]

Each module has `run(rehearse)`, which prints and returns a dict, "missed" in it what was promised
and not reached; a rehearsal is small, on the CPU, and no measurement. One that fails does not cost
the others their turn.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

MODULES = ("limits", "decoding", "products", "int8", "training", "offload", "estimates")


class Both(io.StringIO):
    """What is printed, kept too."""

    def write(self, text: str) -> int:
        """To both."""
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def one(name: str, rehearse: bool, printed: io.StringIO) -> dict[str, Any]:
    """A module's result with its seconds, or the error that it ended with."""
    begin = time.perf_counter()
    try:
        with contextlib.redirect_stdout(printed):
            found: dict[str, Any] = importlib.import_module(f"benchmarks.gpu.{name}").run(rehearse)
    except Exception as error:  # whatever it is, the others are measured
        traceback.print_exc(file=sys.stderr)
        found = {"error": f"{type(error).__name__}: {error}"}
    if not rehearse:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return {**found, "seconds": round(time.perf_counter() - begin, 1)}


def main() -> int:
    """Measure, print, and write what was asked for; 1 where a module failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(MODULES))
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU: no measurement")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.modules) - set(MODULES)
    if unknown:
        parser.error(f"no module {min(unknown)!r}; there are {', '.join(MODULES)}")
    results: dict[str, dict[str, Any]] = {}
    printed = Both()
    for name in arguments.modules or MODULES:
        results[name] = found = one(name, arguments.rehearse, printed)
        with contextlib.redirect_stdout(printed):
            if "error" in found:
                print(f"  FAILED: {found['error']}")
            print("".join(f"  MISSED {name}: {m}\n" for m in found.get("missed", [])), end="")
            print(f"{name}: {found['seconds']} s\n")
        # After each: what was measured is there whatever becomes of the rest.
        if arguments.table:
            arguments.table.write_text(printed.getvalue())
        if arguments.json:
            whole = {"rehearsal": arguments.rehearse, "modules": results}
            arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 1 if any("error" in found for found in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
