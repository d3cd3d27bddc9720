"""How far a sound or an image lies from a reference: SNR, spectral distance, PSNR, SSIM.

Figures are computed in float64, a part at a time, so that they take little memory beside the sounds
and images themselves. Sounds are [samples] or [channels, samples], images [..., height, width];
both come as tensors or numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy

    Array = Tensor | numpy.ndarray[Any, Any]

__all__ = [
    "ImageComparison",
    "SoundComparison",
    "compare_images",
    "compare_sounds",
    "find_lag",
    "log_spectral_distance",
    "psnr",
    "snr",
    "ssim",
]

# The largest value of integer samples and pixels. Of sounds it is that of their negative side.
_SOUND_SCALES = {torch.int16: 2.0**15, torch.int32: 2.0**31}
_IMAGE_SCALES = {torch.bool: 1.0, torch.uint8: 255.0, torch.uint16: 65535.0}
_MANY_CHANNELS = 32  # more rows than this and than columns: samples and channels are exchanged

# Of Wang et al. 2004: a Gaussian window of 11 x 11 with 1.5 pixels, and two constants.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03

_FRAME = 1024
# Of the power of a sine at full scale. 16-bit rounding lies lower in each bin (about -125 dB), and
# so do differences that nobody hears.
FLOOR_DB = -100.0

# Elements worked on at once: a few float64 copies of as many stay under 20 MB.
_CHUNK = 1 << 19
# Samples that a lag is sought in: 44 seconds at 24 kHz.
_LAG_SAMPLES = 1 << 20
# Correlations that differ by less are equal but for the rounding of the transform.
_SAME_CORRELATION = 1e-9


@dataclass(frozen=True)
class SoundComparison:
    """A sound against a reference, as they are and with their delay taken out.

    `lag_samples` is by how much the sound comes after the reference, `correlation` what the two
    have in common at that lag (1: the same shape). The `aligned_` figures are of the
    `aligned_samples` samples that both then have. SNR is in dB, infinite where the sounds agree and
    minus infinity against silence; levels are of the root mean square, in dB of full scale.
    `snr_db` and `log_spectral_distance_db` are None where the lengths differ.
    """

    sample_rate: int
    channels: int
    reference_samples: int
    samples: int
    reference_level_db: float
    level_db: float
    identical: bool
    snr_db: float | None
    log_spectral_distance_db: float | None
    lag_samples: int
    correlation: float
    aligned_samples: int
    aligned_snr_db: float
    aligned_log_spectral_distance_db: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data. JSON has no infinity: such a number is None here."""
        return {"kind": "sound", **{key: _plain(value) for key, value in asdict(self).items()}}

    def __str__(self) -> str:
        at = f"{self.lag_samples / self.sample_rate:+.4f} s"
        first = "lengths differ"
        if self.snr_db is not None and self.log_spectral_distance_db is not None:
            first = (
                f"SNR {self.snr_db:.2f} dB, log-spectral distance "
                f"{self.log_spectral_distance_db:.3f} dB"
            )
        return (
            f"{first}; aligned by {self.lag_samples} samples ({at}, correlation "
            f"{self.correlation:.4f}): SNR {self.aligned_snr_db:.2f} dB, log-spectral distance "
            f"{self.aligned_log_spectral_distance_db:.3f} dB"
        )


@dataclass(frozen=True)
class ImageComparison:
    """An image against a reference.

    PSNR is in dB and infinite where the images agree; SSIM is 1 there; `max_error` is the largest
    difference of two values from 0 to 1; `different_fraction` is the share of pixels that differ.
    """

    width: int
    height: int
    channels: int
    identical: bool
    psnr_db: float
    ssim: float
    relative_l2: float
    max_error: float
    different_fraction: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data. JSON has no infinity: such a number is None here."""
        return {"kind": "image", **{key: _plain(value) for key, value in asdict(self).items()}}

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr_db:.2f} dB, SSIM {self.ssim:.5f}, relative L2 "
            f"{self.relative_l2:.4g}, largest difference {self.max_error:.4g}, "
            f"{self.different_fraction:.1%} of the pixels differ"
        )


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- sounds -------------------------------------------------------------------------------------


def snr(reference: Array, signal: Array) -> float:
    """Signal to noise ratio in dB: 10 log10(sum r^2 / sum (s - r)^2).

    Args:
        reference: [samples] or [channels, samples]; floats from -1 to 1, or int16 or int32.
        signal: The same shape.

    Infinite where both agree, two silences included; minus infinity where only the reference is
    silent. Raises ValueError for different shapes, no samples, NaN or infinity.

    >>> round(snr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 3)
    20.0
    """
    r, s = _sounds(reference, signal)
    power = noise = 0.0
    for a, b in _chunks(r, s):
        power += float(a.square().sum())
        noise += float((b - a).square().sum())
    return _decibels(power, noise)


def _decibels(power: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of one shape in parts, flattened, in float64."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for first in range(0, flat[0].numel(), _CHUNK):
        yield tuple(tensor[first : first + _CHUNK].double() for tensor in flat)


def log_spectral_distance(
    reference: Array,
    signal: Array,
    *,
    frame: int = _FRAME,
    hop: int | None = None,
    floor_db: float = FLOOR_DB,
) -> float:
    """Root mean square difference of two log power spectra in dB, averaged over frames.

    sqrt(mean over frequencies of (10 log10 P_r - 10 log10 P_s)^2), the mean over frames and
    channels (Gray and Markel 1976, "Distance measures for speech processing").

    Args:
        reference: As for `snr`.
        signal: The same shape.
        frame: Samples in a frame, under a Hann window. What is shorter is filled up with silence.
        hop: From frame to frame; None for a quarter of one.
        floor_db: Powers below this count as this much, in dB of a sine at full scale, so that
            silence can be compared, and differences far below hearing count nothing.

    Zero where both agree. Raises ValueError as `snr` does.

    >>> tone = torch.sin(torch.arange(4096) * 0.1)
    >>> round(log_spectral_distance(tone, tone / 2, floor_db=-1000), 3)
    6.021
    """
    r, s = _sounds(reference, signal)
    step = frame // 4 if hop is None else hop
    if frame < 2 or step < 1:
        raise ValueError(f"a frame has 2 samples or more and a hop 1, got {frame} and {step}")
    total, count = 0.0, 0
    for channel in range(r.shape[0]):
        for a, b in zip(
            spectra(r[channel], frame, step, floor_db),
            spectra(s[channel], frame, step, floor_db),
            strict=True,
        ):
            distances = (a - b).square().mean(dim=1).sqrt()
            total += float(distances.sum())
            count += len(distances)
    return total / count


def spectra(sound: Tensor, frame: int, hop: int, floor_db: float) -> Iterator[Tensor]:
    """Log power in dB of a sine at full scale, [some frames, frame // 2 + 1] at a time."""
    window = torch.hann_window(frame, dtype=torch.float64)
    scale = 2 / float(window.sum())
    floor = 10.0 ** (floor_db / 10)
    count = max(0, -(-(sound.numel() - frame) // hop)) + 1
    together = max(1, _CHUNK // frame)
    for first in range(0, count, together):
        frames = min(together, count - first)
        begin, size = first * hop, (frames - 1) * hop + frame
        part = sound[begin : begin + size].double()
        part = torch.nn.functional.pad(part, (0, size - part.numel()))
        bins = torch.fft.rfft(part.unfold(0, frame, hop) * window) * scale
        yield 10 * torch.log10((bins.real.square() + bins.imag.square()).clamp_min(floor))


def find_lag(reference: Array, signal: Array, max_lag: int) -> tuple[int, float]:
    """By how many samples `signal` comes after `reference`, and their correlation at that lag.

    The lag with the largest normalized cross-correlation of the channels' means, at most `max_lag`
    either way, where at least half of the shorter sound overlaps; of equal ones the smallest. In
    long sounds the middle is looked at. (0, 0.0) where one is silent. The sounds may differ in
    length; ValueError for different numbers of channels, and as in `snr`.

    >>> x = torch.randn(500)
    >>> find_lag(x, torch.cat([torch.zeros(7), x]), 100)[0]
    7
    """
    r, s = _sounds(reference, signal, same_length=False)
    if max_lag < 0:
        raise ValueError(f"the largest lag is 0 or more samples, got {max_lag}")
    shorter = min(r.shape[1], s.shape[1])
    first = max(0, (shorter - _LAG_SAMPLES) // 2)
    a, b = (x[:, first : first + _LAG_SAMPLES].double().mean(dim=0) for x in (r, s))
    a, b = a - a.mean(), b - b.mean()
    size = 1 << (a.numel() + b.numel() - 1).bit_length()
    product = torch.fft.irfft(torch.fft.rfft(b, size) * torch.fft.rfft(a, size).conj(), size)
    most = min(max_lag, min(a.numel(), b.numel()) // 2)
    lags = torch.arange(-most, most + 1)
    # The energy of what overlaps at each lag.
    at_a, at_b = (-lags).clamp_min(0), lags.clamp_min(0)
    length = torch.minimum(a.numel() - at_a, b.numel() - at_b)
    energy = _energies(a, at_a, length) * _energies(b, at_b, length)
    found = product[lags % size] / energy.sqrt()
    found = torch.where(energy > 0, found, torch.zeros_like(found))
    best = float(found.max())
    if best <= 0:
        return 0, 0.0
    good = lags[found >= best - _SAME_CORRELATION]
    lag = int(good[good.abs().argmin()])
    return lag, min(1.0, best)


def _energies(x: Tensor, begin: Tensor, length: Tensor) -> Tensor:
    sums = torch.cat([x.new_zeros(1), x.square().cumsum(0)])
    found = sums[begin + length] - sums[begin]
    # What is left of rounding where there is silence.
    return torch.where(found > sums[-1] * 1e-12, found, torch.zeros_like(found))


def compare_sounds(
    reference: Array, signal: Array, sample_rate: int, *, max_lag: float = 1.0
) -> SoundComparison:
    """All figures of a sound against a reference of the same sample rate.

    Args:
        reference: As for `snr`.
        signal: The same number of channels; its length may differ.
        sample_rate: Of both, in Hz.
        max_lag: Seconds of delay, either way, that alignment looks for.

    Raises ValueError for another number of channels, and as `snr` does.
    """
    if sample_rate <= 0 or not 0 <= max_lag < math.inf:
        raise ValueError(f"not a sample rate and a largest lag: {sample_rate} Hz, {max_lag} s")
    r, s = _sounds(reference, signal, same_length=False)
    same_length = r.shape[1] == s.shape[1]
    lag, correlation = find_lag(r, s, round(max_lag * sample_rate))
    length = min(r.shape[1] - max(0, -lag), s.shape[1] - max(0, lag))
    a = r[:, max(0, -lag) :][:, :length]
    b = s[:, max(0, lag) :][:, :length]
    return SoundComparison(
        sample_rate=sample_rate,
        channels=r.shape[0],
        reference_samples=r.shape[1],
        samples=s.shape[1],
        reference_level_db=_level(r),
        level_db=_level(s),
        identical=same_length and bool(torch.equal(r, s)),
        snr_db=snr(r, s) if same_length else None,
        log_spectral_distance_db=log_spectral_distance(r, s) if same_length else None,
        lag_samples=lag,
        correlation=correlation,
        aligned_samples=length,
        aligned_snr_db=snr(a, b),
        aligned_log_spectral_distance_db=log_spectral_distance(a, b),
    )


def _level(sound: Tensor) -> float:
    power = sum(float(part.square().sum()) for (part,) in _chunks(sound)) / sound.numel()
    return 10 * math.log10(power) if power else -math.inf


def _sounds(first: Array, second: Array, same_length: bool = True) -> tuple[Tensor, Tensor]:
    r, s = _sound(first, "the reference"), _sound(second, "the sound")
    if r.shape[0] != s.shape[0]:
        raise ValueError(
            f"the sound has {s.shape[0]} channels, the reference {r.shape[0]}; mix one down first"
        )
    if same_length and r.shape != s.shape:
        raise ValueError(
            f"the sound has {s.shape[1]} samples, the reference {r.shape[1]}; cut them to one "
            "length, or use compare_sounds, which aligns them"
        )
    return r, s


def _sound(value: Array, what: str) -> Tensor:
    """[channels, samples] of floats, on the CPU."""
    sound = torch.as_tensor(value).detach().cpu()
    if sound.dim() == 1:
        sound = sound[None]
    if sound.dim() != 2:
        raise ValueError(f"{what} must be [samples] or [channels, samples], got {_shape(sound)}")
    if sound.shape[0] > max(sound.shape[1], _MANY_CHANNELS):
        raise ValueError(
            f"{what} has the shape {_shape(sound)}, which looks like [samples, channels]; "
            "transpose it"
        )
    if not sound.numel():
        raise ValueError(f"{what} holds no samples")
    if not sound.is_floating_point():
        if sound.dtype not in _SOUND_SCALES:
            raise ValueError(f"{what} must be float, int16 or int32, not {sound.dtype}")
        sound = sound.double() / _SOUND_SCALES[sound.dtype]
    _check_finite(sound, what)
    return sound


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_finite(tensor: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{what} holds NaN or infinity ({bad} of {tensor.numel()} values)")


# --- images -------------------------------------------------------------------------------------


def psnr(reference: Array, image: Array, *, data_range: float | None = None) -> float:
    """Peak signal to noise ratio in dB: 10 log10(L^2 / mean (y - r)^2).

    Args:
        reference: [..., height, width]: channels first. Floats from 0 to 1, or bool, uint8, uint16,
            which are divided by their largest value.
        image: The same shape.
        data_range: L, for values that are taken as they are; None: 1, for values as above.

    Infinite where the images agree. Raises ValueError for different shapes, no pixels, NaN or
    infinity, and for values that cannot be from 0 to 1.

    >>> round(psnr(torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.1)), 3)
    20.0
    """
    r, y, top = _images(reference, image, data_range)
    noise = sum(float((b - a).square().sum()) for a, b in _chunks(r, y)) / r.numel()
    return 20 * math.log10(top) - 10 * math.log10(noise) if noise else math.inf


def ssim(reference: Array, image: Array, *, data_range: float | None = None) -> float:
    """Mean structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004), at most 1.

    With the paper's settings: a Gaussian window of 11 x 11 and 1.5 pixels (or as wide as the image,
    where a side is shorter), K1 = 0.01, K2 = 0.03, weighted moments without correction, over all
    places where the window lies within the image. Of several channels the mean.

    Arguments and errors are those of `psnr`.

    >>> x = torch.rand(3, 16, 20)
    >>> round(ssim(x, x), 9)
    1.0
    """
    r, y, top = _images(reference, image, data_range)
    height, width = r.shape[-2:]
    side = min(_WINDOW, height, width)
    at = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    line = torch.exp(-(at**2) / (2 * _SIGMA**2))
    line = line / line.sum()
    c1, c2 = (_K1 * top) ** 2, (_K2 * top) ** 2
    rows = height - side + 1
    together = max(1, _CHUNK // (8 * width))
    total = 0.0
    for a, b in zip(r.reshape(-1, height, width), y.reshape(-1, height, width), strict=True):
        for first in range(0, rows, together):
            last = min(rows, first + together) + side - 1
            x, z = a[first:last].double(), b[first:last].double()
            found = _filter(torch.stack([x, z, x * x, z * z, x * z]), line)
            mean_x, mean_z = found[0], found[1]
            var_x, var_z = found[2] - mean_x**2, found[3] - mean_z**2
            both = found[4] - mean_x * mean_z
            above = (2 * mean_x * mean_z + c1) * (2 * both + c2)
            below = (mean_x**2 + mean_z**2 + c1) * (var_x + var_z + c2)
            total += float((above / below).sum())
    return total / (r.numel() // (height * width) * rows * (width - side + 1))


def _filter(x: Tensor, line: Tensor) -> Tensor:
    """[n, height, width] under a separable window, where it lies within."""
    convolve = torch.nn.functional.conv2d
    found = convolve(convolve(x[:, None], line[None, None, :, None]), line[None, None, None, :])
    return found[:, 0]


def compare_images(reference: Array, image: Array) -> ImageComparison:
    """All figures of an image [channels, height, width] against a reference.

    Arguments and errors are those of `psnr`.
    """
    r, y, _ = _images(reference, image, None)
    if r.dim() == 2:
        r, y = r[None], y[None]
    if r.dim() != 3:
        raise ValueError(f"an image is [channels, height, width], got {_shape(r)}")
    power = noise = largest = 0.0
    for a, b in _chunks(r, y):
        apart = b - a
        power += float(a.square().sum())
        noise += float(apart.square().sum())
        largest = max(largest, float(apart.abs().max()))
    relative = math.sqrt(noise / power) if power else (math.inf if noise else 0.0)
    return ImageComparison(
        width=r.shape[2],
        height=r.shape[1],
        channels=r.shape[0],
        identical=bool(torch.equal(r, y)),
        psnr_db=psnr(r, y),
        ssim=ssim(r, y),
        relative_l2=relative,
        max_error=largest,
        different_fraction=float((r != y).any(dim=0).double().mean()),
    )


def _images(first: Array, second: Array, data_range: float | None) -> tuple[Tensor, Tensor, float]:
    if data_range is not None and not 0 < data_range < math.inf:
        raise ValueError(f"data_range is positive and finite, got {data_range}")
    r = _image(first, "the reference", data_range)
    y = _image(second, "the image", data_range)
    if r.shape != y.shape:
        raise ValueError(
            f"the image has the shape {_shape(y)}, the reference {_shape(r)}; bring them to one "
            "size first"
        )
    return r, y, 1.0 if data_range is None else float(data_range)


def _image(value: Array, what: str, data_range: float | None) -> Tensor:
    image = torch.as_tensor(value).detach().cpu()
    if image.dim() < 2 or not image.numel():
        raise ValueError(f"{what} must be [..., height, width] with pixels, got {_shape(image)}")
    if image.dim() >= 3 and image.shape[-1] <= 4 < image.shape[-3]:
        raise ValueError(
            f"{what} has the shape {_shape(image)}, which looks like [height, width, channels]; "
            "put channels first"
        )
    if data_range is not None:
        image = image.double()
    elif image.dtype in _IMAGE_SCALES:
        image = image.double() / _IMAGE_SCALES[image.dtype]
    elif not image.is_floating_point():
        raise ValueError(f"{what} must be float, bool, uint8 or uint16, not {image.dtype}")
    _check_finite(image, what)
    if data_range is None and (float(image.max()) > 2 or float(image.min()) < -1):
        raise ValueError(
            f"{what} has values from {float(image.min()):g} to {float(image.max()):g}; floats are "
            "taken to be from 0 to 1: scale them, or pass data_range="
        )
    return image
