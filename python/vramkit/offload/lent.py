"""A module's forward, replaced while the module is offloaded; and dynamo kept out of it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch._C._dynamo.eval_frame as _frames
from torch import nn

from ..errors import VramkitError
from .ordering import Station, activations_in

F = TypeVar("F", bound=Callable[..., Any])
Around = Callable[["Lent", Any, Any], Any]


def not_a_graph(function: F) -> F:
    """Marks a function as one that `torch.compile` ends its graphs before; what it calls may be.

    As `torch._dynamo.skip` does, whose import takes a second.
    """
    skip = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)
    _frames.set_code_exec_strategy(function.__code__, skip)
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "an offloaded module's blocks come and go here"
    return function


class Lent:
    """A forward that runs inside `around`. Copies and files of its module hold the plain one.

    `inspect.signature` sees the module's own forward, which transformers asks for its arguments.
    """

    def __init__(self, module: nn.Module, around: Around, station: Station | None = None) -> None:
        self.module = module
        self.around: Around | None = around
        self.key = None if station is None else station.key
        self.before: Callable[..., Any] | None = None
        self.__name__ = "forward"  # which accelerate's hooks and other wrappers ask for
        self.begin()

    @property
    def inner(self) -> Callable[..., Any]:
        """The module's own forward: its class's of today, for converting changes the class."""
        if self.before is not None:
            return self.before
        return types.MethodType(type(self.module).forward, self.module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.inner

    def begin(self) -> None:
        """Take the place of the module's forward."""
        self.before = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = self

    def end(self, for_good: bool = True) -> None:
        """Give it back. Where another has wrapped this one since, it only passes calls on."""
        if for_good:
            self.around = None
        if self.module.__dict__.get("forward") is not self:
            return
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward; where it is compiled without gradients, between operators."""
        if self.around is None:
            return self._own(args, kwargs)
        if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
            activations = activations_in((args, kwargs))
            if self.key is not None and activations:
                torch.ops.vramkit_offload.before(activations[0], self.key)
                try:  # a graph that would end within it is not begun: then `around` is called
                    result = self._own(args, kwargs)
                    activations = activations_in(result)
                finally:
                    torch.ops.vramkit_offload.after(activations, self.key)
                return result
        return self.around(self, args, kwargs)

    def _own(self, args: Any, kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module))
        if copied is None:
            return self.inner
        return types.MethodType(type(self.module).forward, copied)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")  # the class's: a module is read before its state


class Uncompiled:
    """Within it `torch.compile` follows no call; `again()` lets it follow one.

    Where gradients are kept, a module's blocks come and go outside of graphs: these end before it,
    and its own forward may become another.
    """

    __slots__ = ("callback",)

    @not_a_graph
    def __enter__(self) -> Uncompiled:
        self.callback = _frames.set_eval_frame(None)
        return self

    @not_a_graph
    def __exit__(self, *error: object) -> None:
        _frames.set_eval_frame(self.callback)

    @property
    def compiling(self) -> bool:
        """Whether the call comes from something compiled."""
        return callable(self.callback)

    @not_a_graph
    def again(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The function's result; it may be compiled."""
        if self.callback is None:
            return function(*args, **kwargs)
        _frames.set_eval_frame(self.callback)
        try:
            return function(*args, **kwargs)
        finally:
            _frames.set_eval_frame(None)


def refuse_freezing() -> None:
    """VramkitError where inductor would fold weights into its code, which then stay in memory."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None and config.freezing:
        raise VramkitError(
            "torch._inductor.config.freezing keeps weights as constants of compiled code, where "
            "neither a limit nor a change of them reaches; set it to False for offloaded models"
        )
