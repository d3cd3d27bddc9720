"""What storing a layer does to the model's output, measured: the costs of a plan by data."""

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


class OutputErrors:
    """Errors of a model's output with one layer at a time in another format.

    The model is called once for each layer and format; its weights are as before after each call.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        output: Output | None,
        calibration: Calibration | None,
    ) -> None:
        self.runner = Runner(model, output, "model")
        self.batches = list(checked(batches))
        self.calibration = calibration
        self.expected = [self._call(batch) for batch in self.batches]
        self.power = sum(float(out.square().sum()) for out in self.expected)
        if not 0.0 < self.power < float("inf"):
            raise CalibrationError(
                "the model's output on these batches holds NaN or infinity, or is all zero: "
                "nothing can be measured by it; check the batches, or pass output="
            )

    def _call(self, batch: Any) -> Tensor:
        out = self.runner.run(batch).to(torch.float64)
        mask = mask_of(batch)
        if mask is not None and out.shape[: mask.dim()] == mask.shape:
            out = out * mask.cpu().reshape(*mask.shape, *[1] * (out.dim() - mask.dim()))
        return out

    def of(self, candidate: Candidate, fmt: StorageFormat) -> float:
        """Squared error of the output with `candidate` alone in `fmt`, relative to the output.

        Of the weight alone: activations stay as they are in formats that quantize them. Infinite
        where the output is no longer finite. Raises CalibrationError for a weight that is computed
        in the forward pass.
        """
        if candidate.folding is not None:
            raise CalibrationError(
                f"{candidate.name!r} is computed by {candidate.folding.kind} in each call, and "
                "cannot be measured; name it in skip=, or plan without batches"
            )
        parameter = candidate.weight
        parts, _ = encode_by(self.calibration, candidate, parameter.detach(), fmt)
        kept = parameter.data
        error = 0.0
        try:
            parameter.data = parts.dense(parameter.dtype).reshape(parameter.shape)
            for batch, expected in zip(self.batches, self.expected, strict=True):
                error += float((self._call(batch) - expected).square().sum())
        finally:
            parameter.data = kept
        return error / self.power if error < float("inf") else float("inf")
