"""Loads the native half: the classes of `_core` and the operators of `_ops`."""

from __future__ import annotations

from pathlib import Path

import torch  # first: it brings the symbols that `_ops` binds to

from . import _core

# Beside _core, not beside this file: an editable install keeps the two apart.
torch.ops.load_library(Path(_core.__file__).with_name("_ops.so"))

__all__ = ["_core"]
