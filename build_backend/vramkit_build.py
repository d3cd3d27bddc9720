"""scikit-build-core, and two questions before it.

Where does the CUDA compiler come from? From the machine, if it has one; with `VRAMKIT_CUDA=wheels`
from NVIDIA's compiler wheels, which join the build's environment (cmake/Cuda.cmake finds them).

And where do torch's headers come from? The operators are built against the headers of LibTorch's
stable ABI and link no libtorch. If the environment that is installed into has torch, its headers
serve; else torch's own wheel is fetched without its dependencies, and only those headers are kept,
in build/torch-headers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403

Settings = dict[str, Any] | None

# Of one release: the compiler, its parts and the runtime must agree.
_CUDA_WHEELS = [
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
]
_KEPT = Path("build", "torch-headers")
_MARKER = Path("torch", "include", "torch", "csrc", "stable", "library.h")
_WANTED = (
    "torch/include/torch/csrc/stable/",
    "torch/include/torch/csrc/inductor/aoti_torch/",
    "torch/include/torch/headeronly/",
)


def _torch_is_here() -> bool:
    spec = importlib.util.find_spec("torch")
    homes = list(spec.submodule_search_locations or []) if spec else []
    homes.append(str(Path(sysconfig.get_path("purelib"), "torch")))
    return any(Path(home).parent.joinpath(_MARKER).exists() for home in homes)


def _headers_are_named(config_settings: Settings) -> bool:
    text = " ".join(map(str, (config_settings or {}).items())) + os.environ.get("CMAKE_ARGS", "")
    return "TORCH_STABLE_INCLUDE_DIR" in text


def _must_fetch(config_settings: Settings) -> bool:
    return not (_torch_is_here() or _headers_are_named(config_settings))


def _own_pip() -> list[str] | None:
    """Pip of the environment that is installed into, seen past pip's build isolation.

    It has just downloaded torch as a dependency, so this very version finds the wheel in its cache.
    """
    command = [sys.executable, "-I", "-m", "pip"]
    found = subprocess.run([*command, "--version"], capture_output=True, check=False)
    return command if found.returncode == 0 else None


def _compiler_is_a_wheel() -> bool:
    return os.environ.get("VRAMKIT_CUDA", "").lower() == "wheels"


def _name_compiler() -> None:
    """Tell CMake of the nvcc beside us, which pip's isolation hides from CMake's own Python."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    found = [nvcc for root in roots for nvcc in sorted(Path(root).glob("cu*/bin/nvcc"))]
    if not found:
        raise RuntimeError("VRAMKIT_CUDA=wheels, but no nvidia/cu*/bin/nvcc can be imported")
    os.environ["CUDACXX"] = str(found[-1])


def _requirements(requires: list[str], config_settings: Settings) -> list[str]:
    if _compiler_is_a_wheel():
        requires = [*requires, *_CUDA_WHEELS]
    if not _must_fetch(config_settings) or _KEPT.joinpath(_MARKER).exists() or _own_pip():
        return requires
    return [*requires, "pip"]


def _fetch_headers() -> Path:
    include = _KEPT.joinpath("torch", "include").resolve()
    if _KEPT.joinpath(_MARKER).exists():
        return include
    print("vramkit: no torch in this environment; fetching its wheel for the headers", flush=True)
    _KEPT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_KEPT.parent) as name:
        folder = Path(name)
        pip = _own_pip() or [sys.executable, "-m", "pip"]
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        done = subprocess.run([*pip, "download", *options, "torch>=2.11"], check=False)
        wheels = list(folder.glob("torch-*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(
                "torch's wheel could not be fetched. Install torch 2.11 or newer first and build "
                "again, or name its headers: "
                "pip install . -C cmake.define.TORCH_STABLE_INCLUDE_DIR=<torch>/include"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [n for n in wheel.namelist() if n.startswith(_WANTED)]
            wheel.extractall(folder / "headers", members)
        # Renamed into place when complete: a build that is interrupted leaves no half of it.
        shutil.rmtree(_KEPT, ignore_errors=True)
        folder.joinpath("headers").rename(_KEPT)
    return include


def _build(
    step: Callable[..., str], output: str, config_settings: Settings, metadata: str | None
) -> str:
    settings = dict(config_settings or {})
    if _compiler_is_a_wheel():
        _name_compiler()
    if _must_fetch(config_settings):
        settings["cmake.define.TORCH_STABLE_INCLUDE_DIR"] = str(_fetch_headers())
    return step(output, settings, metadata)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What the build needs, with pip where torch's wheel must be fetched and no pip is at hand."""
    return _requirements(_backend.get_requires_for_build_wheel(config_settings), config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """As for a wheel."""
    return _requirements(_backend.get_requires_for_build_editable(config_settings), config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel."""
    return _build(_backend.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build an editable wheel."""
    return _build(_backend.build_editable, wheel_directory, config_settings, metadata_directory)
