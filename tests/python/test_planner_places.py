"""plan with places, preferences, pins, turns; plan files, tables, recommendations."""

from __future__ import annotations

import functools
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vramkit import BudgetError, Plan, Rates
from vramkit.estimator import weight_bytes
from vramkit.recommendation import usable_bytes

FORMATS = ("bf16", "int8", "nf4")
# A second for 10 MB over the link, 1 MB from disk; int8 computes fastest, nf4 slowest.
RATES = Rates(
    {"plain32": (4e-9, 0), "bf16": (2e-9, 0), "int8": (1e-9, 0), "nf4": (8e-9, 0)}, 1e7, 1e6
)


def model() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 64), nn.Linear(64, 40)
    return nn.Sequential(*layers, nn.Linear(40, 32)).eval()


def plan(limit: int, **options: Any) -> Plan:
    options = {"formats": FORMATS, "rates": RATES, **options}
    return vramkit.plan(options.pop("model", None) or model(), f"{limit} B", **options)


def pipeline() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": model(), "decoder": model()})


@functools.cache
def _text() -> str:
    return json.dumps(plan(14_000, tiers=("device", "host")).to_dict())


def all_plans(made: Plan) -> Any:
    """Every choice of format and place: (bytes on device and host, loss, seconds)."""
    options = [
        [(e, o, tier) for o in e.options for tier in ("resident", "host", "disk")]
        for e in made.entries
    ]
    for combination in itertools.product(*options):
        slot = max((o.bytes for _, o, tier in combination if tier != "resident"), default=0)
        device = made.fixed_bytes + 2 * slot
        host = 2 * max((o.bytes for _, o, tier in combination if tier == "disk"), default=0)
        host = 2 * slot if host else 0  # staging slots are as large as the device's
        link = disk = compute = loss = 0.0
        for e, o, tier in combination:
            one = RATES.compute[o.format or "plain32"][0]
            compute += one * math.prod(e.shape)
            loss += o.error
            if tier == "resident":
                device += o.bytes
                continue
            link += o.bytes / 1e7
            host += o.bytes if tier == "host" else 0
            disk += o.bytes / 1e6 if tier == "disk" else 0
        yield device, host, loss, max(compute, link, disk)


@pytest.mark.parametrize("prefer", ["quality", "balanced", "speed"])
@pytest.mark.parametrize(("limit", "host"), [(6000, 40_000), (8000, 12_000), (12_000, 60_000)])
def test_no_plan_is_better(prefer: str, limit: int, host: int) -> None:
    made = plan(limit, tiers=("device", "host", "disk"), host_limit=f"{host} B", prefer=prefer)
    fitting = [p for p in all_plans(made) if p[0] <= limit and p[1] <= host]
    smallest = sum(min(e.options, key=lambda o: o.bytes).error for e in made.entries)
    plain = sum(math.prod(e.shape) for e in made.entries) * 4e-9
    share = {"quality": 0, "balanced": 1, "speed": 0.01}[prefer]
    if prefer == "quality":
        best = min((loss, seconds) for _, _, loss, seconds in fitting)
        assert made.loss == pytest.approx(best[0], rel=1e-9, abs=1e-15)
        assert made.seconds == pytest.approx(best[1], rel=1e-9)
    else:
        best_sum = min(share * p[2] / smallest + p[3] / plain for p in fitting)
        assert made.seconds is not None
        ours = share * made.loss / smallest + made.seconds / plain
        assert ours == pytest.approx(best_sum, rel=1e-9)
    assert made.optimal
    assert made.device_bytes <= limit
    assert made.host_bytes <= host
    if prefer == "quality":
        assert any(e.tier != "resident" for e in made.entries)


def test_streamed_plans_say_so() -> None:
    made = plan(8000, model=model(), tiers=("device", "host"))
    streamed = [e.name for e in made.entries if e.tier == "host"]
    assert made.streams
    assert not plan(1 << 19, model=model()).streams
    assert "streamed from the host" in str(made)
    assert "streamed through a slot" in made.explain(streamed[0])


def test_whole_pages_are_left_for_what_streams() -> None:
    target = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    options = {"model": target, "tiers": ("device", "disk"), "rules": {"*": [None]}}
    layer = 256 * 256 * 4
    pages = 5 * 4096  # two for each slot, and one
    full = plan(5 * layer + pages, **options)  # three residents and two slots
    assert full.device_bytes == 5 * layer
    assert plan(5 * layer + pages - 1, **options).device_bytes == 4 * layer


def test_pins_and_rules() -> None:
    made = plan(
        40_000,
        tiers=("device", "host"),
        pin={"0": ("nf4", "host"), "2": "device", "3": None},
        rules={"2": ["int8"]},
    )
    assert made.entry("0").place == ("nf4", "host")
    assert made.entry("2").place == ("int8", "resident")
    assert made.entry("3").format is None
    with pytest.raises(ValueError, match=r"no layer .* 'nothing'"):
        plan(40_000, pin={"nothing": "int8"})
    with pytest.raises(ValueError, match="'host', which tiers= lacks"):
        plan(40_000, pin={"0": "host"})
    with pytest.raises(ValueError, match="leaves no format"):
        plan(40_000, rules={"0": []})
    with pytest.raises(ValueError, match="tiers are some of"):
        plan(40_000, tiers=("gpu",))
    with pytest.raises(ValueError, match="rows is"):
        plan(40_000, rows=0)
    with pytest.raises(ValueError, match="prefer is"):
        plan(40_000, prefer="fast")
    with pytest.raises(ValueError, match="max_quality_loss"):
        plan(40_000, max_quality_loss=math.nan)


def test_a_bound_on_the_loss_says_the_smallest_limit() -> None:
    loose = plan(9000)
    bound = loose.loss / 3
    with pytest.raises(BudgetError, match="max_quality_loss") as caught:
        plan(9000, max_quality_loss=bound)
    needed = caught.value.needed_bytes
    made = plan(needed, max_quality_loss=bound)
    assert made.loss <= bound
    assert made.weights_bytes == needed
    with pytest.raises(BudgetError):
        plan(needed - 1, max_quality_loss=bound)
    with pytest.raises(BudgetError, match="no limit would do"):
        plan(9000, max_quality_loss=1e-9, rules={"0": ["nf4"]})


def test_the_smallest_limit_names_phase_and_layer() -> None:
    options = {"tiers": ("device", "host"), "vram_buffer": "100 B"}
    with pytest.raises(BudgetError, match=r"2 slots of .* \(layer '0'\)") as caught:
        plan(500, **options)
    needed = caught.value.needed_bytes
    assert plan(needed, **options).device_bytes == needed - 100
    with pytest.raises(BudgetError):
        plan(needed - 1, **options)
    with pytest.raises(BudgetError, match="decoder needs"):
        plan(
            2000,
            model=pipeline(),
            turns=["encoder", "decoder"],
            activations={"decoder": "1500 B"},
        )
    with pytest.raises(BudgetError, match="host's 100 B cannot hold"):
        plan(9000, tiers=("host",), host_limit="100 B")


def test_turns_share_one_limit() -> None:
    alone = weight_bytes(model())
    made = plan(alone, model=pipeline(), turns={"encoder": 3, "decoder": 1})
    assert {e.format for e in made.entries} == {None}  # each fits alone, unchanged
    assert [p.device_bytes for p in made.phases] == [alone, alone]
    assert made.host_bytes == 2 * alone
    compute = sum(math.prod(e.shape) for e in made.entries) / 2 * 4e-9
    load = sum(e.bytes for e in made.entries) / 2 / 1e7
    assert made.phases[0].seconds == pytest.approx(3 * compute + load)
    assert made.phases[1].seconds == pytest.approx(compute + load)
    assert made.streams
    tight = plan(alone, model=pipeline(), turns=["encoder", "decoder"], host_limit=f"{alone} B")
    assert tight.host_bytes <= alone
    assert {e.backing for e in tight.entries} == {"host"}
    with pytest.raises(ValueError, match="in none of"):
        plan(alone, model=pipeline(), turns=["encoder"])
    with pytest.raises(ValueError, match="no submodule"):
        plan(alone, model=pipeline(), turns=["vae"])
    with pytest.raises(ValueError, match="passes"):
        plan(alone, model=pipeline(), turns={"encoder": 0, "decoder": 1})


class TestFiles:
    def saved(self, path: Path, **options: Any) -> tuple[Plan, dict[str, Any]]:
        made = plan(14_000, tiers=("device", "host"), **options)
        made.save(path)
        return made, json.loads(path.read_text())

    def test_round_trip(self, tmp_path: Path) -> None:
        made, data = self.saved(tmp_path / "p.json")
        assert data["schema"] == "vramkit.plan/2"
        assert data["version"] == vramkit.__version__
        loaded = Plan.load(tmp_path / "p.json")
        assert loaded.to_dict() == made.to_dict()
        assert loaded.edited == []
        assert str(made.diff(loaded)) == "the plans agree"

    def test_edits_are_followed_up(self, tmp_path: Path) -> None:
        made, data = self.saved(tmp_path / "p.json")
        data["limit_bytes"] = 10**6
        for entry in data["entries"]:
            entry["tier"] = "device"
        data["entries"][0]["format"] = "nf4"
        (tmp_path / "p.json").write_text(json.dumps(data))
        edited = Plan.load(tmp_path / "p.json")
        assert edited.edited == ["0"]
        assert not edited.optimal
        nf4 = next(o for o in edited.entries[0].options if o.format == "nf4")
        assert (edited.entries[0].bytes, edited.entries[0].error) == (nf4.bytes, nf4.error)
        assert edited.device_bytes == edited.weights_bytes
        changes = made.diff(edited)
        assert changes.changes[0][2] == ("nf4", "resident")
        assert changes.bytes == edited.weights_bytes - made.weights_bytes
        assert "-> nf4" in str(changes)
        target = model()
        assert weight_bytes(edited.apply(target)) == edited.weights_bytes

    def test_edits_past_the_limit_are_refused(self, tmp_path: Path) -> None:
        _, data = self.saved(tmp_path / "p.json")
        for entry in data["entries"]:
            entry["format"], entry["tier"] = None, "resident"
        (tmp_path / "p.json").write_text(json.dumps(data))
        with pytest.raises(BudgetError, match="edited by hand") as caught:
            Plan.load(tmp_path / "p.json")
        assert caught.value.needed_bytes == weight_bytes(model())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d["entries"][0].update(tier="moon"), "tier 'moon'"),
            (lambda d: d["entries"][0].update(format="fp8"), "cannot be 'fp8'"),
            (lambda d: d["entries"][0].update(bytes=-1), "bytes is -1"),
            (lambda d: d["entries"][0].update(error=math.nan), "NaN is no figure"),
            (lambda d: d["entries"][0].update(error=-1.0), "error of '0' is -1"),
            (lambda d: d.update(slots=0), "slots is 0"),
            (lambda d: d["entries"].append(d["entries"][0]), "there twice"),
            (lambda d: d.pop("limit_bytes"), "'limit_bytes' is missing"),
            (lambda d: d.update(limit_bytes="much"), "limit_bytes is 'much'"),
            (lambda d: d.update(entries=3), "entries is not a list"),
            (lambda d: d.update(prefer="haste"), "prefer is 'haste'"),
            (lambda d: d.update(tiers=["cloud"]), "tiers are"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, change: Any, message: str) -> None:
        _, data = self.saved(tmp_path / "p.json")
        change(data)
        (tmp_path / "p.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            Plan.load(tmp_path / "p.json")

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_corrupted_files_are_errors_that_say_so(self, data: st.DataObject) -> None:
        """Cut anywhere, or with any value in place of another: a plan, or a ValueError."""
        text = _text()
        if data.draw(st.booleans()):
            start = data.draw(st.integers(0, len(text)))
            text = text[:start] + text[data.draw(st.integers(start, len(text))) :]
        else:
            content: Any = json.loads(text)
            at, key = content, data.draw(st.sampled_from(sorted(content)))
            while isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans()):
                at = at[key]
                keys = range(len(at)) if isinstance(at, list) else sorted(at)
                key = data.draw(st.sampled_from(list(keys)))
            at[key] = data.draw(
                st.none() | st.integers() | st.text(max_size=3) | st.just([]) | st.just({"a": [1]})
            )
            text = json.dumps(content)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "p.json")
            path.write_text(text)
            said = str(path)
            try:
                Plan.load(path)
            except ValueError as error:
                said = str(error)
            assert str(path) in said

    def test_the_first_version_is_read(self, tmp_path: Path) -> None:
        made, data = self.saved(tmp_path / "p.json")
        new = {"version", "phases", "rates", "prefer", "tiers", "slots", "rows", "host_limit_bytes"}
        new |= {"host_bytes", "max_quality_loss", "loss", "seconds", "device_bytes"}
        old = {k: v for k, v in data.items() if k not in new} | {"schema": "vramkit.plan/1"}
        for entry in old["entries"]:
            for key in ("options", "shape", "component", "backing"):
                del entry[key]
            entry["tier"] = "resident"
        (tmp_path / "p.json").write_text(json.dumps(old))
        loaded = Plan.load(tmp_path / "p.json")
        assert [e.format for e in loaded.entries] == [e.format for e in made.entries]
        assert weight_bytes(loaded.apply(model())) == loaded.weights_bytes
        with pytest.raises(ValueError, match="older version"):
            loaded.table()


def test_another_model_is_refused_by_name() -> None:
    made = plan(100_000)
    other = model()
    other[2] = nn.Linear(48, 65)
    other.append(nn.Linear(7, 7))
    with pytest.raises(ValueError, match=r"'2' is \[64, 48\] in the plan, \[65, 48\] in the model"):
        made.apply(other)
    with pytest.raises(ValueError, match="model has '5', the plan does not"):
        made.apply(other)
    with pytest.raises(ValueError, match="other layers or shapes"):
        made.diff(plan(100_000, model=other))


def test_explain_names_the_choices_beside() -> None:
    made = plan(int(weight_bytes(model()) * 0.4))
    entry = made.entry("0")
    text = made.explain("0")
    better = [o for o in entry.options if o.error < entry.error]
    cheaper = [o for o in entry.options if o.bytes < entry.bytes]
    assert ("next better" in text) == bool(better)
    assert ("next cheaper" in text) == bool(cheaper)
    assert better or cheaper
    if better:
        assert f"{min(o.bytes for o in better) - entry.bytes:+d} B" in text


def test_the_table_holds_what_happens() -> None:
    target = model()
    made = plan(int(weight_bytes(target) * 0.4), model=target)
    table = made.table()
    rows = {row.mode: row for row in table.rows}
    assert set(rows) == {"as it is", *FORMATS}
    for name in FORMATS:
        uniform = model()
        vramkit.convert(uniform, name)
        assert rows[name].weights_bytes == rows[name].limit_bytes == weight_bytes(uniform)
        assert rows[name].fits == (weight_bytes(uniform) <= made.limit_bytes)
        limit = rows[name].mixed_limit_bytes
        assert limit is not None
        assert limit <= rows[name].limit_bytes
        mixed = plan(limit)
        assert mixed.loss <= rows[name].loss * (1 + 1e-9)
        with pytest.raises(BudgetError):
            plan(limit - 1, max_quality_loss=rows[name].loss)
    elements = sum(math.prod(e.shape) for e in made.entries)
    assert rows["nf4"].seconds == pytest.approx(8e-9 * elements)
    assert table.chosen.loss == made.loss
    assert all(name in str(table) and f">{name}<" in table._repr_html_() for name in rows)
    assert json.loads(json.dumps(table.to_dict()))["limit_bytes"] == made.limit_bytes
    turns = plan(10_000, model=pipeline(), turns=["encoder", "decoder"], rates=RATES).table()
    halves = {row.mode: row for row in turns.rows}
    assert halves["int8"].limit_bytes == rows["int8"].limit_bytes
    assert halves["int8"].mixed_limit_bytes <= rows["int8"].limit_bytes


@pytest.mark.parametrize("tiers", [("device", "host"), ("device", "host", "disk"), ("disk",)])
def test_the_table_streams_what_does_not_fit(tiers: tuple[str, ...]) -> None:
    options = {"tiers": tiers, "prefer": "speed", "host_limit": 40_000}
    limit = int(weight_bytes(model()) * 0.3)
    rows = {row.mode: row for row in plan(limit, **options).table().rows}
    streamed = [mode.removesuffix(", streamed") for mode in rows if mode.endswith(", streamed")]
    assert {"as it is", "bf16"} <= set(streamed)
    assert set(streamed) == {n for n in ("as it is", *FORMATS) if not rows[n].fits}
    for name in streamed:
        row = rows[f"{name}, streamed"]
        assert row.limit_bytes < rows[name].limit_bytes
        rules = {"*": [None if name == "as it is" else name]}
        alone = {**options, "rules": rules}
        if row.fits:
            made = plan(limit, **alone)
            assert made.seconds == pytest.approx(row.seconds, rel=1e-9)
            assert (made.weights_bytes, made.loss) == (row.weights_bytes, pytest.approx(row.loss))
        else:
            assert row.seconds is None
            with pytest.raises(BudgetError):
                plan(limit, **alone)
        if "disk" in tiers:
            plan(row.limit_bytes, **alone)
        with pytest.raises(BudgetError):
            plan(row.limit_bytes - 1, **alone)


def test_rates() -> None:
    found = vramkit.measure_rates(("int8",), disk=False)
    assert found is vramkit.measure_rates(("int8",), disk=False)  # once in a process
    assert found.link_bytes_per_second > 1e7
    assert found.measuring_seconds < 10
    assert found.seconds("int8", 1 << 22, 1) > 0
    assert found.seconds("int8", 1 << 22, 9) >= found.seconds("int8", 1 << 22, 1)
    assert Rates.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.with_(link_bytes_per_second=5.0).link_bytes_per_second == 5.0
    with pytest.raises(ValueError, match="no rate for 'nf4'"):
        found.seconds("nf4", 1, 1)
    with pytest.raises(ValueError, match="rates are finite"):
        Rates(link_bytes_per_second=math.nan)
    with pytest.raises(ValueError, match="needs rates with disk"):
        plan(9000, tiers=("disk",), rates=RATES.with_(disk_bytes_per_second=0.0))


def test_recommend() -> None:
    assert usable_bytes(12) == usable_bytes(11.7) < 12 << 30
    by_card = {gb: {r.system: r for r in vramkit.recommend(gb)} for gb in (6, 8, 12, 16, 24, 80)}
    for found in by_card.values():
        for r in found.values():
            assert r.device_bytes <= r.usable_bytes
            assert all(needed > r.usable_bytes for _, needed in r.refused)
    # 20.4 B parameters: 8 bit does not fit 16 GB whatever is streamed in turns; 4 bit does.
    modes = {gb: (by_card[gb]["Qwen-Image"].precision, by_card[gb]["Qwen-Image"].mode)
             for gb in by_card}  # fmt: skip
    assert modes[80] == ("bf16", "together")
    assert modes[24] == ("fp8", "turns")
    assert modes[16] == ("nf4_dq", "together")
    assert modes[12] == ("nf4_dq", "turns")
    assert modes[8][1] == modes[6][1] == "streamed"
    assert by_card[8]["HeartMuLa"].mode == "turns"
    assert by_card[6]["HeartMuLa"].mode == "codec on the CPU"  # which stays in float32
    with pytest.raises(ValueError, match="known are"):
        vramkit.recommend(12, "unknown")
    with pytest.raises(BudgetError):
        vramkit.recommend(1.0, "Qwen-Image")
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="vram_gb"):
            vramkit.recommend(bad)
