"""convert and restore on live models: what is converted, what is left, what the report says."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit import QuantizedLayer, _core
from vramkit._operators import encode
from vramkit.convert import candidates, matches

BUILTIN = [name for name, _ in _core.builtin_formats()]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.gate = nn.Linear(64, 4)
        self.down = nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.scale = nn.Parameter(torch.ones(64))
        self.register_buffer("table", torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.down(torch.relu(self.up(x)))) * self.scale
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 50, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.lm_head(x)
        return out


CONVERTED = ["embed", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "lm_head"]


def total_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", BUILTIN)
def test_report_is_exact(name: str) -> None:
    model = Model()
    before = total_bytes(model)
    weights = {n: model.get_submodule(n).weight.detach().clone() for n in CONVERTED}
    report = vramkit.convert(model, name)
    assert [r.name for r in report.layers] == CONVERTED
    assert {r.format for r in report.layers} == {name}
    assert {r.kind for r in report.layers} == {"Linear", "Embedding"}
    assert report.original_bytes == before
    assert report.bytes == total_bytes(model)
    fmt = vramkit.get_format(name)
    for layer in report.layers:
        assert layer.bytes == fmt.bytes(weights[layer.name].shape).total
        assert layer.original_bytes == weights[layer.name].numel() * 4
        parts = encode(weights[layer.name], fmt)
        assert torch.equal(model.get_submodule(layer.name).codes, parts.codes)
    covered = sum(w.numel() * 4 for w in weights.values())
    assert report.coverage_bytes_fraction == covered / before
    assert sum(n for _, _, n in report.left_out) == before - covered


def test_what_is_left_out_and_why() -> None:
    report = vramkit.convert(Model(), "nf4")
    reasons = {name: reason for name, reason, _ in report.left_out}
    assert reasons["blocks.0.up.bias"] == "biases stay plain"
    assert reasons["blocks.0.norm.weight"] == "LayerNorm stays plain"
    assert reasons["blocks.1.gate.weight"] == "sensitive: routers stay plain"
    assert reasons["blocks.1.scale"] == "Block stays plain"


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["lm_head"], ["lm_head"]),
        (["blocks.0"], ["blocks.0.up", "blocks.0.down"]),
        (["up"], ["blocks.0.up", "blocks.1.up"]),
        (["blocks.*.down"], ["blocks.0.down", "blocks.1.down"]),
        (["block"], []),  # a part of a name is no name
        (["embed", "1.up"], ["embed", "blocks.1.up"]),
    ],
)
def test_skip(skip: list[str], left: list[str]) -> None:
    model = Model()
    report = vramkit.convert(model, "int8", skip=skip)
    assert [r.name for r in report.layers] == [n for n in CONVERTED if n not in left]
    skipped = [n for n, reason, _ in report.left_out if reason == "skipped on request"]
    assert [n for n in skipped if "gate" not in n] == [f"{n}.weight" for n in left]
    for name in left:
        assert not isinstance(model.get_submodule(name), QuantizedLayer)


def test_matches() -> None:
    assert matches("a.b.c", ["a.b"])
    assert matches("a.b.c", ["b.c"])
    assert matches("a.b.c", ["*.c"])
    assert not matches("a.b.c", ["a.bc", "x", ".c.", ""])


def test_formats_by_layer() -> None:
    model = Model()
    report = vramkit.convert(
        model, {"embed": "nf4_dq", "lm_head": vramkit.PrecisionMode.INT8, "blocks.0.up": None}
    )
    assert {r.name: r.format for r in report.layers} == {"embed": "nf4_dq", "lm_head": "int8"}
    assert ("blocks.0.up.weight", "no format chosen for it", 64 * 128 * 4) in report.left_out
    with pytest.raises(ValueError, match=r"no layer to convert is named 'blocks\.9\.up'"):
        vramkit.convert(Model(), {"blocks.9.up": "nf4"})


def test_converted_layers_are_left_the_second_time() -> None:
    model = Model()
    vramkit.convert(model, {"embed": "nf4"})
    report = vramkit.convert(model, "int8")
    assert [r.name for r in report.layers] == CONVERTED[1:]
    assert model.embed.storage_format.name == "nf4"
    again = vramkit.convert(model, "int8")
    assert again.layers == []
    assert again.coverage_bytes_fraction == 0.0


def test_a_lone_layer_is_a_model() -> None:
    layer = nn.Linear(64, 32)
    report = vramkit.convert(layer, "nf4")
    assert [r.name for r in report.layers] == [""]
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(vramkit.restore(layer, "fp32"), nn.Linear)


def test_report_as_data_text_and_html() -> None:
    report = vramkit.convert(Model(), "nf4")
    data = report.to_dict()
    assert data["converted_bytes"] == report.bytes
    assert data["original_bytes"] == report.original_bytes
    assert len(data["layers"]) == 6
    text = str(report)
    assert "6 layers converted" in text
    assert f"{report.coverage_bytes_fraction:.2%}" in text
    html = report._repr_html_()
    assert "blocks.1.down" in html
    assert html.count("<tr") >= 7


def test_progress_counts_the_weights_bytes() -> None:
    seen: list[tuple[int, int, str]] = []
    report = vramkit.convert(Model(), "nf4", progress=lambda *step: seen.append(step))
    total = sum(r.original_bytes for r in report.layers)
    assert [name for _, _, name in seen] == CONVERTED
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == total
    assert {t for _, t, _ in seen} == {total}


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    vramkit.convert(Model(), "nf4", progress=True)
    assert "convert" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_models_of_every_float_type(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    vramkit.convert(model, "int8")
    assert model[0].compute_dtype == dtype
    vramkit.restore(model)
    assert model[0].weight.dtype == dtype


def test_the_output_is_that_of_the_decoded_weights() -> None:
    model = Model().eval()
    vramkit.convert(model, "int4")
    plain = copy.deepcopy(model)
    vramkit.restore(plain, "fp32")
    x = torch.randint(50, (2, 9))
    with torch.no_grad():
        # Two products of depth 128 and one of 64 on values of size one: a few hundred roundings.
        assert torch.allclose(model(x), plain(x), rtol=0, atol=256 * 2.0**-24 * 8)


def test_fp32_has_no_stored_form() -> None:
    model = Model()
    with pytest.raises(ValueError, match="plain storage"):
        vramkit.convert(model, "fp32")
    assert not any(isinstance(m, QuantizedLayer) for m in model.modules())


def test_layers_of_no_size_and_meta_models() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 0))
    report = vramkit.convert(model, "nf4")
    assert [r.name for r in report.layers] == ["0"]
    with torch.device("meta"):
        ghost = Model()
    report = vramkit.convert(ghost, "nf4")
    assert all(p.device.type == "meta" for p in ghost.parameters())
    assert report.bytes == total_bytes(ghost)


def test_weights_shared_with_something_plain_stay_plain() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.raw = self.layer.weight

    model = Odd()
    found, left = candidates(model, parameters=False)
    assert found == []
    assert left[0][2] == 64 * 64 * 4
    vramkit.convert(model, "nf4", parameters=False)
    assert model.raw is model.layer.weight
    vramkit.convert(model, "nf4")
    assert model.raw_codes is model.layer.codes


def test_a_module_used_in_two_places_is_converted_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = vramkit.convert(model, "int8")
    assert len(report.layers) == 1
    assert model[0] is model[2] is shared
    assert model(torch.randn(2, 64)).shape == (2, 64)


def test_transformers_tied_models_save_and_restore(tmp_path: object) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(100, (1, 6))
    report = vramkit.convert(model, "int8")
    assert model.lm_head.codes is model.model.embed_tokens.codes
    assert sum(r.name in ("lm_head", "model.embed_tokens") for r in report.layers) == 1
    assert model.dtype == torch.float32
    model.tie_weights()
    assert model.lm_head.codes is model.model.embed_tokens.codes
    logits = model(ids).logits
    model.save_pretrained(f"{tmp_path}/a")
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 9)
    vramkit.restore(model, "fp32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(model(ids).logits, logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(f"{tmp_path}/b")


def test_resizing_a_converted_models_vocabulary() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=100,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    vramkit.convert(model, "int8")
    kept = model.embeddings.word_embeddings.dense_weight()
    model.resize_token_embeddings(110)  # it assigns weight.data: a weight of another size
    words = model.get_input_embeddings()
    assert words.weight.shape == (110, 64)
    assert torch.allclose(words.weight[:100], kept, rtol=0, atol=float(kept.abs().max()) / 127)
    assert math.isfinite(float(model(torch.tensor([[109]])).last_hidden_state.sum()))
