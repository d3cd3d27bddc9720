"""WAV files and images as tensors, and which kind of thing a file holds.

The standard library's `wave` reads no floating-point samples, nor, before Python 3.12, the header
that programs write for 24 bits and more; the format is short, so its chunks are read here.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sound", "kind_of", "read_image", "read_wav"]

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_CODINGS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x55: "MP3"}
_UNKNOWN_SIZE = 0xFFFFFFFF  # of a stream whose length was not known when its header was sent
_SOUNDS = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b"\xff\xfb": "MP3", b"\xff\xf3": "MP3"}


@dataclass(frozen=True)
class Sound:
    """A sound file's content.

    `samples` is [channels, samples] from -1 to 1, float32 (float64 where the file has 32-bit
    integers or 64-bit floats); `coding` is "pcm" or "float", with `bits` for each sample.
    """

    samples: Tensor
    sample_rate: int
    bits: int
    coding: str

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.samples.shape[1] / self.sample_rate


def read_wav(path: str | os.PathLike[str]) -> Sound:
    """The samples of a WAV file: 8, 16, 24 or 32 bits PCM, 32 or 64 bits float, any channels.

    PCM of n bits is divided by 2^(n-1). Raises ValueError for another coding, for a file that is
    cut off and for one that is no WAV file; OSError if the system refuses.
    """
    file = Path(path)
    data = file.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"{file} is no WAV file: it does not begin with RIFF and WAVE")
    form: tuple[int, ...] | None = None
    place = 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        begin = place + 8
        if name == b"fmt " and size >= 16:
            form = _format(file, data[begin : begin + size])
        elif name == b"data":
            if form is None:
                raise ValueError(f"{file}: its samples come before their format")
            if size == _UNKNOWN_SIZE:
                size = len(data) - begin
            if begin + size > len(data):
                raise ValueError(
                    f"{file} is cut off: {len(data) - begin} of {size} bytes of samples are there"
                )
            return _decode(file, memoryview(data)[begin : begin + size], form)
        place = begin + size + size % 2
    raise ValueError(f"{file} is cut off, or holds no samples: it has no data chunk")


def _format(file: Path, header: bytes) -> tuple[int, ...]:
    """(coding, channels, sample rate, bits) of a `fmt ` chunk."""
    if len(header) < 16:
        raise ValueError(f"{file} is cut off within its header")
    coding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", header)
    if coding == _EXTENSIBLE and len(header) >= 26:
        (coding,) = struct.unpack_from("<H", header, 24)
    known = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}
    if coding not in known:
        raise ValueError(
            f"{file} is coded as {_CODINGS.get(coding, f'format {coding}')}; PCM and floats are "
            "read: convert it, with `ffmpeg -i FILE -c:a pcm_s16le OUT.wav` for one"
        )
    if bits not in known[coding]:
        raise ValueError(f"{file} has samples of {bits} bits; {known[coding]} are read")
    if not channels or not rate:
        raise ValueError(f"{file} says that it has {channels} channels and {rate} Hz")
    return coding, channels, rate, bits


def _decode(file: Path, raw: memoryview, form: tuple[int, ...]) -> Sound:
    import numpy

    coding, channels, rate, bits = form
    width = bits // 8 * channels
    if len(raw) % width:
        raise ValueError(f"{file} is cut off within a sample: {len(raw)} bytes, {width} for each")
    if not len(raw):
        raise ValueError(f"{file} holds no samples")
    found: Any
    if coding == _FLOAT:
        found = numpy.frombuffer(raw, f"<f{bits // 8}").astype(f"f{bits // 8}")
    elif bits == 8:
        found = (numpy.frombuffer(raw, "u1").astype("f4") - 128) / 128
    elif bits == 24:
        # As the upper bytes of 32 bits, of which the sign is right then.
        wide = numpy.zeros((len(raw) // 3, 4), "u1")
        wide[:, 1:] = numpy.frombuffer(raw, "u1").reshape(-1, 3)
        found = (wide.view("<i4")[:, 0] >> 8).astype("f4") / 2**23
    else:
        kind = "f4" if bits == 16 else "f8"
        found = numpy.frombuffer(raw, f"<i{bits // 8}").astype(kind) / 2 ** (bits - 1)
    samples = torch.from_numpy(found).reshape(-1, channels).t().contiguous()
    return Sound(samples, rate, bits, "float" if coding == _FLOAT else "pcm")


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """An image as [channels, height, width] of uint8 (uint16 for 16-bit grey), by Pillow.

    One channel for grey, three for colours, four where there is transparency; turned as its
    orientation says. Raises ImportError without Pillow, ValueError for what is no image.
    """
    try:
        import numpy
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(f"images are read by Pillow ({error}): pip install pillow") from error
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                array = numpy.asarray(image).astype("uint16")
            else:
                array = numpy.asarray(image.convert(_mode(image)))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    found = torch.from_numpy(numpy.array(array))
    return found[None] if found.dim() == 2 else found.permute(2, 0, 1).contiguous()


def _mode(image: Any) -> str:
    """The nearest of L, RGB, RGBA."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return "RGBA"
    if image.mode in ("1", "L"):
        return "L"
    if image.mode in ("I", "F"):
        raise ValueError(
            f"images of mode {image.mode} have no largest value; store 8 or 16 bits for each pixel"
        )
    return "RGB"


def same_channels(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two images [channels, height, width] with the channels of the one that has more.

    Grey becomes equal colours, no transparency becomes full opacity. 8 bits become 16 where the
    other has them, so that both are on one scale exactly: 255 becomes 65535.
    """
    if first.dtype != second.dtype:
        first, second = (
            x if x.dtype == torch.uint16 else (x.to(torch.int32) * 257).to(torch.uint16)
            for x in (first, second)
        )
    most = max(first.shape[0], second.shape[0])
    return _widened(first, most), _widened(second, most)


def _widened(image: Tensor, channels: int) -> Tensor:
    if image.shape[0] == 1 and channels > 1:
        image = image.expand(3, -1, -1)
    if image.shape[0] == 3 and channels == 4:
        full = 65535 if image.dtype == torch.uint16 else 255
        opaque = torch.full((1, *image.shape[1:]), full, dtype=torch.int32).to(image.dtype)
        image = torch.cat([image, opaque])
    return image


def kind_of(path: str | os.PathLike[str]) -> str:
    """ "model", "sound" or "image": by what a file begins with.

    A folder, a safetensors file and `package.module:function` are models. Raises
    FileNotFoundError for what is not there, ValueError for files that are none of the three.
    """
    file = Path(path)
    if not file.exists():
        if re.fullmatch(r"[\w.]+:\w+", str(path)):
            return "model"
        raise FileNotFoundError(
            f"nothing at {os.fspath(path)!r}: give a checkpoint, package.module:function, a WAV "
            "file or an image"
        )
    if file.is_dir() or file.suffix == ".safetensors":
        return "model"
    with file.open("rb") as opened:
        head = opened.read(16)
    if not head:
        raise ValueError(f"{file} is empty")
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "sound"
    for mark, name in _SOUNDS.items():
        if head.startswith(mark):
            raise ValueError(f"{file} is {name}; decode it to WAV first: ffmpeg -i FILE OUT.wav")
    if head[:4] == b"GGUF":
        raise ValueError(f"{file} is GGUF, which is not read: compare what it was made from")
    if head[:2] == b"PK" or head[:2] == b"\x80\x02":
        raise ValueError(f"{file} is pickled, which is not read: save it as safetensors")
    return "image"
