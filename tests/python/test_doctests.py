"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
import vramkit

MODULES = [
    info.name
    for info in pkgutil.walk_packages(vramkit.__path__, "vramkit.")
    if not info.name.rpartition(".")[2].startswith("_")
]


@pytest.mark.parametrize("name", ["vramkit", *MODULES])
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(
        module, extraglobs={"torch": torch, "vramkit": vramkit}, optionflags=doctest.ELLIPSIS
    )
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(t.examples) for m in modules for t in finder.find(m)) >= 10
