"""The report of the video model's measurements: JSON, Markdown, and one HTML file with pictures."""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report.charts import timeline_chart
from ..report.html import format_seconds, page, table
from ..sizes import format_size
from ..text_file import replace_text
from .suite import BenchmarkResult, ScaleRow

_ZOOM = 4  # pixels of a picture for one of a frame, so that small frames can be seen
_COLOURS = (("#0069a8", "#4ea8e8"), ("#b35900", "#f0ad2e"), ("#2a8c80", "#5cc4b6"),
            ("#7b2d8b", "#c58fd6"), ("#931914", "#ff8a80"), ("#5b6670", "#9aa4ae"))  # fmt: skip
_HEADS = ("size", "precision", "weights", "of fp32", "peak", "estimated", "per frame", "frames/s",
          "error", "drift", "note")  # fmt: skip


@dataclass
class Week1Report:
    """What was measured, in three forms; `write` puts them in a folder.

    Attributes:
        rows: In the order they were given.
        losses: Loss of every step by name, where a training is to be shown.
        scale: Of models that were never built (`true_scale`).
        about: Versions and the device.
    """

    rows: list[BenchmarkResult]
    losses: dict[str, list[float]] = field(default_factory=dict)
    scale: list[ScaleRow] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; keys named `*_bytes` are bytes."""
        return {
            "about": self.about,
            "rows": [row.to_dict() for row in self.rows],
            "losses": self.losses,
            "true_scale": [{**row._asdict(), "peak_bytes": row.peak_bytes} for row in self.scale],
        }

    def markdown(self, pictures: Mapping[str, str] | None = None) -> str:
        """Tables as Markdown; `pictures` are file names by title, shown below."""
        parts = ["# The video model by precision", "", ", ".join(_about_texts(self.about)), ""]
        parts += _markdown_table(_HEADS, [_cells(row) for row in self.rows])
        if self.scale:
            parts += ["", "## At true scale, from shapes", ""]
            parts += _markdown_table(_SCALE_HEADS, [_scale_cells(row) for row in self.scale])
        if self.losses:
            parts += ["", "## Training", ""]
            rows = [(name, str(len(v)), f"{v[0]:.4g}", f"{_last(v):.4g}")
                    for name, v in self.losses.items() if v]  # fmt: skip
            parts += _markdown_table(("", "steps", "first loss", "mean of the last tenth"), rows)
        for title, name in (pictures or {}).items():
            parts += ["", f"## {title}", "", f"![{title}]({name})"]
        return "\n".join(parts) + "\n"

    def html(self) -> str:
        """One page that loads nothing: tables, frames by precision, memory, losses."""
        sections = [("Figures", _wide(table(_HEADS, [_cells(row) for row in self.rows])))]
        if self.scale:
            rows = [_scale_cells(row) for row in self.scale]
            sections.append(("At true scale, from shapes", _wide(table(_SCALE_HEADS, rows))))
        for size, rows_of in _by_size(self.rows).items():
            shown = [row for row in rows_of if row.frames is not None]
            if shown:
                sections.append((f"Frames, {size}", _figure(shown)))
            series = {row.precision: row.timeline for row in rows_of if row.timeline}
            if series:
                sections.append((f"Memory of one frame, {size}", timeline_chart(series)))
        if any(self.losses.values()):
            sections.append(("Training", loss_chart(self.losses)))
        return page(
            "The video model by precision",
            sections,
            lead="\n".join(_about_texts(self.about)),
            style=_STYLE,
        )

    def pictures(self) -> dict[str, bytes]:
        """PNG files by title: frames side by side, a row for each precision."""
        return {
            f"Frames, {size}": frames_png([row.frames for row in rows if row.frames is not None])
            for size, rows in _by_size(self.rows).items()
            if any(row.frames is not None for row in rows)
        }

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """week1.json, week1.md, week1.html and the pictures of the Markdown; the folder is made."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        names = {}
        for title, data in self.pictures().items():
            names[title] = title.lower().replace(", ", "_").replace(" ", "_") + ".png"
            (where / names[title]).write_bytes(data)
        data_text = json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False) + "\n"
        replace_text(where / "week1.json", data_text)
        replace_text(where / "week1.md", self.markdown(names))
        replace_text(where / "week1.html", self.html())
        return where


def generate_week1_report(
    results: Mapping[tuple[str, str], BenchmarkResult] | Iterable[BenchmarkResult],
    folder: str | os.PathLike[str] | None = None,
    *,
    losses: Mapping[str, Sequence[float]] | None = None,
    scale: Iterable[ScaleRow] = (),
) -> Week1Report:
    """The report of `week1_final_benchmark`'s results, written to `folder` where one is given.

    Args:
        results: By (precision, size), or just the rows.
        folder: Gets week1.json, week1.md, week1.html and pictures.
        losses: Loss of every step by name, for curves.
        scale: Rows of `true_scale`.

    Raises ValueError where there are no results, OSError where the system refuses.
    """
    rows = list(results.values() if isinstance(results, Mapping) else results)
    if not rows:
        raise ValueError("there are no results to report")
    report = Week1Report(
        rows, {k: list(v) for k, v in (losses or {}).items()}, list(scale), _environment(rows)
    )
    if folder is not None:
        report.write(folder)
    return report


def _environment(rows: Sequence[BenchmarkResult]) -> dict[str, Any]:
    from .. import __version__

    cuda = any(row.device.startswith("cuda") for row in rows) and torch.cuda.is_available()
    return {
        "vramkit": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
    }


def _about_texts(about: Mapping[str, Any]) -> list[str]:
    return [f"{key} {value}" for key, value in about.items()]


def _by_size(rows: Sequence[BenchmarkResult]) -> dict[str, list[BenchmarkResult]]:
    found: dict[str, list[BenchmarkResult]] = {}
    for row in rows:
        found.setdefault(row.size, []).append(row)
    return found


def _bytes(value: int | None) -> str:
    return "" if value is None else format_size(value)


def _cells(row: BenchmarkResult) -> tuple[str, ...]:
    name = row.precision if row.precision == row.asked else f"{row.precision} ({row.asked})"
    share = f"{row.weights_bytes / row.fp32_bytes:.1%}" if row.weights_bytes else ""
    return (
        row.size,
        name,
        _bytes(row.weights_bytes),
        share,
        _bytes(row.peak_bytes),
        _bytes(row.estimated_bytes),
        "" if row.seconds_per_frame is None else format_seconds(row.seconds_per_frame),
        "" if row.fps is None else f"{row.fps:.3g}",
        "" if row.relative_error is None else f"{row.relative_error:.2g}",
        "" if row.drift is None else f"{row.drift:.2%}",
        "; ".join([*([row.error] if row.error else []), *row.notes]),
    )


_SCALE_HEADS = ("mode", "weights", "one frame's own", "peak", "documented", "why")


def _scale_cells(row: ScaleRow) -> tuple[str, ...]:
    return (
        row.mode,
        format_size(row.weights_bytes),
        format_size(row.activations_bytes),
        format_size(row.peak_bytes),
        _bytes(row.documented_bytes),
        row.explanation,
    )


def _markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(heads), line("---" for _ in heads), *(line(row) for row in rows)]


def _wide(content: str) -> str:
    return f'<div class="wide">{content}</div>'


def _finite(value: Any) -> Any:
    """Plain data that JSON can hold: what is not finite as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _last(values: Sequence[float]) -> float:
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail)


def frames_png(videos: Sequence[Tensor | None], zoom: int = _ZOOM) -> bytes:
    """A PNG with a row for each video [n, 3, H, W], all on the first one's scale of brightness.

    What is not finite is red. Frames are `zoom` times as large, a pixel apart.
    """
    known = [video for video in videos if video is not None]
    if not known:
        raise ValueError("there are no frames to draw")
    first = known[0][torch.isfinite(known[0])]
    low, high = (float(first.min()), float(first.max())) if first.numel() else (0.0, 1.0)
    rows = []
    for video in known:
        lit = ((video - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round()
        lit = torch.where(torch.isfinite(video), lit, torch.tensor([255.0, 0, 0]).view(3, 1, 1))
        lit = lit.to(torch.uint8).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
        rows.append(torch.nn.functional.pad(lit, (0, 1, 0, 1), value=128))
    wide = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
    return _png(wide.permute(1, 2, 0).contiguous())


def _png(pixels: Tensor) -> bytes:
    """[height, width, 3] of uint8 as a file (ISO/IEC 15948, without filters)."""
    height, width, _ = pixels.shape
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.flatten(1)], dim=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines.numpy().tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def _figure(rows: Sequence[BenchmarkResult]) -> str:
    names = ", ".join(row.asked for row in rows)
    data = base64.b64encode(frames_png([row.frames for row in rows])).decode()
    text = f"The first frames of a video; from the top: {names}."
    return (
        f'<figure><img class="frames" alt="{escape(text)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def loss_chart(losses: Mapping[str, Sequence[float]]) -> str:
    """Curves of losses over steps, on a logarithmic scale where all are positive.

    A curve breaks where a loss is not finite; its caption says how often that was.
    """
    known = [v for values in losses.values() for v in values if math.isfinite(v)]
    if not known:
        return "<p>No loss was finite.</p>"
    log = min(known) > 0
    place = math.log if log else float
    low, high = place(min(known)), place(max(known))
    span = (high - low) or 1.0
    steps = max(len(values) for values in losses.values())
    paths, keys, said = [], [], []
    for number, (name, values) in enumerate(losses.items()):
        path, pen = "", "M"
        for step, value in enumerate(values):
            if not math.isfinite(value):
                pen = "M"
                continue
            x = 1000 * step / max(steps - 1, 1)
            path += f"{pen}{x:.1f} {220 * (1 - (place(value) - low) / span):.1f}"
            pen = "L"
        style = f"s{number % len(_COLOURS)}"
        paths.append(f'<path class="line {style}" d="{path}"/>')
        keys.append(f'<li><i class="{style}"></i>{escape(name)}</li>')
        bad = sum(not math.isfinite(v) for v in values)
        more = f", {bad} not finite" if bad else ""
        if values:
            said.append(f"{name}: {values[0]:.4g} to {_last(values):.4g}{more}")
    text = "; ".join(said)
    return (
        f'<figure><ul class="legend">{"".join(keys)}</ul><div class="plot">'
        f'<span class="top">{max(known):.3g}</span><span class="zero">{min(known):.3g}</span>'
        f'<svg viewBox="0 0 1000 220" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(text)}">{"".join(paths)}</svg></div>'
        f'<div class="ends"><span>step 1</span><span>step {steps}</span></div>'
        f"<figcaption>Loss, {'logarithmic' if log else 'linear'}; {escape(text)} (mean of the last "
        "tenth).</figcaption></figure>"
    )


def _style() -> str:
    """Colours of further curves, light and dark, and pixels that stay sharp."""
    rules = [
        "img.frames{max-width:100%;image-rendering:pixelated}",
        ".wide th,.wide td{overflow-wrap:normal;white-space:nowrap}",
        ".wide td:last-child{white-space:normal;min-width:10rem}",
    ]
    for which, (start, end) in enumerate((("", ""), ("@media (prefers-color-scheme:dark){", "}"))):
        rules.append(start)
        for number, pair in enumerate(_COLOURS):
            colour = pair[which]
            rules.append(f".line.s{number}{{stroke:{colour}}}i.s{number}{{--c:{colour}}}")
        rules.append(end)
    return "".join(rules)


_STYLE = _style()
