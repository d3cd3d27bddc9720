"""What every converted layer shares: stored parameters, lazy access by name, the swap in place.

A converted layer stays the object it was: its class becomes a subclass of its old one, so that
references, hooks and isinstance checks hold. Codes, scales and extra are plain uint8 parameters
without gradient: whatever moves or shards parameters handles them, and no cast can touch a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._operators import FLOATS, StoredParts, encode_again, matrix_shape
from ..formats import StorageFormat
from .lazy import LazyWeight, is_writable, refuse, writable

__all__ = ["LazyWeight", "QuantizedLayer", "writable"]

PART_NAMES = ("codes", "scales", "extra")
_quantized_classes: dict[tuple[type, tuple[str, ...]], type] = {}
_kinds: list[tuple[type[nn.Module], type, tuple[str, ...]]] = []
# Columns that a row should have at least, so that its scale is a small part of it.
_LEAST_COLUMNS = 64


@dataclass
class StoredParameter:
    """What the parts of one parameter mean.

    Attributes:
        fmt: How it is stored.
        shape: The shape of the decoded weight.
        dtype: The compute dtype: what reading it by name gives.
        lead: How many of its first dimensions are rows, with scales of their own.
    """

    fmt: StorageFormat
    shape: tuple[int, ...]
    dtype: torch.dtype
    lead: int = 1


def part_name(parameter: str, part: str) -> str:
    """Under which name a layer keeps a part: `codes` of `weight`, else `<parameter>_codes`."""
    return part if parameter == "weight" else f"{parameter}_{part}"


class QuantizedLayer(nn.Module):
    """Mixin of every converted layer.

    A layer with one weight has parts `codes`, `scales` and `extra`; a parameter of another name
    has `<name>_codes`, `<name>_scales`, `<name>_extra`. All are uint8 parameters without gradient;
    scales hold the bits of their type.
    """

    codes: Tensor
    scales: Tensor
    extra: Tensor | None
    _base: type[nn.Module]
    _stored: dict[str, StoredParameter]
    _shares_parts = False
    # What a format may do to this layer's activations; see StorageFormat.
    activation_modes: tuple[str, ...] = ("",)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of the parameters that are in a storage format."""
        return tuple(self._stored)

    def stored_parameter(self, name: str) -> StoredParameter:
        """Format, shape and compute dtype of the stored parameter `name`."""
        return self._stored[name]

    def stored_part(self, name: str, part: str) -> Tensor:
        """`codes`, `scales` or `extra` of the stored parameter `name`."""
        found: Tensor = getattr(self, part_name(name, part))
        return found

    def _default(self) -> str:
        return "weight" if "weight" in self._stored else next(iter(self._stored))

    @property
    def storage_format(self) -> StorageFormat:
        """How the weight is stored (of several, the first one)."""
        return self._stored[self._default()].fmt

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that `.weight` reports and that `restore` gives by default."""
        return self._stored[self._default()].dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        for stored in self._stored.values():
            stored.dtype = dtype

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the decoded weight (of several, of the first one)."""
        return self._stored[self._default()].shape

    @property
    def format_names(self) -> str:
        """Names of all formats in this layer, separated by commas."""
        return ", ".join(dict.fromkeys(stored.fmt.name for stored in self._stored.values()))

    def parts_of(self, name: str) -> StoredParts:
        """The stored parameter `name` as operators take it."""
        stored = self._stored[name]
        codes, scales, extra = (getattr(self, part_name(name, part)) for part in PART_NAMES)
        return StoredParts(stored.fmt, stored.shape, codes, scales, extra, stored.lead)

    @property
    def parts(self) -> StoredParts:
        """The stored weight as operators take it (of several, the first one)."""
        return self.parts_of(self._default())

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and extra of all stored parameters."""
        return sum(self.parts_of(name).nbytes for name in self._stored)

    def dense_weight(self, dtype: torch.dtype | None = None, name: str | None = None) -> Tensor:
        """The decoded weight (or stored parameter `name`), in `dtype` or the compute dtype."""
        name = name or self._default()
        return self.parts_of(name).dense(dtype or self._stored[name].dtype)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter `name`, decoded on use (see `LazyWeight`); a plain one cast to `dtype`."""
        if name not in self._stored:
            plain: Tensor = getattr(self, name)
            return plain if plain is None or dtype is None else plain.to(dtype)
        if torch.compiler.is_compiling():
            return self.dense_weight(dtype, name)
        return LazyWeight(self, name, dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; a stored parameter's new value is encoded (or, lazy, shared)."""
        if param is not None and name in self.__dict__.get("_stored", ()):
            self._assign(param, name)
        else:
            super().register_parameter(name, param)

    def _assign(self, value: Tensor, name: str) -> None:
        # What tie_weights and resize_token_embeddings do: a whole new weight, not a lost write.
        stored = self._stored[name]
        if isinstance(value, LazyWeight) and not value._steps:
            owner, other = value._owner, value._name
            if owner is not self or other != name:
                self._adopt(name, owner.parts_of(other), owner._stored[other].dtype, (owner, other))
            return
        parts = encode_again(value, self.parts_of(name))
        self._adopt(name, parts, value.dtype if value.is_floating_point() else stored.dtype)

    def _write(self, value: Tensor, what: str, name: str = "weight") -> None:
        if not is_writable():
            raise refuse(what)
        stored = self._stored[name]
        self._adopt(name, encode_again(value, self.parts_of(name)), stored.dtype)

    def _adopt(
        self,
        name: str,
        parts: StoredParts,
        compute_dtype: torch.dtype,
        share: tuple[QuantizedLayer, str] | None = None,
    ) -> None:
        self._stored[name] = StoredParameter(
            parts.fmt, tuple(parts.shape), compute_dtype, parts.lead
        )
        if share is not None:
            self._shares_parts = share[0]._shares_parts = True
        for part in PART_NAMES:
            value = getattr(parts, part)
            if share is not None:
                other = share[0]._parameters.get(part_name(share[1], part))
            else:
                other = None if value is None else nn.Parameter(value, requires_grad=False)
            self._parameters[part_name(name, part)] = other
        self._tables()
        self._resized()

    def _tables(self) -> None:
        """Have the codebooks on the weights' device before a compiler or a graph looks on."""
        for name, stored in self._stored.items():
            device = self.stored_part(name, "codes").device
            if device.type not in ("cpu", "meta"):
                stored.fmt.table_on(device)

    def _resized(self) -> None:
        """Bring the layer's own size attributes in line with its weight's shape."""

    def _swapped(self) -> None:
        """Called when a parameter has been stored: let go of other references to the plain one."""

    def _unswapped(self) -> None:
        """Called on a plain layer again, by the mixin's function: make such references again."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, stored in self._stored.items():
            device = self.stored_part(name, "codes").device
            probe = torch.empty(
                0, dtype=stored.dtype, device="cpu" if device.type == "meta" else device
            )
            stored.dtype = fn(probe).dtype
        self._tables()
        return self


def register_kind(base: type[nn.Module], mixin: type, names: Iterable[str] = ("weight",)) -> None:
    """Make `mixin` the converted form of layers of class `base` and its subclasses.

    `names` are the parameters that are stored; one that ends in `*` stands for all that begin so.
    """
    _kinds.append((base, mixin, tuple(names)))


def _kind_of(base: type) -> tuple[type, type, tuple[str, ...]] | None:
    return next((kind for kind in _kinds if issubclass(base, kind[0])), None)


def find_kind(module: nn.Module) -> type | None:
    """The mixin for `module`, or None where its class has no converted form of its own."""
    kind = _kind_of(type(module))
    return None if kind is None else kind[1]


def is_layer_weight(module: nn.Module, name: str) -> bool:
    """Whether parameter `name` is a weight that `module`'s converted form knows."""
    kind = _kind_of(type(module))
    return kind is not None and any(
        name == known or (known.endswith("*") and name.startswith(known[:-1])) for known in kind[2]
    )


def row_dimensions(module: nn.Module, name: str, shape: tuple[int, ...]) -> int:
    """How many leading dimensions of a weight are rows with scales of their own.

    Of a layer that torch knows, the first: its (output) channels. Of other parameters as many as
    leave a row of at least 64 elements: a stack of matrices has its matrices' rows.
    """
    if len(shape) < 3 or is_layer_weight(module, name):
        return 1
    for lead in range(len(shape) - 1, 1, -1):
        if matrix_shape(shape, lead)[1] >= _LEAST_COLUMNS:
            return lead
    return 1


def _reader(name: str) -> property:
    def get(self: QuantizedLayer) -> Tensor:
        return self.read(name)

    def put(self: QuantizedLayer, value: Tensor) -> None:
        self._assign(value, name)

    return property(get, put, doc=f"The parameter {name!r}, decoded on use; see `LazyWeight`.")


def quantized_class(base: type[nn.Module], names: tuple[str, ...] = ("weight",)) -> type:
    """The subclass of `base` in which the parameters `names` are stored; one for each choice."""
    key = (base, tuple(sorted(names)))
    made = _quantized_classes.get(key)
    if made is None:
        kind, mixin, _ = _kind_of(base) or (None, QuantizedLayer, ())

        def extra_repr(self: Any) -> str:
            text = base.extra_repr(self)
            return f"{text}{', ' if text else ''}format={self.format_names}"

        def reduce(self: Any, protocol: Any) -> Any:
            return _rebuild, key, self.__dict__

        body: dict[str, Any] = {
            "_base": base,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__reduce_ex__": reduce,
            "extra_repr": extra_repr,
            **{name: _reader(name) for name in names},
        }
        # A subclass with a forward of its own keeps it: its super().forward() reaches ours, and
        # its self.weight decodes.
        bases = (mixin,) if base is kind else (base, mixin)
        made = type(f"Quantized{base.__name__}", bases, body)
        _quantized_classes[key] = made
    return made


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made: Any = quantized_class(base, names)
    empty: nn.Module = made.__new__(made)
    return empty


def swap(
    module: nn.Module,
    parts: StoredParts,
    compute_dtype: torch.dtype,
    share: QuantizedLayer | tuple[QuantizedLayer, str] | None = None,
    name: str = "weight",
) -> QuantizedLayer:
    """Store parameter `name` of `module` as `parts`, in place.

    The module's class becomes its converted form. With `share`, a layer (and which of its
    parameters), the parts are that layer's own.
    """
    if isinstance(module, QuantizedLayer):
        base, stored = module._base, module._stored
    else:
        base, stored = type(module), {}
        module.__dict__["_plain_order"] = tuple(module._parameters)
        module.__dict__["_stored"] = stored
    module._parameters.pop(name)
    module.__class__ = quantized_class(base, (*stored, name))
    assert isinstance(module, QuantizedLayer)
    module._is_hf_initialized = True  # type: ignore[assignment]
    owner = (share, "weight") if isinstance(share, QuantizedLayer) else share
    module._adopt(name, parts, compute_dtype, owner)
    module._swapped()
    return module


def unswap(layer: QuantizedLayer, weights: nn.Parameter | dict[str, nn.Parameter]) -> nn.Module:
    """Turn a converted layer back into the plain one it was, with `weights` by name, in place."""
    plain = weights if isinstance(weights, dict) else {"weight": weights}
    finish = type(layer)._unswapped
    for name in layer.stored_names:
        for part in PART_NAMES:
            layer._parameters.pop(part_name(name, part))
    order = layer.__dict__.pop("_plain_order")
    layer.__dict__.pop("_stored")
    for own in ("_shares_parts", "computes_in", "_fp8_computation"):
        layer.__dict__.pop(own, None)
    layer.__class__ = layer._base  # type: ignore[assignment]
    # In the order that state dicts of plain layers have.
    found = {**plain, **layer._parameters}
    layer._parameters.clear()
    layer._parameters.update({name: found.pop(name) for name in order if name in found} | found)
    finish(layer)
    return layer


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, else the input's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def in_transform() -> bool:
    """Whether torch.func transforms or forward-mode differentiation are at work around this call.

    The fused operators have a derivative for reverse mode alone, and forward mode would take it for
    zero; layers then compute with the decoded weight and torch's own operators.
    """
    if torch.compiler.is_compiling():
        return False
    level = torch.autograd.forward_ad._current_level
    return level >= 0 or torch._C._are_functorch_transforms_active()


def no_transform(fmt: StorageFormat) -> NotImplementedError:
    """The error of a layer that rounds its activations, within a transform."""
    return NotImplementedError(
        f"{fmt.name} rounds activations, which torch.func and forward-mode derivatives cannot "
        "follow; vramkit.restore the layer or convert it to int8"
    )


def check_float(x: Tensor, layer: str) -> None:
    """Refuse inputs that no kernel takes."""
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{layer} takes float32, bfloat16 or float16 input, got {x.dtype}; cast it first"
        )
