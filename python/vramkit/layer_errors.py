"""What storing a layer does to the layer's own output, for all formats in one pass of the model.

Inputs are those that the plain model gives each layer. With a checkpoint, the model is built on the
meta device and the pass is a stream: a module's parameters are read before its call and dropped
after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ._operators import StoredParts
from .calibration import Calibration, encode_by, mask_of
from .candidates import Candidate, User
from .convert import check_weight
from .errors import CalibrationError, CheckpointError, NonFiniteWeightError
from .formats import StorageFormat
from .output_errors import masked, refuse_folded, squared_sum
from .running import Runner, checked
from .sensitivity_store import Store, digest_of

Read = Callable[[str], Tensor]

# Bytes of encoded forms that are kept for further calls: cells of a recurrence are called for each
# step, and encoding takes longer than a small call.
KEPT_BYTES = 64 << 20
# Modules that use their children's parameters without calling them: a unit, read as a whole.
_UNITS = (nn.MultiheadAttention,)


@dataclass
class LayerErrors:
    """Relative squared errors of layers' outputs, by layer and format.

    `errors` holds what was measured, infinite where an output is no longer finite; formats that
    cannot hold a weight are absent. `unreached` are layers that no batch called.
    """

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)


def unit_of(model: nn.Module, user: User) -> nn.Module:
    """The module whose call shows what a parameter does: its own, or a unit that it is part of."""
    name = user.name
    while name:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name) if name else model
        if isinstance(parent, _UNITS):
            return parent
    return user.module


def layer_errors(
    model: nn.Module,
    found: Sequence[Candidate],
    formats: Mapping[str, Sequence[StorageFormat]],
    batches: Iterable[Any],
    *,
    calibration: Calibration | None = None,
    store: Store | None = None,
    read: Read | None = None,
    advance: Callable[[int, str], None] = lambda n, name: None,
) -> LayerErrors:
    """||f(x; W') - f(x; W)||^2 / ||f(x; W)||^2 of each layer f in each of its `formats`.

    Summed in float64 over all calls, and over the modules that share a weight. `read` gives a
    parameter by its name where `model` is on the meta device. Positions that an "attention_mask"
    masks do not count where a layer's output has them.

    Raises CalibrationError where a layer's output is not finite, CheckpointError for a module that
    uses parameters of another one, which a stream does not have at hand.
    """
    for candidate in found:
        refuse_folded(candidate)
    return _Pass(model, found, formats, calibration, store, read, advance).run(batches)


@dataclass
class _Sums:
    """Of one use of one weight: the output's power, and the errors by format."""

    power: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)


class _Pass:
    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Candidate],
        formats: Mapping[str, Sequence[StorageFormat]],
        calibration: Calibration | None,
        store: Store | None,
        read: Read | None,
        advance: Callable[[int, str], None],
    ) -> None:
        self.model, self.found, self.formats = model, found, formats
        self.calibration, self.store, self.read = calibration, store, read
        self.advance = advance
        self.uses: dict[nn.Module, list[tuple[Candidate, User]]] = {}
        for candidate in found:
            for user in candidate.users:
                self.uses.setdefault(unit_of(model, user), []).append((candidate, user))
        self.sums: dict[tuple[str, str], _Sums] = {}
        self.refused: set[tuple[str, str]] = set()  # formats that cannot hold a weight
        self.kept: dict[tuple[str, str], StoredParts] = {}
        self.kept_bytes = 0
        self.digests: dict[nn.Module, str] = {}
        self.reached: set[str] = set()  # by this batch
        self.mask: Tensor | None = None
        self.inside = False

    def run(self, batches: Iterable[Any]) -> LayerErrors:
        runner = Runner(self.model, None, "model")
        stream = _Stream(self.model, self.read) if self.read is not None else None
        with torch.no_grad(), _hooks(self.uses, self._after), _plain_attention():
            for batch in checked(batches):
                self.mask = mask_of(batch)
                self.reached.clear()
                if stream is None:
                    runner.feed(batch)
                else:
                    with stream.reading():
                        runner.feed(batch)
                for candidate in self.found:
                    if candidate.name not in self.reached:
                        self.advance(1, candidate.name)
        return self._result()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self.inside:  # a unit's children, called while the unit is measured
            return
        self.inside = True
        try:
            leaves = [masked(leaf, self.mask) for leaf in _floats(out)]
            power = sum(squared_sum(leaf) for leaf in leaves)
            for candidate, user in self.uses[module]:
                if not power < float("inf"):
                    raise CalibrationError(
                        f"the output of {candidate.name!r} holds NaN or infinity on these "
                        "batches; check the batches and the weights before it"
                    )
                sums = self.sums.setdefault((candidate.name, user.full_name), _Sums())
                sums.power += power
                self._add(sums, module, candidate, user, (args, kwargs), leaves)
                if candidate.name not in self.reached:
                    self.reached.add(candidate.name)
                    self.advance(1, candidate.name)
        finally:
            self.inside = False

    def _add(
        self,
        sums: _Sums,
        module: nn.Module,
        candidate: Candidate,
        user: User,
        call: tuple[Any, Any],
        leaves: list[Tensor],
    ) -> None:
        about = ""
        if self.store is not None:
            from . import __version__

            moment = None
            if self.calibration is not None and candidate.name in self.calibration.moments:
                moments, by = self.calibration.moments[candidate.name], self.calibration
                moment = (moments.mean, by.damping, by.passes)
            if module not in self.digests:
                self.digests[module] = _digest(module)
            # The outputs stand for all that the arguments do not show.
            mask = self.mask
            about = digest_of(__version__, self.digests[module], call, leaves, mask, moment)
        for fmt in self.formats[candidate.name]:
            if (candidate.name, fmt.name) in self.refused:
                continue
            key = digest_of("layer", about, user.full_name, fmt) if self.store else ""
            known = self.store.get(key, 1) if self.store is not None else None
            if known is None:
                try:
                    known = [self._error(module, candidate, user, fmt, call, leaves)]
                except NonFiniteWeightError:
                    self.refused.add((candidate.name, fmt.name))
                    continue
                if self.store is not None:
                    self.store.put(key, known)
            sums.errors[fmt.name] = sums.errors.get(fmt.name, 0.0) + known[0]

    def _error(
        self,
        module: nn.Module,
        candidate: Candidate,
        user: User,
        fmt: StorageFormat,
        call: tuple[Any, Any],
        leaves: list[Tensor],
    ) -> float:
        parameter = user.module._parameters[user.leaf]
        assert parameter is not None
        parts = self._encoded(candidate, parameter.detach(), fmt)
        kept = parameter.data
        try:
            parameter.data = parts.dense(parameter.dtype).reshape(parameter.shape)
            # Not by a call: hooks of others have seen this input already.
            out = module.forward(*call[0], **call[1])
        finally:
            parameter.data = kept
        pairs = zip(_floats(out), leaves, strict=True)
        error = sum(squared_sum(masked(a, self.mask), b) for a, b in pairs)
        return error if error < float("inf") else float("inf")

    def _encoded(self, candidate: Candidate, weight: Tensor, fmt: StorageFormat) -> StoredParts:
        key = (candidate.name, fmt.name)
        parts = self.kept.get(key)
        if parts is None:
            check_weight(candidate.name, weight, fmt)
            parts, _ = encode_by(self.calibration, candidate, weight, fmt)
            self.kept[key] = parts
            self.kept_bytes += parts.nbytes
            while self.kept_bytes > KEPT_BYTES:
                self.kept_bytes -= self.kept.pop(next(iter(self.kept))).nbytes
        return parts

    def _result(self) -> LayerErrors:
        made = LayerErrors()
        for candidate in self.found:
            uses = [self.sums.get((candidate.name, user.full_name)) for user in candidate.users]
            used = [sums for sums in uses if sums is not None]
            if not used:
                made.unreached.append(candidate.name)
            made.errors[candidate.name] = {
                fmt.name: sum(_relative(sums, fmt.name) for sums in used)
                for fmt in self.formats[candidate.name]
                if used and (candidate.name, fmt.name) not in self.refused
            }
        return made


def _digest(module: nn.Module) -> str:
    """A hash of what a module is, and of the parameters and buffers that its call uses."""
    parts = module.modules() if isinstance(module, _UNITS) else [module]
    own = [[list(part._parameters.items()), list(part._buffers.items())] for part in parts]
    return digest_of(type(module).__qualname__, repr(module), own)


def _relative(sums: _Sums, name: str) -> float:
    error = sums.errors.get(name, 0.0)
    if sums.power == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / sums.power


def _floats(out: Any) -> list[Tensor]:
    """The tensors of a result that hold numbers; copies of none."""
    leaves = _pytree.tree_leaves(out)
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]


@contextmanager
def _hooks(uses: Iterable[nn.Module], after: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(after, with_kwargs=True) for module in uses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused kernels of nn.TransformerEncoderLayer, which call none of its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Stream:
    """A model on the meta device whose parameters exist while their module is called."""

    def __init__(self, model: nn.Module, read: Read) -> None:
        self.model, self.read = model, read
        self.modules: dict[nn.Module, list[tuple[str, str, nn.Module]]] = {}
        for name, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None or parameter.device.type != "meta":
                    continue
                user = User(name, leaf, module)
                unit = unit_of(model, user)
                self.modules.setdefault(unit, []).append((user.full_name, leaf, module))
        self.away: dict[tuple[nn.Module, str], nn.Parameter] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, the model can be called."""
        handles: list[Any] = []
        for module in self.modules:
            handles.append(module.register_forward_pre_hook(self._before))
            handles.append(module.register_forward_hook(self._after, always_call=True))
        try:
            with _Values(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module in self.modules:
                self._drop(module)

    def _before(self, module: nn.Module, args: Any) -> None:
        for name, leaf, owner in self.modules[module]:
            if (owner, leaf) not in self.away:
                meta = owner._parameters[leaf]
                assert meta is not None
                self.away[owner, leaf] = meta
                # Not into _parameters: recurrent layers keep a list of their weights.
                setattr(owner, leaf, nn.Parameter(self.read(name), meta.requires_grad))

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        self._drop(module)

    def _drop(self, module: nn.Module) -> None:
        for _, leaf, owner in self.modules[module]:
            meta = self.away.pop((owner, leaf), None)
            if meta is not None:
                setattr(owner, leaf, meta)


class _Values(TorchFunctionMode):
    """Refuses to compute with what has no values: some operators do not, and return garbage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [v for v in _pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        absent = [v for v in given if v.device.type == "meta"]
        if absent and getattr(func, "__name__", "") != "__get__":  # of shapes, dtypes, devices
            names = [n for n, p in self.model.named_parameters() if p is absent[0]]
            raise CheckpointError(
                f"{names[0] if names else 'a parameter'} is used outside of its own module's call "
                f"(by {getattr(func, '__name__', func)}); such a model cannot be streamed. Load it "
                "with vramkit.load and pass the module"
            )
        return func(*args, **(kwargs or {}))


def warn_unreached(names: Sequence[str]) -> None:
    """Say which layers no batch called."""
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(
            f"no batch reached {shown}; the errors of their weights stand for what they would do",
            stacklevel=4,
        )
