"""Precision part by part: a pipeline's components, the islands in them, and what each came to.

`prepare` is what a model manager runs on what a loader returned, where one precision for all is not
enough. It reaches modules in plain objects, and in attributes that `.to()` does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .bnb_config import QuantizationConfig, is_config, resolve
from .candidates import matches
from .convert import Precision, convert, restore
from .formats import StorageFormat
from .hardware import compute_dtype
from .islands import AUTO, find_islands, make_bridge, make_island
from .model_objects import PLAIN_MODES, device_of, is_converted, named_roots
from .precision import PrecisionMode
from .sizes import format_size

# Names or classes of modules, or a function of the object that gives them.
Islands = Iterable[str | type] | str | Callable[[Any], Iterable[str | type]]
PartPrecision = Precision | QuantizationConfig | Mapping[str, Precision | None] | None


@dataclass(frozen=True)
class PreparedPart:
    """One part: its path, what it was converted to, its plain tensors' dtype, its bytes."""

    path: str
    precision: str
    dtype: str
    bytes: int
    original_bytes: int


@dataclass
class Prepared:
    """What `prepare` did. `islands` are the paths of modules that stay in float32."""

    parts: list[PreparedPart] = field(default_factory=list)
    islands: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"parts": [vars(p) for p in self.parts], "islands": self.islands}

    def __str__(self) -> str:
        lines = [
            f"{part.path or '(all)'}: {part.precision}, {format_size(part.original_bytes)} -> "
            f"{format_size(part.bytes)}"
            for part in self.parts
        ]
        if self.islands:
            lines.append(f"in float32: {', '.join(self.islands)}")
        return "\n".join(lines)


def _bytes(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _chosen(path: str, precisions: Mapping[str, Any], used: set[str], paths: set[str]) -> Any:
    """The precision of a part: of the longest name that fits its path, else that under "".

    A name that is a part's whole path means that part, and not others that end like it.
    """
    fits = [
        name
        for name in precisions
        if name
        and (
            name == path or path.startswith(name + ".") if name in paths else matches(path, [name])
        )
    ]
    name = max(fits, key=len, default="" if "" in precisions else None)
    if name is None:
        return None
    used.add(name)
    return precisions[name]


def prepare(
    obj: Any,
    precision: PartPrecision = None,
    device: str | torch.device | None = None,
    *,
    islands: Islands = AUTO,
    skip: Iterable[str] = (),
) -> Prepared:
    """Convert what an object holds, part by part, and move it.

    Args:
        obj: A module, or an object that holds modules, at any depth that `find_modules` reaches.
            Changed in place.
        precision: A precision, storage format or `BitsAndBytesConfig` for all parts; or one by
            part's path in `obj` ("vae", "conditioner.encoder"; last parts and globs count), with
            "" for the others. Parts without one, and a precision of None, stay as they are. Where
            a part's dtype is not that of "", what goes into it and comes out of it (forward,
            encode, decode) is cast.
        device: Where the parts are moved once they are converted; None: they stay.
        islands: Modules that stay in float32 and run so: paths, last parts, globs, classes or
            their names; or a function of `obj` that gives them. "auto" (also among others): for
            float16, norms that it would break.
        skip: Layers to leave plain, as in `convert`, by their paths in `obj`.

    Raises ValueError for a name that no part or module has, and what `convert` does; nothing has
    been changed then, unless a weight cannot be stored (NonFiniteWeightError), which parts that
    came before have been.
    """
    by_part = precision if isinstance(precision, Mapping) and not is_config(precision) else None
    precisions: Mapping[str, Any] = {"": precision} if by_part is None else by_part
    if callable(islands):
        islands = islands(obj)
    roots = named_roots(obj)
    used, paths = {""}, {path for path, _ in roots}
    plans: list[tuple[str, nn.Module, Any]] = []
    for path, root in roots:
        wanted = _chosen(path, precisions, used, paths)
        mode = _mode(wanted)
        resolve(wanted)  # raises for what cannot be done
        plans.append((path, root, mode if mode is not None else wanted))
    unknown = sorted(set(precisions) - used)
    if unknown:
        known = ", ".join(path or "''" for path, _ in roots) or "none"
        raise ValueError(f"no part is called {unknown[0]!r}; the parts are: {known}")
    dtypes = {path: _dtype(wanted, device or device_of(root)) for path, root, wanted in plans}
    kept = _islands_of(roots, dtypes, islands)
    found = Prepared(islands=list(kept))
    common = _dtype(_mode(precisions.get("")), device or device_of(obj)) if by_part else None
    for path, root, wanted in plans:
        before = _bytes(root)
        inside = {p: m for p, m in kept.items() if m in set(root.modules())}
        _convert_part(path, root, wanted, dtypes[path], inside, tuple(skip))
        if device is not None:
            root.to(device=device)
        plain = dtypes[path]
        if common is not None and plain not in (None, common):
            make_bridge(root, plain, common)
        shown = "as it is" if wanted is None else _name(wanted)
        words = "" if plain is None else str(plain).removeprefix("torch.")
        found.parts.append(PreparedPart(path, shown, words, _bytes(root), before))
    return found


def _mode(wanted: Any) -> PrecisionMode | None:
    if isinstance(wanted, str) and not isinstance(wanted, PrecisionMode):
        try:
            return PrecisionMode.parse(wanted)
        except ValueError:
            from .formats import get_format

            get_format(wanted)
            return None
    return wanted if isinstance(wanted, PrecisionMode) else None


def _name(wanted: Any) -> str:
    if isinstance(wanted, StorageFormat):
        return wanted.name
    return resolve(wanted)[0].name if is_config(wanted) else str(wanted)


def _dtype(wanted: Any, device: str | torch.device | None) -> torch.dtype | None:
    """What a part's plain tensors become; None: they stay, as they do for formats and configs."""
    return compute_dtype(wanted, device) if isinstance(wanted, PrecisionMode) else None


def _islands_of(
    roots: list[tuple[str, nn.Module]],
    dtypes: Mapping[str, torch.dtype | None],
    islands: Iterable[str | type] | str,
) -> dict[str, nn.Module]:
    """Islands by path. Norms that float16 breaks are looked for in the parts that become it."""
    wanted = [islands] if isinstance(islands, str) else list(islands)
    named = [w for w in wanted if w != AUTO]
    whole = dict(roots)
    found = find_islands(whole, named, torch.float32) if named else {}
    if AUTO in wanted:
        for path, root in roots:
            if dtypes[path] is torch.float16:
                for name, module in find_islands({path: root}, AUTO, torch.float16).items():
                    if not any(name.startswith(outer + ".") for outer in found):
                        found[name] = module
    return found


def _convert_part(
    path: str,
    root: nn.Module,
    wanted: Any,
    dtype: torch.dtype | None,
    kept: Mapping[str, nn.Module],
    skip: tuple[str, ...],
) -> None:
    around = dtype or _floating_dtype(root)
    # Their values as they were loaded: a cast there and back would round them.
    inside = [module for island in kept.values() for module in island.modules()]
    saved = [
        (tensor, tensor.data)
        for module in inside
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and tensor.is_floating_point()
    ]
    if wanted in PLAIN_MODES and is_converted(root):
        restore(root, dtype)
    if dtype is not None:
        root.to(dtype=dtype)
    for tensor, data in saved:
        tensor.data = data.float()
    if wanted is not None and wanted not in PLAIN_MODES:
        prefix = f"{path}." if path else ""
        leave = [p.removeprefix(prefix) for p in (*kept, *skip) if p != path]
        if path not in kept:
            convert(root, wanted, skip=leave)
    for island in kept.values():
        make_island(island, around)


def _floating_dtype(root: nn.Module) -> torch.dtype:
    return next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
