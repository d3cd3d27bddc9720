"""The streaming video model in a precision of one's choice: frames one by one, as long as asked.

Weights are cast, or stored in 8 bits, for real: what a precision saves is memory that is not there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..capabilities import of_device
from ..convert import ConversionReport, convert
from ..errors import PrecisionUnavailableError
from ..hardware import compute_dtype, get_optimal_precision, has_native_bf16
from ..measure import PeakWatch
from ..precision import PrecisionMode
from .helpers import optimize_conv_memory_format
from .lsd import LSD
from .wrapper import MixedPrecisionWrapper

STORED = (PrecisionMode.FP8, PrecisionMode.INT8)
"""Precisions that store weights in 8 bits and compute in 16."""
PRECISIONS = (PrecisionMode.FP32, PrecisionMode.FP16, PrecisionMode.BF16, *STORED)
"""What the model runs in."""
NARROW = 8
"""Convolutions with fewer channels on a side stay in 16 bits: few bytes, at the picture."""
STEP = 10
"""Between the time steps of two frames, as published."""
_MIB = 1 << 20


class SequenceStats(TypedDict):
    """What a sequence took.

    Times are seconds, `peak_memory` is MiB (the published figure), `peak_memory_bytes` the same in
    bytes: the weights, one frame's own memory and the frames kept. On CUDA it is torch's peak of
    allocated bytes, on a CPU that of the profiler's allocation events in one frame made beforehand;
    None where another profiler was running. `frame_seconds` has each frame's time.
    """

    total_time: float
    fps: float
    time_per_frame: float
    peak_memory: float | None
    peak_memory_bytes: int | None
    precision: str
    frame_seconds: list[float]


class MixedPrecisionLSD(MixedPrecisionWrapper):
    """The streaming video model for inference, in float32, 16 bits, or with weights in 8.

    Args:
        base_channels: As `LSD`'s: a positive multiple of 16; 192 is the published model.
        precision: "fp32", "fp16", "bf16"; "fp8" or "int8": weights of convolutions and Linears are
            stored in 8 bits with a scale per output channel and the arithmetic is 16 bits wide; or
            "auto": `get_optimal_precision` on CUDA, fp32 on a CPU.
        device: Where it runs; None for CUDA if there is any, else the CPU.
        model: A trained `LSD` in float32, which is taken over and changed in place; without one,
            weights are torch's random ones.
        calibration: As `MixedPrecisionWrapper`'s: (x, timestep, previous_frame) tuples.

    `conversion` says what 8 bits did to which layer; `fallbacks` whether float16 was given up for
    bfloat16; `vramkit.describe(model)` what really runs. The state_dict is `LSD`'s where weights
    are plain. To train, wrap an `LSD` in training mode in `MixedPrecisionWrapper`.

    Raises ValueError for an unknown precision or a width that is no positive multiple of 16, and
    PrecisionUnavailableError for a precision or a device that this machine does not have; `model`
    is then as it was.

    >>> video = MixedPrecisionLSD(16, "bf16", device="cpu")
    >>> frames, stats = video.generate_sequence(torch.zeros(1, 3, 16, 16), num_timesteps=2)
    >>> frames.shape, frames.dtype
    (torch.Size([1, 2, 3, 16, 16]), torch.bfloat16)
    """

    def __init__(
        self,
        base_channels: int = 192,
        precision: PrecisionMode | str = "auto",
        *,
        device: str | torch.device | None = None,
        model: LSD | None = None,
        calibration: Iterable[tuple[Any, ...]] | None = None,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        aim = torch.device(device)
        mode = chosen_precision(precision, aim)
        if model is None:
            model = LSD(base_channels)
        for name, p in model.named_parameters():
            if p.dtype != torch.float32:
                raise TypeError(f"{name} is {p.dtype}: casts begin with a model in float32")
        conversion = None
        compute = mode
        if mode in STORED:
            conversion = convert(model, mode, skip=narrow_convolutions(model))
            half = compute_dtype(mode, aim) == torch.float16
            compute = PrecisionMode.FP16 if half else PrecisionMode.BF16
        else:
            optimize_conv_memory_format(model, inputs=False)
        super().__init__(model.eval(), compute, calibration=calibration)
        self.conversion: ConversionReport | None = conversion
        self._compute_dtype = compute.torch_dtype
        self.precision = mode
        self._frame_bytes: dict[tuple[Any, ...], int | None] = {}
        self.to(aim)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, outside its islands: with stored weights, 16 bits."""
        if self.precision in STORED:
            return self._compute_dtype
        return self.precision.torch_dtype

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def forward(
        self, x: Tensor, timestep: float | Tensor, previous_frame: Tensor | None = None
    ) -> Tensor:
        """The next frame, in the model's dtype.

        Args:
            x: [batch, 3, H, W]; H and W multiples of 16.
            timestep: One number, or one per sample, [batch].
            previous_frame: Of x's shape; zeros where there is none.

        Raises ValueError for other shapes and for frames on another device.
        """
        for what, frame in (("x", x), ("previous_frame", previous_frame)):
            if frame is not None and frame.device != self.device:
                raise ValueError(
                    f"{what} is on {frame.device}, the model on {self.device}: move the frame"
                )
        if isinstance(timestep, Tensor) and timestep.is_floating_point():
            # Not to be cast with the frames: 999 would become 1000.
            steps: Any = timestep.tolist()
        else:
            steps = timestep
        frame = super().forward(x, steps, previous_frame)
        assert isinstance(frame, Tensor)
        return frame

    def stream(
        self,
        x: Tensor,
        previous_frame: Tensor | None = None,
        *,
        timesteps: Iterable[float],
        follow: bool = False,
    ) -> Iterator[Tensor]:
        """Frames one by one, each [batch, 3, H, W]; no frame but the last is kept.

        Args:
            x: What the video is made from.
            previous_frame: The frame before the first; zeros where there is none.
            timesteps: One for each frame; may be endless.
            follow: False: x stays, and each frame is the next one's previous_frame, as published.
                True: each frame is the next one's x, and x its previous_frame.
        """
        for step in timesteps:
            with torch.inference_mode():
                frame = self(x, step, previous_frame)
            if follow:
                x, previous_frame = frame, x
            else:
                previous_frame = frame
            yield frame

    def generate_sequence(
        self,
        x: Tensor,
        previous_frame: Tensor | None = None,
        num_timesteps: int = 5,
        *,
        timesteps: Iterable[float] | None = None,
        follow: bool = False,
    ) -> tuple[Tensor, SequenceStats]:
        """Frames [batch, num_timesteps, 3, H, W] in the model's dtype, and what they took.

        Args:
            x: [batch, 3, H, W]; H and W multiples of 16.
            previous_frame: The frame before the first; zeros where there is none.
            num_timesteps: How many frames.
            timesteps: The time step of each; None counts down by 10 to 0, as published, and for
                more frames than the model has steps begins again from the top.
            follow: As in `stream`.

        Raises ValueError for other shapes, fewer than one frame, or another count of time steps.
        """
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps is 1 or more, not {num_timesteps}")
        total = int(self.model.num_timesteps)  # type: ignore[arg-type]
        if timesteps is None:
            steps = [float(n * STEP % total) for n in reversed(range(num_timesteps))]
        else:
            steps = [float(step) for step in timesteps]
            if len(steps) != num_timesteps:
                raise ValueError(
                    f"{num_timesteps} frames need as many time steps, not {len(steps)}"
                )
        frame_bytes = self._measured(x, previous_frame, steps[0])
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        frames = torch.empty(
            (x.shape[0], num_timesteps, *x.shape[1:]), dtype=self.dtype, device=self.device
        )
        seconds, clock = [], _Clock(self.device)
        for index, frame in enumerate(
            self.stream(x, previous_frame, timesteps=steps, follow=follow)
        ):
            if frame.dtype != frames.dtype:  # float16 was given up on the way
                frames = frames.to(frame.dtype)
            frames[:, index] = frame
            seconds.append(clock.lap())
        total_time, frame_seconds = clock.stop(seconds)
        if cuda:
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            kept = frames.numel() * frames.element_size()
            peak = None if frame_bytes is None else self.parameter_bytes() + frame_bytes + kept
        return frames, {
            "total_time": total_time,
            "fps": num_timesteps / total_time,
            "time_per_frame": total_time / num_timesteps,
            "peak_memory": None if peak is None else peak / _MIB,
            "peak_memory_bytes": peak,
            "precision": self.precision.value,
            "frame_seconds": frame_seconds,
        }

    def _measured(self, x: Tensor, previous_frame: Tensor | None, step: float) -> int | None:
        """Bytes that one frame takes on a CPU, by a frame made for it once for each shape.

        It warms up too, and finds bad input before anything is allocated.
        """
        key = (tuple(x.shape), previous_frame is None, self.dtype)
        if key in self._frame_bytes:
            return self._frame_bytes[key]
        peak: int | None = None
        with torch.inference_mode():
            self(x, step, previous_frame)
            if self.device.type == "cpu":
                if torch._C._autograd._profiler_enabled():
                    return None
                watch = PeakWatch()
                watch.start()
                try:
                    self(x, step, previous_frame)
                finally:
                    peak = watch.stop()
        self._frame_bytes[key] = peak
        return peak


class _Clock:
    """Seconds between laps: by events on CUDA, which hold nothing up, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        if self._cuda:
            torch.cuda.synchronize(device)
        self._begin = time.perf_counter()
        self._first = self._mark()

    def lap(self) -> Any:
        """A mark to be given to `stop`."""
        return self._mark()

    def stop(self, marks: list[Any]) -> tuple[float, list[float]]:
        """Seconds in all, and of each lap."""
        if not self._cuda:
            ends = [self._first, *marks]
            laps = [b - a for a, b in itertools.pairwise(ends)]
            return time.perf_counter() - self._begin, laps
        torch.cuda.synchronize(self._device)
        total = time.perf_counter() - self._begin
        ends = [self._first, *marks]
        laps = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)]
        return total, laps

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def chosen_precision(precision: PrecisionMode | str, device: torch.device) -> PrecisionMode:
    """The mode that a name means on a device.

    Raises ValueError for what the video model has no mode for, PrecisionUnavailableError for a
    device that is not there or cannot compute so.
    """
    if device.type not in ("cpu", "cuda"):
        raise PrecisionUnavailableError(f"the device is 'cpu' or 'cuda', not {str(device)!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise PrecisionUnavailableError(
                f"there is no {device}: torch sees {count} CUDA devices. Use device='cpu'"
            )
    if isinstance(precision, str) and precision.strip().lower() == "auto":
        if device.type == "cpu":
            return PrecisionMode.FP32
        with torch.cuda.device(device):
            return get_optimal_precision()
    mode = PrecisionMode.parse(precision)
    if mode not in PRECISIONS:
        names = ", ".join(m.value for m in PRECISIONS)
        raise ValueError(f"the video model runs in auto, {names}; not in {mode.value}")
    if device.type == "cuda":
        _available_on_cuda(mode, device)
    return mode


def _available_on_cuda(mode: PrecisionMode, device: torch.device) -> None:
    row = of_device(device)
    if mode is PrecisionMode.BF16 and not has_native_bf16(device):
        raise PrecisionUnavailableError(
            f"{device} ({row.architecture}) only emulates bfloat16, which is slower than float32: "
            "use fp16"
        )
    if mode in STORED and not row.kernels:
        raise PrecisionUnavailableError(
            f"{device} ({row.architecture}) has no kernels for {mode.value}: use fp16 or fp32"
        )


def narrow_convolutions(model: nn.Module) -> list[str]:
    """Names of convolutions with few channels on a side: those at the picture."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and min(module.in_channels, module.out_channels) < NARROW
    ]
