"""The picture of a sensitivity: layers by formats, the error as colour."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .plots import _figure, _name_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 60  # more cannot be read; neighbours are then left out evenly


def sensitivity_figure(found: Any) -> Figure:
    """A map of log10 of the predicted errors; grey where a layer cannot have a format."""
    layers = found.layers
    step = max(1, math.ceil(len(layers) / _ROWS))
    rows = layers[::step]
    figure, axes = _figure(1.6 + 0.2 * len(rows))
    values = [
        [math.log10(max(layer.errors[f], 1e-16)) if f in layer.errors else math.nan
         for f in found.formats]
        for layer in rows
    ]  # fmt: skip
    axes.set_facecolor("#dfe3e8")
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(found.formats)), found.formats, rotation=45, ha="right", fontsize=8)
    _name_rows(axes, [layer.name for layer in rows])
    figure.colorbar(image, ax=axes, label="log10 of the squared relative error")
    axes.set_title(f"sensitivity, method {found.method!r}", loc="left", fontsize=11)
    return figure
