"""What autograd keeps of weights in a slot: the same views of the store, and of which version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .lent import Uncompiled, not_a_graph


class Kept(NamedTuple):
    """A weight, or a view of one, as backward will need it."""

    tensor: Tensor
    parameter: nn.Parameter
    version: int
    reads: Callable[[], None]  # told that backward reads the store there
    device: torch.device

    def checked(self) -> Tensor:
        """The tensor, unless the weight was changed since: then RuntimeError, as torch does it."""
        if self.parameter._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a weight of shape {tuple(self.parameter.shape)}, which was "
                f"changed between forward and backward (its version is {self.parameter._version}, "
                f"and {self.version} was expected)"
            )
        self.reads()
        return self.tensor.to(self.device, non_blocking=True)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_NOTHING = _Nothing()


def saving(in_store: Callable[[Tensor], Kept | None]) -> Any:
    """A context in which autograd keeps, of what lies in slots, what `in_store` says instead.

    Where gradients are off it does nothing. Hooks that are active already see all other tensors.
    """
    if not torch.is_grad_enabled():
        return _NOTHING
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    @not_a_graph
    def pack(tensor: Tensor) -> Any:
        with Uncompiled():
            kept = in_store(tensor)
        if kept is not None:
            return (None, kept)
        # Detached: a result that keeps itself would be a cycle, which is never freed.
        return (outer[1], outer[0](tensor)) if outer else (None, tensor.detach())

    @not_a_graph
    def unpack(packed: Any) -> Tensor:
        unpack_outer, value = packed
        if isinstance(value, Kept) and unpack_outer is None:
            with Uncompiled():
                return value.checked()
        found: Tensor = unpack_outer(value) if unpack_outer else value
        return found

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
