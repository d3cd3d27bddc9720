"""The picture of an estimate: live bytes over loading and running, stacked by what they are for.

The horizontal axis is the order of allocations, not time; loading and running have a share each.
Matplotlib is imported when a picture is made.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..sizes import format_size, parse_size
from ..tracing import RELEASE, Trace
from .plots import _figure, _size_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..estimator import MemoryEstimate
    from ..phases import PipelineEstimate

# In the order of the stack; told apart by lightness too.
KINDS = {
    "weights": "#8a97a8",
    "weights being read": "#b49ac6",
    "cache": "#1b7f6b",
    "activations": "#3f87c4",
    "workspaces": "#e8a33d",
}
_ALARM, _INK = "#b3261e", "#1f2328"
POINTS = 420  # of the run; of each run of events the highest stays
LOAD_SHARE = 0.2
SEGMENTS = 14  # bands of modules at most, and the least share of the events of one that is split
SPLIT = 0.2
HOLDERS = 5  # named beside the picture


@dataclass
class Part:
    """A stretch of the picture: bytes of each kind at some events, and bands with names.

    `stacks` are bytes by kind, of equal width; `bands` (begin, end, name) and `peak` (place, total)
    have places from 0 to 1; `holders` are (operator, module, bytes) at the peak.
    """

    stacks: list[dict[str, int]]
    bands: list[tuple[float, float, str]]
    peak: tuple[float, int]
    name: str
    holders: list[tuple[str, str, int]] = field(default_factory=list)


def stacked(
    trace: Trace, kind: Callable[[int], str], base: Callable[[str], int], points: int
) -> tuple[list[dict[str, int]], int]:
    """(bytes by kind in at most `points` equal runs of events, each at its highest; peak's event).

    `base` gives the weights that are there in a phase, which begins with its first allocation.
    """
    now = dict.fromkeys(KINDS, 0)
    alive: dict[int, tuple[int, str]] = {}
    weights = {phase: base(phase) for phase in trace.phases()}
    step = max(1, math.ceil(len(trace) / points))
    found: list[dict[str, int]] = []
    there = total = 0
    most, where = -1, 0
    highest = -1
    for index, (block, size, _, tag) in enumerate(trace):
        if size == RELEASE:
            gone, name = alive.pop(block)
            now[name] -= gone
            total -= gone
        else:
            there = weights[trace.tags[tag].phase]
            name = kind(block)
            alive[block] = size, name
            now[name] += size
            total += size
        if index % step == 0:
            highest = -1
            found.append({})
        if total + there > highest:
            highest = total + there
            found[-1] = {**now, "weights": now["weights"] + there}
        if highest > most:
            most, where = highest, index
    return found, where


def module_bands(trace: Trace) -> list[tuple[int, int, str]]:
    """(begin, end, name) of runs of events within modules: the widest are split first.

    What a module does outside its children belongs to the band before it.
    """
    # A release has the tag of its allocation, which may be of another module.
    paths = [trace.tags[tag].module if size != RELEASE else "" for _, size, _, tag in trace]
    bands = _split(paths, 0, len(paths), "")
    whole: set[tuple[int, int, str]] = set()
    while len(bands) < SEGMENTS:
        widest = max((b for b in bands if b not in whole), key=lambda b: b[1] - b[0], default=None)
        if widest is None or widest[1] - widest[0] < SPLIT * len(paths):
            break
        parts = _split(paths, *widest)
        place = bands.index(widest)
        if parts == [widest] or len(bands) + len(parts) - 1 > SEGMENTS:
            whole.add(widest)
        else:
            bands[place : place + 1] = parts
    return bands


def _split(paths: list[str], begin: int, end: int, name: str) -> list[tuple[int, int, str]]:
    """A band in bands of its module's children; itself where there are none."""
    depth = name.count(".") + 2 if name else 1
    made: list[list[Any]] = [[begin, end, name]]
    for index in range(begin, end):
        child = ".".join(paths[index].split(".")[:depth])
        inside = child != name and (not name or child.startswith(f"{name}."))
        if not inside or child == made[-1][2]:
            continue
        if made[-1][2] == name:
            made[-1][2] = child
        else:
            made[-1][1] = index
            made.append([index, end, child])
    return [(first, last, label) for first, last, label in made]


def phase_bands(trace: Trace) -> list[tuple[int, int, str]]:
    """(begin, end, name) of the phases, by their own events."""
    made: list[list[Any]] = []
    for index, row in enumerate(trace):
        name = trace.tags[row[3]].phase
        if made and (made[-1][2] == name or row[1] == RELEASE):
            made[-1][1] = index + 1
        else:
            made.append([index, index + 1, name])
    return [(begin, end, name) for begin, end, name in made]


def _part(
    trace: Trace,
    name: str,
    bands: list[tuple[int, int, str]],
    kind: Callable[[int], str],
    base: Callable[[str], int],
    points: int,
) -> Part:
    stacks, index = stacked(trace, kind, base, points)
    count = max(1, len(trace))
    holders: dict[tuple[str, str], int] = {}
    for _, size, tag_index in trace.alive_at(index):
        tag = trace.tags[tag_index]
        operator = tag.operator.removeprefix("aten.").removesuffix(".default")
        where = operator, tag.module or "the model itself"
        holders[where] = holders.get(where, 0) + size
    most = max((sum(stack.values()) for stack in stacks), default=0)
    return Part(
        stacks,
        [(begin / count, end / count, label) for begin, end, label in bands],
        ((index // max(1, math.ceil(count / points)) + 0.5) / max(1, len(stacks)), most),
        name,
        [(*where, n) for where, n in sorted(holders.items(), key=lambda item: -item[1])],
    )


def load_part(trace: Trace) -> Part:
    """Loading: what stays is weights; what goes again was read to be converted."""
    gone = {block for block, size, _, _ in trace if size == RELEASE}
    return _part(
        trace,
        "load",
        [(0, len(trace), "load")],
        lambda block: "weights being read" if block in gone else "weights",
        lambda _phase: 0,
        round(POINTS * LOAD_SHARE),
    )


def run_part(trace: Trace, base: Callable[[str], int]) -> Part:
    """The calls, on top of the weights that `base` gives for each phase."""
    several = len(trace.phases()) > 1
    return _part(
        trace,
        "run",
        phase_bands(trace) if several else module_bands(trace),
        trace.kind,
        base,
        POINTS,
    )


def _shown(label: str, room: float) -> str:
    """A band's name as it fits: whole, its last parts, or nothing."""
    parts = label.split(".")
    tail = parts[-1] if not parts[-1].isdigit() else ".".join(parts[-2:])
    for text in (label, tail, parts[-1]):
        if len(text) <= room:
            return text
    return ""


def _drawn(parts: Sequence[tuple[Part, float, float]], title: str, limit: int | None) -> Figure:
    figure, axes = _figure(4.4)
    figure.set_size_inches(10.5, 4.4)
    highest = max([part.peak[1] for part, _, _ in parts] + [1])
    top = highest
    if limit is not None and highest < limit <= 2.5 * highest:
        top = limit
    for number, (part, left, width) in enumerate(parts):
        _stack(axes, part, left, width)
        for i, (begin, end, label) in enumerate(part.bands):
            a, b = left + begin * width, left + end * width
            if (i + number) % 2:
                axes.axvspan(a, b, color=_INK, alpha=0.05, linewidth=0, zorder=0)
            text = _shown(label, (b - a) * 105)
            axes.text((a + b) / 2, 1.01, text, transform=axes.get_xaxis_transform(), ha="center",
                      va="bottom", fontsize=7.5, color="#57606a")  # fmt: skip
        if number:
            axes.axvline(left, color=_INK, linewidth=0.8)
        place, size = part.peak
        x = left + place * width
        axes.plot([x], [size], "o", color=_INK, markersize=4, zorder=5)
        axes.annotate(
            format_size(size), (x, size), xytext=(0, 5), textcoords="offset points",
            ha="left" if x < 0.06 else "right" if x > 0.94 else "center", fontsize=8.5,
            weight="bold", color=_INK,
        )  # fmt: skip
    axes.set_xlim(-0.004, 1)
    axes.set_ylim(0, top * 1.12)
    axes.set_xticks([])
    axes.set_xlabel("in the order of allocations")
    _size_axis(axes.yaxis, round(top))
    if limit is not None:
        _limit_line(axes, limit, top)
    axes.set_title(title, loc="left", fontsize=11, pad=18)
    _legend(axes, parts[-1][0])
    return figure


def _stack(axes: Axes, part: Part, left: float, width: float) -> None:
    from matplotlib.collections import PolyCollection

    step = width / max(1, len(part.stacks))
    below = [0] * len(part.stacks)
    for kind, colour in KINDS.items():
        above = [b + stack[kind] for b, stack in zip(below, part.stacks, strict=True)]
        areas = _areas(left, step, below, above)
        if areas:
            drawn = PolyCollection(areas, facecolors=colour, linewidths=0, label=kind)
            axes.add_collection(drawn)
        below = above


def _areas(
    left: float, step: float, below: Sequence[int], above: Sequence[int]
) -> list[list[tuple[float, float]]]:
    """Outlines of the runs of bars that have a height, with no point where nothing changes."""
    outlines: list[list[tuple[float, float]]] = []
    top: list[tuple[float, float]] = []
    bottom: list[tuple[float, float]] = []
    for i in range(len(above) + 1):
        high = i < len(above) and above[i] > below[i]
        x = left + i * step
        for edge, levels in ((top, above), (bottom, below)):
            if edge and not (high and levels[i] == levels[i - 1]):
                edge.append((x, levels[i - 1]))  # the last level's end
            if high and (not edge or levels[i] != levels[i - 1]):
                edge.append((x, levels[i]))
        if not high and top:
            outlines.append(top + bottom[::-1])
            top, bottom = [], []
    return outlines


def _limit_line(axes: Axes, limit: int, top: int) -> None:
    words = f"limit {format_size(limit)}"
    if limit > top:
        axes.text(0.995, 0.985, f"{words}, above the picture", transform=axes.transAxes, ha="right",
                  va="top", fontsize=8.5, color=_ALARM)  # fmt: skip
        return
    axes.axhline(limit, color=_ALARM, linestyle="--", linewidth=1.2)
    axes.text(0.995, limit, words, transform=axes.get_yaxis_transform(), ha="right", va="bottom",
              fontsize=8.5, color=_ALARM)  # fmt: skip


def _legend(axes: Axes, run: Part) -> None:
    """Kinds, and what holds the most at the run's peak, to the right of the picture."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    names = [kind for kind in reversed(KINDS) if kind in unique]
    axes.legend([unique[name] for name in names], names, loc="upper left", frameon=False,
                bbox_to_anchor=(1.0, 1.04), fontsize=9)  # fmt: skip
    if run.name != "run" or not run.holders:
        return
    lines = ["at the call's peak"]
    for operator, module, nbytes in run.holders[:HOLDERS]:
        lines += [f"{format_size(nbytes)}  {operator}", f"     {_tail(module)}"]
    rest = run.holders[HOLDERS:]
    if rest:
        lines.append(f"{format_size(sum(n for *_, n in rest))}  in {len(rest)} more")
    axes.annotate("\n".join(lines), (1, 0), xycoords="axes fraction", xytext=(10, 0), va="bottom",
                  textcoords="offset points", fontsize=7.5, color=_INK, linespacing=1.3,
                  annotation_clip=False)  # fmt: skip


def _tail(path: str, room: int = 38) -> str:
    """As many of a path's last parts as fit."""
    parts = path.split(".")
    while len(".".join(parts)) > room and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts) if len(parts) == path.count(".") + 1 else f"…{'.'.join(parts)}"


def estimate_figure(found: MemoryEstimate, limit: float | str | None = None) -> Figure:
    """Loading and one call (or a generation loop): weights, cache, activations, workspaces."""
    parts: list[tuple[Part, float, float]] = []
    share = LOAD_SHARE if found.trace is not None else 1.0
    if found.load_trace is not None and len(found.load_trace):
        parts.append((load_part(found.load_trace), 0.0, share))
    if found.trace is not None:
        left = share if parts else 0.0
        run = run_part(found.trace, lambda _phase: found.weights_bytes)
        parts.append((run, left, 1 - left))
    title = f"{found.precision}, {found.target}: weights {format_size(found.weights_bytes)}"
    if found.peak_bytes is not None and found.activations_bytes is not None:
        title += (
            f" + call {format_size(found.activations_bytes)} = peak {format_size(found.peak_bytes)}"
        )
    if not parts:
        return _empty(title)
    figure = _drawn(parts, title, _limit(limit))
    if found.calibrated is not None and found.peak_bytes is not None:
        (axes,) = figure.axes
        axes.axhline(found.peak_bytes, color=_INK, linestyle=":", linewidth=1.2)
        axes.text(0.995, found.peak_bytes, "measured", ha="right", va="bottom", fontsize=8.5,
                  transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_ylim(top=max(axes.get_ylim()[1], found.peak_bytes * 1.08))
    return figure


def pipeline_figure(found: PipelineEstimate, limit: float | str | None = None) -> Figure:
    """All phases in turn, on top of the weights that are there in each."""
    title = f"{len(found.phases)} phases, peak {format_size(found.peak_bytes)}"
    if found.trace is None or not len(found.trace):
        return _empty(title)
    weights = {phase.name: phase.weights_bytes for phase in found.phases}
    most = max(weights.values())
    run = run_part(found.trace, lambda phase: weights.get(phase, most))
    return _drawn([(run, 0.0, 1.0)], title, _limit(limit))


def _limit(limit: float | str | None) -> int | None:
    return None if limit is None else parse_size(limit)


def _empty(title: str) -> Figure:
    figure, axes = _figure(3.0)
    axes.text(0.5, 0.5, "no timeline: estimate with inputs= to see one", ha="center", va="center",
              transform=axes.transAxes)  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def svg_of(figure: Figure) -> str:
    """A figure as an SVG element, the same for the same figure."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "vramkit"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
