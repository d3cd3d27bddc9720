"""The tensors of a checkpoint by name: one safetensors file, or the shards that an index lists."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from . import _core
from .errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The format's names of the dtypes that torch has too.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class Checkpoint:
    """The tensors of a safetensors file, or of the shards that an index lists, by name.

    Only headers are read at first. Raises CheckpointError for a file that is not sound, a shard
    that is missing, or an index that disagrees with its shards.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files: dict[str, _core.SafetensorsFile] = {}
        self._places: dict[str, tuple[int, int, int]] = {}
        self._opened: list[_core.SafetensorsFile] = []
        self._sources: list[_core.FileSource] | None = None
        for index, file in enumerate(self._shards()):
            opened = _core.SafetensorsFile(file)
            self._opened.append(opened)
            for name in opened.names():
                if name in self._files:
                    raise CheckpointError(f"{file}: tensor {name!r} is in another shard too")
                self._files[name] = opened
            for info in opened.tensors():
                self._places[info.name] = (index, info.begin, info.nbytes)
        self._check_index()

    def _shards(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FileNotFoundError(f"no checkpoint at {self.path}: no such file or folder")
        self._weight_map = self._read_index()
        if self._weight_map is not None:
            shards = [self.path / name for name in sorted(set(self._weight_map.values()))]
            for shard in shards:
                if not shard.is_file():
                    raise CheckpointError(
                        f"{self.path / INDEX} lists the shard {shard.name!r}, which is missing; "
                        "download it again"
                    )
            return shards
        if (self.path / WEIGHTS).is_file():
            return [self.path / WEIGHTS]
        others = sorted(self.path.glob("*.safetensors"))
        if not others:
            raise CheckpointError(
                f"{self.path} holds no safetensors file (expected {WEIGHTS} or {INDEX}); "
                "pickled checkpoints are not read: convert them with safetensors' own tool"
            )
        return others

    def _read_index(self) -> dict[str, str] | None:
        file = self.path / INDEX
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is no index of shards: {error!r}") from error
        for name, shard in found.items() if isinstance(found, dict) else [("", None)]:
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise CheckpointError(
                    f"{file}: the shard of {name!r} must be the name of a file beside it, "
                    f"got {shard!r}"
                )
        return dict(found)

    def _check_index(self) -> None:
        listed = getattr(self, "_weight_map", None)
        if listed is not None:
            lost = sorted(set(listed) - set(self._files))
            if lost:
                raise CheckpointError(
                    f"{self.path / INDEX} lists {lost[0]!r} ({len(lost)} such tensors), which "
                    "its shards do not hold"
                )

    def names(self) -> list[str]:
        """Names of all tensors, in the order of their bytes."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def info(self, name: str) -> _core.TensorInfo:
        """Name, dtype, shape and bytes of a tensor."""
        if name not in self._files:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}")
        return self._files[name].info(name)

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype of a tensor; CheckpointError where torch has none."""
        info = self.info(name)
        if info.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {info.dtype}, which torch has no type for"
            )
        return SAFETENSORS_DTYPES[info.dtype]

    def meta(self, name: str) -> Tensor:
        """A tensor of that shape and dtype without memory."""
        return torch.empty(self.info(name).shape, dtype=self.dtype(name), device="meta")

    def place(self, name: str) -> tuple[int, int, int]:
        """Where a tensor's bytes lie: the index of its file in `sources`, offset, and how many."""
        if name not in self._places:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}")
        return self._places[name]

    def sources(self) -> list[_core.FileSource]:
        """The files, for reading many tensors at once: those whose headers were read.

        Raises FileChangedError where a name means another file by now.
        """
        if self._sources is None:
            self._sources = [_core.source_of(file) for file in self._opened]
        return self._sources

    def read(self, name: str) -> Tensor:
        """The tensor, in fresh memory."""
        out = torch.empty(self.info(name).shape, dtype=self.dtype(name))
        self._files[name].read_into(name, out.data_ptr(), out.nbytes)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self._files)
