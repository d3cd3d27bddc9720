"""What estimates say: intervals, lines for device and host, phases, pictures, and refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vramkit
from numerics import PROBED_PEAK
from torch import Tensor, nn
from vramkit import intervals
from vramkit.accounts import CONTEXT_BYTES
from vramkit.intervals import GENERATION, LEAST, interval_of, kind_of, widened
from vramkit.measure import profiled_peak
from vramkit.tracing import RELEASE, Tag, Trace

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "estimate.json"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.BatchNorm1d(64)).eval()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(32, 48, batch_first=True), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0])
        return out


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 8, 3)).eval()


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


def measured(model: nn.Module, x: Tensor) -> int:
    with torch.inference_mode():
        model(x)
        return profiled_peak(model, (x,), {})


# Intervals


def test_the_bounds_are_the_measured_ones() -> None:
    """The constants against the results of the benchmark: no case outside, 0.1 % at most wider."""
    results = json.loads(RESULTS.read_text())["results"]
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for case in results["cases"]:
        ratio = case["probed_bytes"] / case["measured_bytes"]
        ratios[case["kind"] == "generation"].append(ratio)
        low, high = case["ruled_interval_bytes"]
        assert low <= case["measured_bytes"] <= high, case["name"]
    assert len(ratios[False]) == 54
    assert set(ratios[False]) == {1.0}
    assert min(ratios[True]) >= 1.0
    assert math.ceil(1000 * max(ratios[True])) / 1000 == GENERATION
    least = {kind: found["least"] for kind, found in results["rules"].items()}
    assert set(least) == set(LEAST)
    for kind in ("convolution", "recurrent", "resizing"):
        assert math.floor(1000 * least[kind]) / 1000 == LEAST[kind]
    assert min(least["other"], least["half"]) == 1.0


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize(
    ("build", "shape"),
    [(mlp, (8, 64)), (Recurrent, (2, 20, 32)), (convolution, (1, 3, 24, 24))],
)
def test_what_is_measured_lies_within(build: Any, shape: tuple[int, ...], probe: bool) -> None:
    model = build().eval()
    x = torch.randn(shape)
    found = vramkit.estimate(model, None, x, probe=probe)
    real = measured(model, x)
    assert found.activations_interval_bytes is not None
    low, high = found.activations_interval_bytes
    assert low <= real <= high
    assert low <= found.activations_bytes <= high
    assert (low == high) == probe
    assert ("not probed" in found.interval_from) != probe
    assert found.interval_bytes == (found.weights_bytes + low, found.weights_bytes + high)
    assert ("interval exact" in str(found)) == probe


def test_generation_is_not_called_exact() -> None:
    found = vramkit.estimate(llama(), None, {"input_ids": (1, 16)}, generate=8)
    assert found.activations_interval_bytes is not None
    low, high = found.activations_interval_bytes
    assert low < found.activations_bytes == high
    assert "generation loop" in found.interval_from


def test_no_interval_where_nothing_is_known() -> None:
    assert vramkit.estimate(mlp()).interval_bytes is None
    found = vramkit.estimate(mlp(), None, (8, 64), target="cuda:8.9")
    assert found.interval_bytes is None
    assert "interval none: nothing was measured on CUDA" in str(found)
    assert found.to_dict()["interval_bytes"] is None


@torch.library.custom_op("vramkit_report_tests::shaped", mutates_args=())
def shaped(x: Tensor) -> Tensor:
    return x + torch.ones(1000).sum()


@shaped.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Shaped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = shaped(x)
        return out


def test_no_interval_for_operators_of_others() -> None:
    """They say what they return, and nobody knows what they hold."""
    found = vramkit.estimate(Shaped(), None, (3,))
    assert found.activations_bytes == 12
    assert found.interval_bytes is None
    assert "vramkit_report_tests.shaped" in found.interval_from


class Masked(nn.Module):
    """Drops a mask that hides nothing, as transformers' models do."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        if not is_fake(attention_mask):
            return x * 2
        return x * 2 + attention_mask[..., None].to(x.dtype).expand(*x.shape).contiguous()


def is_fake(mask: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(mask, FakeTensor)


def test_masks_whose_values_are_not_given_widen_it() -> None:
    model, x = Masked(), torch.randn(2, 8, 64)
    found = vramkit.estimate(model, None, {"x": (2, 8, 64), "attention_mask": (2, 8)})
    given = {"x": x, "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    least = vramkit.estimate(model, None, given)
    assert least.activations_interval_bytes == (least.activations_bytes, least.activations_bytes)
    assert found.activations_interval_bytes == (least.activations_bytes, found.activations_bytes)
    assert found.activations_bytes > 2 * least.activations_bytes
    assert "attention_mask of ones" in found.interval_from
    with torch.inference_mode():
        model(**given)
        assert profiled_peak(model, (), given) == least.activations_bytes


def test_fused_layers_in_half_precision_have_no_interval_by_rule() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    assert vramkit.estimate(layer, None, (2, 8, 64), probe=False).interval_bytes is not None
    layer.to(torch.bfloat16)
    found = vramkit.estimate(layer, None, (2, 8, 64), probe=False)
    assert found.interval_bytes is None
    assert "_transformer_encoder_layer_fwd" in found.interval_from
    assert vramkit.estimate(layer, None, (2, 8, 64)).interval_bytes is not None


def test_ends_of_the_interval() -> None:
    assert interval_of(1000, intervals.Unprobed(), "cpu", False)[0] == (1000, 1000)
    both = intervals.Unprobed(frozenset({"other", "convolution"}), (), 900, 5000)
    assert interval_of(1000, both, "cpu", False)[0] == (900, 5000)
    assert interval_of(1000, both, "cpu", True)[0] == (int(900 / GENERATION), 5000)
    assert interval_of(1000, both, "cuda", False)[0] is None
    assert kind_of("vramkit::conv2d") == "convolution"
    assert kind_of("aten::mkldnn_rnn_layer") == "recurrent"
    sizes = widened((100, 300, -300, 50, -50), "convolution")
    assert sizes == (
        100,
        300,
        math.ceil(400 * (1 / LEAST["convolution"] - 1)),
        -sizes[2],
        *sizes[4:],
    )
    assert sum(sizes) == 100


# Lines


@pytest.mark.parametrize("precision", [None, "nf4", "int8"])
def test_lines_sum_to_the_peak(precision: str | None) -> None:
    model = mlp()
    found = vramkit.estimate(model, precision, (8, 64))
    lines = {line.name: line for line in found.account.lines}
    assert found.account.device_bytes == 0
    assert found.account.host_bytes == found.peak_bytes + found.inputs_bytes
    assert lines["inputs"].host_bytes == 8 * 64 * 4
    assert lines["buffers"].host_bytes == 64 * 4 * 2 + 8
    if precision is not None:
        codes = (vramkit.get_format(precision).bytes(shape).total for shape in ((96, 64), (64, 96)))
        biases = 4 * (96 + 64)  # of the same layers
        assert lines[f"weights, {precision}"].host_bytes == sum(codes) + biases
    phases = {line.name: line for line in found.account.phases}
    assert phases["load"].host_bytes == found.load_peak_bytes
    assert phases["run"].host_bytes == found.account.host_bytes
    for name in (*lines, "together", "peak, load", "peak, run"):
        assert re.search(rf"^{re.escape(name)} ", str(found), re.MULTILINE), name


def test_workspaces_are_what_operators_hold_inside() -> None:
    """Against the profiler: what its events have beyond the storages that operators return."""
    model, x = Recurrent().eval(), torch.randn(2, 20, 32)
    found = vramkit.estimate(model, None, x)
    lines = {line.name: line.host_bytes for line in found.account.lines}
    assert found.trace is not None
    assert lines["activations"] + lines["workspaces"] == found.activations_bytes
    assert found.activations_bytes == pytest.approx(measured(model, x), rel=PROBED_PEAK)
    # At the peak the LSTM returns its outputs and states, and the head nothing yet.
    returned = 4 * (2 * 20 * 48 + 4 * 48)
    assert lines["workspaces"] == pytest.approx(found.activations_bytes - returned, rel=0.2)
    assert lines["workspaces"] > 4 * (4 * 48) * (32 + 48)  # the packed weights


def test_the_cache_is_a_line_of_its_own() -> None:
    model = llama()
    found = vramkit.estimate(model, None, {"input_ids": (2, 16)}, generate=200)
    lines = {line.name: line for line in found.account.lines}
    per_token = 2 * 3 * 2 * 16 * 4 * 2  # keys and values, layers, heads, width, bytes, batch
    whole = per_token * (16 + 199)
    assert found.generation is not None
    assert found.generation.cache_bytes == whole
    # In the last step one layer's keys or values are there twice, while they are copied to grow.
    part = whole // 6
    assert lines["KV cache"].host_bytes in range(whole - per_token, whole + part + 1)
    assert vramkit.format_size(whole) in lines["KV cache"].note
    names = [line.name for line in found.account.phases]
    assert names == ["load", "prefill", "decode 1", "decode 199"]
    highest = max(line.host_bytes for line in found.account.phases[1:])
    assert highest == found.account.host_bytes == found.account.phases[-1].host_bytes


def test_a_cuda_target_has_both_sides() -> None:
    model = mlp()
    found = vramkit.estimate(model, "int8", (8, 64), target="cuda:8.9")
    account = found.account
    lines = {line.name: line for line in account.lines}
    assert lines["CUDA context"].device_bytes == CONTEXT_BYTES
    assert "not measured" in lines["CUDA context"].note
    blas = 4096 * 1024 * 2 + 16 * 1024 * 8
    assert account.device_bytes == found.reserved_bytes + blas + CONTEXT_BYTES
    assert account.host_bytes == 0
    load = account.phases[0]
    assert load.name == "load"
    assert load.host_bytes == found.load_peak_bytes > load.device_bytes == found.weights_bytes
    given = vramkit.estimate(model, "int8", (8, 64), target="cuda:8.9", context="100 MB")
    lines = {line.name: line for line in given.account.lines}
    assert lines["CUDA context"].device_bytes == 100_000_000
    assert lines["CUDA context"].note == "as given"
    with pytest.raises(ValueError, match="negative"):
        vramkit.estimate(model, context=-1)


@pytest.mark.parametrize("turns", [(), ("a", "b")])
def test_plans_that_stream_place_their_bytes(turns: tuple[str, ...]) -> None:
    """Against the planner's own sums."""
    model = nn.ModuleDict({
        name: nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))) for name in "ab"
    })  # fmt: skip
    rates = vramkit.Rates({"plain32": (1e-9, 1e-9), "int8": (1e-9, 1e-9)}, 1e9, 1e9)
    plan = vramkit.plan(
        model, "160 KiB", tiers=("device", "host"), formats=("int8",), turns=turns, rates=rates
    )
    assert turns or any(e.tier == "host" for e in plan.entries)
    found = vramkit.estimate(model, plan=plan)
    account = found.account
    assert account.device_bytes == plan.device_bytes
    assert account.host_bytes == plan.host_bytes
    slots = [line for line in account.lines if line.name == "slots"]
    assert sum(line.device_bytes for line in slots) == plan.slots * sum(
        phase.slot_bytes for phase in plan.phases if phase.device_bytes == plan.device_bytes
    ) / max(1, sum(phase.device_bytes == plan.device_bytes for phase in plan.phases))
    assert found.weights_bytes == plan.weights_bytes


def test_a_plan_on_the_device_alone_is_its_formats() -> None:
    model = mlp()
    plan = vramkit.plan(model, "30 KiB", formats=("int8", "nf4"))
    found = vramkit.estimate(model, None, (8, 64), plan=plan)
    mixed = vramkit.estimate(model, {e.name: e.format for e in plan.entries}, (8, 64))
    assert found.to_dict() | {"probes": 0} == mixed.to_dict() | {"probes": 0}
    assert found.placement is None
    with pytest.raises(ValueError, match="not both"):
        vramkit.estimate(model, "int8", plan=plan)
    with pytest.raises(ValueError, match="other layers"):
        vramkit.estimate(Recurrent(), plan=plan)


# Data, tables, pictures


def test_data_is_json_and_whole() -> None:
    found = vramkit.estimate(mlp(), "nf4", (8, 64), target="cuda:8.9")
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["account"]["device_bytes"] == found.account.device_bytes
    assert [line["name"] for line in data["account"]["phases"]] == ["load", "run"]
    assert data["predicted_bytes"] == data["activations_bytes"]
    assert data["calibrated"] is None


def test_notebooks_get_table_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    found = vramkit.estimate(mlp(), "nf4", (8, 64))
    page = found._repr_html_()
    assert page.count("<svg") == page.count("</svg>") == 1
    assert "<script" not in page
    assert "interval exact" in page
    for line in found.account.lines:
        assert line.name in page
    assert page == found._repr_html_()  # the same figure gives the same picture
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "<svg" not in found._repr_html_()
    assert "<table" in found._repr_html_()


def pipeline() -> Any:
    parts = {"text": Recurrent(), "image": convolution()}
    calls = [("text", (2, 20, 32)), ("image", (1, 3, 24, 24))]
    return vramkit.estimate_pipeline(parts, calls, resident="one")


def test_pipelines_say_their_interval_and_draw_themselves() -> None:
    found = pipeline()
    assert found.interval_bytes == (found.peak_bytes, found.peak_bytes)
    assert "interval exact" in str(found)
    assert found.to_dict()["interval_from"] == "every operator was probed"
    pytest.importorskip("matplotlib")
    assert "<svg" in found._repr_html_()
    (axes,) = found.plot("1 MB").axes
    words = [text.get_text() for text in axes.texts]
    assert {"text", "image"} <= set(words)
    assert vramkit.format_size(found.peak_bytes) in words
    assert any(word.startswith("limit") for word in words)


def test_the_picture_stacks_up_to_the_peak() -> None:
    pytest.importorskip("matplotlib")
    model = llama()
    found = vramkit.estimate(model, "nf4", {"input_ids": (2, 16)}, generate=20)
    (axes,) = found.plot().axes
    areas = {area.get_label(): area for area in axes.collections if area.get_label()[0] != "_"}
    assert set(areas) >= {"weights", "cache", "activations"}
    tops = [path.vertices[:, 1].max() for area in axes.collections for path in area.get_paths()]
    assert max(tops) == found.peak_bytes
    marked = [line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    assert marked == [found.load_peak_bytes, found.peak_bytes]
    words = [text.get_text() for text in axes.texts]
    assert {"load", "prefill", "decode 1", "decode 19"} <= set(words)
    assert any("at the call's peak" in word and "self_attn" in word for word in words)
    assert not any(word.startswith("limit") for word in words)


def test_limits_and_measured_lines() -> None:
    pytest.importorskip("matplotlib")
    model = mlp()
    found = vramkit.estimate(model, None, (8, 64))
    (axes,) = found.plot(found.peak_bytes * 1.5 / 2**30).axes
    assert any("limit" in text.get_text() for text in axes.texts)
    assert axes.get_ylim()[1] > found.peak_bytes * 1.5
    (axes,) = found.plot("1 TB").axes
    assert any("above the picture" in text.get_text() for text in axes.texts)
    assert axes.get_ylim()[1] < 2 * found.peak_bytes
    found.calibrated = vramkit.verification.Calibrated("now", "here", 1, 2, 3)  # type: ignore[attr-defined]
    (axes,) = found.plot().axes
    assert any(text.get_text() == "measured" for text in axes.texts)
    empty = vramkit.MemoryEstimate(5)
    assert "inputs=" in empty.plot().axes[0].texts[0].get_text()


def trace_of(rows: list[tuple[int, int, int]], tags: list[Tag], **more: Any) -> Trace:
    made = Trace(tags=tags, **more)
    for block, size, tag in rows:
        made.events.extend((block, size, 0, tag))
    return made


@pytest.mark.parametrize("points", [1, 3, 7, 100])
def test_thinned_stacks_keep_every_runs_highest(points: int) -> None:
    from vramkit.report.timeline import stacked

    generator = np.random.default_rng(0)
    rows: list[tuple[int, int, int]] = []
    alive: list[int] = []
    for block in range(1, 60):
        rows.append((block, int(generator.integers(1, 1000)), block % 2))
        alive.append(block)
        if generator.random() < 0.6:
            gone = alive.pop(int(generator.integers(len(alive))))
            rows.append((gone, RELEASE, gone % 2))
    tags = [Tag("a", "x", "one"), Tag("b", "y", "one")]
    trace = trace_of(rows, tags, outer=40, cache=frozenset({3, 5}))
    stacks, place = stacked(trace, trace.kind, lambda _phase: 5000, points)
    live = [n + 5000 for n in trace.live()]
    step = math.ceil(len(rows) / points)
    expected = [max(live[i : i + step]) for i in range(0, len(rows), step)]
    assert [sum(stack.values()) for stack in stacks] == expected
    assert live[place] == max(live)


def test_outlines_enclose_the_bars() -> None:
    """By the area of the polygons (the shoelace formula), run by run."""
    from vramkit.report.timeline import _areas

    below, above = [1, 1, 2, 2, 5, 5, 0], [4, 4, 4, 2, 5, 9, 3]
    outlines = _areas(0.5, 0.25, below, above)
    found = []
    for outline in outlines:
        x, y = np.array(outline).T
        found.append(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)
    assert found == [0.25 * (3 + 3 + 2), 0.25 * (4 + 3)]
    assert [min(x for x, _ in o) for o in outlines] == [0.5, 0.5 + 5 * 0.25]
    assert len(outlines[0]) == 6
    assert _areas(0.0, 1.0, [1, 2], [1, 2]) == []


def test_bands_follow_modules() -> None:
    from vramkit.report.timeline import module_bands, phase_bands

    tags = [
        Tag("o", path, phase)
        for path, phase in (("", "a"), ("net.0", "a"), ("net.1.x", "b"), ("head", "b"))
    ]
    rows = [(1, 8, 0), (2, 8, 1), (3, 8, 2), (2, RELEASE, 1), (4, 8, 2), (5, 8, 3), (6, 8, 0)]
    trace = trace_of(rows, tags)
    assert module_bands(trace) == [(0, 2, "net.0"), (2, 5, "net.1.x"), (5, 7, "head")]
    assert phase_bands(trace) == [(0, 2, "a"), (2, 6, "b"), (6, 7, "a")]


# What cannot be estimated


@pytest.mark.parametrize(
    "shape",
    [
        (None, 64),
        ("batch", 64),
        (8.0, 64),
        (True, 64),
        {"input": (None, 64)},
        ("float32", (None, 64)),
    ],
)
def test_unknown_sizes(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"no whole numbers.*shapes="):
        vramkit.estimate(nn.Linear(64, 8), None, shape)


def test_sizes_and_dtypes_in_other_clothes() -> None:
    model = nn.Linear(64, 8)
    expected = vramkit.estimate(model, None, (8, 64)).activations_bytes
    for given in ((np.int64(8), 64), torch.Size((8, 64)), ("float32", (8, 64))):
        assert vramkit.estimate(model, None, given).activations_bytes == expected
    for name in ("float99", "nn"):
        with pytest.raises(ValueError, match=r"dtype.*not known"):
            vramkit.estimate(model, None, {"input": (name, (8, 64))})


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x  # the line that an error names


class Splitting(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x + 1, x + 2, x + 3, x + 4]


def line_of(cls: type[nn.Module]) -> int:
    forward: Callable[..., Any] = cls.forward
    return forward.__code__.co_firstlineno + 1


def test_decisions_by_value_name_module_and_line() -> None:
    where = rf"in module '1', .*test_estimate_report\.py line {line_of(Deciding)}, .*measure\.call"
    with pytest.raises(ValueError, match=where):
        vramkit.estimate(nn.Sequential(nn.Linear(4, 4), Deciding()), None, (2, 4))


def test_sums_that_no_machine_can_address() -> None:
    """Each tensor could exist; all of them could not."""
    with pytest.raises(ValueError, match=r"more than 2\*\*63"):
        vramkit.estimate(Splitting(), None, (2**59,))
    with pytest.raises(ValueError, match=r"more than 2\*\*63"):
        vramkit.estimate_pipeline({"a": Splitting()}, [("a", (2**59,))])
    found = vramkit.estimate(Splitting(), None, (2**50,))
    assert found.activations_bytes == 4 * 4 * 2**50
