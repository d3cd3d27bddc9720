"""nn.LSTM, GRU, RNN and their cells with their weights in storage formats.

A sequence decodes one layer's weights at a time and gives them to torch's own recurrence. A cell
multiplies from the packed bytes. `QuantizedRNN._run_layer` is where a format that quantizes
activations takes over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import _VF, Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from .._operators import _product_dtype
from .base import QuantizedLayer, autocast_dtype, check_float, register_kind


class QuantizedRNN(QuantizedLayer):
    """Mixin of converted nn.LSTM, nn.GRU and nn.RNN: same inputs, outputs and options.

    Inputs are float32, bfloat16 or float16 (or packed sequences of them); outputs and states have
    the input's dtype, or autocast's where it is on. Gradients flow to inputs, initial states and
    biases; until the backward pass of a training step the decoded weights are kept.
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
        """One layer (both directions). Formats with activation modes would be dispatched here."""
        weights = [self._plain(name, x.dtype) for name in names]
        state = tuple(states) if self.mode == "LSTM" else states[0]
        run = getattr(_VF, self.mode.lower())
        options = (weights, self.bias, 1, 0.0, self.training, self.bidirectional)
        if sizes is not None:
            out, *last = run(x, sizes, state, *options)
        else:
            out, *last = run(x, state, *options, False)
        return out, tuple(last)

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


class QuantizedCell(QuantizedLayer):
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
        # The arithmetic between the products is float32's, as in torch's kernels.
        from_x = self._product(x, "weight_ih", self.bias_ih).float()
        from_h = self._product(states[0], "weight_hh", self.bias_hh).float()
        made = self._step(from_x, from_h, [state.float() for state in states])
        done = tuple(state.to(dtype) for state in made)
        return done if pair else done[0]

    def _product(self, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if name not in self._stored:
            return functional.linear(x, getattr(self, name).to(x.dtype), bias)
        parts = self.parts_of(name)
        if parts.fmt.storage_dtype == x.dtype == _product_dtype(x):
            return functional.linear(x, parts.codes.view(x.dtype), bias)
        out: Tensor = torch.ops.vramkit.linear(
            x, *parts.arguments, bias, parts.fmt.spec, parts.shape[0]
        )
        return out

    def _step(self, x: Tensor, h: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        raise NotImplementedError


class QuantizedLSTMCell(QuantizedCell, nn.LSTMCell):
    """A converted nn.LSTMCell; see `QuantizedCell`."""

    def _step(self, x: Tensor, h: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        enter, keep, new, leave = (x + h).chunk(4, -1)
        cell = keep.sigmoid() * states[1] + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * cell.tanh(), cell


class QuantizedGRUCell(QuantizedCell, nn.GRUCell):
    """A converted nn.GRUCell; see `QuantizedCell`."""

    def _step(self, x: Tensor, h: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        (reset_x, keep_x, new_x), (reset_h, keep_h, new_h) = x.chunk(3, -1), h.chunk(3, -1)
        new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
        return (new + (keep_x + keep_h).sigmoid() * (states[0] - new),)


class QuantizedRNNCell(QuantizedCell, nn.RNNCell):
    """A converted nn.RNNCell; see `QuantizedCell`."""

    def _step(self, x: Tensor, h: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        return ((x + h).tanh() if self.nonlinearity == "tanh" else (x + h).relu(),)


for _base, _mixin in (
    (nn.LSTM, QuantizedLSTM),
    (nn.GRU, QuantizedGRU),
    (nn.RNN, QuantizedElmanRNN),
    (nn.LSTMCell, QuantizedLSTMCell),
    (nn.GRUCell, QuantizedGRUCell),
    (nn.RNNCell, QuantizedRNNCell),
):
    register_kind(_base, _mixin, ("weight_*",))
