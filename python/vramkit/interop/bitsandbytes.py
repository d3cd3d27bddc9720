"""bitsandbytes on vramkit's kernels: existing code runs faster on a CPU, unchanged.

`enable()` puts vramkit's implementations behind the `bitsandbytes::*` operators, for CPU tensors;
`disable()` takes them away again. Linear4bit, Linear8bitLt, Embedding4bit, the 8-bit optimizers and
`bitsandbytes.functional` call those operators, and so does whatever is built on them.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

MINIMUM = (0, 50)

_lock = threading.Lock()
_active: _Registration | None = None


@dataclass
class _Registration:
    library: torch.library.Library
    operators: list[str]
    undo: list[tuple[Any, str, Any]] = field(default_factory=list)


def _implementations() -> dict[str, Any]:
    from . import _blockwise as blockwise
    from . import _int8 as int8

    return {
        "quantize_4bit": blockwise.quantize_4bit,
        "dequantize_4bit": blockwise.dequantize_4bit,
        "dequantize_4bit.out": blockwise.dequantize_4bit_out,
        "gemm_4bit": blockwise.gemm_4bit,
        "gemv_4bit": blockwise.gemv_4bit,
        "gemv_4bit.out": blockwise.gemv_4bit_out,
        "quantize_blockwise": blockwise.quantize_blockwise,
        "dequantize_blockwise": blockwise.dequantize_blockwise,
        "dequantize_blockwise.out": blockwise.dequantize_blockwise_out,
        "int8_linear_matmul": int8.int8_linear_matmul,
        "int8_linear_matmul.out": int8.int8_linear_matmul_out,
        "int8_mm_dequant": int8.int8_mm_dequant,
        "int8_scaled_mm": int8.int8_scaled_mm,
        "int8_mixed_scaled_mm": int8.int8_mixed_scaled_mm,
        "int8_vectorwise_quant": int8.int8_vectorwise_quant,
        "int8_vectorwise_dequant": int8.int8_vectorwise_dequant,
        "int8_double_quant": int8.int8_double_quant,
    }


def _library() -> Any:
    """The installed bitsandbytes; ImportError where it is missing or too old."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "vramkit.interop.bitsandbytes needs bitsandbytes, which could not be imported "
            f"({error}); install it with: pip install 'bitsandbytes>={_text(MINIMUM)}'"
        ) from error
    version = bitsandbytes.__version__
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM:
        raise ImportError(
            f"vramkit.interop.bitsandbytes needs bitsandbytes {_text(MINIMUM)} or newer, found "
            f"{version}; update it with: pip install -U bitsandbytes"
        )
    return bitsandbytes


def _text(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)


def enable() -> list[str]:
    """Run bitsandbytes' operators on CPU tensors with vramkit's kernels; safe to call again.

    Returns the names of the operators that now run on vramkit (17 in bitsandbytes 0.50). Other
    devices are untouched. Codes and absmax are the bits that bitsandbytes itself writes; what
    differs otherwise is in docs/interop.md.

    `Linear4bit` no longer repacks its weight (and rounds its scales to bfloat16) on the first
    forward pass without gradients. Layers that were repacked before keep bitsandbytes' own kernel
    until `unpack(model)`.

    Raises ImportError where bitsandbytes is missing or older than 0.50, RuntimeError where it lacks
    an operator that vramkit knows.
    """
    global _active
    with _lock:
        if _active is not None:
            return list(_active.operators)
        bitsandbytes = _library()
        functions = _implementations()
        for name in functions:
            _overload(name, bitsandbytes.__version__)
        functions["gemv_4bit"] = _with_packed(functions["gemv_4bit"])
        library = torch.library.Library("bitsandbytes", "IMPL")
        made = _Registration(library, [f"bitsandbytes::{name}" for name in functions])
        try:
            for name, function in functions.items():
                library.impl(name, _opaque(function), "CPU", allow_override=True)
            _keep_layout(bitsandbytes, made)
        except BaseException:
            _withdraw(made)
            raise
        _active = made
        return list(made.operators)


def disable() -> bool:
    """Give bitsandbytes its own CPU code back; True if vramkit's was in place."""
    global _active
    with _lock:
        if _active is None:
            return False
        made, _active = _active, None
        _withdraw(made)
        return True


def enabled() -> bool:
    """Whether bitsandbytes' operators run on vramkit."""
    return _active is not None


def _withdraw(made: _Registration) -> None:
    for owner, name, value in reversed(made.undo):
        setattr(owner, name, value)
    made.library._destroy()


def _overload(name: str, version: str) -> Any:
    base, _, overload = name.partition(".")
    try:
        return getattr(getattr(torch.ops.bitsandbytes, base), overload or "default")
    except AttributeError:
        raise RuntimeError(
            f"bitsandbytes {version} has no operator {name!r}, which this version of vramkit "
            "replaces; nothing was changed"
        ) from None


def _opaque(function: Any) -> Any:
    # Compilers are to see the operator, not what is inside: it has a fake of its own.
    return torch._disable_dynamo(function)  # type: ignore[attr-defined]


def _with_packed(function: Any) -> Any:
    """`function`, but with the kernel that was there before for weights in its own layout."""
    from ._blockwise import is_cpu_packed, unpack_cpu_layout

    try:
        before = torch.library.get_kernel("bitsandbytes::gemv_4bit", "CPU")
    except (AttributeError, RuntimeError):
        before = None

    def gemv_4bit(A: Any, B: Any, shapeB: Any, absmax: Any, code: Any, blocksize: int) -> Any:
        if is_cpu_packed(absmax, shapeB, blocksize):
            if before is not None:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return before.call_boxed(keys, A, B, shapeB, absmax, code, blocksize)
            B, absmax = unpack_cpu_layout(B, absmax, shapeB)
        return function(A, B, shapeB, absmax, code, blocksize)

    return gemv_4bit


def _keep_layout(bitsandbytes: Any, made: _Registration) -> None:
    """Stop Linear4bit from packing weights for a kernel that is no longer used."""
    modules = bitsandbytes.nn.modules
    name = "_convert_weight_packed_for_cpu"
    own = getattr(modules, name, None)
    if own is None:
        return

    def as_it_is(qweight: Any, quant_state: Any, block_n: int = 32) -> tuple[Any, Any]:
        return qweight, quant_state

    made.undo.append((modules, name, own))
    setattr(modules, name, as_it_is)


def unpack(model: nn.Module) -> int:
    """Undo, in place, what bitsandbytes did to `Linear4bit` weights for its AVX-512 kernel.

    Returns the number of layers changed. Codes return exactly; scales stay as that packing left
    them, rounded to bfloat16 (and no longer nested).
    """
    from ._blockwise import unpack_cpu_layout

    linear4bit = _library().nn.Linear4bit
    changed = 0
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        packed_before = getattr(state, "packing_format_for_cpu", False)
        if not (isinstance(module, linear4bit) and packed_before):
            continue
        packed, absmax = unpack_cpu_layout(module.weight.data, state.absmax, state.shape)
        storage = getattr(state, "original_storage_type", None)
        if storage is not None:
            packed = packed.view(-1).view(storage).unsqueeze(1)
        module.weight.data = packed
        state.absmax, state.dtype = absmax, state.original_dtype
        state.nested = state.packing_format_for_cpu = False
        changed += 1
    return changed
