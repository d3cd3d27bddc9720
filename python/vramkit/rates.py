"""How fast this machine computes and copies: what the planner's time model rests on."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

# A layer of this size is timed with these rows of input: one is bound by reading weights, many by
# arithmetic. A line through both serves for what lies between.
INPUTS, OUTPUTS, ROWS = 2048, 1024, (1, 33)
_SECONDS = 0.01  # of each timing
PLAIN = {1: "plain8", 2: "plain16", 4: "plain32", 8: "plain64"}  # by bytes of an element


@dataclass(frozen=True)
class Rates:
    """Rates of one device: give your own, or `measure_rates()`.

    Attributes:
        compute: By storage format ("plain16" and "plain32" for layers as they are): seconds of a
            product by one row, and of each further row, both for one weight element.
        link_bytes_per_second: From the host to the device.
        disk_bytes_per_second: From the disk to the host.
        device: Where `compute` was measured; "given" if it was not.
        measuring_seconds: How long the measurement took.
    """

    compute: dict[str, tuple[float, float]] = field(default_factory=dict)
    link_bytes_per_second: float = 0.0
    disk_bytes_per_second: float = 0.0
    device: str = "given"
    measuring_seconds: float = 0.0

    def __post_init__(self) -> None:
        figures = [v for pair in self.compute.values() for v in pair]
        figures += [self.link_bytes_per_second, self.disk_bytes_per_second]
        if not all(0 <= v < float("inf") for v in figures):  # false for NaN as well
            raise ValueError("rates are finite and not negative")

    def seconds(self, name: str, elements: int, rows: int) -> float:
        """Seconds of one product of `rows` rows with a weight of `elements` elements."""
        if name not in self.compute:
            known = ", ".join(self.compute) or "none"
            raise ValueError(
                f"no rate for {name!r} (known: {known}); add it to Rates.compute, or measure_rates "
                "with it among the formats"
            )
        one, further = self.compute[name]
        return elements * (one + further * (max(rows, 1) - 1))

    def with_(self, **changes: Any) -> Rates:
        """These rates with some of them replaced."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The rates as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rates:
        """Rates that `to_dict` gave."""
        compute = {str(k): (float(a), float(b)) for k, (a, b) in data["compute"].items()}
        return cls(
            compute,
            float(data["link_bytes_per_second"]),
            float(data["disk_bytes_per_second"]),
            str(data["device"]),
            float(data["measuring_seconds"]),
        )


def measure_rates(
    formats: tuple[str, ...], dtype: torch.dtype = torch.float32, *, disk: bool = True
) -> Rates:
    """Rates of this processor, measured once in a process; a second or two for all formats.

    `dtype` is that of a layer's inputs. The link of a processor is its memory: what is streamed
    to the device tier is copied once.
    """
    return _measured(tuple(formats), dtype, disk)


@functools.cache
def _measured(formats: tuple[str, ...], dtype: torch.dtype, disk: bool) -> Rates:
    from .doctor import _disk_rates

    start = time.perf_counter()
    compute = {}
    for plain in {torch.float32, torch.bfloat16, dtype}:
        layer = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=plain)
        compute[PLAIN[plain.itemsize]] = _product(layer, plain)
    for name in formats:
        compute[name] = _product(_stored(name, dtype), dtype)
    source = torch.ones(32 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    link = source.nbytes / _least(lambda: target.copy_(source))
    read = float(_disk_rates()["read_bytes_per_second"]) if disk else 0.0
    return Rates(compute, link, read, "cpu", time.perf_counter() - start)


def _stored(name: str, dtype: torch.dtype) -> nn.Module:
    from .convert import convert

    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=dtype))
    convert(model, name)
    return model


@torch.no_grad()
def _product(layer: nn.Module, dtype: torch.dtype) -> tuple[float, float]:
    inputs = [torch.ones(rows, INPUTS, dtype=dtype) for rows in ROWS]
    few, many = (_least(lambda x=x: layer(x)) / (INPUTS * OUTPUTS) for x in inputs)
    return few, max(0.0, many - few) / (ROWS[1] - ROWS[0])


def _least(work: Any) -> float:
    """Seconds of the fastest call: what other processes take from this one is not its rate."""
    work()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
