"""The video model measured: sizes by precisions, with what each costs in memory, time and error.

`benchmark_model_precision` makes one row, `week1_final_benchmark` all of them, `true_scale`
predicts the memory of models that do not fit here. What there is no room for is a row that says so.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..convert import convert
from ..doctor import available_memory
from ..errors import PrecisionUnavailableError
from ..estimator import MemoryEstimate, estimate, weight_bytes
from ..precision import PrecisionMode
from ..sizes import format_size
from ..verification import target_of
from .islands import rule_islands
from .lsd import LSD
from .video import STORED, MixedPrecisionLSD, chosen_precision, narrow_convolutions


class Size(NamedTuple):
    """One size of the model and the input that it is measured at."""

    base_channels: int
    batch: int
    side: int


SIZES: dict[str, Size] = {
    "tiny": Size(16, 1, 16),
    "small": Size(32, 1, 32),
    "lightweight": Size(128, 1, 64),
    "medium": Size(192, 2, 64),
    "heavy": Size(256, 2, 64),
}
"""The published sizes at their published inputs, and two for tests."""
WEEK1_SIZES = ("lightweight", "medium", "heavy")
WEEK1_PRECISIONS = ("fp32", "fp16", "bf16")
_KEPT_FRAMES = 5
"""Of the first sample, for the report's pictures."""


@dataclass
class BenchmarkResult:
    """One size in one precision.

    Attributes:
        size: Its name in `SIZES`.
        precision: What ran; where float16 overflowed, "bf16", and `notes` says so.
        asked: The precision that was asked for.
        parameters: Of the plain model.
        weights_bytes: Parameters and buffers as stored; fp32_bytes: in float32.
        seconds_per_frame: Median over all frames of all repeats; seconds: each repeat's median.
        fps: Frames a second for each of the batch's videos, by that median.
        peak_bytes: As in `SequenceStats`; None where it could not be measured.
        estimated_bytes: Weights and one frame's own memory, as `vramkit.estimate` predicts them.
        timeline: (module, live bytes) of one frame, predicted.
        relative_error: Relative L2 distance of the frames to float32's of the same weights and
            input; None without those.
        drift: Largest relative difference of a frame's mean or standard deviation to float32's.
        frames: The first sample's frames [n, 3, H, W] in float32, for pictures.
        error: Why there are no figures: out of memory, or a precision that is not there.
        needed_bytes: Where memory was short: what it would have taken, if that is known.
    """

    size: str
    precision: str
    asked: str
    device: str
    base_channels: int
    batch: int
    side: int
    parameters: int = 0
    fp32_bytes: int = 0
    weights_bytes: int | None = None
    seconds_per_frame: float | None = None
    seconds: list[float] = field(default_factory=list)
    fps: float | None = None
    peak_bytes: int | None = None
    estimated_bytes: int | None = None
    timeline: list[tuple[str, int]] = field(default_factory=list)
    relative_error: float | None = None
    drift: float | None = None
    frames: Tensor | None = field(default=None, repr=False)
    error: str | None = None
    needed_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether there are no figures."""
        return self.error is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: everything but frames and timeline."""
        left = ("frames", "timeline")
        return {k: v for k, v in self.__dict__.items() if k not in left}


def benchmark_model_precision(
    size: str,
    precision: PrecisionMode | str = "auto",
    *,
    device: str | torch.device | None = None,
    model: LSD | None = None,
    inputs: tuple[Tensor, Tensor | None] | None = None,
    num_timesteps: int = 5,
    timesteps: Iterable[float] | None = None,
    warmup: int = 1,
    repeats: int = 5,
    estimated: bool = True,
    seed: int = 0,
) -> BenchmarkResult:
    """Generate sequences in one precision and measure them.

    Args:
        size: A name in `SIZES`.
        precision: As `MixedPrecisionLSD`'s.
        device: As there.
        model: A trained float32 `LSD` of that width, which stays as it is; without one, random
            weights from `seed`.
        inputs: (x, previous_frame); without, normal noise from `seed`, and no previous frame.
        num_timesteps: Frames in a sequence; `timesteps`: their time steps, as in
            `generate_sequence`.
        warmup: Sequences before any is timed; repeats: sequences timed, of which medians are taken.
        estimated: Also predict the memory.

    Memory that is missing, for the model or for a sequence, gives a row with `error`; so does a
    precision that the device does not have. Raises ValueError for an unknown size or precision, and
    where fewer than one sequence is asked for.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; the sizes are: {', '.join(SIZES)}")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is 1 or more and warmup 0 or more, not {repeats} and {warmup}")
    width, batch, side = SIZES[size]
    if model is not None:
        width = model.unets[0].out.in_channels  # type: ignore[union-attr,assignment]
    if inputs is not None:
        batch, side = inputs[0].shape[0], inputs[0].shape[-1]
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    aim = torch.device(device)
    asked = str(precision).strip().lower()
    row = BenchmarkResult(size, asked, asked, str(aim), width, batch, side)
    with torch.device("meta"):
        plain = LSD(width)
    row.parameters = sum(p.numel() for p in plain.parameters())
    row.fp32_bytes = weight_bytes(plain)
    try:
        mode = chosen_precision(precision, aim)
    except PrecisionUnavailableError as error:
        row.error = str(error)
        return row
    row.precision = mode.value
    steps = None if timesteps is None else list(timesteps)
    try:
        _room_for(row, aim)
        with _seeded(seed):
            built = LSD(width) if model is None else copy.deepcopy(model)
            x, before = inputs if inputs is not None else (torch.randn(batch, 3, side, side), None)
        video = MixedPrecisionLSD(width, mode, device=aim, model=built)
        row.weights_bytes = video.parameter_bytes()
        _measure(row, video, x, before, num_timesteps, steps, warmup, repeats)
        if estimated:
            _estimate(row, video)
    except (MemoryError, torch.OutOfMemoryError) as error:
        row.error = f"out of memory: {error}".split("\n")[0]
    except RuntimeError as error:
        # What torch raises where the host has no more, which has no type of its own.
        if "not enough memory" not in str(error) and "can't allocate" not in str(error):
            raise
        row.error = f"out of memory: {error}".split("\n")[0]
    finally:
        built = video = None  # type: ignore[assignment]
        gc.collect()
        if aim.type == "cuda":
            torch.cuda.empty_cache()
    return row


def _room_for(row: BenchmarkResult, device: torch.device) -> None:
    """Before a model is built: whether the host holds it in float32 and as it will be stored."""
    share = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5}.get(row.precision, 0.27)
    beside = 0.0 if row.precision == "fp32" and device.type == "cpu" else share
    row.needed_bytes = int(row.fp32_bytes * (1 + beside))
    free = available_memory()
    if free is not None and row.needed_bytes > free:
        raise MemoryError(
            f"the model takes {format_size(row.needed_bytes)} of the host while it is cast, and "
            f"{format_size(free)} are available"
        )


def _measure(
    row: BenchmarkResult,
    video: MixedPrecisionLSD,
    x: Tensor,
    before: Tensor | None,
    count: int,
    steps: list[float] | None,
    warmup: int,
    repeats: int,
) -> None:
    x = x.to(video.device)
    before = None if before is None else before.to(video.device)
    frames, peaks, every = None, [], []
    for number in range(warmup + repeats):
        frames, stats = video.generate_sequence(x, before, count, timesteps=steps)
        if number >= warmup:
            every += stats["frame_seconds"]
            row.seconds.append(median(stats["frame_seconds"]))
            if stats["peak_memory_bytes"] is not None:
                peaks.append(stats["peak_memory_bytes"])
    assert frames is not None
    row.precision = video.precision.value
    row.notes += video.fallbacks
    row.seconds_per_frame = median(every)
    row.fps = 1 / row.seconds_per_frame
    row.peak_bytes = max(peaks, default=None)
    row.frames = frames[0].float().cpu()
    bad = int((~torch.isfinite(row.frames)).sum())
    if bad:
        row.notes.append(f"{bad} values of the frames are not finite")


def _estimate(row: BenchmarkResult, video: MixedPrecisionLSD) -> None:
    shape = (row.batch, 3, row.side, row.side)
    found = estimate(
        video.model,
        inputs=((video.dtype, shape), 0.0, (video.dtype, shape)),
        target=target_of(video.model),
        calibrated=False,
    )
    row.estimated_bytes = found.peak_bytes
    row.timeline = [(name, found.weights_bytes + live) for name, live in found.timeline]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generator of the host begins at `seed`, and is put back."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


Results = dict[tuple[str, str], BenchmarkResult]
"""By (precision, size), as published."""


def week1_final_benchmark(
    sizes: Iterable[str] = WEEK1_SIZES,
    precisions: Iterable[PrecisionMode | str] = WEEK1_PRECISIONS,
    *,
    folder: str | os.PathLike[str] | None = None,
    models: Mapping[str, LSD] | None = None,
    **options: Any,
) -> Results:
    """Every size in every precision, float32 first; the rows by (precision, size).

    Args:
        sizes: Names in `SIZES`.
        precisions: As `benchmark_model_precision`'s. Errors and drift are against float32, which
            is measured too where it is among them.
        folder: Where to write the report; None writes nothing.
        models: Trained models by size.
        options: As `benchmark_model_precision`'s.
    """
    names = list(dict.fromkeys(str(p).strip().lower() for p in precisions))
    names.sort(key=lambda name: name != "fp32")
    results: Results = {}
    for size in sizes:
        for name in names:
            row = benchmark_model_precision(size, name, model=(models or {}).get(size), **options)
            results[name, size] = row
            reference = results.get(("fp32", size))
            if reference is not None and reference.frames is not None and row.frames is not None:
                row.relative_error, row.drift = _against(row.frames, reference.frames)
    for row in results.values():
        if row.frames is not None:
            row.frames = row.frames[:_KEPT_FRAMES].clone()
    if folder is not None:
        from .report import generate_week1_report

        generate_week1_report(results, folder)
    return results


def _against(frames: Tensor, reference: Tensor) -> tuple[float, float]:
    """Relative L2 distance; largest relative difference of a frame's mean or spread."""
    norm = float(reference.norm())
    error = float((frames - reference).norm()) / norm if norm else math.nan
    return error, drift(frames, reference)


def drift(frames: Tensor, reference: Tensor) -> float:
    """How far the mean and the standard deviation of frames are from a reference's, relatively.

    Args:
        frames: [n, ...]; `reference`: of the same shape. Frame by frame, the larger of the two
            differences over the reference's standard deviation; of these the largest. NaN or
            infinity gives infinity.

    >>> one = torch.tensor([[0.0, 2.0]])
    >>> drift(one + 1, one)
    1.0
    """
    ours, theirs = frames.double().flatten(1), reference.double().flatten(1)
    spread = theirs.std(1, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    mean = (ours.mean(1) - theirs.mean(1)).abs() / spread
    std = (ours.std(1, correction=0) - theirs.std(1, correction=0)).abs() / spread
    worst = torch.maximum(mean, std)
    return float(worst.max()) if bool(torch.isfinite(worst).all()) else math.inf


class ScaleRow(NamedTuple):
    """One mode of a model that was never built."""

    mode: str
    weights_bytes: int
    activations_bytes: int
    documented_bytes: int | None
    explanation: str

    @property
    def peak_bytes(self) -> int:
        """Weights and one frame's own memory."""
        return self.weights_bytes + self.activations_bytes


DOCUMENTED = {"fp32": 10_880 << 20, "fp16": 7_145 << 20}
"""Peaks that the plan for the medium model gives, in MB that are MiB."""


def true_scale(
    size: str = "medium",
    modes: Iterable[PrecisionMode | str] = ("fp32", "fp16", "bf16", "fp8", "int8"),
    *,
    target: str = "cuda:8.6",
) -> list[ScaleRow]:
    """Memory by mode of a model at its published input, predicted from shapes alone.

    Args:
        size: A name in `SIZES`.
        modes: Precisions.
        target: As `vramkit.estimate`'s; the documented card is an RTX 3090, capability 8.6.

    The documented figures are explained by arithmetic: two copies of attention's matrix of all
    positions by all positions are alive there, and beside the model that is measured lies another
    one in float32, the profiler's own.
    """
    width, batch, side = SIZES[size]
    matrix = 2 * 16 * batch * side**4  # two matrices of 16 heads, in elements
    with torch.device("meta"):
        plain = weight_bytes(LSD(width))
    rows = []
    for given in modes:
        mode = PrecisionMode.parse(given)
        found = predicted(width, mode, (batch, 3, side, side), target=target)
        assert found.activations_bytes is not None
        documented = DOCUMENTED.get(mode.value) if size == "medium" else None
        text = ""
        if documented is not None:
            wide = mode.torch_dtype.itemsize
            weights, scores = plain * wide // 4, matrix * wide
            rest = documented - weights - scores - plain
            text = (
                f"weights {format_size(weights)}, two score matrices {format_size(scores)}, "
                f"another model in float32 {format_size(plain)}, rest {format_size(rest)}"
            )
        rows.append(
            ScaleRow(mode.value, found.weights_bytes, found.activations_bytes, documented, text)
        )
    return rows


def predicted(
    base_channels: int, mode: PrecisionMode, shape: tuple[int, ...], *, target: str
) -> MemoryEstimate:
    """The estimate of one frame of a model as `MixedPrecisionLSD` would hold it, from shapes."""
    with torch.device("meta"):
        model = LSD(base_channels).eval()
    dtype = mode.torch_dtype
    if mode in STORED:
        convert(model, mode, skip=narrow_convolutions(model))
    if dtype != torch.float32:
        kept = {island.name for island in rule_islands(model)}
        for name, module in model.named_modules():
            if name in kept:
                module.register_forward_pre_hook(_widen)
                module.register_forward_hook(_narrow(dtype))
                continue
            for key, p in list(module._parameters.items()):
                if p is not None and p.is_floating_point():
                    module._parameters[key] = nn.Parameter(p.detach().to(dtype), False)
    return estimate(
        model, inputs=((dtype, shape), 0.0, (dtype, shape)), target=target, calibrated=False
    )


def _widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) else a for a in args)


def _narrow(dtype: torch.dtype) -> Any:
    def hook(_: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.to(dtype)

    return hook
