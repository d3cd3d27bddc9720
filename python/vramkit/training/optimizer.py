"""AdamW over all parameters in one native pass, for parameters of 16 bits too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._stochastic import check_rounding
from .multi_tensor import _DEVICES, is_dense, signed_seed

Masters = Literal["fp32", "compensated"]
Rounding = Literal["nearest", "stochastic"]

_ops = torch.ops.vramkit
_HALVES = (torch.bfloat16, torch.float16)
_BLOCK = 256


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) in float32, whatever the parameters' dtype.

    ================  =====================================  =========================
    parameters        what is kept beside them               bytes a parameter, state
    ================  =====================================  =========================
    float32           nothing                                4 + 8
    16 bits           ``masters="fp32"``: a float32 master   2 + 4 + 8
    16 bits           ``masters="compensated"``: what        2 + 2 + 8
                      rounding left, in 16 bits (Kahan's
                      compensation: the weight is the sum)
    16 bits           ``masters=None``: nothing              2 + 8
    ================  =====================================  =========================

    Without masters, updates below half a unit in the last place are lost, unless
    ``rounding="stochastic"``: then a weight goes up or down at random, so that its mean is right.
    Random words come from Philox 4x32-10 by seed, step, parameter and element: a run has the same
    bits again with the same seed, on every device, for any number of threads, also where it is
    resumed from a state_dict. Parameters in float32, among them, are not rounded.

    With ``state_bits=8`` the two moments take 2 bytes instead of 8: block-wise dynamic
    quantization with a scale per 256 elements (Dettmers et al. 2022, 8-bit Optimizers).

    The numbers are those of torch.optim.AdamW(fused=True), in the same order of roundings. torch's
    GradScaler may drive it: it hands over its scale, and gradients are not written.

    Args:
        params: Parameters or groups, float32, bfloat16 or float16, on the CPU or on CUDA.
        lr: Learning rate.
        betas: Decay of the two running averages.
        eps: Added to the divisor.
        weight_decay: Decoupled weight decay.
        masters: See above; only for 16-bit parameters.
        state_bits: 32 or 8.
        amsgrad: Divide by the largest average of squares so far (Reddi et al. 2018); 4 bytes more
            a parameter, and only with 32 bits of state.
        maximize: Step up the gradient instead of down.
        rounding: See above; "stochastic" only without masters.
        seed: Of stochastic rounding, from 0 to 2**64 - 1.

    Raises ValueError for numbers out of range, TypeError for parameters of another dtype or device
    and for sparse gradients. A step with an error changes nothing.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> weight.grad = torch.ones(3)
    >>> AdamW([weight], lr=0.5, weight_decay=0.0).step()
    >>> weight.detach()
    tensor([0.5000, 0.5000, 0.5000])
    """

    _step_supports_amp_scaling = True  # what torch's GradScaler asks

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        masters: Masters | None = None,
        state_bits: Literal[32, 8] = 32,
        amsgrad: bool = False,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "masters": masters,
            "state_bits": state_bits,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own.

        Raises ValueError for options that are out of range, TypeError for a dtype or device that
        has no kernel.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(**{key: group[key] for key in self.defaults})
            for p in group["params"]:
                _check(p, group["masters"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, factor: float = 1.0
    ) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Evaluates the model anew and returns the loss, as in torch.
            factor: Each gradient is multiplied by it on the way (`gradient_norm` computes it):
                gradients themselves stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch's GradScaler sets these two for the length of a step.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) != 0:
            return loss
        if grad_scale is not None:
            factor = factor / float(grad_scale)
        first, ready = 0, []
        for group in self.param_groups:  # all of them, before anything changes
            ready.append(self._ready(group, first))
            first += len(group["params"])
        for group, parameters in zip(self.param_groups, ready, strict=True):
            devices: dict[torch.device | None, list[_Ready]] = {}
            for one in parameters:
                on = None if one.parameter.is_cpu else one.parameter.device
                devices.setdefault(on, []).append(one)
            for chosen in devices.values():
                self._update(group, chosen, factor)
        return loss

    def _ready(self, group: dict[str, Any], first: int) -> list[_Ready]:
        """Parameters with their gradients, the latter in the former's order of memory."""
        found = []
        for place, p in enumerate(group["params"], first):
            gradient = p.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise TypeError("AdamW takes dense gradients: use sparse=False in the embedding")
            _check(p, group["masters"])
            alike = p.is_contiguous() and gradient.is_contiguous()
            if not alike and gradient.stride() != p.stride():
                gradient = torch.empty_like(p, dtype=gradient.dtype).copy_(gradient)
            found.append(_Ready(place, p, gradient))
        return found

    def _update(self, group: dict[str, Any], ready: list[_Ready], factor: float) -> None:
        states = [self._state_of(one.parameter, group) for one in ready]
        updated = [one.parameter for one in ready]
        seconds: list[Tensor] = []
        if group["masters"] == "fp32":  # the parameter is the copy
            seconds, updated = updated, [s["master"] for s in states]
        elif group["masters"] == "compensated":
            seconds = [s["remainder"] for s in states]
        lists = [[s[name] for s in states] for name in _STATE[group["state_bits"]]]
        if group["state_bits"] == 32:
            lists.append([s[_LARGEST] for s in states] if group["amsgrad"] else [])
        steps = [s["step"] + 1 for s in states]
        # A row of random words for each step of each parameter.
        rows = [(step << 32) + one.place for step, one in zip(steps, ready, strict=True)]
        run = _ops._multi_adamw_ if group["state_bits"] == 32 else _ops._multi_adamw8_
        run(
            updated,
            [one.gradient for one in ready],
            *lists,
            seconds,
            -factor if group["maximize"] else factor,
            float(group["lr"]),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            steps,
            rows,
            signed_seed(group["seed"]) if group["rounding"] == "stochastic" else None,
        )
        for state in states:
            state["step"] += 1

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state.update(_new_state(p, group))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state. Unlike torch's, tensors of the state keep their dtypes."""
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, which would round masters and moments.
        groups = zip(self.param_groups, state_dict["param_groups"], strict=True)
        for group, saved in groups:
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][key] = value.detach().to(p.device, copy=True)

    def state_bytes(self) -> int:
        """Bytes that the state takes now: moments, masters, remainders."""
        return sum(
            value.numel() * value.element_size()
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )


class _Ready(NamedTuple):
    """A parameter to update; `place` counts through all groups."""

    place: int
    parameter: Tensor
    gradient: Tensor


_LARGEST = "max_exp_avg_sq"
_STATE = {
    32: ("exp_avg", "exp_avg_sq"),
    8: ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"),
}


def _check_options(
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    masters: Masters | None,
    state_bits: int,
    amsgrad: bool,
    maximize: bool,
    rounding: str,
    seed: int,
) -> None:
    if not lr >= 0:
        raise ValueError(f"lr must be 0 or more, not {lr}")
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(f"betas must lie in [0, 1), not {betas}")
    if not eps >= 0 or not weight_decay >= 0:
        raise ValueError(f"eps and weight_decay must be 0 or more, not {eps}, {weight_decay}")
    if masters not in (None, "fp32", "compensated"):
        raise ValueError(f"masters is None, 'fp32' or 'compensated', not {masters!r}")
    if state_bits not in (32, 8):
        raise ValueError(f"state_bits is 32 or 8, not {state_bits}")
    if amsgrad and state_bits == 8:
        raise ValueError("amsgrad takes state_bits=32: the largest averages have no 8-bit form")
    check_rounding(rounding, seed)
    if rounding == "stochastic" and masters is not None:
        raise ValueError(
            f"masters={masters!r} keep what rounding drops already: rounding='stochastic' is "
            "for masters=None"
        )


def _check(p: Tensor, masters: Masters | None) -> None:
    if p.dtype not in (torch.float32, *_HALVES):
        raise TypeError(f"AdamW takes float32, bfloat16 and float16, not {p.dtype}")
    if not p.is_cpu and p.device.type not in _DEVICES:
        raise TypeError(
            f"AdamW runs on {' and '.join(_DEVICES)} in this build, and a parameter is on "
            f"{p.device}: use torch.optim.AdamW(fused=True) there"
        )
    if masters is not None and p.dtype not in _HALVES:
        raise TypeError(
            f"masters={masters!r} is for parameters of 16 bits, and one is {p.dtype}: put it into "
            "a group of its own with masters=None"
        )
    if not is_dense(p):
        raise TypeError("AdamW takes parameters that are dense in memory: call .contiguous()")


def _new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 0}
    if group["state_bits"] == 32:
        for name in (*_STATE[32], *((_LARGEST,) if group["amsgrad"] else ())):
            state[name] = torch.zeros_like(
                p, dtype=torch.float32, memory_format=torch.preserve_format
            )
    else:
        zero = (ZERO_CODE, 0)  # of the signed map, of the unsigned one
        for name, code in zip(_STATE[8][::2], zero, strict=True):
            state[name] = torch.full((p.numel(),), code, dtype=torch.uint8, device=p.device)
            scales = name.replace("codes", "scales")
            state[scales] = torch.zeros(-(-p.numel() // _BLOCK), device=p.device)
    if group["masters"] == "fp32":
        state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
    elif group["masters"] == "compensated":
        state["remainder"] = torch.zeros_like(p)
    return state


ZERO_CODE = 127
"""The code of 0 in the signed dynamic map."""
