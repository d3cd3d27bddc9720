"""The operator of recurrent layers that quantize their activations, and its single steps.

`recurrent_int8` runs one direction of one layer natively: all time steps of x are multiplied at
once, then each step multiplies the state and computes the gates. Its backward pass runs the same
again as `step_by_step`, from operators that have gradients; nothing but the inputs is kept for it.

On CUDA x goes through the product of a linear layer; the steps are launches in a row, with the same
bits as on the CPU and no waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native  # noqa: F401  (defines the schemas)
from ._native import HAS_CUDA_OPERATORS
from ._operators import _library, unobserved
from ._operators_int8 import (
    consecutive,
    cuda_workspace_bytes,
    product_bytes,
    run_linear_int8,
)
from ._operators_int8 import workspace_bytes as rows_bytes

_ops = torch.ops.vramkit
# The values of cpu::Recurrence, by torch's names for them, and how many gates each has.
MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

Product = Callable[[Tensor], Tensor]
Projection = Callable[[Tensor], Tensor] | None


def lstm_step(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(h, c) after a step, from what the products of x and h gave."""
    enter, keep, new, leave = (x + h).chunk(4, -1)
    cell = keep.sigmoid() * states[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def gru_step(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(h,) after a step."""
    (reset_x, keep_x, new_x), (reset_h, keep_h, new_h) = x.chunk(3, -1), h.chunk(3, -1)
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (new + (keep_x + keep_h).sigmoid() * (states[0] - new),)


def tanh_step(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(h,) after a step."""
    return ((x + h).tanh(),)


def relu_step(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(h,) after a step."""
    return ((x + h).relu(),)


STEPS = {"LSTM": lstm_step, "GRU": gru_step, "RNN_TANH": tanh_step, "RNN_RELU": relu_step}


def step_by_step(
    mode: str,
    x: Tensor,
    sizes: Sequence[int],
    states: Sequence[Tensor],
    products: tuple[Product, Product, Projection],
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One direction of one layer from differentiable operators; (outputs, final states).

    x: [rows, features], the steps one after the other, `sizes` rows each (never more than the step
    before); states: [batch, …] each; products: of x, of h, and of the projection or None.
    """
    of_x, of_h, project = products
    step = STEPS[mode]
    parts = of_x(x).split(list(sizes))
    outs: list[Tensor | None] = [None] * len(sizes)
    now = list(states)
    for index in range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes)):
        size = sizes[index]
        live = [state[:size] for state in now]
        made = list(step(parts[index], of_h(live[0]), live))
        if project is not None:
            made[0] = project(made[0])
        outs[index] = made[0]
        # Sequences that are through keep their last state, or wait with their first.
        now = [
            new if size == old.shape[0] else torch.cat((new, old[size:]))
            for new, old in zip(made, now, strict=True)
        ]
    found = [out for out in outs if out is not None]
    whole = torch.cat(found) if found else x.new_empty(0, states[0].shape[1])
    return whole, tuple(now)


def workspace_bytes(
    rows: int,
    features: int,
    batch: int,
    units: int,
    state: int,
    gates: int,
    threshold: float,
) -> int:
    """Bytes that a call holds besides inputs and outputs; as in csrc/ops/recurrent.cpp."""

    def aligned(count: int) -> int:
        return (count + 63) // 64 * 64

    sums = aligned(rows * gates * units * 4) + aligned(batch * gates * units * 4)
    full = aligned(batch * units * 4) if state < units or threshold > 0 else 0
    return (
        sums
        + full
        + max(
            rows_bytes(rows, features, threshold), rows_bytes(batch, max(units, state), threshold)
        )
    )


def steps_bytes(batch: int, units: int, projects: bool, threshold: float) -> int:
    """Bytes that the steps hold on CUDA; as in csrc/cuda/ops/recurrent.cpp."""
    full = -(-batch * units * 4 // 16) * 16 if projects or threshold > 0 else 0
    return full + cuda_workspace_bytes(batch, units, threshold)


def workspace_of(args: Sequence[Any]) -> int:
    """The same of an operator's arguments."""
    x, h, ih_codes, mode, threshold = args[0], args[2], args[4], args[12], args[13]
    gates = GATES[mode]
    units = ih_codes.shape[0] // gates
    if x.device.type == "cuda":
        width = ih_codes.shape[0]
        return x.shape[0] * width * 4 + max(
            product_bytes(x.shape[0], x.shape[1], width, float(threshold), "cuda"),
            steps_bytes(h.shape[0], units, args[8] is not None, float(threshold)),
        )
    return workspace_bytes(
        x.shape[0], x.shape[1], h.shape[0], units, h.shape[1], gates, float(threshold)
    )


def run_recurrent_int8(
    x: Tensor,
    steps: Sequence[int] | None,
    h: Tensor,
    c: Tensor | None,
    ih_codes: Tensor,
    ih_scales: Tensor,
    hh_codes: Tensor,
    hh_scales: Tensor,
    hr_codes: Tensor | None,
    hr_scales: Tensor | None,
    ih_bias: Tensor | None,
    hh_bias: Tensor | None,
    mode: str,
    threshold: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [rows, state], final h and final c (empty but of an LSTM), all float32.

    x: float32 [rows, features], the rows of each time step together; `steps` says how many rows
    each step has, never more than the one before; None that all have the batch's. h: [batch,
    state]; c: [batch, units]. Codes and scales are those of int8 weights, by row; hr_codes are an
    LSTM's projection. Rows of x and of each state are quantized by their own absmax; `threshold` is
    LLM.int8's, 0 for none.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; the recurrences are: {', '.join(MODES)}")
    given = [t for t in (x, h, c) if t is not None]
    if any(t.dtype != torch.float32 or t.dim() != 2 for t in given) or (mode == "LSTM") != (
        c is not None
    ):
        raise TypeError(
            f"recurrent_int8 ({mode}) takes float32 matrices x and h, and c of an LSTM only; got "
            + ", ".join(f"{t.dtype} {list(t.shape)}" for t in given)
        )
    units = ih_codes.shape[0] // GATES[mode]
    state = h.clone(memory_format=torch.contiguous_format)
    cell = x.new_empty(0) if c is None else c.clone(memory_format=torch.contiguous_format)
    out = x.new_empty((x.shape[0], h.shape[1]))
    matrix = consecutive(x)
    sizes = None if steps is None else torch.tensor(steps, dtype=torch.int64, device="cpu")
    batch, width = h.shape
    if x.is_cuda:
        from_x = run_linear_int8(
            matrix, ih_codes, ih_scales, ih_bias, threshold, "none", ih_codes.shape[0]
        )
        held = steps_bytes(batch, units, hr_codes is not None, float(threshold))
        workspace = torch.empty(held, dtype=torch.uint8, device=x.device)
        _ops._recurrent_int8_steps_out(
            from_x, sizes, hh_codes, hh_scales, hr_codes, hr_scales, _wide(hh_bias),
            MODES.index(mode), threshold, reverse, state, cell, workspace, out,
        )  # fmt: skip
        return out, state, cell
    size = workspace_bytes(
        x.shape[0], x.shape[1], batch, units, width, GATES[mode], float(threshold)
    )
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    _ops._recurrent_int8_out(
        matrix, sizes, ih_codes, ih_scales, hh_codes, hh_scales, hr_codes, hr_scales,
        _wide(ih_bias), _wide(hh_bias), MODES.index(mode), threshold, reverse, state, cell,
        workspace, out,
    )  # fmt: skip
    return out, state, cell


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


for _key in ("CPU", "CUDA") if HAS_CUDA_OPERATORS else ("CPU",):
    _library.impl("recurrent_int8", run_recurrent_int8, _key)


@torch.library.register_fake("vramkit::recurrent_int8")
def _(x: Tensor, steps: Sequence[int] | None, h: Tensor, c: Tensor | None, *_: Any) -> Any:
    cell = x.new_empty(0) if c is None else c.new_empty(c.shape)
    return x.new_empty((x.shape[0], h.shape[1])), h.new_empty(h.shape), cell


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], *inputs[2:12])
    ctx.steps = inputs[1]
    ctx.mode, ctx.threshold, ctx.reverse = inputs[12:]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Runs the steps again, one by one: straight through the rounding of x and of the states."""
    x, *others = ctx.saved_tensors
    tensors = [x, ctx.steps, *others]
    wanted = [index for index in (0, 2, 3, 10, 11) if ctx.needs_input_grad[index]]
    with torch.enable_grad():
        for index in wanted:
            tensors[index] = tensors[index].detach().requires_grad_()
        out, finals = _again(tensors, ctx.mode, ctx.threshold, ctx.reverse)
        pairs = [
            (value, grad)
            for value, grad in zip((out, *finals), grads, strict=False)
            if grad is not None and value.requires_grad
        ]
        found = torch.autograd.grad(
            [value for value, _ in pairs],
            [tensors[index] for index in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
    result: list[Tensor | None] = [None] * 15
    for index, grad in zip(wanted, found, strict=True):
        result[index] = grad
    return tuple(result)


def _again(
    tensors: Sequence[Any], mode: str, threshold: float, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, steps, h, c, ih, ih_scales, hh, hh_scales, hr, hr_scales, ih_bias, hh_bias = tensors
    batch = h.shape[0]
    sizes = [batch] * (x.shape[0] // batch if batch else 0) if steps is None else steps

    def product(codes: Tensor, scales: Tensor, bias: Tensor | None) -> Product:
        def call(rows: Tensor) -> Tensor:
            out: Tensor = _ops.linear_int8(
                rows, codes, scales, bias, threshold, "none", codes.shape[0]
            )
            return out

        return call

    products = (
        product(ih, ih_scales, ih_bias),
        product(hh, hh_scales, hh_bias),
        None if hr is None else product(hr, hr_scales, None),
    )
    return step_by_step(mode, x, sizes, [h] if c is None else [h, c], products, reverse)


torch.library.register_autograd(
    "vramkit::recurrent_int8", _backward, setup_context=_save_for_backward, lib=_library
)


def recurrent_int8(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.vramkit.recurrent_int8`, without its dispatch where nothing looks on."""
    tensors = (value for value in args[1:] if isinstance(value, Tensor))
    run = run_recurrent_int8 if unobserved(args[0], *tensors) else _ops.recurrent_int8
    out: tuple[Tensor, Tensor, Tensor] = run(*args)
    return out
