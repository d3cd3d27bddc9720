"""Loads the native half: the classes of `_core`, the operators of `_ops` and `_ops_cuda`."""

from __future__ import annotations

from pathlib import Path

import torch  # first: it brings the symbols that `_ops` binds to

from . import _core

# Beside _core, not beside this file: an editable install keeps the two apart.
_operators = Path(_core.__file__).with_name("_ops.so")
torch.ops.load_library(_operators)

_cuda_operators = _operators.with_name("_ops_cuda.so")
# Built with a CUDA compiler, and of use beside a torch with CUDA. Needs no GPU, nor a driver.
HAS_CUDA_OPERATORS = torch.version.cuda is not None and _cuda_operators.exists()
if HAS_CUDA_OPERATORS:
    torch.ops.load_library(_cuda_operators)

__all__ = ["HAS_CUDA_OPERATORS", "_core"]
