"""What hardware computes natively, by compute capability: the one table that all else asks.

Names of GPUs are never parsed: two cards of one name differ, and new ones come. Importing this
touches no driver; only the functions that take a device may.

Sources: the CUDA C++ Programming Guide's appendix on compute capabilities (feature availability and
tensor-core input types), the PTX manual's target notes on `mma`, `cp.async` and `cp.async.bulk`,
torch's sdp_utils.cpp and CUDABlas.cpp.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Capability = tuple[int, int]

# cuBLAS' workspace as torch sets it: 32 MiB from Hopper on, else 2 x 4 MiB and 8 x 16 KiB.
_WORKSPACE, _WORKSPACE_HOPPER = (4096 << 10) * 2 + (16 << 10) * 8, 32 << 20


@dataclass(frozen=True)
class CudaCapability:
    """One generation of NVIDIA's GPUs.

    Attributes:
        least: The compute capability from which on this holds.
        architecture: NVIDIA's name of the generation.
        tensor_cores: Input formats that its tensor cores multiply.
        async_copy: Copies from global to shared memory without registers (`cp.async`).
        tma: Bulk copies of tensor tiles (`cp.async.bulk.tensor`) and clusters of blocks.
        flash_attention: Whether torch's flash attention runs there.
        efficient_attention: Whether torch's memory-efficient attention runs there.
        blas_workspace_bytes: What cuBLAS takes once for its workspace in torch.
        kernels: Whether this package's own kernels are built for it.
    """

    least: Capability
    architecture: str
    tensor_cores: tuple[str, ...]
    async_copy: bool = False
    tma: bool = False
    flash_attention: bool = False
    efficient_attention: bool = True
    blas_workspace_bytes: int = _WORKSPACE
    kernels: bool = True

    def native(self, fmt: str) -> bool:
        """Whether tensor cores multiply `fmt`: fp64 tf32 bf16 fp16 fp8 fp6 fp4 int8 int4.

        fp8 stands for e4m3 and e5m2, which always come together.

        >>> by_capability((8, 0)).native("fp8"), by_capability((8, 9)).native("fp8_e5m2")
        (False, True)
        """
        name = fmt.lower()
        return ("fp8" if name in ("fp8_e4m3", "fp8_e5m2") else name) in self.tensor_cores


# Newest first. What a generation leaves out again (int4 from Hopper on, fp64 in consumer parts) is
# why each row names all it has.
_AMPERE = ("tf32", "bf16", "fp16", "int8", "int4")
_HOPPER = ("fp64", "tf32", "bf16", "fp16", "fp8", "int8")
_BLACKWELL = ("tf32", "bf16", "fp16", "fp8", "fp6", "fp4", "int8")
_NEW: dict[str, Any] = {
    "async_copy": True,
    "tma": True,
    "flash_attention": True,
    "blas_workspace_bytes": _WORKSPACE_HOPPER,
}
_MIDDLE: dict[str, Any] = {"async_copy": True, "flash_attention": True}
_OLD: dict[str, Any] = {"kernels": False}
CUDA_CAPABILITIES: tuple[CudaCapability, ...] = (
    CudaCapability((12, 0), "Blackwell", _BLACKWELL, **_NEW),
    CudaCapability((11, 0), "Blackwell", _BLACKWELL, **_NEW),
    CudaCapability((10, 0), "Blackwell", ("fp64", *_BLACKWELL), **_NEW),
    CudaCapability((9, 0), "Hopper", _HOPPER, **_NEW),
    CudaCapability((8, 9), "Ada", ("tf32", "bf16", "fp16", "fp8", "int8", "int4"), **_MIDDLE),
    CudaCapability((8, 6), "Ampere", _AMPERE, **_MIDDLE),
    CudaCapability((8, 0), "Ampere", ("fp64", *_AMPERE), **_MIDDLE),
    CudaCapability((7, 5), "Turing", ("fp16", "int8", "int4")),
    CudaCapability((7, 0), "Volta", ("fp16",), **_OLD),
    CudaCapability((5, 0), "Maxwell to Pascal", (), **_OLD),
)
# The newest that the table knows; what comes later is taken for it.
NEWEST = (12, 1)


def by_capability(capability: Capability) -> CudaCapability:
    """The table's row for a compute capability; a later one than the table knows has its last row.

    Raises ValueError below 5.0, where torch runs on no device.

    >>> by_capability((8, 7)).architecture
    'Ampere'
    """
    for row in CUDA_CAPABILITIES:
        if tuple(capability) >= row.least:
            return row
    raise ValueError(
        f"torch runs on no CUDA device below capability 5.0, and this is {capability[0]}."
        f"{capability[1]}"
    )


def of_device(device: str | torch.device | int | None = None) -> CudaCapability:
    """The row of a CUDA device of this machine, by default the current one."""
    import torch

    return by_capability(torch.cuda.get_device_capability(device))


def multiplies(device: torch.device, fmt: str) -> bool:
    """Whether `device` has matrix units for `fmt`; False for what is no CUDA device of NVIDIA's.

    ROCm devices call themselves "cuda" in torch, but their numbers mean something else.
    """
    import torch

    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return of_device(device).native(fmt)


@dataclass(frozen=True)
class CpuCapability:
    """What a CPU says of itself; None where the system does not tell (it is not Linux on x86).

    Attributes:
        avx2: 256-bit integers, with FMA and conversions of float16.
        avx512: 512-bit vectors with byte and word operations.
        vnni: Dot products of 8-bit integers, in 256 or 512 bits.
        avx512_bf16: Dot products of bfloat16.
        avx512_fp16: Arithmetic in float16.
        amx_int8: Tiles of 8-bit integers.
        amx_bf16: Tiles of bfloat16.
    """

    avx2: bool | None = None
    avx512: bool | None = None
    vnni: bool | None = None
    avx512_bf16: bool | None = None
    avx512_fp16: bool | None = None
    amx_int8: bool | None = None
    amx_bf16: bool | None = None

    @property
    def native(self) -> tuple[str, ...]:
        """Formats with instructions of their own for products."""
        found = {
            "fp32": True,
            "bf16": self.avx512_bf16 or self.amx_bf16,
            "fp16": self.avx512_fp16,
            "int8": self.vnni or self.amx_int8,
        }
        return tuple(name for name, there in found.items() if there)


def of_cpu(cpuinfo: str | Path = "/proc/cpuinfo") -> CpuCapability:
    """What this machine's CPU has, as the system lists it."""
    try:
        text = Path(cpuinfo).read_text(encoding="ascii", errors="replace")
    except OSError:
        return CpuCapability()
    line = next((one for one in text.splitlines() if one.startswith("flags")), None)
    if line is None:
        return CpuCapability()
    flags = set(line.partition(":")[2].split())
    return CpuCapability(
        avx2={"avx2", "fma", "f16c"} <= flags,
        avx512={"avx512f", "avx512bw", "avx512vl"} <= flags,
        vnni=bool({"avx512_vnni", "avx_vnni"} & flags),
        avx512_bf16="avx512_bf16" in flags,
        avx512_fp16="avx512_fp16" in flags,
        amx_int8={"amx_tile", "amx_int8"} <= flags,
        amx_bf16={"amx_tile", "amx_bf16"} <= flags,
    )


def describe_cpu() -> dict[str, Any]:
    """`of_cpu()` as data, with what it multiplies natively: for reports."""
    found = of_cpu()
    return {**asdict(found), "native": list(found.native)}


def describe(capability: Capability) -> dict[str, Any]:
    """A compute capability as data: for reports."""
    row = by_capability(capability)
    return {
        "capability": f"{capability[0]}.{capability[1]}",
        "architecture": row.architecture,
        "tensor_cores": list(row.tensor_cores),
        "async_copy": row.async_copy,
        "tma": row.tma,
        "kernels": row.kernels,
        "known": tuple(capability) <= NEWEST,
    }


def explain(capability: Capability) -> str:
    """One sentence for notes: what tensor cores multiply there, and what is decoded first.

    >>> explain((8, 0))
    'capability 8.0 multiplies fp64, tf32, bf16, fp16, int8, int4 on tensor cores'
    """
    row = by_capability(capability)
    where = f"capability {capability[0]}.{capability[1]}"
    if not row.tensor_cores:
        return f"{where} has no tensor cores"
    text = f"{where} multiplies {', '.join(row.tensor_cores)} on tensor cores"
    if tuple(capability) > NEWEST:
        text += f" as far as is known (the table ends at {NEWEST[0]}.{NEWEST[1]})"
    return text
