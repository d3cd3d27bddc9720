"""What the backward pass keeps, in fewer bytes or in another place: saved-tensor hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kept = Literal["fp16", "bf16", "int8", "fp8"]

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SMALL = 4096
"""Elements below which a tensor is kept as it is: nothing would be gained."""


@dataclass
class SavedActivations:
    """What a `compress_activations` has seen."""

    tensors: int = 0
    """Tensors that were compressed."""
    bytes_before: int = 0
    bytes_after: int = 0


@contextlib.contextmanager
def compress_activations(
    model: nn.Module, to: Kept = "bf16", *, seed: int = 0
) -> Iterator[SavedActivations]:
    """Keep what is saved for the backward pass in 16 or 8 bits; the forward pass is untouched.

    Parameters and buffers are not copied, nor integers and small tensors. 8-bit values have a scale
    per row (the last dimension) and are rounded stochastically, so that gradients stay unbiased in
    what they are linear in (Chen et al. 2021, ActNN). A tensor saved twice is kept once.

    Args:
        model: Whose parameters are left alone.
        to: "fp16", "bf16", "int8" or "fp8" (e4m3).
        seed: Of the stochastic rounding.

    Raises ValueError for another name.

    >>> layer, x = torch.nn.Linear(64, 64), torch.randn(128, 64, requires_grad=True)
    >>> with compress_activations(layer, "bf16") as saved:
    ...     y = (layer(x) ** 2).sum()
    >>> saved.bytes_after * 2 == saved.bytes_before
    True
    """
    if to not in (*_HALVES, "int8", "fp8"):
        raise ValueError(f"activations are kept in fp16, bf16, int8 or fp8, not {to!r}")
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = SavedActivations()
    generator = torch.Generator().manual_seed(seed)
    seen: dict[tuple[Any, ...], Any] = {}

    def pack(tensor: Tensor) -> Any:
        wide = tensor.dtype == torch.float32 or (
            tensor.element_size() == 2 and to in ("int8", "fp8")
        )
        if (
            not (tensor.is_floating_point() and wide)
            or tensor.numel() < _SMALL
            or tensor.untyped_storage().data_ptr() in own
        ):
            return tensor
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version)
        found = seen.get(key)
        if found is not None and found[0] is tensor:
            return found[1]
        packed: Any
        if to in _HALVES:
            packed = (tensor.detach().to(_HALVES[to]), None, tensor.dtype)
        else:
            packed = (*_eight_bits(tensor.detach(), to, generator), tensor.dtype)
        seen[key] = (tensor, packed) if tensor.is_leaf else (None, packed)
        saved.tensors += 1
        saved.bytes_before += tensor.numel() * tensor.element_size()
        saved.bytes_after += sum(
            t.numel() * t.element_size() for t in packed if isinstance(t, Tensor)
        )
        return packed

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        values, scales, dtype = packed
        if scales is None:
            wide: Tensor = values.to(dtype)
            return wide
        return (values.float() * scales).to(dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        try:
            yield saved
        finally:
            seen.clear()


def _eight_bits(tensor: Tensor, to: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor by rows, rounded up or down at random in proportion."""
    x = tensor.float()
    most = x.abs().amax(dim=-1, keepdim=True) if x.dim() else x.abs()
    largest = 127.0 if to == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scales = torch.where(most > 0, most / largest, torch.ones_like(most))
    x = x / scales
    noise = torch.rand(x.shape, generator=generator).to(x.device)
    if to == "int8":
        return (x + noise).floor().clamp_(-127, 127).to(torch.int8), scales
    # The spacing of e4m3 at each value: 2^(exponent - 3), 2^-9 among subnormals.
    _, exponent = torch.frexp(x)
    step = torch.exp2((exponent - 4).clamp_(min=-9).float())
    return ((x / step + noise).floor() * step).to(torch.float8_e4m3fn), scales
