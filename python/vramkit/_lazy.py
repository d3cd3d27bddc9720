"""Names of a package that are imported at their first use, so that importing it stays cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy"]


def lazy(
    package: str, names: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: Its name.
        names: The module within the package that each name comes from.
        modules: Modules of the package that are attributes too.
    """
    attributes = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name in modules:
            return import_module(f".{name}", package)
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{names[name]}", package), name)
        attributes[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*attributes, *names})

    return __getattr__, __dir__
