"""Parameters of every name: experts, raw ones, ties, folding, bags, and what stays plain."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit import QuantizedLayer, _core
from vramkit._operators import StoredParts
from vramkit.formats import StorageFormat

BUILTIN = [name for name, _ in _core.builtin_formats()]


class Stack(nn.Module):
    """Raw parameters: a stack of matrices, a table, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(5, 48, 96))
        self.table = nn.Parameter(torch.randn(300, 64))
        self.scale = nn.Parameter(torch.ones(96))
        self.small = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, k: int) -> Tensor:
        made: Tensor = x @ self.heads[k] * self.scale
        return made


def decoded(model: nn.Module, name: str) -> Tensor:
    assert isinstance(model, QuantizedLayer)
    return model.dense_weight(name=name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements that were decoded, call by call."""
    seen: list[int] = []
    for method in ("dense", "dense_slice", "gather"):
        plain = getattr(StoredParts, method)

        def count(self: Any, *args: Any, plain: Any = plain) -> Tensor:
            out: Tensor = plain(self, *args)
            seen.append(out.numel())
            return out

        monkeypatch.setattr(StoredParts, method, count)
    return seen


@pytest.mark.parametrize("name", BUILTIN)
def test_raw_parameters(name: str) -> None:
    model = Stack()
    report = vramkit.convert(model, name)
    assert [r.name for r in report.layers] == ["heads", "table"]
    assert {r.kind for r in report.layers} == {"Stack"}
    assert set(dict(model.named_parameters())) >= {"heads_codes", "table_codes", "scale", "small"}
    assert isinstance(model, Stack)
    assert "format=" in repr(model)
    heads, x = decoded(model, "heads"), torch.randn(3, 48)
    # Every row of every matrix has scales of its own: no outlier of one is felt in another.
    plain = Stack()
    plain.heads.data[0, 0, 0] = 1e4 if name != "nf4_dq" else 1.0  # whose scales share an offset
    rest = plain.heads.detach().clone()[1:]
    vramkit.convert(plain, name)
    error = float((decoded(plain, "heads")[1:] - rest).norm() / rest.norm())
    assert error < 0.2
    for k in (0, 4, -1):
        assert torch.equal(model(x, k), x @ heads[k] * model.scale)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, 2), model(x, 2))
        assert type(other) is type(model)
    fresh = Stack()
    vramkit.convert(fresh, name)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x, 2), model(x, 2))
    model.to(torch.bfloat16)
    assert model.heads.dtype == torch.bfloat16
    assert torch.equal(decoded(model.float(), "heads"), heads)
    vramkit.restore(model)
    assert type(model) is Stack
    assert torch.equal(model.heads, heads)
    assert list(model.state_dict()) == ["heads", "table", "scale", "small"]


@pytest.mark.parametrize("name", ["int8", "nf4", "nf4_dq", "int4"])
def test_only_what_is_read_is_decoded(name: str, counted: list[int]) -> None:
    model = Stack()
    vramkit.convert(model, name)
    heads, table = decoded(model, "heads"), decoded(model, "table")
    reads: list[tuple[Any, Any, int]] = [
        (lambda w: w[3] + 0, heads[3], 48 * 96),
        (lambda w: w[-2].t() + 0, heads[-2].t(), 48 * 96),
        (lambda w: w[1:3] * 1, heads[1:3], 2 * 48 * 96),
        (lambda w: w[2, 5] + 0, heads[2, 5], 48 * 96),
        (lambda w: w[torch.tensor([4, 0, -1])], heads[[4, 0, -1]], 3 * 48 * 96),
        (lambda w: w.index_select(0, torch.tensor([1])), heads[1:2], 48 * 96),
        (lambda w: w.unbind(0)[1] + 0, heads[1], 48 * 96),
        (lambda w: w.chunk(3)[2] + 0, heads.chunk(3)[2], 48 * 96),
    ]
    for read, expected, count in reads:
        counted.clear()
        assert torch.equal(read(model.heads), expected)
        assert sum(counted) == count
    counted.clear()
    ids = torch.tensor([[7, 7], [0, 299]])
    assert torch.equal(nn.functional.embedding(ids, model.table), table[ids])
    assert sum(counted) == 4 * 64
    counted.clear()
    assert model.heads.transpose(1, 2).shape == (5, 96, 48)
    assert counted == []


def test_writes_through_views_raise() -> None:
    model = Stack()
    vramkit.convert(model, "int8")
    with pytest.raises(vramkit.ReadOnlyWeightError), torch.no_grad():
        model.heads[1].zero_()
    with pytest.raises(vramkit.ReadOnlyWeightError), torch.no_grad():
        model.table.add_(1)
    with vramkit.writable(), torch.no_grad():
        model.table.zero_()
    assert float(decoded(model, "table").abs().max()) == 0
    new = torch.randn(5, 48, 96)
    vramkit.set_weight(model, new, "heads")
    assert (decoded(model, "heads") - new).norm() < 0.01 * new.norm()
    model.table = nn.Parameter(torch.ones(300, 64))
    assert "table" not in model._parameters
    assert torch.equal(decoded(model, "table"), torch.ones(300, 64))


def test_which_parameters() -> None:
    def names(**options: Any) -> list[str]:
        return [r.name for r in vramkit.convert(Stack(), "int8", **options).layers]

    assert names(parameters=False) == []
    assert names(parameters=["small"]) == ["small"]
    assert names(parameters=["h*", "table"]) == ["heads", "table"]
    assert names(skip=["heads"]) == ["table"]
    with pytest.raises(ValueError, match="'nothing'"):
        names(parameters=["nothing"])
    with pytest.raises(TypeError, match="not one string"):
        names(parameters="heads")
    report = vramkit.convert(Stack(), {"heads": "nf4"})
    assert [(r.name, r.format) for r in report.layers] == [("heads", "nf4")]
    reasons = {n: why for n, why, _ in vramkit.convert(Stack(), "int8").left_out}
    assert "16384" in reasons["small"]
    assert reasons["scale"] == "Stack stays plain"


def experts(kind: str, implementation: str) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    base = {
        "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128,
    }  # fmt: skip
    if kind == "mixtral":
        config = transformers.MixtralConfig(**base, num_local_experts=4)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.GptOssConfig(
            **base, num_local_experts=4, num_experts_per_tok=2, head_dim=16
        )
        model = transformers.GptOssForCausalLM(config)
    model.set_experts_implementation(implementation)
    return model.eval(), model.model.layers[0].mlp.experts


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["int8", "nf4", "int4", "nf4_dq"])
def test_experts(kind: str, implementation: str, name: str, counted: list[int]) -> None:
    model, layer = experts(kind, implementation)
    vramkit.convert(model, name)
    assert {"gate_up_proj_codes", "down_proj_codes"} <= set(dict(layer.named_parameters()))
    assert isinstance(layer, QuantizedLayer)
    plain = copy.deepcopy(model)
    vramkit.restore(plain, "fp32")
    for length in (1, 30):
        ids = torch.randint(100, (1, length))
        counted.clear()
        with torch.no_grad():
            mine, theirs = model(ids).logits, plain(ids).logits
        # The same products summed in another order, a few layers deep.
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        if implementation != "batched_mm":
            assert max(counted, default=0) < layer.gate_up_proj.numel()
    embedded = torch.randn(1, 6, 64, requires_grad=True)
    grads = [
        torch.autograd.grad(m(inputs_embeds=embedded).logits.square().sum(), embedded)[0]
        for m in (model, plain)
    ]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))


def test_ties_across_kinds_of_layers(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(200, 96)
            self.bag = nn.EmbeddingBag(200, 96)
            self.head = nn.Linear(96, 200, bias=False)
            self.raw = self.words.weight
            self.bag.weight = self.head.weight = self.words.weight
            self.one, self.two = nn.LSTM(96, 96), nn.LSTM(96, 96)
            self.two.weight_hh_l0 = self.one.weight_hh_l0

    model = Tied()
    report = vramkit.convert(model, "int8")
    names = [r.name for r in report.layers]
    assert names == ["words", "one.weight_ih_l0", "one.weight_hh_l0", "two.weight_ih_l0"]
    for codes in (model.bag.codes, model.head.codes, model.raw_codes):
        assert codes is model.words.codes
    assert model.two.weight_hh_l0_codes is model.one.weight_hh_l0_codes
    vramkit.save(model, tmp_path)
    loaded = vramkit.load(tmp_path, factory=Tied)
    assert loaded.raw_codes is loaded.bag.codes is loaded.words.codes
    assert loaded.two.weight_hh_l0_codes is loaded.one.weight_hh_l0_codes
    vramkit.restore(model)
    assert model.raw is model.words.weight is model.head.weight is model.bag.weight
    assert model.two.weight_hh_l0 is model.one.weight_hh_l0
    assert model.two._flat_weights[1] is model.one.weight_hh_l0


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("features", [(20, 24), (24, 20), (24, 24)], ids=str)
def test_folding_orthogonal(kind: str, features: tuple[int, int]) -> None:
    orthogonal = nn.utils.parametrizations.orthogonal
    model = nn.Sequential(
        orthogonal(nn.Linear(*features), orthogonal_map=kind),
        nn.Unflatten(1, (1, features[1])),
        orthogonal(nn.Conv1d(1, 8, 5), orthogonal_map=kind),
    )
    x = torch.randn(3, features[0])
    with torch.no_grad():
        expected = model(x)
        estimated = vramkit.estimate(model, "bf16").weights_bytes
        report = vramkit.convert(model, "bf16")
        assert [name for name, _ in report.folded] == ["0", "2"]
        assert estimated == report.bytes
        # Two weights, each off by at most 2^-9 of itself.
        assert float((model(x) - expected).norm() / expected.norm()) < 2.0**-7


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
@torch.no_grad()
def test_folding(norm: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(norm(nn.Conv1d(32, 48, 5)), nn.ReLU(), norm(nn.Linear(20, 24)))

    with torch.enable_grad():
        assert vramkit.estimate(build(), "bf16").weights_bytes > 0
    model = build().eval()
    with torch.no_grad():
        model(torch.randn(2, 32, 24))  # old hooks compute anew, without a graph that bars copies
    kept, kept_classes = copy.deepcopy(model), [type(m) for m in model]
    x = torch.randn(2, 32, 24)
    with torch.no_grad():
        expected = model(x)
    estimated = vramkit.estimate(model, "bf16")
    assert [type(m) for m in model] == kept_classes
    assert torch.equal(model(x), expected)
    report = vramkit.convert(model, "bf16")
    assert [name for name, _ in report.folded] == ["0", "2"]
    assert "folded" in str(report)
    assert report.coverage_bytes_fraction > 0.95
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == report.bytes
    assert estimated.weights_bytes == report.bytes
    assert set(model.state_dict()) == {
        "0.codes",
        "0.bias",
        "2.codes",
        "2.bias",
        "0.scales",
        "2.scales",
    }
    # Each weight is off by at most 2^-9 of itself.
    assert float((model(x) - expected).norm() / expected.norm()) < 2.0**-8
    assert torch.equal(kept(x), expected)  # a copy made before keeps its norm
    vramkit.save(model, tmp_path / "a")
    assert torch.equal(vramkit.load(tmp_path / "a", factory=build)(x), model(x))
    vramkit.restore(model)
    assert type(model[0]) is nn.Conv1d
    assert list(model[0].state_dict()) == ["weight", "bias"]

    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in kept.state_dict().items()}, tmp_path / "b.safetensors")
    loaded = vramkit.load(tmp_path / "b.safetensors", precision="bf16", factory=build)
    assert isinstance(loaded[0], QuantizedLayer)
    assert torch.equal(loaded(x), vramkit.load(tmp_path / "a", factory=build)(x))
    vramkit.convert_checkpoint(tmp_path / "b.safetensors", tmp_path / "c", "bf16", factory=build)
    assert torch.equal(vramkit.load(tmp_path / "c", factory=build)(x), loaded(x))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_embedding_bags(mode: str, padding: int | None, name: str) -> None:
    for last in (False, True):
        bag = nn.EmbeddingBag(
            50, 64, mode=mode, padding_idx=padding, include_last_offset=last
        )  # fmt: skip
        vramkit.convert(bag, name)
        plain = copy.deepcopy(bag)
        vramkit.restore(plain)
        assert type(plain) is nn.EmbeddingBag
        flat = torch.tensor([1, 3, 3, 7, 49, 0, 3])
        offsets = torch.tensor([0, 2, 2, 5] + ([7] if last else []))
        ids = torch.randint(50, (4, 3))
        for args in ((flat, offsets), (ids,), (ids.int(),), (flat.int(), offsets.int())):
            assert torch.equal(bag(*args), plain(*args))
        if mode == "sum":
            weights = torch.randn(7, requires_grad=True)
            mine = bag(flat, offsets, weights)
            assert torch.allclose(mine, plain(flat, offsets, weights), atol=1e-6)
            assert torch.autograd.grad(mine.sum(), weights)[0].isfinite().all()
    with pytest.raises(IndexError, match="50 rows"):
        bag(torch.tensor([[50]]))


@pytest.mark.parametrize("name", ["int8", "nf4", "bf16"])
def test_bilinear(name: str) -> None:
    layer = nn.Bilinear(24, 40, 12)
    vramkit.convert(layer, name)
    plain = copy.deepcopy(layer)
    vramkit.restore(plain)
    a, b = torch.randn(3, 24, requires_grad=True), torch.randn(3, 40, requires_grad=True)
    mine, theirs = layer(a, b), plain(a, b)
    assert torch.equal(mine, theirs)
    for left, right in zip(
        torch.autograd.grad(mine.sum(), (a, b)), torch.autograd.grad(theirs.sum(), (a, b)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(left, right)
    assert layer(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16


def test_activation_modes_leave_other_layers_plain() -> None:
    """A format that quantizes activations is for layers that have a kernel for it."""
    base = vramkit.get_format("int8")
    fmt = StorageFormat("int8_activations", base.native)
    object.__setattr__(fmt, "activations", "int8_dynamic")
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv1d(32, 32, 3), nn.LSTM(32, 32))
    report = vramkit.convert(model, fmt)
    assert [r.name for r in report.layers] == ["0", "2.weight_ih_l0", "2.weight_hh_l0"]
    reasons = {n: why for n, why, _ in report.left_out}
    assert "quantizes activations, which Conv1d has no kernel for" in reasons["1.weight"]


def test_what_stays_plain() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.randn(1024, 16))
            self.norm = nn.LayerNorm([64, 512])

    model = nn.ModuleDict({
        "mixer": Mixer(), "lazy": nn.LazyLinear(8),
        "script": torch.jit.script(nn.Linear(8, 8)),
    })  # fmt: skip
    report = vramkit.convert(model, "int8")
    assert report.layers == []
    reasons = {n: why for n, why, _ in report.left_out}
    assert reasons["mixer.A_log"] == "sensitive: exponents stay plain"
    assert reasons["mixer.norm.weight"] == "LayerNorm stays plain"
    assert reasons["lazy.weight"] == "not initialized yet"
