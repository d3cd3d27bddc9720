"""What an estimate's bytes are for, and where they lie: lines for the device and for the host.

The lines of a call are those at its highest point, so that they sum to the peak. A target that is a
CPU has one memory, the host's. What a plan streams lies on the host (or the disk) and passes
through slots on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .sizes import format_size
from .targets import parse_target

if TYPE_CHECKING:
    from .estimator import MemoryEstimate
    from .plans import Plan

# What a CUDA process takes beside torch's allocator: the driver's context and the kernels that were
# loaded. It differs by driver, device and kernels; reports for CUDA 11.7 and later, which loads
# kernels as they are needed, are of 300 MB (pytorch/pytorch#107667) and more. An allowance.
CONTEXT_BYTES = 512 << 20
SHOWN_PHASES = 8


@dataclass(frozen=True)
class Line:
    """Bytes for one purpose, by place; `note` says what is special about them."""

    name: str
    device_bytes: int = 0
    host_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class Placement:
    """Where a plan puts the weights: of the phase that takes most on the device.

    `weights` are (label, device bytes, host bytes, disk bytes).
    """

    weights: tuple[tuple[str, int, int, int], ...]
    slots: int = 0
    slot_bytes: int = 0
    phase: str = ""

    @classmethod
    def of(cls, plan: Plan) -> Placement | None:
        """None where a plan leaves all on the device at once."""
        from .plans import RESIDENT

        turns = len(plan.phases) > 1
        if not turns and all(e.tier == RESIDENT for e in plan.entries):
            return None
        most = max(plan.phases, key=lambda phase: phase.device_bytes)
        sums: dict[str, list[int]] = {}
        for e in plan.entries:
            there = sums.setdefault(e.format or "plain", [0, 0, 0])
            resident = e.tier == RESIDENT
            there[0] += e.bytes * (resident and e.component == most.name)
            away = e.backing if resident else e.tier
            there[1] += e.bytes * (away == "host")
            there[2] += e.bytes * (away == "disk")
        fixed = sum(phase.fixed_bytes for phase in plan.phases) if turns else 0
        rows = [(name, *places) for name, places in sums.items()]
        rows.append(("norms, biases, buffers", most.fixed_bytes, fixed, 0))
        slots = plan.slots if most.slot_bytes else 0
        return cls(tuple(rows), slots, most.slot_bytes, most.name)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Account:
    """The lines of one estimate and their sums; `phases` are the peaks of loading and running."""

    lines: tuple[Line, ...]
    phases: tuple[Line, ...] = field(default=())

    @property
    def device_bytes(self) -> int:
        """The sum of what lies on the device."""
        return sum(line.device_bytes for line in self.lines)

    @property
    def host_bytes(self) -> int:
        """The sum of what lies on the host."""
        return sum(line.host_bytes for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "lines": [asdict(line) for line in self.lines],
            "phases": [asdict(line) for line in self.phases],
        }


def account_of(found: MemoryEstimate) -> Account:
    """The lines of an estimate: weights by format, cache, activations, workspaces, and the rest."""
    cuda = found.target.startswith("cuda")
    device = cuda or found.placement is not None
    lines = list(_weights(found, device))
    call = list(_call(found))
    for name, nbytes, note in call:
        lines.append(_at(device, name, nbytes, note))
    if found.placement is not None and found.placement.slots:
        place = found.placement
        note = f"{place.slots} of {format_size(place.slot_bytes)}"
        lines.append(Line("slots", place.slots * place.slot_bytes, 0, note))
    if found.inputs_bytes:
        lines.append(_at(device, "inputs", found.inputs_bytes))
    if cuda:
        lines += _cuda(found)
    return Account(tuple(lines), tuple(_phases(found, device, lines, sum(n for _, n, _ in call))))


def _at(device: bool, name: str, nbytes: int, note: str = "") -> Line:
    return Line(name, nbytes, 0, note) if device else Line(name, 0, nbytes, note)


def _weights(found: MemoryEstimate, device: bool) -> Iterator[Line]:
    if found.placement is not None:
        for label, here, host, disk in found.placement.weights:
            note = f"and {format_size(disk)} on the disk" if disk else ""
            yield Line(f"weights, {label}", here, host, note)
        return
    sums: dict[str, int] = {}
    for _, fmt, nbytes in found.layers:
        sums[fmt] = sums.get(fmt, 0) + nbytes
    rest = found.weights_bytes - sum(sums.values())
    for fmt, nbytes in sorted(sums.items(), key=lambda item: (-item[1], item[0])):
        yield _at(device, f"weights, {fmt}", nbytes)
    if rest:
        yield _at(device, "buffers", rest)


def _call(found: MemoryEstimate) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, note) of what the call holds at its highest point."""
    if found.trace is None or found.activations_bytes is None:
        return
    kinds = found.trace.kinds_at_peak()
    if found.generation is not None:
        note = f"{format_size(found.generation.cache_bytes)} at the end; copied as it grows"
        yield "KV cache", kinds["cache"], note
    yield "activations", kinds["activations"], ""
    yield "workspaces", kinds["workspaces"], "inside operators"
    assert found.predicted_bytes is not None
    if found.activations_bytes != found.predicted_bytes:
        more = found.activations_bytes - found.predicted_bytes
        yield "correction", more, "by a real run"


def _cuda(found: MemoryEstimate) -> Iterator[Line]:
    if found.trace is not None:
        gaps = _gaps(found)
        yield Line("allocator", gaps, 0, "rounding and gaps, by the simulated allocator")
    blas = parse_target(found.target).blas_bytes
    yield Line("cuBLAS", blas, 0, "torch's default workspace; not measured")
    note = "an allowance, not measured" if found.context_assumed else "as given"
    yield Line("CUDA context", found.context_bytes, 0, note)


def _gaps(found: MemoryEstimate) -> int:
    """What torch's allocator reserves beyond what was asked for."""
    from .allocator import simulate

    assert found.trace is not None
    if found.placement is None:
        reserved = found.allocation().peak_reserved_bytes
        held = found.weights_bytes
    else:  # streamed weights live in memory that is taken once, not in torch's pools
        rows = [(-1, found.inputs_bytes, 0, 0)] if found.inputs_bytes else []
        reserved = simulate([*rows, *found.trace], found.target).peak_reserved_bytes
        held = 0
    return reserved - held - found.inputs_bytes - found.trace.peak()


def _phases(found: MemoryEstimate, device: bool, lines: list[Line], call: int) -> Iterator[Line]:
    """Loading, as `vramkit.load` does on the host; then every phase of the run."""
    if found.load_peak_bytes is not None:
        moved = sum(line.device_bytes for line in lines if line.name.startswith(("weights", "buf")))
        note = "built on the host, then moved" if device else "a plain weight beside its codes"
        yield Line("load", moved, found.load_peak_bytes, note)
    if found.trace is None:
        return
    here, host = (sum(getattr(line, key) for line in lines) for key in _PLACES)
    assert found.predicted_bytes is not None
    correction = call - found.predicted_bytes
    peaks = found.trace.phase_peaks()
    phases = [p for p in peaks if p not in ("growth", "run")] or list(peaks)
    if len(phases) > SHOWN_PHASES:
        highest = max(phases, key=peaks.__getitem__)
        phases = list(dict.fromkeys((phases[0], phases[1], highest, phases[-1])))
    for name in phases:
        less = call - (peaks[name] + correction if len(phases) > 1 else call)
        yield Line(name, here - less * device, host - less * (not device))


_PLACES = ("device_bytes", "host_bytes")
