"""Tensors of safetensors files, many at once: read by several threads, or mapped.

Reading goes straight into one piece of memory in large pages, each piece of a file in the way that
is fastest for it at that moment: from the page cache, or past it (docs/checkpoints.md).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _core
from .convert import Progress, progress_bar
from .shards import Checkpoint

# More than two, so that the disk has work while others of them touch fresh memory.
THREADS = 4
LARGE_PAGE = 2 << 20
# Below this, memory comes in small pages: large ones would be more than the tensors.
SMALL = 64 << 20
# What the cache of gathered blocks may hold, unless `vramkit.load` is told otherwise.
CACHE_BYTES = 64 << 30


def load_file(
    path: str | os.PathLike[str],
    *,
    mapped: bool = False,
    into: Mapping[str, Tensor] | None = None,
    progress: bool | Progress = False,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder's shards, by name.

    Args:
        path: A file, or a folder with one file or with shards and their index.
        mapped: Tensors are views of the mapped file instead of copies: there at once, read as they
            are looked at, in memory that the system may take back. The file must then stay as it
            is for as long as they live: what becomes of tensors whose file is changed is undefined,
            and where it is cut off the process dies. What is written to them stays in memory, the
            file is never changed. Tensors that lie askew in the file are copied all the same.
        into: Tensors to read into, by name; no memory is taken. Contiguous, on the CPU, with the
            dtypes and shapes of the file's, all of which must be there.
        progress: True for a bar in bytes per second, or a function of (bytes so far, bytes in all,
            name of a tensor).

    The bits are those that `safetensors.torch.load_file` gives. Memory is that of the tensors; a
    tensor's goes back to the system with it. Raises CheckpointError for a file that is not sound or
    that has dtypes unknown to torch, FileChangedError where it changes meanwhile, OSError,
    MemoryError; with `into`, ValueError, and where reading fails their content is unspecified.

    >>> import tempfile, safetensors.torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors.torch.save_file({"x": torch.arange(3)}, f"{folder}/a.safetensors")
    ...     vramkit.load_file(f"{folder}/a.safetensors")
    {'x': tensor([0, 1, 2])}
    """
    if mapped and into is not None:
        raise ValueError("give mapped or into, not both: what is mapped needs no other memory")
    checkpoint = Checkpoint(path)
    names = checkpoint.names()
    if into is not None:
        return _read_into(checkpoint, names, into, progress)
    if mapped:
        return MappedTensors(checkpoint).tensors(names)
    return read_tensors(checkpoint, names, progress=progress)


def read_tensors(
    checkpoint: Checkpoint, names: Iterable[str], *, progress: bool | Progress = False
) -> dict[str, Tensor]:
    """These tensors, in fresh memory: one piece for all, of which each gives its part back."""
    names = list(dict.fromkeys(names))
    dtypes = {name: checkpoint.dtype(name) for name in names}
    layout = _core.block_layout(
        [(*checkpoint.place(name), dtypes[name].itemsize) for name in names]
    )
    large = layout.bytes >= SMALL
    store = _core.HostStore(layout.bytes, LARGE_PAGE if large else 4096)
    base = _address(store)
    runs = [(e.source, e.source_offset, e.bytes, base + e.block_offset) for e in layout.extents]
    _read(checkpoint, runs, names, progress, whole_units=True)
    found = {}
    for name, place in zip(names, layout.places, strict=True):
        info = checkpoint.info(name)
        found[name] = torch.empty(info.shape, dtype=dtypes[name])
        if info.nbytes:
            part = _core.HostPart(store, place, info.nbytes)
            found[name] = torch.frombuffer(part, dtype=dtypes[name]).reshape(info.shape)
    return found


def _read_into(
    checkpoint: Checkpoint,
    names: list[str],
    into: Mapping[str, Tensor],
    progress: bool | Progress,
) -> dict[str, Tensor]:
    lost = sorted(set(names) - set(into))
    if lost:
        raise ValueError(f"into has no tensor {lost[0]!r} ({len(lost)} of {checkpoint.path})")
    runs: list[tuple[int, int, int, int]] = []
    for name in names:
        info, tensor = checkpoint.info(name), into[name]
        if tensor.dtype != checkpoint.dtype(name) or list(tensor.shape) != list(info.shape):
            raise ValueError(
                f"into[{name!r}] is {tensor.dtype} {list(tensor.shape)}, the file has "
                f"{checkpoint.dtype(name)} {list(info.shape)}"
            )
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"into[{name!r}] must be contiguous and on the CPU")
        source, offset, nbytes = checkpoint.place(name)
        last = runs[-1] if runs else (-1, 0, 0, 0)
        if (
            last[0] == source
            and last[1] + last[2] == offset
            and last[3] + last[2] == (tensor.data_ptr())
        ):
            runs[-1] = (source, last[1], last[2] + nbytes, last[3])
        elif nbytes:
            runs.append((source, offset, nbytes, tensor.data_ptr()))
    found = {name: into[name] for name in names}
    # What autograd has kept of them is no longer what it was.
    torch.autograd.graph.increment_version(found.values())
    _read(checkpoint, runs, names, progress, whole_units=False)
    return found


def _read(
    checkpoint: Checkpoint,
    runs: list[tuple[int, int, int, int]],
    names: list[str],
    progress: bool | Progress,
    *,
    whole_units: bool,
) -> None:
    total = sum(run[2] for run in runs)
    ends = list(accumulate(checkpoint.info(name).nbytes for name in names))
    done = 0
    with progress_bar(progress, total, "load") as advance:

        def arrived(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            advance(nbytes, names[min(bisect_right(ends, done), len(names) - 1)])

        _core.read_runs(
            checkpoint.sources(),
            runs,
            whole_units=whole_units,
            threads=THREADS,
            progress=arrived if progress else None,
        )


def _address(store: _core.HostStore) -> int:
    if not store.bytes:
        return 0
    return torch.frombuffer(store, dtype=torch.uint8).data_ptr()


class Mapped(NamedTuple):
    """A mapping, and the files that its extents name by number."""

    files: list[_core.FileSource]
    mapping: _core.FileMapping


class ModelFiles:
    """The mappings that a model's parameters are views of, kept with it as `vramkit_files`.

    Offloading reads the parameters from these files then, and does not write them again.
    """

    def __init__(
        self,
        mapped: list[Mapped],
        cache_bytes: int = CACHE_BYTES,
        own: list[_core.FileSource] | None = None,
    ) -> None:
        self.mapped, self.cache_bytes = mapped, cache_bytes
        # Files without a name: a cache would never find them again.
        self.own = own if own is not None else []

    @classmethod
    def of(cls, model: nn.Module) -> ModelFiles:
        """Those of a model and of the models in it."""
        found = [module.__dict__.get("vramkit_files") for module in model.modules()]
        files = [one for one in found if one is not None]
        most = max((one.cache_bytes for one in files), default=CACHE_BYTES)
        found_files = cls([mapped for one in files for mapped in one.mapped], most)
        found_files.own = [file for one in files for file in one.own]
        return found_files

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has memory of its own."""
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def _where(self, tensor: Tensor) -> tuple[Mapped, _core.Extent] | None:
        for mapped in self.mapped:
            extent = mapped.mapping.find(tensor.data_ptr(), tensor.nbytes)
            if extent is not None:
                return mapped, extent
        return None

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is a view of one of the mappings."""
        return self._where(tensor) is not None

    def find(self, tensor: Tensor) -> tuple[_core.FileSource, int] | None:
        """The file and the offset that have the tensor's bytes, if nobody changed it since."""
        found = self._where(tensor)
        if found is None or tensor.stride() != torch.empty_like(tensor, device="meta").stride():
            return None
        mapped, extent = found
        if mapped.mapping.changed(extent.block_offset, extent.bytes):
            return None
        return mapped.files[extent.source], extent.source_offset


class MappedTensors:
    """A checkpoint's files as memory, one mapping for each, and the tensors in them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        files = checkpoint.sources()
        self.mapped = [
            Mapped(
                [file],
                _core.FileMapping([file], [_core.Extent(0, 0, 0, file.bytes)], file.bytes),
            )
            for file in files
        ]

    def tensors(self, names: Iterable[str], *, moving: bool = False) -> dict[str, Tensor]:
        """Views of the mappings; copies where an element's address would not be one.

        `moving`: no copies even there, for tensors that go elsewhere before anything computes.
        """
        found, askew = {}, []
        for name in names:
            dtype, info = self.checkpoint.dtype(name), self.checkpoint.info(name)
            found[name] = torch.empty(info.shape, dtype=dtype)
            source, offset, nbytes = self.checkpoint.place(name)
            if offset % dtype.itemsize and not moving:
                askew.append(name)
            elif nbytes:
                flat = torch.frombuffer(
                    self.mapped[source].mapping, dtype=torch.uint8, count=nbytes, offset=offset
                )
                found[name] = flat.view(dtype).reshape(info.shape)
        return found | read_tensors(self.checkpoint, askew)
