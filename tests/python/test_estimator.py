"""estimate: weights to the byte, peaks against measured ones, nothing read and nothing changed."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
import vramkit.measure
from conftest import RunPython
from torch import Tensor, nn
from vramkit import _core
from vramkit.estimator import weight_bytes

BUILTIN = [name for name, _ in _core.builtin_formats()]


def mlp() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.LayerNorm(256))
    return model.eval(), torch.randn(64, 256)


def llama() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2000, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model, {"input_ids": torch.randint(2000, (2, 48))}


def encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).train(False), torch.randn(
        4, 64, 128
    )


def tied() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Embedding(500, 128), nn.Linear(128, 500, bias=False))
    model[1].weight = model[0].weight
    return model.eval(), torch.randint(500, (4, 32))


MODELS = {"mlp": mlp, "llama": llama, "encoder": encoder, "tied": tied}


@pytest.mark.parametrize("name", [None, *BUILTIN])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_weights_are_exact(build: Callable[[], tuple[nn.Module, Any]], name: str | None) -> None:
    model, _ = build()
    estimated = vramkit.estimate(model, name)
    if name is not None:
        vramkit.convert(model, name)
    stored = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert estimated.weights_bytes == sum(stored.values())
    assert sum(n for _, _, n in estimated.layers) == sum(
        p.nbytes for p in {id(p): p for p in model.parameters()}.values()
    )
    assert estimated.peak_bytes is None
    assert vramkit.estimate(model).weights_bytes == estimated.weights_bytes


@pytest.mark.parametrize("name", [None, "nf4", "int8", "bf16", "int4"])
@pytest.mark.parametrize("build", [mlp, llama, tied], ids=["mlp", "llama", "tied"])
def test_peak_within_5_percent(
    build: Callable[[], tuple[nn.Module, Any]], name: str | None
) -> None:
    """Of what the call itself holds, which is stricter than of the peak with the weights."""
    model, inputs = build()
    before = vramkit.estimate(model, name, inputs)
    if name is not None:
        vramkit.convert(model, name)
    after = vramkit.estimate(model, None, inputs)
    measured = vramkit.measure.call(model, inputs)
    assert before.activations_bytes == after.activations_bytes
    assert measured.weights_bytes == before.weights_bytes == after.weights_bytes
    assert before.activations_bytes == pytest.approx(measured.activations_bytes, rel=0.05)
    assert before.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)
    assert measured.seconds > 0


@pytest.mark.parametrize("name", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peak_in_half_precision(dtype: torch.dtype, name: str | None) -> None:
    model, inputs = mlp()
    model, inputs = model.to(dtype), inputs.to(dtype)
    if name is not None:
        vramkit.convert(model, name)
    estimated = vramkit.estimate(model, None, inputs)
    measured = vramkit.measure.call(model, inputs)
    # Not counted, and noted so: scratch that torch's own bfloat16 product holds within itself.
    plain = nn.Linear(1024, 256, bias=False).to(dtype)
    x = torch.randn(64, 1024, dtype=dtype)
    scratch = vramkit.measure.call(plain, x).activations_bytes - 64 * 256 * 2
    assert (scratch == 0) or dtype == torch.bfloat16
    assert estimated.peak_bytes <= 1.001 * measured.peak_bytes
    assert measured.peak_bytes <= 1.05 * estimated.peak_bytes + scratch


def test_shapes_stand_for_inputs() -> None:
    model, inputs = mlp()
    expected = vramkit.estimate(model, None, inputs)
    for other in ((64, 256), [64, 256], ((64, 256),), (("float32", (64, 256)),),
                  {"input": (64, 256)}, {"input": (torch.float32, (64, 256))}):  # fmt: skip
        got = vramkit.estimate(model, None, other)
        assert got.activations_bytes == expected.activations_bytes
        assert got.inputs_bytes == inputs.nbytes == expected.inputs_bytes
    model, inputs = llama()
    expected = vramkit.estimate(model, None, inputs)
    got = vramkit.estimate(model, None, {"input_ids": (2, 48)})
    assert got.activations_bytes == expected.activations_bytes
    assert got.inputs_bytes == 2 * 48 * 8


def test_bad_inputs() -> None:
    model, _ = mlp()
    with pytest.raises(TypeError, match="inputs are a tensor"):
        vramkit.estimate(model, None, "64x256")
    with pytest.raises(ValueError, match="negative"):
        vramkit.estimate(model, None, (-1, 256))
    with pytest.raises(ValueError, match=r"unknown|no storage format"):
        vramkit.estimate(model, "nf3")


class Branching(nn.Module):
    def __init__(self, decide: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.decide = decide

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if self.decide(y) else -y


@pytest.mark.parametrize(
    "decide",
    [
        lambda y: y.sum() > 0,
        lambda y: y.sum().item() > 0,
        lambda y: int(y.argmax()) > 2,
        lambda y: len(y[y > 0]) > 2,
        lambda y: len(torch.nonzero(y)) > 1,
        lambda y: len(y.unique()) > 1,
        lambda y: y.tolist()[0][0] > 0,
        lambda y: y.detach().numpy().sum() > 0,
    ],
    ids=["bool", "item", "int", "mask", "nonzero", "unique", "tolist", "numpy"],
)
def test_decisions_by_value(decide: Callable[[Tensor], Any]) -> None:
    model = Branching(decide)
    with pytest.raises(ValueError, match=r"decides by the values.*vramkit\.measure\.call"):
        vramkit.estimate(model, None, torch.randn(2, 8))
    assert vramkit.measure.call(model, torch.randn(2, 8)).peak_bytes > model.layer.weight.nbytes


def test_errors_of_the_model_itself_pass_through() -> None:
    model, _ = mlp()
    with pytest.raises(RuntimeError, match=r"255|256"):
        vramkit.estimate(model, None, (4, 255))


class Counting(nn.Module):
    """State that a forward changes: a buffer in place, a buffer replaced, an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("steps", torch.zeros(()))
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        y: Tensor = self.norm(self.layer(x))
        self.cache.append(y)
        return y


def test_the_model_is_left_unchanged() -> None:
    model = Counting().train()
    before = copy.deepcopy(model.state_dict())
    objects = {name: id(p) for name, p in model.named_parameters()}
    vramkit.estimate(model, "nf4", (4, 16))
    vramkit.estimate(model, None, torch.randn(4, 16))
    assert model.training
    assert model.cache == []
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert type(value) is Tensor
        assert torch.equal(value, before[name]), name


def test_recurrent_and_convolutional_models_trace() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 32, 3)
            self.rnn = nn.LSTM(32, 64, num_layers=2, batch_first=True)
            self.head = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.rnn(self.conv(x).transpose(1, 2))
            out: Tensor = self.head(y)
            return out

    model = Net().eval()
    estimated = vramkit.estimate(model, "int8", (2, 8, 50))
    assert estimated.weights_bytes < weight_bytes(model)
    assert estimated.activations_bytes is not None
    assert estimated.activations_bytes >= 2 * 48 * 64 * 4
    assert not any("not counted" in note for note in estimated.notes)
    ruled = vramkit.estimate(model, "int8", (2, 8, 50), probe=False)
    assert any("not counted" in note for note in ruled.notes)


def test_timeline_and_reports() -> None:
    model, inputs = llama()
    estimated = vramkit.estimate(model, "nf4", inputs)
    names = [name for name, _ in estimated.timeline]
    assert names[-1] == "model" or names[-1] in dict(model.named_modules())
    assert "model.layers.2.mlp.down_proj" in names
    assert max(n for _, n in estimated.timeline) <= estimated.activations_bytes
    formats = {fmt for _, fmt, _ in estimated.layers}
    assert formats == {"nf4", "float32"}
    data = json.loads(json.dumps(estimated.to_dict()))
    assert data["peak_bytes"] == data["weights_bytes"] + data["activations_bytes"]
    assert "nf4" in str(estimated)
    assert "down_proj" in estimated._repr_html_()
    assert estimated.plot().axes


def test_mixed_precisions() -> None:
    model, inputs = mlp()
    estimated = vramkit.estimate(model, {"0": "nf4", "2": None}, inputs)
    assert estimated.precision == "mixed"
    size = vramkit.get_format("nf4").bytes((1024, 256)).total
    assert estimated.weights_bytes == weight_bytes(model) - 1024 * 256 * 4 + size
    assert vramkit.estimate(model, "fp32", inputs).weights_bytes == weight_bytes(model)


def test_a_real_model_from_its_folder(minilm_path: Path) -> None:
    shapes = {"input_ids": (16, 14), "attention_mask": (16, 14), "token_type_ids": (16, 14)}
    estimated = vramkit.estimate(minilm_path, "int8", shapes)
    model = vramkit.load(minilm_path, precision="int8")
    inputs = {
        "input_ids": torch.randint(1000, (16, 14)),
        "attention_mask": torch.ones(16, 14, dtype=torch.int64),
        "token_type_ids": torch.zeros(16, 14, dtype=torch.int64),
    }
    measured = vramkit.measure.call(model, inputs)
    assert estimated.weights_bytes == measured.weights_bytes
    assert estimated.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)


def test_a_checkpoints_weights_are_not_read(tmp_path: Path, run_python: RunPython) -> None:
    """A checkpoint of 16 GB that is one hole: reading it would take seconds, and count as reads."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
        dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(config.to_json_string())
    with torch.device("meta"):
        shapes = {
            name: list(p.shape)
            for name, p in transformers.LlamaForCausalLM(config).named_parameters()
        }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 16 * 10**9
    script = """
import sys, torch, transformers, vramkit, vramkit.estimator
from transformers.models.llama import modeling_llama
from torch._subclasses.fake_tensor import FakeTensorMode
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
def reads():
    return next(int(l.split()[1]) for l in open("/proc/self/io") if l.startswith("rchar"))
vramkit.estimate(torch.nn.Linear(4, 4), "nf4", (1, 4))
before, memory = reads(), status("VmRSS")
found = vramkit.estimate(sys.argv[1], "nf4", {"input_ids": (1, 256)})
print(found.weights_bytes, found.peak_bytes, reads() - before, (status("VmHWM") - memory) << 10)
"""
    weights, peak, read, memory = map(int, run_python(script, tmp_path).stdout.split())
    nf4 = vramkit.get_format("nf4")
    expected = sum(
        nf4.bytes(s).total if len(s) == 2 else 2 * torch.Size(s).numel() for s in shapes.values()
    )
    # The rotary embedding's frequencies are buffers of float32.
    assert 0 <= weights - expected <= 2 * 64 * 4
    assert peak > weights
    assert read < 10 * 10**6  # configuration, headers, modules that are imported late
    assert memory < 300 * 10**6


def test_the_allocator_sees_weights_inputs_and_the_call() -> None:
    model = nn.Sequential(nn.Linear(1000, 3000), nn.ReLU(), nn.Linear(3000, 500))
    found = vramkit.estimate(model, inputs=(64, 1000))
    assert found.peak_bytes is not None
    assert found.reserved_bytes is None
    plain = found.allocation()
    assert plain.peak_allocated_bytes == found.peak_bytes + found.inputs_bytes
    cuda = vramkit.estimate(model, inputs=(64, 1000), target="cuda:8.9")
    # Weights of 12.0 and 6.0 MB take 12 MiB and a segment of 20 MiB; two activations of 768 kB, the
    # inputs and the biases, 1.8 MB in all, one of 2 MiB.
    assert cuda.reserved_bytes == (12 + 20 + 2) << 20
    assert cuda.to_dict()["reserved_bytes"] == cuda.reserved_bytes
    short = cuda.allocation(limit="33 MiB")
    assert short.out_of_memory is not None
    with pytest.raises(ValueError, match="inputs"):
        vramkit.estimate(model).allocation()
