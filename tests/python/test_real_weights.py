"""Quality on the real weights of a sentence-embedding model, against other libraries' formats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import vramkit
import vramkit.measure
from torch import Tensor, nn
from vramkit.estimator import weight_bytes

SENTENCES = [
    "The cat sat on the mat.",
    "A quick brown fox jumps over the lazy dog.",
    "Interest rates rose again this quarter.",
    "He plays the violin in an orchestra.",
    "The recipe calls for two eggs and butter.",
    "Quantum computers use superposition.",
    "The train to Vienna leaves at nine.",
    "She was elected mayor of the city.",
    "Volcanoes erupt when magma rises.",
    "The stock market fell sharply today.",
    "My phone battery drains too fast.",
    "Children learn languages quickly.",
    "The museum opens at ten on Sundays.",
    "A new vaccine was approved last week.",
    "The river floods every spring.",
    "Machine learning models need data.",
]


SLACK = 1.005


class Setting:
    """The model in float32, the sentences, and their reference embeddings."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.reference = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
        self.expected = self.embed(self.reference)

    def embed(self, model: Any) -> Tensor:
        """Mean-pooled, normalized: one vector per sentence."""
        with torch.inference_mode():
            hidden = model(**self.batch).last_hidden_state
            mask = self.batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            return nn.functional.normalize(mean.float(), dim=-1)

    def cosine(self, model: Any) -> float:
        """The least one of all sentences."""
        return float(nn.functional.cosine_similarity(self.embed(model), self.expected).min())

    def error(self, model: Any) -> float:
        """Relative L2 distance of all embeddings together."""
        return float((self.embed(model) - self.expected).norm() / self.expected.norm())

    def with_weights(self, change: Callable[[Tensor], Tensor], embeddings: bool = True) -> Any:
        """A plain copy whose Linear (and Embedding) weights are `change(weight)`."""
        model = copy.deepcopy(self.reference)
        kinds = (nn.Linear, nn.Embedding) if embeddings else (nn.Linear,)
        for module in model.modules():
            if isinstance(module, kinds):
                module.weight.data = change(module.weight.data)
        return model

    def converted(self, name: str, skip: tuple[str, ...] = ()) -> Any:
        model = copy.deepcopy(self.reference)
        vramkit.convert(model, name, skip=skip)
        return model


@pytest.fixture(scope="module")
def setting(minilm_path: Path) -> Setting:
    return Setting(minilm_path)


@pytest.mark.parametrize(
    ("fraction", "cosine"), [(0.25, 0.998), (0.20, 0.996), (0.15, 0.965)], ids=str
)
def test_plans(setting: Setting, fraction: float, cosine: float) -> None:
    limit = int(weight_bytes(setting.reference) * fraction)
    plan = vramkit.plan(setting.reference, f"{limit} B", inputs=setting.batch)
    assert plan.optimal
    model = plan.apply(copy.deepcopy(setting.reference))
    measured = vramkit.measure.call(model, setting.batch)
    assert measured.weights_bytes == plan.weights_bytes == plan.estimate.weights_bytes <= limit
    assert plan.estimate.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)
    got = setting.cosine(model)
    print(f"{fraction:.0%}: {plan.weights_bytes} B, least cosine {got:.5f}")
    assert got >= cosine


@pytest.mark.parametrize("name", [None, "bf16", "int8", "nf4", "nf4_dq", "int4", "fp8"])
def test_estimates(setting: Setting, name: str | None) -> None:
    estimated = vramkit.estimate(setting.reference, name, setting.batch)
    model = setting.converted(name) if name else setting.reference
    measured = vramkit.measure.call(model, setting.batch)
    assert estimated.weights_bytes == measured.weights_bytes
    assert estimated.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)
    assert estimated.activations_bytes == pytest.approx(measured.activations_bytes, rel=0.05)


class TestNoWorseThan:
    """The whole model at the same size, in the peer's format: decoded by the peer's own code.

    The weights are as good or better by themselves (tests of formats); how their errors add up in
    one model on sixteen sentences is chance, worth less than half a percent.
    """

    @pytest.mark.parametrize("name", ["nf4", "nf4_dq", "fp4"])
    def test_bitsandbytes_four_bit(self, setting: Setting, name: str) -> None:
        def theirs(weight: Tensor) -> Tensor:
            packed, state = bnb.quantize_4bit(
                weight, quant_type=name[:3], compress_statistics=name.endswith("dq")
            )
            return bnb.dequantize_4bit(packed, state)

        other = setting.error(setting.with_weights(theirs))
        ours = setting.error(setting.converted(name))
        print(f"{name}: {ours:.6f}, bitsandbytes {other:.6f}")
        assert ours <= other * SLACK

    def test_bitsandbytes_int8(self, setting: Setting) -> None:
        """Its Linears quantize the activations too; the weights alone are the stricter peer."""

        def rounded(weight: Tensor) -> Tensor:
            codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
            return codes.float() * absmax[:, None] / 127

        other = setting.error(setting.with_weights(rounded, embeddings=False))
        ours = setting.error(setting.converted("int8", skip=("embeddings",)))
        print(f"int8: {ours:.6f}, bitsandbytes' weights {other:.6f}")
        assert ours <= other * SLACK

    def test_torchs_dynamic_int8(self, setting: Setting) -> None:
        from torch.ao.quantization import quantize_dynamic

        theirs = quantize_dynamic(copy.deepcopy(setting.reference), {nn.Linear}, torch.qint8)
        other = setting.error(theirs)
        ours = setting.error(setting.converted("int8"))
        print(f"int8: {ours:.6f}, torch's dynamic INT8 {other:.6f}")
        assert ours < other / 4

    def test_quantos_fp8(self, setting: Setting) -> None:
        """qfloat8: e4m3 with a scale per row, absmax / 448, of the weights."""

        def theirs(weight: Tensor) -> Tensor:
            scale = weight.abs().amax(-1, keepdim=True) / 448
            return (weight / scale).to(torch.float8_e4m3fn).float() * scale

        other = setting.error(setting.with_weights(theirs))
        ours = setting.error(setting.converted("fp8"))
        print(f"fp8: {ours:.6f}, quanto's formula {other:.6f}")
        assert ours <= other * SLACK

    def test_int4_min_max(self, setting: Setting) -> None:
        """quanto's qint4: groups of 128, a scale and a shift of float32."""

        def theirs(weight: Tensor) -> Tensor:
            grouped = weight.reshape(-1, 128)
            low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
            scale = (high - low) / 15
            return (((grouped - low) / scale).round() * scale + low).reshape(weight.shape)

        other = setting.error(setting.with_weights(theirs))
        ours = setting.error(setting.converted("int4"))
        print(f"int4: {ours:.6f}, min-max {other:.6f}")
        assert ours <= other


def test_sixteen_bits_lose_next_to_nothing(setting: Setting) -> None:
    """Half an ulp of each weight, 2^-12 and 2^-9, through six layers of normalized values."""
    assert setting.error(setting.converted("fp16")) < 2.0**-11 * 6
    assert setting.error(setting.converted("bf16")) < 2.0**-8 * 6


def test_half_the_input_precision(setting: Setting) -> None:
    """The converted model in bfloat16 agrees with itself in float32 to bfloat16's precision."""
    model = setting.converted("int8")
    wide = setting.embed(model)
    narrow = setting.embed(model.to(torch.bfloat16))
    assert float(nn.functional.cosine_similarity(wide, narrow).min()) > 0.999


def test_compiled(setting: Setting) -> None:
    model = setting.converted("nf4")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(setting.embed(compiled), setting.embed(model), atol=1e-5)
