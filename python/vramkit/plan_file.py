"""Plans read from files: every field checked, hand edits followed up, limits held."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .convert import storage_format
from .errors import BudgetError
from .plans import RESIDENT, SCHEMA, TIERS, Option, Plan, PlanEntry, PlanPhase
from .rates import Rates
from .sizes import format_size

_OLD = "vramkit.plan/1"  # before places: no shapes, options, phases


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """See `Plan.load`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_no_figure)
        if not isinstance(data, Mapping):
            raise ValueError(f"{path} is no plan: it holds a {type(data).__name__}, not an object")
        if data.get("schema") not in (_OLD, SCHEMA):
            raise ValueError(f"{path}: schema {data.get('schema')!r}, expected {SCHEMA!r}")
        made = _plan(data, path)
    except KeyError as error:
        raise ValueError(f"{path} is no plan: the field {error} is missing") from error
    except (TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is no plan: {error}") from error
    except ValueError as error:  # also what json and the text's encoding raise
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is no plan: {error}") from error
    stored = [phase.device_bytes for phase in made.phases]
    recounted = [_recounted(made, phase) for phase in made.phases]
    if made.edited or [phase.device_bytes for phase in recounted] != stored:
        made.phases, made.optimal = recounted, False
        made.edited = made.edited or ["tiers"]
        allowed = made.limit_bytes - made.buffer_bytes
        if made.device_bytes > allowed:
            needed = made.device_bytes + made.buffer_bytes
            raise BudgetError(
                f"{path}: edited by hand ({', '.join(made.edited[:3])}), the plan needs "
                f"{format_size(needed)} ({needed} B), its limit is "
                f"{format_size(made.limit_bytes)}; raise limit_bytes there, or choose smaller "
                "formats",
                needed,
            )
    return made


def _plan(data: Mapping[str, Any], path: Any) -> Plan:
    edited: list[str] = []
    entries = [_entry(item, path, edited) for item in _list(data, "entries")]
    names = [e.name for e in entries]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"{path}: the layer {twice!r} is there twice")
    prefer = data.get("prefer", "quality")
    if prefer not in ("quality", "balanced", "speed"):
        raise ValueError(f"{path}: prefer is {prefer!r}")
    tiers = tuple(data.get("tiers", ("device",)))
    if not tiers or any(tier not in TIERS for tier in tiers):
        raise ValueError(f"{path}: tiers are {tiers!r}; they are among {TIERS}")
    phases = [
        PlanPhase(
            str(p["name"]),
            _size(p, "fixed_bytes", path),
            _size(p, "activations_bytes", path),
            _size(p, "slot_bytes", path),
            _size(p, "device_bytes", path),
            _count(p, "passes", 1, path),
            None if p["seconds"] is None else float(p["seconds"]),
        )
        for p in data.get("phases", [])
    ]
    host_limit = data.get("host_limit_bytes")
    loss = data.get("max_quality_loss")
    return Plan(
        entries=entries,
        limit_bytes=_size(data, "limit_bytes", path),
        buffer_bytes=_size(data, "buffer_bytes", path),
        fixed_bytes=_size(data, "fixed_bytes", path),
        fingerprint=str(data["fingerprint"]),
        bound=str(data["bound"]),
        optimal=bool(data["optimal"]) and not edited,
        gap=float(data["gap"]),
        formats=[str(f) for f in _list(data, "formats")],
        left_out=[(str(n), str(why), int(size)) for n, why, size in _list(data, "left_out")],
        prefer=prefer,
        tiers=tiers,
        slots=_count(data, "slots", 2, path),
        rows=_count(data, "rows", 1, path),
        max_quality_loss=None if loss is None else float(loss),
        host_limit_bytes=None if host_limit is None else int(host_limit),
        host_bytes=_size(data, "host_bytes", path) if "host_bytes" in data else 0,
        phases=phases,
        rates=Rates.from_dict(data["rates"]) if data.get("rates") else None,
        edited=edited,
    )


def _no_figure(text: str) -> float:
    raise TypeError(f"{text} is no figure")


def _count(data: Mapping[str, Any], key: str, default: int, path: Any) -> int:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {key} is {value!r}; it is a count from 1 on")
    return value


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(data[key], list):
        raise TypeError(f"{key} is not a list")
    return data[key]


def _size(data: Mapping[str, Any], key: str, path: Any) -> int:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{path}: {key} is {value!r}; it is a number of bytes")
    return value


def _entry(item: Any, path: Any, edited: list[str]) -> PlanEntry:
    if not isinstance(item, Mapping):
        raise TypeError("an entry is not an object")
    name = str(item["name"])
    fmt = item["format"]
    if fmt is not None:
        fmt = storage_format(fmt).name
    tier = item.get("tier", RESIDENT)
    if tier == "device":
        tier = RESIDENT
    if tier not in (RESIDENT, "host", "disk"):
        raise ValueError(f"{path}: the layer {name!r} has the tier {tier!r}")
    options = tuple(
        Option(None if f is None else str(f), int(size), float(error))
        for f, size, error in item.get("options", [])
    )
    entry = PlanEntry(
        name=name,
        kind=str(item["kind"]),
        format=fmt,
        bytes=_size(item, "bytes", path),
        original_bytes=_size(item, "original_bytes", path),
        error=float(item["error"]),
        tier=tier,
        component=str(item.get("component", "")),
        backing=item.get("backing"),
        shape=tuple(int(n) for n in item.get("shape", ())),
        options=options,
    )
    if not math.isfinite(entry.error) or entry.error < 0:
        raise ValueError(f"{path}: the error of {name!r} is {entry.error}")
    if not options:
        return entry
    option = next((o for o in options if o.format == fmt), None)
    if option is None:
        known = ", ".join(o.format or "null" for o in options)
        raise ValueError(f"{path}: {name!r} cannot be {fmt!r}; what was measured: {known}")
    if (option.bytes, option.error) != (entry.bytes, entry.error):
        edited.append(name)
        entry = replace(entry, bytes=option.bytes, error=option.error)
    return entry


def _recounted(plan: Plan, phase: PlanPhase) -> PlanPhase:
    """The phase's bytes by the entries; the seconds expected before an edit hold no more."""
    mine = [e for e in plan.entries if e.component == phase.name]
    slot = max((e.bytes for e in mine if e.tier != RESIDENT), default=0)
    device = phase.fixed_bytes + phase.activations_bytes + plan.slots * slot
    device += sum(e.bytes for e in mine if e.tier == RESIDENT)
    return replace(phase, slot_bytes=slot, device_bytes=device, seconds=None)
