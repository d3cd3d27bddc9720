"""vramkit.sensitivity: figures against float64, streams, memory, interrupts, the cache, plans."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numerics
import pytest
import torch
import vramkit
from safetensors.torch import save_file
from torch import Tensor, nn
from vramkit import CalibrationError, CheckpointError, Sensitivity, layer_errors
from vramkit._operators import encode
from vramkit.measure import profiled_peak
from vramkit.sensitivity_store import Store

FORMATS = ("bf16", "int8", "fp8", "int4_g32", "int4", "nf4")


class Mixed(nn.Module):
    """An embedding tied to the head, a convolution, an LSTM, a cell in a loop, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.cell = nn.GRUCell(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.full((32,), 0.25))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.shift
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.lstm(x)[0]
        state = torch.zeros_like(x[:, 0])
        steps = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            steps.append(state)
        x = x + torch.stack(steps, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


def mixed() -> Mixed:
    torch.manual_seed(3)
    return Mixed().eval()


def some_ids(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (3, 9), generator=generator) for _ in range(count)]


def chain(depth: int = 3, width: int = 64) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers).eval()


def stored(weight: Tensor, fmt: str, lead: int = 1) -> Tensor:
    parts = encode(weight.detach().float(), vramkit.get_format(fmt), lead)
    return parts.dense(torch.float32).reshape(weight.shape).to(weight.dtype)


def errors_of(found: Sensitivity) -> dict[str, dict[str, float]]:
    return {layer.name: layer.errors for layer in found.layers}


def checkpoint(model: nn.Module, folder: Path) -> Path:
    names: dict[int, str] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if names.setdefault(id(value), name) == name:
            state[name] = value.detach().contiguous()
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


# --- figures -----------------------------------------------------------------------------------


def test_weights_are_the_relative_errors_of_the_weights() -> None:
    model = mixed()
    found = vramkit.sensitivity(model, formats=FORMATS, cache=None)
    assert found.method == "weights"
    for name, weight in (("embed", model.embed.weight), ("conv", model.conv.weight)):
        for fmt in FORMATS:
            change = stored(weight, fmt).double() - weight.detach().double()
            expected = float(change.square().sum() / weight.detach().double().square().sum())
            assert found.layer(name).errors[fmt] == pytest.approx(
                expected, rel=numerics.FLOAT64_SUM
            )


def local_reference(
    module: nn.Module, leaf: str, fmt: str, calls: list[tuple[Any, ...]], lead: int = 1
) -> float:
    """The relative squared error of a module's result, computed in float64 on a copy."""
    plain = copy.deepcopy(module).double()
    changed = copy.deepcopy(plain)
    weight = getattr(changed, leaf)
    weight.data = stored(getattr(module, leaf), fmt, lead).double()
    error = power = 0.0
    for args in calls:
        args = tuple(a.double() if a.is_floating_point() else a for a in args)
        pairs = zip(_results(plain(*args)), _results(changed(*args)), strict=True)
        for a, b in pairs:
            error += float((a - b).detach().square().sum())
            power += float(a.detach().square().sum())
    return error / power


def _results(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for part in out for t in _results(part)]


def inputs_of(model: nn.Module, module: nn.Module, batches: list[Tensor]) -> list[Any]:
    calls: list[Any] = []
    handle = module.register_forward_pre_hook(lambda m, args: calls.append(args))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return calls


@pytest.mark.parametrize(
    ("name", "leaf"),
    [("conv", "weight"), ("lstm", "weight_ih_l0"), ("lstm", "weight_hh_l0"), ("cell", "weight_hh")],
)
def test_layers_err_as_float64_says(name: str, leaf: str) -> None:
    model, batches = mixed(), some_ids()
    found = vramkit.sensitivity(model, batches, FORMATS, method="layer", cache=None)
    module = model.get_submodule(name)
    calls = inputs_of(model, module, batches)
    assert len(calls) == (18 if name == "cell" else 2)
    layer = name if leaf == "weight" else f"{name}.{leaf}"
    for fmt in FORMATS:
        expected = local_reference(module, leaf, fmt, calls)
        tolerance = numerics.squared_difference(expected, 96, numerics.RECURRENCE)
        assert found.layer(layer).errors[fmt] == pytest.approx(expected, rel=tolerance), fmt


def test_a_shared_weight_counts_at_every_use() -> None:
    model, batches = mixed(), some_ids()
    found = vramkit.sensitivity(model, batches, FORMATS, method="layer", cache=None)
    lookups = inputs_of(model, model.embed, batches)
    products = inputs_of(model, model.head, batches)
    assert next(layer.name for layer in found.layers) == "embed"
    assert "head" not in [layer.name for layer in found.layers]
    for fmt in FORMATS:
        expected = local_reference(model.embed, "weight", fmt, lookups)
        expected += local_reference(model.head, "weight", fmt, products)
        tolerance = numerics.squared_difference(expected, 32)
        assert found.layer("embed").errors[fmt] == pytest.approx(expected, rel=tolerance), fmt


def test_attention_is_measured_as_a_whole() -> None:
    """Its output projection is used without a call of it."""
    model, batches = mixed(), some_ids()
    found = vramkit.sensitivity(model, batches, ["int4"], method="layer", cache=None)
    calls = inputs_of(model, model.attention, batches)
    with torch.no_grad():
        for name, owner, leaf in (
            ("attention.in_proj_weight", "", "in_proj_weight"),
            ("attention.out_proj", "out_proj", "weight"),
        ):
            plain = copy.deepcopy(model.attention).double()
            changed = copy.deepcopy(plain)
            part = changed.get_submodule(owner)
            getattr(part, leaf).data = stored(getattr(part, leaf), "int4")
            error = power = 0.0
            for (x, *_), *_ in zip(calls, strict=True):
                a, b = (m(x.double(), x.double(), x.double())[0] for m in (plain, changed))
                error += float((a - b).square().sum())
                power += float(a.square().sum())
            tolerance = numerics.squared_difference(error / power, 32, numerics.RECURRENCE)
            assert found.layer(name).errors["int4"] == pytest.approx(error / power, rel=tolerance)


def test_each_and_output_are_errors_of_the_output() -> None:
    model, batches = chain(), [torch.randn(20, 64)]
    each = errors_of(vramkit.sensitivity(model, batches, FORMATS, method="each", cache=None))
    made = vramkit.sensitivity(model, batches, FORMATS, cache=None)
    local = errors_of(vramkit.sensitivity(model, batches, FORMATS, method="layer", cache=None))
    assert made.method == "output"
    plain = copy.deepcopy(model).double()
    reference = plain(batches[0].double()).detach()
    for name, errors in each.items():
        for fmt, found in errors.items():
            changed = copy.deepcopy(plain)
            weight = changed.get_submodule(name).weight
            weight.data = stored(weight, fmt)
            out = changed(batches[0].double()).detach()
            expected = float((out - reference).square().sum() / reference.square().sum())
            tolerance = numerics.squared_difference(expected, 64, numerics.RECURRENCE)
            assert found == pytest.approx(expected, rel=tolerance), (name, fmt)
        coarse = {"int4": "int4", "int4_g32": "int4", "int8": "int8"}
        for fmt, found in made.layer(name).errors.items():
            by = coarse.get(fmt) or max(("bf16", "fp8", "nf4"), key=lambda f: local[name][f])
            expected = errors[by] * local[name][fmt] / local[name][by]
            assert found == pytest.approx(expected, rel=1e-12), (name, fmt)


def test_padding_does_not_count() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(48, 64)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.first(x)

    model = Padded().eval()
    x, mask = torch.randn(2, 10, 48), torch.ones(2, 10, dtype=torch.long)
    mask[1, 4:] = 0
    noisy = x.clone()
    noisy[1, 4:] = 1e3 * torch.randn(6, 48)
    found = vramkit.sensitivity(
        model, [{"x": noisy, "attention_mask": mask}], ["int4"], method="layer", cache=None
    )
    expected = local_reference(model.first, "weight", "int4", [(x[mask.bool()],)])
    tolerance = numerics.squared_difference(expected, 48)
    assert found.layer("first").errors["int4"] == pytest.approx(expected, rel=tolerance)


# --- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["weights", "layer", "output", "each"])
def test_a_checkpoint_gives_the_same_figures(method: str, tmp_path: Path) -> None:
    model = mixed()
    model.shift.fill_(0.5)  # a buffer that the checkpoint holds, and the constructor does not
    path = checkpoint(model, tmp_path)
    batches = None if method == "weights" else some_ids()
    options: dict[str, Any] = {"formats": FORMATS, "method": method, "cache": None}
    here = vramkit.sensitivity(model, batches, **options)
    there = vramkit.sensitivity(path, batches, factory=Mixed, **options)
    assert errors_of(here) == errors_of(there)
    assert here.fingerprint == there.fingerprint
    auto = vramkit.sensitivity(path, batches, FORMATS, factory=Mixed, cache=None)
    assert auto.method == ("weights" if batches is None else "layer")


def test_a_real_checkpoint_gives_the_same_figures(minilm_path: Path) -> None:
    from vramkit.demo import tokenize

    batch = tokenize(minilm_path, ["The river floods every spring.", "Interest rates rose."])
    options: dict[str, Any] = {"formats": ["nf4"], "method": "layer", "cache": None}
    there = vramkit.sensitivity(minilm_path, [batch], **options)
    here = vramkit.sensitivity(vramkit.load(minilm_path), [batch], **options)
    assert errors_of(here) == errors_of(there)
    assert len(there.layers) == 40
    assert not there.unreached


def test_a_stream_holds_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many layers take the same memory, which is that of a few copies of one."""
    monkeypatch.setattr(layer_errors, "KEPT_BYTES", 0)
    width, x = 256, torch.randn(4, 256)
    layer = 4 * (width * width + width)
    peaks = []
    for depth in (6, 12):
        folder = tmp_path / str(depth)
        folder.mkdir()
        path = checkpoint(chain(depth, width), folder)
        made = functools.partial(chain, depth, width)
        run = functools.partial(
            vramkit.sensitivity, path, [x], ["int8", "nf4"], factory=made, cache=None
        )
        assert profiled_peak(made, (), {}) >= depth * layer  # what a real model takes
        peak = profiled_peak(run, (), {})
        peaks.append(peak)
    assert peaks[1] <= peaks[0] + layer // 4
    assert peaks[1] < 6 * layer


def test_a_stream_refuses_foreign_parameters(tmp_path: Path) -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.inner.weight)

    path = checkpoint(Foreign(), tmp_path)
    with pytest.raises(CheckpointError, match=r"inner.weight is used outside .* \(by linear\)"):
        vramkit.sensitivity(path, [torch.ones(2, 32)], factory=Foreign, cache=None)


def test_layers_that_no_batch_reaches() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, batch = Lazy().eval(), [torch.randn(4, 32)]
    with pytest.warns(UserWarning, match="no batch reached unused"):
        found = vramkit.sensitivity(model, batch, FORMATS, method="layer", cache=None)
    weights = vramkit.sensitivity(model, formats=FORMATS, cache=None)
    assert found.unreached == ["unused"]
    assert found.layer("unused") == weights.layer("unused")
    by_output = vramkit.sensitivity(model, batch, FORMATS, cache=None)
    assert set(by_output.layer("unused").errors.values()) == {0.0}


# --- interrupts and the cache ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["weights", "layer", "output", "each"])
def test_an_interrupted_measurement_goes_on(method: str, tmp_path: Path) -> None:
    model = mixed()
    batches = None if method == "weights" else some_ids()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = vramkit.sensitivity(model, batches, FORMATS, method=method, cache=None)

    def stop(done: int, total: int, name: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vramkit.sensitivity(model, batches, FORMATS, method=method, cache=tmp_path, progress=stop)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    kept = len(Store(tmp_path).records)
    assert kept >= 4
    again = vramkit.sensitivity(model, batches, FORMATS, method=method, cache=tmp_path)
    assert again.reused == kept
    assert again.measured > 0
    assert errors_of(again) == errors_of(whole)
    last = vramkit.sensitivity(model, batches, FORMATS, method=method, cache=tmp_path)
    assert (last.measured, last.reused) == (0, again.measured + again.reused)
    assert errors_of(last) == errors_of(whole)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_what_changed_is_measured_again(tmp_path: Path) -> None:
    model, batches = chain(4), [torch.randn(5, 64)]
    count = len(FORMATS)

    def measured(**options: Any) -> int:
        given = dict({"formats": FORMATS, "cache": tmp_path}, **options)
        return vramkit.sensitivity(model, **given).measured

    assert measured() == 4 * count
    assert measured(batches=batches, method="layer") == 4 * count
    assert measured() == measured(batches=batches, method="layer") == 0
    assert measured(formats=[*FORMATS, "nf4_dq"]) == 4  # only the new format
    with torch.no_grad():
        model[4].weight[0, 0] += 1.0
    assert measured() == count  # that layer alone
    # And by its inputs, every layer from there on.
    assert measured(batches=batches, method="layer") == 2 * count
    assert measured(batches=[batches[0] + 1], method="layer") == 4 * count
    first = measured(batches=batches, method="each")
    assert first == 4 * count
    assert measured(batches=batches, method="each", output=lambda out: out[:, :3]) == 4 * count


def test_an_unsound_cache_costs_only_time(tmp_path: Path) -> None:
    model = chain(2)
    whole = vramkit.sensitivity(model, formats=FORMATS, cache=tmp_path)
    file = tmp_path / "sensitivity.jsonl"
    text = file.read_text()
    file.write_text(text[:-30])  # cut in the middle of a line
    again = vramkit.sensitivity(model, formats=FORMATS, cache=tmp_path)
    assert again.measured == 1
    assert any("measured again" in note for note in again.notes)
    assert errors_of(again) == errors_of(whole)
    for nonsense in (b"\xff\xfe\x00", b"[]\n", text.encode().replace(b"[", b"[-")):
        file.write_bytes(nonsense)
        again = vramkit.sensitivity(model, formats=FORMATS, cache=tmp_path)
        assert again.notes
        assert errors_of(again) == errors_of(whole)
    # A folder that cannot be made: said, not raised.
    blocked = vramkit.sensitivity(model, formats=FORMATS, cache=file)
    assert any("not kept" in note or "not be read" in note for note in blocked.notes)
    assert errors_of(blocked) == errors_of(whole)


# --- plans and files ---------------------------------------------------------------------------


def test_a_plan_by_sensitivity(tmp_path: Path) -> None:
    model, batches = chain(), [torch.randn(20, 64)]
    found = vramkit.sensitivity(model, batches, FORMATS, cache=None)
    found.save(tmp_path / "found.json")
    loaded = Sensitivity.load(tmp_path / "found.json")
    assert loaded.to_dict() == found.to_dict()
    limit = f"{3 * 64 * 64 + 3 * 64 * 4} B"
    plan = vramkit.plan(model, limit, sensitivity=loaded)
    for entry in plan.entries:
        errors = found.layer(entry.name).errors
        assert {o.format: o.error for o in entry.options if o.format} == errors
    assert plan.loss == pytest.approx(found.loss(plan), rel=numerics.FLOAT64_SUM)
    by_batches = vramkit.plan(model, limit, batches=batches, formats=FORMATS)
    assert by_batches.entries == plan.entries
    path = checkpoint(model, tmp_path)
    from vramkit.checkpoint import plan_checkpoint

    streamed = plan_checkpoint(path, limit, factory=chain, sensitivity=loaded)
    assert streamed.entries == plan.entries


def test_a_plan_refuses_another_models_sensitivity() -> None:
    model = chain()
    found = vramkit.sensitivity(model, formats=FORMATS, cache=None)
    with pytest.raises(ValueError, match="'6' was not measured"):
        vramkit.plan(chain(4), "1 MB", sensitivity=found)
    with pytest.raises(ValueError, match=r"'0' is \[32, 32\] here, \[64, 64\] there"):
        vramkit.plan(chain(3, 32), "1 MB", sensitivity=found)
    with pytest.raises(ValueError, match="nf4_dq is not among the formats measured"):
        vramkit.plan(model, "1 MB", sensitivity=found, formats=["nf4_dq"])
    with pytest.raises(ValueError, match="not both"):
        vramkit.plan(model, "1 MB", sensitivity=found, batches=[torch.ones(1, 64)])
    part = vramkit.sensitivity(model, formats=FORMATS, skip=["2"], cache=None)
    with pytest.raises(ValueError, match="'2' was left out"):
        vramkit.plan(model, "1 MB", sensitivity=part)
    assert len(vramkit.plan(model, "1 MB", sensitivity=part, skip=["2"]).entries) == 2


def test_files_that_are_no_sensitivity(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    vramkit.sensitivity(chain(), formats=FORMATS, cache=None).save(file)
    good = json.loads(file.read_text())

    def refused(match: str, change: Callable[[dict[str, Any]], Any]) -> None:
        data = copy.deepcopy(good)
        change(data)
        file.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=match) as caught:
            Sensitivity.load(file)
        assert str(file) in str(caught.value)

    refused("schema 'x'", lambda d: d.update(schema="x"))
    refused("field 'layers' is missing", lambda d: d.pop("layers"))
    refused("'guess' is none of", lambda d: d.update(method="guess"))
    refused("error of '0' in int8 is -1", lambda d: d["layers"][0]["errors"].update(int8=-1))
    refused("is nan", lambda d: d["layers"][0]["errors"].update(int8=math.nan))
    refused("int3", lambda d: d["layers"][0]["errors"].update(int3=0.1))
    refused("no sensitivity", lambda d: d.update(layers=3))
    for text in ("", "[1]", "{", "\x00"):
        file.write_text(text)
        with pytest.raises(ValueError, match="no sensitivity"):
            Sensitivity.load(file)


def test_bad_input(tmp_path: Path) -> None:
    model, x = chain(), torch.randn(4, 64)
    for options, error, match in (
        ({"batches": []}, ValueError, "no batches"),
        ({"batches": x}, TypeError, r"write \[inputs\]"),
        ({"formats": []}, ValueError, "no formats"),
        ({"formats": "int8"}, TypeError, "list of formats"),
        ({"formats": ["int3"]}, ValueError, "int3"),
        ({"method": "guess"}, ValueError, "method is auto"),
        ({"method": "layer"}, ValueError, "batches=, which is missing"),
        ({"batches": [x], "method": "weights"}, ValueError, "takes no data"),
        ({"batches": [x], "method": "layer", "output": abs}, ValueError, "never looks at it"),
        ({"batches": [x], "factory": chain}, ValueError, "factory"),
        ({"batches": [x * math.nan]}, CalibrationError, "NaN or infinity"),
        ({"batches": [x * math.nan], "method": "layer"}, CalibrationError, "output of '0'"),
    ):
        with pytest.raises(error, match=match):
            vramkit.sensitivity(model, cache=None, **options)
    with pytest.raises(FileNotFoundError):
        vramkit.sensitivity(tmp_path / "nothing", factory=chain, cache=None)
    vramkit.save(chain(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="converted already"):
        vramkit.sensitivity(tmp_path / "saved", factory=chain, cache=None)
    folded = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))).eval()
    for method in ("layer", "output", "each"):
        with pytest.raises(CalibrationError, match="computed by"):
            vramkit.sensitivity(folded, [x], method=method, cache=None)
    with torch.no_grad():
        model[0].weight[0, 0] = 7e4  # fp16 cannot hold it
    found = vramkit.sensitivity(model, [x], ["bf16", "fp16"], method="layer", cache=None)
    assert list(found.layer("0").errors) == ["bf16"]
    assert list(found.layer("2").errors) == ["bf16", "fp16"]


def test_it_shows_itself() -> None:
    found = vramkit.sensitivity(mixed(), some_ids(), FORMATS, cache=None)
    text, html = str(found), found._repr_html_()
    for layer in found.layers:
        assert layer.name in text
        assert layer.name in html
    pytest.importorskip("matplotlib")
    axes = found.plot().axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == list(FORMATS)
