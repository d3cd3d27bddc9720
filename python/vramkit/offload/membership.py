"""Which parameters a model has at the moment, seen against those that are in its blocks.

Between two calls an adapter may be loaded, a layer converted, a parameter assigned. Parameters are
told apart as objects, never by name, so that a module may be wrapped or renamed as one likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from ..errors import VramkitError
from .blocks import Block, Division
from .device import HostDevice


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All of them, once each. `model.modules()` takes three times as long, in every call."""
    seen = {id(model)}
    stack = [model]
    while stack:
        module = stack.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)


def survey(model: nn.Module, blocks: set[int], others: dict[int, Tensor]) -> tuple[int, int]:
    """How many parameters of the blocks (ids) are in the model, and the bytes of all others.

    `others` gets these, by id.
    """
    found: set[int] = set()
    for module in modules_of(model):
        for tensor in module._parameters.values():
            if tensor is None:
                continue
            if id(tensor) in blocks:
                found.add(id(tensor))
            else:
                others[id(tensor)] = tensor
        for buffer in module._buffers.values():
            if buffer is not None:
                others[id(buffer)] = buffer
    return len(found), sum(t.numel() * t.element_size() for t in others.values())


class Owners:
    """The modules that have the parameters of each block, as they were when last looked at."""

    def __init__(self, model: nn.Module, blocks: Sequence[Iterable[nn.Parameter]]) -> None:
        self.block = {id(p): index for index, found in enumerate(blocks) for p in found}
        self.modules: dict[int, list[nn.Module]] = {}  # by the parameter's id
        self.others: set[int] = set()
        for module in modules_of(model):
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                if id(parameter) in self.block:
                    self.modules.setdefault(id(parameter), []).append(module)
                else:
                    self.others.add(id(parameter))

    def blocks_now(self, model: nn.Module, count: int) -> list[list[nn.Parameter]]:
        """The parameters of each of the blocks after a change of the model.

        What is gone leaves its block. Where a module has lost a parameter, those that it has got
        since take the place: it was converted, or assigned to.
        """
        now = dict.fromkeys(model.parameters())
        there = {id(p) for p in now}
        heir = {
            id(module): self.block[gone]
            for gone in self.block.keys() - there
            for module in self.modules.get(gone, [])
        }
        found: list[list[nn.Parameter]] = [[] for _ in range(count)]
        placed: set[int] = set()
        for present in now:
            index = self.block.get(id(present))
            if index is not None:
                found[index].append(present)
                placed.add(id(present))
        for module in modules_of(model):
            index = heir.get(id(module))
            if index is None:
                continue
            for parameter in module._parameters.values():
                if parameter is None or id(parameter) in placed or id(parameter) in self.others:
                    continue
                found[index].append(parameter)
                placed.add(id(parameter))
        return found


def division_of(
    model: nn.Module,
    blocks: Sequence[Sequence[nn.Parameter]],
    entries: Sequence[Sequence[nn.Module]],
    before: Division,
    old: Sequence[int | None],
) -> tuple[Division, list[int | None]]:
    """The division that these parameters make, and the new index of each block (None: empty).

    `old` are the blocks' indices in the division before.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    paths = {id(m): path for path, m in model.named_modules()}
    made: list[Block] = []
    index: list[int | None] = []
    for parameters, modules, was in zip(blocks, entries, old, strict=True):
        if not parameters:
            index.append(None)
            continue
        index.append(len(made))
        found = [paths[id(m)] for m in modules if id(m) in paths]
        nbytes = sum(p.numel() * p.element_size() for p in parameters)
        streamed = before.blocks[was].streamed if was is not None else None
        made.append(Block([names[id(p)] for p in parameters], found, nbytes, streamed))
    follows = {was: new for was, new in zip(old, index, strict=True) if was is not None}
    order: list[int] = []
    for was in before.order:
        new = follows.get(was)
        if new is not None and order[-1:] != [new]:
            order.append(new)
    moved = {name for block in made for name in block.parameters}
    reasons = dict(before.stays)
    stays = [
        (name, reasons.get(name, "came after the model was offloaded"))
        for name in names.values()
        if name not in moved
    ]
    # What came since was never traced: its calls are taken for ones that change something.
    known = {entry for block in before.blocks for entry in block.entries}
    unknown = {entry for block in made for entry in block.entries} - known
    return Division(made, order, stays, before.changing | unknown), index


def check_device(parameters: Iterable[nn.Parameter], device: HostDevice) -> None:
    """VramkitError where the model was moved elsewhere while it was offloaded."""
    for parameter in parameters:
        if parameter.device.type != "cpu" and parameter.device != device.torch:
            raise VramkitError(
                f"a parameter of shape {tuple(parameter.shape)} was moved to {parameter.device} "
                "while the model was offloaded from the CPU; move the model back, or disable the "
                "offloading before moving it"
            )
