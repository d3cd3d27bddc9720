"""The first real call of a fitted model, measured and held against its estimate and its limit."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .estimator import MemoryEstimate, call_arguments, estimate, model_dtype, weight_bytes
from .measure import PeakWatch
from .sizes import format_size
from .verification import Verification, keep_measurement, target_of

if TYPE_CHECKING:
    from .plans import Plan

# Beyond this part of the estimated peak the difference is worth a warning.
TOLERANCE = 0.05


class MemoryEstimateWarning(UserWarning):
    """A first call took more than its limit, or not what had been estimated."""


@dataclass
class FirstRun:
    """What `fit` promised and what the first call took; `vramkit_first_run` of a fitted model.

    Attributes:
        plan: What was applied.
        weights_bytes: Parameters and buffers when the call began; None before it.
        activations_bytes: The most that the call held at once, measured: by the profiler's events
            on a CPU, by torch's peak of allocated bytes on CUDA. None before it.
        verification: The comparison as `vramkit.verify` makes it; later estimates of the same call
            use what was measured. None before the call, where there is no estimate, and where the
            call left something in the model that later ones will not make again.
        waiting: Why the calls so far were not measured, if some were not.
    """

    plan: Plan
    weights_bytes: int | None = None
    activations_bytes: int | None = None
    verification: Verification | None = None
    waiting: str = ""
    _estimate: MemoryEstimate | None = field(default=None, repr=False)
    _inputs: Any = field(default=None, repr=False)
    _model: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    @property
    def done(self) -> bool:
        """Whether a call was measured."""
        return self.activations_bytes is not None

    @property
    def peak_bytes(self) -> int | None:
        """Weights and the call's own peak, measured; None before a call."""
        if self.weights_bytes is None or self.activations_bytes is None:
            return None
        return self.weights_bytes + self.activations_bytes

    @property
    def estimate(self) -> MemoryEstimate | None:
        """The estimate for the shapes of that call; None before it.

        That of the plan where the shapes are those it was made for, else made when first asked
        for. Raises as `vramkit.estimate` does.
        """
        if self._estimate is None and self.done:
            model = self._model() if self._model is not None else None
            if model is not None:
                self._compare(
                    estimate(model, inputs=self._inputs, target=target_of(model), calibrated=False)
                )
        return self._estimate

    def _compare(self, found: MemoryEstimate) -> None:
        self._estimate = found
        assert self.activations_bytes is not None
        if not found.kept_bytes:
            self.verification = keep_measurement(found, self.activations_bytes)

    def _warn(self) -> None:
        if not self.within_limit:
            text = "took more than its limit"
        elif self._estimate is not None and abs(self.difference or 0.0) > TOLERANCE:
            text = f"took {self.difference:+.1%} of what was estimated"
        else:
            return
        warnings.warn(f"the first call {text}\n{self}", MemoryEstimateWarning, stacklevel=4)

    @property
    def difference(self) -> float | None:
        """Measured peak / estimated peak of a first call - 1; None without either.

        A first call also makes what it leaves in the model (`kept_bytes`).
        """
        found = self.estimate
        if found is None or not found.peak_bytes or self.peak_bytes is None:
            return None
        assert self.weights_bytes is not None
        # An estimate knows nothing of places: what is streamed is no error of it.
        away = found.weights_bytes - self.weights_bytes if self.plan.streams else 0
        return self.peak_bytes / (found.peak_bytes + found.kept_bytes - away) - 1

    @property
    def within_limit(self) -> bool | None:
        """Whether the call kept to the plan's limit, by what the plan bounds; None before it."""
        if self.peak_bytes is None or self.weights_bytes is None:
            return None
        taken = self.peak_bytes if self.plan.bound == "peak" else self.weights_bytes
        return taken <= self.plan.limit_bytes - self.plan.buffer_bytes

    def to_dict(self) -> dict[str, Any]:
        """As plain data; keys named `*_bytes` are bytes."""
        found = self.estimate
        return {
            "limit_bytes": self.plan.limit_bytes,
            "buffer_bytes": self.plan.buffer_bytes,
            "bound": self.plan.bound,
            "within_limit": self.within_limit,
            "measured": {
                "weights_bytes": self.weights_bytes,
                "activations_bytes": self.activations_bytes,
                "peak_bytes": self.peak_bytes,
            },
            "estimated": None
            if found is None
            else {
                "weights_bytes": found.weights_bytes,
                "activations_bytes": found.activations_bytes,
                "peak_bytes": found.peak_bytes,
                "kept_bytes": found.kept_bytes,
            },
            "difference": self.difference,
        }

    def __str__(self) -> str:
        if not self.done or self.weights_bytes is None or self.activations_bytes is None:
            return "no call was measured yet" + (f": {self.waiting}" if self.waiting else "")
        limit = self.plan.limit_bytes - self.plan.buffer_bytes
        kept = "within" if self.within_limit else "OVER"
        lines = [f"{'first call':12} {'measured':>12} {'estimated':>12}"]
        found = self.estimate
        pairs = (
            ("weights", self.weights_bytes, found.weights_bytes if found else None),
            ("activations", self.activations_bytes, found.activations_bytes if found else None),
            ("peak", self.peak_bytes, found.peak_bytes if found else None),
        )
        for name, measured, predicted in pairs:
            assert measured is not None
            beside = "-" if predicted is None else format_size(predicted)
            lines.append(f"{name:12} {format_size(measured):>12} {beside:>12}")
        if found is not None and found.kept_bytes:
            lines.append(f"{'left by it':12} {'':12} {format_size(found.kept_bytes):>12}")
        if self.difference is not None:
            lines[-1] += f"  ({self.difference:+.1%})"
        lines.append(f"{kept} the limit of {format_size(limit)}, which bounds the {self._bound()}")
        return "\n".join(lines)

    def _bound(self) -> str:
        return "peak" if self.plan.bound == "peak" else "weights"


def _on_device(model: nn.Module) -> int:
    """Bytes of the weights that are in the device's memory now."""
    session = getattr(model, "vramkit_session", None)
    return weight_bytes(model) if session is None else int(session.device_bytes)


def watch_first_run(model: nn.Module, plan: Plan, inputs: Any) -> FirstRun:
    """Measure the next call of `model` without gradients; the hooks go away with it.

    `inputs` are those that `plan.estimate` was made for, if it was.
    """
    found = FirstRun(plan)
    planned = None
    if plan.estimate is not None and inputs is not None:
        planned = _without_memory(by_name(model, *call_arguments(inputs, model_dtype(model))))
    watch = _Watch(found, planned)
    model.register_forward_pre_hook(watch.before, prepend=True, with_kwargs=True)
    model.register_forward_hook(watch.after, with_kwargs=True, always_call=True)
    return found


class _Watch:
    """The hooks of one watched call."""

    def __init__(self, found: FirstRun, planned: Any) -> None:
        self.found, self.planned = found, planned
        self.running: PeakWatch | None = None
        self.depth = 0

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start to measure, if this call is one that an estimate speaks of."""
        if torch.compiler.is_compiling():
            return
        if self.running is None and not self._measurable(args, kwargs):
            return
        # Of several threads the first has the call that is measured. A lock cannot be copied with
        # the model; setdefault is one step.
        if self.__dict__.setdefault("thread", threading.get_ident()) != threading.get_ident():
            return
        self.depth += 1  # the model may call itself
        if self.depth == 1:
            self.found.weights_bytes = _on_device(model)
            self.running = PeakWatch(model)
            self.running.start()

    def after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Take the measurement, compare, and remove the hooks."""
        if torch.compiler.is_compiling() or self.running is None:
            return
        if self.__dict__.get("thread") != threading.get_ident():
            return
        self.depth -= 1
        if self.depth:
            return
        watch, self.running = self.running, None
        peak = watch.stop()
        if output is None:  # what torch passes where the forward raised
            self.__dict__.pop("thread")
            self.found.weights_bytes = None
            self.found.waiting = "the call failed, or returned None"
            return
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
        self.found.activations_bytes = peak
        self.found.weights_bytes = _on_device(model)
        try:
            inputs = _without_memory(by_name(model, args, kwargs))
        except TypeError as error:
            self.found.waiting = f"no estimate for this call: {error}"
        else:
            self.found._model, self.found._inputs = weakref.ref(model), inputs
            if self.planned is not None and _alike(self.planned, inputs):
                assert self.found.plan.estimate is not None
                self.found._compare(self.found.plan.estimate)
        self.found._warn()

    def _measurable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        from torch._subclasses.fake_tensor import FakeTensor

        if torch.is_grad_enabled():
            why = "gradients were on, and keep what an estimate of inference does not count"
        elif torch._C._autograd._profiler_enabled():
            why = "a profiler was running, and there can be only one"
        elif any(isinstance(v, FakeTensor) for v in (*args, *kwargs.values())):
            why = "the inputs were fake tensors"
        else:
            return True
        self.found.waiting = why
        return False


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's inputs as `estimate` takes them: by name, so that calls written differently agree.

    All positional where the forward's signature does not tell names; TypeError where it does not
    and the call has both kinds.
    """
    if not args:
        return kwargs
    try:
        signature = inspect.signature(model.forward)
        bound = dict(signature.bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # a builtin, or a call that the forward itself will refuse
        bound = {}
    kinds = {name: signature.parameters[name].kind for name in bound}
    for name in [n for n, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD]:
        bound |= bound.pop(name)
        del kinds[name]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if bound and all(kind in named for kind in kinds.values()):
        return bound
    if kwargs:
        raise TypeError(
            "this call has inputs by position and by name, and the forward does not say the names "
            "of the former; call it with names alone"
        )
    return args


def _without_memory(value: Any) -> Any:
    """`value` with tensors of the meta device; TypeError for what would keep memory alive."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Mapping):
        return {k: _without_memory(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_without_memory(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    raise TypeError(f"an input was a {type(value).__name__}")


def _alike(a: Any, b: Any) -> bool:
    """Whether two inputs agree in structure, shapes and dtypes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(v, b[k]) for k, v in a.items())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
