"""The same image by mode: what differs, in figures and side by side in one page."""

from __future__ import annotations

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

from ..media_quality import psnr, ssim
from ..report.html import page, table, write_text
from ..report.media import picture
from ..sizes import format_size
from .wrapper import QwenImage


@dataclass(frozen=True)
class ModeImage:
    """One mode's image and what it took.

    `relative_l2` is in percent of the reference's, `psnr` in dB (infinite where images agree),
    `ssim` at most 1; where an image holds NaN or infinity they are infinity, minus infinity and 0.
    `weights_bytes` as stored, `seconds` of one call.
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
                f"<figure>{picture(one.image, one.mode)}"
                f"{picture(apart, f'{one.mode}: difference, ten times')}"
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
        # What is not finite must not pass a check by comparing with NaN.
        finite = bool(torch.isfinite(image).all() and torch.isfinite(reference).all())
        found.images.append(
            ModeImage(
                name,
                image,
                total,
                there,
                seconds,
                100 * relative_l2(reference, image),
                psnr(reference, image, data_range=1.0) if finite else -math.inf,
                ssim(reference, image, data_range=1.0) if finite else 0.0,
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
