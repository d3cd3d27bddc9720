"""What the server's process holds, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from ..doctor import available_memory

_MB = float(1 << 20)
_PAGE_FILE = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Bytes of RAM that this process holds."""
    import resource

    pages = int(_PAGE_FILE.read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def memory_info() -> dict[str, float]:
    """The process's memory in MiB, by the documented names; zeros for a GPU that is not in use.

    `cpu_memory_percent` is the share of what the process has and could still get.
    """
    held = resident_bytes()
    free = available_memory()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "cpu_memory_mb": held / _MB,
        "cpu_memory_percent": 100.0 * held / (held + free) if free is not None else 0.0,
        "gpu_memory_allocated_mb": torch.cuda.memory_allocated() / _MB if cuda else 0.0,
        "gpu_memory_reserved_mb": torch.cuda.memory_reserved() / _MB if cuda else 0.0,
        "gpu_memory_max_allocated_mb": torch.cuda.max_memory_allocated() / _MB if cuda else 0.0,
    }


def alerts(info: dict[str, float], limit_percent: float) -> list[str]:
    """A sentence for each kind of memory that is fuller than `limit_percent`."""
    found = []
    if info["cpu_memory_percent"] > limit_percent:
        found.append(
            f"CPU memory: {info['cpu_memory_percent']:.0f} % of what this process can have is in "
            f"use, more than {limit_percent:g} %"
        )
    if info["gpu_memory_reserved_mb"] > 0:
        free, total = torch.cuda.mem_get_info()
        used = 100.0 * (total - free) / total
        if used > limit_percent:
            found.append(f"GPU memory: {used:.0f} % is in use, more than {limit_percent:g} %")
    return found


def clean_up() -> None:
    """Collect garbage, and give freed pages of the heap back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(ctypes.c_size_t(0))


def clear_device_cache() -> bool:
    """Give torch's cached device memory back; False where no device is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        return True
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
        return True
    return False
