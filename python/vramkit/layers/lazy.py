"""`LazyWeight`: what a stored parameter looks like to whoever reads it by name.

Views of it stay lazy: they remember what was asked for, so that taking one expert out of many
decodes that expert alone, and what autograd saves for a backward pass holds no decoded copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ReadOnlyWeightError

if TYPE_CHECKING:
    from .base import QuantizedLayer

_writing = threading.local()
_aten = torch.ops.aten


@contextmanager
def writable() -> Iterator[None]:
    """Within this block, writing to the `.weight` of a converted layer encodes the result again."""
    before = getattr(_writing, "on", False)
    _writing.on = True
    try:
        yield
    finally:
        _writing.on = before


def is_writable() -> bool:
    """Whether this thread is in a `writable()` block."""
    return getattr(_writing, "on", False)


def refuse(what: str) -> ReadOnlyWeightError:
    """The error of a write that would be lost."""
    return ReadOnlyWeightError(
        f"{what} would not change the stored weight of this converted layer. "
        "Use vramkit.set_weight(layer, tensor), or vramkit.restore(model, dtype) for plain layers; "
        "to merge LoRA adapters, vramkit.interop.peft.upgrade(model)"
    )


class _Step(NamedTuple):
    """One view operator, as it is applied to the decoded weight again."""

    func: Any
    args: tuple[Any, ...]  # without the tensor itself
    kwargs: dict[str, Any]
    which: int | None  # which one, where the operator gives several

    def __call__(self, tensor: Tensor) -> Tensor:
        out = self.func(tensor, *self.args, **self.kwargs)
        made: Tensor = out if self.which is None else out[self.which]
        return made


class LazyWeight(Tensor):
    """A stored parameter: shape, dtype and device for free, values decoded on use.

    It stands for the decoded weight wherever an operator reads it, and so do its views. A write
    raises `ReadOnlyWeightError`, because it would change a copy and be lost.
    """

    _owner: QuantizedLayer
    _name: str
    _steps: tuple[_Step, ...]

    @staticmethod
    def __new__(
        cls,
        owner: QuantizedLayer,
        name: str = "weight",
        dtype: torch.dtype | None = None,
        steps: tuple[_Step, ...] = (),
        geometry: Tensor | None = None,
    ) -> LazyWeight:
        """`owner`'s parameter `name` in `dtype` (its compute dtype), on its device.

        With `steps`, a view of it; `geometry` is that view of a tensor without memory.
        """
        stored = owner.stored_parameter(name)
        options: dict[str, Any] = {
            "dtype": dtype or stored.dtype,
            "device": owner.stored_part(name, "codes").device,
            "requires_grad": False,
        }
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        made: LazyWeight
        if geometry is not None:
            place = (geometry.shape, geometry.stride(), geometry.storage_offset())
            made = make(cls, *place, **options)
        else:
            made = make(cls, stored.shape, **options)
            made._is_param = True  # isinstance(weight, nn.Parameter) holds
            made._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it alone
        made._owner, made._name, made._steps = owner, name, steps
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        fmt = self._owner.stored_parameter(self._name).fmt
        return f"LazyWeight({tuple(self.shape)}, {self.dtype}, {fmt.name})"

    def _decoded(self) -> Tensor:
        """The values; of a view of a range of the first dimension, only that range is decoded."""
        owner, name, steps = self._owner, self._name, self._steps
        if not steps:
            return owner.dense_weight(self.dtype, name)
        shape = owner.stored_parameter(name).shape
        chosen = _leading_range(steps, shape)
        if chosen is None:
            dense = owner.dense_weight(self.dtype, name)
        else:
            first, count, keep = chosen
            dense = owner.parts_of(name).dense_slice(first, count, self.dtype)
            dense = dense if keep else dense[0]
            steps = steps[1:]
        for step in steps:
            dense = step(dense)
        return dense

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the view operator `func` gives, decoding nothing."""
        stored = self._owner.stored_parameter(self._name)
        shadow = torch.empty(stored.shape, dtype=self.dtype, device="meta")
        for step in self._steps:
            shadow = step(shadow)
        out = func(shadow, *args, **kwargs)

        def lazy(piece: Tensor, index: int | None) -> LazyWeight:
            steps = (*self._steps, _Step(func, args, kwargs, index))
            return type(self)(self._owner, self._name, self.dtype, steps, piece)

        if isinstance(out, Tensor):
            return lazy(out, None)
        return type(out)(lazy(piece, index) for index, piece in enumerate(out))

    def _write(self, value: Tensor, what: str) -> None:
        self._owner._write(value, what, self._name)

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
        if self._steps or not is_writable():
            raise refuse("assigning to a part of the weight")
        dense = self._decoded()
        dense[index] = value
        self._write(dense, "assigning to a part of the weight")

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Itself: there is no plain storage behind it."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._steps:
            raise refuse("assigning .data of a view")
        if value is self:
            return
        if value.dim() == self.dim() and value.shape != self.shape:
            # A weight of another size is a new one: resize_token_embeddings assigns it like that.
            if self._owner._shares_parts:
                raise ReadOnlyWeightError(
                    "this weight is tied to another converted layer's, which would keep its size; "
                    "use vramkit.interop.transformers.resize_token_embeddings(model, size)"
                )
            self._owner._assign(value, self._name)
        else:
            self._write(value, "assigning .data")

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
        if func is _aten.detach.default:
            return args[0]
        written = _written(cls, func, args, kwargs) if func._schema.is_mutable else []
        if written and not (is_writable() and not any(weight._steps for weight in written)):
            raise refuse(f"{func}")
        if func.is_view and isinstance(args[0], cls):
            return args[0]._view(func, tuple(args[1:]), kwargs)
        special = _SPECIAL.get(func)
        if special is not None:
            out = special(*args, **kwargs)
            if out is not NotImplemented:
                return out
        dense: dict[Any, Tensor] = {}

        def key_of(weight: LazyWeight) -> Any:
            same = (id(weight._owner), weight._name, weight.dtype)
            return id(weight) if weight._steps else same

        def decode(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            key = key_of(value)
            if key not in dense:
                dense[key] = value._decoded()
            return dense[key]

        tree_map = torch.utils._pytree.tree_map
        out = func(*tree_map(decode, args), **tree_map(decode, kwargs))
        for weight in written:
            weight._write(dense[key_of(weight)], str(func))
        return written[0] if written else out


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


def _leading_range(
    steps: tuple[_Step, ...], shape: tuple[int, ...]
) -> tuple[int, int, bool] | None:
    """(first, count, whether the dimension stays) where steps begin with a range of dimension 0."""
    step, rest = steps[0], steps[1:]
    if len(shape) < 2 or any(s.func is _aten.as_strided.default for s in rest):
        return None  # as_strided counts from the beginning of the whole weight
    args, size = step.args, shape[0]
    if step.func is _aten.select.int and args[0] in (0, -len(shape)):
        return args[1] % size, 1, False
    if step.func is _aten.slice.Tensor:
        options: tuple[Any, ...] = (0, None, None, 1)
        dim, start, end, stride = args + options[len(args) :]
        if dim in (0, -len(shape)) and stride == 1 and not step.kwargs:
            first, last, _ = slice(start, end).indices(size)
            return first, max(0, last - first), True
    if step.func is _aten.split.Tensor and (args[1] if len(args) > 1 else 0) == 0:
        assert step.which is not None
        first = step.which * args[0]
        return first, min(args[0], size - first), True
    if step.func is _aten.unbind.int and (args[0] if args else 0) == 0:
        assert step.which is not None
        return step.which, 1, False
    return None


def _rows_of(weight: LazyWeight, indices: Tensor, bounds: bool) -> Any:
    """Indices of the first dimension by a gather; `bounds`: negative ones count from the end."""
    if weight._steps or weight.dim() < 2 or indices.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    if bounds:
        indices = torch.where(indices < 0, indices + weight.shape[0], indices)
    return weight._owner.parts_of(weight._name).gather(indices, weight.dtype)


def _index(weight: Any, indices: Any) -> Any:
    if not isinstance(weight, LazyWeight) or len(indices) != 1 or indices[0] is None:
        return NotImplemented
    return _rows_of(weight, indices[0], bounds=True)


def _embedding(weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    if not isinstance(weight, LazyWeight):
        return NotImplemented
    return _rows_of(weight, indices, bounds=False)


def _index_select(weight: Any, dim: int, indices: Any) -> Any:
    if not isinstance(weight, LazyWeight) or dim not in (0, -weight.dim()):
        return NotImplemented
    return _rows_of(weight, indices.reshape(-1), bounds=False)


def _grouped_mm(
    x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """x's groups of rows times one matrix each, as mixtures of experts do: one matrix at a time.

    A stored [experts, out, in] weight seen transposed is multiplied from its packed bytes.
    """
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight) or bias is not None:
        return NotImplemented
    shape = weight._owner.stored_parameter(weight._name).shape
    turned = len(weight._steps) == 1 and weight._steps[0].func is _aten.transpose.int
    if turned:
        turned = {d % 3 for d in weight._steps[0].args} == {1, 2}
    if x.dim() != 2 or len(shape) != 3 or offs is None or (weight._steps and not turned):
        return NotImplemented
    parts = weight._owner.parts_of(weight._name)
    out = x.new_zeros((x.shape[0], weight.shape[-1]), dtype=out_dtype or x.dtype)
    if type(offs) is not Tensor:  # traced without values: what one expert takes, and the result
        parts.dense_slice(0, 1, x.dtype)
        return out
    first = 0
    for index, last in enumerate(offs.tolist()):
        if last > first:
            rows = x[first:last]
            piece = parts.matrix_at(index) if turned else None
            if piece is not None:
                made = torch.ops.vramkit.linear(
                    rows, *piece.arguments, None, piece.fmt.spec, piece.shape[0]
                )
            else:
                dense = parts.dense_slice(index, 1, x.dtype)[0]
                made = rows @ (dense.t() if turned else dense)
            out[first:last] = made
        first = max(first, last)
    return out


_SPECIAL: dict[Any, Any] = {
    _aten.index.Tensor: _index,
    _aten.embedding.default: _embedding,
    _aten.index_select.default: _index_select,
    _aten._grouped_mm.default: _grouped_mm,
}
