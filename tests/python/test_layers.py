"""Converted layers in the hands of torch, of other libraries' idioms, and of careless users."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import vramkit
from numerics import assert_within, linear_bound
from torch import Tensor, nn
from vramkit import QuantizedLayer, ReadOnlyWeightError, _core
from vramkit.layers import LazyWeight, QuantizedEmbedding, QuantizedLinear

BUILTIN = [name for name, _ in _core.builtin_formats()]


def converted(
    name: str = "nf4", rows: int = 48, cols: int = 64, bias: bool = True
) -> QuantizedLinear:
    model = nn.Sequential(nn.Linear(cols, rows, bias=bias))
    vramkit.convert(model, name)
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    return layer


def stored_state(model: nn.Module) -> OrderedDict[str, Tensor]:
    return OrderedDict((k, v.clone()) for k, v in model.state_dict().items())


def assert_same_state(one: nn.Module, other: nn.Module | OrderedDict[str, Tensor]) -> None:
    left = one.state_dict()
    right = other.state_dict() if isinstance(other, nn.Module) else other
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
        assert value.dtype == right[name].dtype


class Special(nn.Linear):
    """A user's own subclass, with state of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.note = "mine"


class TestIdentity:
    def test_same_object_and_still_its_old_class(self) -> None:
        model = nn.Sequential(Special(64, 48), nn.Embedding(10, 64))
        linear, embedding = model[0], model[1]
        vramkit.convert(model, "nf4")
        assert model[0] is linear
        assert isinstance(linear, Special)
        assert isinstance(linear, nn.Linear)
        assert isinstance(linear, QuantizedLayer)
        assert isinstance(embedding, nn.Embedding)
        assert isinstance(embedding, QuantizedEmbedding)
        assert linear.note == "mine"
        assert type(linear).__qualname__ == "Special"
        assert (linear.in_features, linear.out_features) == (64, 48)
        assert "format=nf4" in repr(linear)

    def test_one_class_per_class(self) -> None:
        assert type(converted("nf4")) is type(converted("int8"))

    def test_parameters_are_frozen_bytes(self) -> None:
        layer = converted("int4")
        names = dict(layer.named_parameters())
        assert set(names) == {"codes", "scales", "extra", "bias"}
        for name in ("codes", "scales", "extra"):
            assert names[name].dtype == torch.uint8
            assert not names[name].requires_grad
        assert names["bias"].requires_grad
        assert layer.stored_bytes == sum(names[n].numel() for n in ("codes", "scales", "extra"))

    def test_hooks_are_kept_and_called(self) -> None:
        model = nn.Sequential(nn.Linear(64, 48))
        seen: list[str] = []
        model[0].register_forward_hook(lambda *_: seen.append("after"))
        model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
        model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
        model[0].register_state_dict_post_hook(lambda *_: seen.append("state"))
        vramkit.convert(model, "int8")
        model(torch.randn(2, 64, requires_grad=True)).sum().backward()
        model.state_dict()
        assert seen == ["before", "after", "backward", "state"]

    def test_training_flag_and_requires_grad(self) -> None:
        model = nn.Sequential(nn.Linear(64, 48)).eval()
        vramkit.convert(model, "nf4")
        assert not model[0].training
        model.requires_grad_(False)
        assert not model[0].bias.requires_grad
        with pytest.raises(RuntimeError):
            model.requires_grad_(True)  # codes are integers; torch says so


@pytest.mark.parametrize("name", BUILTIN)
class TestCopies:
    def model(self, name: str) -> nn.Module:
        model = nn.Sequential(nn.Embedding(20, 96), nn.Linear(96, 40), nn.GELU(), nn.Linear(40, 8))
        vramkit.convert(model, name)
        return model.eval()

    def check(self, model: nn.Module, other: nn.Module) -> None:
        assert_same_state(model, other)
        x = torch.randint(20, (2, 5))
        assert torch.equal(model(x), other(x))
        for mine, theirs in zip(model.modules(), other.modules(), strict=True):
            assert type(mine) is type(theirs)
            if isinstance(mine, QuantizedLayer):
                assert mine.storage_format is theirs.storage_format
                assert mine.compute_dtype == theirs.compute_dtype
                assert mine.codes.data_ptr() != theirs.codes.data_ptr()

    def test_deepcopy(self, name: str) -> None:
        model = self.model(name)
        self.check(model, copy.deepcopy(model))

    def test_pickle(self, name: str) -> None:
        model = self.model(name)
        self.check(model, pickle.loads(pickle.dumps(model)))

    def test_torch_save(self, name: str) -> None:
        model, file = self.model(name), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        self.check(model, torch.load(file, weights_only=False))

    def test_state_dict_round_trip(self, name: str) -> None:
        model, other = self.model(name), self.model(name)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        self.check(model, other)

    def test_state_dict_assign(self, name: str) -> None:
        model, other = self.model(name), self.model(name)
        other.load_state_dict(stored_state(model), assign=True)
        self.check(model, other)

    def test_safetensors(self, name: str, tmp_path: object) -> None:
        from safetensors.torch import load_file, save_file

        model, other = self.model(name), self.model(name)
        save_file(model.state_dict(), f"{tmp_path}/a.safetensors")
        other.load_state_dict(load_file(f"{tmp_path}/a.safetensors"))
        self.check(model, other)


@pytest.mark.parametrize("name", BUILTIN)
class TestCasts:
    """`.to(dtype)` changes what a layer computes in, and no bit of what it stores."""

    def test_there_and_back(self, name: str) -> None:
        model = nn.Sequential(nn.Embedding(20, 96), nn.Linear(96, 40))
        vramkit.convert(model, name)
        layers = [m for m in model if isinstance(m, QuantizedLayer)]
        before = stored_state(model)
        dense = [m.dense_weight() for m in layers]
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            model.to(dtype)
            assert [m.compute_dtype for m in layers] == [dtype] * 2
            assert [m.weight.dtype for m in layers] == [dtype] * 2
            assert model[1].bias.dtype == dtype
            assert model(torch.tensor([1, 2])).dtype == dtype
            for key, value in model.state_dict().items():
                if not key.endswith("bias"):
                    assert torch.equal(value, before[key])
        model.half().float().bfloat16().double().float()
        for layer, expected in zip(layers, dense, strict=True):
            assert torch.equal(layer.dense_weight(), expected)

    def test_output_dtype_is_the_inputs(self, name: str) -> None:
        layer = converted(name)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", BUILTIN)
def test_float64_layers_decode_and_say_what_they_lack(name: str) -> None:
    for cols in (96, 100):
        model = nn.Sequential(nn.Embedding(20, cols), nn.Linear(cols, 8)).double()
        vramkit.convert(model, name)
        rows = model[0](torch.tensor([1, 2]))
        assert rows.dtype == torch.float64
        assert torch.equal(rows, model[0].dense_weight(torch.float32)[1:3].double())
        assert torch.equal(model[1].weight + 0, model[1].dense_weight(torch.float32).double())
        with pytest.raises(TypeError, match="cast it first"):
            model(torch.tensor([1, 2]))


def test_autocast_decides_the_dtype() -> None:
    layer = converted("nf4")
    x = torch.randn(3, 64)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
            plain = nn.functional.linear(x, layer.dense_weight(), layer.bias)
        assert y.dtype == plain.dtype == dtype
        dense = layer.dense_weight(torch.float32)
        rounded = dtype == torch.bfloat16
        bound = linear_bound(x.to(dtype), dense, layer.bias, dtype, weight_rounded=rounded)
        expected = x.to(dtype).double() @ dense.double().t() + layer.bias.double()
        assert_within(y.detach(), expected.detach(), bound.detach())
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


class TestLazyWeight:
    def test_facts_cost_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = converted("nf4", 48, 64)

        def refuse(*_: object, **__: object) -> Tensor:
            raise AssertionError("decoded")

        monkeypatch.setattr(QuantizedLayer, "dense_weight", refuse)
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        assert isinstance(weight, Tensor)
        assert weight.shape == (48, 64)
        assert (weight.size(1), weight.dim(), weight.numel()) == (64, 2, 48 * 64)
        assert weight.dtype == torch.float32
        assert weight.device.type == "cpu"
        assert weight.is_floating_point()
        assert not weight.requires_grad
        assert weight.stride() == (64, 1)
        assert weight.is_contiguous()
        assert "nf4" in repr(weight)
        with pytest.raises(AssertionError, match="decoded"):
            weight.sum()

    def test_reads_are_the_decoded_weight(self) -> None:
        layer = converted("nf4")
        dense = layer.dense_weight()
        x = torch.randn(3, 64)
        assert torch.equal(layer.weight + 0, dense)
        assert torch.equal(layer.weight.detach() * 2, dense * 2)
        assert torch.equal(layer.weight.t(), dense.t())
        assert torch.equal(layer.weight[3:5, ::2], dense[3:5, ::2])
        assert torch.equal(layer.weight.to(torch.bfloat16), dense.to(torch.bfloat16))
        assert torch.equal(layer.weight.clone(), dense)
        assert torch.equal(layer.weight.data.clone(), dense)
        assert torch.equal(nn.functional.linear(x, layer.weight), nn.functional.linear(x, dense))
        assert torch.equal(torch.cat([layer.weight, layer.weight]), torch.cat([dense, dense]))
        assert layer.weight.tolist() == dense.tolist()
        assert (layer.weight.numpy() == dense.numpy()).all()
        assert layer.weight[2].tolist() == dense[2].tolist()
        assert all(map(torch.equal, layer.weight.chunk(3), dense.chunk(3)))
        assert torch.equal(layer.weight.view(-1)[70:90], dense.view(-1)[70:90])
        assert torch.equal(layer.weight.t() @ torch.eye(48), dense.t())
        assert torch.equal(copy.deepcopy(layer.weight), dense)
        assert torch.equal(pickle.loads(pickle.dumps(layer.weight)), dense)
        assert float(layer.weight.norm()) == float(dense.norm())

    @pytest.mark.parametrize(
        "write",
        [
            lambda w, d: w.copy_(d),
            lambda w, d: w.add_(d),
            lambda w, d: w.zero_(),
            lambda w, d: w.mul_(2),
            lambda w, d: nn.init.normal_(w),
            lambda w, d: w.data.add_(d),
            lambda w, d: w.data.copy_(d),
            lambda w, d: setattr(w, "data", d),
            lambda w, d: w.detach().fill_(1.0),
            lambda w, d: torch.add(d, d, out=w),
            lambda w, d: torch._foreach_add_([w], 1.0),
            lambda w, d: w.__setitem__(0, 1.0),
            lambda w, d: w.data.__setitem__((slice(None), 3), 0.0),
            lambda w, d: w[0].zero_(),
            lambda w, d: w.t().add_(d.t()),
            lambda w, d: w.view(-1)[:5].fill_(0.0),
            lambda w, d: w[0].__setitem__(1, 0.0),
            lambda w, d: w.chunk(2)[1].mul_(2),
            lambda w, d: w.index_copy_(0, torch.tensor([1]), d[:1]),
        ],
    )
    def test_writes_raise_and_change_nothing(self, write: object) -> None:
        layer = converted("nf4")
        before = stored_state(layer)
        assert callable(write)
        with pytest.raises(ReadOnlyWeightError, match=r"vramkit\.set_weight"), torch.no_grad():
            write(layer.weight, torch.randn(48, 64))
        assert_same_state(layer, before)

    def test_augmented_assignments_raise(self) -> None:
        """What adapters' merges do."""
        layer = converted("nf4")
        before = stored_state(layer)
        delta = torch.randn(48, 64)
        with pytest.raises(ReadOnlyWeightError), torch.no_grad():
            layer.weight += delta
        with pytest.raises(ReadOnlyWeightError):
            layer.weight.data += delta
        with pytest.raises(ReadOnlyWeightError):
            layer.weight.data = delta
        with pytest.raises(ReadOnlyWeightError), torch.no_grad():
            layer.weight[0] = 1.0
        with pytest.raises(ReadOnlyWeightError), torch.no_grad():
            layer.weight.data[:, 3] = 0.0
        assert_same_state(layer, before)

    def test_writable_encodes_again(self) -> None:
        layer = converted("fp8")
        delta = torch.randn(48, 64)
        dense = layer.dense_weight()
        expected = converted("fp8")
        vramkit.set_weight(expected, dense + delta)
        with vramkit.writable(), torch.no_grad():
            layer.weight += delta
        assert torch.equal(layer.codes, expected.codes)
        assert torch.equal(layer.scales, expected.scales)
        with vramkit.writable():
            layer.weight.data = dense
        assert torch.equal(layer.dense_weight(), dense)  # decoded values encode to themselves
        with vramkit.writable(), torch.no_grad():
            layer.weight.copy_(dense + delta)
            layer.weight.data.mul_(0)
        assert torch.equal(layer.dense_weight(), torch.zeros(48, 64))
        with vramkit.writable():
            layer.weight[5, :3] = 127.0
            with pytest.raises(ReadOnlyWeightError), torch.no_grad():
                layer.weight[0].zero_()  # views show a copy, so even here
        assert layer.dense_weight().sum() == 3 * 127.0
        with pytest.raises(ReadOnlyWeightError), torch.no_grad():
            layer.weight.zero_()

    @pytest.mark.parametrize("name", ["int8", "int4", "int4_g32", "nf4"])
    def test_rows_that_do_not_change_keep_their_bits(self, name: str) -> None:
        """Formats that search their scales would round decoded rows a second time."""
        layer = converted(name)
        codes, scales, dense = layer.codes.clone(), layer.scales.clone(), layer.dense_weight()
        with vramkit.writable(), torch.no_grad():
            layer.weight[7] = 3.0
        others = torch.arange(48) != 7
        assert torch.equal(layer.codes[others], codes[others])
        assert torch.equal(layer.scales[others], scales[others])
        assert torch.equal(layer.dense_weight()[others], dense[others])
        assert (layer.dense_weight()[7] - 3.0).abs().max() < 0.01

    def test_writable_nests_and_survives_errors(self) -> None:
        layer = converted("int8")

        def write_and_fail() -> None:
            with vramkit.writable():
                with vramkit.writable():
                    pass
                layer.weight.data = torch.zeros(48, 64)
                raise KeyError

        with pytest.raises(KeyError):
            write_and_fail()
        assert torch.equal(layer.dense_weight(), torch.zeros(48, 64))
        with pytest.raises(ReadOnlyWeightError):
            layer.weight.data = torch.ones(48, 64)

    def test_initialisers_leave_it_alone(self) -> None:
        """transformers asks for these marks before it initialises."""
        layer = converted("nf4")
        assert layer.weight._is_hf_initialized
        assert layer._is_hf_initialized

    def test_compiled_weight_is_the_decoded_one(self) -> None:
        layer = converted("nf4").eval()

        def run(x: Tensor) -> Tensor:
            return layer(x) + layer.weight.sum()

        x = torch.randn(3, 64)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), run(x))


class TestAssignment:
    def test_set_weight(self) -> None:
        layer = converted("nf4")
        new = torch.randn(48, 64)
        vramkit.set_weight(layer, new)
        plain = nn.Sequential(nn.Linear(64, 48))
        plain[0].weight.data = new
        vramkit.convert(plain, "nf4")
        assert torch.equal(layer.codes, plain[0].codes)
        assert torch.equal(layer.scales, plain[0].scales)

    @pytest.mark.parametrize("name", BUILTIN)
    def test_set_weight_of_every_format(self, name: str) -> None:
        layer = converted(name, 33, 100)
        codes = layer.codes.data_ptr()
        new = torch.randn(33, 100, dtype=torch.bfloat16)
        vramkit.set_weight(layer, new)
        error = (layer.dense_weight() - new.float()).norm() / new.float().norm()
        assert error < 0.2
        assert layer.codes.data_ptr() == codes  # in place: what shares it sees it

    def test_set_weight_refuses(self) -> None:
        layer = converted("nf4")
        before = stored_state(layer)
        with pytest.raises(ValueError, match=r"\(48, 64\)"):
            vramkit.set_weight(layer, torch.randn(48, 63))
        bad = torch.randn(48, 64)
        bad[3, 3] = torch.nan
        with pytest.raises(vramkit.NonFiniteWeightError):
            vramkit.set_weight(layer, bad)
        assert_same_state(layer, before)

    def test_set_weight_of_a_plain_layer(self) -> None:
        layer, new = nn.Linear(8, 4), torch.randn(4, 8)
        vramkit.set_weight(layer, new)
        assert torch.equal(layer.weight, new)

    def test_assigning_a_parameter(self) -> None:
        """resize_token_embeddings gives a layer a whole new weight, of another size."""
        model = nn.Sequential(nn.Embedding(20, 64))
        vramkit.convert(model, "int8")
        new = torch.randn(30, 64)
        model[0].weight = nn.Parameter(new)
        assert model[0].num_embeddings == 30
        assert "weight" not in model[0]._parameters
        assert model[0](torch.tensor([29])).shape == (1, 64)
        assert (model[0].dense_weight() - new).abs().max() <= new.abs().max() / 127

    def test_register_parameter(self) -> None:
        layer = converted("int8")
        new = torch.randn(48, 64)
        layer.register_parameter("weight", nn.Parameter(new))
        assert "weight" not in layer._parameters
        assert (layer.dense_weight() - new).abs().max() <= new.abs().max() / 127
        layer.register_parameter("other", nn.Parameter(torch.zeros(1)))
        assert "other" in layer._parameters

    def test_assigning_a_lazy_weight_ties(self) -> None:
        """What tie_weights does: head.weight = embedding.weight."""
        model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 20, bias=False))
        vramkit.convert(model, "int8")
        model[1].weight = model[0].weight
        assert model[1].codes is model[0].codes
        assert model[1].scales is model[0].scales
        model[1].weight = model[1].weight
        assert model[1].codes is model[0].codes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 64)
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(x))
        return out


class TestTied:
    def test_codes_are_shared(self) -> None:
        model = Tied()
        report = vramkit.convert(model, "int8")
        assert len(report.layers) == 1
        assert model.head.codes is model.embedding.codes
        assert model.head.scales is model.embedding.scales
        assert sum(p.numel() for p in model.parameters()) == 20 * 64 + 4 * 20
        vramkit.set_weight(model.embedding, torch.ones(20, 64))
        assert torch.equal(model.head.dense_weight(), torch.ones(20, 64))

    def test_state_dict_round_trip(self) -> None:
        model, other = Tied(), Tied()
        vramkit.convert(model, "nf4")
        vramkit.convert(other, "nf4")
        other.load_state_dict(model.state_dict())
        x = torch.arange(5)
        assert torch.equal(model(x), other(x))
        assert other.head.codes is other.embedding.codes

    def test_copies_stay_tied(self) -> None:
        model = Tied()
        vramkit.convert(model, "nf4")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.head.codes is other.embedding.codes
            assert other.head.codes is not model.head.codes

    def test_casts_keep_the_tie(self) -> None:
        model = Tied()
        vramkit.convert(model, "nf4")
        model.to(torch.bfloat16)
        assert model.head.codes is model.embedding.codes
        assert model.head.compute_dtype == model.embedding.compute_dtype == torch.bfloat16

    def test_restore_keeps_the_tie(self) -> None:
        model = Tied()
        vramkit.convert(model, "nf4")
        vramkit.restore(model, "fp32")
        assert model.head.weight is model.embedding.weight
        assert isinstance(model.head.weight, nn.Parameter)


class TestTraining:
    def test_bias_and_adapters_learn(self) -> None:
        """A low-rank adapter around a frozen converted layer, the way PEFT trains."""
        layer = converted("nf4", 32, 64)
        down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 32, bias=False)
        x, target = torch.randn(64, 64), torch.randn(64, 32)
        before = stored_state(layer)
        optimizer = torch.optim.Adam([layer.bias, *down.parameters(), *up.parameters()], lr=1e-2)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (layer(x) + up(down(x)) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0]
        assert torch.equal(layer.codes, before["codes"])
        assert not torch.equal(layer.bias, before["bias"])

    def test_gradient_checkpointing(self) -> None:
        from torch.utils.checkpoint import checkpoint

        layer = converted("nf4")
        x = torch.randn(3, 64, requires_grad=True)
        layer(x).sum().backward()
        y = x.detach().clone().requires_grad_()
        checkpoint(layer, y, use_reentrant=False).sum().backward()
        assert torch.equal(x.grad, y.grad)

    def test_embedding_gives_no_gradient(self) -> None:
        model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 8))
        vramkit.convert(model, "nf4")
        model(torch.tensor([1, 2])).sum().backward()
        assert torch.equal(model[1].bias.grad, torch.full((8,), 2.0))


class TestInsideTorchModules:
    """Modules that read a child's weight and never call the child."""

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_multihead_attention(self, batch_first: bool) -> None:
        attention = nn.MultiheadAttention(64, 4, batch_first=batch_first).eval()
        report = vramkit.convert(attention, "int8")
        assert [r.name for r in report.layers] == ["in_proj_weight", "out_proj"]
        assert isinstance(attention.out_proj, QuantizedLinear)
        plain = copy.deepcopy(attention)
        vramkit.restore(plain, "fp32")
        assert not isinstance(plain.out_proj, QuantizedLayer)
        x = torch.randn(5, 3, 64)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for need in (False, True):
                    mine, weights = attention(x, x, x, need_weights=need)
                    theirs, others = plain(x, x, x, need_weights=need)
                    assert torch.equal(mine, theirs)
                    assert weights is others is None or torch.equal(weights, others)

    @pytest.mark.parametrize("name", ["nf4", "int8"])
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_transformer_encoder(self, name: str, norm_first: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first), 2
            ).eval()
        report = vramkit.convert(model, name)
        assert len(report.layers) == 2 * 4
        plain = copy.deepcopy(model)
        vramkit.restore(plain, "fp32")
        x = torch.randn(3, 7, 64)
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[0, 5:] = True
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for padding in (None, mask):
                    mine = model(x, src_key_padding_mask=padding)
                    theirs = plain(x, src_key_padding_mask=padding)
                    # The same mathematics by the fused kernels and the layer by layer path.
                    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)

    def test_fast_path_is_kept(self) -> None:
        model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
        vramkit.convert(model, "nf4")
        from torch.profiler import profile

        with torch.no_grad(), profile() as profiler:
            model(torch.randn(2, 3, 64))
        names = {event.key for event in profiler.key_averages()}
        assert "aten::_transformer_encoder_layer_fwd" in names


class TestEmbedding:
    def test_padding_row_stays_zero(self) -> None:
        for name in BUILTIN:
            model = nn.Sequential(nn.Embedding(20, 64, padding_idx=3))
            vramkit.convert(model, name)
            assert model[0].padding_idx == 3
            assert torch.equal(model[0](torch.tensor([3])), torch.zeros(1, 64))

    def test_rows_and_shapes(self) -> None:
        model = nn.Sequential(nn.Embedding(20, 64))
        vramkit.convert(model, "nf4")
        dense = model[0].dense_weight()
        for index in (torch.tensor(7), torch.randint(20, (3, 4)), torch.randint(20, (2, 1, 5))):
            assert torch.equal(model[0](index), dense[index])
            assert torch.equal(model[0](index.int()), dense[index])

    @pytest.mark.parametrize("bad", [-1, 20, 1 << 40])
    def test_index_out_of_range(self, bad: int) -> None:
        model = nn.Sequential(nn.Embedding(20, 64))
        vramkit.convert(model, "nf4")
        with pytest.raises(IndexError, match="20 rows"):
            model[0](torch.tensor([0, bad]))

    def test_float_indices(self) -> None:
        model = nn.Sequential(nn.Embedding(20, 64))
        vramkit.convert(model, "nf4")
        with pytest.raises(RuntimeError, match="int32 or int64"):
            model[0](torch.ones(2))

    def test_max_norm_is_left_plain(self) -> None:
        model = nn.Sequential(nn.Embedding(20, 64, max_norm=1.0))
        report = vramkit.convert(model, "nf4")
        assert report.layers == []
        assert "max_norm" in report.left_out[0][1]


class TestWrongInputs:
    def test_size(self) -> None:
        layer = converted("nf4")
        for x in (torch.randn(3, 63), torch.randn(65), torch.tensor(1.0)):
            with pytest.raises(RuntimeError, match="64"):
                layer(x)

    @pytest.mark.parametrize("name", BUILTIN)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
    def test_dtype(self, name: str, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
            converted(name)(torch.ones(2, 64, dtype=dtype))


class TestRestore:
    @pytest.mark.parametrize("name", BUILTIN)
    @pytest.mark.parametrize(
        ("target", "dtype"),
        [("fp32", torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)],
    )
    def test_gives_the_decoded_weight(
        self, name: str, target: str | torch.dtype, dtype: torch.dtype
    ) -> None:
        model = nn.Sequential(Special(64, 48), nn.LayerNorm(48), nn.Embedding(10, 64))
        vramkit.convert(model, name)
        dense = [model[i].dense_weight(dtype) for i in (0, 2)]
        assert vramkit.restore(model, target) is model
        assert type(model[0]) is Special
        assert type(model[2]) is nn.Embedding
        assert list(model[0].state_dict()) == ["weight", "bias"]
        for layer, expected in zip((model[0], model[2]), dense, strict=True):
            assert torch.equal(layer.weight, expected)
        assert all(p.dtype == dtype for p in model.parameters())
        assert "storage_format" not in model[0].__dict__

    def test_default_keeps_each_dtype(self) -> None:
        model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4).bfloat16())
        vramkit.convert(model, "int8")
        vramkit.restore(model)
        assert [m.weight.dtype for m in model] == [torch.float32, torch.bfloat16]

    def test_convert_again(self) -> None:
        model = nn.Sequential(nn.Linear(64, 48))
        vramkit.convert(model, "int8")
        before = stored_state(model)
        vramkit.restore(model, "fp32")
        vramkit.convert(model, "int8")
        assert torch.equal(model[0].codes, before["0.codes"])

    @pytest.mark.parametrize("target", ["nf4", "int8", torch.float64, torch.uint8])
    def test_refuses(self, target: object) -> None:
        model = nn.Sequential(nn.Linear(64, 48))
        vramkit.convert(model, "int8")
        before = stored_state(model)
        with pytest.raises(ValueError, match="restore"):
            vramkit.restore(model, target)  # type: ignore[arg-type]
        assert_same_state(model, before)


def test_moving_to_meta_and_back_loads() -> None:
    """What accelerate's offload and big-model loading do."""
    layer = converted("nf4")
    state = stored_state(layer)
    other = copy.deepcopy(layer).to("meta")
    assert other.codes.device.type == "meta"
    assert other.weight.device.type == "meta"
    other = other.to_empty(device="cpu")
    other.load_state_dict(state)
    x = torch.randn(2, 64)
    assert torch.equal(other(x), layer(x))


def test_functional_call() -> None:
    layer = converted("nf4")
    x = torch.randn(2, 64)
    state = {k: torch.zeros_like(v) if k == "bias" else v for k, v in layer.state_dict().items()}
    assert torch.allclose(torch.func.functional_call(layer, state, x), layer(x) - layer.bias,
                          atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("name", BUILTIN)
def test_compiled_model_fullgraph(name: str) -> None:
    model = nn.Sequential(nn.Embedding(20, 96), nn.Linear(96, 40), nn.GELU(), nn.Linear(40, 8))
    vramkit.convert(model.eval(), name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randint(20, (2, 5))
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_lazy_weight_is_transient() -> None:
    """It is made on each access: nothing keeps a decoded copy alive."""
    layer = converted("nf4")
    assert layer.weight is not layer.weight
    assert isinstance(layer.weight, LazyWeight)
    assert "weight" not in dict(layer.named_parameters())


def test_parameters_that_live_elsewhere() -> None:
    """A parametrized bias leaves the module's own parameters; the direct way must not need it."""

    class Doubled(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    layer = nn.Sequential(nn.Linear(64, 32))
    vramkit.convert(layer, "int8")
    x = torch.randn(3, 64)
    with torch.inference_mode():
        before = layer(x)
        bias = layer[0].bias.clone()
    torch.nn.utils.parametrize.register_parametrization(layer[0], "bias", Doubled())
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), before + bias)
