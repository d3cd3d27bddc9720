"""Sounds and images in a page: waveforms, spectrograms and pictures beside each other.

Pictures are PNG files in the page, written here: the format needs no more than zlib.
"""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape
from itertools import pairwise

import torch
from torch import Tensor

from ..media_quality import FLOOR_DB, spectra

STYLE = (
    ".side{display:grid;grid-template-columns:repeat(auto-fit,minmax(16rem,1fr));gap:1rem}"
    ".side img{width:100%;display:block;image-rendering:pixelated;margin-bottom:.3rem}"
    ".wave svg{display:block;width:100%;height:6rem;background:var(--panel);"
    "border:1px solid var(--rule)}.wave path{fill:var(--line);stroke:var(--line);stroke-width:.6}"
    ".wave img{height:12rem;margin-top:.3rem}"
)
_COLUMNS = 800  # of a waveform and of a spectrogram
_ROWS = 256  # of a spectrogram
_LARGEST = 1200  # pixels of a picture's side; what is larger is averaged down
# Black over purple and orange to pale yellow, of even steps of lightness: quiet to loud.
_STOPS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def png(image: Tensor) -> bytes:
    """A PNG file of [1, 3 or 4, height, width] values from 0 to 1, rounded to 8 bits.

    >>> png(torch.zeros(3, 2, 2))[1:4]
    b'PNG'
    """
    raw = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, channels = raw.shape
    colour = {1: 0, 3: 2, 4: 6}[channels]
    lines = torch.cat([raw.new_zeros(height, 1), raw.reshape(height, -1)], dim=1)

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    pixels = zlib.compress(lines.numpy().tobytes(), 6)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def picture(image: Tensor, label: str) -> str:
    """An `img` element that holds [1, 3 or 4, height, width] from 0 to 1 as it is."""
    data = base64.b64encode(png(image)).decode()
    return f'<img alt="{escape(label)}" src="data:image/png;base64,{data}">'


def image_pair(reference: Tensor, image: Tensor, labels: tuple[str, str], times: int = 10) -> str:
    """Two images [channels, height, width] from 0 to 1, and what differs, enlarged."""
    colours = slice(0, 3 if reference.shape[0] >= 3 else 1)
    apart = (image[colours].float() - reference[colours].float()) * times + 0.5
    figures = [
        _figure(picture(_smaller(reference), labels[0]), labels[0]),
        _figure(picture(_smaller(image), labels[1]), labels[1]),
        _figure(
            picture(_smaller(apart), f"difference, {times} times"),
            f"The second minus the first, {times} times enlarged; grey where they agree",
        ),
    ]
    return f'<div class="side">{"".join(figures)}</div>'


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _smaller(image: Tensor) -> Tensor:
    """The image, averaged down where a side is longer than a page can show."""
    height, width = image.shape[-2:]
    share = _LARGEST / max(height, width)
    plain = image.float()
    if share >= 1:
        return plain
    size = (max(1, round(height * share)), max(1, round(width * share)))
    return torch.nn.functional.interpolate(plain[None], size=size, mode="area")[0]


def sound_pair(reference: Tensor, sound: Tensor, sample_rate: int, labels: tuple[str, str]) -> str:
    """Waveforms and spectrograms of two sounds [channels, samples], on one scale."""
    samples = max(reference.shape[1], sound.shape[1])
    top = max(float(reference.abs().max()), float(sound.abs().max()), 1e-9)
    figures = []
    for one, label in ((reference, labels[0]), (sound, labels[1])):
        seconds = one.shape[1] / sample_rate
        caption = f"{label}: {seconds:.3f} s; spectrum to {sample_rate / 2000:g} kHz"
        wave = waveform(one.float().mean(dim=0), samples, top)
        image = picture(spectrogram(one, samples), f"spectrogram of {label}")
        figures.append(f'<figure class="wave">{wave}{image}<figcaption>{escape(caption)}'
                       "</figcaption></figure>")  # fmt: skip
    return (
        f'<div class="side">{"".join(figures)}</div><p class="lead">Waveforms to {top:.3g} of full '
        f"scale; spectrograms from {FLOOR_DB:g} dB (black) to 0 dB of a sine at full scale.</p>"
    )


def waveform(sound: Tensor, samples: int, top: float) -> str:
    """Least and largest value of each column, of a plot that is `samples` wide and `top` high."""
    columns = min(_COLUMNS, samples)
    edges = [round(i * samples / columns) for i in range(columns + 1)]
    upper, lower = [], []
    for i, (a, b) in enumerate(pairwise(edges)):
        part = sound[a:b]
        if part.numel():
            x = i * _COLUMNS / columns
            upper.append(f"{x:.1f} {50 - 48 * float(part.max()) / top:.1f}")
            lower.append(f"{x:.1f} {50 - 48 * float(part.min()) / top:.1f}")
    path = "M" + "L".join(upper + lower[::-1]) + "Z"
    return (
        f'<svg viewBox="0 0 {_COLUMNS} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="waveform"><path d="{path}"/></svg>'
    )


def spectrogram(sound: Tensor, samples: int, frame: int = 1024) -> Tensor:
    """[3, rows, columns] of the mean of channels, low frequencies below, silence to the end."""
    mono = sound.float().mean(dim=0)
    hop = max(frame // 4, -(-samples // _COLUMNS))
    mono = torch.nn.functional.pad(mono, (0, samples - mono.numel()))
    power = torch.cat(list(spectra(mono, frame, hop, FLOOR_DB))).float()
    level = (1 - power / FLOOR_DB).clamp(0, 1).t().flip(0)
    level = torch.nn.functional.adaptive_max_pool2d(level[None], (_ROWS, level.shape[1]))[0]
    stops = torch.tensor(_STOPS, dtype=torch.float32) / 255
    at = level * (len(_STOPS) - 1)
    below = at.floor().clamp(max=len(_STOPS) - 2).long()
    share = (at - below)[..., None]
    return (stops[below] * (1 - share) + stops[below + 1] * share).permute(2, 0, 1)
