"""A batch axis that dominates activations, taken in chunks whose size the estimator chooses.

Where a model pairs everything with everything (P3-SAM: points with prompts), its activations, not
its weights, fill the memory. Taking one axis piece by piece bounds them and changes no result.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .convert import Precision
from .errors import BudgetError
from .estimator import call_arguments, estimate, model_dtype
from .sizes import format_size, parse_size

Key = str | int
# Two orders of the same sums, in the dtype of the outputs; what mixes the axis is off by far more.
_SAME = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class ChunkChoice:
    """The chosen size, and what it is expected to take.

    Attributes:
        axis: {argument (name or position): dimension} that is cut, in all arguments alike.
        size: Elements of the axis in a chunk.
        whole: Elements of the axis in the inputs that were given.
        peak_bytes: Estimated: weights, the largest chunk's activations, and the whole result.
        whole_peak_bytes: Estimated without chunks.
        limit_bytes: What it was chosen for.
        out_axes: For each tensor of the result the dimension that grows with the axis, or None.
    """

    axis: dict[Key, int]
    size: int
    whole: int
    peak_bytes: int
    whole_peak_bytes: int
    limit_bytes: int
    out_axes: list[int | None] = field(default_factory=list)
    _model: nn.Module | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Make the model call its whole inputs at once again."""
        if self._model is not None:
            vars(self._model).pop("forward", None)
            self._model = None

    def __str__(self) -> str:
        return (
            f"{self.size} of {self.whole} at a time: {format_size(self.whole_peak_bytes)} -> "
            f"{format_size(self.peak_bytes)}, limit {format_size(self.limit_bytes)}"
        )


def dominant_axis(
    model: nn.Module, inputs: Any, candidates: Mapping[Key, int], *, target: str = "cpu"
) -> Key:
    """Of the candidates {argument: dimension}, the one whose halving lowers the peak most."""
    values = _values(model, inputs)
    sizes = {}
    for key, dim in candidates.items():
        half = max(1, values[key].shape[dim] // 2)
        found = estimate(model, None, _shapes(_cut(values, {key: dim}, half)), target=target)
        sizes[key] = found.peak_bytes or 0
    if not sizes:
        raise ValueError("no axis to choose from: name at least one {argument: dimension}")
    return min(sizes, key=sizes.__getitem__)


def chunk_axis(
    model: nn.Module,
    inputs: Any,
    vram_limit: int | float | str,
    axis: Mapping[Key, int],
    *,
    precision: Precision | None = None,
    target: str = "cpu",
    check: bool = True,
) -> ChunkChoice:
    """Make `model` take an axis of its inputs in the largest chunks that fit the limit.

    Args:
        model: Its `forward` is replaced on this object; ``choice.undo()`` puts it back.
        inputs: One call's inputs or their shapes, as for `vramkit.estimate`: of the largest call.
        vram_limit: Bounds weights, a chunk's activations and the whole result: GiB, or text.
        axis: {argument (name, or position of a positional one): dimension}. Several arguments are
            cut together. The elements along it must not depend on each other.
        precision: That the model will have, where it is not converted yet.
        target: As for `estimate`.
        check: Run four elements, whole and in halves, on random inputs, and compare.

    Raises BudgetError if a single element does not fit, ValueError for an axis that is not there,
    whose lengths differ, which no result has, or along which elements depend on each other. The
    model is as it was then.
    """
    if "forward" in vars(model):
        raise ValueError(f"the forward of this {type(model).__name__} is replaced already")
    limit = parse_size(vram_limit)
    values = _values(model, inputs)
    whole = _length(values, axis)
    out_axes, result = _result_axes(model, values, axis, whole)

    def peak(size: int) -> int:
        shapes = _shapes(_cut(values, axis, size))
        found = estimate(model, precision, shapes, target=target).peak_bytes or 0
        return found + (result if size < whole else 0)

    all_at_once = peak(whole)
    size, took = whole, all_at_once
    if all_at_once > limit:
        size, took = _largest(peak, whole, limit)
    if check and whole > 1:
        _check(model, values, axis, out_axes)
    choice = ChunkChoice(dict(axis), size, whole, took, all_at_once, limit, out_axes)
    model.forward = functools.partial(_run, model, dict(axis), size, out_axes)
    choice._model = model
    return choice


def _largest(peak: Any, whole: int, limit: int) -> tuple[int, int]:
    low, took = 1, peak(1)
    if took > limit:
        raise BudgetError(
            f"one element of the axis takes {format_size(took)} ({took} bytes) with the weights "
            f"and the result, more than the limit of {format_size(limit)}",
            took,
        )
    high = whole
    while high - low > 1:
        middle = (low + high) // 2
        found = peak(middle)
        if found <= limit:
            low, took = middle, found
        else:
            high = middle
    return low, took


def _values(model: nn.Module, inputs: Any) -> dict[Key, Tensor]:
    """The arguments of a call by position and name; shapes become tensors without memory."""
    args, kwargs = call_arguments(inputs, model_dtype(model))
    values: dict[Key, Tensor] = dict(enumerate(args))
    values.update(kwargs.items())
    return values


def _call(model: nn.Module, values: Mapping[Key, Any]) -> Any:
    args = [value for key, value in values.items() if isinstance(key, int)]
    named = {key: value for key, value in values.items() if isinstance(key, str)}
    return type(model).forward(model, *args, **named)


def _shapes(values: Mapping[Key, Tensor]) -> Any:
    typed = {
        key: (str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for key, value in values.items()
    }
    if all(isinstance(key, int) for key in typed):
        return tuple(typed.values())
    if all(isinstance(key, str) for key in typed):
        return typed
    raise ValueError("give all inputs by position or all by name")


def _length(values: Mapping[Key, Any], axis: Mapping[Key, int]) -> int:
    lengths = set()
    for key, dim in axis.items():
        value = values.get(key)
        if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
            known = ", ".join(f"{k!r}: {tuple(v.shape)}" for k, v in values.items())
            raise ValueError(f"no dimension {dim} of an argument {key!r}; the inputs are {known}")
        lengths.add(value.shape[dim])
    if len(lengths) != 1:
        raise ValueError(f"the axis has one length in all arguments, not {sorted(lengths)}")
    return int(lengths.pop())


def _cut(values: Mapping[Key, Any], axis: Mapping[Key, int], size: int, start: int = 0) -> Any:
    return {
        key: value.narrow(axis[key], start, size) if key in axis else value
        for key, value in values.items()
    }


def _result_axes(
    model: nn.Module, values: Mapping[Key, Tensor], axis: Mapping[Key, int], whole: int
) -> tuple[list[int | None], int]:
    """Which dimension of each tensor of the result is the axis, and the result's bytes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = []
    for size in (whole, whole + 1):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            state = {
                name: torch.empty_like(t, device="cpu")
                for name, t in (*model.named_parameters(), *model.named_buffers())
            }
            given = {}
            for key, value in values.items():
                shape = list(value.shape)
                if key in axis:
                    shape[axis[key]] = size
                given[key] = torch.empty(shape, dtype=value.dtype)
            args = tuple(v for k, v in given.items() if isinstance(k, int))
            named = {str(k): v for k, v in given.items() if isinstance(k, str)}
            out = torch.func.functional_call(model, state, args, named)
            found.append([t for t in tree_flatten(out)[0] if isinstance(t, Tensor)])
    axes: list[int | None] = []
    for first, second in zip(*found, strict=True):
        differ = [d for d in range(first.dim()) if first.shape[d] != second.shape[d]]
        if len(differ) > 1 or (differ and second.shape[differ[0]] != first.shape[differ[0]] + 1):
            raise ValueError(
                f"a result of shape {tuple(first.shape)} becomes {tuple(second.shape)} with one "
                "element more: it is not put together from chunks along one dimension"
            )
        axes.append(differ[0] if differ else None)
    if not any(dim is not None for dim in axes):
        raise ValueError("no tensor of the result has the axis: chunks could not be put together")
    return axes, sum(t.numel() * t.element_size() for t in found[0])


def _check(
    model: nn.Module,
    values: Mapping[Key, Tensor],
    axis: Mapping[Key, int],
    out_axes: list[int | None],
) -> None:
    count = min(4, _length(values, axis))
    made = torch.Generator().manual_seed(0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given: dict[Key, Tensor] = {}
    for key, value in values.items():
        shape = list(value.shape)
        if key in axis:
            shape[axis[key]] = count
        if value.is_floating_point():
            given[key] = torch.randn(shape, generator=made).to(device, value.dtype)
        else:
            given[key] = torch.zeros(shape, dtype=value.dtype, device=device)
    if device.type == "meta":
        return
    with torch.no_grad():
        together = tree_flatten(_call(model, given))[0]
        apart = tree_flatten(_run_on(model, axis, count // 2, out_axes, given))[0]
    for a, b in zip(together, apart, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            error = float((a.double() - b.double()).norm())
            if not error <= _SAME[a.dtype] * max(float(a.double().norm()), 1e-30):
                raise ValueError(
                    "elements along the axis depend on each other: in halves the result differs "
                    f"from the whole by {error / float(a.double().norm()):.2g}"
                )


def _run(
    model: nn.Module,
    axis: Mapping[Key, int],
    size: int,
    out_axes: list[int | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    values: dict[Key, Any] = dict(enumerate(args))
    values.update(kwargs.items())
    if not set(axis) <= set(values):
        missing = sorted(map(str, set(axis) - set(values)))
        raise TypeError(
            f"the axis was chosen on the arguments {sorted(map(str, axis))}, and this call has no "
            f"{missing[0]}: pass it as it was given then, by position or by name"
        )
    return _run_on(model, axis, size, out_axes, values)


def _run_on(
    model: nn.Module,
    axis: Mapping[Key, int],
    size: int,
    out_axes: list[int | None],
    values: Mapping[Key, Any],
) -> Any:
    whole = _length(values, axis)
    if whole <= size:
        return _call(model, values)
    parts: list[Any] = []
    spec = None
    grad = torch.is_grad_enabled()
    for start in range(0, whole, size):
        count = min(size, whole - start)
        leaves, spec = tree_flatten(_call(model, _cut(values, axis, count, start)))
        if grad:  # the graph keeps every piece anyway
            parts.append(leaves)
        elif not parts:
            parts = _begin(leaves, out_axes, whole)
        if not grad:
            _put(parts, leaves, out_axes, start)
    if grad:
        parts = _joined(parts, out_axes)
    assert spec is not None
    return tree_unflatten(parts, spec)


def _joined(pieces: list[list[Any]], out_axes: list[int | None]) -> list[Any]:
    dims = iter(out_axes)
    made = []
    for column in zip(*pieces, strict=True):
        dim = next(dims) if isinstance(column[0], Tensor) else None
        made.append(column[0] if dim is None else torch.cat(column, dim))
    return made


def _begin(leaves: list[Any], out_axes: list[int | None], whole: int) -> list[Any]:
    """Room for the whole result, so that chunks and their concatenation are never both there."""
    dims = iter(out_axes)
    made = []
    for leaf in leaves:
        dim = next(dims) if isinstance(leaf, Tensor) else None
        if dim is None:
            made.append(leaf)
        else:
            shape = list(leaf.shape)
            shape[dim] = whole
            made.append(leaf.new_empty(shape))
    return made


def _put(parts: list[Any], leaves: list[Any], out_axes: list[int | None], start: int) -> None:
    dims = iter(out_axes)
    for whole, leaf in zip(parts, leaves, strict=True):
        dim = next(dims) if isinstance(leaf, Tensor) else None
        if dim is not None:
            whole.narrow(dim, start, leaf.shape[dim]).copy_(leaf)
