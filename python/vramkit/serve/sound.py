"""Samples to 16-bit sound: WAV files and their parts."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

BITS = 16


def pcm16(samples: Tensor) -> bytes:
    """Float samples as little-endian 16-bit integers; what exceeds (-1, 1) is cut off.

    Raises ValueError for NaN or infinity.
    """
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("the sound holds NaN or infinity")
    scaled = (samples.detach().float().cpu().reshape(-1) * 32767).round().clamp(-32768, 32767)
    return scaled.to(torch.int16).numpy().astype("<i2").tobytes()


def wav_header(data_bytes: int, sample_rate: int) -> bytes:
    """The 44 bytes before the samples of a mono 16-bit WAV file.

    >>> len(wav_header(0, 24000))
    44
    """
    width = BITS // 8
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF", 36 + data_bytes, b"WAVE",
        b"fmt ", 16, 1, 1, sample_rate, sample_rate * width, width, BITS,
        b"data", data_bytes,
    )  # fmt: skip


def wav(data: bytes, sample_rate: int) -> bytes:
    """A mono 16-bit WAV file of these samples."""
    return wav_header(len(data), sample_rate) + data
