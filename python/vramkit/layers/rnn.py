"""nn.LSTM, GRU, RNN and their cells with their weights in storage formats.

A sequence decodes one layer's weights at a time and gives them to torch's own recurrence; in
formats that quantize activations it runs natively from the stored bytes. A cell multiplies from
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import _VF, Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from .._operators import _product_dtype
from .._operators_int8 import linear_int8
from .._recurrent import STEPS, recurrent_int8, step_by_step
from .base import (
    QuantizedLayer,
    autocast_dtype,
    check_float,
    in_transform,
    no_transform,
    register_kind,
)


class _Recurrent(QuantizedLayer):
    """What sequences and cells share: products with a weight by name, and when all is int8."""

    activation_modes = ("", "int8_dynamic", "llm_int8")

    def _rounds(self) -> bool:
        """Whether activations of any of its products are quantized; refuses what cannot be."""
        rounding = [s.fmt for s in self._stored.values() if s.fmt.activations]
        if rounding and in_transform():
            raise no_transform(rounding[0])
        return len(rounding) > 0

    def _int8_parts(self, names: list[str]) -> tuple[list[Tensor], float] | None:
        """Codes and scales of these weights in turn, and their threshold; None if they differ."""
        if not all(name in self._stored for name in names):
            return None
        formats = [self._stored[name].fmt for name in names]
        modes = {(fmt.activations, fmt.threshold) for fmt in formats}
        if len(modes) != 1 or not formats[0].activations:
            return None
        parts = [self.stored_part(name, part) for name in names for part in ("codes", "scales")]
        return parts, formats[0].threshold

    def _product(self, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if name not in self._stored:
            return functional.linear(x, getattr(self, name).to(x.dtype), bias)
        parts = self.parts_of(name)
        if parts.fmt.activations:
            return linear_int8(
                x, parts.codes, parts.scales, bias, parts.fmt.threshold, "none", parts.shape[0]
            )
        if parts.fmt.storage_dtype == x.dtype == _product_dtype(x):
            return functional.linear(x, parts.codes.view(x.dtype), bias)
        out: Tensor = torch.ops.vramkit.linear(
            x, *parts.arguments, bias, parts.fmt.spec, parts.shape[0]
        )
        return out


class QuantizedRNN(_Recurrent):
    """Mixin of converted nn.LSTM, nn.GRU and nn.RNN: same inputs, outputs and options.

    Inputs are float32, bfloat16 or float16 (or packed sequences of them); outputs and states have
    the input's dtype, or autocast's where it is on. Gradients flow to inputs, initial states and
    biases; until the backward pass of a training step the decoded weights are kept. In formats with
    activations (int8_dynamic, llm_int8) the rows of x and of every state are quantized, products
    are exact int32 and all else float32; gradients then pass straight through the rounding, and the
    backward pass computes the steps again.
    """

    mode: str
    bias: bool
    batch_first: bool
    bidirectional: bool
    num_layers: int
    hidden_size: int
    proj_size: int
    dropout: float
    _flat_weights: list[Any]
    _flat_weights_names: list[str]
    _flat_weight_refs: list[Any]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """(output, final states), as the layer it was."""
        packed = isinstance(input, PackedSequence)
        x, sizes, order, back = input if packed else (input, None, None, None)
        dtype = autocast_dtype(x)
        check_float(x.to(dtype) if x.dtype != dtype else x, f"a converted {self._base.__name__}")
        batched = packed or x.dim() == 3
        if not packed and x.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: expected a 2-D or 3-D input, got {x.dim()}-D")
        if not batched:
            x = x.unsqueeze(0 if self.batch_first else 1)
        states = self._states(x, hx, sizes, order, batched, dtype)
        if not packed and self.batch_first:
            x = x.transpose(0, 1)
        work = torch.float32
        if not self._rounds():
            work = _product_dtype(x.to(dtype) if x.dtype != dtype else x)
        out: Any
        out, finals = self._run(x.to(work), [s.to(work) for s in states], sizes)
        out, finals = out.to(dtype), [s.to(dtype) for s in finals]
        if back is not None:
            finals = [s.index_select(1, back) for s in finals]
        if packed:
            out = PackedSequence(out, sizes, order, back)
        elif self.batch_first:
            out = out.transpose(0, 1)
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            finals = [s.squeeze(1) for s in finals]
        return out, (tuple(finals) if self.mode == "LSTM" else finals[0])

    def _states(
        self, x: Tensor, hx: Any, sizes: Any, order: Any, batched: bool, dtype: torch.dtype
    ) -> list[Tensor]:
        """Initial states, checked and in the batch's order: [h] or, of an LSTM, [h, c]."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        batch = int(sizes[0]) if sizes is not None else x.shape[0 if self.batch_first else 1]
        widths = [self.proj_size or self.hidden_size]
        if self.mode == "LSTM":
            widths.append(self.hidden_size)
        if x.dim() != (2 if sizes is not None else 3) or x.shape[-1] != self._input_size():
            raise RuntimeError(
                f"expected an input of {self._input_size()} features, got {list(x.shape)} "
                f"(a converted {self._base.__name__})"
            )
        if hx is None:
            return [torch.zeros(count, batch, n, dtype=dtype, device=x.device) for n in widths]
        given = list(hx) if self.mode == "LSTM" else [hx]
        states = []
        for state, width in zip(given, widths, strict=True):
            expected = (count, batch, width) if batched else (count, width)
            if tuple(state.shape) != expected:
                raise RuntimeError(
                    f"expected an initial state of shape {expected}, got {tuple(state.shape)}"
                )
            if state.dtype != x.dtype and x.dtype == dtype:
                raise RuntimeError(
                    f"input and initial state differ in dtype ({x.dtype}, {state.dtype})"
                )
            whole = state if batched else state.unsqueeze(1)
            states.append(whole if order is None else whole.index_select(1, order))
        return states

    def _input_size(self) -> int:
        layer: Any = self
        return int(layer.input_size)

    def _run(
        self, x: Tensor, states: list[Tensor], sizes: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers on x, [time, batch, features] or packed; the decoded weights one at a time."""
        directions = 2 if self.bidirectional else 1
        names = self._flat_weights_names
        each = len(names) // self.num_layers
        finals: list[list[Tensor]] = [[] for _ in states]
        for index in range(self.num_layers):
            part = [s[index * directions : (index + 1) * directions] for s in states]
            x, last = self._run_layer(x, part, sizes, names[index * each : (index + 1) * each])
            for found, state in zip(finals, last, strict=True):
                found.append(state)
            if self.dropout and index + 1 < self.num_layers:
                x = functional.dropout(x, self.dropout, self.training)
        return x, [torch.cat(found) for found in finals]

    def _run_layer(
        self, x: Tensor, states: list[Tensor], sizes: Tensor | None, names: list[str]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer, both directions."""
        if any(name in self._stored and self._stored[name].fmt.activations for name in names):
            return self._run_directions(x, states, sizes, names)
        weights = [self._plain(name, x.dtype) for name in names]
        if x.is_cuda:
            self._gather(x, weights)
        state = tuple(states) if self.mode == "LSTM" else states[0]
        run = getattr(_VF, self.mode.lower())
        options = (weights, self.bias, 1, 0.0, self.training, self.bidirectional)
        if sizes is not None:
            out, *last = run(x, sizes, state, *options)
        else:
            out, *last = run(x, state, *options, False)
        return out, tuple(last)

    def _gather(self, x: Tensor, weights: list[Tensor]) -> None:
        """Put the decoded weights of one layer in one run of memory, as cuDNN takes them.

        Otherwise torch copies them there itself, and warns of it, in every call. Not while
        gradients are recorded, which know the tensors as they are.
        """
        recorded = torch.is_grad_enabled() and any(
            t.requires_grad for t in (x, *weights, *self.parameters(recurse=False))
        )
        if recorded or type(x) is not Tensor or torch.compiler.is_compiling():
            return
        if not (torch.backends.cudnn.is_acceptable(x) and torch._use_cudnn_rnn_flatten_weight()):  # type: ignore[attr-defined]
            return
        # Biases are the layer's own parameters, whose memory stays where it is.
        own = {id(p) for p in self.parameters(recurse=False)}
        weights[:] = [w.detach().clone() if id(w) in own else w for w in weights]
        mode = torch.backends.cudnn.rnn.get_cudnn_mode(self.mode)
        each = (4 if self.bias else 2) + (1 if self.proj_size else 0)
        with torch.no_grad(), torch.cuda.device_of(x):
            torch._cudnn_rnn_flatten_weight(  # type: ignore[attr-defined]
                weights,
                each,
                x.shape[-1],
                mode,
                self.hidden_size,
                self.proj_size,
                1,
                False,
                self.bidirectional,
            )

    def _run_directions(
        self, x: Tensor, states: list[Tensor], sizes: Tensor | None, names: list[str]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same where products quantize their inputs, in float32."""
        flat = x.reshape(-1, x.shape[-1])
        steps = None if sizes is None else sizes.tolist()
        each = len(names) // states[0].shape[0]
        outs, finals = [], []
        for index in range(states[0].shape[0]):
            mine = {n.rsplit("_l", 1)[0]: n for n in names[index * each : (index + 1) * each]}
            given = [state[index] for state in states]
            out, last = self._run_direction(flat, given, steps, mine, reverse=index == 1)
            outs.append(out)
            finals.append(last)
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        stacked = tuple(torch.stack(pair) for pair in zip(*finals, strict=True))
        return out.reshape(*x.shape[:-1], out.shape[-1]), stacked

    def _run_direction(
        self,
        x: Tensor,
        states: list[Tensor],
        steps: list[int] | None,
        names: dict[str, str],
        reverse: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One direction; `names` by what they are: weight_ih, weight_hh, weight_hr and biases."""
        weights = [names[n] for n in ("weight_ih", "weight_hh", "weight_hr") if n in names]
        biases = [getattr(self, names[n]) if n in names else None for n in ("bias_ih", "bias_hh")]
        found = self._int8_parts(weights)
        if found is not None:
            parts, threshold = found
            return _run_int8(self.mode, x, steps, states, parts, biases, threshold, reverse)
        if steps is None:
            batch = states[0].shape[0]
            steps = [batch] * (x.shape[0] // max(1, batch))
        products = (
            lambda rows: self._product(rows, weights[0], biases[0]),
            lambda rows: self._product(rows, weights[1], biases[1]),
            (lambda rows: self._product(rows, weights[2], None)) if len(weights) == 3 else None,
        )
        return step_by_step(self.mode, x, steps, states, products, reverse)

    def _plain(self, name: str, dtype: torch.dtype) -> Tensor:
        if name in self._stored:
            return self.dense_weight(dtype, name)
        plain: Tensor = getattr(self, name)
        return plain.to(dtype)

    # torch's class keeps a list of its plain weights beside its parameters.

    def flatten_parameters(self) -> None:
        """Nothing: stored weights are decoded for each call."""

    def _init_flat_weights(self) -> None:
        self._flat_weights = [None] * len(self._flat_weights_names)
        self._flat_weight_refs = [None] * len(self._flat_weights_names)

    def _update_flat_weights(self) -> None:
        self._init_flat_weights()

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)

    def _swapped(self) -> None:
        self._init_flat_weights()

    def _unswapped(self) -> None:
        self._init_flat_weights()  # by now a plain layer's own


class QuantizedLSTM(QuantizedRNN, nn.LSTM):
    """A converted nn.LSTM; see `QuantizedRNN`."""


class QuantizedGRU(QuantizedRNN, nn.GRU):
    """A converted nn.GRU; see `QuantizedRNN`."""


class QuantizedElmanRNN(QuantizedRNN, nn.RNN):
    """A converted nn.RNN; see `QuantizedRNN`."""


class QuantizedCell(_Recurrent):
    """Mixin of converted nn.LSTMCell, nn.GRUCell and nn.RNNCell: one step from packed weights."""

    input_size: int
    hidden_size: int
    bias_ih: Any
    bias_hh: Any

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """The next state of the cell; `input` [batch, input_size] or [input_size]."""
        dtype = autocast_dtype(input)
        x = input.to(dtype)
        name = self._base.__name__
        check_float(x, f"a converted {name}")
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"expected input [batch, {self.input_size}] or [{self.input_size}], got "
                f"{list(x.shape)} (a converted {name})"
            )
        pair = isinstance(self, nn.LSTMCell)
        shape = (*x.shape[:-1], self.hidden_size)
        if hx is None:
            zeros = torch.zeros(shape, dtype=dtype, device=x.device)
            hx = (zeros, zeros) if pair else zeros
        states = [state.to(dtype) for state in (hx if pair else (hx,))]
        for state in states:
            if tuple(state.shape) != shape:
                raise RuntimeError(f"expected a state of shape {shape}, got {tuple(state.shape)}")
        found = self._int8_parts(["weight_ih", "weight_hh"]) if self._rounds() else None
        if found is not None:
            rows = [value.float().reshape(-1, value.shape[-1]) for value in (x, *states)]
            biases = [self.bias_ih, self.bias_hh]
            _, made = _run_int8(self._mode(), rows[0], None, rows[1:], found[0], biases, found[1])
            done = tuple(state.reshape(shape).to(dtype) for state in made)
            return done if pair else done[0]
        # The arithmetic between the products is float32's, as in torch's kernels.
        from_x = self._product(x, "weight_ih", self.bias_ih).float()
        from_h = self._product(states[0], "weight_hh", self.bias_hh).float()
        made = STEPS[self._mode()](from_x, from_h, [state.float() for state in states])
        done = tuple(state.to(dtype) for state in made)
        return done if pair else done[0]

    def _mode(self) -> str:
        if isinstance(self, nn.LSTMCell):
            return "LSTM"
        if isinstance(self, nn.GRUCell):
            return "GRU"
        kind: Any = self
        return f"RNN_{kind.nonlinearity.upper()}"


class QuantizedLSTMCell(QuantizedCell, nn.LSTMCell):
    """A converted nn.LSTMCell; see `QuantizedCell`."""


class QuantizedGRUCell(QuantizedCell, nn.GRUCell):
    """A converted nn.GRUCell; see `QuantizedCell`."""


class QuantizedRNNCell(QuantizedCell, nn.RNNCell):
    """A converted nn.RNNCell; see `QuantizedCell`."""


def _run_int8(
    mode: str,
    x: Tensor,
    steps: list[int] | None,
    states: list[Tensor],
    parts: list[Tensor],
    biases: list[Any],
    threshold: float,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The native recurrence; `parts` are codes and scales of ih, of hh and of a projection."""
    padded = [*parts, *(None,) * (6 - len(parts))]
    both = [*states, *(None,) * (2 - len(states))]
    out, h, c = recurrent_int8(x, steps, *both, *padded, *biases, mode, threshold, reverse)
    return out, ((h, c) if len(states) == 2 else (h,))


for _base, _mixin in (
    (nn.LSTM, QuantizedLSTM),
    (nn.GRU, QuantizedGRU),
    (nn.RNN, QuantizedElmanRNN),
    (nn.LSTMCell, QuantizedLSTMCell),
    (nn.GRUCell, QuantizedGRUCell),
    (nn.RNNCell, QuantizedRNNCell),
):
    register_kind(_base, _mixin, ("weight_*",))
