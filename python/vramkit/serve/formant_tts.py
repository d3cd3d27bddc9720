"""A speech engine that needs no weights to be downloaded: letter rules, a prosody net, formants.

It has the shape of Chatterbox's `ChatterboxTTS` (a plain object with `.t3`, `.s3gen`, `.ve`, `.sr`
and `.generate`), so that the server, quantization and tests treat both alike. What it is: a small
formant synthesizer, intelligible at best, far from a neural voice. Its `.t3` is a small LSTM with
fixed random weights that varies length, pitch and loudness of the phonemes, as a token model
stands before a vocoder; nobody trained it. It makes speech less even and gives quantization
something real to change. Everything is deterministic.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import VramkitError
from .formants import PHONEMES, SAMPLE_RATE, SILENCE, Segment, synthesize
from .letters import VOWELS, Word, words_of

_SYMBOLS = ("_", *sorted(PHONEMES), ",", ".", "!", "?")
_INDEX = {symbol: i for i, symbol in enumerate(_SYMBOLS)}
_PAUSES = {",": 0.16, ".": 0.30, "!": 0.30, "?": 0.30}
_FALL = 0.16  # how far the pitch falls from the first word to the last, as a share
_RISE = 0.22  # how far it rises on the last word of a question


class TextError(VramkitError, ValueError):
    """Text that holds nothing which the engine could speak."""


class Voice(NamedTuple):
    """A preset: pitch in Hz, scale of the formants (1: a man's vocal tract), pace."""

    pitch: float
    formant_scale: float
    pace: float


# The names that clients of OpenAI's interface send.
VOICES = {
    "alloy": Voice(118.0, 1.04, 1.0),
    "echo": Voice(98.0, 0.98, 0.97),
    "fable": Voice(132.0, 1.06, 1.05),
    "onyx": Voice(84.0, 0.94, 0.94),
    "nova": Voice(196.0, 1.17, 1.04),
    "shimmer": Voice(218.0, 1.20, 1.0),
}


class ProsodyModel(nn.Module):
    """Phonemes to three numbers in (-1, 1) each: change of length, pitch and loudness.

    Embedding, LSTM, Linear. The weights are fixed random numbers, not trained.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(_SYMBOLS), width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 3)
        generator = torch.Generator().manual_seed(20)
        with torch.no_grad():
            for parameter in self.parameters():
                spread = 1.0 if parameter.shape[0] == len(_SYMBOLS) else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        self.eval()

    def forward(self, symbols: Tensor) -> Tensor:
        """Indices of symbols, [batch, n], to [batch, n, 3]."""
        return torch.tanh(self.head(self.lstm(self.embedding(symbols))[0]))


class FormantVocoder(nn.Module):
    """Segments to sound; without parameters, so that there is nothing in it to quantize."""

    def forward(self, segments: list[Segment], seed: int, formant_scale: float) -> Tensor:
        """Float32 samples, [n]."""
        return torch.from_numpy(
            synthesize(segments, seed=seed, formant_scale=formant_scale)
        ).float()


class FormantTTS:
    """English text to speech by rules, with the interface of `ChatterboxTTS`.

    >>> FormantTTS().generate("Hi.").shape
    torch.Size([1, ...])
    """

    def __init__(self) -> None:
        self.sr = SAMPLE_RATE
        self.t3 = ProsodyModel()
        self.s3gen = FormantVocoder()
        self.ve = None  # it imitates no one: there is no voice encoder
        self.device = "cpu"

    def generate(
        self,
        text: str,
        voice: str = "alloy",
        exaggeration: float = 0.5,
        cfg_weight: float = 0.5,
        temperature: float = 0.8,
        speed: float = 1.0,
    ) -> Tensor:
        """The speech for a text: float32 samples in (-1, 1), [1, n], at `sr`.

        `exaggeration` widens the melody, a low `cfg_weight` slows the pace, `temperature` is how
        much the prosody net may change, `speed` divides all lengths. Raises TextError for text
        without an English letter or digit, ValueError for an unknown voice.
        """
        if voice not in VOICES:
            raise ValueError(f"unknown voice {voice!r}; the voices are: {', '.join(VOICES)}")
        preset = VOICES[voice]
        words = list(words_of(text))
        if not words:
            raise TextError("the text holds no English letter, digit or sign that can be spoken")
        pace = preset.pace * speed * (0.85 + 0.3 * cfg_weight)
        changes = self._changes(words) * min(temperature, 2.0)
        segments = _segments(words, changes, preset.pitch, pace, exaggeration)
        seed = zlib.crc32(f"{voice}\n{text}".encode("utf-8", "replace"))
        return self.s3gen(segments, seed, preset.formant_scale)[None]

    @torch.inference_mode()
    def _changes(self, words: list[Word]) -> Tensor:
        """What the prosody net says of each phoneme and mark: [n, 3]."""
        symbols = [_INDEX[s] for word in words for s in (*word.phonemes, word.mark or "_")]
        device = self.t3.embedding.weight.device
        found: Tensor = self.t3(torch.tensor([symbols], device=device))[0]
        return found.float().cpu()


def _segments(
    words: list[Word], changes: Tensor, pitch: float, pace: float, exaggeration: float
) -> list[Segment]:
    made: list[Segment] = [Segment(SILENCE, 0.03, 0.0)]
    rows = iter(changes.tolist())
    for i, word in enumerate(words):
        ends = i + 1 == len(words) or word.mark in (".", "!", "?")
        melody = 1 - _FALL * (0.5 + exaggeration) * i / len(words)
        if ends and word.mark == "?":
            melody += _RISE * (0.5 + exaggeration)
        if word.mark == "!":
            melody += 0.1 * (0.5 + exaggeration)
        accent = 1 + 0.12 * (0.5 + exaggeration) * (len(word.phonemes) > 3)
        for phoneme in word.phonemes:
            length, tone, loudness = next(rows)
            vowel = phoneme in VOWELS
            scale = (1 + 0.12 * length) * (1.35 if ends and vowel else 1.0) / pace
            height = pitch * melody * (accent if vowel else 1.0) * (1 + 0.04 * tone)
            for seconds, target in PHONEMES[phoneme]:
                loud = target._replace(voice=target.voice * (1 + 0.15 * loudness))
                made.append(Segment(loud, seconds * scale, height))
            if vowel:
                accent = 1.0
        next(rows)  # the mark's
        if word.mark:
            made.append(Segment(SILENCE, _PAUSES[word.mark] / pace, 0.0))
        elif ends:
            made.append(Segment(SILENCE, 0.1 / pace, 0.0))
    return made
