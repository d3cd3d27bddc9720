"""
vramkit's native core: formats, files, planner, ledger.
"""

from __future__ import annotations
import collections.abc
import os
import pathlib
import typing

__all__: list[str] = [
    "Admission",
    "AdmissionAction",
    "Format",
    "Ledger",
    "LedgerEntry",
    "LedgerState",
    "PartBytes",
    "Placement",
    "PlannerResult",
    "SafetensorsFile",
    "SafetensorsWriter",
    "TensorInfo",
    "active_isa",
    "available_isas",
    "builtin_formats",
    "dynamic_map",
    "plan_choices",
    "safetensors_bytes",
    "safetensors_dtypes",
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

def active_isa() -> str:
    """
    Name of the instruction-set unit in use; VRAMKIT_ISA forces one.
    """

def available_isas() -> list[str]:
    """
    Names of the units that this processor can run, best last.
    """

def builtin_formats() -> list:
    """
    (name, Format) of every format that is always there.
    """

def dynamic_map() -> list[float]:
    """
    The 256 values that 8-bit nested scales take.
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
