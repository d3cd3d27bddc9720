"""compare and record: figures against plain float64 formulas, and all that can go wrong."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from numerics import FLOAT64_COSINE, FLOAT64_SUM
from torch import Tensor, nn
from vramkit import quality
from vramkit.errors import CheckpointError
from vramkit.quality import ErrorSums, default_output


class Add(nn.Module):
    """Adds a constant tensor to its input: an error that is known exactly."""

    def __init__(self, value: Tensor | float) -> None:
        super().__init__()
        self.value = torch.as_tensor(value)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.value


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Embedding(50, 64),
        nn.Linear(64, 96),
        nn.ReLU(inplace=True),
        nn.LayerNorm(96),
        nn.LSTM(96, 16, batch_first=True),
    )
    return layers.eval()


def tokens(count: int = 3) -> list[Tensor]:
    return [torch.randint(0, 50, (4, 5 + i)) for i in range(count)]


def expected_metrics(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The definitions, on everything at once."""
    signal = sum(float((r.double() ** 2).sum()) for r, _ in pairs)
    noise = sum(float(((y.double() - r.double()) ** 2).sum()) for r, y in pairs)
    cosines = []
    for r, y in pairs:
        whole = r.ndim < 2 or r.shape[-1] == 1
        rows = (
            (r.reshape(1, -1), y.reshape(1, -1)) if whole else (r.flatten(0, -2), y.flatten(0, -2))
        )
        for a, b in zip(*(t.double() for t in rows), strict=True):
            cosines.append(float(a @ b / (a.norm() * b.norm())))
    return {
        "relative_l2": math.sqrt(noise / signal),
        "sqnr_db": 10 * math.log10(signal / noise),
        "cosine": min(cosines),
        "cosine_mean": sum(cosines) / len(cosines),
        "max_error": max(float((y.double() - r.double()).abs().max()) for r, y in pairs),
    }


def sums_of(pairs: list[tuple[Tensor, Tensor]]) -> ErrorSums:
    sums = ErrorSums()
    for reference, output in pairs:
        sums.add(reference, output, "output")
    return sums


def assert_metrics(actual: Any, expected: dict[str, float], *, mean: float) -> None:
    assert actual.relative_l2 == pytest.approx(expected["relative_l2"], rel=FLOAT64_SUM)
    assert actual.sqnr_db == pytest.approx(expected["sqnr_db"], rel=FLOAT64_SUM, abs=1e-11)
    assert actual.cosine == pytest.approx(expected["cosine"], abs=FLOAT64_COSINE)
    assert mean == pytest.approx(expected["cosine_mean"], abs=FLOAT64_COSINE)
    assert actual.max_error == expected["max_error"]


@pytest.mark.parametrize("shape", [(), (7,), (5, 1), (1, 7), (4, 6), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_metrics_are_their_definitions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pairs = []
    for _ in range(3):
        reference = torch.randn(shape).to(dtype)
        pairs.append((reference, (reference.double() + 0.1 * torch.randn(shape)).to(dtype)))
    sums = sums_of(pairs)
    assert_metrics(sums, expected_metrics(pairs), mean=sums.cosine_sum / sums.vectors)


@pytest.mark.parametrize("shape", [(1000,), (37, 20), (3, 300)])
@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_chunks_do_not_change_the_metrics(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], chunk: int
) -> None:
    monkeypatch.setattr(quality, "_CHUNK", chunk)
    pairs = [(torch.randn(shape), torch.randn(shape))]
    sums = sums_of(pairs)
    assert_metrics(sums, expected_metrics(pairs), mean=sums.cosine_sum / sums.vectors)


def test_complex_outputs_count_both_parts() -> None:
    reference = torch.tensor([[3 + 4j, 0]])
    sums = sums_of([(reference, reference * 1j)])
    assert sums.relative_l2 == pytest.approx(math.sqrt(2), rel=FLOAT64_SUM)
    assert sums.cosine == pytest.approx(0, abs=FLOAT64_COSINE)


def test_equal_outputs() -> None:
    sums = sums_of([(torch.ones(2, 3), torch.ones(2, 3))])
    assert (sums.relative_l2, sums.max_error, sums.sqnr_db) == (0.0, 0.0, math.inf)
    assert sums.cosine == pytest.approx(1, abs=FLOAT64_COSINE)


def test_zero_vectors_agree_with_each_other_alone() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert sums_of([(zero, zero)]).cosine == 1.0
    assert sums_of([(zero, zero)]).relative_l2 == 0.0
    for pair in ((zero, one), (one, zero)):
        assert sums_of([pair]).cosine == 0.0
    assert sums_of([(zero, one)]).relative_l2 == math.inf
    assert sums_of([(one, zero)]).relative_l2 == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["reference", "model"])
def test_what_is_not_finite_is_never_hidden(value: float, where: str) -> None:
    wrong = torch.zeros(2, 4)
    wrong[1, 2] = value
    models = {"reference": Add(0.0).eval(), "model": Add(0.0).eval()}
    models[where] = Add(wrong).eval()
    found = vramkit.compare(models["reference"], models["model"], [torch.ones(2, 4)] * 2)
    assert found.relative_l2 == found.max_error == math.inf
    assert found.sqnr_db == -math.inf
    assert found.cosine == 0.0
    assert found.cosine_mean == pytest.approx(0.5, abs=FLOAT64_COSINE)  # the other rows agree
    counts = (found.reference_nonfinite_values, found.nonfinite_values)
    assert counts == ((2, 0) if where == "reference" else (0, 2))
    assert "NaN or infinity" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["relative_l2"] is None


def test_infinity_in_both_is_not_agreement() -> None:
    model = Add(torch.tensor([0.0, math.inf])).eval()
    assert vramkit.compare(model, model, [torch.ones(1, 2)]).relative_l2 == math.inf


def test_compare_streams_and_times() -> None:
    reference, model = Add(0.0).eval(), Add(torch.tensor([3.0, -4.0])).eval()
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[-2.0, 4.0]])]
    found = vramkit.compare(reference, model, iter(batches))
    assert found.relative_l2 == pytest.approx(math.sqrt(50 / 25), rel=FLOAT64_SUM)
    assert found.max_error == 4.0
    assert (found.batches, found.vectors) == (2, 2)
    assert reference.calls == model.calls == 3  # one more call warms up
    assert found.seconds > 0
    assert found.reference_seconds > 0
    assert found.layers == []


def test_time_is_the_median_without_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])  # calls of 1, 2 and 9 seconds
    monkeypatch.setattr("vramkit.running.time.perf_counter", lambda: next(clock))
    assert vramkit.record(Add(0.0).eval(), [torch.ones(1, 2)] * 3).seconds == 2.0


def test_models_run_in_inference_mode_and_stay_as_they_are() -> None:
    seen = []

    class Probe(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_inference_mode_enabled())
            return super().forward(x)

    model = Probe(4, 4).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    vramkit.compare(model, model, [torch.ones(1, 4)], per_layer=False)
    assert all(seen)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_training_mode_warns_and_is_left_alone(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    vramkit.record(model, [torch.ones(1, 4)])
    assert not recwarn.list
    model[1].train()
    with pytest.warns(UserWarning, match=r"the reference .* training mode"):
        vramkit.record(model, [torch.ones(1, 4)])
    assert model[1].training
    assert not model.training


@pytest.mark.parametrize("per_layer", [False, True])
def test_batches_of_each_kind(per_layer: bool) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
            out: Tensor = self.layer(x) * scale
            return out if mask is None else out * mask

    model, x = Two().eval(), torch.ones(2, 4)
    for batch in (x, (x,), {"x": x, "mask": torch.ones(2, 4), "scale": 2.0}):
        found = vramkit.compare(model, model, [batch], per_layer=per_layer)
        assert found.relative_l2 == 0.0


@pytest.mark.parametrize("batches", [torch.ones(2, 2), {"x": torch.ones(2)}, "text", 3])
def test_one_batch_in_place_of_a_list(batches: Any) -> None:
    with pytest.raises(TypeError, match=r"batches must be a list of inputs"):
        vramkit.record(Add(0.0).eval(), batches)


def test_batches_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"batch 1 is a list"):
        vramkit.record(Add(0.0).eval(), [torch.ones(1), [1, 2]])
    with pytest.raises(ValueError, match="no batches"):
        vramkit.compare(Add(0.0).eval(), Add(0.0).eval(), [])


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="the model is no model but a int"):
        vramkit.compare(Add(0.0).eval(), 3, [torch.ones(1)])
    with pytest.raises(TypeError, match="the reference is a function"):
        vramkit.record(lambda x: x, [torch.ones(1)], per_layer=True)


def test_a_function_is_a_model() -> None:
    found = vramkit.compare(lambda x: x, lambda x: 2 * x, [torch.ones(1, 2)])
    assert found.relative_l2 == 1.0


def test_outputs_of_other_shapes() -> None:
    def wider(x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=-1)

    with pytest.raises(ValueError, match=r"batch 0 has shape \(2, 6\), the reference's \(2, 3\)"):
        vramkit.compare(lambda x: x, wider, [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="nothing to compare"):
        vramkit.compare(lambda x: x, lambda x: x, [torch.ones(0, 3)])


@dataclass
class Sampled:
    sample: Tensor
    other: Tensor


@dataclass
class Single:
    anything: Tensor
    text: str = ""


class Named(OrderedDict[str, Any]):
    """Shaped like transformers' ModelOutput."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


WANTED, OTHER = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "result",
    [
        WANTED,
        (WANTED, OTHER),
        [WANTED],
        ((WANTED, OTHER), OTHER),
        {"logits": WANTED, "loss": OTHER},
        {"loss": OTHER, "last_hidden_state": WANTED, "logits": OTHER},
        {"only": WANTED},
        Sampled(WANTED, OTHER),
        Single(WANTED),
        Named(embeds=WANTED, other=OTHER),
        Named(loss=OTHER, logits=WANTED),
    ],
)
def test_default_output(result: Any) -> None:
    assert default_output(result) is WANTED


@pytest.mark.parametrize("result", [None, 3, {}, (), {"a": WANTED, "b": OTHER}, object()])
def test_default_output_names_what_it_cannot_use(result: Any) -> None:
    with pytest.raises(TypeError, match=rf"a {type(result).__name__} .*output="):
        default_output(result)


def test_output_function() -> None:
    def model(x: Tensor) -> dict[str, Tensor]:
        return {"a": x, "b": 2 * x}

    found = vramkit.compare(model, model, [torch.ones(2, 3)], output=lambda out: out["b"])
    assert found.relative_l2 == 0.0
    with pytest.raises(TypeError, match="output= must return a Tensor, not float"):
        vramkit.record(model, [torch.ones(2, 3)], output=lambda out: 1.0)


def test_errors_by_layer() -> None:
    reference, model, batches = make(), make(), tokens()
    vramkit.convert(model, {"0": "nf4", "1": "int8"})
    found = vramkit.compare(reference, model, batches, per_layer=True)
    assert [e.name for e in found.layers] == ["0", "1", "3", "4"]
    assert found.left_out == []
    with torch.inference_mode():
        # The embedding's output, and the Linear's before the ReLU that overwrites it.
        stages = [[(reference[:n](b), model[:n](b)) for b in batches] for n in (1, 2)]
    for layer, pairs in zip(found.layers, stages, strict=False):
        expected = expected_metrics(pairs)
        assert layer.relative_l2 == pytest.approx(expected["relative_l2"], rel=FLOAT64_SUM)
        assert layer.cosine == pytest.approx(expected["cosine"], abs=FLOAT64_COSINE)
        assert layer.relative_l2 > 0.001
    assert found.layers[-1].relative_l2 == pytest.approx(found.relative_l2, rel=FLOAT64_SUM)


def test_hooks_are_gone_even_after_an_error() -> None:
    class Fails(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x)
            if any(m._forward_hooks for m in self.modules()):
                raise RuntimeError("stop")
            return out

    model = Fails(nn.Linear(2, 2)).eval()
    with pytest.raises(RuntimeError, match="stop"):
        vramkit.compare(model, model, [torch.ones(1, 2)], per_layer=True)
    assert not any(m._forward_hooks for m in model.modules())


def test_names_select_layers() -> None:
    model = make()
    found = vramkit.compare(model, model, tokens(1), names=["1", "3"])
    assert [e.name for e in found.layers] == ["1", "3"]
    with pytest.raises(ValueError, match=r"no layer with parameters is named '2'"):
        vramkit.compare(model, model, tokens(1), names=["2"])
    with pytest.raises(TypeError, match=r"write \['1'\]"):
        vramkit.compare(model, model, tokens(1), names="1")


def test_layers_that_cannot_be_compared_say_why() -> None:
    class Routed(nn.Module):
        def __init__(self, expert: int, width: int = 3, extra: bool = False) -> None:
            super().__init__()
            self.expert = expert
            self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            self.inner = nn.Linear(3, width)
            self.unused = nn.Linear(3, 3)
            if extra:
                self.adapter = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.inner(x)
            out: Tensor = self.experts[self.expert](x)
            return out

    left, right = Routed(0).eval(), Routed(1, width=5, extra=True).eval()
    found = vramkit.compare(left, right, [torch.ones(1, 3)], per_layer=True)
    reasons = dict(found.left_out)
    assert found.layers == []
    assert reasons["experts.0"] == "called 0 times by the model, 1 times by the reference"
    assert reasons["experts.1"] == "called 1 times by the model, 0 times by the reference"
    assert "(1, 5)" in reasons["inner"]
    assert reasons["unused"] == "never called"
    assert reasons["adapter"] == "not in the reference"
    assert dict(vramkit.compare(right, left, [torch.ones(1, 3)], per_layer=True).left_out)[
        "adapter"
    ] == ("not in the model")


def test_a_layer_called_twice_counts_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            nn.init.eye_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)
            self.shift = shift

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.layer(x) + self.shift)
            return out

    found = vramkit.compare(
        Twice(0.0).eval(), Twice(1.0).eval(), [torch.ones(1, 2)], per_layer=True
    )
    # Outputs 1 1 | 1 1 against 1 1 | 2 2.
    assert found.layers[0].relative_l2 == pytest.approx(math.sqrt(0.5), rel=FLOAT64_SUM)


def test_attention_is_a_layer_and_its_uncalled_part_is_named() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x)[0]
            return out

    model = Attend().eval()
    found = vramkit.compare(model, model, [torch.randn(1, 4, 8)], per_layer=True)
    assert [e.name for e in found.layers] == ["attention"]
    assert found.left_out == [("attention.out_proj", "never called")]


def test_recording_gives_what_the_live_model_gives(tmp_path: Path) -> None:
    reference, model, batches = make(), make(), tokens()
    vramkit.convert(model, "nf4")
    live = vramkit.compare(reference, model, batches, per_layer=True)
    recording = vramkit.record(reference, batches, per_layer=True)
    recording.save(tmp_path / "reference.safetensors")
    loaded = vramkit.Recording.load(tmp_path / "reference.safetensors")
    assert (loaded.seconds, loaded.bytes) == (recording.seconds, recording.bytes)
    for source in (recording, loaded):
        found = vramkit.compare(source, model, batches, per_layer=True)
        assert found.layers == live.layers
        assert found.relative_l2 == live.relative_l2
        assert found.reference_seconds == recording.seconds
    some = vramkit.compare(loaded, model, batches, names=["3"])
    assert [e.name for e in some.layers] == ["3"]


def test_recording_keeps_dtypes_values_and_order(tmp_path: Path) -> None:
    outputs = [
        torch.randn(2, 3).bfloat16(),
        torch.tensor(3.5),
        torch.tensor([[1, 2]]),
        torch.tensor([True]),
        torch.randn(2, 3).to(torch.float8_e4m3fn),
    ]
    layers = [{"z": [torch.ones(2)], "a.b": [torch.ones(1), torch.zeros(0)]}] * len(outputs)
    path = tmp_path / "r.safetensors"
    vramkit.Recording(outputs, layers, 0.125, 0.75).save(path)
    loaded = vramkit.Recording.load(path)
    assert (loaded.seconds, loaded.task_metric) == (0.125, 0.75)
    for before, after in zip(outputs, loaded.outputs, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before.double(), after.double())
    assert list(loaded.layers[0]) == ["z", "a.b"]
    assert [t.shape for t in loaded.layers[0]["a.b"]] == [(1,), (0,)]
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


def test_recording_of_another_number_of_batches() -> None:
    model = Add(0.0).eval()
    batch = torch.ones(1, 2)
    recording = vramkit.record(model, [batch] * 2)
    with pytest.raises(ValueError, match=r"3 batches, but 2 were recorded"):
        vramkit.compare(recording, model, [batch] * 3)
    with pytest.raises(ValueError, match=r"more batches than the 2 that were recorded"):
        vramkit.compare(recording, model, iter([batch] * 3))
    with pytest.raises(ValueError, match=r"1 batches, but 2 were recorded"):
        vramkit.compare(recording, model, iter([batch]))
    with pytest.raises(ValueError, match=r"record\(per_layer=True\)"):
        vramkit.compare(recording, nn.Linear(2, 2).eval(), [batch] * 2, per_layer=True)


def test_files_that_are_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    vramkit.record(Add(0.0).eval(), [torch.ones(4, 4)]).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        vramkit.Recording.load(path)
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"output.0": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no recording"):
        vramkit.Recording.load(path)
    metadata = {"kind": "vramkit recording", "version": "1", "seconds": "1", "task_metric": "null"}
    for layers in ("[{'", '[{"a": 1}]', '[{"a": "x"}]', "[3]"):
        save_file({"output.0": torch.ones(2)}, path, {**metadata, "layers": layers})
        with pytest.raises(CheckpointError):
            vramkit.Recording.load(path)
    with pytest.raises(FileNotFoundError):
        vramkit.Recording.load(tmp_path / "missing.safetensors")


def test_a_recording_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    vramkit.Recording([torch.ones(2)]).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"output.0 has dtype torch.complex128"):
        vramkit.Recording([torch.ones(2, dtype=torch.complex128)]).save(path)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        vramkit.Recording([torch.ones(2)]).save(tmp_path / "none" / "r.safetensors")


def test_recorded_outputs_are_not_the_models_own() -> None:
    buffer = torch.ones(1, 2)

    def reuses(x: Tensor) -> Tensor:
        buffer.copy_(x)
        return buffer

    recording = vramkit.record(reuses, [torch.ones(1, 2), torch.zeros(1, 2)])
    assert recording.outputs[0].tolist() == [[1.0, 1.0]]


def test_task_metric() -> None:
    def bias(model: nn.Module) -> float:
        return float(model(torch.zeros(1)))

    batches = [torch.ones(1, 2)]
    found = vramkit.compare(Add(2.0).eval(), Add(3.0).eval(), batches, task_metric=bias)
    assert (found.reference_task_metric, found.task_metric) == (2.0, 3.0)
    assert "task metric 3, reference 2" in str(found)
    recording = vramkit.record(Add(2.0).eval(), batches, task_metric=bias)
    found = vramkit.compare(recording, Add(3.0).eval(), batches)
    assert (found.reference_task_metric, found.task_metric) == (2.0, None)
    assert "task metric not measured, reference 2" in str(found)


def test_a_comparison_shows_itself() -> None:
    reference, model = make(), make()
    vramkit.convert(model, "int4")
    found = vramkit.compare(reference, model, tokens(1), per_layer=True)
    assert f"relative L2 {found.relative_l2:.4g}" in str(found)
    assert "4 layers" in str(found)
    html = found._repr_html_()
    assert html.count("<tr>") == 5
    assert "SQNR" in html
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["cosine"] == found.cosine
    assert data["layers"][0] == vars(found.layers[0])


def test_inputs_move_to_each_model() -> None:
    class OnMeta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.device = torch.device("meta", 0)

        def forward(self, x: Tensor, pair: tuple[Tensor, list[Tensor]]) -> Tensor:
            assert x.device == pair[1][0].device == torch.device("cpu")
            return x

    x = torch.ones(1, 2)
    # A device that holds no values is no place for inputs: they stay where they are.
    assert vramkit.record(OnMeta().eval(), [(x, (x, [x]))]).outputs[0].tolist() == [[1.0, 1.0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_on_two_devices() -> None:
    reference = nn.Linear(4, 4).eval()
    model = nn.Linear(4, 4).eval()
    model.load_state_dict(reference.state_dict())
    found = vramkit.compare(reference, model.cuda(), [torch.ones(2, 4)], per_layer=True)
    assert found.cosine > 0.999
    assert len(found.layers) == 1
