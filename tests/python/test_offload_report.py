"""What an offloaded model says of itself agrees with what its engine did."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vramkit import _core, enable_vram_management
from vramkit.offload.report import OffloadReport, copied_in_a_pass
from vramkit.rates import Rates


class Model(nn.Module):
    """Layers that move, a parameter that stays, and one that no call uses."""

    def __init__(self, width: int = 96, layers: int = 9) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.scale = nn.Parameter(torch.ones(width))
        self.unused = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * self.scale


def offloaded(folder: Path, share: float = 0.5, **more: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 96)
    total = sum(p.nbytes for p in model.parameters())
    enable_vram_management(
        model, f"{int(total * share)} B", "1 KB", inputs=(x,), folder=folder, **more
    )
    return model, x


def settled(session: Any) -> OffloadReport:
    """The report once nothing is on its way any more."""
    moving = (_core.BlockStatus.requested, _core.BlockStatus.copying)
    engine = session.engine
    while any(engine.block_stats(i).state in moving for i in range(len(engine))):
        time.sleep(0.01)
    report: OffloadReport = session.stats()
    return report


@pytest.mark.parametrize("share", [0.3, 0.6, 2.0])
def test_figures_are_the_engine_s(share: float, tmp_path: Path) -> None:
    model, x = offloaded(tmp_path, share)
    session = model.vramkit_session
    with torch.no_grad():
        for _ in range(3):
            model(x)
        before = settled(session)
        for _ in range(4):
            model(x)
    report = settled(session)
    raw = session.engine.stats()
    assert isinstance(report, OffloadReport)
    for name in ("limit", "committed", "residents", "slots", "acquires", "hits", "waits", "wait_ns",
                 "bytes_copied", "bytes_by_path", "copy_ns", "active_ns", "commits"):  # fmt: skip
        assert getattr(report, name) == getattr(raw, name), name
    assert report.bytes_copied - before.bytes_copied == 4 * report.pass_bytes
    assert report.vram_limit == report.limit + report.buffer_bytes + report.fixed_bytes
    assert report.buffer_bytes == 1000
    assert report.fixed_bytes == model.scale.nbytes + model.unused.weight.nbytes
    assert report.committed <= report.limit
    assert report.acquires == report.hits + report.waits
    assert sum(block.acquires for block in report.blocks) == report.acquires
    assert sum(block.hits for block in report.blocks) == report.hits
    assert sum(block.loads for block in report.blocks) == report.loads
    waited = sum(block.wait_seconds for block in report.blocks)
    assert waited == pytest.approx(report.wait_ns / 1e9, abs=1e-9 * len(report.blocks))
    assert sum(block.resident for block in report.blocks) == report.residents
    assert {(name, nbytes) for name, _, nbytes in report.stays} == {
        ("scale", 96 * 4), ("unused.weight", 64)
    }  # fmt: skip
    if share == 2.0:
        assert report.pass_bytes == 0


def test_rates_are_measured_only_when_asked(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path, 0.3)
    session = model.vramkit_session
    model(x)
    report = settled(session)
    assert report.link_rate is report.disk_rate is report.of_measured is None
    assert "unknown (stats(measure=True) measures them)" in str(report)
    given = session.stats(rates=Rates(link_bytes_per_second=4e9, disk_bytes_per_second=1e9))
    paths = given.bytes_by_path
    cached, disk = paths["memory"] + paths["cached"], paths["direct"] + paths["plain"]
    expected = (cached / 4e9 + disk / 1e9) / (given.active_ns / 1e9)
    assert given.of_measured == pytest.approx(expected)
    assert session.stats().link_rate == 4e9  # kept
    assert "4.00 GB/s" in str(given)
    measured = session.stats(measure=True)
    assert measured.link_rate is not None
    assert measured.link_rate > 1e6


def test_the_report_as_data_text_and_html(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path)
    model(x)
    report = settled(model.vramkit_session)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["vram_limit_bytes"] == report.vram_limit
    assert data["wait_seconds"] == report.wait_ns / 1e9
    assert [b["loads"] for b in data["blocks"]] == [b.loads for b in report.blocks]
    assert {s["reason"] for s in data["stays"]} == {r for _, r, _ in report.stays}
    text, page = str(report), report._repr_html_()
    for part in ("limit", "resident", "one pass copies", "not used by this call"):
        assert part in text
        assert part in page
    for block in report.blocks:
        assert block.name.split(", ")[0] in page


def test_the_copies_of_a_pass() -> None:
    sizes = [1, 10, 100, 1000]
    assert copied_in_a_pass([0, 1, 2, 3], sizes, [0, 1, 0, 1]) == 1111
    assert copied_in_a_pass([0, 1, 2, 3], sizes, [None, None, None, None]) == 0
    assert copied_in_a_pass([0, 1, 2], sizes, [0, 1, 2, None]) == 0  # a slot each
    assert copied_in_a_pass([0, 1, 0, 2], sizes, [0, 1, 1, None]) == 110
    assert copied_in_a_pass([0, 1, 0, 1], sizes, [0, 0, None, None]) == 22


def test_the_timeline(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path, 0.3)
    session = model.vramkit_session
    for ask in (session.timeline, session.picture, lambda: session.chrome_trace("nowhere")):
        with pytest.raises(ValueError, match="call record"):
            ask()
    with torch.no_grad():
        model(x)
        assert session.engine.timeline() == []  # nothing is kept unasked
        settled(session)
        session.record()
        before = session.engine.stats()
        for _ in range(3):
            model(x)
        settled(session)
    after = session.engine.stats()
    moments = session.timeline()
    kinds = {kind: [m for m in moments if m.kind == kind] for kind in ("copy", "use", "wait")}
    assert len(kinds["use"]) == after.acquires - before.acquires
    assert len(kinds["wait"]) == after.waits - before.waits
    waited = sum(m.end_ns - m.begin_ns for m in kinds["wait"])
    # Records take the time once more than counts do.
    assert waited == pytest.approx(after.wait_ns - before.wait_ns, rel=0.01, abs=1e5)
    took = sum(m.end_ns - m.begin_ns for m in kinds["copy"])
    assert took == pytest.approx(after.copy_ns - before.copy_ns, rel=0.01, abs=1e5)
    assert {m.thread for m in kinds["copy"]} <= {0, 1}
    passes = len(session.division.order)
    latest = session.latest(1)
    assert len([m for m in latest if m.kind == "use"]) == passes
    assert latest == [m for m in moments if m in latest]
    with torch.no_grad():  # new engine, still recorded
        model.layers[0].weight.mul_(1)
        model(x)
    assert any(m.kind == "use" for m in session.timeline())
    session.record(0)
    model(x)
    assert session.engine.timeline() == []


def test_a_trace_for_chrome(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path, 0.3)
    session = model.vramkit_session
    session.record()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    settled(session)
    moments = session.timeline()
    path = session.chrome_trace(tmp_path / "trace.json")
    data = json.loads(path.read_text())
    events = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(moments)
    for event, moment in zip(events, moments, strict=True):
        assert event["ts"] == moment.begin_ns / 1e3
        assert event["dur"] == (moment.end_ns - moment.begin_ns) / 1e3
        assert event["tid"] == moment.thread + 1
        assert event["args"]["block"] == moment.block
        assert event["cat"] == moment.kind
        assert isinstance(event["pid"], int)
    named = {e["tid"] for e in data["traceEvents"] if e["name"] == "thread_name"}
    assert {e["tid"] for e in events} <= named
    # Viewers nest what lies within another on one thread, and refuse what overlaps by half.
    for thread in named:
        ends = 0.0
        for event in sorted((e for e in events if e["tid"] == thread), key=lambda e: e["ts"]):
            assert event["ts"] >= ends - 1e-3
            ends = event["ts"] + event["dur"]
    assert data["otherData"]["bytes_copied"] == session.stats().bytes_copied


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, x = offloaded(tmp_path, 0.3)
    session = model.vramkit_session
    session.record()
    assert "nothing recorded yet" in session.picture().axes[0].get_title(loc="left")
    with torch.no_grad():
        for _ in range(3):
            model(x)
    settled(session)
    figure = session.picture(passes=2)
    top, below = figure.axes
    latest = session.latest(2)
    # A bar for each moment in either half, of its length.
    for axes in (top, below):
        bars = [p for c in axes.collections for p in c.get_paths()]
        assert len(bars) == len(latest)
        length = sum(p.get_extents().width for p in bars)
        assert length == pytest.approx(sum(m.end_ns - m.begin_ns for m in latest) / 1e6, rel=1e-6)
    labels = [label.get_text() for label in below.get_yticklabels()]
    assert len(labels) == len(session.division.blocks)
    assert sum("(resident)" in label for label in labels) == session.stats().residents
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="1 or more"):
        session.picture(passes=0)


def test_progress_of_writing(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    model, _ = offloaded(tmp_path, progress=lambda *step: told.append(step))
    done = [step[0] for step in told]
    assert done == sorted(done)
    assert done[-1] == told[0][1] >= sum(b.nbytes for b in model.vramkit_session.division.blocks)
    assert [step[2] for step in told] == [
        b.entries[0] for b in model.vramkit_session.division.blocks
    ]


WATCH = """
import sys, time, threading, torch, vramkit
from IPython.core.interactiveshell import InteractiveShell
from torch import nn
shell = InteractiveShell.instance()
shown, values = [], []
shell.display_pub.publish = lambda data, metadata=None, **more: shown.append((data, more))
torch.manual_seed(0)
model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(9)]), torch.randn(2, 64)

def until(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end, "nothing was shown"
        time.sleep(0.005)

def check(pages):
    vramkit.enable_vram_management(model, "60 KB", 0, inputs=(x,), folder=sys.argv[1])
    session = model.vramkit_session
    watch = session.watch(interval=0.01)
    until(pages)
    for _ in range(3):
        count = len(pages())
        model(x)
        until(lambda: len(pages()) > count)
    time.sleep(0.3)  # the last copies are over
    count = len(pages())
    time.sleep(0.2)  # twenty looks: nothing has changed, nothing is sent
    assert len(pages()) == count
    assert f"{session.stats().acquires}: " in pages()[-1], pages()[-1]
    watch.stop(), watch.stop()
    assert not watch.running
    count = len(pages())
    model(x)
    time.sleep(0.05)
    assert len(pages()) == count
    with session.watch(0.01) as second:
        until(lambda: len(pages()) > count)
    assert not second.running
    third = session.watch(0.01)
    session.disable()
    until(lambda: not third.running)
    assert not any(t.name == "vramkit-watch" for t in threading.enumerate())

sys.modules["ipywidgets"] = None  # as if it were not installed
check(lambda: [d["text/html"] for d, _ in shown if "offloading" in d.get("text/html", "")])
ids = [more.get("transient", {}).get("display_id") for _, more in shown]
assert None not in ids and len(set(ids)) == 3, ids
assert sum(not more.get("update") for _, more in shown) == 3
print("displayed")

del sys.modules["ipywidgets"]
try:
    import ipywidgets
except ImportError:
    sys.exit()
class Recorded(ipywidgets.HTML):
    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "value":
            values.append(self.value)
ipywidgets.HTML = Recorded
check(lambda: [value for value in values if "offloading" in value])
print("as a widget")
"""


def test_the_live_view(tmp_path: Path) -> None:
    pytest.importorskip("IPython")
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "displayed\n" in done.stdout
    if importlib.util.find_spec("ipywidgets") is not None:
        assert "as a widget\n" in done.stdout


def test_the_live_view_needs_someone_who_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = offloaded(tmp_path)
    session = model.vramkit_session
    with pytest.raises(ValueError, match="not every 0"):
        session.watch(0)
    monkeypatch.setitem(sys.modules, "IPython.core.getipython", None)
    with pytest.raises(ImportError, match="pip install ipython"):
        session.watch()
    monkeypatch.undo()
    if "IPython" not in sys.modules:
        pytest.importorskip("IPython")
    with pytest.raises(RuntimeError, match="print"):
        session.watch()
    assert not any(t.name == "vramkit-watch" for t in threading.enumerate())


def test_stats_while_the_model_runs(tmp_path: Path) -> None:
    model, x = offloaded(tmp_path, 0.3)
    session = model.vramkit_session
    session.record()
    failed: list[BaseException] = []
    stop = threading.Event()

    def ask(what: Callable[[], Any]) -> None:
        try:
            while not stop.is_set():
                what()
        except BaseException as error:
            failed.append(error)

    asking = [threading.Thread(target=ask, args=(f,)) for f in (session.stats, session.timeline)]
    for thread in asking:
        thread.start()
    with torch.no_grad():
        for _ in range(30):
            model(x)
    stop.set()
    for thread in asking:
        thread.join()
    assert not failed
    with pytest.raises(TypeError):
        session.stats(True)  # type: ignore[misc]


def test_streamed_neighbours_have_different_slots(tmp_path: Path) -> None:
    """Where every other block is resident, those between would have one slot if all had turns."""
    source = tmp_path / "blocks"
    source.write_bytes(bytes(12 * 4096))
    blocks = [
        _core.BlockSpec(str(i), 4096, [_core.Extent(0, i * 4096, 0, 4096)]) for i in range(12)
    ]
    engine = _core.Engine(
        [_core.FileSource(str(source))], blocks, limit=8 * 4096, granularity=4096, slots=2
    )
    streamed = [i for i in range(12) if not engine.block_stats(i).resident]
    assert len(streamed) == 6
    slots = [engine.slot_of(i) for i in streamed]
    assert all(a != b for a, b in zip(slots, [*slots[1:], slots[0]], strict=True))
    for _ in range(3):
        for i in range(12):
            engine.acquire(i)
            engine.release(i)
    engine.check()
    assert engine.block_stats(0).bytes == 4096
    with pytest.raises(ValueError, match="0 records or more"):
        engine.keep_timeline(-1)
