"""Images by mode, side by side; and which layers a measurement keeps in 16 bit."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vramkit.qwen_image import KEEP, compare_modes, measure_keep
from vramkit.qwen_image.keep import kind_of
from vramkit.qwen_image.pictures import psnr, relative_l2, ssim


class Block(nn.Module):
    """Names of Qwen-Image's blocks; image modulation counts `loud` times, all others `gain`."""

    def __init__(self, loud: float, gain: float) -> None:
        super().__init__()
        for name in ("img_mod", "txt_mod", "img_mlp", "txt_mlp", "attn"):
            self.add_module(name, nn.Sequential(nn.Tanh(), nn.Linear(32, 32)))
        self.loud, self.gain = loud, gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        others = self.txt_mod(x) + self.img_mlp(x) + self.txt_mlp(x) + self.attn(x)
        return x + self.gain * others + self.loud * self.img_mod(x)


class Drawer(nn.Module):
    def __init__(
        self,
        louds: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1),
        gains: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1),
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.img_in = nn.Linear(32, 32)
        self.transformer_blocks = nn.ModuleList(map(Block, louds, gains))
        self.proj_out = nn.Linear(32, 32)
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.img_in(x)
        for block in self.transformer_blocks:
            x = block(x)
        return (self.proj_out(x),)


class Pipeline:
    def __init__(self) -> None:
        self.transformer = Drawer()

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        x = torch.randn(3 * 32, 32, generator=torch.Generator().manual_seed(1))
        return torch.sigmoid(self.transformer(x)[0]).reshape(3, 32, 32)


def pictures_of(page: str) -> list[torch.Tensor]:
    import numpy
    from PIL import Image

    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]
    return [torch.from_numpy(numpy.array(image)).permute(2, 0, 1) for image in images]


def test_modes_side_by_side_in_one_page(tmp_path: Path) -> None:
    modes: dict[str, dict[str, Any]] = {"fp8": {}, "all": {"mode": "fp8", "keep": ()}}
    found = compare_modes(Pipeline, lambda pipe: pipe(), modes)
    plain, fp8, every = found.images
    assert [one.mode for one in found.images] == ["original", "fp8", "all"]
    assert (plain.relative_l2, plain.psnr) == (0.0, math.inf)
    assert plain.ssim == pytest.approx(1.0, abs=1e-12)
    assert 0 < fp8.relative_l2 < every.relative_l2 < 5
    assert every.weights_bytes < fp8.weights_bytes < plain.weights_bytes
    assert fp8.relative_l2 == 100 * relative_l2(plain.image, fp8.image)
    assert found["all"] is every
    assert {"mode", "psnr", "ssim", "seconds"} <= found.to_dict()["modes"][1].keys()
    page = found.write(tmp_path / "modes.html", "a <b>").read_text()
    assert "a &lt;b&gt;" in page
    shown = pictures_of(page)
    assert len(shown) == 6
    for number, one in enumerate(found.images):
        rounded = (one.image.clamp(0, 1) * 255).round().to(torch.uint8)
        assert torch.equal(shown[2 * number], rounded)
    assert set(shown[1].unique().tolist()) == {128}  # no difference from itself


def test_figures_against_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 13, 12, generator=generator)
    b = (a + 0.05 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    error = ((a - b).double() ** 2).mean()
    assert psnr(a, b) == pytest.approx(float(10 * torch.log10(1 / error)))
    assert relative_l2(a, b) == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
    assert relative_l2(a, a * math.nan) == math.inf
    # By hand: each window of 11 x 11, weighted by a Gaussian of 1.5 pixels.
    at = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for channel in range(3):
        for i in range(3):
            for j in range(2):
                x, y = (t[channel, i : i + 11, j : j + 11].double() for t in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                both = (weights * (x - mx) * (y - my)).sum()
                top = (2 * mx * my + 1e-4) * (2 * both + 9e-4)
                values.append(top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(float(torch.stack(values).mean()), rel=1e-9)
    with pytest.raises(ValueError, match="expected an image"):
        compare_modes(Pipeline, lambda pipe: pipe()[0])


def test_what_loses_most_is_kept() -> None:
    batches = [(torch.randn(16, 32, generator=torch.Generator().manual_seed(2)),)]
    loud = measure_keep(Drawer((1.0,) * 4, (0.05,) * 4), batches, cache=None)
    assert "*.img_mod.*" in loud.keep
    kept = {kind.name for kind in loud.kinds if kind.keep}
    assert kept == {"image modulation", "input projection", "output projection"}
    assert "kept in 16 bit" in str(loud)
    assert loud.to_dict()["keep"] == loud.keep
    quiet = measure_keep(Drawer((0.1,) * 4, (0.1,) * 4), batches, cache=None)
    assert "*.img_mod.*" not in quiet.keep
    assert {"img_in", "proj_out"} <= set(quiet.keep)  # always
    assert not any("transformer_blocks" in pattern for pattern in quiet.keep)
    gains = (0.02, 0.02, 0.02, 1.0)
    last = measure_keep(Drawer(gains, gains), batches, cache=None)
    assert [pattern for pattern in last.keep if "blocks" in pattern] == ["transformer_blocks.3"]
    gains = (0.02, 1.0, 0.02, 0.02, 0.02)
    middle = measure_keep(Drawer(gains, gains), batches, cache=None)
    assert not any("blocks" in pattern for pattern in middle.keep)


def test_every_layer_of_the_published_model_has_a_kind() -> None:
    from vramkit.convert import matches
    from vramkit.qwen_image.sizes import _layers

    kinds = {name: kind_of(name) for name, _ in _layers()}
    assert "other" not in kinds.values()
    kept = {kinds[name] for name in kinds if matches(name, KEEP)}
    assert kept == set(kinds.values()) - {"attention", "image MLP", "text MLP"}
