"""The codec: tokens to sound, by flow matching to latents and a convolutional decoder.

Published structure: a residual vector quantizer's codebooks, a two-stage transformer that gives the
flow's velocity, and causal, weight-normed convolutions. All of it stays float32 unless told
otherwise.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

FRAMES_PER_SECOND = 12.5
_LATENTS_PER_FRAME = 2
_SAMPLES = 2  # repeated by the decoder's last stage


@dataclass(frozen=True)
class CodecConfig:
    """The published configuration; its defaults are the released codec's."""

    dim: int = 512
    codebook_size: int = 8192
    codebook_dim: int = 32
    num_quantizers: int = 8
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    in_channels: int = 1024
    out_channels: int = 256
    num_layers: int = 24
    num_layers_2: int = 6
    sample_rate: int = 48000
    factors: tuple[int, ...] = (5, 4, 4, 4, 3)
    latent_hidden_dim: int = 128
    init_channel: int = 64
    model_type: str = "heartcodec"

    @classmethod
    def from_file(cls, path: Path) -> CodecConfig:
        """Read a `config.json`; keys that are not the model's are left alone."""
        data = json.loads(path.read_text(encoding="utf-8"))
        data.setdefault("factors", data.get("upsample_factors", (5, 4, 4, 4, 3)))
        known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        return cls(**{**known, "factors": tuple(known["factors"])})

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @property
    def samples_per_frame(self) -> int:
        """Samples of sound of one frame of tokens, by the decoder's factors."""
        return _LATENTS_PER_FRAME * _SAMPLES * math.prod(self.factors)


class _Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        half = torch.arange(0, q.shape[-1], 2, device=x.device, dtype=torch.float32)
        angles = positions[:, None] * 10000.0 ** (-half / q.shape[-1])
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def rotated(t: Tensor) -> Tensor:
            even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

        y = functional.scaled_dot_product_attention(rotated(q), rotated(k), v)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 256 * math.ceil(int(8 * dim / 3) / 256)
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = _Norm(dim), _Norm(dim)
        self.attn, self.mlp = _Attention(dim, heads), _FeedForward(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        a, b, c, d, e, f = (self.scale_shift_table + time[:, None].unflatten(-1, (6, -1))).chunk(
            6, 2
        )
        x = x + c[:, :, 0] * self.attn(self.attn_norm(x) * (1 + b[:, :, 0]) + a[:, :, 0])
        return x + f[:, :, 0] * self.mlp(self.mlp_norm(x) * (1 + e[:, :, 0]) + d[:, :, 0])  # type: ignore[no-any-return]


class _Project(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.ffn_1 = nn.Conv1d(inside, outside, 3, padding=1)
        self.ffn_2 = nn.Linear(outside, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_2(self.ffn_1(x.transpose(1, 2)).transpose(1, 2) * 3**-0.5)  # type: ignore[no-any-return]


class _Time(nn.Module):
    """A time in [0, 1] to modulations: sinusoids, two Linears, and one for all six."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(512, dim), nn.Linear(dim, dim)
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, time: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        half = torch.arange(256, device=time.device, dtype=torch.float32)
        angles = 1000 * time.float()[:, None] * 10000.0 ** (-half / 256)
        waves = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
        embedded = self.linear_2(functional.silu(self.linear_1(waves)))
        return self.linear(functional.silu(embedded)), embedded


class _Estimator(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads
        dim = heads * config.attention_head_dim
        self.proj_in = _Project(config.in_channels, dim)
        self.connection_proj = _Project(config.in_channels + dim, 2 * dim)
        self.proj_out = _Project(2 * dim, config.out_channels)
        self.transformer_blocks = nn.ModuleList(
            _Block(dim, heads) for _ in range(config.num_layers)
        )
        self.transformer_blocks_2 = nn.ModuleList(
            _Block(2 * dim, heads) for _ in range(config.num_layers_2)
        )
        self.adaln_single, self.adaln_single_2 = _Time(dim), _Time(2 * dim)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.scale_shift_table_2 = nn.Parameter(torch.randn(2, 2 * dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        wide = x
        x = self._stage(self.proj_in(x), time, 1)
        x = self._stage(self.connection_proj(torch.cat((wide, x), -1)), time, 2)
        return self.proj_out(x)  # type: ignore[no-any-return]

    def _stage(self, x: Tensor, time: Tensor, which: int) -> Tensor:
        blocks = self.transformer_blocks if which == 1 else self.transformer_blocks_2
        ada = self.adaln_single if which == 1 else self.adaln_single_2
        table = self.scale_shift_table if which == 1 else self.scale_shift_table_2
        modulation, embedded = ada(time, x.dtype)
        for block in blocks:
            x = block(x, modulation)
        shift, scale = (table + embedded[:, None]).chunk(2, 1)
        return functional.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift


class _Flow(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))
            for _ in range(config.num_quantizers)
        )
        for book in self.codebooks:
            nn.init.normal_(book)
        self.project_out = nn.Linear(config.codebook_dim, config.dim)
        self.cond_feature_emb = nn.Linear(config.dim, config.dim)
        self.estimator = _Estimator(config)

    def conditions(self, codes: Tensor) -> Tensor:
        """Features [batch, 2 frames, dim] of codes int64 [batch, quantizers, frames]."""
        rows = (functional.embedding(codes[:, i], book) for i, book in enumerate(self.codebooks))
        found = self.cond_feature_emb(self.project_out(sum(rows)))
        return found.repeat_interleave(_LATENTS_PER_FRAME, 1)  # type: ignore[no-any-return]


class _Causal(nn.Module):
    """A weight-normed convolution that looks back only."""

    def __init__(self, inside: int, outside: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.back = dilation * (kernel - 1)
        self.conv = weight_norm(nn.Conv1d(inside, outside, kernel, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (self.back, 0)))  # type: ignore[no-any-return]


class _Residual(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            _Causal(channels, channels, 7, dilation),
            _Causal(channels, channels, 1),
        )
        self.activation1, self.activation2 = nn.PReLU(), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation2(self.conv2(self.activation1(self.conv1(x))))  # type: ignore[no-any-return]


class _Up(nn.Module):
    def __init__(self, inside: int, outside: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = weight_norm(nn.ConvTranspose1d(inside, outside, 2 * factor, stride=factor))
        self.units = nn.ModuleList(_Residual(outside, dilation) for dilation in (1, 3, 5, 7, 9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)[..., : -self.factor]
        for unit in self.units:
            x = unit(x)
        return x


class _Down(nn.Module):
    def __init__(self, inside: int, outside: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.units = nn.ModuleList(_Residual(inside, dilation) for dilation in (1, 3, 5, 7, 9))
        self.conv = weight_norm(nn.Conv1d(inside, outside, 2 * factor, stride=factor))
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return self.activation(self.conv(functional.pad(x, (self.factor, 0))))  # type: ignore[no-any-return]


class _Scalar(nn.Module):
    """Latents to samples, and back: the encoder is part of the file, and never runs here."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        start, count = config.init_channel, len(config.factors)
        widths = [start * 2**i for i in range(count + 1)]
        pairs = list(itertools.pairwise(widths))
        self.encoder = nn.ModuleList(
            [
                _Causal(1, start, 7),
                *(_Down(a, b, f) for (a, b), f in zip(pairs, config.factors[::-1], strict=True)),
                _Causal(widths[-1], config.latent_hidden_dim, 7),
            ]
        )
        self.decoder = nn.ModuleList(
            [
                _Causal(config.latent_hidden_dim, widths[-1], 5),
                *(_Up(b, a, f) for (a, b), f in zip(pairs[::-1], config.factors, strict=True)),
            ]
        )
        self.post, self.out = _Causal(start, start, 7), _Causal(start, 1, 7)

    def decode(self, latents: Tensor) -> Tensor:
        x = latents
        for stage in self.decoder:
            x = stage(x)
        x = self.post(x.repeat_interleave(_SAMPLES, -1)).relu()
        return self.out(x).tanh()  # type: ignore[no-any-return]


class HeartCodec(nn.Module):
    """`detokenize(codes)`: int64 [codebooks, frames] to sound, float32 [2, samples]."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.flow_matching, self.scalar_model = _Flow(config), _Scalar(config)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.flow_matching.cond_feature_emb.bias.dtype

    @torch.inference_mode()
    def detokenize(
        self,
        codes: Tensor,
        *,
        steps: int = 10,
        guidance_scale: float = 1.25,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sound of a piece of music, by `steps` Euler steps of the flow."""
        if codes.dim() != 2 or codes.shape[0] != self.config.num_quantizers or not codes.shape[1]:
            raise ValueError(
                f"codes have shape [{self.config.num_quantizers}, frames], not {list(codes.shape)}"
            )
        flow = self.flow_matching
        device = flow.cond_feature_emb.bias.device
        features = flow.conditions(codes.to(device).clamp(0, self.config.codebook_size - 1)[None])
        features = features.to(self.dtype)
        width = self.config.out_channels
        x = torch.randn(1, features.shape[1], width, generator=generator).to(device, self.dtype)
        nothing = torch.zeros_like(x)
        both = torch.cat((torch.zeros_like(features), features))
        for step in range(steps):
            time = torch.full((2,), step / steps, device=device)
            given = torch.cat((x.repeat(2, 1, 1), nothing.repeat(2, 1, 1), both), -1)
            without, with_it = flow.estimator(given, time).chunk(2)
            x = x + (without + guidance_scale * (with_it - without)) / steps
        # Two channels lie side by side in a latent.
        latents = x.unflatten(-1, (2, -1))[0].permute(1, 2, 0)
        sound: Tensor = self.scalar_model.decode(latents)[:, 0].float().cpu()
        return sound
