"""Loss scaling that adapts: fp16 gradients neither vanish nor overflow."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .multi_tensor import GradientNorm, gradient_norm, scale_
from .optimizer import AdamW


class StepReport(NamedTuple):
    """What became of one step."""

    stepped: bool
    """Whether every optimizer stepped; False where gradients overflowed."""
    norm: float
    """The largest gradient norm of the optimizers, before clipping; inf where one overflowed."""
    scale: float
    """The loss scale that this step's gradients had."""


class AdaptiveGradScaler:
    """Scales losses so that fp16 gradients fit, and steps optimizers whose gradients are finite.

    The rule is torch.amp.GradScaler's: a step with an infinity or NaN is skipped and the scale
    multiplied by `backoff_factor`; after `growth_interval` good steps in a row it is multiplied by
    `growth_factor`. Beyond torch's: parameters of 16 bits (no unscaling pass is needed, see
    `vramkit.training.AdamW`), clipping in the same pass, and a switch to bfloat16, which needs no
    scale, where float16 keeps overflowing.

    Args:
        init_scale: The first scale.
        growth_factor: Above 1.
        backoff_factor: Between 0 and 1.
        growth_interval: Good steps before the scale grows.
        bf16_after: After so many overflows in a row, switch to bfloat16: `precision` becomes
            "bf16", the scale 1 for good, `on_switch` is called, and a warning says so. None: never.
        on_switch: Called without arguments at the switch.
        enabled: False makes the scale 1 and skips nothing but overflows.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> scaler = AdaptiveGradScaler()
    >>> scaler.scale_and_step(optimizer, model(torch.ones(1, 2)).square().mean(), clip=1.0).stepped
    True
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 100,
        *,
        bf16_after: int | None = None,
        on_switch: Callable[[], None] | None = None,
        enabled: bool = True,
    ) -> None:
        if not (init_scale > 0 and math.isfinite(init_scale)):
            raise ValueError(f"init_scale is positive and finite, not {init_scale}")
        if not growth_factor > 1:
            raise ValueError(f"growth_factor is above 1, not {growth_factor}")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor lies between 0 and 1, not {backoff_factor}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval is 1 or more, not {growth_interval}")
        if bf16_after is not None and bf16_after < 1:
            raise ValueError(f"bf16_after is 1 or more, or None, not {bf16_after}")
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.bf16_after = bf16_after
        self.on_switch = on_switch
        self.enabled = enabled
        self.precision = "fp16"
        self.skipped = 0
        """Steps skipped so far."""
        self.overflows_in_a_row = 0
        self._scale = float(init_scale) if enabled else 1.0
        self._good_steps = 0

    def get_scale(self) -> float:
        """The scale that the next loss is multiplied by."""
        return self._scale

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale. FloatingPointError for a loss that is inf or NaN already."""
        if not bool(torch.isfinite(loss.detach()).all()):
            raise FloatingPointError(
                f"the loss is {loss.detach().float().max().item()} before it is scaled: no scale "
                "mends that; look for overflow in the forward pass (bf16, or float32 for the loss: "
                "vramkit.training.stable_mse_loss). Nothing was changed"
            )
        # In float32: a float16 loss times the scale would overflow.
        return (loss.float() if loss.dtype == torch.float16 else loss) * self._scale

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those that are there (gradient accumulation)."""
        self.scale(loss).backward()  # type: ignore[no-untyped-call]

    def scale_and_step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loss: Tensor,
        clip: float | None = None,
    ) -> StepReport:
        """Backward of the scaled loss, then a step of each optimizer whose gradients are finite.

        Gradients are not set to zero, before or after.

        Args:
            optimizer: One or several; each is skipped for its own gradients alone.
            loss: A scalar.
            clip: The largest L2 norm of each optimizer's gradients; None for no limit.

        Raises FloatingPointError for a loss that is not finite, RuntimeError where an optimizer has
        no gradient after the backward pass, ValueError for a `clip` that is not positive.
        Parameters, scale and optimizers are unchanged then; the first and the last leave gradients
        so too.
        """
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is the largest norm allowed, above 0, not {clip}")
        self.backward(loss)
        return self.step(optimizer, clip)

    def step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        clip: float | None = None,
    ) -> StepReport:
        """Step with the gradients that `backward` left, then adapt the scale."""
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else [*optimizer]
        gradients = [_gradients(one) for one in optimizers]
        for one, found in zip(optimizers, gradients, strict=True):
            if not found:
                raise RuntimeError(
                    f"{type(one).__name__} has no gradients to step with: was the loss computed "
                    "from its parameters, and are they those of the model? Nothing was changed"
                )
        norms = [gradient_norm(found, scale=self._scale, clip=clip) for found in gradients]
        scale = self._scale
        for one, found, norm in zip(optimizers, gradients, norms, strict=True):
            if norm.finite:
                _step(one, found, norm)
        stepped = all(norm.finite for norm in norms)
        self._update(stepped)
        return StepReport(stepped, max(norm.norm for norm in norms), scale)

    def _update(self, good: bool) -> None:
        if not good:
            self.skipped += 1
            self.overflows_in_a_row += 1
            self._good_steps = 0
            if self.enabled:
                self._scale *= self.backoff_factor
            if self.bf16_after is not None and self.overflows_in_a_row >= self.bf16_after:
                self._switch()
            return
        self.overflows_in_a_row = 0
        self._good_steps += 1
        if self.enabled and self._good_steps == self.growth_interval:
            grown = self._scale * self.growth_factor
            if grown <= torch.finfo(torch.float32).max:
                self._scale = grown
            self._good_steps = 0

    def _switch(self) -> None:
        if self.precision == "bf16":
            return
        self.precision = "bf16"
        self.enabled = False
        self._scale = 1.0
        warnings.warn(
            f"{self.overflows_in_a_row} steps in a row overflowed in float16: switched to "
            "bfloat16, which needs no loss scale",
            RuntimeWarning,
            stacklevel=4,
        )
        if self.on_switch is not None:
            self.on_switch()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs."""
        return {
            "scale": self._scale,
            "good_steps": self._good_steps,
            "skipped": self.skipped,
            "overflows_in_a_row": self.overflows_in_a_row,
            "precision": self.precision,
            "enabled": self.enabled,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. ValueError names what it lacks; nothing is changed then."""
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"not the state of an AdaptiveGradScaler: it lacks {missing}")
        self._scale = float(state["scale"])
        self._good_steps = int(state["good_steps"])
        for name in set(state) - {"scale", "good_steps"}:
            if hasattr(self, name):
                setattr(self, name, state[name])


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]


def _step(optimizer: Any, gradients: Iterable[Tensor], norm: GradientNorm) -> None:
    """A step with the factor on the way where the optimizer can, else after a pass of its own."""
    if isinstance(optimizer, AdamW):
        optimizer.step(factor=norm.factor)
        return
    if getattr(optimizer, "_step_supports_amp_scaling", False) and norm.factor > 0:
        # torch's protocol between GradScaler and fused optimizers: the gradients are divided.
        device = next(iter(gradients)).device
        with contextlib.ExitStack() as stack:
            optimizer.grad_scale = torch.tensor(1.0 / norm.factor, device=device)
            optimizer.found_inf = torch.zeros((), device=device)
            stack.callback(delattr, optimizer, "found_inf")
            stack.callback(delattr, optimizer, "grad_scale")
            optimizer.step()
        return
    scale_(gradients, norm.factor)
    optimizer.step()
