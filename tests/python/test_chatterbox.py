"""Chatterbox objects in other precisions: small ones of its shape, and the real classes."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import vramkit
from numerics import FP16_NETWORK, INT8_DYNAMIC_NETWORK
from torch import nn
from vramkit.chatterbox import (
    effective_dtype,
    load,
    prepare,
    quantize_dynamic,
    resolve_device,
)
from vramkit.layers import QuantizedLayer
from vramkit.serve.formant_tts import FormantTTS


class Conditions:
    """As upstream's: a plain object of tensors."""

    def __init__(self) -> None:
        self.speaker_emb = torch.randn(1, 16)
        self.tokens = torch.zeros(1, 3, dtype=torch.int64)


class CondEnc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spkr_enc = nn.Linear(16, 64)

    def forward(self, cond: Conditions) -> torch.Tensor:
        return self.spkr_enc(cond.speaker_emb)


class T3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cond_enc = CondEnc()
        self.text_emb = nn.Embedding(32, 64)
        self.gru = nn.GRU(64, 64, batch_first=True)
        self.speech_head = nn.Linear(64, 40, bias=False)

    def forward(self, tokens: torch.Tensor, cond: Conditions) -> torch.Tensor:
        hidden = self.text_emb(tokens) + self.cond_enc(cond)[:, None]
        return self.speech_head(self.gru(hidden)[0])


class VoiceEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 32, 3, batch_first=True)
        self.proj = nn.Linear(32, 16)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        return self.proj(self.lstm(mels)[1][0][-1])


class Chatterbox:
    """A plain object, as upstream's: `quantize_dynamic` of torch fails on it."""

    def __init__(self) -> None:
        self.sr = 24000
        self.t3, self.ve = T3().eval(), VoiceEncoder().eval()
        self.s3gen = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(8, 8))
        self.device = "cpu"
        self.conds = None


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_torchs_own_function_fails_on_the_documented_object() -> None:
    with pytest.raises(AttributeError):
        torch.ao.quantization.quantize_dynamic(Chatterbox(), {nn.Linear}, dtype=torch.qint8)


def test_linear_lstm_and_gru_in_8_bits_and_nothing_else() -> None:
    tts = Chatterbox()
    before = copy.deepcopy(tts)
    reports = quantize_dynamic(tts)
    converted = {
        f"{part}.{name}": type(module).__mro__[1].__name__
        for part in ("t3", "s3gen", "ve")
        for name, module in getattr(tts, part).named_modules()
        if isinstance(module, QuantizedLayer)
    }
    assert set(converted) == {
        "t3.cond_enc.spkr_enc", "t3.gru", "t3.speech_head", "ve.lstm", "ve.proj"
    }  # fmt: skip
    assert set(reports) == {"t3", "ve"}
    assert {layer.format for r in reports.values() for layer in r.layers} == {"int8_dynamic"}
    assert torch.equal(tts.t3.text_emb.weight, before.t3.text_emb.weight)
    for a, b in zip(tts.s3gen.parameters(), before.s3gen.parameters(), strict=True):
        assert torch.equal(a, b)
    tokens, mels = torch.arange(12)[None], torch.rand(2, 30, 40)
    cond = Conditions()
    with torch.inference_mode():
        for made, true in (
            (tts.t3(tokens, cond), before.t3(tokens, cond)),
            (tts.ve(mels), before.ve(mels)),
        ):
            assert (made - true).norm() / true.norm() < INT8_DYNAMIC_NETWORK
            assert not torch.equal(made, true)


def test_a_chosen_kind_of_layer() -> None:
    tts = Chatterbox()
    quantize_dynamic(tts, layers=(nn.LSTM,), components=("ve",))
    assert isinstance(tts.ve.lstm, QuantizedLayer)
    assert not isinstance(tts.ve.proj, QuantizedLayer)


def test_the_report_counts_what_lies_there() -> None:
    tts = Chatterbox()
    report = prepare(tts, int8=True, dtype="float16")
    modules = [getattr(tts, c.name) for c in report.components]
    held = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in modules]
    assert [c.bytes for c in report.components] == held
    assert report.quantization == "int8"
    assert (report.dtype, report.effective_dtype) == ("float16", "float32")
    formats = {c.name: c.format for c in report.components}
    assert formats == {"t3": "int8_dynamic", "s3gen": "float32", "ve": "int8_dynamic"}
    plain = sum(p.numel() * 4 for p in Chatterbox().t3.parameters())
    assert report.components[0].float32_bytes == plain
    assert report.to_dict()["components"]["t3"]["weights_bytes"] == held[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_the_token_models_alone(dtype: str) -> None:
    tts = Chatterbox()
    report = prepare(tts, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in tts.t3.parameters()} == {wanted}
    assert {p.dtype for m in (tts.s3gen, tts.ve) for p in m.parameters()} == {torch.float32}
    assert report.effective_dtype == dtype
    # Conditions are float32 in every call, as upstream makes them.
    with torch.inference_mode():
        assert tts.t3(torch.arange(5)[None], Conditions()).dtype == wanted


def test_prepared_twice_casts_once() -> None:
    tts = Chatterbox()
    prepare(tts, dtype="float16")
    prepare(tts, dtype="float32")
    assert len(tts.t3.cond_enc._forward_pre_hooks) == 1
    assert tts.t3(torch.arange(5)[None], Conditions()).dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "auto"),
    [("cuda", "float16"), ("cuda:1", "float16"), ("mps", "float32"), ("cpu", "float32")],
)
def test_auto_is_float16_on_cuda_alone(device: str, auto: str) -> None:
    assert effective_dtype("auto", device) == getattr(torch, auto)
    assert effective_dtype("bfloat16", device) == torch.bfloat16
    assert effective_dtype("auto", device, int8=True) == torch.float32


def test_bad_input_changes_nothing(tmp_path: Path) -> None:
    tts = Chatterbox()
    before = {k: v.clone() for k, v in tts.t3.state_dict().items()}
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        prepare(tts, dtype="half")
    with pytest.raises(ValueError, match="s3gen"):
        prepare(tts, int8=True, s3gen_dtype="int8")
    with pytest.raises(ValueError, match="unknown device"):
        prepare(tts, device="gpu")
    with pytest.raises(AttributeError, match="like ChatterboxTTS"):
        quantize_dynamic(object())
    tts.ve = "encoder"
    with pytest.raises(TypeError, match=r"Chatterbox\.ve is a str"):
        quantize_dynamic(tts)
    after = tts.t3.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    with torch.no_grad():
        tts.t3.speech_head.weight[0, 0] = float("nan")
    tts.ve = None
    with pytest.raises(vramkit.NonFiniteWeightError, match="speech_head"):
        prepare(tts, int8=True)
    assert not any(isinstance(m, QuantizedLayer) for m in tts.t3.modules())


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.backends.mps.is_available():
        assert resolve_device("auto") == wanted
    with pytest.raises(ValueError, match="not there"):
        resolve_device("cuda:99")


class Upstream:
    """Stands where `chatterbox.tts.ChatterboxTTS` does."""

    asked: ClassVar[list[tuple[Any, ...]]] = []

    @classmethod
    def from_local(cls, path: Any, device: str) -> Chatterbox:
        cls.asked.append((path, device))
        return Chatterbox()

    @classmethod
    def from_pretrained(cls, device: str) -> Chatterbox:
        cls.asked.append((device,))
        return Chatterbox()


def test_loaded_on_the_cpu_and_converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("chatterbox.tts")
    module.ChatterboxTTS = Upstream  # type: ignore[attr-defined]
    package = types.ModuleType("chatterbox")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "chatterbox", package)
    monkeypatch.setitem(sys.modules, "chatterbox.tts", module)
    Upstream.asked.clear()
    tts, report = load(tmp_path, int8=True)
    assert isinstance(tts.t3.gru, QuantizedLayer)
    assert report.quantization == "int8"
    load()
    assert Upstream.asked == [(tmp_path, "cpu"), ("cpu",)]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chatterbox.tts", None)
    monkeypatch.setitem(sys.modules, "chatterbox", None)
    with pytest.raises(ImportError, match="pip install chatterbox-tts"):
        load()


def test_the_formant_engine_has_the_same_shape() -> None:
    tts = FormantTTS()
    report = prepare(tts, int8=True)
    assert isinstance(tts.t3.lstm, QuantizedLayer)
    assert isinstance(tts.t3.head, QuantizedLayer)
    assert [c.name for c in report.components] == ["t3", "s3gen"]


# --- the real classes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upstream() -> Any:
    """Upstream's T3, T3Cond, VoiceEncoder, from the package without what it would import.

    Its own `__init__` imports everything down to a watermark; the two networks need torch,
    transformers and einops alone.
    """
    spec = importlib.util.find_spec("chatterbox")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("chatterbox-tts is not installed: pip install --no-deps chatterbox-tts")
    pytest.importorskip("einops")
    folder = spec.submodule_search_locations[0]
    with pytest.MonkeyPatch.context() as patch:
        for name, path in (("chatterbox", folder), ("chatterbox.models", f"{folder}/models")):
            package = types.ModuleType(name)
            package.__path__ = [path]
            patch.setitem(sys.modules, name, package)
        if importlib.util.find_spec("librosa") is None:  # reads sounds: not part of the networks
            librosa = types.ModuleType("librosa")
            librosa.__spec__ = importlib.machinery.ModuleSpec("librosa", None)
            patch.setitem(sys.modules, "librosa", librosa)
        from chatterbox.models.t3 import llama_configs, t3
        from chatterbox.models.t3.modules.cond_enc import T3Cond
        from chatterbox.models.voice_encoder.voice_encoder import VoiceEncoder as RealVoiceEncoder

        yield types.SimpleNamespace(
            T3=t3.T3, T3Cond=T3Cond, VoiceEncoder=RealVoiceEncoder, configs=llama_configs,
            T3Config=t3.T3Config,
        )  # fmt: skip
        for name in [n for n in sys.modules if n.startswith("chatterbox.")]:
            del sys.modules[name]


@pytest.fixture
def small(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A real T3 of two layers, and the real voice encoder."""
    config = upstream.configs.LLAMA_520M_CONFIG_DICT
    for key, value in {"intermediate_size": 512, "num_hidden_layers": 2}.items():
        monkeypatch.setitem(config, key, value)  # the width is written into the resampler
    hp = upstream.T3Config.english_only()
    hp.max_text_tokens, hp.max_speech_tokens = 32, 32
    tts = Chatterbox()
    tts.t3, tts.ve = upstream.T3(hp).eval(), upstream.VoiceEncoder().eval()
    return tts


def _logits(upstream: Any, t3: Any) -> torch.Tensor:
    torch.manual_seed(3)
    cond = upstream.T3Cond(
        speaker_emb=torch.randn(1, 256),
        cond_prompt_speech_tokens=torch.randint(0, 6000, (1, 8)),
        emotion_adv=0.5 * torch.ones(1, 1, 1),
    )
    text = torch.tensor([[255, 5, 6, 7, 0]])
    with torch.inference_mode():
        made = t3.forward(
            t3_cond=cond,
            text_tokens=text,
            text_token_lens=torch.tensor([5]),
            speech_tokens=torch.tensor([[6561, 4, 5]]),
            speech_token_lens=torch.tensor([3]),
        )
    return made.speech_logits.float()


def test_real_networks_in_8_bits(upstream: Any, small: Any) -> None:
    mels = torch.rand(2, 160, 40)
    with torch.inference_mode():
        voice = small.ve(mels)
    true = _logits(upstream, small.t3)
    report = prepare(small, int8=True)
    linear = [m for m in small.t3.modules() if isinstance(m, nn.Linear)]
    assert len(linear) > 14
    assert all(isinstance(m, QuantizedLayer) for m in linear)
    assert isinstance(small.ve.lstm, QuantizedLayer)
    made = _logits(upstream, small.t3)
    assert (made - true).norm() / true.norm() < INT8_DYNAMIC_NETWORK
    with torch.inference_mode():
        assert (small.ve(mels) - voice).norm() / voice.norm() < INT8_DYNAMIC_NETWORK
    assert report.components[0].bytes < report.components[0].float32_bytes


def test_a_real_token_model_in_float16(upstream: Any, small: Any) -> None:
    true = _logits(upstream, small.t3)
    prepare(small, dtype="float16")
    made = _logits(upstream, small.t3)
    assert (made - true).norm() / true.norm() < FP16_NETWORK


def test_true_sizes(upstream: Any) -> None:
    """The counts that docs/migration/chatterbox.md quotes."""
    with torch.device("meta"):
        t3, ve = upstream.T3(), upstream.VoiceEncoder()
    assert sum(p.numel() for p in t3.parameters()) == 532_405_248
    assert sum(p.numel() for p in ve.parameters()) == 1_423_618
