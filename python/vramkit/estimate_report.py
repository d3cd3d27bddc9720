"""Estimates as text, as plain data and in notebooks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .accounts import Line
from .sizes import format_size

if TYPE_CHECKING:
    from .estimator import MemoryEstimate
    from .phases import PipelineEstimate

_HEADS = ("", "device", "host", "")


def rows_of(lines: Iterable[Line]) -> list[tuple[str, str, str, str]]:
    """(name, device, host, note) of each line, sizes as text and a dash for nothing."""
    return [
        (line.name, _size(line.device_bytes), _size(line.host_bytes), line.note) for line in lines
    ]


def _size(nbytes: int) -> str:
    return format_size(nbytes) if nbytes >= 0 else f"-{format_size(-nbytes)}"


def columns(rows: Sequence[tuple[str, str, str, str]], heads: Sequence[str] = _HEADS) -> list[str]:
    """Rows as text in columns: names to the left, sizes to the right."""
    width = max(len(row[0]) for row in (tuple(heads), *rows))
    made = [f"{a:{width}}  {b:>10}  {c:>10}  {d}".rstrip() for a, b, c, d in (tuple(heads), *rows)]
    return [line.replace(f"{'0 B':>10}", f"{'-':>10}") for line in made]


def table_rows(found: MemoryEstimate) -> list[tuple[str, str, str, str]]:
    """All rows of an estimate's table: lines, their sum, and the peaks of its phases."""
    account = found.account
    rows = rows_of(account.lines)
    rows += rows_of([Line("together", account.device_bytes, account.host_bytes)])
    return rows + [(f"peak, {row[0]}", *row[1:]) for row in rows_of(account.phases)]


def text_of(found: MemoryEstimate) -> str:
    """What `str` gives: the table, peak and interval, and the notes."""
    lines = columns(table_rows(found), (f"{found.precision}, {found.target}", *_HEADS[1:]))
    if found.peak_bytes is not None and found.activations_bytes is not None:
        lines.append(
            f"weights and call {format_size(found.peak_bytes)}: "
            f"{format_size(found.weights_bytes)} + {format_size(found.activations_bytes)}"
        )
        lines.append(interval_text(found))
    reserved = found.reserved_bytes
    if reserved is not None:
        lines.append(f"reserved by torch's allocator {format_size(reserved)}")
    lines += [f"shape {name}: {format_size(n)}" for name, n in found.shapes.items()]
    return "\n".join(lines + [f"note: {note}" for note in found.notes])


def interval_text(found: MemoryEstimate | PipelineEstimate) -> str:
    """The interval in words, with where it comes from."""
    if found.interval_bytes is None:
        return f"interval {found.interval_from}"
    low, high = found.interval_bytes
    if low == high:
        return f"interval exact, {low} B: {found.interval_from}"
    return f"interval {format_size(low)} to {format_size(high)}: {found.interval_from}"


def data_of(found: MemoryEstimate) -> dict[str, Any]:
    """What `to_dict` gives."""
    return {
        "precision": found.precision,
        "weights_bytes": found.weights_bytes,
        "inputs_bytes": found.inputs_bytes,
        "activations_bytes": found.activations_bytes,
        "peak_bytes": found.peak_bytes,
        "reserved_bytes": found.reserved_bytes,
        "load_peak_bytes": found.load_peak_bytes,
        "activations_interval_bytes": found.activations_interval_bytes,
        "interval_bytes": found.interval_bytes,
        "interval_from": found.interval_from,
        "predicted_bytes": found.predicted_bytes,
        "calibrated": None if found.calibrated is None else asdict(found.calibrated),
        "account": found.account.to_dict(),
        "layers": [
            {"name": name, "format": fmt, "layer_bytes": n} for name, fmt, n in found.layers
        ],
        "timeline": [{"module": name, "live_bytes": n} for name, n in found.timeline],
        "notes": found.notes,
        "target": found.target,
        "kept_bytes": found.kept_bytes,
        "shapes": [{"name": name, "activations_bytes": n} for name, n in found.shapes.items()],
        "generation": None if found.generation is None else asdict(found.generation),
        "probes": {"run": found.probes[0], "seconds": found.probes[1]},
        "at_peak": [
            {
                "operator": tag.operator,
                "module": tag.module,
                "phase": tag.phase,
                "live_bytes": n,
            }
            for tag, n in found.at_peak()
        ],
    }


def html_of(found: MemoryEstimate) -> str:
    """Table, picture (where matplotlib is installed) and layers, for a notebook."""
    from .report.html import table

    rows = table_rows(found)
    caption = text_of(found).partition("weights and call")
    words = f"{found.precision}, {found.target}\n{caption[1]}{caption[2]}".strip()
    layers = [(name, fmt, format_size(n)) for name, fmt, n in found.layers]
    return (
        table(("bytes of", "device", "host", "note"), rows, caption=words)
        + picture(found)
        + f"<details><summary>{len(layers)} layers</summary>"
        + table(("layer", "format", "bytes"), layers)
        + "</details>"
    )


def picture(found: MemoryEstimate | PipelineEstimate) -> str:
    """The timeline as an inline SVG; empty without matplotlib, or without a call to draw."""
    if found.trace is None or importlib.util.find_spec("matplotlib") is None:
        return ""
    from .report.timeline import svg_of

    return svg_of(found.plot())


def pipeline_text(found: PipelineEstimate) -> str:
    """What `str` gives of a pipeline."""
    lines = [f"{'phase':24} {'weights':>12} {'activations':>12} {'peak':>12}"]
    lines += [
        f"{p.name:24} {format_size(p.weights_bytes):>12} "
        f"{format_size(p.activations_bytes):>12} {format_size(p.peak_bytes):>12}"
        for p in found.phases
    ]
    lines.append(interval_text(found))
    return "\n".join(lines + [f"note: {note}" for note in found.notes])


def pipeline_html(found: PipelineEstimate) -> str:
    """Table and picture of a pipeline, for a notebook."""
    from .report.html import table

    rows = [
        (p.name, *(format_size(n) for n in (p.weights_bytes, p.activations_bytes, p.peak_bytes)))
        for p in found.phases
    ]
    words = "\n".join([interval_text(found), *(f"note: {note}" for note in found.notes)])
    return table(("phase", "weights", "activations", "peak"), rows, caption=words) + picture(found)
