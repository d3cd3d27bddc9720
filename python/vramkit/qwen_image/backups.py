"""Tensors kept as they were, in memory or in a file without a name, until they are put back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import torch
from torch import Tensor

_Kept = tuple[torch.dtype, torch.Size, "Tensor | None", int]


class Backups:
    """Copies by key. With `folder`, their bytes are in a file there that goes with this object."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._file: IO[bytes] | None = None
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._kept: dict[str, list[_Kept]] = {}
        self.bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._kept))

    def keep(self, key: str, tensors: Sequence[Tensor]) -> None:
        """Keep copies of these."""
        made: list[_Kept] = []
        for tensor in tensors:
            plain = tensor.detach()
            if self._file is None:
                made.append((plain.dtype, plain.shape, plain.clone(), 0))
            else:
                at = self._file.seek(0, os.SEEK_END)
                raw = plain.contiguous().reshape(-1).view(torch.uint8)
                self._file.write(memoryview(raw.numpy()))  # type: ignore[arg-type]
                made.append((plain.dtype, plain.shape, None, at))
            self.bytes += plain.nbytes
        self._kept[key] = made

    def shapes(self, key: str) -> list[tuple[torch.dtype, torch.Size]]:
        """What the copies are like."""
        return [(dtype, shape) for dtype, shape, _, _ in self._kept[key]]

    def read(self, key: str) -> list[Tensor]:
        """The copies, in fresh memory where they were in a file."""
        found = []
        for dtype, shape, tensor, at in self._kept[key]:
            if tensor is None:
                assert self._file is not None
                self._file.flush()
                raw = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
                self._file.seek(at)
                view = memoryview(raw.numpy())  # type: ignore[arg-type]
                if self._file.readinto(view) != len(view):  # type: ignore[attr-defined]
                    raise OSError("the file with the weights before fusing was cut off")
                tensor = raw.view(dtype).reshape(shape)
            found.append(tensor)
        return found

    def close(self) -> None:
        """Let go of everything."""
        self._kept = {}
        self.bytes = 0
        if self._file is not None:
            self._file.close()
            self._file = None
