"""Runs modules on fake tensors, with nothing allocated, and records what a real run would do.

`learned` goes over a run as often as it takes: once to see the calls, again where probes showed
other strides, or where the first call left something in the model that later ones find there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .intervals import NO_RULE_IN_HALF, Unprobed, kind_of, widened
from .known import LARGEST
from .probing import NAMESPACES, Probes, Store
from .recorder import Recorder, module_paths
from .targets import Target
from .tracing import Call, Inside, Recording, Trace, geometries
from .workspaces import inside_of

Play = Callable[[Recorder], Any]
ROUNDS = 4  # passes over a run; strides settle in two
# A first call that leaves less than this part of the peak is not repeated: what it leaves is taken
# out of its trace, and what it needed to make that stays in.
NEGLIGIBLE = 16


@dataclass
class Findings:
    """A traced run, and where its figures come from.

    Attributes:
        trace: All allocations and releases.
        peak_bytes: The most alive at once.
        kept_bytes: What a first call leaves in the model, such as tables it computes once; not in
            the trace.
        results: Blocks of what the run returned.
        ruled: Operators for which a rule answered, and how many distinct calls.
        unprobed: What no probe told.
        notes: What the figures leave out or assume.
    """

    trace: Trace
    kept_bytes: int = 0
    probes: Probes = field(default_factory=Probes)
    ruled: dict[str, int] = field(default_factory=dict)
    unprobed: Unprobed = field(default_factory=Unprobed)
    notes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return self.trace.peak()

    def explain(self, probe: bool) -> list[str]:
        """Sentences on where the figures come from."""
        lines = list(self.notes)
        if not probe:
            lines.append(
                "no operator was probed: what operators allocate inside is by rule for attention, "
                "convolutions, recurrent layers and mixed dtypes, and not counted for others"
            )
        elif self.ruled:
            names = ", ".join(sorted(self.ruled))
            lines.append(f"not probed, because too large or not repeatable, but by rule: {names}")
        if self.kept_bytes:
            lines.append(
                f"the first call leaves {self.kept_bytes} bytes in the model for later ones"
            )
        lines += [
            f"probe of {call.operator} failed: {why}" for call, why in self.probes.failed.items()
        ]
        return lines + self.probes.notes


class DryRun:
    """Skeletons with fake parameters, and a fake mode to call them in."""

    def __init__(self, models: Mapping[str, nn.Module], target: Target) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.models = dict(models)
        self.target = target
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        for model in self.models.values():
            fake_parameters(model, self.fake)
        self.given: list[Tensor] = []

    def accept(self, inputs: Any) -> Any:
        """Inputs as the run gets them: fake, except small integers whose values are known.

        Objects (caches, conditions) are copied with fakes in the place of their tensors: a forward
        may change them, and what a trace does to them is not the call's doing.
        """

        def take(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return self._copied(value) if _has_state(value) else value
            made = self._fake_or_known(value)
            self.given.append(made)
            return made

        return torch.utils._pytree.tree_map(take, inputs)

    def _copied(self, value: Any) -> Any:
        from torch.overrides import TorchFunctionMode

        make = self._fake_or_known

        class Fakes(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                if func is not Tensor.__deepcopy__:
                    return func(*args, **(kwargs or {}))
                tensor, memo = args
                if id(tensor) not in memo:
                    memo[id(tensor)] = make(tensor)
                return memo[id(tensor)]

        try:
            with Fakes():
                return copy.deepcopy(value)
        except TypeError as error:  # it holds a lock, a file, a generator
            warnings.warn(
                f"an input of type {type(value).__name__} cannot be copied ({error}): following "
                "the call may change it",
                RuntimeWarning,
                stacklevel=2,
            )
            return value

    def _fake_or_known(self, value: Tensor) -> Tensor:
        known = value.device.type == "cpu" and not value.is_floating_point()
        if known and not value.is_complex() and value.numel() <= LARGEST:
            return value.detach().clone()
        with self.fake:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")

    def record(self, play: Play, strides: Mapping[Call, Sequence[tuple[int, ...]]]) -> Recorder:
        """One pass; raises what `explained` makes of the model's errors."""
        from .breaks import explained

        recorder = Recorder(self._tensors())
        recorder.reshape = strides
        with explained(recorder):
            self._play(play, recorder)
        return recorder

    def _play(self, play: Play, recorder: Recorder) -> None:
        with (
            module_paths(self.models, recorder),
            self.fake,
            torch.no_grad(),
            self.target.attention(recorder),
            recorder.mode(),
        ):
            out = play(recorder)
            if recorder.forget_results:
                for leaf in torch.utils._pytree.tree_leaves(out):
                    if isinstance(leaf, Tensor):
                        recorder.results.add(recorder.blocks.get(leaf.untyped_storage(), 0))
            del out

    def _tensors(self) -> Iterable[Tensor]:
        for model in self.models.values():
            yield from model.parameters()
            yield from model.buffers()
        yield from self.given

    def learned(self, play: Play, *, probe: bool, store: Store | None = None) -> Findings:
        """The run with what its operators hold inside, by probes or, without them, by rules."""
        probes = Probes()
        probe = probe and self.target.kind == "cpu"
        recorder = self.record(play, {})
        kept = sum(recorder.alive().values())
        again = kept * NEGLIGIBLE > recorder.recording.bare_peak()
        for _ in range(ROUNDS):
            if probe:
                probes.learn(recorder.recording, store)
                again = again or recorder.recording.differs(probes.strides())
            if not again:
                break
            recorder = self.record(play, probes.strides())
            again = False
        return self._found(recorder.recording, recorder, probes, probe, kept)

    def _found(
        self, recording: Recording, recorder: Recorder, probes: Probes, probe: bool, kept: int
    ) -> Findings:
        inside: dict[Call, Inside] = {c: learned.sizes for c, learned in probes.found.items()}
        ruled: dict[str, int] = {}
        kinds: set[str] = set()
        unknown: dict[str, None] = {}
        bare, wide = dict(inside), dict(inside)  # the ends of the interval
        for call in recording.distinct():
            if call in inside:
                continue
            results = recording.results[call]
            sizes = inside_of(call, results, self.target)
            if sizes is not None:
                inside[call] = sizes
            name = call.operator._schema.name
            if probe or sizes is not None:
                ruled[name] = ruled.get(name, 0) + 1
            half = any(g.dtype in (torch.float16, torch.bfloat16) for g in geometries(call.spec))
            foreign = call.operator.namespace not in NAMESPACES
            if call in probes.failed or foreign or (half and name in NO_RULE_IN_HALF):
                unknown[str(call.operator)] = None
                continue
            kind = kind_of(name, half)
            kinds.add(kind)
            if call.operator.namespace != "vramkit":  # ours declare what they hold
                bare[call], wide[call] = results, widened(sizes or results, kind)
        without = recorder.results | recorder.alive().keys()
        trace = recording.assemble(inside, without)
        least = most = 0
        if kinds and self.target.kind == "cpu":
            least = recording.assemble(bare, without).peak()
            most = recording.assemble(wide, without).peak()
        unprobed = Unprobed(frozenset(kinds), tuple(unknown), least, most)
        return Findings(trace, kept, probes, ruled, unprobed, list(self.target.notes()))


def _has_state(value: Any) -> bool:
    """Whether a call may change an argument that is no tensor, and that can be copied."""
    if isinstance(value, (nn.Module, type)) or callable(value):
        return False
    return hasattr(value, "__dict__")


def fake_parameters(skeleton: nn.Module, fake: Any) -> None:
    """Parameters become fake. Buffers become copies: a forward may read or change values."""
    from torch.utils._python_dispatch import _disable_current_modes

    made: dict[int, nn.Parameter] = {}
    copies: dict[int, Tensor] = {}
    with fake:
        for module in skeleton.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    shape = torch.empty_strided(
                        parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu"
                    )
                    made[id(parameter)] = nn.Parameter(shape, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if id(buffer) not in copies and buffer.device.type == "meta":
                    copies[id(buffer)] = torch.empty_like(buffer, device="cpu")
                elif id(buffer) not in copies:
                    with _disable_current_modes():
                        copies[id(buffer)] = buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)]
