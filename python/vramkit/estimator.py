"""What a model will take, before a byte of its weights is read.

Weights come from the formats' own byte counts. What a call takes comes from running the model on
fake tensors (`dry_run`, `tracing`), with what operators hold inside themselves from probes of
single operators (`probing`) or from rules (`workspaces`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .accounts import CONTEXT_BYTES, Account, Placement, account_of
from .bnb_config import QuantizationConfig, resolve
from .breaks import checked_shape, checked_sum, known_dtype
from .convert import Precision, convert, storage_format
from .estimate_report import data_of, html_of, text_of
from .layers import QuantizedLayer
from .layers.folding import foldings
from .loading import load_trace, stored_tensors
from .sizes import parse_size
from .targets import Target, parse_target

if TYPE_CHECKING:
    from .allocator import Simulation
    from .generation import Generation
    from .plans import Plan
    from .probing import Store
    from .recorder import Recorder
    from .tracing import Tag, Trace
    from .verification import Calibrated

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
        notes: What the figures leave out or assume.
        target: The device that the estimate is for.
        kept_bytes: What a first call leaves in the model for later ones.
        shapes: activations_bytes of every named shape, where several were asked for; the other
            figures are those of the largest.
        generation: The cache of a generation loop.
        probes: Operators that were run for this estimate, and the seconds that took.
        trace: Every allocation and release of the call.
        load_trace: Every allocation and release of `vramkit.load`, weight by weight.
        tensor_bytes: Bytes of every parameter and buffer.
        identity: Names the call: model, formats, shapes, device, versions; "" without inputs.
        predicted_bytes: activations_bytes before any measurement was used.
        activations_interval_bytes: (low, high) of activations_bytes; None where nothing is known.
        interval_from: Where the interval comes from, or why there is none.
        calibrated: The real runs whose measurement activations_bytes is, if there were any. The
            trace and the timeline stay the prediction's.
        placement: Where a plan that streams puts the weights.
        context_bytes: What a CUDA process takes beside torch's allocator; context_assumed: an
            allowance, not measured.
    """

    weights_bytes: int
    inputs_bytes: int = 0
    activations_bytes: int | None = None
    precision: str = "as it is"
    layers: list[tuple[str, str, int]] = field(default_factory=list)
    timeline: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    target: str = "cpu"
    kept_bytes: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    generation: Generation | None = None
    probes: tuple[int, float] = (0, 0.0)
    trace: Trace | None = field(default=None, repr=False)
    load_trace: Trace | None = field(default=None, repr=False)
    tensor_bytes: list[int] = field(default_factory=list, repr=False)
    identity: str = ""
    predicted_bytes: int | None = None
    activations_interval_bytes: tuple[int, int] | None = None
    interval_from: str = "none: there were no inputs"
    calibrated: Calibrated | None = None
    placement: Placement | None = None
    context_bytes: int = CONTEXT_BYTES
    context_assumed: bool = True

    @property
    def account(self) -> Account:
        """What the bytes are for, and where they lie: device and host, loading and running."""
        return account_of(self)

    @property
    def interval_bytes(self) -> tuple[int, int] | None:
        """(low, high) of peak_bytes: the weights, which are exact, and the call's interval."""
        if self.activations_interval_bytes is None:
            return None
        low, high = self.activations_interval_bytes
        return self.weights_bytes + low, self.weights_bytes + high

    @property
    def load_peak_bytes(self) -> int | None:
        """The most alive while `vramkit.load` reads and converts the weights, one after another."""
        return None if self.load_trace is None else self.load_trace.peak()

    @property
    def peak_bytes(self) -> int | None:
        """Weights and the call's own peak; None without inputs."""
        if self.activations_bytes is None:
            return None
        return self.weights_bytes + self.activations_bytes

    def allocation(self, **options: Any) -> Simulation:
        """What torch's allocator for the target makes of the weights, the inputs and the call.

        `options` are those of `vramkit.allocator.simulate`: limit, device_memory, conf and torch's
        own. Tags index `trace.tags`; the next two are the weights' and the inputs'. Raises
        ValueError where the estimate was made without inputs.
        """
        from .allocator import simulate

        if self.trace is None:
            raise ValueError("this estimate has no call to follow; give estimate(inputs=…)")
        weights = len(self.trace.tags)
        held = [(size, weights) for size in self.tensor_bytes]
        if self.inputs_bytes:
            held.append((self.inputs_bytes, weights + 1))
        rows = [(-1 - i, size, 0, tag) for i, (size, tag) in enumerate(held)]
        return simulate([*rows, *self.trace], self.target, **options)

    @property
    def reserved_bytes(self) -> int | None:
        """The most that torch reserves on a CUDA target, rounding and gaps included; else None.

        The CUDA context and libraries come on top. By `allocation`, which was not yet held against
        a GPU (docs/gpu-status.md).
        """
        if self.trace is None or not self.target.startswith("cuda"):
            return None
        return self.allocation().peak_reserved_bytes

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data; keys named `*_bytes` are bytes."""
        return data_of(self)

    def at_peak(self, count: int = 10) -> list[tuple[Tag, int]]:
        """What holds the most at the call's highest point: (operator, module, phase), bytes."""
        if self.trace is None:
            return []
        return list(self.trace.alive_at_peak().items())[:count]

    def __str__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        return html_of(self)

    def plot(self, limit: float | str | None = None) -> Any:
        """A matplotlib figure of what is alive over loading and the call, with the peak marked.

        `limit`, GiB as a number or text such as "6 GB", is drawn as a line.
        """
        from .report.timeline import estimate_figure

        return estimate_figure(self, limit)


def estimate(
    model: nn.Module | str | os.PathLike[str],
    precision: Precision | Mapping[str, Precision | None] | QuantizationConfig | None = None,
    inputs: Any = None,
    *,
    skip: Iterable[str] = (),
    output_kept: bool = True,
    target: str | Target = "cpu",
    probe: bool = True,
    generate: int = 0,
    shapes: Mapping[str, Any] | None = None,
    calibrated: bool = True,
    plan: Plan | None = None,
    context: int | float | str | None = None,
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
        target: "cpu", "cuda" or "cuda:8.9" (compute capability): the device to predict for. It
            decides which attention runs; CUDA is predicted by rules and needs no device.
        probe: Whether operators whose inner allocations are not known yet are run once, alone, on
            zeros (a CPU target only). What they teach is kept in the user's cache folder. Without,
            rules for convolutions, attention, recurrent layers and mixed dtypes answer.
        generate: Count of new tokens: predict a greedy generation loop after the prompt `inputs`,
            its cache included, for a model of transformers.
        shapes: Several inputs by name, in place of `inputs`; the largest counts.
        calibrated: Whether what earlier real runs of this call measured (`vramkit.verify`) takes
            the prediction's place.
        plan: A plan of this model, in place of `precision`: its formats, and what of the weights
            lies on the device, in slots and on the host.
        context: What a CUDA process takes beside torch's allocator: GiB as a number, or text such
            as "400 MB"; None: an allowance of 512 MiB, which is said to be one.

    The model, if one is given, is left as it is. Raises ValueError where the model's control flow
    depends on values that fake tensors do not have, where a custom operator has no fake
    implementation, and for shapes beyond 2**63 bytes.

    >>> vramkit.estimate(torch.nn.Linear(64, 32), inputs=(1, 64)).weights_bytes
    8320
    """
    aim = parse_target(target)
    if shapes is not None and (inputs is not None or not shapes):
        raise ValueError("give either inputs, or shapes with at least one name")
    if isinstance(model, nn.Module):
        skeleton = meta_copy(model)
    else:
        from .skeleton import build_skeleton

        skeleton = build_skeleton(model)
    stored = stored_tensors(skeleton)
    label = "as it is"
    if plan is not None:
        if precision is not None:
            raise ValueError("give precision or plan, not both: a plan chooses the precisions")
        plan.check_model(skeleton)
        precision = {entry.name: entry.format for entry in plan.entries}
    if precision is not None:
        wanted = resolve(precision)[0]
        label = "mixed" if isinstance(wanted, Mapping) else _label(wanted)
        if label != "fp32":
            convert(skeleton, precision, skip=skip)
    found = MemoryEstimate(weight_bytes(skeleton), precision=label, target=aim.name)
    found.layers = list(_layer_bytes(skeleton))
    found.tensor_bytes = [t.numel() * t.element_size() for t in _unique_tensors(skeleton)]
    found.load_trace = load_trace(stored, skeleton)
    found.placement = Placement.of(plan) if plan is not None else None
    if context is not None:
        found.context_bytes, found.context_assumed = parse_size(context), False
    if inputs is None and shapes is None:
        return found
    from .probing import Store

    store = Store() if probe and aim.kind == "cpu" else None
    largest: MemoryEstimate | None = None
    cases = {"": inputs} if shapes is None else dict(shapes)
    for name, given in cases.items():
        made = replace(found, notes=[], shapes={})
        masks = _masks_of_ones(given, model_dtype(skeleton))
        copied = meta_copy(skeleton) if masks or len(cases) > 1 else skeleton
        _trace(copied, given, made, aim, store, probe, output_kept, generate)
        if masks and made.activations_interval_bytes is not None:
            shown = replace(found, notes=[], shapes={})
            copied = meta_copy(skeleton)
            _trace(copied, {**given, **masks}, shown, aim, store, probe, output_kept, generate)
            _widen(made, shown, list(masks))
        if calibrated:
            _calibrate(made)
        assert made.activations_bytes is not None
        if name:
            found.shapes[name] = made.activations_bytes
        if largest is None or made.activations_bytes > (largest.activations_bytes or 0):
            largest = made
    assert largest is not None
    largest.shapes = found.shapes
    return largest


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
    return sum(t.numel() * t.element_size() for t in _unique_tensors(model))


def _unique_tensors(model: nn.Module) -> list[Tensor]:
    unique: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return list(unique.values())


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


def _trace(
    skeleton: nn.Module,
    inputs: Any,
    found: MemoryEstimate,
    target: Target,
    store: Store | None,
    probe: bool,
    output_kept: bool,
    generate: int,
) -> None:
    """Run `skeleton` (parameters on the meta device) on fake tensors; fills in `found`."""
    from .dry_run import DryRun
    from .generation import Loop
    from .intervals import interval_of
    from .verification import identity

    dry = DryRun({"": skeleton}, target)
    args, kwargs = dry.accept(call_arguments(inputs, model_dtype(skeleton)))
    found.inputs_bytes = sum(v.numel() * v.element_size() for v in dry.given)
    more = f"generate={generate} output_kept={output_kept}"
    found.identity = identity(skeleton, args, kwargs, target.name, more)
    loop: Loop | None = None
    if generate:
        if args:
            raise ValueError("a generation loop needs its inputs by name: {'input_ids': …}")
        loop = Loop(skeleton, kwargs, generate)

    def play(recorder: Recorder) -> Any:
        recorder.forget_results = not output_kept
        return loop(recorder) if loop is not None else skeleton(*args, **kwargs)

    learned = dry.learned(play, probe=probe, store=store)
    checked_sum(found.weights_bytes + found.inputs_bytes + learned.peak_bytes)
    found.activations_bytes = found.predicted_bytes = learned.peak_bytes
    found.timeline = learned.trace.timeline()
    found.trace = learned.trace
    found.kept_bytes = learned.kept_bytes
    found.probes = (learned.probes.ran, learned.probes.seconds)
    found.generation = loop.found if loop is not None else None
    found.notes += learned.explain(probe)
    found.activations_interval_bytes, found.interval_from = interval_of(
        learned.peak_bytes, learned.unprobed, target.kind, loop is not None
    )


def _masks_of_ones(inputs: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Masks that hide nothing, for those of which only a shape is given."""
    from .known import LARGEST

    if not isinstance(inputs, Mapping):
        return {}
    _, given = call_arguments(inputs, dtype)
    return {
        name: torch.ones(value.shape, dtype=value.dtype)
        for name, value in given.items()
        if "mask" in name
        and isinstance(value, Tensor)
        and value.device.type == "meta"
        and not value.is_floating_point()
        and value.numel() <= LARGEST
    }


def _widen(found: MemoryEstimate, shown: MemoryEstimate, names: list[str]) -> None:
    """Let the interval begin where masks hide nothing, which a model may see and drop."""
    assert found.activations_interval_bytes is not None
    if shown.activations_interval_bytes is not None:
        both = (*found.activations_interval_bytes, *shown.activations_interval_bytes)
        if (min(both), max(both)) != found.activations_interval_bytes:
            found.activations_interval_bytes = min(both), max(both)
            found.interval_from += f"; from {', '.join(names)} of ones to any values"


def _calibrate(found: MemoryEstimate) -> None:
    """Put what real runs of this call measured in the prediction's place."""
    from .verification import Measured

    assert found.predicted_bytes is not None
    found.calibrated, notes = Measured(found.identity).applied(found.predicted_bytes)
    found.notes += notes
    if found.calibrated is not None:
        used = found.calibrated
        found.activations_bytes = used.most_bytes
        found.activations_interval_bytes = used.least_bytes, used.most_bytes
        found.interval_from = f"real runs on {used.device}, the latest {used.when}"


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: of its first float parameter or converted layer."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            return module.compute_dtype
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def _is_shape(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or not value:
        return False
    return all(isinstance(v, Integral) and not isinstance(v, bool) for v in value)


def _is_typed(value: Any) -> bool:
    """Whether a value is (dtype, shape), perhaps with sizes that are no numbers."""
    if not (isinstance(value, tuple) and len(value) == 2):
        return False
    return isinstance(value[0], (str, torch.dtype)) and isinstance(value[1], (tuple, list))


def _is_open(value: Any) -> bool:
    """Whether a value is a shape with sizes that are no numbers: None, names, fractions."""
    if not isinstance(value, (tuple, list)) or _is_shape(value):
        return False
    return any(isinstance(v, Integral) for v in value) and all(
        v is None or isinstance(v, (Integral, str, float)) for v in value
    )


def _from_shape(value: Any, name: str, dtype: torch.dtype) -> Any:
    if _is_typed(value):
        kind, shape = known_dtype(value[0], name), value[1]
    elif _is_shape(value) or _is_open(value):
        kind, shape = torch.int64 if name in _INTEGER_INPUTS else dtype, value
    else:
        return value
    return torch.empty(checked_shape(shape, kind, name), dtype=kind, device="meta")


def call_arguments(inputs: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of one call; shapes become tensors without memory."""
    if isinstance(inputs, Mapping):
        return (), {k: _from_shape(v, k, dtype) for k, v in inputs.items()}
    if isinstance(inputs, Tensor) or _is_shape(inputs) or _is_typed(inputs) or _is_open(inputs):
        inputs = (inputs,)
    if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
        return tuple(_from_shape(v, "", dtype) for v in inputs), {}
    raise TypeError(
        "inputs are a tensor, a tuple of positional ones, or a dict of keyword ones; "
        f"got {type(inputs).__name__}"
    )
