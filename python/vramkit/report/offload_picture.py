"""The timeline of an offloaded model: as a picture, and as a file for Chrome's trace viewers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..offload.report import Moment, OffloadReport, shortened
from ..sizes import format_size
from .html import write_text
from .plots import _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by lightness too.
COLOURS = {"use": "#3f87c4", "copy": "#e8a33d", "wait": "#8c1d18"}
WORDS = {"use": "calls of blocks", "copy": "copies", "wait": "waits"}
NAMES = 40  # of blocks at most beside the picture
_PROCESS = 1


def thread_name(moment: Moment) -> str:
    """Who was at it: those that call the model are one."""
    return "calls" if moment.thread < 0 else f"copies {moment.thread}"


def timeline_figure(moments: Sequence[Moment], report: OffloadReport) -> Figure:
    """Above, what each thread did; below, what each block went through."""
    blocks = len(report.blocks)
    figure, axes = _figure(2.4 + 0.2 * min(blocks, NAMES))
    figure.delaxes(axes)
    threads = sorted({m.thread for m in moments} | {-1})
    ratios = [0.6 * len(threads) + 0.6, max(4.0, 0.5 * min(blocks, NAMES))]
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    begin = min((m.begin_ns for m in moments), default=0)
    end = max((m.end_ns for m in moments), default=0)
    for row, thread in enumerate(threads):
        for kind in COLOURS:
            _bars(top, [m for m in moments if m.thread == thread and m.kind == kind], begin,
                  row - 0.38, 0.76)  # fmt: skip
    for kind, offset, height in (("use", -0.45, 0.45), ("wait", -0.45, 0.45), ("copy", 0.0, 0.45)):
        for block in range(blocks):
            chosen = [m for m in moments if m.block == block and m.kind == kind]
            _bars(below, chosen, begin, block + offset, height)
    top.set_yticks(range(len(threads)), [thread_name(Moment("", 0, t, 0, 0)) for t in threads])
    top.set_ylim(len(threads) - 0.4, -0.6)
    step = -(-blocks // NAMES)
    names = [
        shortened(b.name, 24) + (" (resident)" if b.resident else "") for b in report.blocks[::step]
    ]
    below.set_yticks(range(0, blocks, step), names, fontsize=8, family="monospace")
    below.set_ylim(blocks - 0.4, -0.6)
    for ax in (top, below):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    below.set_xlim(0, max(1.0, end - begin) / 1e6)
    below.set_xlabel("ms")
    top.set_title(_title(moments, report, end - begin), loc="left", fontsize=11)
    handles = [_patch(colour, WORDS[kind]) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


def _title(moments: Sequence[Moment], report: OffloadReport, length: int) -> str:
    if not moments:
        return "nothing recorded yet: call the model"
    seconds = {kind: sum(m.end_ns - m.begin_ns for m in moments if m.kind == kind) / 1e9
               for kind in COLOURS}  # fmt: skip
    share = f"{seconds['use'] * 1e9 / length:.0%}" if length else "0%"
    return (
        f"{length / 1e9:.3f} s, of which blocks were called {seconds['use']:.3f} s ({share}) and "
        f"waited for {seconds['wait']:.3f} s; {format_size(report.pass_bytes)} copied a pass"
    )


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _bars(axes: Axes, moments: Sequence[Moment], begin: int, low: float, height: float) -> None:
    if moments:
        spans = [((m.begin_ns - begin) / 1e6, (m.end_ns - m.begin_ns) / 1e6) for m in moments]
        axes.broken_barh(
            spans, (low, height), facecolors=COLOURS[moments[0].kind], edgecolor="white",
            linewidth=0.3,
        )  # fmt: skip


def trace_events(moments: Sequence[Moment], report: OffloadReport) -> list[dict[str, Any]]:
    """Events in Chrome's trace format: complete ones ("X", µs), after names of their threads."""
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": _PROCESS, "tid": 0,
         "args": {"name": "vramkit offload"}}
    ]  # fmt: skip
    for thread in sorted({m.thread for m in moments}):
        name = thread_name(Moment("", 0, thread, 0, 0))
        events.append({"name": "thread_name", "ph": "M", "pid": _PROCESS, "tid": thread + 1,
                       "args": {"name": name}})  # fmt: skip
    for m in moments:
        block = report.blocks[m.block]
        events.append(
            {
                "name": f"{m.kind} {shortened(block.name)}",
                "cat": m.kind,
                "ph": "X",
                "ts": m.begin_ns / 1e3,
                "dur": (m.end_ns - m.begin_ns) / 1e3,
                "pid": _PROCESS,
                "tid": m.thread + 1,
                "args": {"block": m.block, "bytes": block.nbytes, "resident": block.resident},
            }
        )
    return events


def write_trace(
    path: str | os.PathLike[str], moments: Sequence[Moment], report: OffloadReport
) -> Path:
    """Write a trace file, with the report beside the events."""
    data = {
        "traceEvents": trace_events(moments, report),
        "displayTimeUnit": "ms",
        "otherData": report.to_dict(),
    }
    return write_text(path, json.dumps(data))
