"""HTML tables for notebooks, and reports as one file that needs nothing else to be shown."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..sizes import format_size
from . import charts

Section = tuple[str, str]

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--panel:#f6f8fa;--text:#1f2328;--soft:#57606a;
--rule:#d0d7de;--track:#dfe3e8;--line:#0069a8;--second:#b35900;--alarm:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--panel:#161b22;--text:#e6edf3;
--soft:#9aa4ae;--rule:#30363d;--track:#2d343d;--line:#4ea8e8;--second:#f0ad2e;--alarm:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:64rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.5rem 0 .75rem;padding-bottom:.3rem;
border-bottom:1px solid var(--rule)}
p{margin:.5rem 0}.lead{color:var(--soft);white-space:pre-line;overflow-wrap:anywhere}
section .lead{font-size:.88rem}
.cards{display:grid;grid-template-columns:repeat(3,1fr);gap:.75rem;
margin:1.25rem 0 0;padding:0}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:.8rem 1rem}
.card dt{font-size:.8rem;color:var(--soft)}
.card dd{margin:0;font-size:1.5rem;font-weight:600;font-variant-numeric:tabular-nums}
.card dd+dd{font-size:.82rem;font-weight:400;color:var(--soft)}
.card dd.alarm{color:var(--alarm)}
figure{margin:0}figcaption{margin-top:.6rem;font-size:.82rem;color:var(--soft);
overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;margin:.4rem 0 .8rem;padding:0;
font-size:.85rem}
.legend i{display:inline-block;width:.85em;height:.85em;border-radius:2px;margin-right:.4em;
vertical-align:-.05em;background:var(--c)}
.row{display:grid;grid-template-columns:minmax(7rem,19rem) 1fr 12.5rem;gap:.75rem;
align-items:center;padding:.11rem 0;font-size:.82rem}
.row:hover{background:var(--panel)}
.name{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,monospace;font-size:.78rem;
overflow-wrap:anywhere;line-height:1.3}
.value{font-variant-numeric:tabular-nums;white-space:nowrap}
.value small{color:var(--soft);margin-left:.6em;white-space:normal}
.bar{display:block;width:100%;height:.85rem;border-radius:2px;overflow:hidden}
.total .bar{height:1.5rem}.total .row{grid-template-columns:4rem 1fr 6rem;padding:.2rem 0}
rect{fill:var(--c)}rect.before{fill:var(--track)}rect.error{fill:var(--line)}
rect.alarm{fill:var(--alarm)}
.limit{stroke:var(--text);stroke-width:2;stroke-dasharray:5 4;vector-effect:non-scaling-stroke}
.plot{position:relative;border-bottom:1px solid var(--rule);border-top:1px dotted var(--rule)}
.plot svg{display:block;width:100%;height:13rem}
.plot span{position:absolute;left:0;font-size:.75rem;color:var(--soft);background:var(--page);
padding:0 .35em 0 0;line-height:1.2}.plot .top{top:-.6em}.plot .zero{bottom:-.6em}
.area{fill:var(--line);opacity:.18}.line{fill:none;stroke-width:1.8;vector-effect:non-scaling-stroke}
.line.s0{stroke:var(--line)}.line.s1{stroke:var(--second)}
i.s0{--c:var(--line)}i.s1{--c:var(--second)}
.legend i.dash{height:0;border-top:2px dashed var(--text);background:none;width:1.3em;
border-radius:0;vertical-align:.3em}
.ends{display:flex;justify-content:space-between;gap:1rem;font-size:.75rem;color:var(--soft);
margin-top:.5rem}.ends span{overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;width:100%}
caption{color:var(--soft)}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--rule);overflow-wrap:anywhere}
th{border-bottom-width:2px}
details{margin:.75rem 0}summary{cursor:pointer;color:var(--line)}
summary:focus-visible{outline:2px solid var(--line);outline-offset:2px}
@media (max-width:40rem){main{padding:1.25rem .9rem 3rem}h1{font-size:1.35rem}
.cards{grid-template-columns:repeat(2,1fr)}.card dd{font-size:1.2rem}
.row,.total .row{grid-template-columns:1fr auto;gap:.1rem .75rem;padding:.3rem 0}
.row .bar{grid-column:1/-1;grid-row:2}th,td{padding:.3rem .35rem}}
@media print{details>*{display:revert}.row{break-inside:avoid}}
""".strip()


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """An HTML table; every cell is escaped. Columns of numbers and sizes are aligned to the right.

    >>> table(("layer", "bytes"), [("a<b", "12 B")]).count("a&lt;b")
    1
    """
    cells = [[str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, the table {len(headers)} columns")
    right = [
        bool(cells) and all(_is_number(row[column]) for row in cells)
        for column in range(len(headers))
    ]
    # Styles stand in the elements, because a notebook shows the table without a page around it.
    align = [f' style="text-align:{"right" if r else "left"}"' for r in right]
    head = "".join(
        f'<th scope="col"{a}>{escape(h)}</th>' for a, h in zip(align, headers, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{a}>{escape(c)}</td>" for a, c in zip(align, r, strict=True))
        + "</tr>"
        for r in cells
    )
    above = (
        '<caption style="text-align:left;white-space:pre-line;caption-side:top">'
        f"{escape(caption)}</caption>"
        if caption
        else ""
    )
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _is_number(text: str) -> bool:
    number = text.removesuffix("%").strip()
    first, _, unit = number.partition(" ")
    if unit and unit not in ("B", "KiB", "MiB", "GiB", "TiB", "s", "dB"):
        return False
    try:
        float(first)
    except ValueError:
        return False
    return True


def page(title: str, sections: Iterable[Section], *, lead: str = "", style: str = "") -> str:
    """A whole HTML document that loads nothing: `sections` are (heading, HTML), `lead` is text.

    An empty heading leaves the heading out. `style` is CSS that comes after the page's own.
    """
    body = "".join(
        f"<section>{f'<h2>{escape(heading)}</h2>' if heading else ''}{content}</section>"
        for heading, content in sections
    )
    below = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none';style-src 'unsafe-inline';img-src data:\">"
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{below}{body}</main></body></html>\n"
    )


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str | Mapping[str, Any] = "",
    estimate: Any = None,
    plan: Any = None,
    comparison: Any = None,
    timeline: Sequence[tuple[str, int]] | None = None,
    left_out: Iterable[Sequence[Any]] = (),
) -> Path:
    """Write a report as one HTML file that needs neither network nor scripts.

    Args:
        path: The file; it appears whole or not at all.
        title: The heading.
        summary: A text under the heading, or figures: a mapping with text and numbers (keys
            `*_bytes`, `*_fraction` and `*seconds` are shown with their unit), and "measured", a
            mapping with peak_bytes, seconds and reference_seconds.
        estimate: A MemoryEstimate.
        plan: A Plan.
        comparison: A Comparison.
        timeline: Measured (label, live bytes of the call), shown beside the estimate's.
        left_out: (name, reason, bytes) of what stays plain.

    Sections whose data is None are not in the page. Raises OSError if the system refuses.
    """
    figures = summary if isinstance(summary, Mapping) else {}
    measured = figures.get("measured") or {}
    sections: list[Section] = []
    cards = _cards(estimate, plan, comparison, measured)
    if cards:
        sections.append(("", f'<dl class="cards">{"".join(cards)}</dl>'))
    style = ""
    if plan is not None:
        style = charts.colour_rules(charts.plan_colours(plan))
        sections += [
            ("Memory by format", charts.total_bars(plan) + _format_table(plan)),
            ("Memory by layer", charts.layer_bars(plan) + _layer_table(plan)),
        ]
    if comparison is not None:
        sections.append(("Error", _error_section(comparison)))
    series = {
        name: points
        for name, points in (
            ("estimated", getattr(estimate, "timeline", None)),
            ("measured", timeline),
        )
        if points
    }
    if series:
        sections.append(("Memory of one call", _timeline_section(estimate, series)))
    items = [tuple(item) for item in left_out]
    if items:
        sections.append(("Left out", _left_out_section(items)))
    if figures:
        sections.append(("Figures", _figure_table(figures)))
    lead = summary if isinstance(summary, str) else str(figures.get("model", ""))
    return write_text(path, page(title, sections, lead=lead, style=style))


def _card(label: str, value: str, note: str = "", alarm: bool = False) -> str:
    mark = ' class="alarm"' if alarm else ""
    below = f"<dd>{escape(note)}</dd>" if note else ""
    return f'<div class="card"><dt>{escape(label)}</dt><dd{mark}>{escape(value)}</dd>{below}</div>'


def _cards(estimate: Any, plan: Any, comparison: Any, measured: Mapping[str, Any]) -> list[str]:
    cards = []
    if plan is not None:
        before = plan.weights_bytes + sum(e.original_bytes - e.bytes for e in plan.entries)
        share = f"{plan.weights_bytes / before:.1%}" if before else "100 %"
        note = f"{share} of {format_size(before)}"
        cards.append(_card("Weights", format_size(plan.weights_bytes), note))
        room = plan.limit_bytes - getattr(plan, "buffer_bytes", 0) - plan.weights_bytes
        note = f"{format_size(room)} to spare" if room >= 0 else f"{format_size(-room)} too much"
        cards.append(_card("Limit", format_size(plan.limit_bytes), note, alarm=room < 0))
    elif estimate is not None:
        cards.append(_card("Weights", format_size(estimate.weights_bytes)))
    peak, real = getattr(estimate, "peak_bytes", None), measured.get("peak_bytes")
    if peak is not None:
        note = f"measured {format_size(real)} ({peak / real - 1:+.1%})" if real else "estimated"
        cards.append(_card("Peak of one call", format_size(peak), note))
    elif real is not None:
        cards.append(_card("Peak of one call", format_size(real), "measured"))
    if comparison is not None:
        bad = comparison.nonfinite_values + comparison.reference_nonfinite_values
        note = f"mean {comparison.cosine_mean:.5f}" + (f"; {bad} values not finite" if bad else "")
        cards.append(_card("Least cosine", f"{comparison.cosine:.5f}", note, alarm=bool(bad)))
        note = f"SQNR {comparison.sqnr_db:.1f} dB"
        cards.append(_card("Relative L2 error", f"{comparison.relative_l2:.4f}", note))
    seconds = measured.get("seconds", getattr(comparison, "seconds", None))
    reference = measured.get("reference_seconds", getattr(comparison, "reference_seconds", None))
    if seconds is not None:
        note = f"reference {format_seconds(reference)}" if reference is not None else ""
        cards.append(_card("Time of one call", format_seconds(seconds), note))
    return cards


def format_seconds(seconds: float) -> str:
    """A time with three digits and a unit that suits it.

    >>> format_seconds(0.01234), format_seconds(2.5)
    ('12.3 ms', '2.5 s')
    """
    if not math.isfinite(seconds) or seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _more(label: str, content: str) -> str:
    return f'<details><summary>{escape(label)}</summary><div class="wide">{content}</div></details>'


def _format_table(plan: Any) -> str:
    totals: dict[tuple[str, str], list[int]] = {}
    for e in plan.entries:
        total = totals.setdefault((e.format or "plain", e.tier), [0, 0, 0])
        for i, n in enumerate((1, e.original_bytes, e.bytes)):
            total[i] += n
    rows = [
        (
            fmt,
            tier,
            str(layers),
            format_size(old),
            format_size(new),
            f"{new / old:.1%}" if old else "",
        )
        for (fmt, tier), (layers, old, new) in sorted(totals.items(), key=lambda i: -i[1][2])
    ]
    headers = ("format", "place", "layers", "before", "after", "share kept")
    return f'<div class="wide">{table(headers, rows)}</div>'


def _layer_table(plan: Any) -> str:
    rows = [
        (
            e.name,
            e.kind,
            e.format or "plain",
            e.tier,
            format_size(e.original_bytes),
            format_size(e.bytes),
            f"{e.error:.2e}",
        )
        for e in plan.entries
    ]
    headers = ("layer", "kind", "format", "place", "before", "after", "weight error")
    return _more(f"All {len(rows)} layers", table(headers, rows))


def _error_section(comparison: Any) -> str:
    content = f'<p class="lead">{escape(str(comparison))}</p>'
    if comparison.layers:
        content += charts.error_bars(comparison.layers)
        rows = [(e.name, f"{e.relative_l2:.4g}", f"{e.cosine:.6f}") for e in comparison.layers]
        whole = table(("layer", "relative L2", "least cosine"), rows)
        content += _more(f"Errors of all {len(rows)} layers", whole)
    if comparison.left_out:
        whole = table(("layer", "reason"), comparison.left_out)
        content += _more(f"Layers that could not be compared: {len(comparison.left_out)}", whole)
    return content


def _timeline_section(estimate: Any, series: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    highest = getattr(estimate, "activations_bytes", None)
    content = charts.timeline_chart(
        series, ("estimated peak", highest) if highest is not None else None
    )
    if estimate is not None:
        content += f"<p>The weights, {format_size(estimate.weights_bytes)}, come on top.</p>"
        content += "".join(
            f'<p class="lead">{escape(note)}</p>' for note in getattr(estimate, "notes", ())
        )
    return content


def _left_out_section(items: list[tuple[Any, ...]]) -> str:
    totals: dict[str, list[int]] = {}
    for _, reason, *size in items:
        total = totals.setdefault(str(reason), [0, 0])
        total[0] += 1
        total[1] += size[0] if size else 0
    rows = [
        (reason, str(count), format_size(size))
        for reason, (count, size) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]
    every = [(n, r, format_size(size[0]) if size else "") for n, r, *size in items]
    return (
        "<p>These parameters keep the form they had.</p>"
        f'<div class="wide">{table(("reason", "parameters", "bytes"), rows)}</div>'
        + _more(f"All {len(every)}", table(("parameter", "reason", "bytes"), every))
    )


def _figure_table(figures: Mapping[str, Any]) -> str:
    rows = list(_flat("", figures))
    return _more("All figures", table(("figure", "value"), rows))


def _flat(prefix: str, figures: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in figures.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(f"{name}.", value)
        elif isinstance(value, (str, int, float)) or value is None:
            yield name, _with_unit(str(key), value)


def _with_unit(key: str, value: Any) -> str:
    if isinstance(value, (bool, str)) or value is None:
        return str(value)
    if key.endswith("bytes"):
        return format_size(int(value))
    if key.endswith("fraction"):
        return f"{value:.2%}"
    if key.endswith("seconds"):
        return format_seconds(float(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file that appears whole or not at all; OSError names `path`."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
    return target
