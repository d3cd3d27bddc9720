"""A formant synthesizer: phonemes with lengths and pitch to sound, on NumPy alone.

Source and filter (Fant 1960; the parameters are those of Klatt 1980, far fewer of them). The
source is a train of pulses at the voice's pitch and white noise. The filter, five resonators in
cascade for what passes the whole mouth and one for the hiss of fricatives and bursts, changes
every 10 ms. It is applied to short frames in the frequency domain, which are added up where they
overlap. Deterministic: equal segments and seed give equal samples on one machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SAMPLE_RATE = 24000
HOP = 240  # samples between frames: 10 ms
_WINDOW = 2 * HOP  # so that Hann windows add up to 1
_LENGTH = 1024  # of the transform: the window and room for the resonances to ring
_BLOCK = 256  # frames in memory at once
_UPPER = ((3500.0, 200.0), (4500.0, 300.0))  # formants that hardly move: frequency, bandwidth
_BANDWIDTHS = (70.0, 100.0, 150.0)
_GAIN = 0.9


class Target(NamedTuple):
    """What the mouth does for a while: formants in Hz, and how loud each source is (0 to 1)."""

    f1: float
    f2: float
    f3: float
    voice: float
    breath: float  # noise through the formants
    hiss: float  # noise through a resonance of its own
    center: float  # of that resonance, Hz
    width: float


class Segment(NamedTuple):
    """A target held for some seconds at a pitch in Hz (0: the neighbours' pitch goes on)."""

    target: Target
    seconds: float
    pitch: float


def _vowel(f1: float, f2: float, f3: float) -> Target:
    return Target(f1, f2, f3, 1.0, 0.01, 0.0, 3000.0, 1000.0)


def _soft(f1: float, f2: float, f3: float, voice: float) -> Target:
    return Target(f1, f2, f3, voice, 0.0, 0.0, 3000.0, 1000.0)


def _noise(f2: float, hiss: float, center: float, width: float, voice: float = 0.0) -> Target:
    return Target(350.0, f2, 2500.0, voice, 0.0, hiss, center, width)


SILENCE = Target(500.0, 1500.0, 2500.0, 0.0, 0.0, 0.0, 3000.0, 1000.0)

# Vowels: averages of men's voices (Peterson and Barney 1952). Seconds, then one target or more.
PHONEMES: dict[str, tuple[tuple[float, Target], ...]] = {
    "IY": ((0.14, _vowel(270, 2290, 3010)),),
    "IH": ((0.10, _vowel(390, 1990, 2550)),),
    "EH": ((0.12, _vowel(530, 1840, 2480)),),
    "AE": ((0.15, _vowel(660, 1720, 2410)),),
    "AA": ((0.16, _vowel(730, 1090, 2440)),),
    "AO": ((0.16, _vowel(570, 840, 2410)),),
    "UH": ((0.11, _vowel(440, 1020, 2240)),),
    "UW": ((0.15, _vowel(300, 870, 2240)),),
    "AH": ((0.11, _vowel(640, 1190, 2390)),),
    "ER": ((0.14, _vowel(490, 1350, 1690)),),
    "AX": ((0.07, _vowel(500, 1400, 2400)),),
    "EY": ((0.08, _vowel(480, 2000, 2550)), (0.08, _vowel(330, 2200, 2700))),
    "AY": ((0.10, _vowel(710, 1150, 2450)), (0.08, _vowel(350, 2050, 2600))),
    "OY": ((0.09, _vowel(550, 850, 2400)), (0.09, _vowel(350, 2000, 2500))),
    "AW": ((0.10, _vowel(730, 1200, 2400)), (0.08, _vowel(400, 950, 2300))),
    "OW": ((0.09, _vowel(540, 950, 2350)), (0.08, _vowel(380, 850, 2250))),
    "W": ((0.07, _soft(300, 610, 2200, 0.7)),),
    "Y": ((0.06, _soft(260, 2200, 3000, 0.7)),),
    "R": ((0.07, _soft(330, 1060, 1380, 0.7)),),
    "L": ((0.07, _soft(360, 1050, 2700, 0.7)),),
    "M": ((0.08, _soft(250, 1000, 2200, 0.4)),),
    "N": ((0.07, _soft(250, 1500, 2500, 0.4)),),
    "NG": ((0.08, _soft(250, 2000, 2700, 0.4)),),
    "HH": ((0.07, Target(500, 1500, 2500, 0.0, 0.35, 0.0, 3000, 1000)),),
    "S": ((0.11, _noise(1500, 0.30, 6500, 1800)),),
    "Z": ((0.08, _noise(1500, 0.20, 6500, 1800, 0.3)),),
    "SH": ((0.11, _noise(1800, 0.32, 3400, 1200)),),
    "ZH": ((0.08, _noise(1800, 0.20, 3400, 1200, 0.3)),),
    "F": ((0.10, _noise(1000, 0.10, 7000, 5000)),),
    "V": ((0.06, _noise(1000, 0.05, 7000, 5000, 0.4)),),
    "TH": ((0.09, _noise(1400, 0.08, 8000, 4000)),),
    "DH": ((0.05, _noise(1400, 0.04, 8000, 4000, 0.4)),),
    "P": ((0.06, SILENCE), (0.015, _noise(900, 0.25, 1000, 900)),
          (0.03, Target(400, 1000, 2300, 0.0, 0.2, 0.0, 3000, 1000))),
    "T": ((0.05, SILENCE), (0.015, _noise(1700, 0.40, 4500, 2000)),
          (0.03, Target(400, 1700, 2600, 0.0, 0.2, 0.0, 3000, 1000))),
    "K": ((0.05, SILENCE), (0.020, _noise(1900, 0.40, 2200, 700)),
          (0.03, Target(400, 1900, 2500, 0.0, 0.2, 0.0, 3000, 1000))),
    "B": ((0.05, _soft(200, 900, 2200, 0.15)), (0.010, _noise(900, 0.15, 1000, 900, 0.5))),
    "D": ((0.05, _soft(200, 1700, 2600, 0.15)), (0.010, _noise(1700, 0.20, 4000, 2000, 0.5))),
    "G": ((0.05, _soft(200, 1900, 2500, 0.15)), (0.015, _noise(1900, 0.20, 2200, 700, 0.5))),
    "CH": ((0.05, SILENCE), (0.09, _noise(1800, 0.36, 3600, 1400))),
    "JH": ((0.04, _soft(200, 1800, 2500, 0.15)), (0.07, _noise(1800, 0.24, 3400, 1400, 0.3))),
}  # fmt: skip


def _smooth(track: Array, frames: int) -> Array:
    """Moving average along the first axis; the ends are held."""
    padded = np.pad(track, ((frames // 2, frames - 1 - frames // 2), (0, 0)), mode="edge")
    total = np.cumsum(np.vstack((np.zeros((1, track.shape[1])), padded)), axis=0)
    averages: Array = (total[frames:] - total[:-frames]) / frames
    return averages


def _poles(frequency: Array, width: Array | float, delay: NDArray[Any]) -> NDArray[Any]:
    """Inverse response of a resonator of two poles, 1 at 0 Hz: [frames, 1] Hz to [frames, bins]."""
    radius = np.exp(-np.pi * np.asarray(width) / SAMPLE_RATE)
    b = 2 * radius * np.cos(2 * np.pi * frequency / SAMPLE_RATE)
    c = -(radius**2)
    gain = 1 / (1 - b - c)
    # float32 scalars keep the arithmetic in complex64.
    first, second = (np.float32(-x * gain) for x in (b, c))
    inverse: NDArray[Any] = np.float32(gain) + delay * (first + second * delay)
    return inverse


def _source(pitch: Array, voice: Array, samples: int) -> Array:
    """One pulse for each period of the pitch, split between the two samples it falls between."""
    at = np.arange(samples) / HOP
    frames = np.arange(len(pitch))
    phase = np.cumsum(np.interp(at, frames, pitch) / SAMPLE_RATE)
    turns = np.floor(phase)
    starts = np.flatnonzero(np.diff(turns, prepend=0.0) > 0)
    step = np.interp(starts / HOP, frames, pitch) / SAMPLE_RATE
    late = np.clip((phase[starts] - turns[starts]) / step, 0.0, 1.0)
    loud = np.interp(starts / HOP, frames, voice) / np.sqrt(step)  # equal power at any pitch
    made: Array = np.zeros(samples + 1)
    np.add.at(made, starts + 1, loud * (1 - late))
    np.add.at(made, starts, loud * late)
    return made[:samples]


def synthesize(segments: list[Segment], *, seed: int, formant_scale: float = 1.0) -> Array:
    """The sound of some segments: float64 samples in (-1, 1) at 24 kHz.

    `formant_scale` above 1 is a shorter vocal tract, as women and children have. `seed` chooses
    the noise. No segments give no samples.
    """
    ends = np.round(np.cumsum([s.seconds for s in segments]) * SAMPLE_RATE / HOP).astype(int)
    total = int(ends[-1]) if len(ends) else 0
    if total == 0:
        return np.zeros(0)
    held = np.diff(ends, prepend=0)
    targets = np.repeat(np.array([s.target for s in segments], dtype=np.float64), held, axis=0)
    pitch = np.repeat(np.array([s.pitch for s in segments], dtype=np.float64), held)
    known = np.flatnonzero(pitch > 0)
    frames = np.arange(total)
    pitch = np.interp(frames, known, pitch[known]) if len(known) else np.full(total, 100.0)
    pitch = _smooth(pitch[:, None], min(7, total))[:, 0]
    formants = _smooth(targets[:, :3], min(5, total)) * formant_scale
    levels = _smooth(targets[:, 3:6], min(3, total))
    samples = total * HOP
    noise = np.random.default_rng(seed).standard_normal(samples)
    voiced = _source(pitch, levels[:, 0], samples)
    lead = _WINDOW // 2
    padded = [np.pad(signal, (lead, _WINDOW)) for signal in (voiced, noise)]
    made: Array = np.zeros(samples + lead + _LENGTH + _WINDOW)
    for first in range(0, total, _BLOCK):
        rows = slice(first, min(first + _BLOCK, total))
        sound = _filtered(padded, first, formants[rows], levels[rows], targets[rows, 6:])
        for i, frame in enumerate(sound):
            start = (first + i) * HOP
            made[start : start + _LENGTH] += frame
    # tanh keeps what is loud from being cut off.
    return np.tanh(_GAIN * made[lead : lead + samples])


def _filtered(
    sources: list[Array], first: int, formants: Array, levels: Array, hiss: Array
) -> Array:
    """Frames of sound, [frames, transform length], of the sources from frame `first` on."""
    count = len(formants)
    window = np.hanning(_WINDOW + 1)[:-1]
    index = (first + np.arange(count))[:, None] * HOP + np.arange(_WINDOW)
    voiced, noise = (np.fft.rfft(source[index] * window, _LENGTH, axis=1) for source in sources)
    delay = np.exp(-2j * np.pi * np.arange(_LENGTH // 2 + 1) / _LENGTH)[None, :]
    delay = delay.astype(np.complex64)
    tract = np.ones((count, delay.shape[1]), dtype=np.complex64)
    for i, width in enumerate(_BANDWIDTHS):
        tract *= _poles(formants[:, i : i + 1], width, delay)
    for frequency, width in _UPPER:
        tract *= _poles(np.array([[frequency]]), width, delay)
    np.reciprocal(tract, out=tract)
    # The glottis falls by 12 dB per octave and the lips lift by 6: together one pole.
    voiced *= 0.05 / (1 - 0.95 * delay)
    own = 1 / _poles(hiss[:, :1], hiss[:, 1:], delay)
    own /= np.abs(own).max(axis=1, keepdims=True)
    spectrum = tract * (voiced + 0.15 * levels[:, 1:2] * noise)
    spectrum += own * noise * levels[:, 2:3] * 0.35
    frames: Array = np.fft.irfft(spectrum, _LENGTH, axis=1)
    return frames
