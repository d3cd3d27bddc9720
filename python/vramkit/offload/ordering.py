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

    def __init__(
        self, before: Callable[[], None], after: Callable[[Sequence[Tensor]], None]
    ) -> None:
        self.before, self.after = before, after  # `after` is told the results
        number = next(_numbers)
        self.key = torch.tensor(number)
        _stations[number] = self


def _before(activation: Tensor, key: Tensor) -> None:
    station = _stations.get(int(key))
    if station is not None:
        station.before()


def _after(results: Sequence[Tensor], key: Tensor) -> None:
    station = _stations.get(int(key))
    if station is not None:
        station.after(results)


def _nothing(activation: Any, key: Tensor) -> None:
    return None


_library.define("before(Tensor(a!) activation, Tensor key) -> ()")
_library.define("after(Tensor(a!)[] results, Tensor key) -> ()")
for _name, _function in (("before", _before), ("after", _after)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vramkit_offload::{_name}", _nothing, lib=_library)


def activations_in(values: Any) -> list[Tensor]:
    """Tensors that an operator may say it writes to, in arguments or results.

    Not those whose elements lie over each other, as those of `expand` do.
    """
    if isinstance(values, Tensor):
        return [values] if values.numel() > 0 and 0 not in values.stride() else []
    if isinstance(values, Mapping):
        values = tuple(values.values())
    found: list[Tensor] = []
    if isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            for tensor in activations_in(value):
                if not any(tensor is other for other in found):
                    found.append(tensor)
    return found
