"""Sound files: WAV by the standard library, MP3 where an encoder is installed."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import wave
from pathlib import Path

import torch
from torch import Tensor


def mp3_encoder() -> str | None:
    """Which encoder of MP3 is there: "lameenc", "ffmpeg", or None."""
    if importlib.util.find_spec("lameenc") is not None:
        return "lameenc"
    return "ffmpeg" if shutil.which("ffmpeg") else None


def pcm(sound: Tensor) -> bytes:
    """16-bit samples, channels interleaved, of sound in [-1, 1], [channels, samples]."""
    if not bool(torch.isfinite(sound).all()):
        raise ValueError("the sound holds NaN or infinity")
    return (sound.clamp(-1, 1) * 32767).round().to(torch.int16).t().contiguous().numpy().tobytes()


def save_sound(path: str | Path, sound: Tensor, rate: int) -> Path:
    """Write [channels, samples] by the ending of `path`: .wav or .mp3.

    Raises ValueError for another ending, and for .mp3 without an encoder.
    """
    target = Path(path)
    kind = target.suffix.lower()
    if kind == ".wav":
        with wave.open(str(target), "wb") as file:
            file.setnchannels(sound.shape[0])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(pcm(sound))
    elif kind == ".mp3":
        target.write_bytes(_mp3(sound, rate))
    else:
        raise ValueError(f"sound is saved as .wav or .mp3, not {target.name!r}")
    return target


def _mp3(sound: Tensor, rate: int) -> bytes:
    found = mp3_encoder()
    channels = sound.shape[0]
    if found == "lameenc":
        encoder = importlib.import_module("lameenc").Encoder()
        encoder.set_bit_rate(192)
        encoder.set_in_sample_rate(rate)
        encoder.set_channels(channels)
        return bytes(encoder.encode(pcm(sound)) + encoder.flush())
    if found == "ffmpeg":
        given = ["-f", "s16le", "-ar", str(rate), "-ac", str(channels), "-i", "pipe:0"]
        command = ["ffmpeg", "-v", "error", *given, "-b:a", "192k", "-f", "mp3", "pipe:1"]
        return subprocess.run(command, input=pcm(sound), capture_output=True, check=True).stdout
    raise ValueError("no encoder of MP3 is installed: pip install lameenc, or save as .wav")
