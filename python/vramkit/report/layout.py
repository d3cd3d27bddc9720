"""What pages and figures share: colours of formats, few rows for many layers, short timelines."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PLAIN = "plain"

# (on white, on black) by format, in the order of legends: wide formats first. Found by a search for
# the largest least distance in CIELAB over full colour vision and three simulated blindnesses
# (Machado et al. 2009), then changed by hand; the tests hold the common formats to a distance. Rows
# name their formats too, so that no colour is the only sign.
_COLOURS = {
    PLAIN: ("#5b6670", "#7d8791"),
    "bf16": ("#1334e5", "#3558ff"),
    "fp16": ("#137fe3", "#53c4ff"),
    "fp8": ("#babe0f", "#f3f08a"),
    "fp8_e5m2": ("#87890b", "#c3d33a"),
    "int8": ("#35bf9d", "#9fe8cf"),
    "int4": ("#931914", "#b8431d"),
    "nf4": ("#d9a055", "#fe951e"),
    "nf4_dq": ("#581b74", "#8f45b5"),
    "fp4": ("#e58fd3", "#c83a78"),
}
_CUSTOM = (("#332288", "#8f86e0"), ("#2a8c80", "#5cc4b6"), ("#7b4b2a", "#c39a78"))


@dataclass(frozen=True)
class Colour:
    """One colour for white pages, one for black ones."""

    light: str
    dark: str


def family(fmt: str | None) -> str:
    """A format's name without its group size, which colours do not tell apart.

    >>> family("int4_g32"), family("nf4_dq"), family(None)
    ('int4', 'nf4_dq', 'plain')
    """
    return PLAIN if fmt is None else re.sub(r"_g\d+$", "", fmt)


def families(formats: Sequence[str | None]) -> dict[str, Colour]:
    """The families among `formats`, in the order of legends, with their colours."""
    present = {family(f) for f in formats}
    chosen = {name: Colour(*pair) for name, pair in _COLOURS.items() if name in present}
    for i, name in enumerate(sorted(present - set(_COLOURS))):
        chosen[name] = Colour(*_CUSTOM[i % len(_CUSTOM)])
    return chosen


@dataclass(frozen=True)
class Group:
    """A row of a chart: its label and the positions of the layers in it."""

    label: str
    members: list[int]


def group_layers(names: Sequence[str], limit: int = 48) -> list[Group]:
    """At most `limit` rows for any number of layers, in their order.

    One row for each layer if they are few. Else one for each module at the deepest level of the
    names that gives few enough; if that leaves less than a quarter of the rows, runs of modules at
    the next level share rows.

    >>> [g.label for g in group_layers(["enc.0.q", "enc.0.k", "enc.1.q", "enc.1.k"], limit=2)]
    ['enc.0', 'enc.1']
    """
    if len(names) <= limit:
        return [Group(name, [i]) for i, name in enumerate(names)]
    parts = [name.split(".") for name in names]
    best: list[Group] = []
    for depth in range(1, max(len(p) for p in parts) + 1):
        level = _at_depth(parts, depth)
        if len(level) > limit:
            return best if 4 * len(best) >= limit else _runs(level, limit)
        best = level
    return best if 4 * len(best) >= limit else _runs(_at_depth(parts, len(parts)), limit)


def _at_depth(parts: list[list[str]], depth: int) -> list[Group]:
    groups: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(".".join(part[:depth]), []).append(i)
    return [Group(label, members) for label, members in groups.items()]


def _runs(groups: list[Group], limit: int) -> list[Group]:
    """Equal runs of consecutive groups, labelled by their first and last."""
    size = math.ceil(len(groups) / limit)
    rows = []
    for first in range(0, len(groups), size):
        run = groups[first : first + size]
        label = run[0].label if len(run) == 1 else f"{run[0].label} … {_tail(run)}"
        rows.append(Group(label, [i for g in run for i in g.members]))
    return rows


def _tail(run: list[Group]) -> str:
    """The last label of a run, without the parents that it shares with the first."""
    first, last = run[0].label.split("."), run[-1].label.split(".")
    shared = 0
    while shared < min(len(first), len(last)) - 1 and first[shared] == last[shared]:
        shared += 1
    return ".".join(last[shared:])


def thin(timeline: Sequence[tuple[str, int]], limit: int = 400) -> list[tuple[str, int]]:
    """At most `limit` points of a timeline: of each run the highest, so that no peak is lost."""
    if len(timeline) <= limit:
        return list(timeline)
    size = math.ceil(len(timeline) / limit)
    return [
        max(timeline[i : i + size], key=lambda point: point[1])
        for i in range(0, len(timeline), size)
    ]


def layer_rows(plan: Any, limit: int = 48) -> list[tuple[str, list[Any]]]:
    """(label, entries) for each row of a chart of a plan's layers."""
    entries = list(plan.entries)
    groups = group_layers([e.name for e in entries], limit)
    return [(_counted(g), [entries[i] for i in g.members]) for g in groups]


def error_rows(layers: Sequence[Any], limit: int = 48) -> list[tuple[str, float]]:
    """(label, relative L2) for each row of a chart of layers' errors: of a group, the largest."""
    groups = group_layers([e.name for e in layers], limit)
    return [(_counted(g), max(layers[i].relative_l2 for i in g.members)) for g in groups]


def _counted(group: Group) -> str:
    return group.label if len(group.members) == 1 else f"{group.label} ({len(group.members)})"
