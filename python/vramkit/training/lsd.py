"""A streaming video diffusion model: two U-Nets and a temporal block, from its published structure.

At base_channels=192 it has 880,258,653 parameters. Each level of a U-Net has four 3x3 convolutions,
each with batch norm, SiLU and channel dropout; three levels and the bottleneck have attention. The
first U-Net sees the frame and the time step, the second, half as wide, the first one's result; the
temporal block sees that beside the previous frame.

    level     1        2            3            4            bottleneck
    width     c        2c           4c           8c           16c, then 8c
    size      H        H / 2        H / 4        H / 8        H / 16
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MixedPrecisionAttention

LEVELS = 4
"""How often a frame's sides are halved: they are multiples of 2^4 = 16."""


class ConvStack(nn.Sequential):
    """Four times 3x3 convolution, batch norm, SiLU and channel dropout."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float = 0.1) -> None:
        layers: list[nn.Module] = []
        for index in range(4):
            width = channels_out if index else channels_in
            layers += [
                nn.Conv2d(width, channels_out, 3, padding=1),
                nn.BatchNorm2d(channels_out),
                nn.SiLU(),
                nn.Dropout2d(dropout),
            ]
        super().__init__(*layers)


class SpatialTransformer(nn.Module):
    """Attention over the positions of a frame, then a feed-forward layer four times as wide."""

    def __init__(self, channels: int, heads: int = 16) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = MixedPrecisionAttention(channels, heads)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to the same."""
        batch, channels, height, width = x.shape
        positions = x.flatten(2).transpose(1, 2)
        positions = positions + self.attention(self.attention_norm(positions))
        positions = positions + self.feed_forward(self.feed_forward_norm(positions))
        return positions.transpose(1, 2).reshape(batch, channels, height, width)


class UNet(nn.Module):
    """Four levels down, a bottleneck, four levels up."""

    def __init__(
        self, channels_in: int, channels_out: int, base_channels: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        c = base_channels
        widths = [c, 2 * c, 4 * c, 8 * c]
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            before = widths[index - 1] if index else channels_in
            level: list[nn.Module] = [ConvStack(before, width, dropout)]
            if index:
                level.append(SpatialTransformer(width))
            self.down.append(nn.Sequential(*level))
        self.bottleneck = nn.Sequential(
            ConvStack(8 * c, 16 * c, dropout),
            SpatialTransformer(16 * c),
            ConvStack(16 * c, 8 * c, dropout),
        )
        # Each takes the level below beside the skip of its own size.
        self.up = nn.ModuleList(
            [
                ConvStack(16 * c, 4 * c, dropout),
                ConvStack(8 * c, 2 * c, dropout),
                ConvStack(4 * c, c, dropout),
                ConvStack(2 * c, c, dropout),
            ]
        )
        self.out = nn.Conv2d(c, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels_in, H, W] to [batch, channels_out, H, W]."""
        skips: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(skips[-1], 2) if skips else x)
            skips.append(x)
        x = self.bottleneck(F.max_pool2d(skips[-1], 2))
        for level, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = level(torch.cat([x, skip], dim=1))
        out: Tensor = self.out(x)
        return out


class LSD(nn.Module):
    """The model: a frame, a time step and the previous frame to the next frame.

    Args:
        base_channels: Width of the first level, a multiple of 16 (attention has 16 heads); 128, 192
            and 256 are the published sizes, 16 and 32 serve tests.
        channels: Of a frame.
        num_timesteps: Time steps are divided by it.
        dropout: Probability of Dropout2d while training.

    Raises ValueError for a width that is not a positive multiple of 16.

    >>> with torch.device("meta"):
    ...     model = LSD(192)
    >>> sum(p.numel() for p in model.parameters())
    880258653
    """

    def __init__(
        self,
        base_channels: int = 192,
        *,
        channels: int = 3,
        num_timesteps: int = 100,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if base_channels <= 0 or base_channels % 16:
            raise ValueError(
                f"base_channels is a positive multiple of 16 (attention has 16 heads, and the "
                f"second U-Net half the width), not {base_channels}"
            )
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps is 1 or more, not {num_timesteps}")
        self.channels, self.num_timesteps = channels, num_timesteps
        self.unets = nn.ModuleList(
            [
                UNet(channels + 1, channels, base_channels, dropout),
                UNet(channels, channels, base_channels // 2, dropout),
            ]
        )
        self.temporal = nn.Sequential(
            ConvStack(2 * channels, base_channels, dropout),
            SpatialTransformer(base_channels),
            ConvStack(base_channels, channels, dropout),
        )

    def forward(
        self, x: Tensor, timestep: float | Tensor, previous_frame: Tensor | None = None
    ) -> Tensor:
        """The next frame.

        Args:
            x: [batch, channels, H, W]; H and W multiples of 16.
            timestep: One number, or one per sample, [batch].
            previous_frame: Of x's shape; zeros where there is none.

        Raises ValueError for other shapes.
        """
        self._check(x, previous_frame)
        batch, _, height, width = x.shape
        step = torch.as_tensor(timestep, dtype=torch.float32, device=x.device)
        if step.dim() > 1 or (step.dim() == 1 and len(step) != batch):
            raise ValueError(
                f"timestep is one number or one per sample ({batch}), not {tuple(step.shape)}"
            )
        plane = (step / self.num_timesteps).to(x.dtype).reshape(-1, 1, 1, 1)
        plane = plane.expand(batch, 1, height, width)
        out = self.unets[0](torch.cat([x, plane], dim=1))
        out = self.unets[1](out)
        if previous_frame is None:
            previous_frame = torch.zeros_like(x)
        frame: Tensor = self.temporal(torch.cat([out, previous_frame.to(out.dtype)], dim=1))
        return frame

    def _check(self, x: Tensor, previous_frame: Tensor | None) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"a frame is [batch, {self.channels}, height, width], not {tuple(x.shape)}"
            )
        side = 2**LEVELS
        if x.shape[2] % side or x.shape[3] % side or 0 in x.shape:
            raise ValueError(
                f"height and width must be multiples of {side} (they are halved {LEVELS} times), "
                f"not {x.shape[2]} and {x.shape[3]}: pad or resize the frames"
            )
        if previous_frame is not None and previous_frame.shape != x.shape:
            raise ValueError(
                f"previous_frame has the frame's shape {tuple(x.shape)}, not "
                f"{tuple(previous_frame.shape)}"
            )
