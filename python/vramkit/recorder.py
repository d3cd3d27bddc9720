"""Follows a run on fake tensors: operators from a dispatch mode, modules from wrapped forwards."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._operators import workspace_bytes
from .known import Known
from .strides import corrected
from .tracing import ALLOC, CALL, Call, Recording, Tag, Unhashable, described, tensors_in


@contextmanager
def module_paths(models: Mapping[str, nn.Module], record: Recorder) -> Iterator[None]:
    """Within it, `record` knows which module runs; ends are marked.

    Forward methods of the instances are wrapped, because hooks switch fast paths off that the real
    call would take. The models are skeletons that nobody else holds.
    """
    wrapped: dict[nn.Module, Any] = {}
    for prefix, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule) or module in wrapped:
                continue
            path = ".".join(part for part in (prefix, name) if part)
            before = module.__dict__.get("forward")  # of a library that wraps forwards too
            module.__dict__["forward"] = _within(module, path, record)
            wrapped[module] = before
    try:
        yield
    finally:
        for module, before in wrapped.items():
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


_LINEAR = (nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def _within(module: nn.Module, path: str, record: Recorder) -> Callable[..., Any]:
    forward = module.forward
    linear = isinstance(module, _LINEAR)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        record.stack.append(path)
        record.linear.append(linear)
        out = forward(*args, **kwargs)
        # Only where it succeeds: after an error the stack says where it happened.
        record.stack.pop()
        record.linear.pop()
        record.recording.mark(path or "model")
        return out

    return run


_ADD, _ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor


def _biased(args: tuple[Any, ...]) -> bool:
    if len(args) < 2 or not all(isinstance(a, Tensor) for a in args[:2]):
        return False
    x, bias = args[:2]
    return x.dim() > 1 and bias.dim() == 1 and x.dtype == bias.dtype and x.shape[-1] == len(bias)


class Recorder:
    """Follows storages; `mode()` is the dispatch mode that feeds it."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.recording = Recording()
        self.stack: list[str] = []
        self.linear: list[bool] = []  # for each on the stack: whether all it adds is a bias
        self.phase = "run"
        self.operator = ""
        self.forget_results = False
        self.silent = False
        self.results: set[int] = set()
        self.reshape: Mapping[Call, Sequence[tuple[int, ...]]] = {}
        self.blocks: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in known:
            self.blocks[tensor.untyped_storage()] = 0

    def begin(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        self.phase = phase
        self.recording.mark(phase)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is recorded but releases; `follow` what is left afterwards."""
        self.silent = True
        try:
            yield
        finally:
            self.silent = False

    @property
    def place(self) -> str:
        """The module that runs."""
        return self.stack[-1] if self.stack else ""

    def current_tag(self, operator: str) -> int:
        """The tag of what happens now."""
        return self.recording.tag(Tag(operator, self.place, self.phase))

    def alive(self) -> dict[int, int]:
        """Bytes by block of what was allocated and is still there."""
        sizes = dict(step[1:3] for step in self.recording.steps if step[0] == ALLOC)
        return {block: sizes[block] for block in self.blocks.values() if block in sizes}

    def follow(self, tensor: Tensor, tag: int) -> bool:
        """Whether the tensor's storage is new."""
        storage = tensor.untyped_storage()
        if storage in self.blocks:
            return False
        block = self.recording.allocate(storage.nbytes(), tag)
        self.blocks[storage] = block
        weakref.finalize(storage, self.recording.free, block, tag).atexit = False
        return True

    def mode(self) -> Any:
        """The dispatch mode; goes above the fake mode."""
        known = Known()
        recorder = self
        recording = self.recording

        class Mode(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                kwargs = kwargs or {}
                if recorder.silent:
                    return known.run(func, args, kwargs, tensors_in((args, kwargs)))
                if func is _ADD and recorder.linear and recorder.linear[-1] and _biased(args):
                    # at::linear adds a bias in place, but not to subclasses such as fake tensors.
                    func = _ADD_IN_PLACE
                name = str(func)
                recorder.operator = name
                try:
                    spec = (described(args), described(kwargs))
                except Unhashable:
                    call = None
                else:
                    call = Call(func, spec)
                tensors = tensors_in((args, kwargs))
                if name != "aten.lift_fresh.default":
                    for tensor in tensors:
                        # What the model holds as an attribute was there before the call.
                        recorder.blocks.setdefault(tensor.untyped_storage(), 0)
                out = known.run(func, args, kwargs, tensors)
                out = corrected(func, args, out, recorder.reshape.get(call) if call else None)
                tag = recorder.current_tag(name)
                number = len(recording.calls)
                recording.steps.append((CALL, number, 0, tag))
                before = len(recording.steps)
                made = tensors_in(out)
                for tensor in made:
                    recorder.follow(tensor, tag)
                fresh = tuple(step[2] for step in recording.steps[before:])
                if func.namespace == "vramkit":
                    short = func._schema.name.removeprefix("vramkit::")
                    declared = workspace_bytes(short, args)
                    if declared:
                        recording.declared[number] = declared
                # A view allocates nothing, and needs no probe.
                needed = bool(fresh) or func._schema.is_mutable
                recording.calls.append(call if needed else None)
                if call is not None and needed and call not in recording.results:
                    recording.results[call] = fresh
                    recording.strides[call] = tuple(tuple(t.stride()) for t in made)
                if not needed and not fresh and number not in recording.declared:
                    recording.steps.pop()
                    recording.calls.pop()
                return out

        return Mode()
