"""The four documented modes, what each needs, and which fits a card."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..convert import Precision
from ..errors import BudgetError
from ..recommendation import RESERVE_GB, usable_bytes
from ..sizes import GIB, format_size
from .sizes import ComponentBytes, published_bytes

# At the most so many parts of a component are one block, and two of them are there at a time.
_PARTS, _SLOTS = 12, 2


class Mode(str, Enum):
    """How a pipeline runs: what it stores the transformer in, and whether weights stream.

    `ORIGINAL` is the pipeline as it was loaded. The four of the guide: `FP8` and `LOW_VRAM` keep
    LoRA beside the weights, where it can be scaled and swapped; the `_FUSED` ones add it to them
    first. `LOW_VRAM` modes keep to a limit by reading blocks as they are needed.
    """

    ORIGINAL = "original"
    FP8 = "fp8"
    FP8_FUSED = "fp8_fused"
    LOW_VRAM = "low_vram"
    LOW_VRAM_FUSED = "low_vram_fused"

    def __str__(self) -> str:
        return self.value

    @property
    def fused(self) -> bool:
        """Whether LoRA is fused before the weights are stored."""
        return self in (Mode.FP8_FUSED, Mode.LOW_VRAM_FUSED)

    @property
    def streams(self) -> bool:
        """Whether blocks of weights come and go within a limit."""
        return self in (Mode.LOW_VRAM, Mode.LOW_VRAM_FUSED)

    @classmethod
    def parse(cls, mode: str | Mode) -> Mode:
        """The mode of that name, without regard to case; `-` and blanks stand for `_`.

        Raises ValueError, which lists the names.
        """
        if isinstance(mode, cls):
            return mode
        name = str(mode).strip().lower().replace("-", "_").replace(" ", "_")
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(m.value for m in cls)
            raise ValueError(f"no mode {mode!r}; the modes are: {names}") from None


@dataclass(frozen=True)
class Recommendation:
    """The best mode that a card holds.

    Attributes:
        mode: One of the modes' names.
        modulation: What the modulation layers are stored in: None as loaded, in 16 bit.
        device_bytes: What it needs, with the allowance for context and activations.
        usable_bytes: What the card offers.
        refused: (mode, bytes) of each better one that does not fit.
    """

    mode: Mode
    modulation: str | None
    device_bytes: int
    usable_bytes: int
    refused: list[tuple[str, int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "mode": self.mode.value,
            "modulation": self.modulation,
            "device_bytes": self.device_bytes,
            "usable_bytes": self.usable_bytes,
            "refused": [{"mode": name, "needed_bytes": size} for name, size in self.refused],
        }

    def __str__(self) -> str:
        return (
            f"{_name(self.mode, self.modulation)}: needs {format_size(self.device_bytes)} of "
            f"{format_size(self.usable_bytes)}"
        )


def needed_bytes(mode: Mode, sizes: ComponentBytes) -> int:
    """Bytes of weights that a mode has at one time at the least, of components that take turns.

    The VAE always stays. Modes that do not stream hold the largest other component whole; those
    that do, two blocks of it.
    """
    if not mode.streams:
        return sizes.turns
    largest = max(sizes.text_encoder, sizes.transformer)
    block = max(sizes.block, -(-largest // _PARTS))
    return sizes.vae + _SLOTS * block


def recommend(
    vram_gb: float, *, separate_lora: bool = False, reserve_gb: float = RESERVE_GB
) -> Recommendation:
    """The best mode of the published Qwen-Image for a card.

    Args:
        vram_gb: An int is a card's nominal size, of which the driver reports 97.5 %; a float is
            what the driver reports, in GiB.
        separate_lora: LoRA stays beside the weights, to be scaled and swapped.
        reserve_gb: Kept for context and activations: an allowance, not a measurement.

    From best to smallest: as published; FP8 with modulation in 16 bit; FP8 with modulation in INT8
    (docs/qwen_image.md says what that costs); streamed. Raises BudgetError, with the bytes that the
    smallest needs, where none fits.

    >>> recommend(24).mode, recommend(24).modulation
    (<Mode.FP8_FUSED: 'fp8_fused'>, 'int8')
    """
    usable = usable_bytes(vram_gb)
    reserve = round(reserve_gb * GIB)
    fp8 = Mode.FP8 if separate_lora else Mode.FP8_FUSED
    low = Mode.LOW_VRAM if separate_lora else Mode.LOW_VRAM_FUSED
    options: list[tuple[Mode, Precision | None, str | None]] = [
        (Mode.ORIGINAL, None, None),
        (fp8, "fp8", None),
        (fp8, "fp8", "int8"),
        (low, "fp8", None),
    ]
    refused: list[tuple[str, int]] = []
    for mode, precision, modulation in options:
        sizes = published_bytes(precision, modulation=modulation)
        needed = needed_bytes(mode, sizes) + reserve
        if needed <= usable:
            return Recommendation(mode, modulation, needed, usable, refused)
        refused.append((_name(mode, modulation), needed))
    least = min(size for _, size in refused)
    raise BudgetError(
        f"Qwen-Image does not fit {format_size(usable)}: its smallest mode, {low.value}, needs "
        f"{format_size(least)}",
        least,
    )


def _name(mode: Mode, modulation: str | None) -> str:
    return mode.value if modulation is None else f"{mode.value}, modulation in {modulation}"
