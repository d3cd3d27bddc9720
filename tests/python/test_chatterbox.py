"""Chatterbox objects in other precisions: small ones of its shape, and the real classes."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from numerics import FP16_NETWORK, INT8_DYNAMIC_NETWORK
from safetensors.torch import load_file, save_file
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

from benchmarks.small_chatterbox import published_networks


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


class S3Gen(nn.Module):
    """Of S3Gen's kinds of tensors: a weight norm, kept and other buffers, a plain tensor."""

    ignore_state_dict_missing = ("tokenizer.window",)

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = nn.Module()
        self.tokenizer.register_buffer("window", torch.hann_window(12))
        self.norm = nn.BatchNorm1d(8)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        self.linear = nn.Linear(8, 8)
        self.register_buffer("fade", torch.linspace(0, 1, 7), persistent=False)
        self.table = torch.arange(5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.conv(x)).mean(-1))


class Conditionals:
    """Upstream's builtin voice."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def to(self, device: Any) -> Conditionals:
        self.tensor = self.tensor.to(device)
        return self

    @classmethod
    def load(cls, path: Path, map_location: Any = "cpu") -> Conditionals:
        return cls(torch.load(path, map_location=map_location, weights_only=True))


class EnTokenizer:
    def __init__(self, path: str) -> None:
        self.text = Path(path).read_text()


class Upstream:
    """Stands where `chatterbox.tts.ChatterboxTTS` does; loads as that does."""

    def __init__(self, t3: Any, s3gen: Any, ve: Any, tokenizer: Any, device: str,
                 conds: Any = None) -> None:  # fmt: skip
        self.t3, self.s3gen, self.ve = t3, s3gen, ve
        self.tokenizer, self.device, self.conds = tokenizer, device, conds

    @classmethod
    def from_local(cls, folder: Any, device: str) -> Upstream:
        parts = []
        for made, file in ((T3(), "t3_cfg"), (S3Gen(), "s3gen"), (VoiceEncoder(), "ve")):
            state = load_file(folder / f"{file}.safetensors")
            made.load_state_dict(state, strict=file != "s3gen")
            parts.append(made.to(device).eval())
        conds = Conditionals.load(folder / "conds.pt").to(device)
        return cls(*parts, EnTokenizer(str(folder / "tokenizer.json")), device, conds)


@pytest.fixture
def chatterbox_tts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module `chatterbox.tts`, whose files lie in `folder`; S3Gen's lack the window."""
    module: Any = types.ModuleType("chatterbox.tts")
    module.ChatterboxTTS, module.T3, module.S3Gen = Upstream, T3, S3Gen
    module.VoiceEncoder, module.EnTokenizer = VoiceEncoder, EnTokenizer
    module.Conditionals = Conditionals
    package = types.ModuleType("chatterbox")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "chatterbox", package)
    monkeypatch.setitem(sys.modules, "chatterbox.tts", module)
    folder = tmp_path / "weights"
    folder.mkdir()
    for made, file in ((T3(), "t3_cfg"), (S3Gen(), "s3gen"), (VoiceEncoder(), "ve")):
        if isinstance(made, S3Gen):
            made.norm.running_mean.normal_()
        state = {k: v for k, v in made.state_dict().items() if k != "tokenizer.window"}
        save_file(state, folder / f"{file}.safetensors")
    torch.save(torch.ones(3), folder / "conds.pt")
    (folder / "tokenizer.json").write_text("tokens")
    module.folder = folder
    return module


def all_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = all_tensors(first), all_tensors(second)
    assert a.keys() == b.keys()
    assert first.state_dict().keys() == second.state_dict().keys()
    assert [t.requires_grad for t in a.values()] == [t.requires_grad for t in b.values()]
    assert first.training == second.training is False
    return all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "options",
    [{}, {"int8": True}, {"dtype": "float16"}, {"dtype": "bfloat16", "s3gen_dtype": "float16"}],
)
def test_streamed_is_what_upstream_loads_and_prepare_makes(
    chatterbox_tts: Any, options: dict[str, Any]
) -> None:
    expected = Upstream.from_local(chatterbox_tts.folder, "cpu")
    wanted = prepare(expected, device="cpu", **options)
    tts, report = load(chatterbox_tts.folder, device="cpu", **options)
    assert isinstance(tts, Upstream)
    for name in ("t3", "s3gen", "ve"):
        assert same(getattr(expected, name), getattr(tts, name))
    assert isinstance(tts.t3.gru, QuantizedLayer) == options.get("int8", False)
    assert report.to_dict() == wanted.to_dict()
    assert {k: r.to_dict() for k, r in report.conversions.items()} == {
        k: r.to_dict() for k, r in wanted.conversions.items()
    }
    assert torch.equal(tts.s3gen.table, torch.arange(5.0))
    assert (tts.device, tts.tokenizer.text) == ("cpu", "tokens")
    assert torch.equal(tts.conds.tensor, torch.ones(3))
    cond = Conditions()
    x = torch.rand(1, 8, 9).to(tts.s3gen.linear.weight.dtype)
    with torch.inference_mode():
        tokens = torch.arange(5)[None]
        assert torch.equal(tts.t3(tokens, cond), expected.t3(tokens, cond))
        assert torch.equal(tts.s3gen(x), expected.s3gen(x))


def test_downloaded_by_upstreams_own_means(chatterbox_tts: Any) -> None:
    asked = []

    def download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        return str(chatterbox_tts.folder / filename)

    chatterbox_tts.REPO_ID, chatterbox_tts.hf_hub_download = "ResembleAI/chatterbox", download
    tts, _ = load(int8=True, device="cpu")
    assert isinstance(tts.ve.lstm, QuantizedLayer)
    assert {repo for repo, _ in asked} == {"ResembleAI/chatterbox"}
    files = {"ve.safetensors", "t3_cfg.safetensors", "s3gen.safetensors", "tokenizer.json",
             "conds.pt"}  # fmt: skip
    assert {file for _, file in asked} == files


def test_a_version_with_other_parts_loads_itself(chatterbox_tts: Any) -> None:
    del chatterbox_tts.Conditionals
    with pytest.warns(RuntimeWarning, match="loads itself"):
        tts, report = load(chatterbox_tts.folder, int8=True, device="cpu")
    assert isinstance(tts.t3.gru, QuantizedLayer)
    assert report.quantization == "int8"


def test_files_that_do_not_fit(chatterbox_tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chatterbox_tts.folder
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(folder / "nowhere")
    with pytest.raises(ValueError, match="of s3gen"):
        load(folder, s3gen_dtype="int8")
    read: list[Any] = []  # nothing is, before every file is known to fit
    monkeypatch.setattr("vramkit.chatterbox_loading._read", lambda *args: read.append(args))
    for file in ("ve.safetensors", "t3_cfg.safetensors", "s3gen.safetensors"):
        stored, content = load_file(folder / file), (folder / file).read_bytes()
        name = next(iter(stored))
        lacking = {k: v for k, v in stored.items() if k != name}
        save_file(lacking, folder / file)
        with pytest.raises(vramkit.CheckpointError, match=f"lacks {name!r}"):
            load(folder, device="cpu")
        save_file(lacking | {name: torch.zeros(3)}, folder / file)
        with pytest.raises(vramkit.CheckpointError, match="has shape"):
            load(folder, device="cpu")
        save_file(stored | {"another": torch.zeros(3)}, folder / file)
        if file == "s3gen.safetensors":  # upstream reads it so
            load(folder, device="cpu")
            assert len(read) == 3
        else:
            with pytest.raises(vramkit.CheckpointError, match="holds 'another'"):
                load(folder, device="cpu")
            assert not read
        (folder / file).write_bytes(content[:-1])
        with pytest.raises(vramkit.CheckpointError):
            load(folder, device="cpu")
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=file):
            load(folder, device="cpu")
        (folder / file).write_bytes(content)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load(folder, device="cpu")
    assert len(read) == 3


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
    """Upstream's T3, T3Cond, VoiceEncoder, from the package without what it would import."""
    with contextlib.ExitStack() as stack:
        try:
            networks = stack.enter_context(published_networks())
        except ImportError as error:
            if os.environ.get("REQUIRE_REAL_WEIGHTS") == "1":
                pytest.fail(f"{error} (REQUIRE_REAL_WEIGHTS=1)")
            pytest.skip(str(error))
        yield networks


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
