"""Calibration: what inputs a model's layers see, so that `convert` rounds where it hurts least.

Of each layer only the second moment of its inputs is kept, [in_features, in_features] float32; the
batches themselves are not. `_rounding.py` says what is made of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._operators import StoredParts
from ._rounding import compensate
from .errors import CalibrationError
from .formats import StorageFormat
from .running import Runner, checked
from .sizes import format_size, parse_size

if TYPE_CHECKING:
    from .convert import Candidate, Progress

# By text that was held out of the calibration (docs/calibration.md).
DAMPING = 0.01
PASSES = 2


@dataclass
class Moment:
    """Second moment of one layer's inputs: the mean of x x^T over `rows` input vectors x."""

    total: Tensor
    rows: int = 0

    @property
    def mean(self) -> Tensor:
        """[in_features, in_features], float32."""
        return self.total / max(1, self.rows)


@dataclass
class Calibration:
    """The inputs of a model's Linear layers, collected once, for any number of conversions.

    Attributes:
        moments: By layer name (the first one where layers share a weight).
        damping: Share of the mean input power that every input direction is assumed to have beyond
            what was seen; larger trusts the calibration less.
        passes: Passes of coordinate descent after the first rounding.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> calibration = Calibration.collect(model.eval(), [torch.randn(100, 64)])
    >>> calibration.moments["0"].rows
    100
    """

    moments: dict[str, Moment] = field(default_factory=dict)
    damping: float = DAMPING
    passes: int = PASSES

    def __post_init__(self) -> None:
        if not self.damping >= 0 or self.passes < 0:
            raise ValueError(
                f"damping and passes must not be negative, got {self.damping} and {self.passes}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all moments."""
        return sum(m.total.numel() * m.total.element_size() for m in self.moments.values())

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        layers: Iterable[str] | None = None,
        damping: float = DAMPING,
        passes: int = PASSES,
        progress: bool | Progress = False,
    ) -> Calibration:
        """Run `model` on `batches` and keep the second moment of its Linear layers' inputs.

        Args:
            model: The model before conversion, in eval mode.
            batches: As for `vramkit.compare`: Tensors, tuples or dicts. Text or data like that of
                later use, but not what quality will be measured on. Positions that a batch's
                "attention_mask" [batch, length] masks are not counted.
            layers: Names of the layers to watch; all Linear layers without it.
            damping, passes: See the class.
            progress: True for a progress bar, or a function of (batches done, batches in all or 0,
                "calibrate").

        Raises CalibrationError if an input holds NaN or infinity.
        """
        made = cls(damping=damping, passes=passes)
        wanted = None if layers is None else set(layers)
        found = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and (wanted is None or name in wanted)
        ]
        total = len(batches) if isinstance(batches, Sequence) else 0
        # Not at the top: convert imports this module when it is called.
        from .convert import progress_bar

        runner = Runner(model, None, "model")
        collector = _Collector(made.moments)
        with (
            progress_bar(progress, total, "calibrate", unit="batch") as advance,
            collector.watching(found),
        ):
            for batch in checked(batches):
                collector.mask = mask_of(batch)
                runner.feed(batch)
                collector.last = None
                advance(1, "calibrate")
        for name, moment in made.moments.items():
            if not bool(torch.isfinite(moment.total).all()):
                raise CalibrationError(
                    f"the inputs of layer {name!r} hold NaN or infinity, or are too large to be "
                    "squared in float32; check the calibration batches"
                )
        return made


def mask_of(batch: Any) -> Tensor | None:
    """The positions that count: a batch's "attention_mask" [batch, length] as booleans, or None."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


class _Collector:
    """Adds up x^T x of the inputs that pass by, once for layers that are given the same tensor."""

    def __init__(self, moments: dict[str, Moment]) -> None:
        self.moments = moments
        self.mask: Tensor | None = None
        self.last: tuple[Tensor, int, Tensor, int] | None = None

    @contextmanager
    def watching(self, layers: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else kwargs.get("input")
                if isinstance(x, Tensor):
                    self.add(name, x)

            return hook

        handles = [
            module.register_forward_pre_hook(hook_for(name), with_kwargs=True)
            for name, module in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, name: str, x: Tensor) -> None:
        product, rows = self._product(x)
        moment = self.moments.get(name)
        if moment is None:
            self.moments[name] = Moment(product.clone(), rows)
        else:
            moment.total += product
            moment.rows += rows

    def _product(self, x: Tensor) -> tuple[Tensor, int]:
        # The tensor is held until the next one comes, so that its identity means something.
        if self.last is not None and self.last[0] is x and self.last[1] == x._version:
            return self.last[2], self.last[3]
        rows = x.reshape(-1, x.shape[-1])
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            rows = rows[self.mask.reshape(-1).to(x.device)]
        rows = rows.to(torch.float32)
        product = rows.t() @ rows
        self.last = (x, x._version, product, rows.shape[0])
        return product, rows.shape[0]


def encode_calibrated(
    model: nn.Module,
    chosen: list[tuple[Candidate, StorageFormat]],
    calibration: Calibration | Iterable[Any],
    *,
    memory: str | float,
    done: Callable[[Candidate], None],
) -> tuple[list[tuple[Candidate, StoredParts]], list[tuple[str, str]]]:
    """Encode the weights of `chosen` for the inputs that calibration shows.

    Batches are run once for each group of layers whose moments together fit `memory` (GiB, or a
    string with its unit). Returns the encoded weights and (layer, reason) of those that were
    rounded to nearest; warns of layers that no batch reached.
    """
    encoded: list[tuple[Candidate, StoredParts]] = []
    plain: list[tuple[str, str]] = []
    unreached: list[str] = []
    at_hand = calibration if isinstance(calibration, Calibration) else None
    batches = None if isinstance(calibration, Calibration) else _kept(calibration)
    for group in _groups(chosen, parse_size(memory) if batches is not None else None):
        if batches is not None:
            names = [c.name for c, fmt in group if _reason(c, fmt) is None]
            at_hand = Calibration.collect(model, batches, layers=names) if names else None
        for candidate, fmt in group:
            parts, reason = encode_by(at_hand, candidate, candidate.weight, fmt)
            if reason is not None:
                plain.append((candidate.name, reason))
                if _reason(candidate, fmt) is None:
                    unreached.append(candidate.name)
            encoded.append((candidate, parts))
            done(candidate)
    if unreached:
        warnings.warn(
            f"no calibration batch reached {', '.join(unreached[:5])}"
            + (f" and {len(unreached) - 5} more layers" if len(unreached) > 5 else "")
            + "; their weights are rounded to nearest",
            stacklevel=4,
        )
    return encoded, plain


def encode_by(
    calibration: Calibration | None, candidate: Candidate, weight: Tensor, fmt: StorageFormat
) -> tuple[StoredParts, str | None]:
    """The weight encoded for the inputs that the calibration holds, or why to nearest instead."""
    # Not at the top: convert imports this module when it is called.
    from .convert import encode_candidate

    parts = encode_candidate(candidate, weight, fmt)
    reason = _reason(candidate, fmt)
    moment = None if calibration is None else calibration.moments.get(candidate.name)
    if reason is None and (calibration is None or moment is None or moment.rows == 0):
        reason = "no calibration batch reached it"
    if reason is None and calibration is not None and moment is not None:
        _check_shape(candidate, moment)
        compensate(
            weight, parts, moment.mean, damping=calibration.damping, passes=calibration.passes
        )
    return parts, reason


def _kept(batches: Iterable[Any]) -> Sequence[Any]:
    # Read once for each group of layers, so a generator has to be kept.
    return batches if isinstance(batches, Sequence) else list(checked(batches))


def _reason(candidate: Candidate, fmt: StorageFormat) -> str | None:
    """Why a weight is rounded to nearest even with calibration, or None."""
    if fmt.family == "cast":
        return f"{fmt.name} rounds to nearest"
    if not isinstance(candidate.module, nn.Linear) or candidate.leaf != "weight":
        return f"no calibration for {candidate.kind}"
    return None


def _check_shape(candidate: Candidate, moment: Moment) -> None:
    cols = candidate.weight.shape[1]
    if moment.total.shape != (cols, cols):
        raise CalibrationError(
            f"the calibration of {candidate.name!r} is of {moment.total.shape[0]} input features, "
            f"the layer has {cols}; collect it on this very model"
        )


def _groups(
    chosen: list[tuple[Candidate, StorageFormat]], limit: int | None
) -> Iterator[list[tuple[Candidate, StorageFormat]]]:
    """Runs of layers whose moments fit `limit` bytes together; CalibrationError for one alone."""
    group: list[tuple[Candidate, StorageFormat]] = []
    size = 0
    for candidate, fmt in chosen:
        needed = 0 if _reason(candidate, fmt) else 4 * candidate.weight.shape[1] ** 2
        if limit is not None and needed > limit:
            raise CalibrationError(
                f"the input moment of {candidate.name!r} alone takes {format_size(needed)}, more "
                f"than calibration_memory={format_size(limit)}"
            )
        if limit is not None and group and size + needed > limit:
            yield group
            group, size = [], 0
        group.append((candidate, fmt))
        size += needed
    if group:
        yield group
