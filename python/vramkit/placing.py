"""From layers, rules and limits to the native planner's problem, and back to entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import _core
from .errors import BudgetError
from .plan_rules import Layer, Turns
from .plans import RESIDENT, Option, PlanEntry, PlanPhase
from .rates import Rates
from .sizes import format_size

# What of the whole scale of losses "speed" still weighs: it tells equally fast plans apart.
SPEED_LOSS_SHARE = 0.01


class Placed(NamedTuple):
    """The planner's answer as entries."""

    entries: list[PlanEntry]
    phases: list[PlanPhase]
    host_bytes: int
    optimal: bool
    gap: float


@dataclass
class _Problem:
    """The native planner's problem, and what its choices stand for."""

    layers: list[Layer]
    parts: Turns
    rates: Rates | None
    rows: int
    slots: int
    host_limit: int | None
    phases: list[tuple[int, float]] = field(default_factory=list)
    groups: list[tuple[int, list[Any]]] = field(default_factory=list)
    meaning: list[list[tuple[Option, str, str | None]]] = field(default_factory=list)

    def build(self, all_places: tuple[str, ...]) -> None:
        """Every allowed option at every allowed place, as the native planner's tuples."""
        self.phases = [(reserved, 0.0) for reserved in self.parts.reserved]
        turns = len(self.parts.names) > 1
        for layer in self.layers:
            phase = self.parts.names.index(layer.component)
            group, meaning = [], []
            for option in layer.allowed:
                compute = self._compute(layer, option) * self.parts.passes[phase]
                for tier, backing in ways(layer.places, all_places, turns):
                    group.append(
                        choice(option, tier, backing, compute, self.parts.passes[phase], self.rates)
                    )
                    meaning.append((option, tier, backing))
            self.groups.append((phase, group))
            self.meaning.append(meaning)

    def _compute(self, layer: Layer, option: Option) -> float:
        if self.rates is None:
            return 0.0
        return layer.entry(option, "device").seconds(self.rates, self.rows)

    def solve(self, budget: int, max_loss: float | None, weights: Any = None) -> Any:
        """The native planner's answer within `budget` device bytes."""
        return _core.place(
            self.phases,
            self.groups,
            budget,
            host_limit=self.host_room(),
            slots=self.slots,
            loss_limit=max_loss,
            weights=weights,
        )

    def host_room(self) -> int | None:
        """Of the host's limit, what is left for layers: waiting components' norms lie there."""
        if self.host_limit is None:
            return None
        return self.host_limit - (sum(self.parts.fixed) if len(self.parts.names) > 1 else 0)

    def weights(self, prefer: str) -> tuple[float, float] | None:
        """(of the loss, of a second) for a preference; None for "quality"."""
        if prefer == "quality":
            return None
        loss = sum(max(o.error for o in layer.allowed) for layer in self.layers)
        loss_scale = sum(
            min(layer.allowed, key=lambda o: (o.bytes, o.error)).error for layer in self.layers
        )
        seconds = 0.0
        for layer in self.layers:
            plain = layer.options[0]
            passes = self.parts.passes[self.parts.names.index(layer.component)]
            seconds += self._compute(layer, plain) * passes
        share = 1.0 if prefer == "balanced" else SPEED_LOSS_SHARE
        scale = loss_scale or loss
        return (share / scale if scale else 0.0, 1 / seconds if seconds else 1.0)


def ways(
    places: Sequence[str], all_places: Sequence[str], turns: bool
) -> list[tuple[str, str | None]]:
    """(tier, backing) of every way to keep a layer that may lie at `places`.

    Where components take turns, `backing` is where a resident waits for its turn.
    """
    found: list[tuple[str, str | None]] = []
    for tier in places:
        backings: list[str | None] = [None]
        if tier == "device" and turns:
            backings = ["host", "disk"] if "disk" in all_places else ["host"]
        found += [(tier, backing) for backing in backings]
    return found


def choice(
    option: Option,
    tier: str,
    backing: str | None,
    compute: float,
    passes: int,
    rates: Rates | None,
) -> tuple[Any, ...]:
    """The native planner's tuple for a layer in one format at one place; `compute` in seconds.

    (resident bytes, slot bytes, host bytes, reads disk, error, compute, link, disk, turn seconds).
    """
    size = option.bytes
    if tier == "device":
        turn = 0.0
        if backing is not None and rates is not None:
            turn = _copy(size, "link_bytes_per_second", rates)
            if backing == "disk":
                turn = max(turn, _copy(size, "disk_bytes_per_second", rates))
        host = size if backing == "host" else 0
        return (size, 0, host, False, option.error, compute, 0.0, 0.0, turn)
    link = _copy(size, "link_bytes_per_second", rates) * passes
    if tier == "host":
        return (0, size, size, False, option.error, compute, link, 0.0, 0.0)
    disk = _copy(size, "disk_bytes_per_second", rates) * passes
    return (0, size, 0, True, option.error, compute, link, disk, 0.0)


def _copy(size: int, rate: str, rates: Rates | None) -> float:
    per_second = getattr(rates, rate) if rates is not None else 0.0
    if not per_second:
        raise ValueError(f"streaming needs rates with {rate}")
    return float(size / per_second)


def place_layers(
    layers: list[Layer],
    parts: Turns,
    budget: int,
    *,
    buffer: int,
    places: tuple[str, ...],
    host_limit: int | None,
    prefer: str,
    max_loss: float | None,
    rates: Rates | None,
    rows: int,
    slots: int,
    simple: bool,
) -> Placed:
    """The plan within `budget` device bytes; BudgetError with the smallest limit if none fits."""
    problem = _Problem(layers, parts, rates, rows, slots, host_limit)
    if simple:
        return _formats_alone(problem, budget, buffer, max_loss)
    problem.build(places)
    weights = problem.weights(prefer)
    result = problem.solve(budget, max_loss, weights)
    if not result.found:
        raise _cannot(problem, budget, buffer, max_loss)
    entries = [
        layer.entry(*meaning[index])
        for layer, meaning, index in zip(layers, problem.meaning, result.choices, strict=True)
    ]
    phases = _phases(problem, entries, result.device_bytes, result.slot_bytes)
    host = result.host_bytes + (sum(parts.fixed) if len(parts.names) > 1 else 0)
    gap = 0.0
    if not result.optimal:
        gap = _share(result.objective - result.lower_bound, result.objective)
        if weights is None:
            gap = max(gap, _share(result.seconds - result.seconds_lower_bound, result.seconds))
    return Placed(entries, phases, host, result.optimal, gap)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _formats_alone(problem: _Problem, budget: int, buffer: int, max_loss: float | None) -> Placed:
    """All layers on the device: a knapsack of formats alone, solved to the optimum."""
    groups = [[(o.bytes, o.error) for o in layer.allowed] for layer in problem.layers]
    reserved = problem.parts.reserved[0]
    fixed, activations = problem.parts.fixed[0], problem.parts.activations[0]
    try:
        result = _core.plan_choices(groups, budget - reserved)
    except BudgetError as error:
        smallest = error.needed_bytes + reserved + buffer
        raise BudgetError(
            f"no choice of formats fits {format_size(budget + buffer)}: the smallest limit that "
            f"would do is {format_size(smallest)} ({smallest} B), of which {format_size(fixed)} "
            "are norms, biases, buffers and layers that stay plain, "
            f"{format_size(buffer)} buffer"
            + (f" and {format_size(activations)} the call's own memory" if activations else "")
            + _largest(problem.layers),
            smallest,
        ) from None
    if max_loss is not None and result.cost > max_loss:
        room = smallest_budget(groups, max_loss)
        if room is None:
            raise _least_loss(problem.layers, max_loss)
        smallest = room + reserved + buffer
        raise BudgetError(
            f"within {format_size(budget + buffer)} the least sum of errors is {result.cost:.3g}, "
            f"more than max_quality_loss={max_loss:.3g}; the smallest limit that would do is "
            f"{format_size(smallest)} ({smallest} B)",
            smallest,
        )
    entries = [
        layer.entry(layer.allowed[index], "device")
        for layer, index in zip(problem.layers, result.choices, strict=True)
    ]
    phases = _phases(problem, entries, [reserved + result.bytes], [0])
    gap = _share(result.cost - result.lower_bound, result.cost)
    return Placed(entries, phases, 0, result.optimal, gap)


def smallest_budget(groups: list[list[tuple[int, float]]], max_loss: float) -> int | None:
    """The fewest bytes of a choice of each group whose costs sum to `max_loss` at most.

    None if no choice does. Exact where the planner proves its optima.
    """
    if math.fsum(min(c for _, c in g) for g in groups) > max_loss:
        return None
    low = sum(min(b for b, _ in g) for g in groups)
    high = sum(max(b for b, _ in g) for g in groups)

    def enough(budget: int) -> bool:
        return _core.plan_choices(groups, budget).cost <= max_loss

    return least_that(enough, low, high)


def least_that(enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number from `low` to `high` that is enough, if `high` is."""
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _largest(layers: list[Layer]) -> str:
    if not layers:
        return ""
    sizes = [min(o.bytes for o in layer.allowed) for layer in layers]
    most = max(range(len(sizes)), key=sizes.__getitem__)
    return (
        f"; the largest layer, {layers[most].candidate.name!r}, takes "
        f"{format_size(sizes[most])} at its smallest"
    )


def _least_loss(layers: list[Layer], max_loss: float) -> BudgetError:
    least = math.fsum(min(o.error for o in layer.allowed) for layer in layers)
    return BudgetError(
        f"no limit would do for max_quality_loss={max_loss:.3g}: with these formats and pins the "
        f"least sum of errors is {least:.3g}"
    )


def _cannot(problem: _Problem, budget: int, buffer: int, max_loss: float | None) -> BudgetError:
    """Which phase needs what, and the smallest limit that would do."""
    needs = _core.least_device_bytes(problem.phases, problem.groups, slots=problem.slots)
    worst = max(range(len(needs)), key=lambda p: needs[p][0])
    needed, slot = needs[worst]
    least = math.fsum(min(o.error for o in layer.allowed) for layer in problem.layers)
    if max_loss is not None and least > max_loss:
        return _least_loss(problem.layers, max_loss)
    most = sum(max(o.bytes for o in layer.allowed) for layer in problem.layers)
    high = max(needed, most * (problem.slots + 1) + max(r for r, _ in problem.phases))

    def enough(limit: int) -> bool:
        return bool(problem.solve(limit, max_loss, (0.0, 0.0)).found)

    exact = needed if enough(needed) else least_that(enough, needed, high)
    if exact is None:
        host = sum(min(c[2] for c in choices) for _, choices in problem.groups)
        room = problem.host_limit or 0
        return BudgetError(
            f"no device limit would do: the host's {format_size(room)} cannot hold what must lie "
            f"there ({format_size(host)} at least, besides staging and norms); raise host_limit, "
            "or allow the disk"
        )
    smallest = exact + buffer
    name = problem.parts.names[worst] or "the model"
    parts = [
        f"{format_size(problem.parts.fixed[worst])} norms, biases and buffers",
        f"{format_size(problem.parts.activations[worst])} its calls' own memory",
    ]
    if slot:
        largest = next(
            layer.candidate.name
            for layer, (phase, choices) in zip(problem.layers, problem.groups, strict=True)
            if phase == worst and any(c[1] == slot for c in choices)
        )
        parts.append(f"{problem.slots} slots of {format_size(slot)} (layer {largest!r})")
    reserved = problem.parts.reserved[worst] + problem.slots * slot
    rest = f", {format_size(needed - reserved)} residents" if needed > reserved else ""
    why = "" if exact == needed else "; the host's limit or max_quality_loss ask for the rest"
    return BudgetError(
        f"nothing fits {format_size(budget + buffer)}: the smallest limit that would do is "
        f"{format_size(smallest)} ({smallest} B). {name} needs {format_size(needed)}: "
        + ", ".join(parts)
        + f"{rest}{why}",
        smallest,
    )


def _phases(
    problem: _Problem, entries: list[PlanEntry], device: list[int], slots: list[int]
) -> list[PlanPhase]:
    out = []
    for p, name in enumerate(problem.parts.names):
        seconds = None
        if problem.rates is not None:
            seconds = phase_seconds(
                [e for e in entries if e.component == name],
                problem.rates,
                problem.rows,
                problem.parts.passes[p],
            )
        out.append(
            PlanPhase(
                name,
                problem.parts.fixed[p],
                problem.parts.activations[p],
                slots[p],
                device[p],
                problem.parts.passes[p],
                seconds,
            )
        )
    return out


def phase_seconds(entries: Sequence[PlanEntry], rates: Rates, rows: int, passes: int) -> float:
    """Seconds of a phase: the longest of arithmetic, link and disk, and what its turn loads."""
    compute = sum(e.seconds(rates, rows) for e in entries)
    streamed = sum(e.bytes for e in entries if e.tier != RESIDENT)
    read = sum(e.bytes for e in entries if e.tier == "disk")
    link = streamed / rates.link_bytes_per_second if streamed else 0.0
    disk = read / rates.disk_bytes_per_second if read else 0.0
    turn = 0.0
    for e in entries:
        if e.tier == RESIDENT and e.backing is not None:
            load = e.bytes / rates.link_bytes_per_second
            if e.backing == "disk":
                load = max(load, e.bytes / rates.disk_bytes_per_second)
            turn += load
    return turn + passes * max(compute, link, disk)
