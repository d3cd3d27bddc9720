"""Whether the VAE decodes an image whole or in tiles, by an estimate of what it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BudgetError
from ..sizes import format_size

# Sides of a tile in pixels, and how far apart tiles begin: a quarter is blended.
TILES = (512, 256, 128, 64)


@dataclass(frozen=True)
class Tiling:
    """How an image of a size is decoded.

    Attributes:
        tile: The tiles' side in pixels; None: the image whole.
        needed_bytes: The estimated peak of the decoding, beside the VAE's weights.
        tried: (side or None, bytes) of all that was estimated.
    """

    tile: int | None
    needed_bytes: int
    tried: list[tuple[int | None, int]] = field(default_factory=list)


class _Decode(nn.Module):
    """A VAE's decoding as a forward, which is what an estimate follows."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        found: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return found


def decode_bytes(vae: Any, height: int, width: int, *, tile: int | None = None) -> int:
    """The estimated peak of decoding one image, beside the VAE's weights; the VAE is not changed.

    `tile`: the side of tiles in pixels, None: whole. Raises ValueError where it cannot be followed.
    """
    from ..estimator import estimate, model_dtype

    before = _settings(vae)
    try:
        if tile is None:
            vae.disable_tiling()
        else:
            _tile(vae, tile)
        channels, shrink = int(vae.config.z_dim), int(vae.spatial_compression_ratio)
        latents = torch.empty(
            (1, channels, 1, height // shrink, width // shrink),
            dtype=model_dtype(vae),
            device="meta",
        )
        found = estimate(_Decode(vae).eval(), inputs=(latents,)).activations_bytes
        assert found is not None  # inputs were given
        return found
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def choose_tiling(vae: Any, height: int, width: int, room: int, *, strict: bool = True) -> Tiling:
    """The largest way of decoding an image of this size that `room` bytes hold.

    The VAE is left as it is: `apply_tiling` sets it. Where not even the smallest tiles fit, raises
    BudgetError with the bytes that they need; not `strict`: takes what needs least.
    """
    tried: list[tuple[int | None, int]] = []
    sides = (None, *(side for side in TILES if side < max(height, width)))
    for side in sides:
        needed = decode_bytes(vae, height, width, tile=side)
        tried.append((side, needed))
        if needed <= room:
            return Tiling(side, needed, tried)
    side, least = min(tried, key=lambda found: found[1])
    if not strict:
        return Tiling(side, least, tried)
    raise BudgetError(
        f"decoding {width} x {height} needs {format_size(least)} beside the weights even in the "
        f"smallest tiles, and {format_size(max(0, room))} are left",
        least,
    )


def apply_tiling(vae: Any, tiling: Tiling) -> None:
    """Set a VAE of diffusers to decode so."""
    if tiling.tile is None:
        vae.disable_tiling()
    else:
        _tile(vae, tiling.tile)


def _tile(vae: Any, side: int) -> None:
    vae.enable_tiling(
        tile_sample_min_height=side,
        tile_sample_min_width=side,
        tile_sample_stride_height=side * 3 // 4,
        tile_sample_stride_width=side * 3 // 4,
    )


def _settings(vae: Any) -> dict[str, Any]:
    names = (
        "use_tiling",
        "tile_sample_min_height",
        "tile_sample_min_width",
        "tile_sample_stride_height",
        "tile_sample_stride_width",
    )
    return {name: getattr(vae, name) for name in names}
