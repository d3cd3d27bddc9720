"""The native planner from Python: against an independent solver, errors, and its scale."""

from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vramkit import BudgetError, _core


def problem(seed: int, groups: int, choices: int) -> list[list[tuple[int, float]]]:
    generator = random.Random(seed)
    return [
        [(generator.randrange(10_000), generator.randrange(1 << 20) / 1024) for _ in range(choices)]
        for _ in range(groups)
    ]


def sizes(groups: list[list[tuple[int, float]]]) -> tuple[int, int]:
    return sum(min(b for b, _ in g) for g in groups), sum(max(b for b, _ in g) for g in groups)


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_scipys_integer_programming(seed):
    numpy = pytest.importorskip("numpy")
    optimize = pytest.importorskip("scipy.optimize")
    groups = problem(seed, 20, 6)
    low, high = sizes(groups)
    budget = low + (high - low) * (seed + 1) // 14
    flat = [choice for group in groups for choice in group]
    one_each = numpy.zeros((len(groups), len(flat)))
    for g in range(len(groups)):
        one_each[g, 6 * g : 6 * g + 6] = 1
    answer = optimize.milp(
        [cost for _, cost in flat],
        integrality=numpy.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint([[b for b, _ in flat]], -numpy.inf, budget),
        ],
        options={"mip_rel_gap": 0},
    )
    assert answer.success
    result = _core.plan_choices(groups, budget)
    assert result.optimal
    assert result.cost == pytest.approx(answer.fun, rel=1e-9, abs=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1e6)), min_size=1, max_size=4),
        max_size=5,
    ),
    st.integers(0, 200),
)
def test_result_keeps_its_word(groups, budget):
    low, _ = sizes(groups)
    if low > budget:
        with pytest.raises(BudgetError) as caught:
            _core.plan_choices(groups, budget)
        assert caught.value.needed_bytes == low
        return
    result = _core.plan_choices(groups, budget)
    taken = [group[choice] for group, choice in zip(groups, result.choices, strict=True)]
    assert result.bytes == sum(b for b, _ in taken) <= budget
    cost = 0.0
    for _, c in taken:
        cost += c
    assert result.cost == cost
    assert result.optimal
    assert result.lower_bound == result.cost
    # No single exchange improves an optimum, down to what the planner's fixed point resolves.
    resolved = 2.0**-66 * sum(max(c for _, c in group) for group in groups)
    for index, group in enumerate(groups):
        for b, c in group:
            if result.bytes - taken[index][0] + b <= budget:
                assert c >= taken[index][1] - resolved


def test_empty_and_malformed():
    assert _core.plan_choices([], 0).choices == []
    with pytest.raises(ValueError, match="no choices"):
        _core.plan_choices([[(1, 1.0)], []], 10)
    with pytest.raises(ValueError, match="finite"):
        _core.plan_choices([[(1, math.nan)]], 10)
    with pytest.raises(ValueError, match="0 or more"):
        _core.plan_choices([[(-1, 1.0)]], 10)
    with pytest.raises(ValueError, match="state_limit"):
        _core.plan_choices([[(1, 1.0)]], 10, state_limit=0)


def test_limited_search_states_its_gap():
    # Cost follows size exactly: the relaxation tells plans apart only by how much room they waste.
    generator = random.Random(5)
    groups = []
    for _ in range(60):
        numbers = [generator.randrange(10**9) for _ in range(4)]
        groups.append([(n, float(10**9 - n)) for n in numbers])
    low, high = sizes(groups)
    result = _core.plan_choices(groups, (low + high) // 2, state_limit=1000)
    assert not result.optimal
    assert result.lower_bound < result.cost
    assert result.cost - result.lower_bound < 5e-3 * result.cost
    assert "optimal=False" in repr(result)


def test_thousand_layers_of_twelve_formats():
    generator = random.Random(1)
    groups = []
    for _ in range(1000):
        weights = int(math.exp(generator.uniform(11.5, 18.5)))
        sensitivity = weights * math.exp(generator.gauss(0, 1.5))
        groups.append(
            [
                (int(weights * bits / 8), sensitivity * math.exp(-1.386 * bits))
                for bits in (2.1, 3.1, 4.1, 4.25, 4.5, 5, 6, 8, 8.1, 10, 16, 32)
            ]
        )
    low, high = sizes(groups)
    start = time.perf_counter()
    result = _core.plan_choices(groups, low + (high - low) // 3)
    seconds = time.perf_counter() - start
    assert result.cost - result.lower_bound <= 1e-6 * result.cost
    assert seconds < 10  # milliseconds on an idle machine
