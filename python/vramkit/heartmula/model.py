"""The music language model: a Llama-like backbone, a small decoder for the further codebooks.

Published structure and names (torchtune's, for the layers). Weights are read from the layers as
they are used, so that they may be in any storage format, the raw parameter `audio_head` too.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Flavor:
    """Sizes of one transformer."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    hidden: int
    positions: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads


FLAVORS = {
    "llama-3B": Flavor(28, 24, 8, 3072, 8192, 8192),
    "llama-7B": Flavor(32, 32, 8, 4096, 14336, 8192),
    "llama-300M": Flavor(3, 8, 4, 3072, 8192, 2048),
    "llama-400M": Flavor(4, 8, 4, 3072, 8192, 2048),
    "small": Flavor(2, 4, 2, 64, 192, 1024),
    "small-decoder": Flavor(1, 4, 2, 64, 192, 64),
}


@dataclass(frozen=True)
class HeartMuLaConfig:
    """The published configuration; its defaults are the 3B model's."""

    backbone_flavor: str = "llama-3B"
    decoder_flavor: str = "llama-300M"
    text_vocab_size: int = 128256
    audio_vocab_size: int = 8197
    audio_num_codebooks: int = 8
    muq_dim: int = 512
    model_type: str = "heartmula"

    @classmethod
    def from_file(cls, path: Path) -> HeartMuLaConfig:
        """Read a `config.json`; keys that are not the model's are left alone."""
        data = json.loads(path.read_text(encoding="utf-8"))
        known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        made = cls(**known)
        for flavor in (made.backbone_flavor, made.decoder_flavor):
            if flavor not in FLAVORS:
                raise ValueError(f"{path}: unknown flavor {flavor!r}; known: {', '.join(FLAVORS)}")
        return made

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass
class KVCache:
    """Keys and values of one attention layer for `length` positions, no more than are needed.

    With `bits` 8 each token's head is stored as int8 with a float16 scale: half of bfloat16, and
    2 bytes for each head.
    """

    batch: int
    heads: int
    length: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    bits: int = 16
    filled: int = 0
    _kept: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        shape = (self.batch, self.heads, self.length, self.dim)
        if self.bits == 8:
            codes = {"dtype": torch.int8, "device": self.device}
            scales = {"dtype": torch.float16, "device": self.device}
            for _ in range(2):
                self._kept.append(torch.empty(shape, **codes))  # type: ignore[call-overload]
                self._kept.append(torch.empty((*shape[:3], 1), **scales))  # type: ignore[call-overload]
        else:
            self._kept = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in "kv"]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, whatever is filled."""
        return sum(t.nbytes for t in self._kept)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, heads, new, dim]; returns all so far, in their dtype."""
        end = self.filled + k.shape[2]
        if end > self.length:
            raise ValueError(f"the cache has {self.length} positions, and {end} were asked for")
        for index, new in enumerate((k, v)):
            if self.bits == 8:
                codes, scales = self._kept[2 * index : 2 * index + 2]
                wide = new.float()
                # The scale as it is kept; float16 holds none below 6e-8, nor above 65504.
                scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(2.0**-24, 65504.0).half()
                rounded = (wide / scale.float()).round().clamp(-127, 127)
                codes[:, :, self.filled : end] = rounded.to(torch.int8)
                scales[:, :, self.filled : end] = scale
            else:
                self._kept[index][:, :, self.filled : end] = new
        self.filled = end
        return self._read(0, k.dtype), self._read(1, k.dtype)

    def _read(self, index: int, dtype: torch.dtype) -> Tensor:
        if self.bits == 8:
            codes, scales = (t[:, :, : self.filled] for t in self._kept[2 * index : 2 * index + 2])
            return (codes.float() * scales.float()).to(dtype)
        return self._kept[index][:, :, : self.filled]

    def reset(self) -> None:
        """Forget what is filled."""
        self.filled = 0


class _Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.rms_norm(x.float(), (x.shape[-1],), self.scale.float(), 1e-5)
        return wide.to(x.dtype)


def rope_angles(positions: Tensor, dim: int) -> Tensor:
    """Angles [positions, dim / 2] of Llama 3's rotary embedding, scaled by 32 past 8192."""
    frequencies = 500_000.0 ** (-torch.arange(0, dim, 2, device=positions.device).double() / dim)
    wavelengths = 2 * math.pi / frequencies
    # Long waves are stretched, short ones kept, those between blended (Llama 3.1).
    blend = ((8192 / wavelengths - 1) / (4 - 1)).clamp(0, 1)
    frequencies = frequencies * blend + frequencies / 32 * (1 - blend)
    return (positions.double()[:, None] * frequencies).float()


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return turned.flatten(-2).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, flavor: Flavor) -> None:
        super().__init__()
        self.flavor = flavor
        wide, narrow = flavor.heads * flavor.head_dim, flavor.kv_heads * flavor.head_dim
        self.q_proj = nn.Linear(flavor.dim, wide, bias=False)
        self.k_proj = nn.Linear(flavor.dim, narrow, bias=False)
        self.v_proj = nn.Linear(flavor.dim, narrow, bias=False)
        self.output_proj = nn.Linear(wide, flavor.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.flavor.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, angles), _rotate(k, angles)
        new = q.shape[2]
        if cache is not None:
            k, v = cache.append(k, v)
        mask = None
        if new > 1:
            old = k.shape[2] - new
            mask = torch.ones(new, k.shape[2], dtype=torch.bool, device=x.device).tril(old)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.output_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _FeedForward(nn.Module):
    def __init__(self, flavor: Flavor) -> None:
        super().__init__()
        self.w1 = nn.Linear(flavor.dim, flavor.hidden, bias=False)
        self.w2 = nn.Linear(flavor.hidden, flavor.dim, bias=False)
        self.w3 = nn.Linear(flavor.dim, flavor.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, flavor: Flavor) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(flavor), _FeedForward(flavor)
        self.sa_norm, self.mlp_norm = _Norm(flavor.dim), _Norm(flavor.dim)

    def forward(self, x: Tensor, angles: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.sa_norm(x), angles, cache)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class _Transformer(nn.Module):
    def __init__(self, flavor: Flavor) -> None:
        super().__init__()
        self.flavor = flavor
        self.layers = nn.ModuleList(_Layer(flavor) for _ in range(flavor.layers))
        self.norm = _Norm(flavor.dim)

    def make_caches(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int
    ) -> list[KVCache]:
        heads, dim = self.flavor.kv_heads, self.flavor.head_dim
        return [KVCache(batch, heads, length, dim, dtype, device, bits) for _ in self.layers]

    def forward(self, x: Tensor, caches: list[KVCache] | None = None, start: int = 0) -> Tensor:
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        angles = rope_angles(positions, self.flavor.head_dim)
        for index, layer in enumerate(self.layers):
            x = layer(x, angles, caches[index] if caches is not None else None)
        return self.norm(x)  # type: ignore[no-any-return]


@dataclass
class Caches:
    """The caches of one generation."""

    backbone: list[KVCache]
    decoder: list[KVCache]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(cache.nbytes for cache in (*self.backbone, *self.decoder))


class HeartMuLa(nn.Module):
    """Audio tokens, frame by frame: the backbone gives codebook 0, the decoder the further ones.

    `forward(tokens, mask)` is one pass of the backbone without a cache: tokens int64
    [batch, positions, codebooks + 1] (text last), mask of the same shape; returns the logits of
    codebook 0, [batch, positions, audio_vocab_size].
    """

    def __init__(self, config: HeartMuLaConfig) -> None:
        super().__init__()
        self.config = config
        backbone, decoder = FLAVORS[config.backbone_flavor], FLAVORS[config.decoder_flavor]
        audio = config.audio_vocab_size
        self.backbone, self.decoder = _Transformer(backbone), _Transformer(decoder)
        self.text_embeddings = nn.Embedding(config.text_vocab_size, backbone.dim)
        self.audio_embeddings = nn.Embedding(audio * config.audio_num_codebooks, backbone.dim)
        self.unconditional_text_embedding = nn.Embedding(1, backbone.dim)
        self.projection = nn.Linear(backbone.dim, decoder.dim, bias=False)
        self.codebook0_head = nn.Linear(backbone.dim, audio, bias=False)
        # Filled once it is registered: a skeleton's parameters have no memory by then.
        self.audio_head = nn.Parameter(
            torch.empty(config.audio_num_codebooks - 1, decoder.dim, audio)
        )
        nn.init.normal_(self.audio_head, std=decoder.dim**-0.5)
        self.muq_linear = nn.Linear(config.muq_dim, backbone.dim)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: its norms' dtype, which no format changes."""
        return self.backbone.norm.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.backbone.norm.scale.device

    def embed(self, tokens: Tensor, mask: Tensor, unconditional: Tensor | None = None) -> Tensor:
        """Sum of the embeddings of a position's tokens: [batch, positions, width]."""
        text = self.text_embeddings(tokens[..., -1])
        if unconditional is not None:
            other = self.unconditional_text_embedding.weight[0].to(text.dtype)
            text = torch.where(unconditional[:, None, None], other, text)
        books = torch.arange(self.config.audio_num_codebooks, device=tokens.device)
        audio = self.audio_embeddings(tokens[..., :-1] + books * self.config.audio_vocab_size)
        shown = torch.cat((audio, text[..., None, :]), -2) * mask[..., None]
        return shown.sum(-2).to(self.dtype)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits of codebook 0 at every position."""
        return self.codebook0_head(self.backbone(self.embed(tokens, mask)))  # type: ignore[no-any-return]

    def make_caches(self, batch: int, positions: int, bits: int = 16) -> Caches:
        """Caches for a generation of `positions` in all: prompt and frames."""
        if bits not in (8, 16):
            raise ValueError(f"the cache has 16 or 8 bits, not {bits!r}")
        most = self.backbone.flavor.positions
        if positions > most:
            raise ValueError(f"prompt and frames take {positions} positions; the model has {most}")
        where = (self.dtype, self.device)
        books = self.config.audio_num_codebooks
        return Caches(
            self.backbone.make_caches(batch, positions, *where, bits),
            self.decoder.make_caches(batch, books, *where, 16),
        )

    @torch.inference_mode()
    def frame(
        self,
        tokens: Tensor,
        mask: Tensor,
        caches: Caches,
        *,
        temperature: float,
        topk: int,
        cfg_scale: float,
        segment: tuple[Tensor, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One frame of audio tokens, int64 [batch, codebooks], after these new positions.

        With `cfg_scale` other than 1 the batch is conditional and unconditional halves; both get
        the same tokens. `segment`: a continuous embedding [batch, muq_dim] and its position.
        """
        batch = tokens.shape[0]
        guided = cfg_scale != 1.0
        unconditional = None
        if guided:
            unconditional = torch.arange(batch, device=tokens.device) >= batch // 2
        h = self.embed(tokens, mask, unconditional)
        if segment is not None:
            given = self.muq_linear(segment[0].to(self.dtype))
            if unconditional is not None:
                other = self.unconditional_text_embedding.weight[0].to(given.dtype)
                given = torch.where(unconditional[:, None], other, given)
            h[:, segment[1]] = given.to(h.dtype)
        last = self.backbone(h, caches.backbone, caches.backbone[0].filled)[:, -1]

        def sample(logits: Tensor) -> Tensor:
            if guided:
                yes, no = logits.float().chunk(2)
                logits = no + (yes - no) * cfg_scale
            found = sample_topk(logits, topk, temperature, generator)
            return found.repeat(2) if guided else found

        books = [sample(self.codebook0_head(last))]
        for cache in caches.decoder:
            cache.reset()
        steps = torch.stack((last, self._audio(0, books[0])), 1)
        for index in range(1, self.config.audio_num_codebooks):
            start = caches.decoder[0].filled
            out = self.decoder(self.projection(steps), caches.decoder, start)[:, -1]
            books.append(sample(out @ self.audio_head[index - 1].to(out.dtype)))
            steps = self._audio(index, books[-1])[:, None]
        return torch.stack(books, 1)

    def _audio(self, book: int, tokens: Tensor) -> Tensor:
        return self.audio_embeddings(tokens + book * self.config.audio_vocab_size).to(self.dtype)  # type: ignore[no-any-return]


def sample_topk(
    logits: Tensor, topk: int, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """One token of each row among its `topk` likeliest, int64 [rows].

    Drawn on the CPU, so that a seed means the same tokens on every device.
    """
    if not temperature > 0 or topk < 1:
        raise ValueError(f"temperature above 0 and topk from 1 on, not {temperature!r}, {topk!r}")
    values, indices = logits.float().topk(min(topk, logits.shape[-1]), dim=-1)
    drawn = torch.multinomial((values / temperature).softmax(-1).cpu(), 1, generator=generator)
    return indices.gather(-1, drawn.to(indices.device))[:, 0]


def cache_bytes(config: HeartMuLaConfig, positions: int, *, batch: int = 2, bits: int = 16) -> int:
    """Bytes of the backbone's caches for so many positions (2 sequences: with guidance)."""
    flavor = FLAVORS[config.backbone_flavor]
    each = flavor.head_dim * 2 if bits == 16 else flavor.head_dim + 2
    return 2 * flavor.layers * batch * flavor.kv_heads * positions * each
