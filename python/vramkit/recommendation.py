"""Which precision fits a card: known systems, by the true sizes of their weights.

Sizes are computed from the models' configurations (docs/planning.md lists them); none is a
measurement of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import BudgetError
from .sizes import GIB, format_size

# Of a card sold as "12 GB" the driver reports about 11.7 GiB.
REPORTED_SHARE = 0.975
# Context, workspaces and activations beside the weights: an allowance, not a measurement.
RESERVE_GB = 1.0
# Best first. 4-bit blocks of 64 with nested scales take 4.13 bits a weight.
PRECISIONS = ("bf16", "fp8", "nf4_dq")


class Component(NamedTuple):
    """A part that can take its turn alone: bytes of its weights by precision, and its blocks.

    A part that stays in one precision has the same bytes under each. `on_cpu`: it is fast enough
    on the processor to be kept off the device.
    """

    name: str
    weights: tuple[int, int, int]  # by PRECISIONS
    blocks: int = 1
    on_cpu: bool = False


class System(NamedTuple):
    """A documented system; `extra` are bytes that its caches take on top."""

    name: str
    components: tuple[Component, ...]
    extra: int = 0


def _part(name: str, *billions: float, blocks: int = 1, on_cpu: bool = False) -> Component:
    sizes = [round(value * 1e9) for value in billions]
    return Component(name, (sizes[0], sizes[1], sizes[2]), blocks, on_cpu)


SYSTEMS = (
    System("X-Part", (_part("pipeline", 8.8, 4.7, 2.8, blocks=21),)),
    System(
        "HeartMuLa",
        # The codec's convolutions stay in float32. A cache for 30 s of music takes 0.2 GiB.
        (
            _part("language model", 7.9, 3.95, 2.1, blocks=28),
            _part("codec", 6.4, 6.4, 6.4, on_cpu=True),
        ),
        round(0.2 * GIB),
    ),
    System(
        "Qwen-Image",
        (
            _part("text encoder", 16.6, 8.3, 4.3, blocks=28),
            _part("transformer", 40.9, 20.5, 10.6, blocks=60),
            _part("vae", 0.26, 0.26, 0.26),
        ),
    ),
    # Convolutions and speech vocoders have no 4-bit form that keeps their quality: 8 bit is least.
    System("LSD", (_part("model", 1.76, 0.88, 0.88),)),
    System("Chatterbox", (_part("pipeline", 1.6, 1.1, 1.1),)),
)


@dataclass(frozen=True)
class Recommendation:
    """The best mode of a system that a card holds.

    `mode`: "together" (all components on the device), "turns" (one at a time), one of them "on the
    CPU", or "streamed" (blocks pass through two slots, which nothing carries out yet).
    `device_bytes` is what it needs, with the allowance. `refused` says what each better mode would
    have needed.
    """

    system: str
    precision: str
    mode: str
    device_bytes: int
    usable_bytes: int
    refused: list[tuple[str, int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "system": self.system,
            "precision": self.precision,
            "mode": self.mode,
            "device_bytes": self.device_bytes,
            "usable_bytes": self.usable_bytes,
            "refused": [{"mode": name, "needed_bytes": size} for name, size in self.refused],
        }

    def __str__(self) -> str:
        return (
            f"{self.system}: {self.precision}, {self.mode}; needs {format_size(self.device_bytes)} "
            f"of {format_size(self.usable_bytes)}"
        )


def usable_bytes(vram_gb: float) -> int:
    """What a card offers: an int is its nominal size, of which 97.5 % is reported; a float is what
    the driver reports, in GiB.

    >>> usable_bytes(12) == usable_bytes(11.7)
    True
    """
    if isinstance(vram_gb, bool) or not isinstance(vram_gb, (int, float)):
        raise TypeError(f"vram_gb is a number of GiB, not {vram_gb!r}")
    if not 0 < vram_gb < 1e6:
        raise ValueError(f"vram_gb must be positive and finite, got {vram_gb!r}")
    return round(vram_gb * (REPORTED_SHARE if isinstance(vram_gb, int) else 1.0) * GIB)


def recommend(
    vram_gb: float, system: str | None = None, *, reserve_gb: float = RESERVE_GB
) -> list[Recommendation]:
    """The best mode of each known system (or of one) that fits a card of `vram_gb`.

    Better precisions come first, and in each "together", then "turns", then a component on the
    CPU; "streamed" is the last resort. `reserve_gb` is kept beside the weights for context and
    activations. Raises BudgetError if not even streaming fits, and ValueError for a system that is
    not known.

    >>> print(vramkit.recommend(24, "Qwen-Image")[0])
    Qwen-Image: fp8, turns; needs 20.1 GiB of 23.4 GiB
    """
    usable = usable_bytes(vram_gb)
    chosen = [s for s in SYSTEMS if system is None or s.name.lower() == system.lower()]
    if not chosen:
        raise ValueError(f"no system {system!r}; known are {', '.join(s.name for s in SYSTEMS)}")
    return [_best(s, usable, round(reserve_gb * GIB)) for s in chosen]


def _best(system: System, usable: int, reserve: int) -> Recommendation:
    refused: list[tuple[str, int]] = []
    for precision, mode, size in _modes(system):
        needed = size + system.extra + reserve
        if needed <= usable:
            return Recommendation(system.name, precision, mode, needed, usable, refused)
        refused.append((f"{precision} {mode}", needed))
    least = min(size for _, size in refused)
    raise BudgetError(
        f"{system.name} does not fit {format_size(usable)}: its smallest mode needs "
        f"{format_size(least)}",
        least,
    )


def _modes(system: System) -> list[tuple[str, str, int]]:
    modes = []
    for at, precision in enumerate(PRECISIONS):
        sizes = [c.weights[at] for c in system.components]
        modes.append((precision, "together", sum(sizes)))
        if len(sizes) > 1:
            modes.append((precision, "turns", max(sizes)))
        aside = [c for c in system.components if c.on_cpu]
        if aside:
            left = sum(c.weights[at] for c in system.components if not c.on_cpu)
            modes.append((precision, f"{aside[0].name} on the CPU", left))
    for at, precision in enumerate(PRECISIONS):
        slots = [
            2 * -(-c.weights[at] // c.blocks) if c.blocks > 1 else c.weights[at]
            for c in system.components
            if not c.on_cpu
        ]
        modes.append((precision, "streamed", max(slots)))
    return modes
