"""Builds and runs the GoogleTest suite of the C++ core: `pytest` alone tests all there is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADVICE = (
    "the C++ suite must build: it needs a C++20 compiler, CMake 3.25 or newer, and GoogleTest "
    "(Debian, Ubuntu: apt install g++ libgtest-dev; Fedora: dnf install gcc-c++ gtest-devel), "
    "which CMake downloads where it is not installed"
)


def find_cmake() -> str:
    """CMake beside this interpreter (pip's package), else from PATH."""
    beside = Path(sys.executable).with_name("cmake")
    found = str(beside) if beside.is_file() else shutil.which("cmake")
    if found is None:
        pytest.fail(f"no cmake found; {ADVICE}")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-60:])
        pytest.fail(f"{ADVICE}\n{' '.join(map(str, command))} failed:\n{tail}", pytrace=False)
    return done.stdout


def build_folder(cache: pytest.Cache) -> Path:
    """Kept between runs, so that only the first one compiles."""
    if os.environ.get("VRAMKIT_CPP_BUILD"):
        return Path(os.environ["VRAMKIT_CPP_BUILD"])
    return Path(cache.mkdir("vramkit-cpp-tests"))


def test_googletest_suite(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = getattr(request.config, "cache", None)
    folder = build_folder(cache) if cache is not None else tmp_path / "build"
    cmake = find_cmake()
    options = ["-DVRAMKIT_TESTS=ON", "-DVRAMKIT_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    ninja = Path(sys.executable).with_name("ninja")
    if not (folder / "CMakeCache.txt").exists():
        if ninja.is_file():
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        elif shutil.which("ninja"):
            options += ["-G", "Ninja"]
    run(cmake, "-S", ROOT, "-B", folder, *options)
    run(cmake, "--build", folder, "--parallel", str(min(4, os.cpu_count() or 1)))
    report = tmp_path / "report.json"
    suite = subprocess.run(
        [str(folder / "vramkit_tests"), f"--gtest_output=json:{report}", "--gtest_brief=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        cwd=tmp_path,
        check=False,
    )
    counted = json.loads(report.read_text()) if report.is_file() else {}
    tests, failures = counted.get("tests", 0), counted.get("failures", -1)
    with capsys.disabled():
        print(f"\nGoogleTest: {tests} tests, {failures} failures ", end="")
    assert suite.returncode == 0, suite.stdout
    assert failures == 0
    sources = list((ROOT / "tests" / "cpp").glob("test_*.cpp"))
    assert tests >= 10 * len(sources) > 0, "the binary holds fewer tests than the sources"
