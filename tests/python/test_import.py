"""`import vramkit` is light: fast, without heavy modules, without touching a device."""

from __future__ import annotations

import json

from conftest import RunPython

HEAVY = ["transformers", "matplotlib", "torch._dynamo", "sympy", "rich", "tqdm", "click",
         "torch._subclasses", "torch.fx.experimental.symbolic_shapes", "safetensors", "PIL",
         "pandas", "scipy", "IPython", "torch._inductor", "hypothesis", "fastapi", "pydantic",
         "uvicorn", "prometheus_client"]  # fmt: skip

SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
made = []
if "torch._subclasses.fake_tensor" in sys.modules:
    mode = sys.modules["torch._subclasses.fake_tensor"].FakeTensorMode
    plain = mode.__init__
    def count(self, *args, **kwargs):
        made.append(1)
        plain(self, *args, **kwargs)
    mode.__init__ = count
start = time.perf_counter()
import vramkit
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "new": sorted(set(sys.modules) - before),
                  "fake_modes": len(made), "cuda": torch.cuda.is_initialized(),
                  "threads": __import__("threading").active_count()}))
"""


def test_import_is_light(run_python: RunPython) -> None:
    runs = [json.loads(run_python(SCRIPT).stdout) for _ in range(5)]
    for run in runs:
        new = run["new"]
        assert "vramkit" in new
        loaded = [m for m in new if any(m == h or m.startswith(h + ".") for h in HEAVY)]
        assert loaded == []
        assert run["fake_modes"] == 0
        assert run["cuda"] is False
        assert run["threads"] == 1
    assert min(run["seconds"] for run in runs) <= 0.120


def test_lazy_names_resolve(run_python: RunPython) -> None:
    """Every public name exists, and functions are not shadowed by modules of a similar name."""
    script = """
import types, torch, vramkit
for name in vramkit.__all__:
    value = getattr(vramkit, name)
    assert name in dir(vramkit), name
for name in ("estimate", "plan", "fit", "load", "save", "compare", "record", "convert",
             "convert_checkpoint", "restore", "set_weight", "register_format"):
    assert isinstance(getattr(vramkit, name), types.FunctionType), name
try:
    vramkit.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    run_python(script)
    run_python("import torch, vramkit; from vramkit import *; estimate, plan, convert")
