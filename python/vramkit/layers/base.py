"""What every converted layer shares: its parts, its lazy `.weight`, and the swap in place.

A converted layer stays the object it was: its class becomes a subclass of its old one, so that
references, hooks and isinstance checks hold. Codes, scales and extra are plain uint8 parameters
without gradient: whatever moves or shards parameters handles them, and no cast can touch a scale.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._operators import StoredParts, encode
from ..errors import ReadOnlyWeightError
from ..formats import StorageFormat

PART_NAMES = ("codes", "scales", "extra")
_writing = threading.local()
_quantized_classes: dict[type, type] = {}
_kinds: list[tuple[type[nn.Module], type]] = []


@contextmanager
def writable() -> Iterator[None]:
    """Within this block, writing to the `.weight` of a converted layer encodes the result again."""
    before = getattr(_writing, "on", False)
    _writing.on = True
    try:
        yield
    finally:
        _writing.on = before


def _refuse(what: str) -> ReadOnlyWeightError:
    return ReadOnlyWeightError(
        f"{what} would not change the stored weight of this converted layer. "
        "Use vramkit.set_weight(layer, tensor), or vramkit.restore(model, dtype) for plain layers; "
        "to merge LoRA adapters, vramkit.interop.peft.upgrade(model)"
    )


class LazyWeight(Tensor):
    """The `.weight` of a converted layer: shape, dtype and device for free, values decoded on use.

    It stands for the decoded weight wherever an operator reads it, and its views are views of a
    decoded copy. A write raises `ReadOnlyWeightError`, because it would change a copy and be lost.
    """

    _owner: QuantizedLayer
    _copy: Tensor | None  # of a view: the part of the decoded copy that it shows

    @staticmethod
    def __new__(cls, owner: QuantizedLayer, copy: Tensor | None = None) -> LazyWeight:
        """`owner`'s weight in its compute dtype, on its device; with `copy`, a view of it."""
        made: LazyWeight
        if copy is not None:
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                copy.shape,
                copy.stride(),
                copy.storage_offset(),
                dtype=copy.dtype,
                device=copy.device,
                requires_grad=False,
            )
        else:
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                owner.weight_shape,
                dtype=owner.compute_dtype,
                device=owner.codes.device,
                requires_grad=False,
            )
            made._is_param = True  # isinstance(weight, nn.Parameter) holds
            made._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it alone
        made._owner, made._copy = owner, copy
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, {self.dtype}, {self._owner.storage_format.name})"

    def _decoded(self) -> Tensor:
        return self._owner.dense_weight() if self._copy is None else self._copy

    def tolist(self) -> Any:
        """The decoded values as nested lists."""
        return self._decoded().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The decoded values as a numpy array."""
        return self._decoded().numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        return self._decoded().__array__(dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        # torch would write to a view, which is one of a decoded copy.
        if self._copy is not None or not getattr(_writing, "on", False):
            raise _refuse("assigning to a part of the weight")
        dense = self._owner.dense_weight()
        dense[index] = value
        self._owner._write(dense, "assigning to a part of the weight")

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Itself: there is no plain storage behind it."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._copy is not None:
            raise _refuse("assigning .data of a view")
        if value is self:
            return
        if value.dim() == self.dim() and value.shape != self.shape:
            # A weight of another size is a new one: resize_token_embeddings assigns it like that.
            if self._owner._shares_parts:
                raise ReadOnlyWeightError(
                    "this weight is tied to another converted layer's, which would keep its size; "
                    "use vramkit.interop.transformers.resize_token_embeddings(model, size)"
                )
            self._owner._assign(value)
        else:
            self._owner._write(value, "assigning .data")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._decoded().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._decoded().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` on the decoded weight, or refuse if it writes."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]
        dense: dict[int, Tensor] = {}

        def decode(value: Any) -> Any:
            if not isinstance(value, cls) or value._copy is not None:
                return value._copy if isinstance(value, cls) else value
            owner = value._owner
            if id(owner) not in dense:
                dense[id(owner)] = owner.dense_weight()
            return dense[id(owner)]

        written = _written(cls, func, args, kwargs) if func._schema.is_mutable else []
        if written and not (
            getattr(_writing, "on", False) and all(weight._copy is None for weight in written)
        ):
            raise _refuse(f"{func}")
        tree_map = torch.utils._pytree.tree_map
        out = func(*tree_map(decode, args), **tree_map(decode, kwargs))
        for weight in written:
            weight._owner._write(dense[id(weight._owner)], str(func))
        if written:
            return written[0]
        if func.is_view and isinstance(args[0], cls):
            owner = args[0]._owner
            return tree_map(lambda v: cls(owner, v) if isinstance(v, Tensor) else v, out)
        return out


def _written(
    cls: type[LazyWeight], func: Any, args: Any, kwargs: dict[str, Any]
) -> list[LazyWeight]:
    """The lazy weights that `func` writes to, by its schema."""
    found: list[LazyWeight] = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            leaves: list[Any] = torch.utils._pytree.tree_leaves(value)
            found += [v for v in leaves if isinstance(v, cls)]
    return found


class QuantizedLayer(nn.Module):
    """Mixin of every converted layer.

    Attributes:
        storage_format: How the weight is stored.
        compute_dtype: The dtype that `.weight` reports and that `restore` gives by default.
        weight_shape: The shape of the decoded weight.
        codes, scales, extra: uint8 parameters without gradient; scales hold the bits of their type.
    """

    storage_format: StorageFormat
    compute_dtype: torch.dtype
    weight_shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    extra: Tensor | None
    _base: type[nn.Module]
    _shares_parts = False

    @property
    def parts(self) -> StoredParts:
        """The stored weight as operators take it."""
        return StoredParts(
            self.storage_format, self.weight_shape, self.codes, self.scales, self.extra
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and extra."""
        return self.parts.nbytes

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, in `dtype` or the compute dtype."""
        return self.parts.dense(dtype or self.compute_dtype)

    @property
    def weight(self) -> Tensor:
        """The weight, decoded on use; see `LazyWeight`."""
        if torch.compiler.is_compiling():
            return self.dense_weight()
        return LazyWeight(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._assign(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; a parameter named `weight` is encoded (or, lazy, shared)."""
        if name == "weight" and "codes" in self._parameters and param is not None:
            self._assign(param)
        else:
            super().register_parameter(name, param)

    def _assign(self, value: Tensor) -> None:
        # What tie_weights and resize_token_embeddings do: a whole new weight, not a lost write.
        if isinstance(value, LazyWeight):
            owner = value._owner
            if owner is not self:
                self._adopt(owner.parts, owner.compute_dtype, share=owner)
            return
        parts = encode(value, self.storage_format)
        self._adopt(parts, value.dtype if value.is_floating_point() else self.compute_dtype)

    def _write(self, value: Tensor, what: str) -> None:
        if not getattr(_writing, "on", False):
            raise _refuse(what)
        self._adopt(encode(value, self.storage_format), self.compute_dtype)

    def _adopt(
        self, parts: StoredParts, compute_dtype: torch.dtype, share: QuantizedLayer | None = None
    ) -> None:
        self.storage_format, self.weight_shape = parts.fmt, tuple(parts.shape)
        self.compute_dtype = compute_dtype
        if share is not None:
            self._shares_parts = share._shares_parts = True
        for name in PART_NAMES:
            part = getattr(parts, name)
            if share is not None:
                self._parameters[name] = share._parameters.get(name)
            else:
                frozen = None if part is None else nn.Parameter(part, requires_grad=False)
                self._parameters[name] = frozen
        self._resized()

    def _resized(self) -> None:
        """Bring the layer's own size attributes in line with `weight_shape`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = self.codes.device
        probe = torch.empty(
            0, dtype=self.compute_dtype, device="cpu" if device.type == "meta" else device
        )
        self.compute_dtype = fn(probe).dtype
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._base,), self.__dict__

    def extra_repr(self) -> str:
        """The old layer's, with the format."""
        return f"{super().extra_repr()}, format={self.storage_format.name}"


def register_kind(base: type[nn.Module], mixin: type) -> None:
    """Make `mixin` the converted form of layers of class `base` and its subclasses."""
    _kinds.append((base, mixin))


def find_kind(module: nn.Module) -> type | None:
    """The mixin for `module`, or None where its class has no converted form."""
    for base, mixin in _kinds:
        if isinstance(module, base):
            return mixin
    return None


def quantized_class(base: type[nn.Module]) -> type:
    """The converted subclass of `base`; one for each class."""
    made = _quantized_classes.get(base)
    if made is None:
        kind, mixin = next((kind, mixin) for kind, mixin in _kinds if issubclass(base, kind))
        body = {"_base": base, "__module__": base.__module__, "__qualname__": base.__qualname__}
        # A subclass with a forward of its own keeps it: its super().forward() reaches ours, and
        # its self.weight decodes.
        bases = (mixin,) if base is kind else (base, mixin)
        made = type(f"Quantized{base.__name__}", bases, body)
        _quantized_classes[base] = made
    return made


def _rebuild(base: type[nn.Module]) -> nn.Module:
    made: Any = quantized_class(base)
    empty: nn.Module = made.__new__(made)
    return empty


def swap(
    module: nn.Module,
    parts: StoredParts,
    compute_dtype: torch.dtype,
    share: QuantizedLayer | None = None,
) -> QuantizedLayer:
    """Turn `module` into its converted form, in place; with `share`, on that layer's parts."""
    module._parameters.pop("weight")
    module.__class__ = quantized_class(type(module))
    assert isinstance(module, QuantizedLayer)
    module._is_hf_initialized = True  # type: ignore[assignment]
    module._adopt(parts, compute_dtype, share=share)
    return module


def unswap(layer: QuantizedLayer, weight: nn.Parameter) -> nn.Module:
    """Turn a converted layer back into the plain one it was, with `weight`, in place."""
    for name in PART_NAMES:
        layer._parameters.pop(name)
    for name in ("storage_format", "compute_dtype", "weight_shape", "_shares_parts"):
        layer.__dict__.pop(name, None)
    layer.__class__ = layer._base  # type: ignore[assignment]
    # First again, where state dicts of plain layers have it.
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update({"weight": weight, **others})
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


def check_float(x: Tensor, layer: str) -> None:
    """Refuse inputs that no kernel takes."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{layer} takes float32, bfloat16 or float16 input, got {x.dtype}; cast it first"
        )
