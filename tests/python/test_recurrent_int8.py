"""LSTM, GRU, RNN and their cells in int8_dynamic and llm_int8.

A single step is held against float64 on the same rounded rows. All else is built from single steps
in other ways and must come out the same, bit for bit: rows do not know of each other, and sums are
exact.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from numerics import RECURRENCE
from test_cuda import DEVICES
from test_int8 import rounded_rows as rounded_or_nan
from test_rnn import CASES, label, leaves, states
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.utils.rnn import pack_sequence
from vramkit import QuantizedLayer
from vramkit._operators import encode, workspace_bytes
from vramkit._recurrent import GATES
from vramkit.estimator import estimate

ops = torch.ops.vramkit
INT8 = vramkit.get_format("int8")
MODES = list(GATES)


def stored(rows: int, cols: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales and the decoded weight, about as large as torch initializes them."""
    parts = encode((torch.rand(rows, cols) * 2 - 1) / cols**0.5, INT8)
    codes, scales = parts.codes.to(device), parts.scales.to(device)
    return codes, scales, codes.view(torch.int8).double() * scales.view(torch.float32).double()


def rounded_rows(x: Tensor, threshold: float = 0.0) -> Tensor:
    """The same, and zero where a row of zeros has no factor."""
    return torch.where(x == 0, 0.0, rounded_or_nan(x, threshold))


def gates(mode: str, x: Tensor, h: Tensor, old: list[Tensor]) -> list[Tensor]:
    """torch's documented formulas, in the dtype given."""
    if mode == "LSTM":
        i, f, g, o = (x + h).chunk(4, -1)
        c = torch.sigmoid(f) * old[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(c), c]
    if mode == "GRU":
        (rx, zx, nx), (rh, zh, nh) = x.chunk(3, -1), h.chunk(3, -1)
        z = torch.sigmoid(zx + zh)
        n = torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        return [(1 - z) * n + z * old[0]]
    return [torch.tanh(x + h) if mode == "RNN_TANH" else torch.relu(x + h)]


def close(mine: Tensor, theirs: Tensor, size: float = 1.0) -> None:
    assert mine.shape == theirs.shape
    error = float((mine.double() - theirs).abs().max()) if mine.numel() else 0.0
    assert error <= RECURRENCE * max(1.0, size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [0.0, 6.0, 0.7], ids=str)
@pytest.mark.parametrize("projects", [False, True])
def test_one_step_against_float64(mode: str, threshold: float, projects: bool, device: str) -> None:
    if projects and mode != "LSTM":
        pytest.skip("an LSTM's own option")
    for batch, features, units in ((1, 1, 1), (1, 24, 32), (5, 33, 65), (70, 40, 130), (3, 7, 17)):
        state = max(1, units // 2) if projects else units
        ih, hh = (stored(GATES[mode] * units, n, device) for n in (features, state))
        hr = stored(state, units, device) if projects else None
        biases = [torch.randn(GATES[mode] * units).to(device) for _ in range(2)]
        x = torch.randn(batch, features).to(device)
        h = (torch.rand(batch, state) * 2 - 1).to(device)
        if threshold:
            x[0, 0] = 9.0
        c = torch.randn(batch, units).to(device) if mode == "LSTM" else None
        out, new_h, new_c = ops.recurrent_int8(
            x, None, h, c, *ih[:2], *hh[:2], *(hr[:2] if hr else (None, None)), *biases, mode,
            threshold, False,
        )  # fmt: skip
        from_x = rounded_rows(x, threshold) @ ih[2].t() + biases[0].double()
        from_h = rounded_rows(h, threshold) @ hh[2].t() + biases[1].double()
        old = [h.double()] + ([c.double()] if c is not None else [])
        expected = gates(mode, from_x, from_h, old)
        size = float(from_x.abs().max() + from_h.abs().max())
        assert torch.equal(out, new_h)
        if c is not None:
            close(new_c, expected[1], size)
        if hr is None:
            close(new_h, expected[0], size)
        else:
            # The state before the projection is not to be seen; it is rounded from its float32
            # value, which may lie on the other side of a step: 1 / 127 of its absmax.
            full = expected[0]
            step = full.abs().amax(-1, keepdim=True) / 127
            room = 0.51 * step * hr[2].abs().sum(-1)[None] + RECURRENCE * size
            assert ((new_h - full @ hr[2].t()).abs() <= room).all()


def test_the_reference_can_fail() -> None:
    ih, hh = stored(64, 8), stored(64, 16)
    x, h, c = torch.randn(2, 8), torch.rand(2, 16), torch.randn(2, 16)
    ih[0][3, 2] ^= 4
    args = (x, None, h, c, *ih[:2], *hh[:2], None, None, None, None, "LSTM", 0.0, False)
    expected = gates(
        "LSTM", rounded_rows(x) @ ih[2].t(), rounded_rows(h) @ hh[2].t(), [h.double(), c.double()]
    )
    with pytest.raises(AssertionError):
        close(ops.recurrent_int8(*args)[1], expected[0])


def by_hand(layer: Any, x: Tensor, given: list[Tensor]) -> list[Tensor]:
    """One sequence [time, features] through all layers, step by step; [out, finals …]."""
    finals: list[list[Tensor]] = [[] for _ in given]
    directions = 2 if layer.bidirectional else 1
    threshold = layer.storage_format.threshold
    for index in range(layer.num_layers):
        outs = []
        for direction in range(directions):
            end = f"_l{index}" + "_reverse" * direction
            parts = [
                layer.stored_part(name + end, part)
                for name in ("weight_ih", "weight_hh", "weight_hr")[: 3 if layer.proj_size else 2]
                for part in ("codes", "scales")
            ]
            parts += [None] * (6 - len(parts))
            biases = [
                getattr(layer, name + end) if layer.bias else None
                for name in ("bias_ih", "bias_hh")
            ]
            at = index * directions + direction
            h, c = given[0][at], given[1][at] if len(given) == 2 else None
            steps = []
            for row in x.flip(0) if direction else x:
                out, h, new_c = ops.recurrent_int8(
                    row[None], None, h, c, *parts, *biases, layer.mode, threshold, False
                )
                c = None if c is None else new_c
                steps.append(out)
            outs.append(torch.cat(steps[::-1] if direction else steps))
            finals[0].append(h)
            if c is not None:
                finals[1].append(c)
        x = torch.cat(outs, -1)
    return [x, *(torch.stack(f) for f in finals)]


@pytest.fixture(autouse=True)
def _grad_off() -> Any:
    with torch.no_grad():
        yield


def converted(kind: Any, options: dict[str, Any], name: str = "int8_dynamic") -> Any:
    layer = kind(24, 32, **options)
    report = vramkit.convert(layer, name)
    assert report.layers
    assert {r.format for r in report.layers} == {name}
    assert isinstance(layer, QuantizedLayer)
    return layer.eval()


def on(device: str, value: Any) -> Any:
    """Tensors of any structure there."""
    return torch.utils._pytree.tree_map(lambda t: t.to(device), value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_sequences_are_their_steps(case: Any, device: str) -> None:
    layer = converted(*case).to(device)
    x = torch.randn(5, 3, 24).to(device)
    ours = x.transpose(0, 1).contiguous() if layer.batch_first else x
    hx = on(device, states(layer, 3))
    for given in (None, hx):
        first = given if given is not None else torch.utils._pytree.tree_map(torch.zeros_like, hx)
        found = leaves(layer(ours, given))
        if layer.batch_first:
            found[0] = found[0].transpose(0, 1)
        for b in range(3):
            expected = by_hand(layer, x[:, b], [s[:, b : b + 1] for s in leaves(first)])
            assert torch.equal(found[0][:, b], expected[0])
            for mine, theirs in zip(found[1:], expected[1:], strict=True):
                assert torch.equal(mine[:, b], theirs[:, 0])
        alone = leaves(layer(x[:, 1], None if given is None else _pick(given, 1)))
        assert all(torch.equal(a, f[:, 1]) for a, f in zip(alone, found, strict=True))


def _pick(value: Any, b: int) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t[:, b], value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_packed_sequences_are_their_sequences(case: Any, device: str) -> None:
    layer = converted(*case).to(device)
    layer.batch_first = False
    sequences = [torch.randn(n, 24).to(device) for n in (3, 7, 1, 5)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    hx = on(device, states(layer, 4))
    for given in (None, hx):
        out, last = layer(packed, given)
        whole, lengths = nn.utils.rnn.pad_packed_sequence(out)
        for b, sequence in enumerate(sequences):
            expected = leaves(layer(sequence, None if given is None else _pick(given, b)))
            assert int(lengths[b]) == len(sequence)
            assert torch.equal(whole[: len(sequence), b], expected[0])
            for mine, theirs in zip(leaves(last), expected[1:], strict=True):
                assert torch.equal(mine[:, b], theirs)


def straight(x: Tensor) -> Tensor:
    """Rounded rows that gradients pass as if they were not."""
    return x + (rounded_rows(x.detach()).to(x.dtype) - x).detach()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
@torch.enable_grad()
def test_gradients_pass_straight_through(kind: Any, bidirectional: bool) -> None:
    layer = converted(kind, {"bidirectional": bidirectional, "num_layers": 2}).train()
    x = torch.randn(4, 3, 24, requires_grad=True)
    given = [t.requires_grad_() for t in leaves(states(layer, 3))]
    biases = [p for n, p in layer.named_parameters() if n.startswith("bias")]
    hx = tuple(given) if layer.mode == "LSTM" else given[0]
    found = layer(x, hx)
    total = sum(leaf.square().sum() for leaf in leaves(found))
    mine = torch.autograd.grad(total, [x, *given, *biases])
    # The same from torch's formulas, by hand.
    rows: Any = x
    finals: list[list[Tensor]] = [[] for _ in given]
    for index in range(2):
        outs = []
        for direction in range(2 if bidirectional else 1):
            end = f"_l{index}" + "_reverse" * direction
            ih, hh = (
                layer.dense_weight(torch.float32, n + end) for n in ("weight_ih", "weight_hh")
            )
            now = [s[index * (2 if bidirectional else 1) + direction] for s in given]
            steps = []
            for row in reversed(list(rows)) if direction else list(rows):
                from_x = straight(row) @ ih.t() + getattr(layer, "bias_ih" + end)
                from_h = straight(now[0]) @ hh.t() + getattr(layer, "bias_hh" + end)
                now = gates(layer.mode, from_x, from_h, now)
                steps.append(now[0])
            outs.append(torch.stack(steps[::-1] if direction else steps))
            for place, state in zip(finals, now, strict=True):
                place.append(state)
        rows = torch.cat(outs, -1)
    total = rows.square().sum() + sum(torch.stack(f).square().sum() for f in finals)
    theirs = torch.autograd.grad(total, [x, *given, *biases])
    for a, b in zip(mine, theirs, strict=True):
        assert float((a - b).norm()) <= 2e-3 * float(b.norm())


@torch.enable_grad()
def test_gradients_of_packed_sequences_and_twice() -> None:
    layer = converted(nn.GRU, {})
    sequences = [torch.randn(n, 24, requires_grad=True) for n in (4, 2)]
    layer(pack_sequence(sequences))[0].data.square().sum().backward()
    for sequence in sequences:
        alone = sequence.detach().requires_grad_()
        layer(alone)[0].square().sum().backward()
        assert torch.allclose(sequence.grad, alone.grad, atol=1e-5)
    out = layer(sequences[0])[0].square().sum()
    (first,) = torch.autograd.grad(out, sequences[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@torch.enable_grad()
def test_opcheck(mode: str, device: str) -> None:
    ih, hh = stored(GATES[mode] * 20, 12, device), stored(GATES[mode] * 20, 20, device)
    x, h = (torch.randn(shape).to(device).requires_grad_() for shape in ((6, 12), (2, 20)))
    c = torch.randn(2, 20).to(device).requires_grad_() if mode == "LSTM" else None
    bias = torch.randn(GATES[mode] * 20).to(device).requires_grad_()
    for steps, threshold in ((None, 0.0), ([2, 2, 1, 1], 2.0)):
        for reverse in (False, True):
            args = (
                x, steps, h, c, *ih[:2], *hh[:2], None, None, bias, None, mode, threshold, reverse,
            )  # fmt: skip
            opcheck(ops.recurrent_int8.default, args)


def test_low_precision_and_autocast() -> None:
    for kind in (nn.LSTM, nn.GRU):
        layer = converted(kind, {"num_layers": 2})
        x = torch.randn(4, 2, 24)
        for dtype in (torch.bfloat16, torch.float16):
            half = leaves(layer(x.to(dtype)))
            assert {leaf.dtype for leaf in half} == {dtype}
            # Everything inside is float32: only the ends are rounded.
            for mine, theirs in zip(half, leaves(layer(x.to(dtype).float())), strict=True):
                assert torch.equal(mine, theirs.to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert {leaf.dtype for leaf in leaves(layer(x))} == {torch.bfloat16}


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device: str) -> None:
    layer = converted(nn.LSTM, {}).to(device)
    x = torch.randn(4, 3, 24).to(device)
    clean, _ = layer(x)
    x[1, 0, 5] = torch.nan
    x[2, 1, 6] = torch.inf
    out, (h, _) = layer(x)
    assert out[1:, 0].isnan().all()
    assert out[2:, 1].isnan().all()
    assert h[0, :2].isnan().all()
    assert torch.equal(out[:, 2], clean[:, 2])
    assert torch.equal(out[0], clean[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("name", ["int8_dynamic", "llm_int8", "llm_int8@2.5"])
def test_like_any_converted_layer(kind: Any, name: str, tmp_path: Path) -> None:
    layer = converted(kind, {"num_layers": 2, "bidirectional": True}, name)
    plain = copy.deepcopy(layer)
    vramkit.restore(plain, "fp32")
    x = torch.randn(6, 4, 24) * 2
    out = layer(x)[0]
    expected, _ = plain(x)
    error = float((out - expected).norm() / expected.norm())
    assert 0 < error < 0.03  # 8 bits of activations, about 1 % a product
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], out)
    vramkit.save(layer, tmp_path / "m")
    again = vramkit.load(tmp_path / "m", factory=lambda: kind(24, 32, 2, bidirectional=True))
    assert again.format_names == name
    assert torch.equal(again(x)[0], out)
    assert "int8" in vramkit.describe(layer)[0].kernel
    assert vramkit.describe(layer)[0].compute_dtype == "int8; the input's outside"
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], out)
    with torch.enable_grad():  # the dispatcher's way
        assert torch.equal(layer(x)[0], out)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda v: layer(v)[0])(x[None])


def test_formats_may_differ() -> None:
    layer = nn.LSTM(24, 32, num_layers=2, proj_size=8)
    vramkit.convert(
        layer,
        {"weight_ih_l0": "int8_dynamic", "weight_hh_l0": "nf4", "weight_ih_l1": "llm_int8",
         "weight_hr_l1": "int8_dynamic"},
    )  # fmt: skip
    plain = copy.deepcopy(layer)
    vramkit.restore(plain, "fp32")
    x = torch.randn(6, 4, 24)
    out, expected = layer(x)[0], plain(x)[0]
    assert 0 < float((out - expected).norm() / expected.norm()) < 0.03
    packed = pack_sequence([x[:, 0], x[:3, 1]])
    mine, _ = nn.utils.rnn.pad_packed_sequence(layer(packed)[0])
    assert torch.allclose(mine[:, 0], layer(x[:, 0])[0], atol=1e-6)
    assert torch.allclose(mine[:3, 1], layer(x[:3, 1])[0], atol=1e-6)


def test_dropout_between_layers() -> None:
    layer = converted(nn.GRU, {"num_layers": 2, "dropout": 0.5})
    x = torch.randn(5, 2, 24)
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"nonlinearity": "relu"}], ids=str)
@pytest.mark.parametrize("name", ["int8_dynamic", "llm_int8"])
@torch.enable_grad()
def test_cells(kind: Any, options: dict[str, Any], name: str) -> None:
    if "nonlinearity" in options and kind is not nn.RNNCell:
        pytest.skip("RNNCell's own option")
    cell = kind(24, 32, **options)
    vramkit.convert(cell, name)
    mode = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}.get(kind) or (
        f"RNN_{options.get('nonlinearity', 'tanh').upper()}"
    )
    ih, hh = (cell.dense_weight(torch.float32, n).double() for n in ("weight_ih", "weight_hh"))
    for shape in ((3, 24), (80, 24), (24,)):
        x = torch.randn(shape, requires_grad=True)
        h = torch.randn(*shape[:-1], 32)
        for hx in (None, (h, h * 0.5) if kind is nn.LSTMCell else h):
            made = leaves(cell(x, hx))
            zero = torch.zeros_like(h)
            old = [zero, zero] if hx is None else leaves(hx)
            at = [t.detach().reshape(-1, t.shape[-1]) for t in (x, *old)]
            added = [0 if b is None else b.detach().double() for b in (cell.bias_ih, cell.bias_hh)]
            expected = gates(
                mode,
                rounded_rows(at[0]) @ ih.t() + added[0],
                rounded_rows(at[1]) @ hh.t() + added[1],
                [t.double() for t in at[1:]],
            )
            for mine, theirs in zip(made, expected, strict=True):
                close(mine.detach().reshape(theirs.shape), theirs, 4.0)
            (grad,) = torch.autograd.grad(sum(t.sum() for t in made), x)
            assert grad.shape == x.shape
            assert float(grad.abs().sum()) > 0
    torch._dynamo.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = torch.randn(3, 24)
        assert all(
            torch.equal(a, b) for a, b in zip(leaves(compiled(y)), leaves(cell(y)), strict=True)
        )


def test_wrong_calls() -> None:
    layer = converted(nn.LSTM, {})
    with pytest.raises(RuntimeError, match="24 features"):
        layer(torch.randn(3, 2, 23))
    with pytest.raises(TypeError, match="cast it first"):
        layer(torch.randn(3, 2, 24).double())
    ih, hh = stored(32, 4), stored(32, 8)
    x, h = torch.randn(3, 4), torch.randn(1, 8)
    rest = (*ih[:2], *hh[:2], None, None, None, None)
    with pytest.raises(ValueError, match="RNN_TANH"):
        ops.recurrent_int8(x, None, h, None, *rest, "rnn", 0.0, False)
    with pytest.raises(TypeError, match="c of an LSTM only"):
        ops.recurrent_int8(x, None, h, None, *rest, "LSTM", 0.0, False)
    with pytest.raises(RuntimeError, match="no multiple of the batch"):
        ops.recurrent_int8(x, None, h.repeat(2, 1), h.repeat(2, 1), *rest, "LSTM", 0.0, False)
    for steps in ([1, 2], [1, 1]):
        with pytest.raises(RuntimeError, match="sizes of steps"):
            ops.recurrent_int8(x, steps, h.repeat(2, 1), h.repeat(2, 1), *rest, "LSTM", 0.0, False)


def test_the_estimate_knows_the_workspace() -> None:
    layer = converted(nn.LSTM, {})
    x = torch.randn(7, 5, 24)
    parts = [layer.stored_part(n, p) for n in ("weight_ih_l0", "weight_hh_l0")
             for p in ("codes", "scales")]  # fmt: skip
    args = (x.flatten(0, 1), None, torch.zeros(5, 32), torch.zeros(5, 32), *parts, None, None, None,
            None, "LSTM", 0.0, False)  # fmt: skip
    sums = 35 * 128 * 4 + 5 * 128 * 4
    # Rows of 24 and of 32 bytes take 64 each, an absmax and a sum; those of x are the most.
    assert workspace_bytes("recurrent_int8", args) == sums + 35 * (64 + 4 + 4)
    found = estimate(nn.Sequential(nn.LSTM(24, 32)), precision="int8_dynamic", inputs=x)
    assert found.activations_bytes >= sums + 35 * 32 * 4


def test_memory_is_not_kept_for_the_backward_pass() -> None:
    layer = converted(nn.LSTM, {})
    x = torch.randn(50, 8, 24, requires_grad=True)
    kept: set[int] = set()
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in kept:
            kept.add(tensor.data_ptr())
            sizes.append(tensor.nbytes)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)[0].sum()
    stored_bytes = sum(p.nbytes for p in layer.parameters())
    assert sum(sizes) <= stored_bytes + x.nbytes + 4 * 8 * 32 * 4
