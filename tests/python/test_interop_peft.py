"""LoRA adapters of PEFT on converted models: training, merge, exact unmerge."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vramkit
from numerics import INT8_MERGED, size_bound
from torch import Tensor, nn
from vramkit.errors import ReadOnlyWeightError
from vramkit.interop import peft as interop
from vramkit.layers import QuantizedLayer

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.embed(ids))))


IDS = torch.tensor([[1, 2, 39], [0, 7, 7]])


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    interop.register()
    yield
    interop.register()


def adapted(precision: str, targets: tuple[str, ...] = ("up", "down"), **config: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    vramkit.convert(model, precision)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), **config))
    fill(made)
    return made.eval()


def fill(model: nn.Module) -> None:
    """As after some training: adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)


def stored(model: nn.Module) -> list[Tensor]:
    return [
        part.clone()
        for layer in model.modules()
        if isinstance(layer, QuantizedLayer)
        for part in (layer.codes, layer.scales, layer.extra)
        if part is not None
    ]


def merge(model: Any, **options: Any) -> None:
    with pytest.warns(UserWarning, match="rounds the sum"):
        model.merge_adapter(**options)


@pytest.mark.parametrize("precision", ["nf4", "nf4_dq", "int4", "int8", "fp8", "bf16"])
class TestMerge:
    def test_merge_encodes_the_sum_and_unmerge_is_exact(self, precision: str) -> None:
        model = adapted(precision, ("embed", "up", "down"))
        before, y = stored(model), model(IDS)
        expected = {}
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                base = module.get_base_layer()
                total = base.dense_weight(torch.float32) + module.get_delta_weight("default")
                plain = nn.Linear(*total.shape[::-1], bias=False)
                plain.weight = nn.Parameter(total)
                vramkit.convert(plain, precision)
                expected[name] = plain.dense_weight(torch.float32)
        assert len(expected) == 3
        merge(model)
        for name, dense in expected.items():
            layer = model.get_submodule(name).get_base_layer()
            assert torch.equal(layer.dense_weight(torch.float32), dense)
        assert any(not torch.equal(a, b) for a, b in zip(before, stored(model), strict=True))
        model.unmerge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(before, stored(model), strict=True))
        assert torch.equal(model(IDS), y)

    def test_merge_and_unload_gives_converted_layers(self, precision: str) -> None:
        model = adapted(precision)
        merged = copy.deepcopy(model)
        merge(merged)
        with pytest.warns(UserWarning, match="rounds the sum"):
            plain = model.merge_and_unload()
        assert isinstance(plain.up, QuantizedLayer)
        assert isinstance(plain.up, nn.Linear)
        assert torch.equal(plain(IDS), merged(IDS))

    def test_two_adapters_are_rounded_once(self, precision: str) -> None:
        model = adapted(precision)
        model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["up", "down"]))
        fill(model)
        before = stored(model)
        merge(model, adapter_names=["default"])
        merge(model, adapter_names=["second"])
        one_by_one = stored(model)
        model.unmerge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(before, stored(model), strict=True))
        merge(model, adapter_names=["default", "second"])
        assert all(torch.equal(a, b) for a, b in zip(one_by_one, stored(model), strict=True))


class TestDetails:
    def test_bias_of_an_adapter(self) -> None:
        model = adapted("int8", ("up",), lora_bias=True)
        bias, y = model.base_model.model.up.base_layer.bias.clone(), model(IDS)
        merge(model)
        assert not torch.equal(model.base_model.model.up.base_layer.bias, bias)
        assert float((model(IDS) - y).abs().max()) <= INT8_MERGED * float(y.abs().max())
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model.up.base_layer.bias, bias)
        assert torch.equal(model(IDS), y)

    def test_dora(self) -> None:
        model = adapted("int8", use_dora=True)
        before, y = stored(model), model(IDS)
        merge(model)
        assert float((model(IDS) - y).abs().max()) <= INT8_MERGED * float(y.abs().max())
        model.unmerge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(before, stored(model), strict=True))

    def test_a_broken_adapter_changes_nothing(self) -> None:
        model = adapted("nf4", ("up",))
        before = stored(model)
        with torch.no_grad():
            model.base_model.model.up.lora_B["default"].weight[0, 0] = float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="not finite"):
                model.merge_adapter()
        assert not model.base_model.model.up.merged
        assert all(torch.equal(a, b) for a, b in zip(before, stored(model), strict=True))

    def test_copies_while_merged(self) -> None:
        model = adapted("nf4")
        y = model(IDS)
        merge(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.unmerge_adapter()
            assert torch.equal(twin(IDS), y)

    def test_unmerge_twice_says_so(self) -> None:
        model = adapted("nf4")
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()

    def test_training_leaves_the_codes(self) -> None:
        model = adapted("nf4").train()
        before = stored(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(5):
            loss = (model(IDS) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert all(torch.equal(a, b) for a, b in zip(before, stored(model), strict=True))

    def test_gradients_of_adapters_are_those_of_the_plain_model(self) -> None:
        model = adapted("nf4").train()
        twin = vramkit.restore(copy.deepcopy(model), "fp32")
        grads = []
        for each in (model, twin):
            each(IDS).square().sum().backward()
            grads.append([p.grad for n, p in each.named_parameters() if "lora_" in n])
        # Sums of the same float32 products in another order: three layers there and back.
        for mine, theirs in zip(*grads, strict=True):
            assert float((mine - theirs).abs().max()) <= size_bound(theirs, 96, depth=6)


class TestRegistration:
    def test_without_it_a_merge_is_an_error_not_a_loss(self) -> None:
        torch.manual_seed(0)
        model = Net()
        vramkit.convert(model, "nf4")
        interop.unregister()
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up"]))
        fill(wrapped)
        before = stored(wrapped)
        with pytest.raises(ReadOnlyWeightError, match=r"vramkit\.interop\.peft"):
            wrapped.merge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(before, stored(wrapped), strict=True))
        assert interop.upgrade(wrapped) == 1
        assert interop.upgrade(wrapped) == 0
        merge(wrapped)
        wrapped.unmerge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(before, stored(wrapped), strict=True))

    def test_plain_layers_keep_its_own_class(self) -> None:
        wrapped = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["up"]))
        assert type(wrapped.base_model.model.up) is peft.tuners.lora.Linear

    def test_convert_registers_where_peft_is_imported(self) -> None:
        interop.unregister()
        vramkit.convert(nn.Sequential(nn.Linear(8, 8)), "int8")
        assert interop._own is not None
