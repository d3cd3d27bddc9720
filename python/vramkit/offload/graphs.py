"""CUDA graphs of blocks: each module that brings a block becomes one launch.

A graph is of one module's call, at one address of its block, with arguments of one kind. The engine
brings and takes blocks between the graphs, as between any calls: its waits are on the caller's
stream before a launch and its events after it, so that nothing of it is in a graph. A call that no
graph is of runs as it would without any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import VramkitError
from ..estimator import call_arguments, model_dtype
from .device import SeparateDevice
from .membership import modules_of

if TYPE_CHECKING:
    from .session import OffloadSession

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class _Unknown(Exception):
    """Why a call cannot be told from another one."""


class _Graph:
    """One call: its inputs and results have memory that stays."""

    def __init__(self, device: SeparateDevice, forward: Callable[..., Any], call: Any) -> None:
        self._inputs, spec = pytree.tree_flatten(
            pytree.tree_map_only(Tensor, lambda t: t.clone(), call)
        )

        def run() -> Any:
            args, kwargs = pytree.tree_unflatten(self._inputs, spec)
            return forward(*args, **kwargs)

        results, self._replay = device.capture(run)
        self._results, self._spec = pytree.tree_flatten(results)
        for result in self._results:
            if not isinstance(result, (Tensor, *_PLAIN)):
                raise _Unknown(f"it returns an object of type {type(result).__name__}")

    def __call__(self, leaves: list[Any]) -> Any:
        for own, given in zip(self._inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._replay()
        # Copies: what a caller keeps must not change with the next call.
        found = [r.clone() if isinstance(r, Tensor) else r for r in self._results]
        return pytree.tree_unflatten(found, self._spec)


class Graphs:
    """Those of a session. `changing`: ids of modules whose calls change what was there before.

    Attributes:
        capturing: Whether calls that no graph is of become one.
        reasons: Of modules (by path): why their calls are none.
        captured: How many graphs there are, by module.
    """

    def __init__(self, device: SeparateDevice, changing: set[int]) -> None:
        self.capturing = False
        self.reasons: dict[str, str] = {}
        self.captured: dict[str, int] = {}
        self._device, self._changing = device, changing
        self._graphs: dict[Any, _Graph] = {}

    def call(
        self,
        forward: Callable[..., Any],
        module: nn.Module,
        path: str,
        otherwise: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """The module's call by its graph; where there is none, by `otherwise`."""
        if path in self.reasons or torch.is_grad_enabled():
            return otherwise(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        try:
            key = (id(module), spec, *map(_kind, leaves), *_settings(), *_state(module))
            found = self._graphs.get(key)
            if found is None and self.capturing:
                found = self._graphs[key] = self._capture(forward, module, (args, kwargs))
                self.captured[path] = self.captured.get(path, 0) + 1
        except _Unknown as error:
            if self.capturing:
                self.reasons[path] = str(error)
            found = None
        return otherwise(*args, **kwargs) if found is None else found(leaves)

    def _capture(self, forward: Callable[..., Any], module: nn.Module, call: Any) -> _Graph:
        if id(module) in self._changing:
            raise _Unknown("its call changes what it is given, or a buffer")
        try:
            return _Graph(self._device, forward, call)
        except (RuntimeError, ValueError) as error:
            # What torch says of an operator that waits for the device, for one.
            raise _Unknown(f"it cannot be captured: {str(error).splitlines()[0]}") from error


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape, leaf.stride(), leaf.device
    if isinstance(leaf, _PLAIN):
        return type(leaf), leaf
    raise _Unknown(f"it is given an object of type {type(leaf).__name__}")


def _settings() -> tuple[Any, ...]:
    kind = "cuda"
    autocast = torch.is_autocast_enabled(kind)
    return torch.is_inference_mode_enabled(), autocast, torch.get_autocast_dtype(kind)


def _state(module: nn.Module) -> Iterator[Any]:
    """Addresses of its tensors and plain attributes, of all modules in it: switches among them."""
    for one in modules_of(module):
        for tensor in (*one._parameters.values(), *one._buffers.values()):
            yield None if tensor is None else tensor.data_ptr()
        for name, value in vars(one).items():
            if isinstance(value, _PLAIN):
                yield name, type(value), value
            elif isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value):
                yield name, tuple(value)


def capture_all(session: OffloadSession, graphs: Graphs, inputs: Any) -> dict[str, str]:
    """The graphs of one call of a session's model; see `OffloadSession.capture`."""
    model = session._model
    args, kwargs = call_arguments(inputs, model_dtype(model))
    entries = {session._paths[id(m)] for g in session._guests for m in g.entries}
    with torch.no_grad():
        model(*args, **kwargs)  # residents come, and the order is learned
        passes = []
        for _ in range(2):
            session.visits = []
            model(*args, **kwargs)
            passes.append(session.visits)
        session.visits = None
        if passes[0] != passes[1]:
            pairs = zip_longest(*passes, fillvalue=("nothing", 0))
            first = next((a[0], b[0]) for a, b in pairs if a != b)
            raise VramkitError(
                "two passes in turn found their blocks in different places, or in another order "
                f"(first at {' and '.join(dict.fromkeys(first))}): there is no steady plan that "
                "graphs could be made of"
            )
        session.graphs, graphs.capturing = graphs, True
        try:
            model(*args, **kwargs)
        except BaseException:
            session.graphs = None
            raise
        finally:
            graphs.capturing = False
    found = {
        path: graphs.reasons.get(
            path, "captured" if path in graphs.captured else "was not called by itself"
        )
        for path in sorted(entries)
    }
    if not graphs.captured:
        session.graphs = None
        told = "; ".join(f"{path}: {why}" for path, why in found.items())
        raise VramkitError(f"no block's call can be captured: {told}")
    return found
