"""The pytest plugin: budgets fail tests, baselines are held and written, precisions multiply."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from _pytest.pytester import SysModulesSnapshot
from conftest import RunPython

pytest_plugins = ["pytester"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _modules_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner runs do not forget what they import: torch's operators register once a process."""
    monkeypatch.setattr(SysModulesSnapshot, "restore", lambda _: None)


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """An inner run, which loads the plugin by name unless its entry point is installed."""
    names = {entry.name for entry in entry_points(group="pytest11")}
    load = () if "vramkit" in names else ("-p", "pytest_vramkit")
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *load, *arguments)


def test_start_up_is_light(run_python: RunPython, tmp_path: Path) -> None:
    """A run of tests that use none of it imports neither torch nor vramkit."""
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    script = """
import sys, pytest
class Look:
    def pytest_sessionfinish(self, session):
        found = [m for m in ("torch", "vramkit", "numpy") if m in sys.modules]
        assert not found, found
        assert session.config.pluginmanager.hasplugin("pytest_vramkit") or \
            session.config.pluginmanager.hasplugin("vramkit")
from importlib.metadata import entry_points
installed = {e.name for e in entry_points(group="pytest11")}
loaded = [] if "vramkit" in installed else ["-p", "pytest_vramkit"]
sys.exit(pytest.main([*loaded, "-q", "-p", "no:hypothesispytest", "-p", "no:schemathesis",
                      "--rootdir", sys.argv[1], sys.argv[1]], plugins=[Look()]))
"""
    run_python(script, tmp_path)


BUDGETS = """
import pytest, torch

def test_within(memory_budget):
    memory_budget("2 MiB", device="cpu")
    x = torch.ones(MIB // 4)

def test_beyond(memory_budget):
    kept = torch.ones(4 * MIB // 4)  # before the budget: not counted
    memory_budget("2 MiB", device="cpu")
    x = torch.ones(3 * MIB // 4)

def test_part(memory_budget):
    with memory_budget("2 MiB", device="cpu") as budget:
        x = torch.ones(MIB // 4)
    y = torch.ones(8 * MIB // 4)
    assert budget.peak_bytes == MIB

def test_part_beyond(memory_budget):
    with memory_budget("1 MiB", device="cpu"):
        x = torch.ones(2 * MIB // 4)
    raise AssertionError("not reached")

@pytest.mark.memory_budget("1 MiB", device="cpu")
def test_marked():
    x = torch.ones(2 * MIB // 4)

@pytest.mark.memory_budget("1 MiB", device="cpu")
def test_own_failure_first():
    x = torch.ones(2 * MIB // 4)
    assert x is None, "its own"

def test_two_at_once(memory_budget):
    memory_budget("1 MiB", device="cpu")
    memory_budget("2 MiB", device="cpu")

def test_bad_limit(memory_budget):
    memory_budget("much", device="cpu")

def test_afterwards(memory_budget):
    memory_budget(1, device="cpu")
""".replace("MIB", str(MIB))


def test_budgets(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(BUDGETS)
    result = run(pytester, "-v")
    result.assert_outcomes(passed=3, failed=6)
    text = result.stdout.str()
    for name in ("within", "part", "afterwards"):
        result.stdout.fnmatch_lines([f"*::test_{name} PASSED*"])
    held = "torch held 3.0 MiB at most, which is 1.0 MiB (50.0%) more than 2.0 MiB"
    assert held in text
    assert text.count("which is 1.0 MiB (100.0%) more than 1.0 MiB") >= 2
    assert "its own" in text
    assert "not reached" not in text.split("short test summary")[0].split("AssertionError:")[-1]
    assert "which is running already" in text
    assert "ERROR" not in text.split("short test summary")[-1]


QUALITY = """
import json

def test_quality(quality_regression):
    with open("figures.json") as file:
        figures = {k: float(v) for k, v in json.load(file).items()}
    quality_regression(figures, rel=0.1, better={"error": "lower", "sqnr": "higher"})
"""


def quality(pytester: pytest.Pytester, *arguments: str, **figures: float) -> pytest.RunResult:
    pytester.makepyfile(test_it=QUALITY)
    (pytester.path / "figures.json").write_text(json.dumps({k: str(v) for k, v in figures.items()}))
    return run(pytester, *arguments)


def test_baselines(pytester: pytest.Pytester) -> None:
    first = quality(pytester, error=1.0, sqnr=30.0)
    first.assert_outcomes(failed=1)
    first.stdout.fnmatch_lines(["*no baseline for 'quality'*--vramkit-update*"])
    written = quality(pytester, "--vramkit-update", error=1.0, sqnr=30.0)
    written.assert_outcomes(passed=1)
    written.stdout.fnmatch_lines(["*vramkit baselines written*", "*test_quality.json"])
    file = pytester.path / "vramkit-baselines" / "test_it" / "test_quality.json"
    data = json.loads(file.read_text())
    assert data == {
        "quality": {
            "error": {"value": 1.0, "rel": 0.1, "abs": 0.0, "better": "lower"},
            "sqnr": {"value": 30.0, "rel": 0.1, "abs": 0.0, "better": "higher"},
        }
    }
    for passing in ({"error": 1.1, "sqnr": 27.0}, {"error": 0.1, "sqnr": 90.0}):
        quality(pytester, **passing).assert_outcomes(passed=1)
    for failing, line in (
        ({"error": 1.11, "sqnr": 30.0}, "*error: 1.11, baseline 1 (+11.0%), tolerance 0.1*"),
        ({"error": 1.0, "sqnr": 26.9}, "*sqnr: 26.9, baseline 30 (-10.3%), tolerance 3*"),
        ({"error": 1.0}, "*sqnr: in the baseline, and not given*"),
        ({"error": 1.0, "sqnr": 30.0, "more": 1.0}, "*more: 1, which the baseline does not have*"),
        ({"error": float("nan"), "sqnr": 30.0}, "*not finite: error = nan*"),
    ):
        result = quality(pytester, **failing)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines([line])
    assert json.loads(file.read_text()) == data
    # Tolerances changed by hand stay, and nothing that is not finite is ever written.
    data["quality"]["error"]["rel"] = 0.5
    file.write_text(json.dumps(data))
    quality(pytester, error=1.4, sqnr=30.0).assert_outcomes(passed=1)
    quality(pytester, "--vramkit-update", error=2.0, sqnr=30.0).assert_outcomes(passed=1)
    kept = json.loads(file.read_text())["quality"]["error"]
    assert kept == {"value": 2.0, "rel": 0.5, "abs": 0.0, "better": "lower"}
    bad = quality(pytester, "--vramkit-update", error=float("inf"), sqnr=30.0)
    bad.assert_outcomes(failed=1)
    assert json.loads(file.read_text())["quality"]["error"] == kept
    for broken in ("{", '{"quality": 3}', '{"quality": {"error": {"value": 1}}}'):
        file.write_text(broken)
        result = quality(pytester, error=2.0, sqnr=30.0)
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(["*test_quality.json is no *"])


def test_comparisons_and_parameters(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import copy
import pytest, torch, vramkit

@pytest.mark.parametrize("width", [64, 128])
def test_one(quality_regression, width):
    torch.manual_seed(0)
    model = torch.nn.Linear(width, 64)
    small = copy.deepcopy(model)
    vramkit.convert(small, "int8")
    quality_regression(vramkit.compare(model, small, [torch.randn(8, width)]))
    quality_regression({"bytes": 12}, name="size")
    with pytest.raises(ValueError, match="another name"):
        quality_regression({"bytes": 12}, name="size")
    with pytest.raises(TypeError, match="list"):
        quality_regression([1.0], name="list")
    with pytest.raises(ValueError, match="no figures"):
        quality_regression({}, name="none")
    with pytest.raises(ValueError, match="lower, higher, equal"):
        quality_regression({"a": 1}, name="way", better="more")
    with pytest.raises(ValueError, match="not negative"):
        quality_regression({"a": 1}, name="tolerance", rel=-1)
"""
    )
    run(pytester, "--vramkit-update").assert_outcomes(passed=2)
    files = sorted(p.name for p in pytester.path.glob("vramkit-baselines/*/*.json"))
    assert files == ["test_one_128.json", "test_one_64.json"]
    run(pytester).assert_outcomes(passed=2)
    # Nothing changes where nothing changed.
    again = run(pytester, "--vramkit-update")
    assert "baselines written" not in again.stdout.str()


def test_failed_tests_write_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "def test_it(quality_regression):\n    quality_regression({'a': 1})\n    assert False\n"
    )
    run(pytester, "--vramkit-update").assert_outcomes(failed=1)
    assert not list(pytester.path.rglob("*.json"))


PRECISIONS = """
import pytest, torch

def test_all(precision_matrix):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    x = torch.randn(4, 64)
    expected = model(x)
    y = precision_matrix.apply(model)(x.to(precision_matrix.dtype))
    assert y.dtype == precision_matrix.dtype
    bound = {"fp32": 0.0, "fp16": 2e-3, "bf16": 2e-2, "int8": 2e-2, "fp8": 8e-2}[precision_matrix]
    assert float((y - expected).norm() / expected.norm()) <= bound

@pytest.mark.precisions("fp32", "NF4")
def test_some(precision_matrix):
    assert precision_matrix in ("fp32", "nf4")
"""


def test_precisions(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PRECISIONS)
    result = run(pytester, "-v")
    result.assert_outcomes(passed=7)
    for name in ("all[fp32]", "all[bf16]", "all[fp16]", "all[fp8]", "all[int8]", "some[nf4]"):
        assert f"test_{name} PASSED" in result.stdout.str()
    run(pytester, "--vramkit-precisions", "fp32,BF16").assert_outcomes(passed=3)
    pytester.makeini("[pytest]\nvramkit_precisions = fp32 fp16\n")
    run(pytester).assert_outcomes(passed=4)
    result = run(pytester, "--vramkit-precisions", "fp33")
    assert result.ret != 0
    assert "the precisions are" in result.stdout.str() + result.stderr.str()
