"""Offloaded models: the same bits as resident ones, and parameters that can be used at any time."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from test_offload_report import settled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vramkit import enable_vram_management
from vramkit.estimator import weight_bytes
from vramkit.offload.session import Lent
from zoo import ZOO, call

SPECIES = [
    "llama", "llama, tied", "qwen2 moe", "bert", "t5", "whisper", "mamba", "convnext",
    "transformer encoder and decoder, fused in_proj", "lstm tagger with bags and a bilinear layer",
    "gru speller with a cell",
]  # fmt: skip


def smallest(model: nn.Module, inputs: Any, folder: Path) -> int:
    """The least limit that a model can be offloaded within, in bytes."""
    with pytest.raises(vramkit.BudgetError) as caught:
        enable_vram_management(model, "1 B", 0, inputs=inputs, folder=folder)
    return caught.value.needed_bytes


def offloaded(model: nn.Module, inputs: Any, folder: Path, share: float = 0.0) -> nn.Module:
    """Within the least limit, and a share of what lies between it and the whole model."""
    least = smallest(model, inputs, folder)
    limit = least + int((weight_bytes(model) - least) * share)
    return enable_vram_management(model, f"{limit} B", 0, inputs=inputs, folder=folder)


@pytest.mark.parametrize("precision", [None, "int8", "nf4"])
@pytest.mark.parametrize("name", SPECIES)
def test_the_same_bits(name: str, precision: str | None, tmp_path: Path) -> None:
    if importlib.util.find_spec(ZOO[name].package) is None:
        pytest.skip(f"{ZOO[name].package} is not installed")
    torch.manual_seed(0)
    model, inputs = ZOO[name].build()
    model.eval()
    if precision is not None:
        vramkit.convert(model, precision)
    expected = [call(model, inputs) for _ in range(3)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    offloaded(model, inputs, tmp_path)
    session = model.vramkit_session
    for one in expected:
        assert torch.equal(call(model, inputs), one)
    stats = session.engine.stats()
    assert stats.bytes_copied > 0
    assert stats.committed <= stats.limit
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    session.engine.check()
    session.disable()
    assert torch.equal(call(model, inputs), expected[0])
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert list(tmp_path.iterdir()) == []


class Chain(nn.Module):
    """Eight layers of which some work on each other's weights."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(8)])
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.checkpointed = ""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed:
                reentrant = self.checkpointed == "reentrant"
                x = torch.tanh(checkpoint(layer, x, use_reentrant=reentrant))
            else:
                x = torch.tanh(layer(x))
        out: Tensor = self.attention(x, x, x)[0]
        return out


def chain() -> tuple[Chain, Tensor]:
    torch.manual_seed(0)
    return Chain().eval(), torch.randn(2, 5, 96)


@pytest.mark.parametrize("checkpointed", ["", "reentrant", "without"])
def test_gradients_are_those_of_the_resident_model(checkpointed: str, tmp_path: Path) -> None:
    model, x = chain()
    model.checkpointed = checkpointed
    x.requires_grad_()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()] + [x.grad.clone()]
    model.zero_grad()
    x.grad = None
    offloaded(model, (x.detach(),), tmp_path)
    model(x).square().sum().backward()
    found = [p.grad for p in model.parameters()] + [x.grad]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_training_steps_are_written_back(tmp_path: Path) -> None:
    model, x = chain()
    twin = copy.deepcopy(model)
    offloaded(model, (x,), tmp_path)
    for one in (model, twin):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(model(x), twin(x))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_changes_from_outside(tmp_path: Path) -> None:
    model, x = chain()
    twin = copy.deepcopy(model)
    offloaded(model, (x,), tmp_path, 0.5)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
        for one in (model, twin):
            one.layers[0].weight.mul_(2)
            one.layers[7].weight[3] = 1.0
            one.attention.out_proj.weight.data = one.attention.out_proj.weight.data.flip(0)
        assert torch.equal(model(x), twin(x))
        state = {k: v * 0.5 for k, v in twin.state_dict().items()}
        for one in (model, twin):
            one.load_state_dict(state)
        assert torch.equal(model(x), twin(x))


def test_copies_and_files_are_resident_models(tmp_path: Path) -> None:
    model, x = chain()
    expected = model(x)
    offloaded(model, (x,), tmp_path)
    model(x)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = Chain().eval()
    other.load_state_dict(torch.load(buffer))
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert not any(isinstance(m.forward, Lent) for m in one.modules())
        assert getattr(one, "vramkit_session", None) is None
        assert torch.equal(one(x), expected)
    model.vramkit_session.disable()
    assert torch.equal(other(x), expected)


def test_the_first_call_tells_the_order(tmp_path: Path) -> None:
    model, x = chain()
    limit = smallest(chain()[0], (x,), tmp_path)
    with torch.no_grad():  # attention takes another way with gradients, of other bits
        expected = model(x)
        enable_vram_management(model, f"{limit} B", 0, folder=tmp_path)
        assert not hasattr(model, "vramkit_session")
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert model.vramkit_session.engine.stats().loads > 0


def test_a_first_call_that_cannot_be_followed(tmp_path: Path) -> None:
    class Deciding(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else x

    model, x = Deciding().eval(), torch.rand(2, 5, 96)
    enable_vram_management(model, "1 GB", 0, folder=tmp_path)
    for _ in range(2):  # the whole model does not run unasked the second time either
        with torch.no_grad(), pytest.raises(ValueError, match="decides by the values"):
            model(x)
    assert list(tmp_path.iterdir()) == []


def test_more_room_copies_less(tmp_path: Path) -> None:
    copied = []
    for share in (0.0, 0.3, 0.6, 2.0):
        model, x = chain()
        offloaded(model, (x,), tmp_path, share)
        with torch.no_grad():
            model(x)
            settled(model.vramkit_session)  # blocks are read ahead of the next pass
            before = model.vramkit_session.engine.stats().bytes_copied
            model(x)
            settled(model.vramkit_session)
            copied.append(model.vramkit_session.engine.stats().bytes_copied - before)
        model.vramkit_session.disable()
    assert copied == sorted(copied, reverse=True)
    assert copied[0] > copied[-1] == 0


def test_resize(tmp_path: Path) -> None:
    model, x = chain()
    with torch.no_grad():
        expected = model(x)
    least = smallest(model, (x,), tmp_path)
    enable_vram_management(model, f"{least} B", 0, inputs=(x,), folder=tmp_path)
    session = model.vramkit_session
    with torch.no_grad():
        for limit in (least, 4 * weight_bytes(model), least):
            session.resize(f"{limit} B")
            for _ in range(3):
                assert torch.equal(model(x), expected)
            assert session.stats().committed <= session.stats().limit == limit - session.fixed_bytes
        with pytest.raises(vramkit.BudgetError):
            session.resize(f"{least - 1} B")
        assert torch.equal(model(x), expected)


def test_the_buffer_and_the_default_limit(tmp_path: Path) -> None:
    model, x = chain()
    expected = model(x).detach()
    needed = smallest(model, (x,), tmp_path)
    with pytest.raises(vramkit.BudgetError) as caught:
        enable_vram_management(model, f"{needed} B", "1 KB", inputs=(x,), folder=tmp_path)
    assert caught.value.needed_bytes == needed + 1000
    enable_vram_management(model, inputs=(x,), folder=tmp_path)
    assert torch.equal(model(x), expected)
    session = model.vramkit_session
    assert session.stats().residents == len(session.division.blocks)
    with pytest.raises(TypeError, match="takes a module"):
        enable_vram_management([model])  # type: ignore[arg-type]


def test_several_threads(tmp_path: Path) -> None:
    model, x = chain()
    inputs = [x * i for i in range(1, 9)]
    with torch.no_grad():
        expected = [model(one) for one in inputs]
        offloaded(model, (x,), tmp_path)
        found: list[Any] = [None] * len(inputs)

        def run(i: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    found[i] = model(inputs[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model.vramkit_session.engine.check()


class Telling(nn.Module):
    """A layer that returns its weight beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x @ self.weight, {"row": self.weight[3]}


class TellingAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Telling() for _ in range(6)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        rows = []
        for layer in self.layers:
            x, more = layer(x)
            rows.append(more["row"])
        return x, rows


def test_results_that_are_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = TellingAll(), torch.randn(3, 64)
    with torch.no_grad():
        expected, rows = model(x)
        rows = [row.clone() for row in rows]
        offloaded(model, (x,), tmp_path)
        for _ in range(2):
            found, told = model(x)
            assert torch.equal(found, expected)
            assert all(torch.equal(a, b) for a, b in zip(told, rows, strict=True))


def test_an_error_in_a_forward_leaves_the_model_usable(tmp_path: Path) -> None:
    model, x = chain()
    expected = model(x)
    offloaded(model, (x,), tmp_path)
    with pytest.raises(RuntimeError):
        model(x[..., :7])
    assert torch.equal(model(x), expected)
    model.vramkit_session.engine.check()


def test_bad_input(tmp_path: Path) -> None:
    model, x = chain()
    with pytest.raises(vramkit.BudgetError, match="smallest limit that would do is") as caught:
        enable_vram_management(model, "100 B", 0, inputs=(x,), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not any("forward" in m.__dict__ for m in model.modules())
    needed = caught.value.needed_bytes
    with pytest.raises(vramkit.BudgetError):
        enable_vram_management(model, f"{needed - 1} B", 0, inputs=(x,), folder=tmp_path)
    enable_vram_management(model, f"{needed} B", 0, inputs=(x,), folder=tmp_path)
    with pytest.raises(ValueError, match="offloaded already"):
        enable_vram_management(model, f"{needed} B", 0, inputs=(x,), folder=tmp_path)
    with pytest.raises(ValueError, match="nothing of this model can be moved"):
        enable_vram_management(nn.Linear(8, 8), "1 GB", 0, inputs=((2, 8),), folder=tmp_path)
