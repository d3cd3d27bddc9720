"""A device that is like a GPU without being one, and small models to offload to it.

The stand-in has what a session asks of a device apart from the host: blocks in pinned memory, a
share of torch's allocator, graphs. Its memory is the host's, so that all of it runs here. On a
machine with a GPU the tests that do not look inside the stand-in run there too; where one is meant
to be, REQUIRE_GPU=1 turns skips into failures.
"""

from __future__ import annotations

import copy
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vramkit import _native, enable_vram_management
from vramkit.errors import BudgetError
from vramkit.estimator import weight_bytes
from vramkit.offload.device import CudaDevice, SeparateDevice, device_for
from vramkit.offload.session import OffloadSession

WIDTH, BLOCKS = 48, 12
MIB = 1 << 20
SPECIES = [
    "llama, tied", "t5", "convnext", "gru speller with a cell",
    "transformer encoder and decoder, fused in_proj",
]  # fmt: skip

has_gpu = torch.cuda.is_available() and _native.HAS_CUDA_OPERATORS
if os.environ.get("REQUIRE_GPU") == "1":
    assert has_gpu, "REQUIRE_GPU=1, and there is no GPU, or this package is without CUDA"
needs_gpu = pytest.mark.skipif(not has_gpu, reason="no GPU")


class StandIn(SeparateDevice):
    """A device apart whose memory is the host's; torch's allocator on it is what is told here."""

    name = "stand-in"
    windows = False

    def __init__(self) -> None:
        super().__init__()
        self.part, self.tensors, self.cached, self.room = 1.0, 0, 0, 1 << 40
        self.events: list[str] = []
        self.pinned = 0
        self.free = 1 << 30
        self.graphs = 0

    def whole(self, engine: Any) -> Tensor | None:
        return None if self.windows else super().whole(engine)

    def pin(self, mapping: mmap.mmap) -> object:
        self.pinned += len(mapping)
        return object()

    def host_room(self) -> int:
        return self.room

    def free_bytes(self) -> int:
        return self.free

    def segment(self, moved: int) -> int:
        return 4096

    def target(self) -> str:
        return "cuda:9.0"

    def out_of_memory(self, text: str) -> BaseException:
        return torch.OutOfMemoryError(text)

    def allocated(self) -> int:
        return self.tensors

    def reserved(self) -> int:
        return self.tensors + self.cached

    def total(self) -> int:
        return 1 << 40

    def fraction(self) -> float:
        return self.part

    def set_fraction(self, fraction: float) -> None:
        self.part = fraction

    def empty_cache(self) -> None:
        self.events.append("empty")
        self.cached = 0

    def moved(self, tensor: Tensor) -> Tensor:
        self.events.append("moved")
        return tensor.clone()

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        made = function()
        self.graphs += 1

        def replay() -> None:
            self.events.append("replayed")
            for old, new in zip(leaves(made), leaves(function()), strict=True):
                old.copy_(new)

        return made, replay

    @property
    def bytes(self) -> int:
        """What torch's allocator may take."""
        return round(self.part * self.total())


def leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=needs_gpu)])
def where(request: pytest.FixtureRequest) -> SeparateDevice:
    """A device apart: the stand-in, or a GPU."""
    if request.param == "cuda":
        found = device_for("cuda")
        assert isinstance(found, CudaDevice)
        return found
    return StandIn()


@pytest.fixture
def fake() -> StandIn:
    return StandIn()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Blocks, a buffer, and a parameter that the model itself uses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("offset", torch.randn(WIDTH))

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for block in self.blocks:
            x = block(x) * times
        return x + self.bias + self.offset


def on(model: nn.Module, where: SeparateDevice) -> nn.Module:
    """A resident copy there."""
    return copy.deepcopy(model).to(where.torch)


def result(model: nn.Module, inputs: Any, to: torch.device | None = None) -> Tensor:
    if to is not None:
        inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(to), inputs)
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return leaves(dict(out) if isinstance(out, dict) else out)[0].cpu()


def offloaded(
    model: nn.Module, inputs: Any, where: Any, folder: Path, share: float = 0.4, **options: Any
) -> OffloadSession:
    """Within the least limit and a share of what all of it would take beside a call."""
    with pytest.raises(BudgetError) as caught:
        enable_vram_management(
            model, "1 B", 0, inputs=inputs, folder=folder, device=where, **options
        )
    limit = caught.value.needed_bytes + int(weight_bytes(model) * share)
    enable_vram_management(
        model, f"{limit} B", 0, inputs=inputs, folder=folder, device=where, **options
    )
    found = model.vramkit_session
    assert isinstance(found, OffloadSession)
    return found
