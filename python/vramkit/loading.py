"""The load phase as a trace: tensor by tensor, as `vramkit.load` reads and converts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .layers.base import part_name
from .tracing import RELEASE, Tag, Trace

PHASE = "load"


class Stored(NamedTuple):
    """One tensor of the plain model: where it belongs, and its bytes in the checkpoint's dtype."""

    module: str
    leaf: str
    nbytes: int
    parameter: bool


def stored_tensors(model: nn.Module) -> list[Stored]:
    """What a checkpoint of the (unconverted) model holds, each shared tensor once, in order."""
    found: dict[int, Stored] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        size = value.numel() * value.element_size()
        found.setdefault(id(value), Stored(module, leaf, size, isinstance(value, nn.Parameter)))
    return list(found.values())


def load_trace(stored: Sequence[Stored], converted: nn.Module) -> Trace:
    """Allocations and releases of loading: a plain weight lives until its codes are there."""
    trace = Trace()
    tags: dict[Tag, int] = {}
    blocks = 0
    modules = dict(converted.named_modules())

    def event(block: int, size: int, operator: str, module: str) -> None:
        tag = tags.setdefault(Tag(operator, module, PHASE), len(tags))
        trace.events.extend((block, size, 0, tag))

    for tensor in stored:
        if tensor.nbytes == 0:
            continue
        blocks += 1
        event(blocks, tensor.nbytes, "read", tensor.module)
        plain = blocks
        parts = _parts(modules.get(tensor.module), tensor)
        for size in parts:
            blocks += 1
            event(blocks, size, "encode", tensor.module)
        if parts:
            event(plain, RELEASE, "read", tensor.module)
    trace.tags = list(tags)
    return trace


def _parts(module: nn.Module | None, tensor: Stored) -> list[int]:
    """Bytes of the parameters that hold a plain one's codes; none where it stays as it was."""
    if module is None or not tensor.parameter or tensor.leaf in module._parameters:
        return []
    names = (part_name(tensor.leaf, part) for part in ("codes", "scales", "extra"))
    found = (module._parameters.get(name) for name in names)
    return [p.numel() * p.element_size() for p in found if p is not None]
