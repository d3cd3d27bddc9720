"""The native planner with places: against an independent solver, its promises, bad input."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vramkit import _core

numpy = pytest.importorskip("numpy")
optimize = pytest.importorskip("scipy.optimize")


def problem(seed):
    """Phases, groups, and keywords; losses and seconds are multiples of 2^-10."""
    g = random.Random(seed)

    def figure(most):
        return g.randrange(most) / 1024

    phases = [(g.randrange(200), figure(50)) for _ in range(g.choice([1, 1, 2, 3]))]
    groups = []
    for _ in range(g.randrange(3, 9)):
        choices = []
        for _ in range(g.randrange(1, 5)):
            size, loss, compute, link = (
                g.randrange(1, 1000),
                figure(4000),
                figure(300),
                figure(700),
            )
            backed = size if len(phases) > 1 else 0
            turn = link if len(phases) > 1 else 0.0
            choices.append((size, 0, backed, False, loss, compute, 0.0, 0.0, turn))
            choices.append((0, size, size, False, loss, compute, link, 0.0, 0.0))
            if g.random() < 0.7:
                choices.append((0, size, 0, True, loss, compute, link, 4 * link, 0.0))
        groups.append((g.randrange(len(phases)), choices))
    total = sum(max(c[0] for c in cs) for _, cs in groups)
    options = {
        "host_limit": None if g.random() < 0.4 else g.randrange(total // 3, 2 * total),
        "slots": g.randrange(1, 4),
        "loss_limit": None if g.random() < 0.6 else figure(4000) * len(groups) / 2,
        "weights": g.choice([None, (1.0, 1.0), (0.25, 1.0), (1.0, 0.125), (0.0, 1.0)]),
    }
    return phases, groups, g.randrange(50, max(60, total)), options


def oracle(phases, groups, limit, options, cap=None, weights=None):
    """The least of weights by scipy's integer programming; None if nothing fits.

    Variables: the choices; by phase its slot, its seconds, whether it stages, and its staging
    slot; and the one staging slot that phases share.
    """
    flat = [(g, p, c) for g, (p, cs) in enumerate(groups) for c in cs]
    n, k = len(flat), len(phases)
    slot, second, stages, staging = n, n + k, n + 2 * k, n + 3 * k
    width = n + 3 * k + 1
    biggest = max(c[1] for _, _, c in flat) + 1
    rows, low, high = [], [], []

    def add(entries, least, most):
        row = numpy.zeros(width)
        for at, value in entries:
            row[at] += value
        rows.append(row)
        low.append(least)
        high.append(most)

    for g in range(len(groups)):
        add([(i, 1) for i, (h, _, _) in enumerate(flat) if h == g], 1, 1)
    for p, (reserved, base) in enumerate(phases):
        mine = [(i, c) for i, (_, q, c) in enumerate(flat) if q == p]
        add(
            [(i, c[0]) for i, c in mine] + [(slot + p, options["slots"])],
            -math.inf,
            limit - reserved,
        )
        for i, c in mine:
            add([(slot + p, 1), (i, -c[1])], 0, math.inf)
            if c[3]:
                add([(stages + p, 1), (i, -1)], 0, math.inf)
        # The staging slot is as large as this phase's slot if the phase stages.
        add([(staging, 1), (slot + p, -1), (stages + p, -biggest)], -biggest, math.inf)
        for kind, start in ((5, base), (6, 0.0), (7, 0.0)):
            add([(second + p, 1)] + [(i, -c[kind]) for i, c in mine], start, math.inf)
    if options["host_limit"] is not None:
        host = [(i, c[2]) for i, (_, _, c) in enumerate(flat)]
        add([*host, (staging, options["slots"])], -math.inf, options["host_limit"])
    losses = [(i, c[4]) for i, (_, _, c) in enumerate(flat)]
    limits = [v for v in (options["loss_limit"], cap) if v is not None]
    if limits:
        add(losses, -math.inf, min(limits))
    loss_weight, time_weight = weights
    cost = numpy.zeros(width)
    for i, (_, _, c) in enumerate(flat):
        cost[i] = loss_weight * c[4] + time_weight * c[8]
    cost[second : second + k] = time_weight
    whole = numpy.zeros(width)
    whole[:n] = whole[stages : stages + k] = 1
    upper = numpy.full(width, math.inf)
    upper[:n] = upper[stages : stages + k] = 1
    answer = optimize.milp(
        cost,
        integrality=whole,
        bounds=optimize.Bounds(0, upper),
        constraints=optimize.LinearConstraint(numpy.array(rows), low, high),
        options={"mip_rel_gap": 0},
    )
    assert answer.status in (0, 2), answer.message
    return answer.fun if answer.success else None


@pytest.mark.parametrize("block", range(10))
def test_agrees_with_scipys_integer_programming(block):
    """Three hundred instances with places, turns, limits of host and loss, and every weighing."""
    solved = 0
    for seed in range(30 * block, 30 * block + 30):
        phases, groups, limit, options = problem(seed)
        result = _core.place(phases, groups, limit, **options)
        weights = options["weights"]
        expected = oracle(phases, groups, limit, options, weights=weights or (1.0, 0.0))
        assert result.optimal, seed
        assert result.found == (expected is not None), seed
        if expected is None:
            continue
        solved += 1
        assert result.objective == pytest.approx(expected, rel=1e-7, abs=1e-6), seed
        assert result.lower_bound == result.objective
        assert max(result.device_bytes) <= limit
        if options["host_limit"] is not None:
            assert result.host_bytes <= options["host_limit"]
        if weights is None:
            then = oracle(
                phases, groups, limit, options, cap=result.loss + 1e-9, weights=(0.0, 1.0)
            )
            assert result.seconds == pytest.approx(then, rel=1e-6, abs=1e-5), seed
    assert solved > 7


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3000), st.integers(0, 3000))
def test_a_larger_limit_is_never_worse(seed, more, host):
    phases, groups, limit, options = problem(seed)
    before = _core.place(phases, groups, limit, **options)
    if options["host_limit"] is not None:
        options["host_limit"] += host
    after = _core.place(phases, groups, limit + more, **options)
    if not before.found:
        return
    assert after.found
    assert after.lower_bound <= before.objective
    if before.optimal and after.optimal:
        assert after.objective <= before.objective * (1 + 1e-11)
        if options["weights"] is None and after.loss == before.loss:
            assert after.seconds <= before.seconds * (1 + 1e-11)


def test_limited_search_states_its_gap():
    generator = random.Random(3)
    groups = []
    for _ in range(80):
        choices = []
        for _ in range(4):
            size = generator.randrange(1, 10**9)
            figures = (1e9 / size, size / 3e11, size / 25e9)
            choices.append((size, 0, 0, False, figures[0], figures[1], 0.0, 0.0, 0.0))
            choices.append((0, size, size, False, *figures, 0.0, 0.0))
        groups.append((0, choices))
    small = _core.place([(0, 0.0)], groups, 10**10, weights=(1.0, 1e3), state_limit=1, node_limit=1)
    large = _core.place([(0, 0.0)], groups, 10**10, weights=(1.0, 1e3))
    assert not small.optimal
    assert small.lower_bound <= large.objective * (1 + 1e-9)
    assert large.lower_bound >= small.lower_bound * (1 - 1e-9)
    assert large.objective - large.lower_bound <= 1e-2 * large.objective
    again = _core.place([(0, 0.0)], groups, 10**10, weights=(1.0, 1e3))
    assert (again.choices, again.lower_bound) == (large.choices, large.lower_bound)


def test_malformed():
    good = (1, 0, 0, False, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert _core.place([(0, 0.0)], [(0, [good])], 1).choices == [0]
    for groups, message in (
        ([(0, [])], "no choices"),
        ([(1, [good])], "phase 1 of 1"),
        ([(0, [(-1, *good[1:])])], "negative size"),
        ([(0, [(*good[:4], math.nan, *good[5:])])], "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.place([(0, 0.0)], groups, 10)
    with pytest.raises(ValueError, match="no phase"):
        _core.place([], [], 10)
    with pytest.raises(ValueError, match="slots"):
        _core.place([(0, 0.0)], [], 10, slots=0)
    assert not _core.place([(0, 0.0)], [(0, [good])], 0).found
