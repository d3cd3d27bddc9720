"""Handles: what a model manager gives out in place of models.

A handle knows its model by manager, name and load, and never holds it, so a handle that someone
keeps cannot keep the model's memory. Each use takes a lease: the model is not evicted under it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

_OWN = ("_vramkit_source", "_vramkit_path", "_vramkit_type")


class Source(Protocol):
    """Where a handle finds its model."""

    name: str

    def lease(self) -> contextlib.AbstractContextManager[Any]:
        """The model, which stays for the length of the with block; StaleHandleError if gone."""

    def loaded(self) -> bool:
        """Whether the model is still in memory."""


class ModelHandle:
    """Stands for a managed model: delegates attributes, items and calls, and `isinstance`.

    Modules among the attributes, and plain objects that hold modules, come as handles too, and
    methods that return the model itself (`eval()`, `to()`) return the handle. Tensors, and modules
    that come out of iterators such as `children()`, are the real ones. A use after the model was
    unloaded raises StaleHandleError.
    """

    __slots__ = (*_OWN, "__weakref__")

    def __init__(self, source: Source, model_type: type, path: tuple[tuple[str, Any], ...] = ()):
        object.__setattr__(self, "_vramkit_source", source)
        object.__setattr__(self, "_vramkit_type", model_type)
        object.__setattr__(self, "_vramkit_path", path)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._vramkit_type  # type: ignore[no-any-return, attr-defined]

    def __getattr__(self, name: str) -> Any:
        with _target(self) as target:
            value = getattr(target, name)
            if isinstance(value, torch.nn.Module) or _holds_modules(value):
                return _child(self, ("attribute", name), value)
            if getattr(value, "__self__", None) is target and callable(value):
                return _method(self, name)
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        with _target(self) as target:
            setattr(target, name, value)

    def __delattr__(self, name: str) -> None:
        with _target(self) as target:
            delattr(target, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model under a lease."""
        with _target(self) as target:
            return _own_result(self, target, target(*args, **kwargs))

    def __getitem__(self, key: Any) -> Any:
        with _target(self) as target:
            value = target[key]
            if isinstance(value, torch.nn.Module):
                return _child(self, ("item", key), value)
            return value

    def __len__(self) -> int:
        with _target(self) as target:
            return len(target)

    def __iter__(self) -> Iterator[Any]:
        with _target(self) as target:
            if isinstance(target, (torch.nn.Sequential, torch.nn.ModuleList)):
                return iter([self[key] for key in range(len(target))])
            return iter(list(target))

    def __contains__(self, item: Any) -> bool:
        with _target(self) as target:
            return item in target

    def __bool__(self) -> bool:
        with _target(self) as target:
            return bool(target)

    def __dir__(self) -> list[str]:
        with _target(self) as target:
            return dir(target)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a handle of the managed model {self._vramkit_source.name!r} cannot be copied or "
            "pickled; take the model itself with manager.lease(name)"
        )

    def __repr__(self) -> str:
        source = self._vramkit_source
        state = "loaded" if source.loaded() else "unloaded"
        path = "".join(
            f".{key}" if kind == "attribute" else f"[{key!r}]" for kind, key in self._vramkit_path
        )
        return f"<handle of {source.name!r}{path}: {self._vramkit_type.__name__}, {state}>"


def _holds_modules(value: Any) -> bool:
    """Whether a plain object (not a method, function or class) leads to modules."""
    plain = hasattr(value, "__dict__") and not callable(getattr(value, "__get__", None))
    if not plain or isinstance(value, type) or hasattr(value, "__self__"):
        return False
    from .model_objects import find_modules

    return bool(find_modules(value))


@contextlib.contextmanager
def _target(handle: ModelHandle) -> Iterator[Any]:
    with handle._vramkit_source.lease() as target:
        for kind, key in handle._vramkit_path:
            target = getattr(target, key) if kind == "attribute" else target[key]
        yield target


def _child(handle: ModelHandle, step: tuple[str, Any], value: Any) -> ModelHandle:
    return ModelHandle(handle._vramkit_source, type(value), (*handle._vramkit_path, step))


def _own_result(handle: ModelHandle, target: Any, result: Any) -> Any:
    return handle if result is target else result


def _method(handle: ModelHandle, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _target(handle) as target:
            return _own_result(handle, target, getattr(target, name)(*args, **kwargs))

    call.__name__ = call.__qualname__ = name
    return call
