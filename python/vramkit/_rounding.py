"""Rounding that compensates errors: from the second moment of a layer's inputs to better codes.

For a layer y = x W^T the expected squared error of y is tr(E H E^T), with E = W - W' the error of
the stored weight and H the second moment of x. Plain rounding minimizes |E|. Here

1. each column is rounded after the errors of the columns before it have been moved into it (GPTQ,
   Frantar et al. 2022, in the form of QuIP's LDLQ, Chee et al. 2023: one factorization, no
   inverse), columns with the largest inputs first;
2. passes of coordinate descent take, for each code in turn, the best one while all others stay, so
   that no pass raises the error.

Scales and zero points stay those of the format's own encoder: the storage does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._operators import StoredParts
from .errors import CalibrationError


def damped(moment: Tensor, damping: float) -> Tensor:
    """`moment` in float64 with `damping` times its mean diagonal added to the diagonal.

    Inputs beyond the calibration's will come: without damping the rounding trusts directions that
    the calibration happened not to show. A column that was always zero gets the mean, so that its
    weights are rounded to nearest.
    """
    wide = moment.to(torch.float64)
    diagonal = wide.diagonal()
    mean = float(diagonal.mean())
    if not bool(torch.isfinite(wide).all()) or float(diagonal.min()) < 0:
        raise CalibrationError(
            "the inputs of this layer hold NaN or infinity, or their second moment overflows; "
            "check the calibration batches"
        )
    wide = wide.clone() if wide is moment else wide
    dead = diagonal == 0
    wide.diagonal()[dead] = mean if mean > 0 else 1.0
    wide.diagonal().add_(damping * mean)
    return wide


def feedback_coefficients(moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(order, first, again) of a damped moment [n, n], for `torch.ops.vramkit._feedback_out`.

    order: int64 [n], columns by falling diagonal. first: float32 [n, n], unit lower triangular;
    row k holds what the errors before it add to column order[k]. again: the same for coordinate
    descent, H[k, j] / H[k, k].
    """
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    backwards = order.flip(0)
    # H = R R^T with R upper triangular is the Cholesky factorization in the opposite order.
    factor, info = torch.linalg.cholesky_ex(moment[backwards][:, backwards])
    if int(info) != 0:
        raise CalibrationError(
            "the second moment of this layer's inputs is not positive definite; "
            "use more calibration data or a larger damping"
        )
    upper = factor.flip(0, 1)
    first = (upper / upper.diagonal()).t().to(torch.float32).contiguous()
    ordered = moment[order][:, order]
    again = (ordered / ordered.diagonal().unsqueeze(1)).to(torch.float32)
    return order, first, again


def compensate(
    weight: Tensor, parts: StoredParts, moment: Tensor, *, damping: float, passes: int
) -> None:
    """Round `weight` [rows, cols] again, into `parts.codes`, for inputs of second moment `moment`.

    Raises CalibrationError where the moment is not finite.

    The rounding runs on the CPU, wherever the weight lies: column after column, it would leave a
    GPU waiting for itself. A weight on CUDA is copied there, and its new codes are copied back.
    """
    host = torch.device("cpu")
    coefficients = feedback_coefficients(damped(moment, damping))
    order, first, again = (part.to(host) for part in coefficients)
    source = weight.detach().reshape(weight.shape[0], -1).to(host, torch.float32).contiguous()
    codes, scales = parts.codes.to(host), parts.scales.to(host)
    extra = None if parts.extra is None else parts.extra.to(host)
    table = parts.fmt.table_on(host)
    for number in range(passes + 1):
        torch.ops.vramkit._feedback_out(
            source,
            again if number else first,
            order,
            scales,
            extra,
            table,
            parts.fmt.spec,
            number > 0,
            codes,
        )
    if codes is not parts.codes:
        parts.codes.copy_(codes)
