"""
vramkit's native core: formats, files, planner, allocator simulator, ledger, memory, offload engine.
"""

from __future__ import annotations
import collections.abc
import os
import pathlib
import typing
import typing_extensions

__all__: list[str] = [
    "Admission",
    "AdmissionAction",
    "AllocatorBlock",
    "AllocatorConfig",
    "AllocatorSegment",
    "BlockCache",
    "BlockFile",
    "BlockLayout",
    "BlockSpec",
    "BlockStats",
    "BlockStatus",
    "Engine",
    "EngineStats",
    "EngineView",
    "Extent",
    "FileMapping",
    "FileSource",
    "Format",
    "HostPart",
    "HostPiece",
    "HostPool",
    "HostPoolStats",
    "HostStore",
    "Ledger",
    "LedgerEntry",
    "LedgerState",
    "MemorySource",
    "OutOfMemory",
    "PartBytes",
    "PeakBlock",
    "PinnedBuffer",
    "Placement",
    "PlacementResult",
    "PlannerResult",
    "PressureGauge",
    "ReplayResult",
    "Residence",
    "SafetensorsFile",
    "SafetensorsWriter",
    "Source",
    "TensorInfo",
    "active_isa",
    "advise_large_pages",
    "available_isas",
    "block_layout",
    "built_with_cuda",
    "builtin_formats",
    "cuda_devices",
    "dynamic_map",
    "least_device_bytes",
    "open_unnamed_file",
    "place",
    "plan_choices",
    "read_runs",
    "replay",
    "safetensors_bytes",
    "safetensors_dtypes",
    "source_of",
]

class PartBytes:
    """
    Exact bytes of each part of one stored weight.
    """
    @property
    def codes(self) -> int: ...
    @property
    def extra(self) -> int: ...
    @property
    def scales(self) -> int: ...
    @property
    def total(self) -> int: ...

class Format:
    """
    A storage format as data; see docs/formats.md.
    """
    def __init__(
        self,
        spec: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        table: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] = [],
    ) -> None: ...
    def bytes(
        self, shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> PartBytes:
        """
        Exact bytes of a weight of this shape.
        """
    def row_separable(self, cols: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Whether every row of `cols` elements has blocks and bytes of its own.
        """
    @property
    def spec(self) -> list[int]: ...
    @property
    def table(self) -> list[float]: ...

class TensorInfo:
    """
    One tensor of a safetensors file: name, dtype (the format's own name), shape, nbytes, and begin and end as byte offsets in the file.
    """
    def __repr__(self) -> str: ...
    @property
    def begin(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def end(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def shape(self) -> list[int]: ...

class SafetensorsFile:
    """
    An open safetensors file whose header has been checked.

    The header is refused unless it has exactly one meaning: names and fields once each, known dtypes,
    sizes that match, and tensors that fill the file without gap or overlap. Immutable; several threads
    may read at once.

    Raises CheckpointError for a file that is not sound (the text names the file and the tensor) and
    OSError if it cannot be opened or read.
    """
    def __contains__(self, arg0: str) -> bool: ...
    def __init__(self, path: os.PathLike | str | bytes) -> None: ...
    def __len__(self) -> int: ...
    def __repr__(self) -> str: ...
    def info(self, name: str) -> TensorInfo:
        """
        TensorInfo of one tensor. Raises CheckpointError if it is not there.
        """
    def metadata(self) -> dict[str, str]:
        """
        The header's __metadata__ as dict[str, str].
        """
    def names(self) -> list[str]:
        """
        Names of the tensors, in the order of their bytes.
        """
    def read_into(
        self,
        name: str,
        ptr: typing.SupportsInt | typing.SupportsIndex,
        nbytes: typing.SupportsInt | typing.SupportsIndex,
        *,
        offset: typing.SupportsInt | typing.SupportsIndex | None = None,
        drop_cache: bool = False,
    ) -> None:
        """
        Read a tensor's bytes to the address `ptr`, which must have room for `nbytes`.

        Without `offset` the whole tensor is read and `nbytes` must be its size; with it, `nbytes` bytes
        from that byte of the tensor on. `drop_cache` lets the system forget the pages that were read.

        Raises CheckpointError if the tensor is not there or the file became shorter after it was opened,
        ValueError if the sizes do not fit, OSError if the system cannot read.
        """
    def tensors(self) -> list[TensorInfo]:
        """
        TensorInfo of every tensor, in the order of their bytes.
        """
    @property
    def file_bytes(self) -> int:
        """
        Size of the file in bytes.
        """
    @property
    def path(self) -> pathlib.Path: ...

class SafetensorsWriter:
    """
    Writes a safetensors file tensor by tensor, or part by part.

    `tensors` lists (name, dtype, shape) in the order that they get in the file; dtype is the format's
    own name, such as "BF16". Disk space is reserved at once. Tensors may then be written in any order;
    `commit()` puts the finished file in its place. Until then a file of that name stays as it was, and
    leaving the writer (as a context manager, or by dropping it) without `commit()` leaves nothing
    behind. Several threads may write at once.

    Raises ValueError for names, dtypes or sizes that cannot be stored, and OSError, with the bytes
    needed, where the system refuses.
    """
    def __enter__(self) -> typing.Any: ...
    def __exit__(self, *args) -> None: ...
    def __init__(
        self,
        path: os.PathLike | str | bytes,
        tensors: collections.abc.Sequence[
            tuple[str, str, collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]]
        ],
        metadata: collections.abc.Mapping[str, str] | None = None,
    ) -> None: ...
    def __repr__(self) -> str: ...
    def commit(self) -> None:
        """
        Flush the file to the disk and rename it to its place.

        Raises ValueError naming a tensor that is not complete, OSError if the system refuses.
        """
    def discard(self) -> None:
        """
        Give up and remove the unfinished file. Does nothing after commit().
        """
    def info(self, name: str) -> TensorInfo:
        """
        TensorInfo of one tensor. Raises ValueError if it was not declared.
        """
    def tensors(self) -> list[TensorInfo]:
        """
        TensorInfo of every tensor, in the order of their bytes.
        """
    def write(
        self,
        name: str,
        ptr: typing.SupportsInt | typing.SupportsIndex,
        nbytes: typing.SupportsInt | typing.SupportsIndex,
        *,
        offset: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None:
        """
        Write `nbytes` bytes from the address `ptr` to the tensor, from byte `offset` of it on.

        Raises ValueError if they do not lie within the tensor or were written before, OSError if the
        system refuses; the unfinished file is then gone and the writer takes no more.
        """
    @property
    def committed(self) -> bool: ...
    @property
    def file_bytes(self) -> int:
        """
        Size of the finished file in bytes.
        """
    @property
    def path(self) -> pathlib.Path: ...

class PlacementResult:
    """
    A format and a place for every layer, and what is proven about it.
    """
    def __repr__(self) -> str: ...
    @property
    def choices(self) -> list[int]:
        """
        index of the choice taken, by group
        """
    @property
    def device_bytes(self) -> list[int]:
        """
        by phase: what is reserved, residents, slots
        """
    @property
    def found(self) -> bool:
        """
        False: no plan is known; with `optimal`, none exists
        """
    @property
    def host_bytes(self) -> int:
        """
        with staging slots
        """
    @property
    def loss(self) -> float: ...
    @property
    def lower_bound(self) -> float:
        """
        no plan has a smaller objective
        """
    @property
    def nodes(self) -> int:
        """
        parts of the problem that were bounded
        """
    @property
    def objective(self) -> float:
        """
        the weighted sum; without weights, the loss
        """
    @property
    def optimal(self) -> bool:
        """
        whether the search was completed
        """
    @property
    def seconds(self) -> float: ...
    @property
    def seconds_lower_bound(self) -> float:
        """
        without weights: no plan that loses no more is faster
        """
    @property
    def slot_bytes(self) -> list[int]:
        """
        by phase: one slot
        """
    @property
    def states(self) -> int:
        """
        partial plans kept
        """

class PlannerResult:
    """
    The planner's answer: which choice each group takes, and what is proven about it.
    """
    def __repr__(self) -> str: ...
    @property
    def bytes(self) -> int:
        """
        sum of the sizes taken
        """
    @property
    def choices(self) -> list[int]:
        """
        index of the choice taken, by group; a new list at each access
        """
    @property
    def cost(self) -> float:
        """
        sum of the costs taken, in group order
        """
    @property
    def lower_bound(self) -> float:
        """
        no plan within the budget costs less; equals cost if optimal
        """
    @property
    def optimal(self) -> bool:
        """
        whether the search was completed
        """
    @property
    def states(self) -> int:
        """
        partial plans kept during the search
        """

class AllocatorConfig:
    """
    What an allocator is told before it runs: torch's options, under torch's names, in bytes.
    """
    def __init__(
        self,
        kind: str = "cuda",
        *,
        limit: typing.SupportsInt | typing.SupportsIndex | None = None,
        device_memory: typing.SupportsInt | typing.SupportsIndex | None = None,
        max_split_size: typing.SupportsInt | typing.SupportsIndex | None = None,
        max_non_split_rounding_size: typing.SupportsInt | typing.SupportsIndex = 20971520,
        large_segment_size: typing.SupportsInt | typing.SupportsIndex = 20971520,
        garbage_collection_threshold: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        expandable_segments: bool = False,
        roundup_power2_divisions: collections.abc.Sequence[
            typing.SupportsInt | typing.SupportsIndex
        ] = [],
    ) -> None:
        """
        kind: 'cuda' (the caching allocator) or 'cpu' (no caching).
        limit: bytes that the process may reserve; device_memory: bytes that the device has; None: no bound.
        roundup_power2_divisions: one number for all sizes, or 16 for sizes below 2 MiB, 4 MiB, ... 64 GiB
        and above; each a power of two, or 0.
        Raises ValueError for what torch refuses too; docs/allocator.md has the rules.
        """
    @property
    def device_memory(self) -> int | None: ...
    @property
    def expandable_segments(self) -> bool: ...
    @property
    def garbage_collection_threshold(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def large_segment_size(self) -> int: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def max_non_split_rounding_size(self) -> int: ...
    @property
    def max_split_size(self) -> int | None: ...
    @property
    def roundup_power2_divisions(self) -> list[int]: ...

class PeakBlock:
    """
    A block that was alive when most was allocated.
    """
    @property
    def bytes(self) -> int:
        """
        what it occupied, rounding included
        """
    @property
    def event(self) -> int:
        """
        index of its allocation
        """
    @property
    def id(self) -> int: ...
    @property
    def requested_bytes(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def tag(self) -> int: ...

class OutOfMemory:
    """
    Where the replay ran out of memory.
    """
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def event(self) -> int:
        """
        index of the allocation that failed
        """
    @property
    def free_bytes(self) -> int:
        """
        what the limit and the device still left
        """
    @property
    def id(self) -> int: ...
    @property
    def needed_bytes(self) -> int:
        """
        what it would have taken from the device: the segment for it
        """
    @property
    def requested_bytes(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def tag(self) -> int: ...

class AllocatorBlock:
    """
    One block of a segment at the end of a replay.
    """
    @property
    def bytes(self) -> int: ...
    @property
    def event(self) -> int:
        """
        index of its allocation, -1 if free
        """
    @property
    def offset(self) -> int:
        """
        as its segment's: in bytes
        """
    @property
    def requested_bytes(self) -> int:
        """
        0 if free
        """
    @property
    def state(self) -> str:
        """
        'free', 'live', or 'awaiting' another stream
        """

class AllocatorSegment:
    """
    Memory taken from the device, or one mapped run of an expandable segment.
    """
    @property
    def blocks(self) -> list[AllocatorBlock]:
        """
        AllocatorBlocks by offset; a new list at each access
        """
    @property
    def bytes(self) -> int: ...
    @property
    def expandable(self) -> bool: ...
    @property
    def offset(self) -> int:
        """
        of the run in its segment, else 0
        """
    @property
    def serial(self) -> int:
        """
        segments count up as they are made
        """
    @property
    def small(self) -> bool: ...
    @property
    def stream(self) -> int: ...

class ReplayResult:
    """
    What a replay came to; sizes are in bytes.
    """
    def peak_blocks(
        self, most: typing.SupportsInt | typing.SupportsIndex | None = None
    ) -> list[PeakBlock]:
        """
        The blocks alive at peak_allocated_event, largest first; at most `most` of them.
        """
    def timeline(self, max_points: typing.SupportsInt | typing.SupportsIndex | None = None) -> list:
        """
        (event, allocated, reserved) after each event, or of at most `max_points` intervals.

        Of an interval the most that was allocated and the most that was reserved; `event` is the first with
        that much allocated. An allocation that ran out of memory is the last event.
        """
    @property
    def allocated_at_peak_reserved_bytes(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def awaiting_bytes(self) -> int:
        """
        released, and not yet free because another stream used it
        """
    @property
    def device_allocations(self) -> int:
        """
        segments taken from the device, or ranges mapped; on the CPU every allocation
        """
    @property
    def device_frees(self) -> int: ...
    @property
    def events(self) -> int:
        """
        events replayed: all, unless memory ran out
        """
    @property
    def fragmentation(self) -> float:
        """
        1 - allocated_at_peak_reserved_bytes / peak_reserved_bytes; 0 if none
        """
    @property
    def out_of_memory(self) -> OutOfMemory | None: ...
    @property
    def peak_allocated_bytes(self) -> int: ...
    @property
    def peak_allocated_event(self) -> int | None:
        """
        index of the first event after which that much was allocated
        """
    @property
    def peak_reserved_bytes(self) -> int: ...
    @property
    def peak_reserved_event(self) -> int | None: ...
    @property
    def requested_at_peak_bytes(self) -> int: ...
    @property
    def requested_bytes(self) -> int: ...
    @property
    def reserved_at_peak_bytes(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def retries(self) -> int:
        """
        allocations tried again after all cached memory was given back
        """
    @property
    def segments(self) -> list[AllocatorSegment]:
        """
        AllocatorSegments at the end, in the order of their making; a new list at each access
        """

class HostPiece:
    """
    Memory lent by a HostPool.
    """

class HostPoolStats:
    """
    What a pool holds and has lent, in bytes.
    """
    def __repr__(self) -> str: ...
    @property
    def held(self) -> int: ...
    @property
    def lent(self) -> int: ...
    @property
    def peak_used(self) -> int: ...
    @property
    def reused(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def used(self) -> int: ...

class HostPool:
    """
    Touched memory, lent again.
    """
    def __init__(self, limit: typing.SupportsInt | typing.SupportsIndex | None = None) -> None: ...
    def stats(self) -> HostPoolStats: ...
    def take(self, bytes: typing.SupportsInt | typing.SupportsIndex) -> HostPiece: ...
    def trim(self) -> int: ...
    @property
    def limit(self) -> int | None: ...

class LedgerState:
    """
    Members:

      absent

      loading

      ready

      leased

      evicting
    """

    __members__: typing.ClassVar[dict[str, LedgerState]]
    absent: typing.ClassVar[LedgerState]
    evicting: typing.ClassVar[LedgerState]
    leased: typing.ClassVar[LedgerState]
    loading: typing.ClassVar[LedgerState]
    ready: typing.ClassVar[LedgerState]
    @typing.overload
    def __eq__(self, other: LedgerState) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: LedgerState) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class LedgerEntry:
    """
    What a ledger knows of one id.
    """
    def __repr__(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def expected(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def id(self) -> int: ...
    @property
    def last_use(self) -> int: ...
    @property
    def leases(self) -> int: ...
    @property
    def state(self) -> LedgerState: ...

class AdmissionAction:
    """
    Members:

      ready

      load

      timed_out
    """

    __members__: typing.ClassVar[dict[str, AdmissionAction]]
    load: typing.ClassVar[AdmissionAction]
    ready: typing.ClassVar[AdmissionAction]
    timed_out: typing.ClassVar[AdmissionAction]
    @typing.overload
    def __eq__(self, other: AdmissionAction) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: AdmissionAction) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Admission:
    """
    What begin_load decided.
    """
    @property
    def action(self) -> AdmissionAction: ...
    @property
    def generation(self) -> int: ...
    @property
    def victims(self) -> list[int]: ...

class Placement:
    """
    What finish_load decided.
    """
    @property
    def generation(self) -> int: ...
    @property
    def kept(self) -> bool: ...
    @property
    def victims(self) -> list[int]: ...

class Ledger:
    """
    States, sizes, leases and order of use of models, by integer id. Holds no models and calls nothing; all calls are thread-safe.
    """
    class Eviction:
        """
        Members:

          started

          absent

          timed_out
        """

        __members__: typing.ClassVar[dict[str, Ledger.Eviction]]
        absent: typing.ClassVar[Ledger.Eviction]
        started: typing.ClassVar[Ledger.Eviction]
        timed_out: typing.ClassVar[Ledger.Eviction]
        @typing.overload
        def __eq__(self, other: Ledger.Eviction) -> bool: ...
        @typing.overload
        def __eq__(self, other: typing.Any) -> bool: ...
        def __getstate__(self) -> int: ...
        def __hash__(self) -> int: ...
        def __index__(self) -> int: ...
        def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
        def __int__(self) -> int: ...
        @typing.overload
        def __ne__(self, other: Ledger.Eviction) -> bool: ...
        @typing.overload
        def __ne__(self, other: typing.Any) -> bool: ...
        def __repr__(self) -> str: ...
        def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
        def __str__(self) -> str: ...
        @property
        def name(self) -> str: ...
        @property
        def value(self) -> int: ...

    def __init__(
        self,
        budget: typing.SupportsInt | typing.SupportsIndex | None = None,
        max_resident: typing.SupportsInt | typing.SupportsIndex = 1,
    ) -> None: ...
    def acquire(
        self,
        id: typing.SupportsInt | typing.SupportsIndex,
        generation: typing.SupportsInt | typing.SupportsIndex,
    ) -> bool: ...
    def add(
        self,
        id: typing.SupportsInt | typing.SupportsIndex,
        expected_bytes: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    def begin_evict(
        self,
        id: typing.SupportsInt | typing.SupportsIndex,
        timeout: typing.SupportsFloat | typing.SupportsIndex | None = None,
        generation: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> Ledger.Eviction:
        """
        Asks for an id to go, once its load and its leases have ended. After Eviction.started drop the object and call finish_evict.
        """
    def begin_load(
        self,
        id: typing.SupportsInt | typing.SupportsIndex,
        timeout: typing.SupportsFloat | typing.SupportsIndex | None = None,
    ) -> Admission:
        """
        Asks for an id to be in memory; may wait, at most `timeout` seconds. After AdmissionAction.load drop each victim (finish_evict), load, then call finish_load or fail_load.
        """
    def check(self) -> None:
        """
        Raises an error that names the first broken invariant.
        """
    def entry(self, id: typing.SupportsInt | typing.SupportsIndex) -> LedgerEntry: ...
    def fail_load(self, id: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def finish_evict(self, id: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def finish_load(
        self,
        id: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> Placement: ...
    def release(self, id: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def remove(self, id: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def set_expected(
        self,
        id: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def set_limits(
        self,
        budget: typing.SupportsInt | typing.SupportsIndex | None,
        max_resident: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def snapshot(self) -> list[LedgerEntry]: ...
    def state(self, id: typing.SupportsInt | typing.SupportsIndex) -> LedgerState: ...
    def total_bytes(self) -> int: ...
    def touch(self, id: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def budget(self) -> int | None: ...
    @property
    def max_resident(self) -> int: ...

class PinnedBuffer:
    """
    A writable buffer, registered with a GPU so that it copies from it by itself, for as long as this lives.
    """
    def __init__(self, memory: typing_extensions.Buffer, device: str) -> None: ...

class Source:
    """
    Where the bytes of blocks come from.
    """
    @property
    def bytes(self) -> int: ...
    @property
    def name(self) -> str: ...

class FileSource(Source):
    def __init__(self, path: str, direct: bool = True) -> None: ...
    def check(self) -> None:
        """
        Raises FileChangedError if the file has changed.
        """
    @property
    def direct(self) -> bool: ...

class MemorySource(Source):
    def __init__(
        self,
        address: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
        keeper: typing.Any,
    ) -> None:
        """
        `keeper` is the object that the memory belongs to.
        """

class HostStore:
    """
    Memory for blocks, in one piece.
    """
    def __init__(
        self,
        bytes: typing.SupportsInt | typing.SupportsIndex,
        granularity: typing.SupportsInt | typing.SupportsIndex = 2097152,
        device: str = "cpu",
    ) -> None:
        """
        `device`: whose copies it is for; memory for a GPU is pinned, at its exact size.
        """
    def source(self) -> MemorySource: ...
    @property
    def bytes(self) -> int: ...

class Extent:
    """
    A run of bytes that a block takes from a source.
    """
    def __init__(
        self,
        source: typing.SupportsInt | typing.SupportsIndex,
        source_offset: typing.SupportsInt | typing.SupportsIndex,
        block_offset: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    @property
    def block_offset(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def source(self) -> int: ...
    @property
    def source_offset(self) -> int: ...

class BlockLayout:
    """
    Where the ranges of a block lie in it.
    """
    @property
    def bytes(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def extents(self) -> list[Extent]: ...
    @property
    def padding(self) -> int: ...
    @property
    def places(self) -> list[int]: ...

class Residence:
    """
    Members:

      automatic

      resident

      streamed
    """

    __members__: typing.ClassVar[dict[str, Residence]]
    automatic: typing.ClassVar[Residence]
    resident: typing.ClassVar[Residence]
    streamed: typing.ClassVar[Residence]
    @typing.overload
    def __eq__(self, other: Residence) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Residence) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class BlockSpec:
    """
    A block: its bytes, and where they come from.
    """
    def __init__(
        self,
        name: str,
        bytes: typing.SupportsInt | typing.SupportsIndex,
        extents: collections.abc.Sequence[Extent],
        residence: Residence = ...,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def extents(self) -> list[Extent]: ...
    @property
    def name(self) -> str: ...
    @property
    def residence(self) -> Residence: ...

class BlockStatus:
    """
    Members:

      absent

      requested

      copying

      ready

      in_use

      released
    """

    __members__: typing.ClassVar[dict[str, BlockStatus]]
    absent: typing.ClassVar[BlockStatus]
    copying: typing.ClassVar[BlockStatus]
    in_use: typing.ClassVar[BlockStatus]
    ready: typing.ClassVar[BlockStatus]
    released: typing.ClassVar[BlockStatus]
    requested: typing.ClassVar[BlockStatus]
    @typing.overload
    def __eq__(self, other: BlockStatus) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: BlockStatus) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class BlockStats:
    """
    What the engine knows of one block.
    """
    @property
    def acquires(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def resident(self) -> bool: ...
    @property
    def state(self) -> BlockStatus: ...
    @property
    def wait_ns(self) -> int: ...

class EngineStats:
    """
    Bytes, counts and times of an engine.
    """
    def __repr__(self) -> str: ...
    @property
    def acquires(self) -> int: ...
    @property
    def active_ns(self) -> int: ...
    @property
    def bytes_by_path(self) -> dict: ...
    @property
    def bytes_copied(self) -> int: ...
    @property
    def cancelled(self) -> int: ...
    @property
    def commits(self) -> int: ...
    @property
    def committed(self) -> int: ...
    @property
    def copy_ns(self) -> int: ...
    @property
    def displaced(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def given_up(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def regrown(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
    @property
    def residents(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def staging(self) -> int: ...
    @property
    def wait_ns(self) -> int: ...
    @property
    def waits(self) -> int: ...

class BlockFile:
    """
    A file of a BlockCache, which stays there for as long as this does.
    """
    @property
    def built(self) -> bool: ...
    @property
    def offsets(self) -> list[int]: ...
    @property
    def path(self) -> str: ...

class BlockCache:
    """
    Converted block files in a folder of bounded size.
    """
    def __init__(
        self, folder: str, most_bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def open(
        self, files: collections.abc.Sequence[Source], blocks: collections.abc.Sequence[BlockSpec]
    ) -> BlockFile:
        """
        The file with these blocks of these FileSources, built if it is not there.
        """
    def trim(self, most: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def folder(self) -> str: ...

class PressureGauge:
    """
    When to give memory up and take it back.
    """
    def __init__(
        self,
        low: typing.SupportsInt | typing.SupportsIndex,
        high: typing.SupportsInt | typing.SupportsIndex,
        patience: typing.SupportsInt | typing.SupportsIndex = 3,
    ) -> None: ...
    def observe(self, free: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Bytes to change by: negative, give up so many; positive, up to so many may be taken.
        """

class EngineView:
    """
    Addresses of the engine: a buffer on the host, and DLPack everywhere.
    """
    def __dlpack__(
        self,
        *,
        stream: typing.Any = None,
        max_version: typing.Any = None,
        dl_device: typing.Any = None,
        copy: typing.Any = None,
    ) -> typing_extensions.CapsuleType:
        """
        Bytes, uint8. acquire() has ordered the stream that it was given after the copies.
        """
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Engine:
    """
    Blocks of bytes that are in memory when they are called; see docs/offload.md. Addresses are valid between acquire and release, in the process that made the engine.
    """
    def __init__(
        self,
        sources: collections.abc.Sequence[Source],
        blocks: collections.abc.Sequence[BlockSpec],
        *,
        limit: typing.SupportsInt | typing.SupportsIndex,
        order: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
        depth: typing.SupportsInt | typing.SupportsIndex = 1,
        slots: typing.SupportsInt | typing.SupportsIndex = 3,
        threads: typing.SupportsInt | typing.SupportsIndex = 2,
        piece: typing.SupportsInt | typing.SupportsIndex = 8388608,
        granularity: typing.SupportsInt | typing.SupportsIndex | None = None,
        poison: bool = False,
        timeline: typing.SupportsInt | typing.SupportsIndex = 0,
        device: str = "cpu",
    ) -> None:
        """
        `device`: 'cpu', or 'cuda:0' and so on; `granularity`: bytes of memory taken at once, 2 MiB on the host and 32 MiB on a GPU unless given.
        """
    def __len__(self) -> int: ...
    def acquire(
        self,
        block: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> int:
        """
        Address of the block, until release().
        """
    def block_stats(self, block: typing.SupportsInt | typing.SupportsIndex) -> BlockStats: ...
    def check(self) -> None:
        """
        Raises an error that names the first broken invariant.
        """
    def close(self) -> None: ...
    def device_memory(self) -> typing.Any:
        """
        (free, total) bytes of the GPU, whoever uses them; None on the host.
        """
    def give_up(self, bytes: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def invalidate(self, block: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        The block's source has changed: it is loaded again when called.
        """
    def keep_timeline(self, records: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        From now on keep the latest `records`, 0 for none; earlier ones are forgotten.
        """
    def park(self) -> int:
        """
        Gives residents and slots back until the next acquire; returns the bytes.
        """
    def prefetch(self, block: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def release(
        self,
        block: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    def relieve(self, gauge: PressureGauge, most: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Looks at what is free on the GPU and moves the limit as the gauge says, to at most `most`; returns by how many bytes.
        """
    def resize(self, limit: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def slot_of(self, block: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def stats(self) -> EngineStats: ...
    def timeline(self) -> list:
        """
        The latest (kind, block, thread, begin_ns, end_ns), kinds copy, wait and use.
        """
    def view(self) -> EngineView:
        """
        All addresses as one buffer, which keeps the engine alive. Only what is acquired may be read.
        """
    def window(
        self,
        address: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> EngineView:
        """
        `bytes` from an address that acquire() returned.
        """
    @property
    def base(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def contiguous(self) -> bool:
        """
        Whether all addresses are one range, so that view() works.
        """
    @property
    def device(self) -> str: ...
    @property
    def minimum(self) -> int: ...
    @property
    def reserved(self) -> int: ...

class HostPart:
    """
    A part of a HostStore; its memory goes back to the system with it.
    """
    def __init__(
        self,
        store: HostStore,
        offset: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

class FileMapping:
    """
    A block as memory: extents of files, mapped at their places in it.

    The mapping is private: what is written to it never reaches the files. What no extent covers must
    not be touched. Raises ValueError for extents that do not lie in the block as pages lie in their
    file, MemoryError where the system has no addresses left.
    """
    def __init__(
        self,
        files: collections.abc.Sequence[FileSource],
        extents: collections.abc.Sequence[Extent],
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def changed(
        self,
        begin: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> bool:
        """
        Whether a page of these bytes of the block was written to.
        """
    def find(
        self,
        address: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> Extent | None:
        """
        The Extent of these bytes of memory: of which file, where there, and where in the block. None if they are no part of one extent.
        """
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...

def active_isa() -> str:
    """
    Name of the instruction-set unit in use; VRAMKIT_ISA forces one.
    """

def advise_large_pages(
    start: typing.SupportsInt | typing.SupportsIndex,
    bytes: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Ask that fresh memory be backed by large pages where it covers them.
    """

def available_isas() -> list[str]:
    """
    Names of the units that this processor can run, best last.
    """

def block_layout(
    ranges: collections.abc.Sequence[
        tuple[
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
        ]
    ],
    packed: bool = False,
) -> BlockLayout:
    """
    Lay out (source, offset, bytes, alignment) ranges as one block: such that files can be read straight into it, or packed.
    """

def built_with_cuda() -> bool:
    """
    Whether this package has the engine's calls to CUDA.
    """

def builtin_formats() -> list:
    """
    (name, Format) of every format that is always there.
    """

def cuda_devices() -> tuple:
    """
    (count, reason): CUDA devices that this process sees, and why where there are none.
    """

def dynamic_map() -> list[float]:
    """
    The 256 values that 8-bit nested scales take.
    """

def least_device_bytes(
    phases: collections.abc.Sequence[
        tuple[
            typing.SupportsInt | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex
        ]
    ],
    groups: collections.abc.Sequence[
        tuple[
            typing.SupportsInt | typing.SupportsIndex,
            collections.abc.Sequence[
                tuple[
                    typing.SupportsInt | typing.SupportsIndex,
                    typing.SupportsInt | typing.SupportsIndex,
                    typing.SupportsInt | typing.SupportsIndex,
                    bool,
                    typing.SupportsFloat | typing.SupportsIndex,
                    typing.SupportsFloat | typing.SupportsIndex,
                    typing.SupportsFloat | typing.SupportsIndex,
                    typing.SupportsFloat | typing.SupportsIndex,
                    typing.SupportsFloat | typing.SupportsIndex,
                ]
            ],
        ]
    ],
    *,
    slots: typing.SupportsInt | typing.SupportsIndex = 2,
) -> list[tuple[int, int]]:
    """
    By phase (bytes, slot): the least device bytes that hold it, and the size of its slots.
    """

def open_unnamed_file(folder: str, flags: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
    """
    An opener for open(folder, 'wb', opener=…): a new file that has no name in the folder. `flags` are not used. OSError.
    """

def place(
    phases: collections.abc.Sequence[
        tuple[
            typing.SupportsInt | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex
        ]
    ],
    groups: collections.abc.Sequence[
        tuple[
            typing.SupportsInt | typing.SupportsIndex,
            collections.abc.Sequence[
                tuple[
                    typing.SupportsInt | typing.SupportsIndex,
                    typing.SupportsInt | typing.SupportsIndex,
                    typing.SupportsInt | typing.SupportsIndex,
                    bool,
                    typing.SupportsFloat | typing.SupportsIndex,
                    typing.SupportsFloat | typing.SupportsIndex,
                    typing.SupportsFloat | typing.SupportsIndex,
                    typing.SupportsFloat | typing.SupportsIndex,
                    typing.SupportsFloat | typing.SupportsIndex,
                ]
            ],
        ]
    ],
    device_limit: typing.SupportsInt | typing.SupportsIndex,
    *,
    host_limit: typing.SupportsInt | typing.SupportsIndex | None = None,
    slots: typing.SupportsInt | typing.SupportsIndex = 2,
    loss_limit: typing.SupportsFloat | typing.SupportsIndex | None = None,
    weights: tuple[
        typing.SupportsFloat | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex
    ]
    | None = None,
    state_limit: typing.SupportsInt | typing.SupportsIndex = 400000,
    node_limit: typing.SupportsInt | typing.SupportsIndex = 96,
) -> PlacementResult:
    """
    Takes one choice per group within the limits: the least loss, then the least seconds.

    phases: (reserved device bytes, seconds of arithmetic that is no layer's) for each, taking turns.
    groups: (phase, choices) for each layer; a choice is (resident bytes, bytes a slot must hold, host
    bytes, whether it is staged from disk, loss, seconds of arithmetic, of the link, of the disk, and
    of its turn). A phase takes the longest of its arithmetic, link and disk, plus its turn.
    weights: (a, b) minimizes a * loss + b * seconds instead. No limit is None. state_limit and
    node_limit bound the search by counts. Raises ValueError for malformed input.
    """

def plan_choices(
    groups: collections.abc.Sequence[
        collections.abc.Sequence[
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsFloat | typing.SupportsIndex,
            ]
        ]
    ],
    budget: typing.SupportsInt | typing.SupportsIndex,
    *,
    state_limit: typing.SupportsInt | typing.SupportsIndex = 4000000,
) -> PlannerResult:
    """
    Takes one choice per group so that the costs are least and the sizes fit the budget.

    groups: for each group its choices as (bytes, cost) pairs, bytes >= 0, cost finite and >= 0.
    budget: bytes. state_limit: partial plans that the exact search may keep (32 bytes each); past
    it the best plan found is returned with optimal=False and a proven lower_bound.
    Of plans of equal cost the one with fewer bytes is taken, then the first in choice order.
    Raises BudgetError if even the smallest choices do not fit, ValueError for malformed input.
    """

def read_runs(
    files: collections.abc.Sequence[FileSource],
    runs: collections.abc.Sequence[
        tuple[
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
        ]
    ],
    *,
    whole_units: bool = False,
    threads: typing.SupportsInt | typing.SupportsIndex = 2,
    piece: typing.SupportsInt | typing.SupportsIndex = 8388608,
    progress: typing.Any = None,
) -> dict:
    """
    Read (file, offset, bytes, address) runs into memory, several pieces at once.

    `whole_units`: all of each unit of 4096 bytes that a run touches in memory may be written.
    `progress` is called with the bytes that have come since it was last called. Returns bytes by the
    way that they were read. The addresses must stay valid; after an error their content is unspecified.

    Raises ValueError for runs that a file does not have, OSError if the system cannot read,
    FileChangedError if a file has changed since it was opened, MemoryError, what a signal's handler
    raised, and what `progress` raises.
    """

def replay(events: typing_extensions.Buffer, config: AllocatorConfig) -> ReplayResult:
    """
    Replays allocations and releases through a model of torch's allocator.

    events: a C-contiguous int64 buffer [n, 4], or flat, of (block id, bytes, stream, tag); bytes >= 0
    allocates, -1 releases, -2: the block is used by `stream` too, -3: those uses of the released block
    are over, -4 empties the cache. Nothing of it is kept.
    Raises EventError (a ValueError with the event's index) for events that cannot be, ValueError for
    another shape, TypeError for another dtype.
    """

def safetensors_bytes(
    dtype: str, shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
) -> int:
    """
    Bytes of a tensor. Raises ValueError for an unknown dtype or an impossible shape.
    """

def safetensors_dtypes() -> dict:
    """
    Bits of an element by the format's dtype name.
    """

def source_of(file: SafetensorsFile, direct: bool = True) -> FileSource:
    """
    The file as a FileSource.

    Raises FileChangedError if its name means another file by now, or it was written to.
    """
