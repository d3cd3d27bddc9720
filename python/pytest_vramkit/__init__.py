"""The pytest plugin of vramkit: memory budgets, quality baselines, and tests by precision.

pytest loads this whenever it starts. It is a package of its own because `import vramkit` imports
torch: nothing here does before a test asks for a fixture (docs/pytest.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from ._baselines import Baselines, QualityRegression
from ._budget import Budget, BudgetFactory

if TYPE_CHECKING:
    import torch

__all__ = ["Budget", "BudgetFactory", "Precision", "QualityRegression"]

DEFAULT_PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8")
_budgets = pytest.StashKey["list[Budget]"]()
_written = pytest.StashKey["list[str]"]()
_passed = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and settings."""
    group = parser.getgroup("vramkit", "memory and quality of models (vramkit)")
    group.addoption(
        "--vramkit-update",
        action="store_true",
        help="write what quality_regression was given to the baseline files",
    )
    group.addoption(
        "--vramkit-precisions",
        metavar="LIST",
        help="of the precisions of precision_matrix run only these, separated by commas",
    )
    parser.addini(
        "vramkit_precisions",
        "precisions of precision_matrix",
        type="args",
        default=list(DEFAULT_PRECISIONS),
    )
    parser.addini(
        "vramkit_baselines",
        "folder of the baseline files, beside each test file",
        default="vramkit-baselines",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Markers."""
    config.addinivalue_line(
        "markers",
        'memory_budget(limit, device=None): the test fails where it holds more, "64 MiB"',
    )
    config.addinivalue_line(
        "markers", "precisions(name, ...): the precisions of precision_matrix for this test"
    )
    config.stash[_written] = []


class Precision(str):
    """One precision of `precision_matrix`: its name, with what it does to a model."""

    __slots__ = ()

    @property
    def dtype(self) -> torch.dtype:
        """What plain parameters have in it, and inputs should."""
        from vramkit.precision import PrecisionMode

        return PrecisionMode.parse(str(self)).torch_dtype

    def apply(self, model: Any) -> Any:
        """Put a model in this precision, in place, and return it.

        fp32, fp16 and bf16 cast; any other stores weights by `vramkit.convert` and casts what
        stays plain to `dtype`.
        """
        import vramkit

        if self not in ("fp32", "fp16", "bf16"):
            vramkit.convert(model, str(self))
        return model.to(self.dtype)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every precision, where `precision_matrix` is asked for."""
    if "precision_matrix" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("precisions")
    names: Sequence[str] = (
        marker.args if marker is not None else metafunc.config.getini("vramkit_precisions")
    )
    chosen = _parsed(names)
    only = metafunc.config.getoption("--vramkit-precisions")
    if only is not None:
        kept = _parsed([part for part in only.split(",") if part.strip()])
        chosen = [name for name in chosen if name in kept]
    metafunc.parametrize("precision_matrix", chosen, indirect=True, ids=[str(n) for n in chosen])


def _parsed(names: Sequence[str]) -> list[Precision]:
    from vramkit.precision import PrecisionMode

    try:
        return list(dict.fromkeys(Precision(PrecisionMode.parse(name).value) for name in names))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture
def precision_matrix(request: pytest.FixtureRequest) -> Precision:
    """The test runs once for each precision; this is its name, with `apply(model)` and `dtype`."""
    found: Precision = request.param
    return found


@pytest.fixture
def memory_budget(request: pytest.FixtureRequest) -> BudgetFactory:
    """`memory_budget("64 MiB")`: the test fails if torch holds more from then on.

    Counted is what torch allocates above what it held at that moment: on a CPU by the profiler's
    events, on CUDA by its peak of allocated bytes. Also a context manager, for a part of a test.
    """
    return BudgetFactory(request.node.stash.setdefault(_budgets, []))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[Any]:
    """Budgets end with the test's own code, so that passing one is a failure, not an error."""
    budgets = item.stash.setdefault(_budgets, [])
    marker = item.get_closest_marker("memory_budget")
    if marker is not None:
        BudgetFactory(budgets)(*marker.args, **marker.kwargs)
    try:
        result = yield
    finally:
        for budget in budgets:
            budget.stop()
    for budget in budgets:
        if budget.peak_bytes is not None:
            item.user_properties.append(("vramkit_peak_bytes", budget.peak_bytes))
        budget.check()
    item.stash[_passed] = True
    return result


@pytest.fixture
def quality_regression(request: pytest.FixtureRequest) -> Iterator[QualityRegression]:
    """`quality_regression({"sqnr_db": 31.2})`: the test fails where a figure left its baseline."""
    config = request.config
    path = Baselines.path_for(request.node, str(config.getini("vramkit_baselines")))
    found = QualityRegression(Baselines(path), update=config.getoption("--vramkit-update"))
    yield found
    if request.node.stash.get(_passed, False) and found.finish():
        config.stash[_written].append(str(path))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Which baselines were written."""
    written = config.stash.get(_written, [])
    if written:
        terminalreporter.section("vramkit baselines written")
        for path in written:
            terminalreporter.line(path)
