"""The formant engine: text to phonemes, to sound that is speech-like, the same each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import samples
from vramkit.serve.formant_tts import VOICES, FormantTTS, TextError
from vramkit.serve.formants import HOP, PHONEMES, SAMPLE_RATE, SILENCE, Segment, synthesize
from vramkit.serve.letters import _EXCEPTIONS, _LETTER_NAMES, number_words, phonemes_of, words_of
from vramkit.serve.sound import pcm16, wav
from vramkit.serve.text_chunks import split_text

TEXTS = st.text(max_size=400) | st.text("ab .,!?\n", max_size=400)


def spoken(text: str) -> list[str]:
    return [" ".join(word.phonemes) + word.mark for word in words_of(text)]


@pytest.mark.parametrize(
    ("word", "sounds"),
    [
        ("station", "S T EY SH AX N"), ("phone", "F OW N"), ("make", "M EY K"), ("mat", "M AE T"),
        ("making", "M EY K IH NG"), ("night", "N AY T"), ("knife", "N AY F"), ("queen", "K W IY N"),
        ("bridge", "B R IH JH"), ("table", "T EY B AX L"), ("singing", "S IH NG IH NG"),
        ("walked", "W AO K T"), ("wanted", "W AA N T IH D"), ("boxes", "B AA K S IH Z"),
        ("dogs", "D AA G Z"), ("cats", "K AE T S"), ("church", "CH ER CH"),
        ("picture", "P IH K CH ER"),
        ("vision", "V IH ZH AX N"), ("write", "R AY T"), ("city", "S IH T IY"), ("you", "Y UW"),
        ("movable", "M AA V AX B AX L"),
    ],
)  # fmt: skip
def test_words(word: str, sounds: str) -> None:
    assert " ".join(phonemes_of(word)) == sounds


def test_numbers_signs_names_and_accents() -> None:
    assert spoken("7%") == ["S EH V AX N", "P ER S EH N T"]
    assert " ".join(number_words(21_305)) == "twenty one thousand three hundred five"
    assert len(number_words(10**12)) == 13
    assert spoken("3.5") == ["TH R IY", "P OY N T", "F AY V"]
    assert spoken("007") == ["Z IH R OW", "Z IH R OW", "S EH V AX N"]
    assert spoken("TTS, it's") == ["T IY T IY EH S,", "IH T S"]
    assert spoken("caf\u00e9") == spoken("cafe")
    assert spoken("\u4f60\u597d ... ?!") == []


def test_every_sound_is_known() -> None:
    sounds = {s for word in (*_EXCEPTIONS.values(), *map(str.split, _LETTER_NAMES.values()))
              for s in word}  # fmt: skip
    assert sounds <= set(PHONEMES)


@given(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_word_has_sounds(word: str) -> None:
    assert set(phonemes_of(word)) <= set(PHONEMES)
    assert all(found.phonemes for found in words_of(word))


@given(TEXTS, st.integers(1, 90))
@settings(max_examples=100, deadline=None)
def test_pieces_hold_all_of_the_text(text: str, limit: int) -> None:
    pieces = split_text(text, limit)
    assert all(0 < len(piece) <= limit and piece == piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_pieces_end_where_a_reader_pauses() -> None:
    assert split_text("One two. Three four, five six seven.", 22) == [
        "One two.", "Three four,", "five six seven."
    ]  # fmt: skip
    assert split_text("alpha beta gamma", 11) == ["alpha beta", "gamma"]
    assert split_text("abcdefgh", 3) == ["abc", "def", "gh"]
    assert split_text("It cost 3.50 today. Fine", 19) == ["It cost 3.50 today.", "Fine"]
    assert split_text("  \n ", 5) == []
    with pytest.raises(ValueError, match="at least 1"):
        split_text("a", 0)


def spectrum(sound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
    return np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE), power


@pytest.mark.parametrize("name", ["IY", "AA", "UW", "AE"])
def test_vowels_have_their_pitch_and_formants(name: str) -> None:
    ((_, target),) = PHONEMES[name]
    pitch = 125.0
    frequency, power = spectrum(synthesize([Segment(target, 0.5, pitch)], seed=1))
    # The peaks of a voiced sound are multiples of its pitch ...
    strongest = frequency[power.argmax()]
    assert abs(strongest / pitch - round(strongest / pitch)) < 0.05
    # ... and the largest one near each formant lies within a harmonic of it.
    for formant in (target.f1, target.f2):
        near = (frequency > formant * 0.7) & (frequency < formant * 1.35)
        assert abs(frequency[near][power[near].argmax()] - formant) <= pitch


@pytest.mark.parametrize(("name", "low", "high"), [("S", 5000, 8000), ("SH", 2500, 4500)])
def test_fricatives_are_noise_in_their_band(name: str, low: float, high: float) -> None:
    ((_, target),) = PHONEMES[name]
    frequency, power = spectrum(synthesize([Segment(target, 0.5, 120.0)], seed=1))
    assert power[(frequency > low) & (frequency < high)].sum() > 0.6 * power.sum()


def test_lengths_and_silence() -> None:
    assert len(synthesize([], seed=0)) == 0
    made = synthesize([Segment(SILENCE, 0.1, 0.0)], seed=0)
    assert len(made) == 10 * HOP
    assert np.abs(made).max() < 1e-12


@pytest.mark.parametrize("voice", list(VOICES))
def test_speech_is_heard(voice: str) -> None:
    made = FormantTTS().generate("The river floods every spring.", voice)
    assert made.shape[0] == 1
    assert made.dtype == torch.float32
    assert 1.0 < made.shape[1] / SAMPLE_RATE < 4.0
    level = float(made.square().mean().sqrt())
    assert 0.02 < level < 0.5
    assert float(made.abs().max()) < 1.0
    # Loud and quiet in turn, as syllables are: no tone, no steady noise.
    frames = made[0][: made.shape[1] // 480 * 480].view(-1, 480).square().mean(1).sqrt()
    assert float(frames.std() / frames.mean()) > 0.4


def test_what_the_parameters_do() -> None:
    tts = FormantTTS()
    text = "Is this one of the long questions?"
    plain = tts.generate(text)
    assert torch.equal(plain, tts.generate(text))
    assert not torch.equal(plain, tts.generate(text, temperature=0.05)[:, : plain.shape[1]])
    lengths = [tts.generate(text, speed=s).shape[1] for s in (0.5, 1.0, 2.0)]
    assert lengths[0] > 1.9 * lengths[1] > 3.6 * lengths[2]
    assert tts.generate(text, cfg_weight=0.0).shape[1] > tts.generate(text, cfg_weight=1.0).shape[1]
    with pytest.raises(ValueError, match="shimmer"):
        tts.generate(text, "nobody")
    with pytest.raises(TextError):
        tts.generate("?!")


def test_wav_files() -> None:
    data = pcm16(torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, 0.5 / 32767]))
    assert np.frombuffer(data, "<i2").tolist() == [0, 32767, -32767, 32767, -32768, 0]
    assert samples(wav(data, 24000)).tobytes() == data
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            pcm16(torch.tensor([bad]))
