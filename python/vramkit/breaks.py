"""Where a model cannot be traced by shapes alone: errors that say where, why, and what to do."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .recorder import Recorder

_INSTEAD = "Measure one real call instead: vramkit.measure.call(model, inputs)"
LARGEST_BYTES = 2**63 - 1


@contextmanager
def explained(recorder: Recorder) -> Iterator[None]:
    """Turns what a traced model raises for want of values or of fake operators into ValueError.

    Errors of the model itself pass through.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        yield
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        GuardOnDataDependentSymNode,
    ) as error:
        raise _needs_values(recorder, error) from error
    except UnsupportedOperatorException as error:
        raise _no_fake(recorder, error) from error
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if "not supported for tensor subclasses" in text:  # what .numpy() says on a fake tensor
            raise _needs_values(recorder, error) from error
        if "no fake impl" in text or "no Meta kernel" in text or "register_fake" in text:
            raise _no_fake(recorder, error) from error
        if "overflow" in text.lower():
            raise ValueError(
                f"a tensor in {_place(recorder)}{_where(error)} would have more than 2**63 bytes "
                f"({_line(error)}); check the shapes of the inputs"
            ) from error
        raise


def _place(recorder: Recorder) -> str:
    return f"module {recorder.place!r}" if recorder.place else "the model's own forward"


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _needs_values(recorder: Recorder, error: Exception) -> ValueError:
    return ValueError(
        f"this model decides by the values of its tensors (in {_place(recorder)}{_where(error)}, "
        f"at {recorder.operator or 'its first operator'}: {_line(error)}), so that it cannot be "
        f"traced by shapes alone. {_INSTEAD}"
    )


def _where(error: Exception) -> str:
    """The innermost line of the model's own code, as the place of an error; empty if unknown."""
    ours = os.path.dirname(os.path.abspath(__file__)) + os.sep
    theirs = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
    found = ""
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not os.path.abspath(file).startswith((ours, theirs)):
            found = f", {file} line {frame.tb_lineno}"
        frame = frame.tb_next
    return found


def _no_fake(recorder: Recorder, error: Exception) -> ValueError:
    return ValueError(
        f"the operator {recorder.operator} (in {_place(recorder)}{_where(error)}) does not say "
        "what shapes it returns: it has no fake implementation. Register one with "
        f"torch.library.register_fake. {_INSTEAD}"
    )


def checked_shape(shape: Sequence[Any], dtype: torch.dtype, name: str) -> tuple[int, ...]:
    """`shape`, if it can be a tensor's.

    ValueError for sizes that are unknown or negative, and beyond 2**63 bytes.
    """
    known = all(isinstance(v, Integral) and not isinstance(v, bool) for v in shape)
    if not known:
        raise ValueError(
            f"the shape {tuple(shape)} of input {name!r} has sizes that are no whole numbers. An "
            "estimate is for one shape: give each size, or several shapes by shapes={name: …}"
        )
    if any(v < 0 for v in shape):
        raise ValueError(f"the shape {tuple(shape)} of input {name!r} has a negative size")
    if math.prod(max(int(v), 1) for v in shape) * dtype.itemsize > LARGEST_BYTES:
        raise ValueError(
            f"the shape {tuple(shape)} of input {name!r} would take more than 2**63 bytes"
        )
    return tuple(int(v) for v in shape)


def checked_sum(nbytes: int) -> None:
    """ValueError for more bytes than can be addressed, though no tensor alone is as large."""
    if nbytes > LARGEST_BYTES:
        raise ValueError(
            f"this call would take {nbytes} bytes, more than 2**63; check the shapes of the inputs"
        )


def known_dtype(dtype: str | torch.dtype, name: str) -> torch.dtype:
    """A dtype by its name; ValueError for what is none."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"the dtype {dtype!r} of input {name!r} is not known; it is torch's, such as 'float32'"
        )
    return found
