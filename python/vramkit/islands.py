"""Modules that stay float32 within a model of fewer bits, and calls under autocast around them.

An island keeps its weights plain and in float32, is run outside of autocast, takes its inputs in
float32 and gives its outputs in the dtype of the model around it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import matches
from .model_objects import named_roots

# The smallest normal number of float16: an eps below it, and squares of what is small, vanish.
_SMALLEST_NORMAL = 2.0**-14
AUTO = "auto"


def modules_by_path(obj: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module of an object with its path, children of children included."""
    for root_path, root in named_roots(obj):
        for name, module in root.named_modules():
            yield ".".join(part for part in (root_path, name) if part), module


def fragile_norms(obj: Any) -> list[str]:
    """Paths of norms that float16 would break: not torch's own, with an eps below 6.1e-5.

    torch's norms compute in float32 whatever their dtype. One written out in Python squares its
    input in float16, where squares of what is below 2.4e-4 are zero, as is an eps below 6e-8.
    """
    found = []
    for path, module in modules_by_path(obj):
        kind = type(module)
        written_out = not kind.__module__.startswith("torch.")
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        norm = written_out and "norm" in kind.__name__.lower()
        if norm and isinstance(eps, float) and eps < _SMALLEST_NORMAL:
            found.append(path)
    return found


def find_islands(
    obj: Any, islands: Iterable[str | type] | str, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The modules that `islands` names (paths, parts of them, globs or classes), outermost ones.

    "auto" among them stands for `fragile_norms` where `dtype` is float16. Raises ValueError for a
    name or class that no module has.
    """
    wanted = [islands] if isinstance(islands, str) else list(islands)
    names = [w for w in wanted if isinstance(w, str) and w != AUTO]
    kinds = tuple(w for w in wanted if isinstance(w, type))
    automatic = set(fragile_norms(obj)) if AUTO in wanted and dtype is torch.float16 else set()
    found: dict[str, nn.Module] = {}
    used: set[Any] = set()
    for path, module in modules_by_path(obj):
        hits = [w for w in names if path and matches(path, [w])]
        hits += [w for w in names if w == type(module).__name__]
        used.update(hits)
        used.update(kind for kind in kinds if isinstance(module, kind))
        if not (hits or isinstance(module, kinds) or path in automatic):
            continue
        if not any(path.startswith(outer + ".") for outer in found):
            found[path] = module
    unused = [w for w in (*names, *kinds) if w not in used]
    if unused:
        raise ValueError(f"no module is called {unused[0]!r}, or is of a class of that name")
    return found


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it, through lists, tuples and dicts, given to `function`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping) and isinstance(value, dict):
        items = {key: mapped(held, function) for key, held in value.items()}
        return items if type(value) is dict else type(value)(items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(held, function) for held in value))
    if type(value) in (list, tuple):
        return type(value)(mapped(held, function) for held in value)
    return value


def _cast_floats(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


def _run_in_float32(module: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    widen = _cast_floats(torch.float32)
    with torch.autocast("cpu" if device is None else device.type, enabled=False):
        out = type(module).forward(module, *mapped(args, widen), **mapped(kwargs, widen))
    return mapped(out, _cast_floats(dtype))


def make_island(module: nn.Module, dtype: torch.dtype) -> None:
    """Run `module` in float32 from now on, with outputs in `dtype`; its weights are not cast here.

    Raises ValueError where the module's forward has been replaced already.
    """
    forward = vars(module).get("forward")
    if isinstance(forward, functools.partial) and forward.func is _run_in_float32:
        del module.forward
    elif forward is not None:
        raise ValueError(f"the forward of this {type(module).__name__} is replaced already")
    module.forward = functools.partial(_run_in_float32, module, dtype)


# What a pipeline calls of a component.
_ENTRIES = ("forward", "encode", "decode")


def make_bridge(module: nn.Module, inside: torch.dtype, around: torch.dtype) -> None:
    """Cast what comes into a component (forward, encode, decode) to `inside`, and back `around`.

    For components of other dtypes than the pipeline passes between them.
    """
    for name in _ENTRIES:
        if callable(getattr(type(module), name, None)) and name not in vars(module):
            setattr(module, name, functools.partial(_run_cast, module, name, inside, around))


def _run_cast(
    module: nn.Module,
    name: str,
    inside: torch.dtype,
    around: torch.dtype,
    *args: Any,
    **kwargs: Any,
) -> Any:
    cast = _cast_floats(inside)
    out = getattr(type(module), name)(module, *mapped(args, cast), **mapped(kwargs, cast))
    return mapped(out, _cast_floats(around))


def autocast_for(
    device: torch.device | str | None, dtype: torch.dtype
) -> AbstractContextManager[Any]:
    """torch's autocast in `dtype` on a CUDA device; elsewhere nothing, with a warning.

    Autocast saves no parameter memory; it lets operators choose their own dtype. Where no CUDA
    device computes, it would change results and gain nothing.
    """
    kind = "cpu" if device is None else torch.device(device).type
    if kind != "cuda":
        warnings.warn(
            "mixed precision was asked for without a CUDA device: calls run in the model's own "
            "precision",
            RuntimeWarning,
            stacklevel=3,
        )
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16 if dtype is torch.float32 else dtype)


def enable_mixed_precision(
    obj: Any,
    dtype: torch.dtype = torch.bfloat16,
    *,
    islands: Iterable[str | type] | str = AUTO,
) -> Any:
    """Run the modules of an object under autocast in `dtype`, but for islands in float32.

    Args:
        obj: A module, or an object that holds modules. Changed in place and returned.
        dtype: bfloat16 or float16.
        islands: Modules that run in float32: paths, last parts, globs, classes or their names;
            "auto": for float16, norms that it would break (`fragile_norms`).

    Weights keep their dtypes: autocast saves none of their memory. Without CUDA nothing changes but
    for the islands, and a warning says so.
    """
    from .model_objects import device_of

    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast computes in bfloat16 or float16, not {dtype}")
    chosen = find_islands(obj, islands, dtype)
    device = device_of(obj)
    if not isinstance(autocast_for(device, dtype), torch.autocast):
        return obj
    for module in chosen.values():
        module.float()
        make_island(module, dtype)
    for _, root in named_roots(obj):
        if "forward" not in vars(root):
            root.forward = functools.partial(_run_mixed, root, dtype)
    return obj


def _run_mixed(module: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast("cuda", dtype=dtype):
        return type(module).forward(module, *args, **kwargs)
