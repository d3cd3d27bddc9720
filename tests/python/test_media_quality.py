"""SNR, spectral distance, PSNR, SSIM and the readers of files, each against its definition."""

from __future__ import annotations

import io
import math
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOAT64_SUM
from vramkit.media_files import kind_of, read_image, read_wav, same_channels
from vramkit.media_quality import (
    compare_images,
    compare_sounds,
    find_lag,
    log_spectral_distance,
    psnr,
    snr,
    ssim,
)
from vramkit.report.media import png

RATE = 24000


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * 0.1


def direct_snr(r: np.ndarray[Any, Any], s: np.ndarray[Any, Any]) -> float:
    return float(10 * np.log10(np.sum(r**2) / np.sum((s - r) ** 2)))


def direct_distance(r: np.ndarray[Any, Any], s: np.ndarray[Any, Any], frame: int, hop: int,
                    floor: float) -> float:  # fmt: skip
    """By the definition, frame by frame, with numpy's transform and SciPy's window."""
    from scipy.signal import get_window

    window = get_window("hann", frame)
    found = []
    for a, b in zip(np.atleast_2d(r), np.atleast_2d(s), strict=True):
        begin = 0
        while True:
            logs = []
            for x in (a, b):
                part = np.zeros(frame)
                piece = x[begin : begin + frame]
                part[: len(piece)] = piece
                power = np.abs(np.fft.rfft(part * window)) ** 2 / (window.sum() / 2) ** 2
                logs.append(10 * np.log10(np.maximum(power, 10 ** (floor / 10))))
            found.append(np.sqrt(np.mean((logs[0] - logs[1]) ** 2)))
            begin += hop
            if begin - hop + frame >= a.shape[-1]:
                break
    return float(np.mean(found))


def direct_ssim(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], top: float = 1.0) -> float:
    """Wang et al. 2004, equations 13 to 16, window by window."""
    height, width = a.shape
    side = min(11, height, width)
    at = np.arange(side) - (side - 1) / 2
    weights = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i in range(height - side + 1):
        for j in range(width - side + 1):
            x, y = a[i : i + side, j : j + side], b[i : i + side, j : j + side]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            both = (weights * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
            values.append(
                (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
    return float(np.mean(values))


# --- sounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (777,), (2, 5001), (1, 1_200_001)])
def test_snr_is_its_definition(shape: tuple[int, ...]) -> None:
    r = noise(*shape)
    s = r + 0.01 * noise(*shape, seed=2)
    expected = direct_snr(r.numpy(), s.numpy())
    assert snr(r, s) == pytest.approx(expected, rel=FLOAT64_SUM * 100)
    assert snr(r.numpy(), s.numpy()) == snr(r, s)
    assert snr(r, r) == math.inf


def test_silence_and_integers() -> None:
    zero, loud = torch.zeros(100), torch.ones(100)
    assert snr(zero, zero) == math.inf
    assert snr(zero, loud) == -math.inf
    assert snr(loud, zero) == 0.0
    whole = torch.arange(-50, 50, dtype=torch.int16)
    assert snr(whole, whole.double() / 2**15) == math.inf
    assert log_spectral_distance(zero, zero) == 0.0
    assert log_spectral_distance(zero, zero + 1e-7) == 0.0  # under the floor


@pytest.mark.parametrize(
    ("shape", "frame", "hop"),
    [((5000,), 1024, None), ((2, 3001), 256, 100), ((7,), 64, 16), ((1024,), 1024, 256),
     ((1025,), 1024, 256), ((1, 300_000), 512, 128)],
)  # fmt: skip
def test_log_spectral_distance_is_its_definition(
    shape: tuple[int, ...], frame: int, hop: int | None
) -> None:
    r = noise(*shape)
    s = r + 0.1 * noise(*shape, seed=2)
    expected = direct_distance(r.numpy(), s.numpy(), frame, hop or frame // 4, -100.0)
    found = log_spectral_distance(r, s, frame=frame, hop=hop)
    # Logarithms of bins with little power enlarge the transforms' rounding.
    assert found == pytest.approx(expected, rel=1e-7)
    assert found > 0.1
    assert log_spectral_distance(r, r, frame=frame, hop=hop) == 0.0


def test_half_as_loud_is_six_decibels() -> None:
    tone = torch.sin(torch.arange(RATE) * 2 * math.pi * 440 / RATE)
    expected = 20 * math.log10(2)
    assert log_spectral_distance(tone, tone / 2, floor_db=-1000) == pytest.approx(expected)
    assert snr(tone, tone / 2) == pytest.approx(expected)


@pytest.mark.parametrize("lag", [0, 1, -1, 240, -997])
def test_the_lag_is_found_and_taken_out(lag: int) -> None:
    base = noise(2, 9000)
    late = torch.cat([noise(2, lag, seed=5), base], dim=1) if lag > 0 else base[:, -lag:]
    assert find_lag(base, late, 1000) == (lag, pytest.approx(1.0, abs=0.06))
    found = compare_sounds(base, late, RATE, max_lag=0.05)
    assert found.lag_samples == lag
    assert found.aligned_samples == min(9000, 9000 + lag)
    assert found.aligned_snr_db == math.inf
    assert found.aligned_log_spectral_distance_db == 0.0
    assert (found.snr_db is None) == (lag != 0)
    assert found.identical == (lag == 0)
    assert f"aligned by {lag} samples" in str(found)


def test_the_lag_is_the_best_of_a_direct_search() -> None:
    a, b = noise(300).numpy(), noise(257, seed=3).numpy()
    b[20:] += 0.5 * a[: len(b) - 20]
    best, where = -1.0, 0
    a, b = a - a.mean(), b - b.mean()
    for lag in range(-100, 101):
        x, y = a[max(0, -lag) :], b[max(0, lag) :]
        x, y = x[: len(y)], y[: len(x)]
        value = float(x @ y / np.sqrt((x @ x) * (y @ y)))
        if value > best:
            best, where = value, lag
    assert where == 20
    lag, correlation = find_lag(torch.from_numpy(a), torch.from_numpy(b), 100)
    assert (lag, correlation) == (where, pytest.approx(best, rel=1e-9))


def test_a_periodic_sound_has_the_smallest_lag() -> None:
    tone = torch.sin(torch.arange(4800) * 2 * math.pi / 48)
    assert find_lag(tone, tone, 480) == (0, pytest.approx(1.0))
    assert find_lag(torch.zeros(50), noise(50), 20) == (0, 0.0)
    assert find_lag(noise(1), noise(1), 20) == (0, 0.0)


def test_a_delay_in_the_middle_of_a_long_sound() -> None:
    base = noise(1, 1_500_000)
    late = torch.cat([torch.zeros(1, 333).double(), base], dim=1)
    found = compare_sounds(base, late, 48000)
    assert (found.lag_samples, found.aligned_snr_db) == (333, math.inf)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (torch.zeros(0), torch.zeros(0), "no samples"),
        (torch.zeros(5), torch.zeros(6), "6 samples, the reference 5"),
        (torch.zeros(2, 5), torch.zeros(1, 5), "1 channels, the reference 2"),
        (torch.zeros(5), torch.tensor([0, 0, math.nan, 0, math.inf]), r"NaN or infinity \(2 of 5"),
        (torch.zeros(500, 2), torch.zeros(500, 2), "transpose"),
        (torch.zeros(1, 1, 5), torch.zeros(5), r"\[channels, samples\]"),
        (torch.zeros(5, dtype=torch.int64), torch.zeros(5), "float, int16 or int32"),
    ],
)
def test_bad_sounds(first: torch.Tensor, second: torch.Tensor, text: str) -> None:
    for figure in (snr, log_spectral_distance):
        with pytest.raises(ValueError, match=text):
            figure(first, second)
    with pytest.raises(ValueError, match="sample rate"):
        compare_sounds(torch.ones(5), torch.ones(5), 0)
    with pytest.raises(ValueError, match="frame"):
        log_spectral_distance(torch.ones(5), torch.ones(5), frame=1)
    with pytest.raises(ValueError, match="largest lag"):
        find_lag(torch.ones(5), torch.ones(5), -1)


def test_figures_as_plain_data() -> None:
    found = compare_sounds(torch.zeros(99), torch.ones(99), RATE).to_dict()
    assert found["snr_db"] is None
    assert found["reference_level_db"] is None
    assert found["level_db"] == 0.0
    assert found["kind"] == "sound"
    image = compare_images(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4))
    assert image.identical
    assert image.to_dict()["psnr_db"] is None
    assert (image.ssim, image.relative_l2, image.different_fraction) == (1.0, 0.0, 0.0)


# --- WAV files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "int16", "int24", "int32", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_every_coding_against_scipy(kind: str, channels: int, tmp_path: Path) -> None:
    from scipy.io import wavfile

    generator = np.random.default_rng(0)
    true = generator.uniform(-1, 1, (101, channels))
    file = tmp_path / "a.wav"
    if kind == "int24":  # SciPy reads 24 bits, but writes none
        whole = (true * (2**23 - 1)).astype("<i4")
        raw = whole.reshape(-1, 1).view("u1").reshape(-1, 4)[:, :3].tobytes()
        with wave.open(str(file), "wb") as opened:
            opened.setparams((channels, 3, RATE, 101, "NONE", ""))
            opened.writeframes(raw)
    elif kind.startswith("float"):
        wavfile.write(file, RATE, true.astype(kind))
    else:
        top = {"uint8": 127, "int16": 2**15 - 1, "int32": 2**31 - 1}[kind]
        whole = np.round(true * top) + (128 if kind == "uint8" else 0)
        wavfile.write(file, RATE, whole.astype(kind))
    rate, expected = wavfile.read(file)
    scale = {"uint8": 2**7, "int16": 2**15, "int24": 2**31, "int32": 2**31}.get(kind, 1)
    expected = (expected.astype("f8") - (128 if kind == "uint8" else 0)) / scale
    sound = read_wav(file)
    assert (sound.sample_rate, sound.bits) == (rate, int(kind.lstrip("uintfloa")))
    assert sound.coding == ("float" if kind.startswith("float") else "pcm")
    assert np.array_equal(sound.samples.double().numpy(), expected.reshape(101, -1).T)
    assert sound.seconds == 101 / RATE
    assert kind_of(file) == "sound"


def chunks(*parts: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in parts
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body


def form(coding: int = 1, channels: int = 1, rate: int = RATE, bits: int = 16) -> bytes:
    width = channels * bits // 8
    return struct.pack("<HHIIHH", coding, channels, rate, rate * width, width, bits)


DATA = struct.pack("<4h", 1, -2, 3, -32768)


def test_other_chunks_and_headers(tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    guid = struct.pack("<HHIH", 22, 16, 4, 1) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    extensible = form(0xFFFE) + guid
    for written in (
        chunks((b"LIST", b"odd"), (b"fmt ", form()), (b"fact", b"1234"), (b"data", DATA)),
        chunks((b"fmt ", extensible), (b"data", DATA), (b"LIST", b"after")),
        # As a stream begins whose length is not known yet.
        chunks((b"fmt ", form()), (b"data", DATA)).replace(
            b"data" + struct.pack("<I", 8), b"data\xff\xff\xff\xff"
        ),
    ):
        file.write_bytes(written)
        expected = torch.tensor([[1.0, -2.0, 3.0, -32768.0]]) / 32768
        assert torch.equal(read_wav(file).samples, expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 3, 0xFFFE]),
    st.sampled_from([8, 16, 24, 32, 64]),
    st.integers(0, 3),
    st.binary(max_size=40),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4),
    st.integers(0, 90),
)
def test_damaged_wav_files_are_errors_or_sounds(
    tmp_path_factory: pytest.TempPathFactory,
    coding: int,
    bits: int,
    channels: int,
    data: bytes,
    changes: list[tuple[int, int]],
    length: int,
) -> None:
    content = bytearray(chunks((b"fmt ", form(coding, channels, bits=bits)), (b"data", data)))
    for place, value in changes:
        if place < len(content):
            content[place] = value
    file = tmp_path_factory.getbasetemp() / "damaged.wav"
    file.write_bytes(content[:length] if changes else content)
    sound, said = None, ""
    try:
        sound = read_wav(file)
    except ValueError as error:
        said = str(error)
    assert (sound is None) == ("damaged.wav" in said)
    if sound is not None:
        assert sound.samples.numel() > 0
        assert sound.samples.dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "no WAV file"),
        (b"RIFF\0\0\0\0WEBP", "no WAV file"),
        (chunks((b"fmt ", form()), (b"data", DATA))[:-2], "cut off: 6 of 8 bytes"),
        (chunks((b"fmt ", form())), "no data chunk"),
        (chunks((b"data", DATA)), "before their format"),
        (chunks((b"fmt ", form()), (b"data", b"")), "no samples"),
        (chunks((b"fmt ", form(channels=3)), (b"data", DATA)), "within a sample"),
        (chunks((b"fmt ", form(coding=2)), (b"data", DATA)), "ADPCM"),
        (chunks((b"fmt ", form(coding=77)), (b"data", DATA)), "format 77"),
        (chunks((b"fmt ", form(bits=12)), (b"data", DATA)), "12 bits"),
        (chunks((b"fmt ", form(rate=0)), (b"data", DATA)), "0 Hz"),
        (chunks((b"fmt ", form(channels=0)), (b"data", DATA)), "0 channels"),
        (chunks((b"fmt ", form()))[:30], "cut off"),
    ],
)
def test_bad_wav_files(content: bytes, text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_wav(file)


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(13, 12), (3, 11, 17), (1, 5, 40), (2, 1, 1), (3, 300, 257)])
def test_images_by_their_definitions(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(*shape, generator=generator, dtype=torch.float64)
    b = (a + 0.05 * torch.randn(*shape, generator=generator)).clamp(0, 1)
    x, y = a.numpy(), b.numpy()
    assert psnr(a, b) == pytest.approx(float(10 * np.log10(1 / np.mean((x - y) ** 2))), rel=1e-12)
    planes = list(zip(x.reshape(-1, *shape[-2:]), y.reshape(-1, *shape[-2:]), strict=True))
    if shape[-1] < 100:
        expected = np.mean([direct_ssim(p, q) for p, q in planes])
        assert ssim(a, b) == pytest.approx(float(expected), rel=1e-9)
        top = np.mean([direct_ssim(255 * p, 255 * q, 255.0) for p, q in planes])
        assert ssim(255 * a, 255 * b, data_range=255) == pytest.approx(float(top), rel=1e-9)
        assert top == pytest.approx(float(expected), rel=1e-9)
    else:  # strips: as one convolution over the whole image
        from scipy.ndimage import correlate1d

        at = np.arange(11) - 5
        line = np.exp(-(at**2) / 4.5) / np.exp(-(at**2) / 4.5).sum()
        found = []
        for p, q in planes:

            def mean(v: Any) -> Any:
                return correlate1d(correlate1d(v, line, 0), line, 1)[5:-5, 5:-5]

            mp, mq = mean(p), mean(q)
            vp, vq, both = mean(p * p) - mp**2, mean(q * q) - mq**2, mean(p * q) - mp * mq
            found.append(((2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                          / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))).mean())  # fmt: skip
        assert ssim(a, b) == pytest.approx(float(np.mean(found)), rel=1e-9)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)


def test_pixels_of_8_and_16_bits() -> None:
    a = torch.randint(0, 256, (3, 20, 21), dtype=torch.uint8)
    b = a.clone()
    b[0, 3, 4] ^= 16
    plain = psnr(a.double() / 255, b.double() / 255)
    assert psnr(a, b) == plain == pytest.approx(10 * math.log10(255**2 * 1260 / 256))
    assert psnr(a.double(), b.double(), data_range=255) == pytest.approx(plain, rel=1e-12)
    wide = (a.to(torch.int32) * 257).to(torch.uint16)
    assert psnr(a, wide) == math.inf
    found = compare_images(a, b)
    assert found.different_fraction == 1 / 420
    assert found.max_error == pytest.approx(16 / 255, rel=1e-12)
    expected = 16 / float(a.double().norm())
    assert found.relative_l2 == pytest.approx(expected, rel=FLOAT64_SUM)
    assert (found.width, found.height, found.channels) == (21, 20, 3)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (torch.zeros(3, 4, 5), torch.zeros(3, 5, 4), r"\[3, 5, 4\], the reference \[3, 4, 5\]"),
        (torch.zeros(3, 0, 5), torch.zeros(3, 0, 5), "with pixels"),
        (torch.zeros(5), torch.zeros(5), "height, width"),
        (torch.zeros(4, 4), torch.full((4, 4), math.nan), r"NaN or infinity \(16 of 16"),
        (torch.zeros(8, 8, 3), torch.zeros(8, 8, 3), "channels first"),
        (torch.full((4, 4), 255.0), torch.zeros(4, 4), "data_range"),
        (torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4), "uint8 or uint16"),
    ],
)
def test_bad_images(first: torch.Tensor, second: torch.Tensor, text: str) -> None:
    for figure in (psnr, ssim, compare_images):
        with pytest.raises(ValueError, match=text):
            figure(first, second)
    with pytest.raises(ValueError, match="data_range"):
        psnr(torch.zeros(4, 4), torch.zeros(4, 4), data_range=0.0)


def test_image_files(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype="u1")
    file = tmp_path / "a.png"
    for mode, channels in (("L", 1), ("RGB", 3), ("RGBA", 4)):
        made = image.fromarray(pixels[..., 0] if mode == "L" else pixels[..., :channels])
        made.save(file)
        found = read_image(file)
        assert found.shape == (channels, 6, 9)
        assert np.array_equal(found.numpy(), np.moveaxis(np.atleast_3d(np.array(made)), -1, 0))
    made.convert("P").save(file)
    assert read_image(file).shape[0] in (3, 4)
    deep = np.arange(54, dtype="u2").reshape(6, 9) * 1000
    image.fromarray(deep).save(file)
    found = read_image(file)
    assert found.dtype == torch.uint16
    assert np.array_equal(found[0].numpy(), deep)
    turned = image.fromarray(pixels[..., :3])
    exif = image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    turned.save(file, exif=exif)
    assert np.array_equal(
        read_image(file).numpy(), np.moveaxis(np.rot90(pixels[..., :3], -1), -1, 0)
    )
    assert kind_of(file) == "image"
    for content in (b"", b"not an image", file.read_bytes()[:60]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="image"):
            read_image(file)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "b.png")


def test_grey_colour_and_transparency_on_one_scale() -> None:
    grey = torch.randint(0, 256, (1, 4, 5), dtype=torch.uint8)
    colour, clear = grey.expand(3, -1, -1), torch.full((1, 4, 5), 255, dtype=torch.uint8)
    a, b = same_channels(grey, torch.cat([colour, clear]))
    assert torch.equal(a, b)
    a, b = same_channels(grey, colour)
    assert torch.equal(a, b)
    wide = (grey.to(torch.int32) * 257).to(torch.uint16)
    a, b = same_channels(wide, grey)
    assert a.dtype == b.dtype == torch.uint16
    assert torch.equal(a, b)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_pages(channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    made = torch.rand(channels, 7, 5)
    opened = np.atleast_3d(np.array(image.open(io.BytesIO(png(made)))))
    expected = (made * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(opened, expected)


def test_what_a_file_holds(tmp_path: Path) -> None:
    assert kind_of(tmp_path) == "model"
    assert kind_of("package.module:build") == "model"
    (tmp_path / "a.safetensors").write_bytes(b"x")
    assert kind_of(tmp_path / "a.safetensors") == "model"
    with pytest.raises(FileNotFoundError, match="nothing at"):
        kind_of(tmp_path / "nothing.wav")
    for head, text in (
        (b"", "empty"),
        (b"fLaC....", "FLAC"),
        (b"GGUF", "GGUF"),
        (b"PK\3\4....", "pickled"),
    ):
        (tmp_path / "b").write_bytes(head)
        with pytest.raises(ValueError, match=text):
            kind_of(tmp_path / "b")
