"""Reports: pages that stand alone and stay readable, figures that show what the data say."""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vramkit
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vramkit.quality import Comparison, LayerError
from vramkit.report import html, layout
from vramkit.report.layout import group_layers, thin

FORMATS = ["int8", "nf4", "nf4_dq", "int4_g64", "bf16", "mine", None]
NASTY = "a<script>alert('1')</script>\"&"


def entry(name: str, fmt: str | None = "int8", size: int = 25, original: int = 100) -> Any:
    return SimpleNamespace(
        name=name,
        kind="Linear",
        format=fmt,
        bytes=size,
        original_bytes=original,
        error=1e-4,
        tier="resident",
    )


def make_plan(count: int) -> Any:
    parts = ("q", "k", "v", "o", "up", "down")
    entries = [
        entry(f"model.layers.{i // 6}.{parts[i % 6]}", FORMATS[i % 7], 1000 + i, 8000)
        for i in range(count)
    ]
    weights = sum(e.bytes for e in entries) + 500
    return SimpleNamespace(entries=entries, limit_bytes=weights + 4096, weights_bytes=weights)


def make_estimate(steps: int = 20) -> Any:
    return SimpleNamespace(
        weights_bytes=4096,
        activations_bytes=3000,
        peak_bytes=7096,
        timeline=[(f"step {i}", 100 * (i % 7)) for i in range(steps)],
        notes=["a note"],
    )


def make_comparison(plan: Any, **changes: Any) -> Comparison:
    layers = [LayerError(e.name, 0.01 + i / 1e4, 0.99) for i, e in enumerate(plan.entries)]
    fields = {
        "relative_l2": 0.0123,
        "cosine": 0.99876,
        "cosine_mean": 0.9995,
        "sqnr_db": 38.2,
        "max_error": 0.5,
        "seconds": 0.0123,
        "reference_seconds": 0.04,
        "layers": layers,
    }
    return Comparison(**{**fields, **changes})


class Document(HTMLParser):
    """Elements and text of a page; fails on tags that do not match."""

    VOID = ("meta", "br", "hr", "img", "link", "input", "rect", "line", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def full_report(path: Path, count: int = 38, **changes: Any) -> Document:
    plan = make_plan(count)
    options: dict[str, Any] = {
        "title": "A report",
        "summary": {
            "model": "a model",
            "measured": {"peak_bytes": 7000, "seconds": 0.5, "reference_seconds": 2.0},
            "coverage_bytes_fraction": 0.98765,
        },
        "estimate": make_estimate(),
        "plan": plan,
        "comparison": make_comparison(plan),
        "timeline": [("a", 10), ("b", 20)],
        "left_out": [("a.bias", "biases stay plain", 400), ("b.bias", "biases stay plain", 200)],
    }
    assert html.write_report(path, **{**options, **changes}) == path
    return Document(path.read_text(encoding="utf-8"))


# Tables


def test_table_escapes_and_aligns() -> None:
    text = html.table((NASTY, "bytes"), [(NASTY, "1.5 MiB"), ("x", "12 B")], caption=NASTY)
    document = Document(text)
    assert not document.named("script")
    assert document.text.count(NASTY) == 3
    styles = [cell["style"] for cell in document.named("td")]
    assert styles == ["text-align:left", "text-align:right"] * 2


@pytest.mark.parametrize(
    ("cell", "side"),
    [
        ("1.5 MiB", "right"),
        ("12%", "right"),
        ("-3e-4", "right"),
        ("inf", "right"),
        ("1 of 2", "left"),
    ],
)
def test_cells_that_are_numbers(cell: str, side: str) -> None:
    assert f'<td style="text-align:{side}">' in html.table(("a",), [(cell,)])


def test_table_without_rows_and_with_a_wrong_one() -> None:
    assert Document(html.table(("a",), [])).named("td") == []
    with pytest.raises(ValueError, match="1 cells, the table 2 columns"):
        html.table(("a", "b"), [("x",)])


# Pages


def test_page_stands_alone(tmp_path: Path) -> None:
    text = (tmp_path / "r.html").read_text() if full_report(tmp_path / "r.html") else ""
    document = Document(text)
    for tag, attributes in document.elements:
        assert tag not in ("script", "link", "iframe", "object", "img", "base"), tag
        assert not {"src", "href", "srcset", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "//" not in re.sub(r"<!DOCTYPE[^>]*>", "", text)
    assert "prefers-color-scheme:dark" in text
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in document.named(
        "meta"
    )


def test_report_says_the_headline_numbers(tmp_path: Path) -> None:
    text = full_report(tmp_path / "r.html").text
    plan = make_plan(38)
    before = 38 * 8000 + 500
    for part in (
        f"{plan.weights_bytes / before:.1%} of {vramkit.format_size(before)}",
        f"{vramkit.format_size(4096)} to spare",
        "measured 6.8 KiB (+1.4%)",
        "0.99876",
        "0.0123",
        "SQNR 38.2 dB",
        "500 ms",
        "reference 2 s",
        "biases stay plain",
        "98.77%",
        "a note",
    ):
        assert part in text


def test_sections_appear_with_their_data_only(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    html.write_report(path, title="Nothing", summary="only text")
    document = Document(path.read_text())
    assert "only text" in document.text
    assert not document.named("section")
    assert not document.named("figure")
    html.write_report(path, title="Estimate", estimate=make_estimate())
    assert "Memory of one call" in Document(path.read_text()).text
    estimate = make_estimate(0)
    estimate.activations_bytes = estimate.peak_bytes = None
    html.write_report(path, title="Weights", estimate=estimate)
    assert "Memory of one call" not in Document(path.read_text()).text
    html.write_report(path, title="Quality", comparison=make_comparison(make_plan(0)))
    assert "12.3 ms" in Document(path.read_text()).text


@pytest.mark.parametrize("count", [0, 1, 38, 800, 2000])
def test_any_number_of_layers_stays_readable(tmp_path: Path, count: int) -> None:
    path = tmp_path / "r.html"
    plan = make_plan(count)
    changes = {"plan": plan, "comparison": make_comparison(plan)}
    document = full_report(path, **changes)
    rows = [a for a in document.named("div") if a.get("class") == "row"]
    assert len(rows) <= 2 + 2 * 48
    assert len(rows) >= 2 + 2 * min(count, 12)
    for layer in plan.entries:
        assert layer.name in document.text  # in the table of all layers, at least
    assert path.stat().st_size < 2_000_000


def test_nothing_from_the_data_becomes_markup(tmp_path: Path) -> None:
    plan = make_plan(2)
    plan.entries += [entry(NASTY, NASTY), entry(f"{NASTY}.b")]
    plan.entries[-1].tier = plan.entries[-1].kind = NASTY
    document = full_report(
        tmp_path / "r.html",
        title=NASTY,
        summary={"model": NASTY, NASTY: NASTY},
        plan=plan,
        comparison=make_comparison(plan, left_out=[(NASTY, NASTY)]),
        timeline=[(NASTY, 1)],
        estimate=SimpleNamespace(
            weights_bytes=1, activations_bytes=1, peak_bytes=2, timeline=[(NASTY, 1)], notes=[NASTY]
        ),
        left_out=[(NASTY, NASTY, 3)],
    )
    assert not document.named("script")
    assert document.text.count(NASTY) > 10


def test_pictures_say_in_words_what_they_show(tmp_path: Path) -> None:
    document = full_report(tmp_path / "r.html", count=100)
    for svg in document.named("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg["aria-label"])
    labels = [f["aria-label"] for f in document.named("figure") if "aria-label" in f]
    assert any("100 layers in" in str(label) for label in labels)
    assert any("Relative L2 error of 100 layers" in str(label) for label in labels)


def test_bars_are_as_long_as_the_bytes(tmp_path: Path) -> None:
    plan = SimpleNamespace(
        entries=[entry("a", "nf4", 100, 800), entry("b", None, 400, 400)],
        limit_bytes=600,
        weights_bytes=600,
    )
    text = full_report(tmp_path / "r.html", plan=plan, comparison=None).elements
    widths = [float(str(a["width"])) for tag, a in text if tag == "rect"]
    # All of it before; after by family, 100 fixed bytes being plain; then each layer, both ways.
    assert widths == pytest.approx([1000, 500 / 1.3, 100 / 1.3, 1000, 125, 500, 500], abs=0.006)
    limit = next(a for tag, a in text if tag == "line")
    assert float(str(limit["x1"])) == pytest.approx(600 / 1.3, abs=0.006)


def test_infinite_errors_show(tmp_path: Path) -> None:
    layers = [LayerError("good", 0.5, 1.0), LayerError("bad", math.inf, 0.0)]
    comparison = make_comparison(
        make_plan(0), layers=layers, relative_l2=math.inf, cosine=0.0, nonfinite_values=7
    )
    document = full_report(tmp_path / "r.html", plan=None, comparison=comparison)
    assert "not finite" in document.text
    assert "7 values not finite" in document.text
    assert [a["class"] for a in document.named("rect")] == ["error", "alarm"]
    nothing = [LayerError("same", 0.0, 1.0)]
    full_report(tmp_path / "r.html", comparison=make_comparison(make_plan(0), layers=nothing))


def test_a_limit_that_is_passed_shows(tmp_path: Path) -> None:
    plan = make_plan(3)
    plan.limit_bytes = plan.weights_bytes - 100
    document = full_report(tmp_path / "r.html", plan=plan)
    assert "100 B too much" in document.text
    assert any(a.get("class") == "alarm" for a in document.named("dd"))


def test_timeline_keeps_its_peak(tmp_path: Path) -> None:
    estimate = make_estimate(0)
    estimate.timeline = [(f"m{i}", 2900 if i == 3333 else 10) for i in range(5000)]
    document = full_report(tmp_path / "r.html", plan=None, comparison=None, estimate=estimate)
    assert "estimated: 5000 steps, highest 2.8 KiB at m3333" in document.text
    line = next(str(a["d"]) for a in document.named("path") if a["class"] == "line s0")
    heights = [float(y) for y in re.findall(r"V([\d.]+)", line)]
    assert min(heights) == pytest.approx(220 * (1 - 2900 / 3000), abs=0.06)
    assert len(heights) <= 400


# Writing


def test_report_replaces_the_old_one_or_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"No space left on device.*r\.html"):
            html.write_report(path, title="new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.html"]
    html.write_report(path, title="new")
    assert "new" in path.read_text()
    assert os.listdir(tmp_path) == ["r.html"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/r\.html"):
        html.write_report(tmp_path / "none" / "r.html", title="x")
    with pytest.raises(IsADirectoryError):
        html.write_report(tmp_path, title="x")
    assert os.listdir(tmp_path) == []


# Layout


@given(
    names=st.lists(st.from_regex(r"[a-c](\.[0-9]{1,2}){0,3}", fullmatch=True), max_size=200),
    limit=st.integers(1, 60),
)
def test_groups_hold_every_layer_once(names: list[str], limit: int) -> None:
    groups = group_layers(names, limit)
    assert len(groups) <= max(limit, 0)
    assert sorted(i for g in groups for i in g.members) == list(range(len(names)))
    assert all(g.members for g in groups)


def test_groups_follow_the_modules() -> None:
    names = [f"model.layers.{i}.{p}" for i in range(40) for p in ("q", "k", "v")]
    groups = group_layers(["model.embed", *names, "head"])
    assert [g.label for g in groups] == [
        "model.embed",
        *(f"model.layers.{i}" for i in range(40)),
        "head",
    ]
    runs = group_layers([f"layers.{i}" for i in range(100)], 10)
    assert [g.label for g in runs] == [f"layers.{i} … {i + 9}" for i in range(0, 100, 10)]


def test_thin_keeps_short_timelines_and_every_peak() -> None:
    short = [("a", 1), ("b", 5)]
    assert thin(short, 2) == short
    long = [(str(i), (i * 7919) % 1000) for i in range(1001)]
    for limit in (1, 10, 400):
        kept = thin(long, limit)
        assert len(kept) <= limit
        assert max(n for _, n in kept) == max(n for _, n in long)


# Simulations of full colour vision, protanopia and deuteranopia on linear RGB (Machado, Oliveira
# and Fernandes 2009, severity 1).
VISIONS = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def cielab(colour: str, vision: Any) -> Any:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(vision @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ seen / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("shade", ["light", "dark"])
def test_common_formats_have_colours_that_can_be_told_apart(vision: str, shade: str) -> None:
    # A difference of 20 in CIELAB is plain to see between neighbouring areas (2.3 is just visible).
    colours = layout.families(["bf16", "fp16", "fp8", "int8", "int4", "nf4", "nf4_dq", None])
    assert len(colours) == 8
    seen = {n: cielab(getattr(c, shade), VISIONS[vision]) for n, c in colours.items()}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 20, (a, b)


def test_formats_of_users_get_colours_of_their_own() -> None:
    colours = layout.families(["mine", "yours", "int8", "int8_g32"])
    assert list(colours) == ["int8", "mine", "yours"]
    assert len({c.light for c in colours.values()}) == 3


# Figures


def test_plan_figure_shows_the_bytes() -> None:
    pytest.importorskip("matplotlib")
    from vramkit.report.plots import plan_figure

    plan = make_plan(12)
    figure = plan_figure(plan)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [e.name for e in plan.entries]
    grey, *colours = (c for c in axes.containers)
    assert [bar.get_width() for bar in grey] == [8000] * 12
    after = [sum(c[i].get_width() for c in colours) for i in range(12)]
    assert after == [e.bytes for e in plan.entries]
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert len(plan_figure(make_plan(800)).axes[0].get_yticks()) <= 48


def test_comparison_figure_shows_the_errors() -> None:
    pytest.importorskip("matplotlib")
    from vramkit.report.plots import comparison_figure

    layers = [LayerError("a", 0.25, 1.0), LayerError("b", math.inf, 0.0)]
    (axes,) = comparison_figure(make_comparison(make_plan(0), layers=layers)).axes
    assert [bar.get_width() for bar in axes.containers[0]] == [0.25, 0.25]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b (not finite)"]
    (axes,) = comparison_figure(make_comparison(make_plan(0), layers=[])).axes
    assert [bar.get_width() for bar in axes.containers[0]] == [0.0123]


def test_figures_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    from vramkit.report.plots import plan_figure

    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "vramkit\[demo\]"'):
        plan_figure(make_plan(2))


def test_reports_import_neither_matplotlib_nor_pyplot(run_python: Callable[..., Any]) -> None:
    run_python(
        "import sys, vramkit, vramkit.quality, vramkit.report.html, vramkit.report.plots\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    pytest.importorskip("matplotlib")
    run_python(
        "import sys, vramkit\n"
        "from vramkit.quality import Comparison\n"
        "Comparison(0.1, 1.0, 1.0, 20.0, 0.1, 1.0, 1.0).plot()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )


# All of it on a real model


def test_report_of_a_model_that_was_fitted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    layers = (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    reference, model = nn.Sequential(*layers).eval(), nn.Sequential(*layers).eval()
    batch = torch.randn(4, 64)
    recording = vramkit.record(reference, [batch], per_layer=True)
    plan = vramkit.plan(model, "40 kB", inputs=batch)
    conversion = plan.convert(model)
    comparison = vramkit.compare(recording, model, [batch], per_layer=True)
    path = html.write_report(
        tmp_path / "r.html",
        title="Fitted",
        estimate=plan.estimate,
        plan=plan,
        comparison=comparison,
        left_out=conversion.left_out,
    )
    text = Document(path.read_text(encoding="utf-8")).text
    assert f"{comparison.cosine:.5f}" in text
    assert vramkit.format_size(plan.weights_bytes) in text
    assert "biases stay plain" in text
    for shown in (plan, comparison, plan.estimate):
        assert shown.plot()._repr_png_().startswith(b"\x89PNG")
        assert "<table>" in shown._repr_html_()
