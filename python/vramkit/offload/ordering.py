"""Operators that bring a block and let it go from within compiled code.

They say that they write to an activation, and write nothing: that is what keeps them in their
place in the graph, before and after the arithmetic of their module. What a compiler moves past them
reads the store instead of a slot: the same bits. They know their block by a tensor rather than a
number, so that equal blocks can share one graph.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("vramkit_offload", "DEF")
_numbers = itertools.count()
# An operator can be given tensors and numbers only; what they mean is looked up here.
_stations: weakref.WeakValueDictionary[int, Station] = weakref.WeakValueDictionary()


class Station:
    """What happens before a module's forward, and after it."""

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.before, self.after = before, after
        number = next(_numbers)
        self.key = torch.tensor(number)
        _stations[number] = self


def _before(activation: Tensor, key: Tensor) -> None:
    station = _stations.get(int(key))
    if station is not None:
        station.before()


def _after(activation: Tensor, key: Tensor) -> None:
    station = _stations.get(int(key))
    if station is not None:
        station.after()


def _nothing(activation: Tensor, key: Tensor) -> None:
    return None


for _name, _function in (("before", _before), ("after", _after)):
    _library.define(f"{_name}(Tensor(a!) activation, Tensor key) -> ()")
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vramkit_offload::{_name}", _nothing, lib=_library)


def activation_in(values: Any) -> Tensor | None:
    """A tensor that an operator may say it writes to, in arguments or results; None: there is none.

    Not one whose elements lie over each other, as those of `expand` do.
    """
    if isinstance(values, Tensor):
        return values if values.numel() > 0 and 0 not in values.stride() else None
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            found = activation_in(value)
            if found is not None:
                return found
    return None
