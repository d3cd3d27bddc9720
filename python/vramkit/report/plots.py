"""Matplotlib figures of plans and comparisons; matplotlib is imported when one is made.

The figures are not pyplot's: they keep no global state, show themselves in notebooks, and are
written with `.savefig(path)`.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from ..sizes import format_size
from .layout import error_rows, families, family, layer_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = "#0069a8"


def _figure(height: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib, which is not installed: pip install "vramkit[demo]"'
        ) from error

    class ShownFigure(Figure):
        """A figure that a notebook shows though pyplot does not know it."""

        def _repr_png_(self) -> bytes:
            data = io.BytesIO()
            self.savefig(data, format="png", dpi=110)
            return data.getvalue()

    figure = ShownFigure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _size_axis(axis: Any, highest: int) -> None:
    """Ticks at four to eight multiples of a power of two."""
    from matplotlib.ticker import MultipleLocator

    step = 2 ** max(0, math.floor(math.log2(max(highest, 1))) - 2)
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(lambda value, _: format_size(round(value)))


def _name_rows(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=8, family="monospace")
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first layer on top
    axes.tick_params(axis="y", length=0)


def plan_figure(plan: Any) -> Figure:
    """Bytes of each layer, or group of layers, before (grey) and after (by format)."""
    rows = layer_rows(plan)
    figure, axes = _figure(1.6 + 0.2 * len(rows))
    before = [sum(e.original_bytes for e in entries) for _, entries in rows]
    axes.barh(range(len(rows)), before, color="#dfe3e8", label="before")
    left = [0] * len(rows)
    for name, colour in families([e.format for e in plan.entries]).items():
        widths = [sum(e.bytes for e in es if family(e.format) == name) for _, es in rows]
        axes.barh(range(len(rows)), widths, left=left, color=colour.light, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    _name_rows(axes, [label for label, _ in rows])
    _size_axis(axes.xaxis, max(*before, *left, 1))
    title = f"weights {format_size(plan.weights_bytes)}"
    if plan.limit_bytes is not None:
        title += f", limit {format_size(plan.limit_bytes)}"
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="outside lower left", ncols=6, frameon=False, fontsize=9)
    return figure


def comparison_figure(comparison: Any) -> Figure:
    """Relative L2 error by layer; the whole output's in the title, and alone if no layer is known.

    An error that is not finite is drawn in red over the whole width.
    """
    layers = [("output", comparison.relative_l2)]
    if comparison.layers:
        layers = error_rows(comparison.layers)
    figure, axes = _figure(1.4 + 0.2 * len(layers))
    widest = max((v for _, v in layers if math.isfinite(v)), default=0.0) or 1.0
    known = [math.isfinite(v) for _, v in layers]
    widths = [v if ok else widest for (_, v), ok in zip(layers, known, strict=True)]
    axes.barh(range(len(layers)), widths, color=[_LINE if ok else "#b3261e" for ok in known])
    _name_rows(
        axes, [n if ok else f"{n} (not finite)" for (n, _), ok in zip(layers, known, strict=True)]
    )
    axes.set_xlabel("relative L2 error")
    axes.set_title(
        f"relative L2 {comparison.relative_l2:.4g}, least cosine {comparison.cosine:.5f}, "
        f"SQNR {comparison.sqnr_db:.1f} dB",
        loc="left",
        fontsize=11,
    )
    return figure
