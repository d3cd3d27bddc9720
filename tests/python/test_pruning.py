"""Submodules that are never called: found, taken out, put back; results stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from small_systems import Vae, partformer
from torch import nn
from vramkit.errors import PrunedModuleError
from vramkit.model_objects import tensors_of
from vramkit.pruning import never_called, prune

STEPS = {"num_inference_steps": 2}


def real_bytes(obj: Any) -> int:
    return sum(t.nbytes for t in tensors_of(obj) if t.device.type != "meta")


def test_what_a_pipeline_never_calls() -> None:
    """The encoder of one VAE, the decoders of two, and one whole VAE of the conditioner."""
    pipe = partformer()
    found = never_called(pipe, lambda: pipe(**STEPS))
    assert set(found) == {"vae.encoder", "conditioner.geometry.decoder", "conditioner.part"}
    assert found["vae.encoder"] == sum(p.nbytes for p in pipe.vae.encoder.parameters())


def test_results_stay_and_all_comes_back(tmp_path: Path) -> None:
    pipe, twin = partformer(), partformer()
    before = real_bytes(pipe)
    expected, _ = twin(seed=1, **STEPS)
    pruned = prune(pipe, lambda: pipe(**STEPS), folder=tmp_path)
    assert real_bytes(pipe) == before - pruned.bytes
    assert "conditioner.part" in str(pruned)
    torch.testing.assert_close(pipe(seed=1, **STEPS)[0], expected, rtol=0, atol=0)
    with pytest.raises(PrunedModuleError, match=r"vae\.encoder was pruned"):
        pipe.vae.encode(torch.rand(4, 3))
    assert pruned.restore() == sum(pruned.modules.values())
    assert pruned.restore() == 0
    assert list(tmp_path.iterdir()) == []
    for mine, other in zip(tensors_of(pipe), tensors_of(twin), strict=True):
        assert torch.equal(mine, other)
        assert mine.requires_grad == other.requires_grad
    assert pipe.vae.encode(torch.rand(4, 3)).shape == (4, 48)


def test_weights_read_without_a_call_stay() -> None:
    """MultiheadAttention reads out_proj's weight; a tied head's module is not called either."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.embedding, self.head = nn.Embedding(8, 16), nn.Linear(16, 8, bias=False)
            self.head.weight = self.embedding.weight
            self.unused = nn.Linear(16, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            x = self.attention(x, x, x)[0]
            return x @ self.head.weight.t()

    model = Tied()
    ids = torch.arange(4)[None]
    assert list(never_called(model, lambda: model(ids))) == ["unused"]
    expected = model(ids)
    pruned = prune(model, lambda: model(ids))
    torch.testing.assert_close(model(ids), expected)
    pruned.restore()


def test_shared_with_what_stays() -> None:
    """A module that is not called, whose weight one that is called has too: used, so kept."""
    vae = Vae()
    vae.decoder[0] = vae.encoder[0]
    found = never_called(vae, lambda: vae.encode(torch.rand(2, 3)))
    assert list(found) == ["decoder.2"]


def test_converted_layers() -> None:
    vae = Vae()
    vramkit.convert(vae, "int8")
    points = torch.rand(2, 3)
    expected = vae.encode(points)
    pruned = prune(vae, lambda: vae.encode(points))
    assert list(pruned.modules) == ["decoder"]
    torch.testing.assert_close(vae.encode(points), expected, rtol=0, atol=0)
    pruned.restore()
    assert torch.isfinite(vae.decode(torch.rand(1, 64))).all()


def test_a_failing_call_changes_nothing(tmp_path: Path) -> None:
    vae = Vae()

    def call() -> None:
        raise OSError("no mesh")

    with pytest.raises(OSError, match="no mesh"):
        prune(vae, call)
    with pytest.raises(FileNotFoundError):
        prune(vae, lambda: vae.encode(torch.rand(2, 3)), folder=tmp_path / "missing")
    assert all(p.device.type == "cpu" for p in vae.parameters())
    assert vae.decode(torch.rand(1, 64)).shape == (1, 1)
