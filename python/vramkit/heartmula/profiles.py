"""What to choose for a card: from the true sizes of the 3B model and its codec."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..convert import convert
from ..errors import BudgetError
from ..estimator import weight_bytes
from ..recommendation import usable_bytes
from ..sizes import GIB, format_size
from .codec import FRAMES_PER_SECOND, CodecConfig, HeartCodec
from .loading import formats_of
from .model import HeartMuLa, HeartMuLaConfig, cache_bytes

# Best first.
PRECISIONS = ("bf16", "int8", "nf4_dq")
# Positions that tags and lyrics take; a long song's lyrics have some hundred tokens.
PROMPT_POSITIONS = 512
# The context and workspaces of a CUDA process, and activations: allowances, not measurements.
RESERVE_BYTES = GIB
_SECONDS = ((10.0, 240), (7.0, 60), (0.0, 30))


@dataclass(frozen=True)
class Profile:
    """A choice for a card, and the bytes it comes to.

    The language model and the codec take turns on the device; `peak_bytes` is the larger turn.
    """

    vram_gb: float
    precision: str
    codec_device: str
    max_seconds: int
    model_bytes: int
    codec_bytes: int
    cache_bytes: int
    cache_bits: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.vram_gb:g} GB: {self.precision}, codec in fp32 on {self.codec_device}, up to "
            f"{self.max_seconds} s; {format_size(self.peak_bytes)} at most"
        )


@functools.cache
def model_bytes(precision: str, version: str = "3B") -> int:
    """Exact bytes of the language model's weights, computed on the meta device."""
    big = version == "7B"
    config = HeartMuLaConfig("llama-7B" if big else "llama-3B", "llama-300M")
    with torch.device("meta"):
        model = HeartMuLa(config)
    if precision == "fp32":
        return weight_bytes(model)
    model.to(torch.float16 if precision == "fp16" else torch.bfloat16)
    if precision not in ("bf16", "fp16"):
        convert(model, formats_of(model, precision)[0])
    return weight_bytes(model)


@functools.cache
def codec_bytes(precision: str = "fp32") -> int:
    """Exact bytes of the released codec's weights in a plain precision, weight norms folded."""
    with torch.device("meta"):
        model = HeartCodec(CodecConfig())
    folded = 0
    for name, parameter in model.named_parameters():
        # A norm's magnitudes go with it: one for each output channel.
        folded += 0 if name.endswith("original0") else parameter.numel()
    return folded * (4 if precision == "fp32" else 2)


def profile(vram_gb: float, *, seconds: int | None = None, cache_bits: int = 16) -> Profile:
    """The best precision, and the codec's place, for a card sold with so many GB.

    Args:
        vram_gb: As cards are sold: 6, 8, 12.
        seconds: The longest music wanted; None: 30 below 7 GB, 60 below 10, else 240.
        cache_bits: 16 or 8, of keys and values.

    Raises BudgetError where nothing fits, with the bytes that would be needed.
    """
    usable = usable_bytes(vram_gb)
    most = next(s for least, s in _SECONDS if vram_gb >= least) if seconds is None else seconds
    positions = PROMPT_POSITIONS + round(most * FRAMES_PER_SECOND)
    cache = cache_bytes(HeartMuLaConfig(), positions, bits=cache_bits)
    codec = codec_bytes()
    on_card = codec + RESERVE_BYTES <= usable
    for precision in PRECISIONS:
        weights = model_bytes(precision)
        needed = weights + cache + RESERVE_BYTES
        if needed <= usable:
            peak = max(needed, codec + RESERVE_BYTES) if on_card else needed
            place = "cuda" if on_card else "cpu"
            return Profile(vram_gb, precision, place, most, weights, codec, cache, cache_bits, peak)
    raise BudgetError(
        f"{most} s of music take {format_size(needed)} in {PRECISIONS[-1]}, more than the "
        f"{format_size(usable)} of a card of {vram_gb:g} GB",
        needed,
    )
