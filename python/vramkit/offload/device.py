"""What a session asks of the device that its model computes on; every call of torch.cuda is here.

`HostDevice` is the twin for a machine's own memory, where none of it is needed. A session knows
neither which of them it has nor whether a GPU is there, so that tests run it on a device that
behaves like a GPU and whose memory is the host's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _core, _native
from ..doctor import available_memory

__all__ = ["CudaDevice", "HostDevice", "device_for"]

LARGE_PAGE = 2 << 20
SEGMENT = 32 << 20
# Of less than this much, segments would be a large part.
SMALL = 1 << 30
LINK_BYTES = 64 << 20
# Pinned memory cannot be swapped: so much of what is available is taken for it, at most.
PINNED_PART = 0.75


class HostDevice:
    """Memory of the host as the device: a disk is behind it, and calls are done when they return.

    Attributes:
        torch: The device as torch has it.
        name: As messages have it; engine_name: as the engine does.
        apart: Whether its memory is another than that of parameters between calls, which then wait
            in memory of the host that the device copies from.
    """

    torch = torch.device("cpu")
    name = engine_name = "cpu"
    apart = False

    def stream(self) -> int:
        """The handle of the stream on which the calling thread computes now."""
        return 0

    def tensor(self, view: Any) -> Tensor:
        """Memory of the engine as bytes."""
        return torch.frombuffer(view, dtype=torch.uint8)

    def whole(self, engine: _core.Engine) -> Tensor | None:
        """All addresses of an engine; None where they are not one range, and windows are."""
        return self.tensor(engine.view()) if engine.contiguous else None

    def free_bytes(self) -> int | None:
        """What can be had now, by whoever asks first; None: it is not known."""
        return available_memory()

    def random_state(self) -> Tensor:
        """Of the generators that a block may draw from."""
        return torch.get_rng_state()

    def take(self, values: Any) -> Any:
        """A call's arguments as the device computes with them."""
        return values

    def mark(self, name: str) -> Any:
        """A named range on a profiler's timeline."""
        return _NO_RANGE

    def share(self, owner: object, nbytes: int, there: int = 0) -> None:
        """Torch's own allocator may take so many bytes on behalf of this owner.

        So many of them it has taken already.
        """

    def unshare(self, owner: object) -> None:
        """The end of `share`."""

    def empty_cache(self) -> None:
        """What torch's allocator keeps for itself goes back."""

    def link_rate(self) -> float:
        """Bytes per second of copies to the device, measured now."""
        from ..rates import measure_rates

        return measure_rates((), disk=False).link_bytes_per_second

    def segment(self, moved: int) -> int:
        """Bytes of memory that an engine takes at once, for blocks of `moved` bytes in all."""
        return 4096 if moved < (256 << 20) else LARGE_PAGE

    def out_of_memory(self, text: str) -> BaseException:
        """The error of torch's type."""
        return MemoryError(text)


class _NoRange:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_NO_RANGE = _NoRange()


class SeparateDevice(HostDevice):
    """A device with memory of its own: what has nothing to do with whose it is."""

    apart = True

    def __init__(self) -> None:
        self._shares: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._before: float | None = None
        self._others = 0

    def pin(self, mapping: mmap.mmap) -> object:
        """Register memory of the host for copies; it is so for as long as the result lives."""
        raise NotImplementedError

    def host_room(self) -> int:
        """Bytes of blocks that may wait in memory of the host."""
        found = available_memory()
        return 0 if found is None else int(found * PINNED_PART)

    def target(self) -> str:
        """As `vramkit.estimate` takes it."""
        raise NotImplementedError

    def allocated(self) -> int:
        """Bytes that tensors in torch's allocator have."""
        raise NotImplementedError

    def reserved(self) -> int:
        """Bytes that torch's allocator has taken."""
        raise NotImplementedError

    def total(self) -> int:
        """Bytes of the device."""
        raise NotImplementedError

    def fraction(self) -> float:
        """The part of the device that torch's allocator may take."""
        raise NotImplementedError

    def set_fraction(self, fraction: float) -> None:
        """Another part."""
        raise NotImplementedError

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What the function returns, in memory that stays; and what computes it there again."""
        raise NotImplementedError

    def take(self, values: Any) -> Any:
        """Tensors of the host as the device's. Those of no dimension are numbers to operators."""

        def moved(value: Tensor) -> Tensor:
            if value.device == self.torch or value.device.type != "cpu" or not value.dim():
                return value
            return self.moved(value)

        return torch.utils._pytree.tree_map_only(Tensor, moved, values)

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor's values on the device."""
        return tensor.to(self.torch, non_blocking=True)

    def share(self, owner: object, nbytes: int, there: int = 0) -> None:
        """Torch's share of the limits, with what its allocator had before the first of them.

        A smaller share than what is reserved empties torch's cache; tensors stay where they are.
        """
        if self._before is None:
            self._before, self._others = self.fraction(), self.allocated() - there
        if owner not in self._shares:
            weakref.finalize(owner, self._settle).atexit = False
        self._shares[owner] = nbytes
        self._settle()

    def unshare(self, owner: object) -> None:
        """Without owners torch may take as much as it might before."""
        if self._shares.pop(owner, None) is not None:
            self._settle()

    def shared(self) -> int | None:
        """The bytes that torch's allocator may have; None: as many as it likes."""
        return self._others + sum(self._shares.values()) if self._shares else None

    def _settle(self) -> None:
        most = self.shared()
        if self._before is None:
            return
        if most is None:
            self.set_fraction(self._before)
            self._before = None
            return
        if self.reserved() > most:
            self.empty_cache()
        self.set_fraction(min(self._before, most / self.total()))


class CudaDevice(SeparateDevice):
    """One NVIDIA GPU. Raises ValueError, with the reason, where it cannot be used."""

    def __init__(self, index: int) -> None:
        super().__init__()
        if not _native.HAS_CUDA_OPERATORS:
            raise ValueError(
                'device="cuda" needs a torch with CUDA and a vramkit that was built with CUDA '
                "(docs/cuda.md, Build)"
            )
        count, why = _core.cuda_devices()
        if index >= count:
            raise ValueError(
                f"there is no cuda:{index}: this process sees {count} CUDA devices"
                + (f" ({why})" if why else "")
            )
        self.index = index
        self.name = self.engine_name = f"cuda:{index}"
        self.torch = torch.device("cuda", index)
        self._pool: Any = None

    def stream(self) -> int:
        """Of the device, whichever is current in this thread."""
        return int(torch._C._cuda_getCurrentRawStream(self.index))

    def tensor(self, view: Any) -> Tensor:
        """A view by DLPack."""
        found: Tensor = torch.utils.dlpack.from_dlpack(view)
        return found

    def free_bytes(self) -> int | None:
        """What the driver has, and torch keeps without using it."""
        return int(torch.cuda.mem_get_info(self.index)[0]) + self.reserved() - self.allocated()

    def random_state(self) -> Tensor:
        """The host's and the device's, whose state lies on the host too."""
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(self.index)])

    def mark(self, name: str) -> Any:
        """By NVTX."""
        return torch.cuda.nvtx.range(name)

    def link_rate(self) -> float:
        """Of pinned memory, by the device's own events; the best of three copies."""
        store = _core.HostStore(LINK_BYTES, device=self.name)
        pinned = torch.frombuffer(store, dtype=torch.uint8)
        times = []
        with torch.cuda.device(self.index):
            there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=self.torch)
            for _ in range(4):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                there.copy_(pinned, non_blocking=True)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
        return LINK_BYTES / min(times[1:])

    def empty_cache(self) -> None:
        """Waits for the device."""
        with torch.cuda.device(self.index):
            torch.cuda.empty_cache()

    def segment(self, moved: int) -> int:
        """CUDA's own granularity is 2 MiB on all devices that there are."""
        return LARGE_PAGE if moved < SMALL else SEGMENT

    def out_of_memory(self, text: str) -> BaseException:
        """As torch's allocator raises it."""
        return torch.OutOfMemoryError(text)

    def pin(self, mapping: mmap.mmap) -> object:
        """By cudaHostRegister, at its exact size."""
        return _core.PinnedBuffer(mapping, self.name)

    def target(self) -> str:
        """By compute capability."""
        major, minor = torch.cuda.get_device_capability(self.index)
        return f"cuda:{major}.{minor}"

    def allocated(self) -> int:
        """As torch counts them."""
        return torch.cuda.memory_allocated(self.index)

    def reserved(self) -> int:
        """As torch counts them."""
        return torch.cuda.memory_reserved(self.index)

    def total(self) -> int:
        """As torch takes the fraction of it."""
        return int(torch.cuda.get_device_properties(self.index).total_memory)

    def fraction(self) -> float:
        """1 unless somebody has set it."""
        return float(torch.cuda.get_per_process_memory_fraction(self.index))

    def set_fraction(self, fraction: float) -> None:
        """Of the whole device, for this process."""
        torch.cuda.set_per_process_memory_fraction(fraction, self.index)

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """A CUDA graph. Two calls first, on another stream: libraries make their workspaces then.

        Other threads go on with copies, hence "thread_local".
        """
        with torch.cuda.device(self.index):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(2):
                    function()
            torch.cuda.current_stream().wait_stream(beside)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                made = function()
        return made, graph.replay


HOST = HostDevice()
# Torch's share is of the whole process, so that what shares it is too.
_cuda: dict[int, CudaDevice] = {}


def device_for(device: str | torch.device | HostDevice | None) -> HostDevice:
    """The device that is meant by "cpu", "cuda", "cuda:1"; ValueError with the reason."""
    if device is None:
        return HOST
    if isinstance(device, HostDevice):
        return device
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device= is "cpu", "cuda" or "cuda:<index>": {error}') from None
    if wanted.type == "cpu":
        return HOST
    if wanted.type != "cuda":
        raise ValueError(f'models are offloaded to "cpu" or "cuda", not to {str(wanted)!r}')
    index = wanted.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    if index not in _cuda:
        _cuda[index] = CudaDevice(index)
    return _cuda[index]


class HostMemory:
    """Memory of the host as a file that nobody else can open, and as the device's source.

    It is shared, and registered for the device's copies. Parameters are views of private mappings
    of it: what is written to them is seen by the system's page tables, as with files on a disk,
    and does not reach what the device reads.

    Raises OSError where there is no memory for it.
    """

    def __init__(self, nbytes: int, device: SeparateDevice) -> None:
        self.nbytes = nbytes
        size = max(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE)
        self.descriptor = os.memfd_create("vramkit", os.MFD_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)
        self.mapping = mmap.mmap(self.descriptor, size)
        with contextlib.suppress(OSError):  # a system without large pages for shared memory
            self.mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self.mapping, dtype=torch.uint8)
        self._device = device
        self._pinned: object = None
        self.address = self.bytes.data_ptr()

    def seal(self) -> _core.FileSource:
        """What was written to `bytes` stays as it is; the file that parameters are mapped from."""
        # Touches all pages, which changes the file's time.
        self._pinned = self._device.pin(self.mapping)
        return _core.FileSource(f"/proc/self/fd/{self.descriptor}")

    def source(self) -> _core.MemorySource:
        """What the engine copies from."""
        return _core.MemorySource(self.address, self.mapping.size(), self)
