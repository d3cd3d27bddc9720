"""Plans measured end to end on inputs of their own, and the plans that ours are compared with."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vramkit._operators import StoredParts
from vramkit.candidates import Candidate, candidates
from vramkit.convert import encode_candidate, format_in
from vramkit.formats import get_format
from vramkit.output_errors import squared_sum
from vramkit.planner import DEFAULT_FORMATS
from vramkit.sensitivity_store import Store, digest_of

from .sensitivity_models import Case

Formats = dict[str, str | None]  # by layer; None: as it is


class Judge:
    """Relative L2 error of a model's output on the judge's inputs, by plan.

    Encoded weights are kept, and in `store`, if there is one, what was measured.
    """

    def __init__(self, case: Case, store: Store | None = None) -> None:
        from vramkit.running import Runner

        self.case, self.store = case, store
        self.found: dict[str, Candidate] = {c.name: c for c in candidates(case.model)[0]}
        self.runner = Runner(case.model, None, "model")
        self.expected = [self.runner.run(batch).clone() for batch in case.judge]
        self.power = sum(squared_sum(out) for out in self.expected)
        self.digest = digest_of(case.model, case.judge)
        self.parts: dict[tuple[str, str], StoredParts] = {}
        self.known: dict[str, float] = {}
        self.sizes: dict[str, dict[str | None, int]] = {}
        for name, c in self.found.items():
            self.sizes[name] = {None: c.original_bytes}
            for fmt in DEFAULT_FORMATS:
                size = format_in(c, get_format(fmt)).bytes(c.matrix_shape).total
                if size < c.original_bytes:
                    self.sizes[name][fmt] = size

    def uniform(self, fmt: str) -> Formats:
        """One format for all layers that it makes smaller."""
        return {name: fmt if fmt in sizes else None for name, sizes in self.sizes.items()}

    def bytes(self, formats: Mapping[str, str | None]) -> int:
        """Bytes of the layers."""
        return sum(self.sizes[name][fmt] for name, fmt in formats.items())

    @torch.no_grad()
    def error(self, formats: Formats) -> float:
        """Relative L2 error of the output."""
        key = digest_of("judge", self.digest, sorted(formats.items()))
        stored = self.store.get(key, 1) if self.store is not None else None
        if key not in self.known and stored is not None:
            self.known[key] = stored[0]
        if key not in self.known:
            self.known[key] = self._measured(formats)
            if self.store is not None:
                self.store.put(key, [self.known[key]])
        return self.known[key]

    def _measured(self, formats: Formats) -> float:
        kept: dict[str, Tensor] = {}
        try:
            for name, fmt in formats.items():
                if fmt is None:
                    continue
                weight = self.found[name].weight
                kept[name] = weight.data
                weight.data = self._dense(name, fmt, weight)
            outs = [self.runner.run(batch) for batch in self.case.judge]
        finally:
            for name, data in kept.items():
                self.found[name].weight.data = data
        error = sum(squared_sum(a, b) for a, b in zip(outs, self.expected, strict=True))
        return math.sqrt(error / self.power)

    def _dense(self, name: str, fmt: str, weight: Tensor) -> Tensor:
        parts = self.parts.get((name, fmt))
        if parts is None:
            candidate = self.found[name]
            parts = encode_candidate(candidate, weight, format_in(candidate, get_format(fmt)))
            if parts.fmt.family != "cast":  # those take most room and least time
                self.parts[name, fmt] = parts
        return parts.dense(weight.dtype).reshape(weight.shape)

    def random(self, generator: random.Random, budget: int) -> Formats:
        """Formats drawn at random so that about `budget` bytes are used, and no more.

        Each layer draws a format with the odds exp(-s bytes / elements): the rate s at which the
        expected bytes are the budget is found by bisection, and layers drawn in a random order take
        what fits.
        """
        low, high = -20.0, 20.0
        for _ in range(60):
            rate = (low + high) / 2
            if sum(_mean(sizes, rate) for sizes in self.sizes.values()) > budget:
                low = rate
            else:
                high = rate
        made: Formats = {name: min(sizes, key=lambda f: sizes[f]) for name, sizes in
                         self.sizes.items()}  # fmt: skip
        left = budget - self.bytes(made)
        for name in generator.sample(sorted(made), len(made)):
            sizes = self.sizes[name]
            start = sizes[made[name]]
            fitting = {fmt: size for fmt, size in sizes.items() if size - start <= left}
            odds = _odds(fitting, high, sizes[None])
            made[name] = generator.choices(list(fitting), odds)[0]
            left -= sizes[made[name]] - start
        return made

    def greedy(self, costs: Mapping[str, Mapping[str | None, float]], budget: int) -> Formats:
        """From the smallest, the step that lowers the cost most for its bytes, while one fits."""
        made: Formats = {name: min(sizes, key=lambda f: sizes[f]) for name, sizes in
                         self.sizes.items()}  # fmt: skip
        left = budget - self.bytes(made)
        while True:
            best: tuple[float, str, str | None] = (0.0, "", None)
            for name, sizes in self.sizes.items():
                at = made[name]
                for fmt, cost in costs[name].items():
                    more, saved = sizes[fmt] - sizes[at], costs[name][at] - cost
                    if saved > 0 and more <= left and saved / max(more, 1) > best[0]:
                        best = (saved / max(more, 1), name, fmt)
            _, name, fmt = best
            if not name:
                return made
            left -= self.sizes[name][fmt] - self.sizes[name][made[name]]
            made[name] = fmt


def _odds(sizes: Mapping[str | None, int], rate: float, whole: int) -> list[float]:
    # A layer's own bytes are 4 for each element.
    return [math.exp(-rate * 4 * size / whole) for size in sizes.values()]


def _mean(sizes: Mapping[str | None, int], rate: float) -> float:
    odds = _odds(sizes, rate, sizes[None])
    return sum(o * s for o, s in zip(odds, sizes.values(), strict=True)) / sum(odds)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, ties at their mean."""
    a, b = _ranks(first), _ranks(second)
    mean = (len(a) - 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    scale = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    return top / math.sqrt(scale) if scale else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ranks = {}
    for value in set(values):
        below = sum(v < value for v in values)
        ranks[value] = below + (sum(v == value for v in values) - 1) / 2
    return [ranks[value] for value in values]


def costs_of(found: Any) -> dict[str, dict[str | None, float]]:
    """A `Sensitivity` as costs by layer and format, 0 for what stays as it is."""
    return {layer.name: {None: 0.0, **layer.errors} for layer in found.layers}
