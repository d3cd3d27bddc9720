"""Bytes of the published Qwen-Image by mode, from its shapes; and of any pipeline, from its own.

The transformer has 60 blocks of two streams (24 heads of 128, 3072 wide, text of 3584); a third of
its 20.43 B parameters are modulation. The text encoder is Qwen2.5-VL 7B, 8.29 B; the VAE 0.127 B.
A test counts the same from the real classes on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..convert import Precision, matches, storage_format
from .keep import KEEP

WIDTH, TEXT_WIDTH, BLOCKS, HEAD = 3072, 3584, 60, 128
TEXT_ENCODER_PARAMETERS = 8_292_166_656
VAE_PARAMETERS = 126_892_531
_HIDDEN = 4 * WIDTH

# What the two-byte dtype of a published component takes.
_PLAIN = 2


@dataclass(frozen=True)
class ComponentBytes:
    """Bytes of the three components in one precision of the transformer, and its largest block."""

    text_encoder: int
    transformer: int
    vae: int
    block: int

    @property
    def together(self) -> int:
        """All components at once."""
        return self.text_encoder + self.transformer + self.vae

    @property
    def turns(self) -> int:
        """The VAE, which always stays, and the largest of those that take turns."""
        return self.vae + max(self.text_encoder, self.transformer)


def block_layers() -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes of one transformer block's Linears; each has a bias of its rows."""
    square = (WIDTH, WIDTH)
    attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    return [
        ("img_mod.1", (6 * WIDTH, WIDTH)),
        ("txt_mod.1", (6 * WIDTH, WIDTH)),
        *((f"attn.{name}", square) for name in attention),
        ("attn.to_out.0", square),
        ("img_mlp.net.0.proj", (_HIDDEN, WIDTH)),
        ("img_mlp.net.2", (WIDTH, _HIDDEN)),
        ("txt_mlp.net.0.proj", (_HIDDEN, WIDTH)),
        ("txt_mlp.net.2", (WIDTH, _HIDDEN)),
    ]


def _outer_layers() -> list[tuple[str, tuple[int, int]]]:
    embedder = "time_text_embed.timestep_embedder"
    return [
        (f"{embedder}.linear_1", (WIDTH, 256)),
        (f"{embedder}.linear_2", (WIDTH, WIDTH)),
        ("img_in", (WIDTH, 64)),
        ("txt_in", (WIDTH, TEXT_WIDTH)),
        ("norm_out.linear", (2 * WIDTH, WIDTH)),
        ("proj_out", (64, WIDTH)),
    ]


def _layers() -> Iterator[tuple[str, tuple[int, int]]]:
    for n in range(BLOCKS):
        for name, shape in block_layers():
            yield f"transformer_blocks.{n}.{name}", shape
    yield from _outer_layers()


def _bytes(
    layers: Iterable[tuple[str, tuple[int, int]]],
    precision: Precision | None,
    keep: Iterable[str],
    modulation: Precision | None,
) -> int:
    total = 0
    for name, shape in layers:
        total += shape[0] * _PLAIN  # bias
        chosen = precision_of(name, precision, keep, modulation)
        plain = shape[0] * shape[1] * _PLAIN
        total += plain if chosen is None else storage_format(chosen).bytes(shape).total
    return total


def precision_of(
    name: str, precision: Precision | None, keep: Iterable[str], modulation: Precision | None
) -> Precision | None:
    """What a layer of the transformer is stored in; None: as it is."""
    from .keep import MODULATION

    if precision is None:
        return None
    if modulation is not None and matches(name, MODULATION):
        return modulation
    return None if matches(name, keep) else precision


def published_bytes(
    precision: Precision | None = None,
    *,
    keep: Iterable[str] = KEEP,
    modulation: Precision | None = None,
) -> ComponentBytes:
    """Bytes of the published model's weights, exact: text encoder and VAE in 16 bit.

    `precision` is the transformer's (None: 16 bit), but for what `keep` matches; `modulation` is
    that of the modulation layers, which `keep` has by default.

    >>> published_bytes().transformer, published_bytes("fp8", keep=()).transformer
    (40860802176, 20458175872)
    """
    kept = list(keep)
    norms = BLOCKS * 4 * HEAD + TEXT_WIDTH
    transformer = _bytes(_layers(), precision, kept, modulation) + norms * _PLAIN
    inner = ((f"transformer_blocks.1.{name}", shape) for name, shape in block_layers())
    block = _bytes(inner, precision, kept, modulation) + 4 * HEAD * _PLAIN
    return ComponentBytes(
        TEXT_ENCODER_PARAMETERS * _PLAIN, transformer, VAE_PARAMETERS * _PLAIN, block
    )


def converted_copy(module: nn.Module, formats: dict[str, Any]) -> nn.Module:
    """The module as it would be with these formats, by layer, without its memory."""
    from ..convert import convert
    from ..estimator import meta_copy

    skeleton = meta_copy(module)
    convert(skeleton, formats)
    return skeleton
