"""Converted LSTM, GRU, RNN and their cells against torch's own on the decoded weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import vramkit
from numerics import RECURRENCE
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from vramkit import QuantizedLayer, _core

BUILTIN = [name for name, _ in _core.builtin_formats()]
KINDS = [nn.LSTM, nn.GRU, nn.RNN]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "num_layers": 2},
    {"num_layers": 2, "dropout": 0.4},
]
CASES = [(kind, options) for kind in KINDS for options in OPTIONS] + [
    (nn.LSTM, {"proj_size": 12, "num_layers": 2}),
    (nn.LSTM, {"proj_size": 12, "bidirectional": True, "bias": False}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


def label(case: Any) -> str:
    return f"{case[0].__name__}-{case[1]}"


def pair(kind: Any, options: dict[str, Any], name: str = "int8") -> tuple[nn.Module, nn.Module]:
    """A converted layer, and the plain one with its decoded weights."""
    layer = kind(24, 32, **options)
    vramkit.convert(layer, name)
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(layer, kind)
    plain = copy.deepcopy(layer)
    vramkit.restore(plain, "fp32")
    assert type(plain) is kind
    return layer, plain


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]


def assert_close(mine: Any, theirs: Any, tolerance: float = RECURRENCE) -> None:
    left, right = leaves(mine), leaves(theirs)
    assert [t.shape for t in left] == [t.shape for t in right]
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).detach().abs().max()) <= tolerance * max(
            1.0, float(b.detach().abs().max())
        )


def states(layer: Any, batch: int | None) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    middle = () if batch is None else (batch,)
    h = torch.randn(count, *middle, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(count, *middle, layer.hidden_size)) if layer.mode == "LSTM" else h


@pytest.mark.parametrize("case", CASES, ids=label)
def test_sequences(case: Any) -> None:
    for name in ("int8", "nf4"):
        layer, plain = pair(*case, name)
        for shape, batch in (((5, 5, 24), 5), ((7, 24), None)):
            x = torch.randn(shape)
            hx = states(layer, batch)
            for train in (False, True):
                layer.train(train)
                plain.train(train)
                for given in (None, hx):
                    torch.manual_seed(3)
                    mine = layer(x, given)
                    torch.manual_seed(3)
                    assert_close(mine, plain(x, given))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_packed_sequences(case: Any) -> None:
    layer, plain = pair(*case)
    layer.eval(), plain.eval()
    sequences = [torch.randn(n, 24) for n in (3, 7, 1, 5)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    for hx in (None, states(layer, 4)):
        mine, theirs = layer(packed, hx), plain(packed, hx)
        assert_close(mine, theirs)
        assert torch.equal(mine[0].batch_sizes, theirs[0].batch_sizes)
        assert torch.equal(mine[0].unsorted_indices, theirs[0].unsorted_indices)
    ordered = pack_padded_sequence(torch.randn(6, 3, 24), torch.tensor([6, 4, 1]))
    assert_close(layer(ordered), plain(ordered))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradients(case: Any) -> None:
    layer, plain = pair(*case)
    for parameter in plain.parameters():
        parameter.requires_grad_()
    x = torch.randn(5, 3, 24, requires_grad=True)
    hx = states(layer, 5 if layer.batch_first else 3)
    given = [t.requires_grad_() for t in leaves(hx)]
    found = []
    for one in (layer, plain):
        torch.manual_seed(5)
        out = one(x, hx)
        total = sum(leaf.square().sum() for leaf in leaves(out))
        biases = [p for n, p in one.named_parameters() if n.startswith("bias")]
        found.append(torch.autograd.grad(total, [x, *given, *biases]))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(kind: Any, dtype: torch.dtype) -> None:
    layer, plain = pair(kind, {"num_layers": 2})
    x = torch.randn(4, 2, 24)
    out = layer(x.to(dtype))
    assert {leaf.dtype for leaf in leaves(out)} == {dtype}
    unit = torch.finfo(dtype).eps
    for mine, theirs in zip(leaves(out), leaves(plain(x)), strict=True):
        # Each of 4 steps and 2 layers rounds inputs, weights and gates once or twice.
        assert float((mine.float() - theirs).detach().abs().max()) <= 16 * unit
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {leaf.dtype for leaf in leaves(layer(x))} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_casts_and_restore(kind: Any) -> None:
    layer, plain = pair(kind, {"num_layers": 2, "bidirectional": True})
    x = torch.randn(4, 2, 24)
    expected = leaves(layer(x))[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert torch.equal(leaves(other(x))[0], expected)
    fresh = kind(24, 32, num_layers=2, bidirectional=True)
    vramkit.convert(fresh, "int8")
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(leaves(fresh(x))[0], expected)
    other = copy.deepcopy(layer).bfloat16()
    assert other.weight_ih_l0.dtype == torch.bfloat16
    assert torch.equal(other.float().weight_ih_l0 + 0, layer.weight_ih_l0 + 0)
    vramkit.restore(layer)
    assert type(layer) is kind
    assert list(layer.state_dict()) == list(
        kind(24, 32, num_layers=2, bidirectional=True).state_dict()
    )
    assert all(
        w is getattr(layer, n)
        for w, n in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
    )
    assert_close(layer(x), plain(x))


def test_names_and_lazy_weights() -> None:
    layer = nn.LSTM(24, 32, num_layers=2)
    report = vramkit.convert(layer, {"weight_ih_l0": "nf4", "weight_hh_l1": "int8"})
    assert [(r.name, r.format) for r in report.layers] == [
        ("weight_ih_l0", "nf4"), ("weight_hh_l1", "int8")
    ]  # fmt: skip
    assert set(dict(layer.named_parameters())) >= {"weight_ih_l0_codes", "weight_hh_l1_scales"}
    assert layer.weight_ih_l0.shape == (128, 24)
    assert layer.format_names == "nf4, int8"
    with pytest.raises(vramkit.ReadOnlyWeightError), torch.no_grad():
        layer.weight_ih_l0.zero_()
    new = torch.randn(128, 24)
    vramkit.set_weight(layer, new, "weight_ih_l0")
    assert (layer.weight_ih_l0 - new).norm() < 0.2 * new.norm()
    assert layer(torch.randn(3, 2, 24))[0].shape == (3, 2, 32)
    whole = nn.Sequential(nn.GRU(24, 32))
    assert len(vramkit.convert(whole, {"0": "int8"}).layers) == 2


def test_no_plain_weight_stays_alive() -> None:
    import weakref

    layer = nn.LSTM(24, 32)
    old = weakref.ref(layer.weight_hh_l0)
    vramkit.convert(layer, "int8")
    assert old() is None


def test_wrong_inputs() -> None:
    layer, _ = pair(nn.LSTM, {})
    with pytest.raises(RuntimeError, match="24 features"):
        layer(torch.randn(3, 2, 23))
    with pytest.raises(ValueError, match="2-D or 3-D"):
        layer(torch.randn(24))
    with pytest.raises(RuntimeError, match="initial state of shape"):
        layer(torch.randn(3, 2, 24), (torch.randn(1, 3, 32), torch.randn(1, 2, 32)))
    with pytest.raises(TypeError, match="cast it first"):
        layer(torch.randn(3, 2, 24).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_compiled_fullgraph(kind: Any, options: dict[str, Any]) -> None:
    """Dynamo traces recurrences only where it is told to (`allow_rnn`), of plain layers too."""
    layer, _ = pair(kind, options, "nf4")
    torch._dynamo.reset()
    x = torch.randn(5, 3, 24)
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"nonlinearity": "relu"}], ids=str)
@pytest.mark.parametrize("name", ["int8", "nf4", "bf16"])
def test_cells(kind: Any, options: dict[str, Any], name: str) -> None:
    if "nonlinearity" in options and kind is not nn.RNNCell:
        pytest.skip("RNNCell's own option")
    cell, plain = pair(kind, options, name)
    for shape in ((3, 24), (12, 24), (24,)):
        x = torch.randn(shape, requires_grad=True)
        h = torch.randn(*shape[:-1], 32)
        for hx in (None, (h, h * 0.5) if kind is nn.LSTMCell else h):
            mine, theirs = cell(x, hx), plain(x, hx)
            assert_close(mine, theirs)
            (a,) = torch.autograd.grad(sum(t.sum() for t in leaves(mine)), x)
            (b,) = torch.autograd.grad(sum(t.sum() for t in leaves(theirs)), x)
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    half = cell(torch.randn(2, 24, dtype=torch.bfloat16))
    assert {leaf.dtype for leaf in leaves(half)} == {torch.bfloat16}
    with pytest.raises(RuntimeError, match="expected input"):
        cell(torch.randn(2, 23))
    torch._dynamo.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = torch.randn(3, 24)
        assert_close(compiled(y), cell(y))
