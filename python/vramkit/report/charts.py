"""The pictures of a page: bars and timelines as inline SVG, with their text in HTML.

Text stays outside the SVG, so that it keeps its size on a narrow screen while the shapes stretch.
Every picture says in words what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..sizes import format_size
from .layout import Colour, error_rows, families, family, layer_rows, thin

_BAR = 1000.0  # width of a bar's own coordinates
_WIDTH, _HEIGHT = 1000.0, 220.0  # of a timeline's


def colour_rules(colours: Mapping[str, Colour]) -> str:
    """CSS that gives the class of each family its colour, in light and dark pages."""
    names = {name: css_class(name, colours) for name in colours}
    light = "".join(f".{names[n]}{{--c:{c.light}}}" for n, c in colours.items())
    dark = "".join(f".{names[n]}{{--c:{c.dark}}}" for n, c in colours.items())
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


def css_class(name: str, colours: Mapping[str, Colour]) -> str:
    """The class of a family: by its position, because a user's format may have any name."""
    return f"k{list(colours).index(name)}"


def legend(colours: Mapping[str, Colour]) -> str:
    """Families with a swatch of their colour."""
    items = "".join(
        f'<li><i class="{css_class(name, colours)}"></i>{escape(name)}</li>' for name in colours
    )
    return f'<ul class="legend">{items}</ul>'


def _segments(parts: Iterable[tuple[str, float]]) -> str:
    """Rectangles side by side; `parts` are (class, width) in a bar's coordinates."""
    left, shapes = 0.0, []
    for name, width in parts:
        shapes.append(
            f'<rect class="{name}" x="{left:.2f}" y="0" width="{width:.2f}" height="10"/>'
        )
        left += width
    return "".join(shapes)


def _bar(shapes: str) -> str:
    return (
        f'<svg class="bar" viewBox="0 0 {_BAR:.0f} 10" preserveAspectRatio="none" '
        f'aria-hidden="true">{shapes}</svg>'
    )


def _row(label: str, shapes: str, value: str, note: str = "") -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return (
        f'<div class="row"><span class="name">{escape(label)}</span>{_bar(shapes)}'
        f'<span class="value">{escape(value)}{small}</span></div>'
    )


def _by_family(entries: Sequence[Any], colours: Mapping[str, Colour]) -> dict[str, int]:
    sizes = dict.fromkeys(colours, 0)
    for entry in entries:
        sizes[family(entry.format)] += entry.bytes
    return {name: size for name, size in sizes.items() if size}


def _names(sizes: Mapping[str, int]) -> str:
    """The two families with the most bytes, and how many more there are."""
    names = sorted(sizes, key=lambda name: -sizes[name])
    more = f" + {len(names) - 2} more" if len(names) > 2 else ""
    return " + ".join(names[:2]) + more or "empty"


def plan_colours(plan: Any) -> dict[str, Colour]:
    """Colours of the families that a plan uses, plain included for what it leaves alone."""
    formats: list[str | None] = [e.format for e in plan.entries]
    return families([*formats, None])


def total_bars(plan: Any) -> str:
    """The whole model before and after, the second one coloured by format, with the limit."""
    colours = plan_colours(plan)
    fixed = max(0, plan.weights_bytes - sum(e.bytes for e in plan.entries))
    before = fixed + sum(e.original_bytes for e in plan.entries)
    limit = plan.limit_bytes - getattr(plan, "buffer_bytes", 0)
    scale = _BAR / max(before, plan.weights_bytes, 1)
    sizes = _by_family(plan.entries, colours)
    sizes["plain"] = sizes.get("plain", 0) + fixed
    parts = [(css_class(n, colours), sizes[n] * scale) for n in colours if sizes.get(n)]
    mark = ""
    if limit * scale <= _BAR:
        x = limit * scale
        mark = f'<line class="limit" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="10"/>'
    before_parts = _segments([("before", before * scale)])
    said = ", ".join(f"{n} {format_size(sizes[n])}" for n in colours if sizes.get(n))
    return (
        f'<figure role="group" aria-label="{escape(f"Weights by format: {said}")}">'
        f'<div class="bars total">{_row("before", before_parts + mark, format_size(before))}'
        f"{_row('after', _segments(parts) + mark, format_size(plan.weights_bytes))}</div>"
        f"{legend(colours)}<figcaption>The line marks what the weights may take: "
        f"{escape(format_size(limit))}.</figcaption></figure>"
    )


def layer_bars(plan: Any) -> str:
    """Bytes of each layer or group of layers: before in grey, after coloured by format."""
    colours = plan_colours(plan)
    rows = layer_rows(plan)
    if not rows:
        return "<p>No layer can be converted.</p>"
    before = [sum(e.original_bytes for e in entries) for _, entries in rows]
    after = [sum(e.bytes for e in entries) for _, entries in rows]
    scale = _BAR / max(*before, *after, 1)
    lines = []
    for (label, entries), old, new in zip(rows, before, after, strict=True):
        sizes = _by_family(entries, colours)
        parts = [(css_class(name, colours), size * scale) for name, size in sizes.items()]
        shapes = _segments([("before", old * scale)]) + _segments(parts)
        lines.append(_row(label, shapes, format_size(new), _names(sizes)))
    grouped = len(rows) < len(plan.entries)
    number = f"{len(plan.entries)} layers" + (f" in {len(rows)} rows" if grouped else "")
    largest = max(range(len(rows)), key=after.__getitem__)
    said = f"Bytes of {number}; the largest is {rows[largest][0]}, {format_size(after[largest])}"
    count = " The number of layers stands in brackets." if grouped else ""
    return (
        f'<figure role="group" aria-label="{escape(said)}">{legend(colours)}'
        f'<div class="bars">{"".join(lines)}</div>'
        f"<figcaption>Grey: before. Coloured: after.{count}</figcaption></figure>"
    )


def error_bars(layers: Sequence[Any]) -> str:
    """Relative L2 error of each layer's outputs, or the largest of a group's."""
    rows = error_rows(layers)
    finite = [value for _, value in rows if math.isfinite(value)]
    scale = _BAR / max(finite, default=0.0) if any(finite) else 0.0
    lines = []
    for label, value in rows:
        known = math.isfinite(value)
        width = value * scale if known else _BAR
        shapes = _segments([("error" if known else "alarm", width)])
        lines.append(_row(label, shapes, f"{value:.4f}" if known else "not finite"))
    worst = max(rows, key=lambda row: row[1])
    said = f"Relative L2 error of {len(layers)} layers; the largest is {worst[1]:.4g} in {worst[0]}"
    group = " Of a group the largest is shown." if len(rows) < len(layers) else ""
    return (
        f'<figure role="group" aria-label="{escape(said)}"><div class="bars">{"".join(lines)}</div>'
        "<figcaption>||y - r|| / ||r|| of each layer's output, in the order of the calls; what the "
        f"layers before passed on is included.{group}</figcaption></figure>"
    )


def timeline_chart(
    series: Mapping[str, Sequence[tuple[str, int]]], highest: tuple[str, int] | None = None
) -> str:
    """Live bytes over the steps of a call; `series` holds (label, bytes) by name.

    `highest` is a level to mark, with its name. A peak between two steps can lie above them all.
    """
    top = max([b for points in series.values() for _, b in points] + [highest[1] if highest else 0])
    top = max(top, 1)
    shapes, keys, said = [], [], []
    for i, (name, points) in enumerate(series.items()):
        short = thin(points)
        step = _WIDTH / len(short)
        path = "".join(
            f"{'M' if not j else 'V'}{'0 ' if not j else ''}{_HEIGHT * (1 - b / top):.1f}"
            f"H{(j + 1) * step:.2f}"
            for j, (_, b) in enumerate(short)
        )
        if i == 0:
            shapes.append(f'<path class="area" d="{path}V{_HEIGHT:.0f}H0Z"/>')
        shapes.append(f'<path class="line s{i}" d="{path}"/>')
        keys.append(f'<li><i class="s{i}"></i>{escape(name)}</li>')
        where, peak = max(points, key=lambda point: point[1])
        said.append(f"{name}: {len(points)} steps, highest {format_size(peak)} at {where}")
    if highest is not None:
        y = _HEIGHT * (1 - highest[1] / top)
        shapes.append(f'<line class="limit" x1="0" x2="{_WIDTH:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        keys.append(f'<li><i class="dash"></i>{escape(highest[0])}</li>')
        said.append(f"{highest[0]}: {format_size(highest[1])}")
    points = next(iter(series.values()))
    text = "; ".join(said)
    return (
        f'<figure><ul class="legend">{"".join(keys)}</ul><div class="plot">'
        f'<span class="top">{format_size(top)}</span><span class="zero">0</span>'
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(text)}">{"".join(shapes)}</svg></div>'
        f'<div class="ends"><span>{escape(points[0][0])}</span>'
        f"<span>{escape(points[-1][0])}</span></div>"
        f"<figcaption>{escape(text)}.</figcaption></figure>"
    )
