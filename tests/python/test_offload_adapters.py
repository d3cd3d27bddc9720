"""LoRA adapters on offloaded models: the same bits as on resident ones, in every state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from test_offload import offloaded, smallest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vramkit import enable_vram_management
from vramkit.estimator import weight_bytes
from vramkit.interop import peft as interop

peft = pytest.importorskip("peft")

WIDTH = 128
X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(3))


class Layer(nn.Module):
    """Two Linears that PEFT can wrap, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(6)])
        self.checkpointed: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpointed)
        return x


CONFIG: dict[str, Any] = {"r": 4, "target_modules": ["up", "down"]}


def net(precision: str | None) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    if precision is not None:
        vramkit.convert(model, precision)
    return model


@pytest.fixture(autouse=True)
def _registered() -> None:
    interop.register()


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of merges that round, of names in use
        yield


def tightly(model: nn.Module, folder: Path) -> nn.Module:
    """Offloaded within the least limit that leaves room for two adapters."""
    limit = smallest(model, (X,), folder) + (180 << 10)
    return enable_vram_management(model, f"{limit} B", 0, inputs=(X,), folder=folder)


def fill(model: nn.Module) -> None:
    """As after some training: adapters that do something, the same in every model."""
    found = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=found)


def with_adapter(model: nn.Module, **config: Any) -> Any:
    made = peft.get_peft_model(model, peft.LoraConfig(**{**CONFIG, **config}))
    fill(made)
    return made.eval()


def more(model: Any, name: str = "other") -> None:
    model.add_adapter(name, peft.LoraConfig(**{**CONFIG, "r": 6}))
    fill(model)
    model.eval()


def merged_and_back(model: Any) -> Tensor:
    model.merge_adapter()
    out: Tensor = model(X)
    model.unmerge_adapter()
    return out


def without(model: Any) -> Tensor:
    with model.disable_adapter():
        out: Tensor = model(X)
    return out


def chosen(model: Any, name: str) -> Tensor:
    model.set_adapter(name)
    out: Tensor = model(X)
    return out


# What is done one after another, each step with an output to compare.
LIFE: list[tuple[str, Callable[[Any], Tensor]]] = [
    ("as it is", lambda m: m(X)),
    ("disabled", without),
    ("merged", merged_and_back),
    ("unmerged", lambda m: m(X)),
    ("another one loaded", lambda m: (more(m), m(X))[1]),
    ("switched", lambda m: chosen(m, "other")),
    ("back", lambda m: chosen(m, "default")),
    ("deleted", lambda m: (m.delete_adapter("default"), chosen(m, "other"))[1]),
    ("merged again", merged_and_back),
    ("removed", lambda m: m.unload()(X)),
]


@pytest.mark.parametrize("precision", [None, "int8", "nf4"])
@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_a_life_of_adapters(precision: str | None, first: str, tmp_path: Path, quiet: Any) -> None:
    resident, model = with_adapter(net(precision)), net(precision)
    with torch.no_grad():
        if first == "adapter":
            model = with_adapter(model)
            tightly(model, tmp_path)
            session = model.vramkit_session
        else:
            tightly(model, tmp_path)
            session = model.vramkit_session
            model = with_adapter(model)
        for what, step in LIFE:
            assert torch.equal(step(model), step(resident)), what
            stats = session.stats()
            assert stats.committed <= stats.limit, what
            assert stats.acquires > 0, what
            session.engine.check()
        left = resident.unload()
        if precision is not None:  # an unmerge in floats is not exact, one of codes is
            assert torch.equal(net(precision)(X), left(X))
    assert {k for k, _ in left.named_parameters()} == {
        k for k, _ in model.base_model.model.named_parameters()
    }
    for a, b in zip(left.parameters(), model.base_model.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", [None, "int8", "nf4"])
@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_merge_and_unload(precision: str | None, first: str, tmp_path: Path, quiet: Any) -> None:
    resident, model = with_adapter(net(precision)), net(precision)
    with torch.no_grad():
        if first == "adapter":
            model = with_adapter(model)
            tightly(model, tmp_path)
            session = model.vramkit_session
        else:
            tightly(model, tmp_path)
            session = model.vramkit_session
            model(X)
            model = with_adapter(model)
            model(X)
        merged, expected = model.merge_and_unload(), resident.merge_and_unload()
        for _ in range(2):
            assert torch.equal(merged(X), expected(X))
        assert session.stats().committed <= session.stats().limit
        assert session.stats().acquires > 0
        session.disable()
        assert torch.equal(merged(X), expected(X))
    assert not any("forward" in module.__dict__ for module in merged.modules())


@pytest.mark.parametrize(
    ("precision", "checkpointed", "first"),
    [
        (None, None, "adapter"), (None, True, "offload"), (None, False, "adapter"),
        ("int8", None, "offload"), ("int8", True, "adapter"), ("int8", False, "offload"),
        ("nf4", None, "adapter"), ("nf4", True, "offload"), ("nf4", False, "offload"),
    ],
)  # fmt: skip
def test_gradients_of_adapters(
    precision: str | None, checkpointed: bool | None, first: str, tmp_path: Path
) -> None:
    gradients = []
    for which in ("resident", "offloaded"):
        model: Any = net(precision)
        if which == "offloaded" and first == "offload":
            tightly(model, tmp_path)
        model = with_adapter(model, init_lora_weights=False)
        if which == "offloaded" and first == "adapter":
            tightly(model, tmp_path)
        model.base_model.model.checkpointed = checkpointed
        model.train()
        x = X.clone().requires_grad_()
        for _ in range(2):  # gradients are summed, over a slot that held other blocks meanwhile
            model(x).square().sum().backward()
        adapters = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
        gradients.append({**adapters, "x": x.grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 25
    for name, expected in gradients[0].items():
        assert expected.abs().sum() > 0
        assert torch.equal(expected, gradients[1][name]), name


def test_training_an_adapter(tmp_path: Path) -> None:
    resident, model = with_adapter(net("nf4")), with_adapter(net("nf4"))
    tightly(model, tmp_path)
    for one in (resident, model):
        adapters = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            one(X).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(X), resident(X))


@pytest.mark.parametrize("kind", ["dora", "rslora", "conv", "embedding"])
def test_other_adapters(kind: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"init_lora_weights": False}
    x = X
    if kind == "dora":
        config["use_dora"] = True
    elif kind == "rslora":
        config["use_rslora"] = True

    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(500, WIDTH)
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = super().forward(self.conv(self.embed(ids).mT).mT)
            return out

    if kind in ("conv", "embedding"):
        config["target_modules"] = ["conv"] if kind == "conv" else ["embed", "up"]
        x = torch.randint(0, 500, (2, 7))
    outputs = []
    for which in ("resident", "offloaded"):
        torch.manual_seed(0)
        model: Any = (Other() if kind in ("conv", "embedding") else Net()).eval()
        if which == "offloaded":
            offloaded(model, (x,), tmp_path, 0.5)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(**{**CONFIG, **config})).eval()
        with torch.no_grad():
            outputs.append(model(x))
    assert torch.equal(*outputs)


def test_an_adapter_counts_towards_the_limit(tmp_path: Path) -> None:
    model = net(None)
    with torch.no_grad():
        expected = model(X)
    least = smallest(model, (X,), tmp_path)
    enable_vram_management(model, f"{least} B", 0, inputs=(X,), folder=tmp_path)
    session = model.vramkit_session
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = with_adapter(model)
    added = sum(p.numel() * p.element_size() for n, p in wrapped.named_parameters() if "lora_" in n)
    with torch.no_grad(), pytest.raises(vramkit.BudgetError, match="adapters") as caught:
        wrapped(X)
    assert caught.value.needed_bytes == least + added
    after = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    session.resize(f"{least + added} B")
    with torch.no_grad():
        twin = with_adapter(net(None))
        assert torch.equal(wrapped(X), twin(X))
        assert session.stats().committed <= session.stats().limit
        assert session.stats().limit + session.fixed_bytes == least + added
        assert torch.equal(wrapped.unload()(X), expected)
        session.resize(f"{least} B")
        assert torch.equal(model(X), expected)


def test_room_comes_back_when_an_adapter_goes(tmp_path: Path) -> None:
    model = net(None)
    limit = weight_bytes(model) + (16 << 10)  # each resident is whole pages
    enable_vram_management(model, f"{limit} B", 0, inputs=(X,), folder=tmp_path)
    session = model.vramkit_session
    with torch.no_grad():
        expected = model(X)
        residents = session.stats().residents
        wrapped = with_adapter(model, r=32)
        wrapped(X)
        assert session.stats().residents < residents
        assert session.stats().committed + session.fixed_bytes <= limit
        wrapped.unload()
        for _ in range(3):
            assert torch.equal(model(X), expected)
        assert session.stats().residents == residents


def test_a_copy_of_an_adapted_model_is_resident(tmp_path: Path, quiet: Any) -> None:
    model = net(None)
    tightly(model, tmp_path)
    wrapped = with_adapter(model)
    with torch.no_grad():
        expected = wrapped(X)
        twin = copy.deepcopy(wrapped)
        wrapped.merge_adapter()
        assert torch.equal(twin(X), expected)
        assert torch.equal(twin.merge_and_unload()(X), wrapped(X))
