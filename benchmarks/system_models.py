"""The systems at their true size, as shapes on the meta device: what each part weighs by mode.

Structures are those of the published configurations. A part whose structure is not rebuilt here is
given by its published count of parameters, and said to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import vramkit
from torch import nn
from vramkit.estimator import weight_bytes

MODES = ("fp32", "bf16", "fp8", "int8", "nf4_dq")


@dataclass(frozen=True)
class Part:
    """A part of a system: `build` makes it on meta; `fixed` is the one mode that it stays in."""

    name: str
    build: Callable[[], nn.Module]
    fixed: str | None = None
    note: str = ""


def bytes_of(part: Part, mode: str) -> int:
    """Exact bytes of a part's weights in a mode."""
    with torch.device("meta"):
        model = part.build()
    wanted = part.fixed or mode
    if wanted in ("fp32", "bf16", "fp16"):
        dtype = vramkit.PrecisionMode.parse(wanted).torch_dtype
        return weight_bytes(model.to(dtype))
    model.to(torch.bfloat16)
    vramkit.convert(model, wanted)
    return weight_bytes(model)


def counted(parameters: int) -> Callable[[], nn.Module]:
    """A part known by its published count alone: rows of 1,024 weights."""

    def build() -> nn.Module:
        return nn.Linear(1024, parameters // 1024, bias=False)

    return build


class XPartDit(nn.Module):
    """X-Part's transformer: 2048 wide, 21 blocks, U-skips, mixtures in the last six."""

    def __init__(self, dim: int = 2048, depth: int = 21, context: int = 1024) -> None:
        super().__init__()
        self.embed = nn.Linear(64, dim)
        self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim))
        self.blocks = nn.ModuleList(
            _block(dim, context, experts=8 if i >= depth - 6 else 0, skip=i > depth // 2)
            for i in range(depth)
        )
        self.out = nn.Linear(dim, 64)


def _mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim))


def _attention(dim: int, context: int) -> nn.Module:
    return nn.ModuleDict(
        {
            "q": nn.Linear(dim, dim, bias=False),
            "k": nn.Linear(context, dim, bias=False),
            "v": nn.Linear(context, dim, bias=False),
            "out": nn.Linear(dim, dim),
        }
    )


def _block(dim: int, context: int, experts: int, skip: bool) -> nn.Module:
    parts: dict[str, nn.Module] = {
        "attn1": _attention(dim, dim),
        "attn2": _attention(dim, context),
        "attn3": _attention(dim, context),
        **{f"norm{i}": nn.LayerNorm(dim) for i in range(1, 5)},
    }
    if skip:
        parts["skip_linear"] = nn.Linear(2 * dim, dim)
    if experts:
        parts["experts"] = nn.ModuleList(_mlp(dim) for _ in range(experts))
        parts["shared"], parts["gate"] = _mlp(dim), nn.Linear(dim, experts, bias=False)
    else:
        parts["mlp"] = _mlp(dim)
    return nn.ModuleDict(parts)
