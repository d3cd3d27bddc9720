"""Storage formats: how one weight lies in memory, by name; new ones can be registered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ._native import _core
from .precision import PrecisionMode

# Positions in a format's spec; the values are those of csrc/core/format.hpp.
_FAMILY, _BITS, _GRAIN, _BLOCK, _SCALE, _ENCODER, _ZERO = range(7)
_FAMILIES = ("cast", "codebook", "affine")
_GRAIN_ROW, _GRAIN_FLAT = 1, 3
_SCALE_F32, _SCALE_NESTED = 1, 3
_ENCODER_MIDPOINT, _ENCODER_FP16, _ENCODER_BF16, _ENCODER_SYMMETRIC = 0, 3, 4, 5


@dataclass(frozen=True, eq=False)
class StorageFormat:
    """How one weight is stored: code width, block, scales, and exactly how many bytes that takes.

    `spec` is what operators receive: [family, bits, grain, block, scale, encoder, zero point].

    >>> get_format("nf4").bytes((4096, 4096)).total
    9437184
    """

    name: str
    native: _core.Format
    # How activations meet the weight: "" as they are, "int8_dynamic" quantized row by row,
    # "llm_int8" too but for columns that reach `threshold`.
    activations: str = ""
    threshold: float = 0.0
    spec: list[int] = field(init=False)
    _tables: dict[torch.device, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", list(self.native.spec))
        self.table_on(torch.device("cpu"))  # before any compiler or fake mode looks

    @property
    def family(self) -> str:
        """``cast``, ``codebook`` or ``affine``."""
        return _FAMILIES[self.spec[_FAMILY]]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.spec[_BITS]

    @property
    def block(self) -> int:
        """Elements that share a scale; 0 where a whole row does, or where there is no scale."""
        return self.spec[_BLOCK]

    @property
    def nested(self) -> bool:
        """Whether the scales are themselves quantized to 8 bits."""
        return self.spec[_SCALE] == _SCALE_NESTED

    @property
    def storage_dtype(self) -> torch.dtype | None:
        """The 16-bit dtype that a cast format stores; None for the others."""
        if self.family != "cast":
            return None
        return torch.float16 if self.spec[_ENCODER] == _ENCODER_FP16 else torch.bfloat16

    def with_threshold(self, threshold: float) -> StorageFormat:
        """LLM.int8 with another outlier threshold; its name tells, so files and plans keep it.

        >>> get_format("llm_int8").with_threshold(5).name
        'llm_int8@5.0'
        """
        if self.activations != "llm_int8":
            raise ValueError(f"{self.name} has no outlier threshold; only llm_int8 has")
        return _llm_int8(float(threshold))

    @property
    def weight_only(self) -> StorageFormat:
        """The format of the same bytes whose layers take activations as they are."""
        return _REGISTRY["int8"] if self.activations else self

    def bytes(self, shape: Sequence[int]) -> _core.PartBytes:
        """Exact bytes of a weight of `shape`: .codes, .scales, .extra and their .total."""
        return self.native.bytes(list(shape))

    def row_separable(self, cols: int) -> bool:
        """Whether rows of `cols` elements begin at a byte and a block of their own."""
        return self.native.row_separable(cols)

    def table_on(self, device: torch.device) -> torch.Tensor | None:
        """The codebook, float32 [2**bits], on `device`; None for other families."""
        if self.family != "codebook":
            return None
        table = self._tables.get(device)
        if table is None:
            # Not an inference tensor, which autograd could not save later on.
            with torch.inference_mode(False):
                table = torch.tensor(self.native.table, dtype=torch.float32, device=device)
            if type(table) is torch.Tensor:  # a fake one belongs to the trace that asked for it
                self._tables[device] = table
        return table

    def bits_per_weight(self, shape: Sequence[int] = (4096, 4096)) -> float:
        """Stored bits for each weight of a tensor of `shape`, scales and zero points included."""
        count = math.prod(shape)
        return 8 * self.bytes(shape).total / count if count else 0.0

    def __repr__(self) -> str:
        return f"StorageFormat({self.name!r}, {self.bits_per_weight():.2f} bits per weight)"

    def __reduce__(self) -> tuple[object, ...]:
        if self.activations:
            return get_format, (self.name,)
        return _unpickle, (self.name, self.spec, list(self.native.table))

    def __deepcopy__(self, memo: dict[int, object]) -> StorageFormat:
        return self


def _unpickle(name: str, spec: list[int], table: list[float]) -> StorageFormat:
    """The registered format of this name if it is the same one, else a copy of the pickled one."""
    known = _REGISTRY.get(name)
    # By text, because NaN, which tables of FP8 hold, is unequal to itself.
    if known is not None and known.spec == spec and repr(list(known.native.table)) == repr(table):
        return known
    return StorageFormat(name, _core.Format(spec, table))


_REGISTRY: dict[str, StorageFormat] = {
    name: StorageFormat(name, native) for name, native in _core.builtin_formats()
}
# Eight bits with the scale that just holds the row's largest magnitude, as LLM.int8 has it.
_INT8 = _core.Format([2, 8, _GRAIN_ROW, 0, _SCALE_F32, _ENCODER_SYMMETRIC, 0], [])
_LLM_INT8_THRESHOLD = 6.0  # Dettmers et al. 2022, section 3.2
_REGISTRY["int8_dynamic"] = StorageFormat("int8_dynamic", _INT8, "int8_dynamic")
_REGISTRY["llm_int8"] = StorageFormat("llm_int8", _INT8, "llm_int8", _LLM_INT8_THRESHOLD)
# Nested scales in the making: signed 8-bit dynamic map, blocks of 256 (QLoRA, section 3).
_SCALE_FORMAT = StorageFormat(
    "dynamic8", _core.Format([1, 8, _GRAIN_FLAT, 256, _SCALE_F32, 0, 0], _core.dynamic_map())
)


def format_names() -> list[str]:
    """Names of all formats, registered ones included."""
    return list(_REGISTRY)


def get_format(name: str | PrecisionMode | StorageFormat) -> StorageFormat:
    """The format of that name; a `StorageFormat` is returned as it is.

    Raises ValueError, which lists the names, for an unknown one and for fp32 (plain storage).
    """
    if isinstance(name, StorageFormat):
        return name
    key = name.value if isinstance(name, PrecisionMode) else str(name).strip().lower()
    if key in _REGISTRY:
        return _REGISTRY[key]
    if key.startswith("llm_int8@"):
        try:
            return _llm_int8(float(key.removeprefix("llm_int8@")))
        except ValueError as error:
            raise ValueError(f"no storage format {name!r}: {error}") from None
    raise ValueError(
        f"no storage format {name!r}; the formats are: {', '.join(_REGISTRY)}. "
        "vramkit.register_format adds a codebook of your own"
    )


def _llm_int8(threshold: float) -> StorageFormat:
    if not (threshold > 0.0 and math.isfinite(threshold)):
        raise ValueError(f"the outlier threshold must be positive and finite, got {threshold}")
    if threshold == _LLM_INT8_THRESHOLD:
        return _REGISTRY["llm_int8"]
    return StorageFormat(f"llm_int8@{threshold!r}", _INT8, "llm_int8", threshold)


def register_format(
    name: str, table: Sequence[float] | torch.Tensor, *, block: int = 64, nested: bool = False
) -> StorageFormat:
    """Make a codebook of your own a format that every layer, plan and checkpoint can use.

    Args:
        name: A new name; built-in names cannot be taken.
        table: 16 (4 bits per weight) or 256 (8 bits) finite values, by code, in any order. They are
            divided by their largest magnitude, so that a block's absmax is its scale.
        block: Consecutive elements of the flattened weight that share a float32 scale; even.
        nested: Quantize the scales to 8 bits too.

    Encoding takes the nearest value; a tie takes the lower one.

    >>> fmt = register_format("ternary_ish", [-1, -0.5, 0, 0.5, 1] + [0.25] * 11, block=32)
    >>> fmt.bits_per_weight()
    5.0
    """
    key = name.strip().lower()
    builtin = {n for n, _ in _core.builtin_formats()} | {mode.value for mode in PrecisionMode}
    if not key or key in builtin:
        raise ValueError(f"the name {name!r} is empty or a built-in precision's; choose another")
    values = [float(v) for v in torch.as_tensor(table, dtype=torch.float64).flatten()]
    if len(values) not in (16, 256):
        raise ValueError(f"a codebook holds 16 or 256 values, got {len(values)}")
    largest = max((abs(v) for v in values), default=0.0)
    if not all(math.isfinite(v) for v in values) or largest == 0.0:
        raise ValueError("codebook values must be finite and not all zero")
    if block <= 0 or block % 2:
        raise ValueError(f"block must be a positive even number of elements, got {block}")
    bits = 4 if len(values) == 16 else 8
    scale = _SCALE_NESTED if nested else _SCALE_F32
    spec = [1, bits, _GRAIN_FLAT, block, scale, _ENCODER_MIDPOINT, 0]
    made = StorageFormat(key, _core.Format(spec, [v / largest for v in values]))
    known = _REGISTRY.get(key)
    if known is not None and (known.spec != made.spec or known.native.table != made.native.table):
        raise ValueError(f"a different format is already registered as {name!r}")
    return _REGISTRY.setdefault(key, made)
