"""What a model will take, before a byte of its weights is read.

The model is run on fake tensors at the user's shapes: every operator computes shapes and allocates
nothing. A dispatch mode below the model follows the storages that would be alive. Weights come from
the formats' own byte counts. Method: live-storage tracing, as in torch's memory trackers.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._operators import workspace_bytes
from .convert import Precision, convert, storage_format
from .layers import QuantizedLayer
from .layers.folding import foldings
from .sizes import format_size

# Integer inputs of language models, where only a shape is given.
_INTEGER_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")


@dataclass
class MemoryEstimate:
    """Predicted memory of one call, in bytes.

    Attributes:
        weights_bytes: Parameters and buffers, exact.
        inputs_bytes: The inputs; counted neither in activations_bytes nor in peak_bytes.
        activations_bytes: The most that the call itself holds at once: intermediate tensors, its
            output, and the workspaces of converted layers. None without inputs.
        peak_bytes: weights_bytes + activations_bytes. None without inputs.
        layers: (name, format or dtype, bytes) of every layer with parameters.
        timeline: (module, live bytes of the call) at every module's end.
        notes: What the figures leave out.
    """

    weights_bytes: int
    inputs_bytes: int = 0
    activations_bytes: int | None = None
    precision: str = "as it is"
    layers: list[tuple[str, str, int]] = field(default_factory=list)
    timeline: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int | None:
        """Weights and the call's own peak; None without inputs."""
        if self.activations_bytes is None:
            return None
        return self.weights_bytes + self.activations_bytes

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data; keys named `*_bytes` are bytes."""
        return {
            "precision": self.precision,
            "weights_bytes": self.weights_bytes,
            "inputs_bytes": self.inputs_bytes,
            "activations_bytes": self.activations_bytes,
            "peak_bytes": self.peak_bytes,
            "layers": [
                {"name": name, "format": fmt, "layer_bytes": n} for name, fmt, n in self.layers
            ],
            "timeline": [{"module": name, "live_bytes": n} for name, n in self.timeline],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [f"weights      {format_size(self.weights_bytes):>12}  ({self.precision})"]
        if self.activations_bytes is not None and self.peak_bytes is not None:
            lines += [
                f"activations  {format_size(self.activations_bytes):>12}  (highest in one call)",
                f"peak         {format_size(self.peak_bytes):>12}",
                f"inputs       {format_size(self.inputs_bytes):>12}  (not counted above)",
            ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        from .report.html import table

        rows = [(name, fmt, format_size(n)) for name, fmt, n in self.layers]
        return table(("layer", "format", "bytes"), rows, caption=str(self))

    def plot(self) -> Any:
        """A matplotlib figure of the timeline."""
        from .report.plots import estimate_figure

        return estimate_figure(self)


def estimate(
    model: nn.Module | str | os.PathLike[str],
    precision: Precision | Mapping[str, Precision | None] | None = None,
    inputs: Any = None,
    *,
    skip: Iterable[str] = (),
    output_kept: bool = True,
) -> MemoryEstimate:
    """Predict the memory that `model` will take, without running it or reading its weights.

    Args:
        model: A module, or a checkpoint folder of transformers (only its configuration and the
            headers of its weights are read).
        precision: What `convert` would be told; None for the model as it is.
        inputs: One call's inputs: a tensor, a tuple of positional ones or a dict of keyword ones.
            In place of a tensor, a tuple of integers is a shape (int64 for names such as input_ids,
            else the model's dtype), and (dtype, shape) a shape with its dtype.
        skip: As in `convert`.
        output_kept: Whether the output counts while it is alive (it does, by default).

    The model, if one is given, is left as it is. Raises ValueError where the model's control flow
    depends on values, which fake tensors do not have.

    >>> vramkit.estimate(torch.nn.Linear(64, 32), inputs=(1, 64)).weights_bytes
    8320
    """
    if isinstance(model, nn.Module):
        skeleton = meta_copy(model)
    else:
        from .skeleton import build_skeleton

        skeleton = build_skeleton(model)
    label = "as it is"
    if precision is not None:
        label = "mixed" if isinstance(precision, Mapping) else _label(precision)
        if label != "fp32":
            convert(skeleton, precision, skip=skip)
    found = MemoryEstimate(weights_bytes=weight_bytes(skeleton), precision=label)
    found.layers = list(_layer_bytes(skeleton))
    if inputs is None:
        return found
    return trace(skeleton, inputs, found)


def _label(precision: Precision) -> str:
    text = str(precision).strip().lower()
    return text if text == "fp32" else storage_format(precision).name


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters have shapes but no memory; buffers are shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shape = torch.empty_like(parameter, device="meta", requires_grad=False)
        memo[id(parameter)] = nn.Parameter(shape, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    for module in model.modules():
        for folding in foldings(module):
            # What a hook computed last is no parameter, and part of a graph: it cannot be copied.
            computed = module.__dict__.get(folding.leaf)
            if isinstance(computed, Tensor):
                memo[id(computed)] = torch.empty_like(computed, device="meta", requires_grad=False)
    return copy.deepcopy(model, memo)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones count once, views of one storage by size."""
    unique = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in unique.values())


def _layer_bytes(model: nn.Module) -> Iterable[tuple[str, str, int]]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        fresh = {
            id(p): p for p in module._parameters.values() if p is not None and id(p) not in seen
        }
        if not fresh:
            continue
        seen.update(fresh)
        if isinstance(module, QuantizedLayer):
            fmt = module.format_names
        else:
            fmt = str(next(iter(fresh.values())).dtype).removeprefix("torch.")
        yield name, fmt, sum(p.numel() * p.element_size() for p in fresh.values())


def trace(skeleton: nn.Module, inputs: Any, found: MemoryEstimate) -> MemoryEstimate:
    """Run `skeleton` (parameters on the meta device) on fake tensors; fills in `found`."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    dtype = model_dtype(skeleton)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _fake_parameters(skeleton, fake)
    args, kwargs = call_arguments(inputs, dtype)
    tree_map = torch.utils._pytree.tree_map
    args, kwargs = tree_map(lambda v: _fake_input(v, fake), (args, kwargs))
    given = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    found.inputs_bytes = sum(v.numel() * v.element_size() for v in given)
    ledger = _tracker(skeleton, given)
    handles = [
        module.register_forward_hook(
            lambda _m, _a, _o, name=name: ledger.timeline.append((name or "model", ledger.live))
        )
        for name, module in skeleton.named_modules()
    ]
    try:
        with fake, torch.no_grad(), ledger:
            out = skeleton(*args, **kwargs)
            del out
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        GuardOnDataDependentSymNode,
    ) as error:
        raise _needs_values(ledger.timeline, error) from error
    except RuntimeError as error:
        # What .numpy() says on a fake tensor; there is no type of its own for it.
        if "not supported for tensor subclasses" not in str(error):
            raise
        raise _needs_values(ledger.timeline, error) from error
    finally:
        for handle in handles:
            handle.remove()
    found.activations_bytes = ledger.peak
    found.timeline = ledger.timeline
    found.notes.append("what torch's own operators allocate inside themselves is not counted")
    return found


def _needs_values(timeline: list[tuple[str, int]], error: Exception) -> ValueError:
    where = timeline[-1][0] if timeline else "its first module"
    return ValueError(
        "this model decides by the values of its tensors (after "
        f"{where}: {str(error).splitlines()[0]}), so that it cannot be traced by shapes alone. "
        "Measure one real call instead: vramkit.measure.call(model, inputs)"
    )


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: of its first float parameter or converted layer."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            return module.compute_dtype
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def _fake_parameters(skeleton: nn.Module, fake: Any) -> None:
    """Parameters become fake. Buffers become copies: a forward may read or change values."""
    from torch.utils._python_dispatch import _disable_current_modes

    made: dict[int, nn.Parameter] = {}
    copies: dict[int, Tensor] = {}
    with fake:
        for module in skeleton.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    shape = torch.empty_strided(
                        parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu"
                    )
                    made[id(parameter)] = nn.Parameter(shape, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if id(buffer) not in copies and buffer.device.type == "meta":
                    copies[id(buffer)] = torch.empty_like(buffer, device="cpu")
                elif id(buffer) not in copies:
                    with _disable_current_modes():
                        copies[id(buffer)] = buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)]


def _fake_input(value: Any, fake: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with fake:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(v) is int for v in value) and bool(value)


def _from_shape(value: Any, name: str, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], (str, torch.dtype)):
        chosen = getattr(torch, value[0]) if isinstance(value[0], str) else value[0]
        return torch.empty(tuple(value[1]), dtype=chosen, device="meta")
    if _is_shape(value):
        if any(v < 0 for v in value):
            raise ValueError(f"the shape {tuple(value)} of input {name!r} has a negative size")
        kind = torch.int64 if name in _INTEGER_INPUTS else dtype
        return torch.empty(tuple(value), dtype=kind, device="meta")
    return value


def call_arguments(inputs: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of one call; shapes become tensors without memory."""
    if isinstance(inputs, Mapping):
        return (), {k: _from_shape(v, k, dtype) for k, v in inputs.items()}
    if isinstance(inputs, Tensor) or _is_shape(inputs):
        inputs = (inputs,)
    if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        return tuple(_from_shape(v, "", dtype) for v in inputs), {}
    raise TypeError(
        "inputs are a tensor, a tuple of positional ones, or a dict of keyword ones; "
        f"got {type(inputs).__name__}"
    )


def _tracker(skeleton: nn.Module, given: list[Tensor]) -> Any:
    """A dispatch mode that follows live storages; parameters, buffers and inputs do not count."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Tracker(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.live = self.peak = 0
            self.timeline: list[tuple[str, int]] = []
            self.sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
            for tensor in (*skeleton.parameters(), *skeleton.buffers(), *given):
                self.sizes[tensor.untyped_storage()] = -1

        def follow(self, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage in self.sizes:
                return
            size = storage.nbytes()
            self.sizes[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, size)

        def release(self, size: int) -> None:
            self.live -= size

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.follow(leaf)
            if func.namespace == "vramkit":
                name = func._schema.name.removeprefix("vramkit::")
                self.peak = max(self.peak, self.live + workspace_bytes(name, args))
            return out

    return Tracker()
