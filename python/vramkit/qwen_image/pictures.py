"""The same image by mode: what differs, in figures and side by side in one page."""

from __future__ import annotations

import base64
import io
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report.html import page, table, write_text
from ..sizes import format_size
from .wrapper import QwenImage

_WINDOW = 11  # of SSIM, with a Gaussian of 1.5 pixels (Wang et al. 2004)
_SIGMA = 1.5


@dataclass(frozen=True)
class ModeImage:
    """One mode's image and what it took.

    `relative_l2` is in percent of the reference's, `psnr` in dB (infinite where images agree),
    `ssim` at most 1; `weights_bytes` as stored, `seconds` of one call.
    """

    mode: str
    image: Tensor
    weights_bytes: int
    device_bytes: int
    seconds: float
    relative_l2: float
    psnr: float
    ssim: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the image."""
        names = ("weights_bytes", "device_bytes", "seconds", "relative_l2", "psnr", "ssim")
        return {"mode": self.mode, **{name: getattr(self, name) for name in names}}


@dataclass
class ModeComparison:
    """Images by mode; the first is the reference."""

    images: list[ModeImage] = field(default_factory=list)

    def __getitem__(self, mode: str) -> ModeImage:
        return next(one for one in self.images if one.mode == mode)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"modes": [one.to_dict() for one in self.images]}

    def __str__(self) -> str:
        wide = max((len(one.mode) for one in self.images), default=4)
        heads = f"{'weights':>10} {'in memory':>10} {'seconds':>8} {'rel. L2':>8} {'PSNR':>6}"
        lines = [f"{'mode':<{wide}} {heads} {'SSIM':>7}"]
        for one in self.images:
            lines.append(
                f"{one.mode:<{wide}} {format_size(one.weights_bytes):>10} "
                f"{format_size(one.device_bytes):>10} {one.seconds:>8.2f} {one.relative_l2:>7.3f}% "
                f"{one.psnr:>6.1f} {one.ssim:>7.4f}"
            )
        return "\n".join(lines)

    def write(self, path: str | os.PathLike[str], title: str = "Images by mode") -> Path:
        """One HTML file with figures and all pictures, and what differs ten times enlarged."""
        rows = [
            (
                one.mode,
                format_size(one.weights_bytes),
                format_size(one.device_bytes),
                f"{one.seconds:.2f} s",
                f"{one.relative_l2:.3f} %",
                "same" if math.isinf(one.psnr) else f"{one.psnr:.1f} dB",
                f"{one.ssim:.4f}",
            )
            for one in self.images
        ]
        heads = ("mode", "weights", "in memory", "time", "relative L2", "PSNR", "SSIM")
        reference = self.images[0].image
        figures = []
        for one in self.images:
            apart = ((one.image - reference) * 10 + 0.5).clamp(0, 1)
            figures.append(
                f"<figure>{_picture(one.image, one.mode)}"
                f"{_picture(apart, f'{one.mode}: difference, ten times')}"
                f"<figcaption>{escape(one.mode)}; below, its difference from "
                f"{escape(self.images[0].mode)}, ten times enlarged</figcaption></figure>"
            )
        style = (
            ".side{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));"
            "gap:1rem}.side img{width:100%;display:block;image-rendering:pixelated;"
            "margin-bottom:.3rem}"
        )
        text = page(
            title,
            [
                ("Figures", table(heads, rows)),
                ("Side by side", f'<div class="side">{"".join(figures)}</div>'),
            ],
            lead=f"Each against {self.images[0].mode}, from the same noise.",
            style=style,
        )
        return write_text(path, text)


def compare_modes(
    build: Callable[[], Any],
    call: Callable[[Any], Any],
    modes: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModeComparison:
    """One image from each mode, against the pipeline as it is loaded.

    Args:
        build: Makes a fresh pipeline: modes change theirs. One is there at a time.
        call: Makes an image of the pipeline it is given: a PIL image, a tensor or array of
            [3, height, width] or [1, 3, height, width] from 0 to 1, or a result with `images`. It
            must seed its noise.
        modes: Arguments of `QwenImage` by a name of the caller's; with "mode" where that is not the
            name. None: "fp8", and "fp8" with modulation in INT8.

    >>> found = compare_modes(build, call, {"low_vram": {"vram_limit": 8}})   # doctest: +SKIP
    """
    if modes is None:
        modes = {"fp8": {}, "fp8, int8 modulation": {"mode": "fp8", "modulation": "int8"}}
    found = ModeComparison()
    for name, arguments in {"original": {}, **modes}.items():
        asked = {"mode": name, **arguments}
        pipe = QwenImage(build(), **asked)
        start = time.perf_counter()
        image = _tensor(call(pipe))
        seconds = time.perf_counter() - start
        total = sum(pipe.weights_bytes.values())
        session = getattr(pipe.pipeline, "vramkit_session", None)
        there = total if session is None else int(session.device_bytes)
        reference = found.images[0].image if found.images else image
        found.images.append(
            ModeImage(
                name,
                image,
                total,
                there,
                seconds,
                100 * relative_l2(reference, image),
                psnr(reference, image),
                ssim(reference, image),
            )
        )
        pipe.disable_vram_management()
        del pipe
    return found


def relative_l2(reference: Tensor, image: Tensor) -> float:
    """||image - reference|| / ||reference||; infinite where something is not finite."""
    apart = (image.detach() - reference.detach()).double().norm()
    size = reference.detach().double().norm()
    value = float(apart / size) if size else float("inf" if apart else 0)
    return value if math.isfinite(value) else math.inf


def psnr(reference: Tensor, image: Tensor) -> float:
    """Peak signal to noise ratio in dB of images from 0 to 1."""
    error = float((image - reference).double().square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(reference: Tensor, image: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of [3, height, width] images from 0 to 1.

    With the paper's window of 11 (or the image's side, where that is less) and constants.
    """
    side = min(_WINDOW, reference.shape[-1], reference.shape[-2])
    at = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    line = torch.exp(-(at**2) / (2 * _SIGMA**2))
    window = (line[:, None] * line[None, :] / line.sum() ** 2)[None, None]
    a, b = (x.double().reshape(-1, 1, *x.shape[-2:]) for x in (reference, image))
    convolve = torch.nn.functional.conv2d
    mean_a, mean_b = convolve(a, window), convolve(b, window)
    var_a = convolve(a * a, window) - mean_a**2
    var_b = convolve(b * b, window) - mean_b**2
    both = convolve(a * b, window) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((found / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _tensor(result: Any) -> Tensor:
    """[3, height, width] in float32, from 0 to 1."""
    result = getattr(result, "images", result)
    if isinstance(result, (list, tuple)):
        result = result[0]
    if not isinstance(result, Tensor):
        import numpy

        array = numpy.asarray(result)
        result = torch.from_numpy(array.astype("float32"))
        if array.dtype == numpy.uint8:
            result = result / 255
        if result.shape[-1] in (3, 4):
            result = result.movedim(-1, -3)[..., :3, :, :]
    image: Tensor = result.detach().to("cpu", torch.float32)
    if image.dim() == 4 and image.shape[0] == 1:
        image = image[0]
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"expected an image of [3, height, width], got {list(image.shape)}")
    return image


def _picture(image: Tensor, label: str) -> str:
    from PIL import Image

    raw = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(raw.numpy()).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(label)}" src="data:image/png;base64,{data}">'
