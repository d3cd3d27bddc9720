"""What storing a layer does to the model's output, measured with that layer alone stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration, encode_by, mask_of
from .convert import Candidate
from .errors import CalibrationError
from .formats import StorageFormat
from .running import Output, Runner, checked
from .sensitivity_store import Store, digest_of

# Elements whose squares are summed in float64 at once.
_CHUNK = 1 << 20


def squared_sum(first: Tensor, second: Tensor | None = None) -> float:
    """Sum of squares of a tensor, or of the difference of two, in float64, a part at a time."""
    total = 0.0
    a = first.reshape(-1)
    b = None if second is None else second.reshape(-1)
    for start in range(0, a.numel(), _CHUNK):
        part = a[start : start + _CHUNK].to(torch.float64)
        if b is not None:
            part -= b[start : start + _CHUNK]
        total += float(part.square_().sum())
    return total


def masked(out: Tensor, mask: Tensor | None) -> Tensor:
    """`out` with zeros at positions [batch, length] that do not count."""
    if mask is None or out.shape[: mask.dim()] != mask.shape:
        return out
    wide = mask.to(out.device).reshape(*mask.shape, *[1] * (out.dim() - mask.dim()))
    return out.where(wide, torch.zeros((), dtype=out.dtype, device=out.device))


def refuse_folded(candidate: Candidate) -> None:
    """CalibrationError for a weight that is computed in the forward pass."""
    if candidate.folding is not None:
        raise CalibrationError(
            f"{candidate.name!r} is computed by {candidate.folding.kind} in each call, and "
            "cannot be measured; name it in skip=, or plan without batches"
        )


class OutputErrors:
    """Errors of a model's output with one layer at a time in another format.

    The model is called once for each layer and format that `store` does not know; its weights are
    as before after each call.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        output: Output | None,
        calibration: Calibration | None,
        store: Store | None = None,
    ) -> None:
        self.runner = Runner(model, output, "model")
        self.batches = list(checked(batches))
        self.calibration, self.store = calibration, store
        # A copy: a model may return what it overwrites in its next call.
        self.expected = [self._call(batch).clone() for batch in self.batches]
        self.power = sum(squared_sum(out) for out in self.expected)
        if not 0.0 < self.power < float("inf"):
            raise CalibrationError(
                "the model's output on these batches holds NaN or infinity, or is all zero: "
                "nothing can be measured by it; check the batches, or pass output="
            )
        self.digest = ""
        if store is not None:
            moments = None
            if calibration is not None:
                kept = {name: m.mean for name, m in calibration.moments.items()}
                moments = (kept, calibration.damping, calibration.passes)
            # The expected outputs tell what `output` does, which has no content of its own.
            self.digest = digest_of(model, self.batches, self.expected, moments)

    def _call(self, batch: Any) -> Tensor:
        return masked(self.runner.run(batch), mask_of(batch))

    def of(self, candidate: Candidate, fmt: StorageFormat) -> float:
        """Squared error of the output with `candidate` alone in `fmt`, relative to the output.

        Of the weight alone: activations stay as they are in formats that quantize them. Infinite
        where the output is no longer finite. Raises CalibrationError for a weight that is computed
        in the forward pass.
        """
        refuse_folded(candidate)
        from . import __version__

        key = digest_of("output", __version__, self.digest, candidate.full_name, fmt)
        if self.store is not None:
            known = self.store.get(key, 1)
            if known is not None:
                return known[0]
        error = self._measured(candidate, fmt)
        if self.store is not None:
            self.store.put(key, [error])
        return error

    def _measured(self, candidate: Candidate, fmt: StorageFormat) -> float:
        parameter = candidate.weight
        parts, _ = encode_by(self.calibration, candidate, parameter.detach(), fmt)
        kept = parameter.data
        error = 0.0
        try:
            parameter.data = parts.dense(parameter.dtype).reshape(parameter.shape)
            for batch, expected in zip(self.batches, self.expected, strict=True):
                error += squared_sum(self._call(batch), expected)
        finally:
            parameter.data = kept
        return error / self.power if error < float("inf") else float("inf")
