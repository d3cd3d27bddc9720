"""What no block has, on a device apart: parameters that stay, buffers, what came later."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .device import SeparateDevice


class Placed:
    """Tensors that were moved to a device in place, and where each was before.

    Attributes:
        there: Bytes that were on the device before, by torch's allocator.
    """

    def __init__(self, device: SeparateDevice) -> None:
        self._device = device
        self.there = 0
        self._before: dict[int, tuple[weakref.ref[Tensor], torch.device]] = {}

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Those of a model that is to be offloaded, before anything is moved."""
        self.there = sum(t.nbytes for t in tensors if t.device == self._device.torch)

    @torch.inference_mode(False)
    def take(self, tensors: Iterable[Tensor]) -> None:
        """Move those that are on the host; what fails leaves the others where they are by then."""
        for tensor in tensors:
            known = id(tensor) in self._before and tensor.device == self._device.torch
            if known or tensor.device.type != "cpu":
                continue
            before = tensor.device
            _move(tensor, self._device.moved(tensor.data))
            self._before.setdefault(id(tensor), (weakref.ref(tensor), before))

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Back to where they were, those that still are on the device."""
        for reference, before in self._before.values():
            tensor = reference()
            if tensor is not None and tensor.device == self._device.torch:
                _move(tensor, tensor.data.to(before))
        self._before = {}


def _move(tensor: Tensor, data: Tensor) -> None:
    """As `nn.Module.to` does it: the object stays, and its gradient goes with it."""
    grad, tensor.grad = tensor.grad, None
    tensor.data = data
    if grad is not None:
        tensor.grad = grad.to(data.device)


def show_device(module: nn.Module, device: torch.device) -> None:
    """Tell whoever looks for it where the module computes, unless somebody did so."""
    if not hasattr(module, "_hf_hook"):
        object.__setattr__(module, "_hf_hook", ExecutionDevice(device))


def hide_device(module: nn.Module) -> None:
    """The end of `show_device`."""
    if isinstance(module.__dict__.get("_hf_hook"), ExecutionDevice):
        del module.__dict__["_hf_hook"]


class ExecutionDevice:
    """What a module has as `_hf_hook`, where diffusers and others look up where it computes.

    accelerate has hooks of that name; this one does nothing.
    """

    no_grad = False

    def __init__(self, device: torch.device | None) -> None:
        self.execution_device = device

    def __deepcopy__(self, memo: dict[int, Any]) -> ExecutionDevice:
        """A copy of the model computes where its parameters are."""
        return ExecutionDevice(None)

    def __reduce__(self) -> Any:
        return ExecutionDevice, (None,)

    def init_hook(self, module: Any) -> Any:
        """Part of accelerate's interface."""
        return module

    def detach_hook(self, module: Any) -> Any:
        """Part of accelerate's interface."""
        return module
