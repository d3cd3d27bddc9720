"""The exceptions that vramkit raises, each also of the built-in type that a caller expects."""

from __future__ import annotations

import torch


class VramkitError(Exception):
    """Base of every exception that is vramkit's own."""


class CheckpointError(VramkitError, ValueError):
    """A checkpoint that breaks its format, lacks a part, or belongs to another model."""


class BudgetError(VramkitError, ValueError):
    """A memory limit that cannot hold what was asked.

    `needed_bytes` is the smallest number of bytes that would have done.
    """

    def __init__(self, message: str, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class DeviceMemoryError(VramkitError, torch.OutOfMemoryError, MemoryError):
    """A device's memory, or memory made ready for it, that the engine could not have.

    What torch itself allocates, operators' results and workspaces included, raises
    torch.OutOfMemoryError; this is one too. `requested_bytes` is what was asked for.
    """

    def __init__(self, message: str, requested_bytes: int = 0) -> None:
        super().__init__(message)
        self.requested_bytes = requested_bytes


class EventError(VramkitError, ValueError):
    """An event of an allocation trace that cannot be right; `event` is its index."""

    def __init__(self, message: str, event: int) -> None:
        super().__init__(message)
        self.event = event


class FileChangedError(VramkitError, RuntimeError):
    """A file of weights that has changed since it was opened, while it was still read from."""


class NonFiniteWeightError(VramkitError, ValueError):
    """A weight that holds NaN or infinity, or overflows the format it was to be stored in."""


class CalibrationError(VramkitError, ValueError):
    """Calibration data that cannot be used: not finite, or of another model."""


class StaleHandleError(VramkitError, RuntimeError):
    """A handle to a model that its manager has unloaded since."""


class ReadOnlyWeightError(VramkitError, RuntimeError):
    """A write to the `.weight` of a converted layer, which would otherwise be lost in silence."""


class PrecisionConfigError(VramkitError, ValueError):
    """A quantization config that contradicts itself, or asks for what vramkit does not do."""


class PrunedModuleError(VramkitError, RuntimeError):
    """A call of a module whose weights were taken out because a trace never called it."""


class PrecisionUnavailableError(VramkitError, RuntimeError):
    """A precision that a device cannot compute in, or only by emulation."""
