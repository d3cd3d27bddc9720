"""What is possible for a model: one format for all, mixes, and the smallest limit for a quality."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from . import _core
from .placing import choice, least_that, phase_seconds, smallest_budget, ways
from .plans import RESIDENT, Option, Plan, PlanEntry
from .sizes import format_size


class PlanMode(NamedTuple):
    """One row: the whole model on the device, or ", streamed" as far as the limit asks for it.

    `limit_bytes` is the smallest limit that admits it; `mixed_limit_bytes` the smallest limit at
    which a mix of formats, all on the device, loses no more. `seconds` are those within the plan's
    limit, None without rates.
    """

    mode: str
    weights_bytes: int
    limit_bytes: int
    loss: float
    seconds: float | None
    fits: bool
    mixed_limit_bytes: int | None


@dataclass
class PlanTable:
    """The modes of a model, best first, and the plan that was chosen; print or show it."""

    rows: list[PlanMode]
    chosen: PlanMode
    limit_bytes: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data; keys named `*_bytes` are bytes."""
        return {
            "limit_bytes": self.limit_bytes,
            "rows": [row._asdict() for row in self.rows],
            "chosen": self.chosen._asdict(),
            "notes": self.notes,
        }

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """(headers, rows) as text."""
        headers: tuple[str, ...] = (
            "mode",
            "weights",
            "needs",
            "loss",
            "seconds",
            "fits",
            "a mix as good needs",
        )
        rows: list[tuple[str, ...]] = []
        for row in [*self.rows, self.chosen]:
            rows.append(
                (
                    row.mode,
                    format_size(row.weights_bytes),
                    format_size(row.limit_bytes),
                    f"{row.loss:.3g}",
                    "-" if row.seconds is None else f"{row.seconds:.3g}",
                    "yes" if row.fits else "no",
                    "-" if row.mixed_limit_bytes is None else format_size(row.mixed_limit_bytes),
                )
            )
        return headers, rows

    def __str__(self) -> str:
        headers, rows = self.cells()
        widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
        lines = []
        for row in [headers, *rows]:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells))
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join([*lines, f"limit {format_size(self.limit_bytes)}", *self.notes])

    def _repr_html_(self) -> str:
        from .report.html import table

        headers, rows = self.cells()
        caption = "\n".join([f"limit {format_size(self.limit_bytes)}", *self.notes])
        return table(headers, rows, caption=caption)


def table_of(plan: Plan) -> PlanTable:
    """The table of a plan's model, from what was measured when the plan was made.

    Pins of formats and places are left aside. A format that does not fit the device has a second
    row where the plan may stream. Raises ValueError for a plan without options (one
    loaded from an older file).
    """
    if any(not entry.options for entry in plan.entries):
        raise ValueError("this plan has no options to tabulate: it was made by an older version")
    rows: list[PlanMode] = []
    for name in (None, *plan.formats):
        options = [_option(e, name) for e in plan.entries]
        if name is not None and all(o.format is None for o in options):
            continue  # no layer gets smaller by it
        rows.append(_mode(plan, name or "as it is", options))
        if not rows[-1].fits and plan.tiers != ("device",):
            rows.append(_streamed(plan, rows[-1], options))
    rows.sort(key=lambda row: (row.loss, row.limit_bytes))
    chosen = PlanMode(
        "this plan" if plan.optimal else f"this plan (gap {plan.gap:.2g})",
        plan.weights_bytes,
        plan.device_bytes + plan.buffer_bytes,
        plan.loss,
        plan.seconds,
        True,
        None,
    )
    notes = []
    if plan.rates is None:
        notes.append("no seconds: plan with rates=True")
    if plan.bound == "weights":
        notes.append("the limits bound the weights; the call's own memory comes on top")
    return PlanTable(rows, chosen, plan.limit_bytes, notes)


def _option(entry: PlanEntry, name: str | None) -> Option:
    """The entry's option of a format or its weight-only form; as it is, where it has neither."""
    if name is not None:
        from .formats import get_format

        names = (name, get_format(name).weight_only.name)
        for option in entry.options:
            if option.format in names:
                return option
    return next(o for o in entry.options if o.format is None)


def _mode(plan: Plan, name: str, options: list[Option]) -> PlanMode:
    loss = math.fsum(o.error for o in options)
    needs = seconds = 0.0
    for phase in plan.phases:
        mine = [
            _placed(e, o)
            for e, o in zip(plan.entries, options, strict=True)
            if e.component == phase.name
        ]
        reserved = phase.fixed_bytes + phase.activations_bytes
        needs = max(needs, reserved + sum(e.bytes for e in mine))
        if plan.rates is not None:
            seconds += phase_seconds(mine, plan.rates, plan.rows, phase.passes)
    limit = int(needs) + plan.buffer_bytes
    return PlanMode(
        name,
        plan.fixed_bytes + sum(o.bytes for o in options),
        limit,
        loss,
        None if plan.rates is None else seconds,
        limit <= plan.limit_bytes,
        _mixed_limit(plan, loss),
    )


def _placed(entry: PlanEntry, option: Option) -> PlanEntry:
    return replace(
        entry, format=option.format, bytes=option.bytes, error=option.error, tier=RESIDENT
    )


def _streamed(plan: Plan, resident: PlanMode, options: list[Option]) -> PlanMode:
    """The same formats with as many layers streamed as the limit asks for, the fastest way."""
    names = [p.name for p in plan.phases]
    reserved = [(p.fixed_bytes + p.activations_bytes, 0.0) for p in plan.phases]
    places = ways(plan.tiers, plan.tiers, len(names) > 1)
    groups = []
    for e, option in zip(plan.entries, options, strict=True):
        phase = names.index(e.component)
        passes = plan.phases[phase].passes
        compute = 0.0
        if plan.rates is not None:
            compute = _placed(e, option).seconds(plan.rates, plan.rows) * passes
        group = [choice(option, *way, compute, passes, plan.rates) for way in places]
        groups.append((phase, group))
    host = plan.host_limit_bytes
    if host is not None and len(names) > 1:
        host -= sum(p.fixed_bytes for p in plan.phases)
    needs = max(n for n, _ in _core.least_device_bytes(reserved, groups, slots=plan.slots))
    found = _core.place(
        reserved,
        groups,
        plan.limit_bytes - plan.buffer_bytes,
        host_limit=host,
        slots=plan.slots,
        weights=(0.0, 1.0),
    )
    return resident._replace(
        mode=f"{resident.mode}, streamed",
        limit_bytes=needs + plan.buffer_bytes,
        seconds=found.seconds if found.found else None,
        fits=found.found,
        mixed_limit_bytes=None,
    )


def _mixed_limit(plan: Plan, loss: float) -> int | None:
    """The smallest limit at which all layers fit the device and lose no more than `loss`."""
    reserved = [p.fixed_bytes + p.activations_bytes for p in plan.phases]
    if len(plan.phases) == 1:
        groups = [[(o.bytes, o.error) for o in e.options] for e in plan.entries]
        room = smallest_budget(groups, loss * (1 + 1e-12))
        return None if room is None else room + reserved[0] + plan.buffer_bytes
    names = [p.name for p in plan.phases]
    placed = [
        (
            names.index(e.component),
            [(o.bytes, 0, 0, False, o.error, 0.0, 0.0, 0.0, 0.0) for o in e.options],
        )
        for e in plan.entries
    ]
    phases = [(n, 0.0) for n in reserved]

    def enough(budget: int) -> bool:
        limit = loss * (1 + 1e-12)
        return _core.place(phases, placed, budget, loss_limit=limit, weights=(0.0, 0.0)).found

    low = max(need for need, _ in _core.least_device_bytes(phases, placed))
    most = sum(max(o.bytes for o in e.options) for e in plan.entries) + max(reserved)
    found = least_that(enough, low, max(low, most))
    return None if found is None else found + plan.buffer_bytes
