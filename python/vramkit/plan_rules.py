"""What a user settles before a plan is made: formats and places by pattern, components in turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .candidates import matches
from .convert import Candidate, Precision, storage_format
from .estimator import weight_bytes
from .formats import StorageFormat
from .plans import RESIDENT, TIERS, Option, PlanEntry
from .sizes import parse_size

Pin = Precision | None | tuple[Precision | None, str]


@dataclass
class Layer:
    """A layer to plan: what it may be, and where."""

    candidate: Candidate
    options: list[Option]  # all that were measured
    allowed: list[Option]  # those that rules and pins leave
    places: tuple[str, ...]
    component: str

    def entry(self, option: Option, tier: str, backing: str | None = None) -> PlanEntry:
        """The plan's entry for a choice."""
        return PlanEntry(
            name=self.candidate.name,
            kind=self.candidate.kind,
            format=option.format,
            bytes=option.bytes,
            original_bytes=self.candidate.original_bytes,
            error=option.error,
            tier=RESIDENT if tier == "device" else tier,
            component=self.component,
            backing=backing,
            shape=tuple(self.candidate.shape),
            options=tuple(self.options),
        )


@dataclass
class Rules:
    """What a user settled: formats by pattern, pins of formats and places."""

    chosen: list[StorageFormat]
    pins: dict[str, tuple[bool, StorageFormat | None, str | None]]  # (format pinned, format, place)
    rules: dict[str, list[StorageFormat | None]]
    places: tuple[str, ...]

    @classmethod
    def of(
        cls,
        found: Sequence[Candidate],
        chosen: list[StorageFormat],
        pin: Mapping[str, Pin],
        rules: Mapping[str, Iterable[Precision | None]],
        places: tuple[str, ...],
    ) -> Rules:
        """Checked: every pattern has a layer, every place is among the tiers asked for."""
        for pattern in (*pin, *rules):
            if not any(matches(c.name, [pattern]) for c in found):
                raise ValueError(f"no layer that can be stored is named {pattern!r}")
        pins = {}
        for pattern, value in pin.items():
            pins[pattern] = _pin(value)
            place = pins[pattern][2]
            if place is not None and place not in places:
                raise ValueError(f"{pattern!r} is pinned to {place!r}, which tiers= lacks")
        named = {}
        for pattern, formats in rules.items():
            if isinstance(formats, str):
                raise TypeError(f"the rule for {pattern!r} is a list of formats, not one string")
            named[pattern] = [None if f is None else storage_format(f) for f in formats]
            if not named[pattern]:
                raise ValueError(f"the rule for {pattern!r} leaves no format")
        return cls(chosen, pins, named, places)

    def _pin(self, name: str) -> tuple[bool, StorageFormat | None, str | None]:
        fixed: tuple[bool, StorageFormat | None, str | None] = (False, None, None)
        for pattern, (by_format, fmt, place) in self.pins.items():
            if matches(name, [pattern]):
                fixed = (
                    fixed[0] or by_format,
                    fixed[1] if fixed[0] else fmt,
                    fixed[2] or place,
                )
        return fixed

    def _rule(self, name: str) -> list[StorageFormat | None] | None:
        return next((f for p, f in self.rules.items() if matches(name, [p])), None)

    def analysed(self, candidate: Candidate) -> list[StorageFormat]:
        """The formats to measure on this layer."""
        by_format, fmt, _ = self._pin(candidate.name)
        if by_format:
            return [] if fmt is None else [fmt]
        rule = self._rule(candidate.name)
        return self.chosen if rule is None else [f for f in rule if f is not None]

    def layer(self, candidate: Candidate, options: list[Option], component: str) -> Layer:
        """The layer with what rules and pins leave of `options`; ValueError if that is nothing."""
        by_format, fmt, place = self._pin(candidate.name)
        rule = self._rule(candidate.name)
        allowed = options
        if by_format:
            allowed = [o for o in options if (o.format is None) == (fmt is None)]
        elif rule is not None and None not in rule:
            allowed = [o for o in options if o.format is not None]
        if not allowed:
            asked = fmt.name if fmt is not None else "the formats of its rule"
            raise ValueError(
                f"{candidate.name!r} cannot be stored in {asked}: it would not get smaller, or "
                "its values or its layer do not admit it"
            )
        places = self.places if place is None else (place,)
        return Layer(candidate, options, allowed, places, component)


def _pin(value: Pin) -> tuple[bool, StorageFormat | None, str | None]:
    if isinstance(value, tuple):
        if len(value) != 2 or value[1] not in TIERS:
            raise ValueError(f"a pin is a format, a place or (format, place), not {value!r}")
        return True, None if value[0] is None else storage_format(value[0]), value[1]
    if isinstance(value, str) and value in (*TIERS, RESIDENT):
        return False, None, "device" if value == RESIDENT else value
    return True, None if value is None else storage_format(value), None


@dataclass
class Turns:
    """The components that take turns on the device; one without a name if none do."""

    names: list[str]
    passes: list[int]
    fixed: list[int]  # bytes that are no planned layer's
    activations: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        found: Sequence[Candidate],
        turns: Iterable[str] | Mapping[str, int],
        activations: Any,
    ) -> Turns:
        """Checked: the components are submodules, and every layer is in exactly one."""
        if isinstance(turns, str):
            raise TypeError("turns is a list of submodules' names, or {name: passes}")
        passes = dict(turns) if isinstance(turns, Mapping) else dict.fromkeys(turns, 1)
        for name, count in passes.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"the passes of {name!r} are {count!r}; give 1 or more")
        out = cls(list(passes) or [""], list(passes.values()) or [1], [])
        for name in out.names:
            try:
                part = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"turns names {name!r}, which is no submodule") from None
            inside = [c for c in found if name == "" or (c.name + ".").startswith(name + ".")]
            out.fixed.append(weight_bytes(part) - sum(c.original_bytes for c in inside))
        for candidate in found:
            out.component_of(candidate.name)
        if isinstance(activations, Mapping):
            unknown = set(activations) - set(out.names)
            if unknown:
                raise ValueError(f"activations names {min(unknown)!r}, which takes no turn")
            out.activations = [parse_size(activations.get(name, 0)) for name in out.names]
        else:
            out.activations = [parse_size(activations or 0)] * len(out.names)
        return out

    def component_of(self, layer: str) -> str:
        """The component that a layer is in."""
        inside = [n for n in self.names if n == "" or (layer + ".").startswith(n + ".")]
        if len(inside) != 1:
            where = f"in {' and '.join(inside)}" if inside else f"in none of {self.names}"
            raise ValueError(
                f"{layer!r} is {where}: with turns= every layer is in exactly one component"
            )
        return inside[0]

    def add_activations(self, size: int) -> None:
        """Count `size` bytes for every turn."""
        self.activations = [n + size for n in self.activations]

    @property
    def reserved(self) -> list[int]:
        """Device bytes of each turn beside its layers."""
        return [a + b for a, b in zip(self.fixed, self.activations, strict=True)]
