"""Precision that follows the free memory: each block's format is chosen anew between runs.

The weights as they were wait in a file. Under pressure blocks go to smaller formats, those first
that lose least for the bytes they give; with room, and a margin of it, they come back from the
file, so that a block in a format is always what direct conversion would have made of it.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _core
from ._operators import encode
from .candidates import Candidate, candidates
from .convert import Precision, check_weight, keep_ties, storage_format, swap_candidate
from .errors import BudgetError
from .formats import StorageFormat
from .layers import QuantizedLayer
from .shards import SAFETENSORS_NAMES, Checkpoint
from .sizes import format_size, parse_size

DEFAULT_FORMATS = ("bf16", "int8", "nf4")


@dataclass(frozen=True)
class PrecisionChange:
    """One block's change of format, as observers are told."""

    block: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int


@dataclass
class _Block:
    name: str
    members: list[Candidate]
    sizes: list[int]  # bytes by format
    errors: list[float]  # squared error by format, relative to the squared weight, times elements


class DynamicPrecision:
    """Keeps a model's blocks in the best formats that the free memory holds.

    Args:
        model: A plain module; converted in place at once, to what there is room for now.
        formats: From best to smallest; each must take fewer bytes than the one before.
        reserve: Kept free of weights: for activations, and for others. GiB, or text.
        margin: Blocks come back only when the formats they would have leave this share of their
            bytes free besides: without it, memory that comes and goes would have blocks recoded at
            every run.
        folder: Where the file of plain weights lies. None: the folder of temporary files.
        free: Returns the bytes that are free now; by default CUDA's (torch's own cached memory
            counts as free), or the host's available memory.
        skip: Layers to leave plain, as in `convert`.
        on_change: Called with a `PrecisionChange` for each block that changes.

    A block is one element of a list of layers ("layers.3"), and any layer outside of such lists.
    Before each call of the model (none of them running) formats are chosen; `adjust` does so by
    hand. If nothing fits, the smallest formats are taken and BudgetError is raised by `adjust`
    (before a call it is a warning of torch's own running out that may follow).
    """

    def __init__(
        self,
        model: nn.Module,
        formats: Sequence[Precision] = DEFAULT_FORMATS,
        *,
        reserve: int | float | str = "512 MB",
        margin: float = 0.1,
        folder: str | os.PathLike[str] | None = None,
        free: Callable[[], int] | None = None,
        skip: Iterable[str] = (),
        on_change: Callable[[PrecisionChange], object] | None = None,
    ) -> None:
        if not margin >= 0:
            raise ValueError(f"margin is a share from 0 on, got {margin!r}")
        self._formats = [storage_format(name) for name in formats]
        if len(self._formats) < 2:
            raise ValueError("dynamic precision needs two formats at least")
        if any(fmt.activations for fmt in self._formats):
            raise ValueError("formats that round activations are not for blocks of all kinds")
        self._model, self._margin = model, margin
        self._reserve = parse_size(reserve)
        self._free = free or (lambda: _free_bytes(model))
        self._observer = on_change
        self._lock = threading.RLock()
        self._running = 0
        found, _ = candidates(model, skip)
        if not found:
            raise ValueError("this model has no weights that can be converted")
        if any(c.folding is not None for c in found):
            raise ValueError("fold parametrizations (weight norm) first: torch's remove functions")
        for candidate in found:
            for fmt in self._formats:
                check_weight(candidate.name, candidate.weight, fmt)
        self._blocks = self._measured(found)
        self._file = _write(found, folder)
        self._stored = Checkpoint(self._file)
        self._levels: list[int] | None = None
        try:
            self._first()
        except BaseException:
            self._file.unlink(missing_ok=True)
            raise
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._enter()),
            model.register_forward_hook(lambda *_: self._leave(), always_call=True),
        ]

    def _measured(self, found: list[Candidate]) -> list[_Block]:
        from .planner import weight_error

        groups: dict[str, list[Candidate]] = {}
        for candidate in found:
            groups.setdefault(_block_of(candidate.name), []).append(candidate)
        blocks = []
        for name, members in groups.items():
            sizes, errors = [], []
            for fmt in self._formats:
                sizes.append(sum(_stored_bytes(c, fmt) for c in members))
                errors.append(sum(weight_error(c.weight, fmt) * c.weight.numel() for c in members))
            if any(small >= large for large, small in itertools.pairwise(sizes)):
                names = ", ".join(f.name for f in self._formats)
                raise ValueError(f"formats go from largest to smallest, which {names} do not")
            blocks.append(_Block(name, members, sizes, errors))
        return blocks

    # What is there

    @property
    def bytes(self) -> int:
        """Bytes of the blocks' weights now."""
        assert self._levels is not None
        return self._sum(self._levels)

    def formats(self) -> dict[str, str]:
        """The format of each block now."""
        assert self._levels is not None
        return {
            block.name: self._formats[level].name
            for block, level in zip(self._blocks, self._levels, strict=True)
        }

    def _sum(self, levels: Sequence[int]) -> int:
        return sum(b.sizes[level] for b, level in zip(self._blocks, levels, strict=True))

    def choose(self, budget: int) -> list[int]:
        """The format of each block, by index, for weights of `budget` bytes: least loss first."""
        levels = [0] * len(self._blocks)
        total = self._sum(levels)
        last = len(self._formats) - 1
        while total > budget:
            steps = [
                (self._cost(block, level), index)
                for index, (block, level) in enumerate(zip(self._blocks, levels, strict=True))
                if level < last
            ]
            if not steps:
                break
            _, index = min(steps)
            block, level = self._blocks[index], levels[index]
            total -= block.sizes[level] - block.sizes[level + 1]
            levels[index] = level + 1
        return levels

    @staticmethod
    def _cost(block: _Block, level: int) -> float:
        """Squared error that one step down adds, for each byte that it gives."""
        more = block.errors[level + 1] - block.errors[level]
        return max(0.0, more) / (block.sizes[level] - block.sizes[level + 1])

    # Changing

    def adjust(self) -> list[PrecisionChange]:
        """Choose and convert now; returns what changed.

        Raises RuntimeError during a call, BudgetError if the smallest formats do not fit (which
        they are in then).
        """
        with self._lock:
            if self._running:
                raise RuntimeError("the model is running: formats change between runs")
            changes, short = self._adjusted()
        if short:
            raise BudgetError(
                f"the smallest formats take {format_size(self.bytes)}, and {format_size(short)} "
                "less are free beside the reserve",
                self.bytes,
            )
        return changes

    def _adjusted(self) -> tuple[list[PrecisionChange], int]:
        assert self._levels is not None
        now = self.bytes
        budget = now + self._free() - self._reserve
        if now > budget:
            wanted = self.choose(budget)
        else:
            wanted = self.choose(int(budget / (1 + self._margin)))
            if self._sum(wanted) <= now:
                return [], 0
        changes = self._convert(wanted)
        return changes, max(0, self.bytes - budget)

    def _first(self) -> None:
        # The plain weights are in memory still, and make room as they go.
        plain = sum(c.original_bytes for b in self._blocks for c in b.members)
        budget = plain + self._free() - self._reserve
        self._levels = self.choose(budget)
        for block, level in zip(self._blocks, self._levels, strict=True):
            for candidate in block.members:
                fmt = self._formats[level]
                swap_candidate(candidate, encode(candidate.weight.detach(), fmt, candidate.lead))
        keep_ties(self._model)

    def _convert(self, wanted: list[int]) -> list[PrecisionChange]:
        assert self._levels is not None
        changed = [i for i, level in enumerate(wanted) if level != self._levels[i]]
        # What gives memory before what takes it.
        changed.sort(key=lambda i: self._levels[i] - wanted[i])  # type: ignore[index]
        changes = []
        for index in changed:
            block, before, after = self._blocks[index], self._levels[index], wanted[index]
            for candidate in block.members:
                self._recode(candidate, self._formats[after])
            self._levels[index] = after
            names = (self._formats[before].name, self._formats[after].name)
            change = PrecisionChange(block.name, *names, block.sizes[before], block.sizes[after])
            changes.append(change)
            if self._observer is not None:
                self._observer(change)
        return changes

    def _recode(self, candidate: Candidate, fmt: StorageFormat) -> None:
        layer = candidate.module
        assert isinstance(layer, QuantizedLayer)
        device = layer.stored_part(candidate.leaf, "codes").device
        dtype = layer.stored_parameter(candidate.leaf).dtype
        lead = layer.stored_parameter(candidate.leaf).lead
        weight = self._stored.read(candidate.full_name).to(device)
        layer._adopt(candidate.leaf, encode(weight, fmt, lead), dtype)
        for user in candidate.users[1:]:
            other: Any = user.module
            other._adopt(user.leaf, layer.parts_of(candidate.leaf), dtype, (layer, candidate.leaf))

    def _enter(self) -> None:
        with self._lock:
            if not self._running and self._adjusted()[1]:
                warnings.warn(
                    "even the smallest formats leave less memory free than the reserve",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self._running += 1

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1

    def close(self) -> None:
        """Stop following the memory, and delete the file; formats stay what they are."""
        for hook in self._hooks:
            hook.remove()
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> DynamicPrecision:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _block_of(name: str) -> str:
    """`model.layers.3.mlp.up` -> `model.layers.3`; a layer outside of lists is its own block."""
    found = re.match(r"(.*?\.|)\d+(?=\.|$)", name)
    return found.group(0) if found else name


def _stored_bytes(candidate: Candidate, fmt: StorageFormat) -> int:
    shape = torch.empty(candidate.shape, dtype=candidate.weight.dtype, device="meta")
    return encode(shape, fmt, candidate.lead).nbytes


def _write(found: list[Candidate], folder: str | os.PathLike[str] | None) -> Path:
    handle, name = tempfile.mkstemp(suffix=".safetensors", prefix="vramkit-plain-", dir=folder)
    os.close(handle)
    specs = [(c.full_name, SAFETENSORS_NAMES[c.weight.dtype], list(c.weight.shape)) for c in found]
    try:
        with _core.SafetensorsWriter(name, specs, {}) as writer:
            for candidate in found:
                plain = candidate.weight.detach().cpu().contiguous()
                writer.write(candidate.full_name, plain.data_ptr(), plain.nbytes)
            writer.commit()
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _free_bytes(model: nn.Module) -> int:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    from .doctor import available_memory

    found = available_memory()
    if found is None:
        raise ValueError("this system does not say what memory is free; give free=")
    return found
