"""bitsandbytes on vramkit's kernels: existing code runs faster on a CPU, unchanged.

`enable()` puts vramkit's implementations behind the `bitsandbytes::*` operators, for CPU tensors;
`disable()` takes them away again. Linear4bit, Linear8bitLt, Embedding4bit, the 8-bit optimizers and
`bitsandbytes.functional` call those operators, and so does whatever is built on them.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import torch
from torch import nn

MINIMUM = (0, 50)

_lock = threading.Lock()
_on = False
# What the first enable() registers stays until the process ends and looks at `_on`: to take a
# kernel away from the dispatcher while another thread calls it can deadlock.
_library_of_ours: torch.library.Library | None = None
_names: list[str] = []
# Of bitsandbytes itself: the function that enable() replaces, by (module, name).
_replaced: list[tuple[Any, str, Any]] = []


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
    global _on
    with _lock:
        bitsandbytes = _library()
        if not _names:
            _register(bitsandbytes.__version__)
        if not _on:
            _keep_layout(bitsandbytes)
            _on = True
        return list(_names)


def disable() -> bool:
    """Give bitsandbytes its own CPU code back; True if vramkit's was in place."""
    global _on
    with _lock:
        was_on, _on = _on, False
        while _replaced:
            owner, name, value = _replaced.pop()
            setattr(owner, name, value)
        return was_on


def enabled() -> bool:
    """Whether bitsandbytes' operators run on vramkit."""
    return _on


def _register(version: str) -> None:
    global _library_of_ours
    functions = _implementations()
    operators = {name: _overload(name, version) for name in functions}
    switches = {
        name: _switch(name, operators[name], function) for name, function in functions.items()
    }
    library = torch.library.Library("bitsandbytes", "IMPL")
    for name, switch in switches.items():
        # Compilers are to see the operator, not what is inside: it has a fake of its own.
        opaque = torch._disable_dynamo(switch)  # type: ignore[attr-defined]
        library.impl(name, opaque, "CPU", allow_override=True)
    _library_of_ours = library
    _names.extend(f"bitsandbytes::{name}" for name in functions)


def _overload(name: str, version: str) -> Any:
    base, _, overload = name.partition(".")
    try:
        return getattr(getattr(torch.ops.bitsandbytes, base), overload or "default")
    except AttributeError:
        raise RuntimeError(
            f"bitsandbytes {version} has no operator {name!r}, which this version of vramkit "
            "replaces; nothing was changed"
        ) from None


def _switch(name: str, operator: Any, ours: Any) -> Any:
    """`ours` while enabled, else the kernel that was there before."""
    try:
        before = torch.library.get_kernel(operator, "CPU")
    except RuntimeError:  # it has none for the CPU
        before = None
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    arguments = operator._schema.arguments

    def previous(*args: Any) -> Any:
        if before is None:
            raise NotImplementedError(
                f"bitsandbytes::{name} has no CPU code of its own; "
                "vramkit.interop.bitsandbytes.enable() brings one"
            )
        defaults = [argument.default_value for argument in arguments[len(args) :]]
        return before.call_boxed(keys, *args, *defaults)

    def switch(*args: Any) -> Any:
        return ours(*args) if _on else previous(*args)

    if name == "gemv_4bit":
        return _with_packed(switch, previous)
    return switch


def _with_packed(switch: Any, previous: Any) -> Any:
    """`switch`, but bitsandbytes' kernel for weights that are in its own layout."""
    from ._blockwise import is_cpu_packed

    def gemv_4bit(A: Any, B: Any, shapeB: Any, absmax: Any, code: Any, blocksize: int) -> Any:
        packed = is_cpu_packed(absmax, shapeB, blocksize)
        return (previous if packed else switch)(A, B, shapeB, absmax, code, blocksize)

    return gemv_4bit


def _keep_layout(bitsandbytes: Any) -> None:
    """Stop Linear4bit from packing weights for a kernel that is no longer used."""
    modules = bitsandbytes.nn.modules
    name = "_convert_weight_packed_for_cpu"
    own = getattr(modules, name, None)
    if own is None:
        return

    def as_it_is(qweight: Any, quant_state: Any, block_n: int = 32) -> tuple[Any, Any]:
        return qweight, quant_state

    _replaced.append((modules, name, own))
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
