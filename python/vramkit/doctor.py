"""What this machine and this build offer: `vramkit doctor`."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import __version__, _core
from ._native import HAS_CUDA_OPERATORS
from ._operators import encode
from .capabilities import describe, describe_cpu
from .formats import get_format

_DISK_BYTES = 64 << 20


def examine(*, rates: bool = True) -> dict[str, Any]:
    """Versions, instruction sets, devices and, unless `rates` is off, measured rates.

    Rates take about two seconds and 300 MB, and write a temporary file of 64 MiB. Keys named
    `*_bytes_per_second` are bytes per second.
    """
    found: dict[str, Any] = {
        "vramkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "isa": _core.active_isa(),
        "isa_available": _core.available_isas(),
        "isa_forced": os.environ.get("VRAMKIT_ISA") or None,
        "cpu": describe_cpu(),
        "threads": torch.get_num_threads(),
        "cuda_build": torch.version.cuda,
        "cuda_kernels": HAS_CUDA_OPERATORS,
        "cuda_devices": _cuda_devices(),
        "page_size_bytes": mmap.PAGESIZE,
        "transparent_huge_pages": _huge_pages(),
        "memory_available_bytes": available_memory(),
    }
    if rates:
        found["memory"] = _memory_rates()
        found["disk"] = _disk_rates()
        found["kernels"] = _kernel_rates()
    return found


def _cuda_devices() -> list[dict[str, Any]]:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": about.name,
                **describe((about.major, about.minor)),
                "memory_bytes": about.total_memory,
            }
        )
    return devices


def _huge_pages() -> str | None:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        text = file.read_text(encoding="ascii")
    except OSError:
        return None  # not Linux, or hidden by the container: reported as unknown
    return text.split("[")[1].split("]")[0] if "[" in text else None


def available_memory() -> int | None:
    """Bytes that this process may still take.

    The least of what the system has, what its control group has left (files in the page cache,
    which go when memory is needed, do not count against it), and its own limit (RLIMIT_DATA).
    """
    limits = []
    try:
        limits.append(_kilobytes("/proc/meminfo", "MemAvailable:"))
        most = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if most != resource.RLIM_INFINITY:
            limits.append(max(0, most - _kilobytes("/proc/self/status", "VmData:")))
        group = Path("/sys/fs/cgroup")
        maximum = (group / "memory.max").read_text(encoding="ascii").strip()
        if maximum != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
            counts = dict(line.split() for line in lines)
            cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
            limits.append(max(0, int(maximum) - max(0, used - cached)))
    except OSError:
        pass  # no such file here: what was found so far is the answer
    return min(limits) if limits else None


def _kilobytes(path: str, key: str) -> int:
    for line in Path(path).read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no line {key}")


def _rate(nbytes: int, work: Any, seconds: float = 0.15) -> float:
    """Median bytes per second of `work`, repeated for about `seconds`."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return nbytes / sorted(times)[len(times) // 2]


def _memory_rates() -> dict[str, float]:
    source = torch.ones(32 << 20, dtype=torch.float32)  # 128 MiB: past every cache
    target = torch.empty_like(source)
    return {
        "read_bytes_per_second": _rate(source.nbytes, source.sum),
        "copy_bytes_per_second": _rate(2 * source.nbytes, lambda: target.copy_(source)),
    }


def _disk_rates() -> dict[str, Any]:
    data = os.urandom(1 << 20) * (_DISK_BYTES >> 20)
    with tempfile.NamedTemporaryFile(prefix="vramkit-doctor-") as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        write = len(data) / (time.perf_counter() - start)
        direct, read = True, 0.0
        buffer = mmap.mmap(-1, 8 << 20)  # page-aligned, as direct reads need
        try:
            descriptor = os.open(file.name, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:
            direct = False  # a file system without direct reads, such as tmpfs
            descriptor = os.open(file.name, os.O_RDONLY)
        try:
            start = time.perf_counter()
            done = 0
            while done < len(data):
                count = os.preadv(descriptor, [buffer], done)
                if count == 0:
                    break
                done += count
            read = done / (time.perf_counter() - start)
        finally:
            os.close(descriptor)
    return {
        "folder": tempfile.gettempdir(),
        "direct_io": direct,
        "write_bytes_per_second": write,
        "read_bytes_per_second": read,
    }


def _kernel_rates() -> dict[str, dict[str, float]]:
    """By format: packed bytes per second of one-row products, and of encoding float32."""
    weight = torch.randn(2048, 4096)
    x = torch.randn(1, 4096, dtype=torch.bfloat16)
    rates = {}
    for name in ("bf16", "fp8", "int8", "int4", "nf4"):
        fmt = get_format(name)
        parts = encode(weight, fmt)
        table = fmt.table_on(weight.device)

        def product(parts: Any = parts, fmt: Any = fmt, table: Any = table) -> Any:
            return torch.ops.vramkit.linear(
                x, parts.codes, parts.scales, parts.extra, table, None, fmt.spec, 2048
            )

        rates[name] = {
            "linear_bytes_per_second": _rate(parts.nbytes, product, 0.05),
            "encode_bytes_per_second": _rate(
                weight.nbytes, lambda fmt=fmt: encode(weight, fmt), 0.05
            ),
        }
    return rates
