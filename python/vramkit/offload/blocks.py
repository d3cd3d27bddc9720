"""Which parameters move together, and which calls need them: found by a trace, for any module.

A parameter's unit is the lowest module, of those that have it in their tree, that is being called
whenever it is used: mostly its own layer, the attention for the projections of
`nn.MultiheadAttention`. One that several layers share has a unit in each. Units are gathered into
blocks of neighbours in the order of their first use; a block is needed while any module of its
entries is called.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..estimator import call_arguments, meta_copy, model_dtype

# Blocks are at most this part of the bytes that can move, or as large as the largest unit: more
# blocks overlap better and need smaller slots, fewer cost fewer calls.
PARTS = 12


@dataclass(frozen=True)
class Touch:
    """One use of a parameter: which (by its first name), in which modules' calls, innermost last.

    `written`: the operator changed it. `grad`: seen in the pass with gradients.
    """

    name: str
    stack: tuple[str, ...]
    written: bool = False
    grad: bool = False


class Touches(list[Touch]):
    """All uses of parameters in a call, in order.

    Attributes:
        changing: Modules whose calls change tensors that were there before: their inputs, buffers.
            A second run of such a call is not like the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changing: set[str] = set()


@dataclass
class Block:
    """Parameters that move together.

    Attributes:
        parameters: Their first names in the model.
        entries: The modules whose calls need them; none of them calls another.
        nbytes: Of all of them.
        streamed: Whether it must not stay on the device; None: as there is room.
    """

    parameters: list[str]
    entries: list[str]
    nbytes: int
    streamed: bool | None = None


@dataclass
class Division:
    """A model's blocks in the order of their first use, and what must stay on the device.

    Attributes:
        blocks: What can move.
        order: Indices of blocks as one pass calls them.
        stays: (parameter, reason) of all others.
        changing: Entries whose calls change tensors that were there before.
    """

    blocks: list[Block]
    order: list[int] = field(default_factory=list)
    stays: list[tuple[str, str]] = field(default_factory=list)
    changing: set[str] = field(default_factory=set)


def touches_of(model: nn.Module, inputs: Any) -> Touches:
    """Every use of a parameter in one call, without running it: on fake tensors.

    Once without gradients and once with them, because modules may take other ways then. Raises
    ValueError as `vramkit.estimate` does where a call cannot be followed so.
    """
    found = Touches()
    for grad in (False, True):
        _follow(model, inputs, grad, found)
    return found


class _Calls(list[str]):
    """The stack of modules, and how many storages there were when each call began."""

    def __init__(self, storages: Callable[[], int]) -> None:
        super().__init__()
        self._storages = storages
        self.began: list[int] = []

    def append(self, path: str) -> None:
        super().append(path)
        self.began.append(self._storages())

    def pop(self, index: SupportsIndex = -1) -> str:
        self.began.pop(index)
        return super().pop(index)


def _follow(model: nn.Module, inputs: Any, grad: bool, found: Touches) -> None:
    from ..breaks import explained
    from ..dry_run import DryRun
    from ..recorder import Recorder, module_paths
    from ..targets import parse_target
    from ..tracing import tensors_in

    skeleton = meta_copy(model)
    dry = DryRun({"": skeleton}, parse_target("cpu"))
    args, kwargs = dry.accept(call_arguments(inputs, model_dtype(skeleton)))
    names = {p.untyped_storage()._cdata: n for n, p in skeleton.named_parameters()}
    recorder = Recorder([])
    calls = recorder.stack = _Calls(lambda: recorder.recording.blocks)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            for tensor in tensors_in((args, kwargs)):
                name = names.get(tensor.untyped_storage()._cdata)
                written = func._schema.is_mutable and _writes(func, args, kwargs, tensor)
                if name is not None:
                    found.append(Touch(name, tuple(calls), written, grad))
                if written:
                    born = recorder.blocks.get(tensor.untyped_storage(), 0)
                    found.changing.update(
                        path
                        for path, began in zip(calls, calls.began, strict=True)
                        if born <= began
                    )
            if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
                # torch 2.11 makes these products of any floats, and says of fake ones it would not.
                first, second = args[0].bfloat16(), args[1].bfloat16()
                return func(first, second, *args[2:], **kwargs).to(args[0].dtype)
            return func(*args, **kwargs)

    try:
        with (
            explained(recorder),
            module_paths({"": skeleton}, recorder),
            dry.fake,
            torch.set_grad_enabled(grad),
            recorder.mode(),
            Watch(),
        ):
            skeleton(*args, **kwargs)
    except (RuntimeError, TypeError) as error:
        # An operator of this torch that refuses fake tensors, or the model these inputs.
        raise ValueError(
            f"this call could not be followed on fake tensors: in module {recorder.place!r}, at "
            f"{recorder.operator or 'its first operator'}: {type(error).__name__}: {error}. Where "
            "the model itself runs with these inputs, this version of torch cannot trace it"
        ) from error


def _writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensor: Tensor) -> bool:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        if any(t is tensor for t in torch.utils._pytree.tree_leaves(value)):
            return True
    return False


def divide(
    model: nn.Module,
    touches: Iterable[Touch],
    cap: int | None = None,
    *,
    stay: Mapping[str, str] | None = None,
    streamed: Container[str] | None = None,
) -> Division:
    """Blocks of at most `cap` bytes (where no unit is larger), by default a twelfth of all.

    Args:
        model: Whose parameters they are; a skeleton will do.
        touches: What `touches_of` found.
        cap: In bytes.
        stay: Parameters that are to be in no block, with reasons.
        streamed: Parameters whose blocks must not stay on the device; those of all others must.
    """
    changing = touches.changing if isinstance(touches, Touches) else set()
    touches = list(touches)
    stay = stay or {}
    by_name: dict[str, list[Touch]] = {}
    for touch in touches:
        by_name.setdefault(touch.name, []).append(touch)
    parameters = dict(model.named_parameters())
    owners = _owners(model)
    stays: list[tuple[str, str]] = []
    tree = _Tree({n: p.numel() * p.element_size() for n, p in parameters.items()})
    if streamed is not None:
        tree.streamed = {name: name in streamed for name in parameters}
    for name, found in by_name.items():
        tree.called.update(path for touch in found for path in touch.stack)
        if name in stay:
            stays.append((name, stay[name]))
            continue
        entries = _entries(owners[id(parameters[name])], found)
        if any(touch.written for touch in found):
            stays.append((name, "the call itself changes it"))
        elif "" in entries:
            stays.append((name, "used by the model itself, beside its modules"))
        elif len(entries) > 1:
            tree.shared[name] = entries
        else:
            tree.units.setdefault(entries[0], []).append(name)
    stays += [(name, "not used by this call") for name in parameters if name not in by_name]
    total = sum(tree.sizes[n] for names in tree.units.values() for n in names)
    total += sum(tree.sizes[n] for n in tree.shared)
    tree.cap = cap if cap is not None else -(-total // PARTS)
    blocks = tree.blocks()
    stays += tree.left
    place = {name: i for i, block in enumerate(blocks) for name in block.parameters}
    order: list[int] = []
    for touch in touches:
        index = place.get(touch.name)
        if not touch.grad and index is not None and order[-1:] != [index]:
            order.append(index)
    called = {entry for block in blocks for entry in block.entries}
    return Division(blocks, order, stays, changing & called)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(path)
    return found


def _entries(owners: Sequence[str], touches: Sequence[Touch]) -> list[str]:
    """The lowest modules, of the owners and those above them, that are called at the uses.

    One is enough where it is called at every use. "" is the model itself.
    """
    lineages = [_lineage(owner) for owner in owners]
    within = [p for p in lineages[0] if all(p in touch.stack for touch in touches)]
    if len(owners) == 1:
        return [within[-1] if within else ""]
    above = {path for lineage in lineages for path in lineage}
    found: dict[str, None] = {}
    for touch in touches:
        found[next((path for path in reversed(touch.stack) if path in above), "")] = None
    return list(found)


def _lineage(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


@dataclass
class _Tree:
    """Units by path, to be cut into blocks."""

    sizes: dict[str, int]
    units: dict[str, list[str]] = field(default_factory=dict)  # in the order of their first use
    shared: dict[str, list[str]] = field(default_factory=dict)  # parameter: its several entries
    called: set[str] = field(default_factory=set)
    streamed: dict[str, bool] = field(default_factory=dict)
    cap: int = 0
    left: list[tuple[str, str]] = field(default_factory=list)

    def blocks(self) -> list[Block]:
        """All blocks, neighbours together as far as the cap allows; shared parameters alone."""
        apart: dict[tuple[str, ...], list[str]] = {}
        for name, entries in self.shared.items():
            taken = {e for key in apart if key != tuple(entries) for e in key}
            if self._nested(entries) or taken & set(entries):
                self.left.append((name, "shared by modules that call or share others"))
            else:
                apart.setdefault(tuple(entries), []).append(name)
        self.shared = {name: list(e) for e, names in apart.items() for name in names}
        groups = {key: self._block(names, list(key)) for key, names in apart.items()}
        blocks: list[Block] = []
        for chunk in self._chunks(""):
            # What else a module with a shared parameter needs comes with that: one block a call.
            group = next((g for e, g in groups.items() if set(e) & set(chunk.entries)), None)
            last = blocks[-1] if blocks else None
            if group is not None:
                self._add(group, chunk)
            elif (
                last is not None
                and last.nbytes + chunk.nbytes <= self.cap
                and last.streamed == chunk.streamed
            ):
                self._add(last, chunk)
            else:
                blocks.append(chunk)
        blocks += groups.values()
        return blocks

    @staticmethod
    def _add(block: Block, more: Block) -> None:
        block.parameters += more.parameters
        block.entries += [entry for entry in more.entries if entry not in block.entries]
        block.nbytes += more.nbytes
        if more.streamed:
            block.streamed = True

    def _block(self, names: list[str], entries: list[str]) -> Block:
        """Streamed as a whole if any of its parameters is."""
        found = {self.streamed.get(name) for name in names}
        streamed = True if True in found else None if None in found else False
        return Block(names, entries, sum(self.sizes[n] for n in names), streamed)

    def _nested(self, entries: Sequence[str]) -> bool:
        """Whether the modules have others with units in them, or are in such ones."""
        others = [e for found in self.shared.values() for e in found if e not in entries]
        return any(
            _under(a, b) or _under(b, a)
            for a in entries
            for b in [*(u for u in self.units if u not in entries), *others]
        ) or any(_under(a, b) for a in entries for b in entries if a != b)

    def _chunks(self, path: str) -> list[Block]:
        """The units at and under `path`: one chunk where they are small, else those below."""
        below = [unit for unit in self.units if _under(unit, path)]
        names = [name for unit in below for name in self.units[unit]]
        size = sum(self.sizes[name] for name in names)
        apart = any(_under(e, path) for entries in self.shared.values() for e in entries)
        if path and below == [path]:
            return [self._block(names, [path])]
        alike = len({self.streamed.get(name) for name in names}) < 2
        if path and size <= self.cap and not apart and alike:
            return [self._block(names, self._highest(path))]
        # Blocks must not lie within each other, so that what is the module's own stays.
        own = self.units.get(path, [])
        self.left += [(name, "used beside blocks of its module") for name in own]
        children = dict.fromkeys(_child(unit, path) for unit in below if unit != path)
        return [chunk for child in children for chunk in self._chunks(child)]

    def _highest(self, path: str) -> list[str]:
        """`path` if it is called, else the highest called modules with units in it."""
        if path in self.called:
            return [path]
        children = dict.fromkeys(_child(u, path) for u in self.units if _under(u, path))
        return [entry for child in children for entry in self._highest(child)]


def _under(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(parent + ".")


def _child(path: str, parent: str) -> str:
    """The part of `path` that is one step below `parent`."""
    end = path.find(".", len(parent) + 1 if parent else 0)
    return path if end < 0 else path[:end]
