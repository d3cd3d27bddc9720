"""Precision by hardware, on pretended hardware where the machine lacks it."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vramkit import PrecisionMode, QuantizedLayer
from vramkit.hardware import (
    calculate_quality_difference,
    compute_dtype,
    configure_production_precision,
    get_optimal_precision,
    monitor_vram_usage,
    run_with_precision,
    setup_optimal_precision,
)
from vramkit.model_manager import VRAMEfficientModelManager
from vramkit.model_objects import apply_precision

GIB = 1 << 30


@pytest.fixture
def card(monkeypatch):
    """Pretends a CUDA card, or none, without touching a driver."""

    def pretend(capability=None, total_gb=24.0):
        properties = SimpleNamespace(total_memory=int(total_gb * GIB))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * GIB)

        def refuse(*_args):
            raise AssertionError("it says True where bfloat16 is emulated")

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", refuse)

    return pretend


@pytest.mark.parametrize(
    ("capability", "mode"),
    [(None, "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16")],
)
def test_optimal_precision(card, capability, mode):
    card(capability)
    assert get_optimal_precision() == mode
    manager = VRAMEfficientModelManager("fp8")
    assert setup_optimal_precision(manager) == mode
    assert manager.precision_mode == mode


@pytest.mark.parametrize(
    ("capability", "total_gb", "mode", "aggressive"),
    [
        (None, 0, "fp32", False),
        ((8, 6), 11.7, "bf16", False),  # what a "12 GB" card reports
        ((7, 5), 15.6, "fp16", False),
        ((8, 6), 9.7, "fp16", False),
        ((8, 6), 7.8, "fp16", False),  # an "8 GB" card
        ((8, 6), 5.8, "fp16", True),
        ((7, 5), 3.9, "fp16", True),
    ],
)
def test_production_precision(card, capability, total_gb, mode, aggressive):
    card(capability, total_gb)
    manager = VRAMEfficientModelManager("fp8", max_resident=3)
    assert configure_production_precision(manager) == mode
    assert manager.precision_mode == mode
    assert manager.aggressive_unloading is aggressive
    assert manager._ledger.max_resident == (1 if aggressive else 3)


def test_aggressive_unloading_keeps_one_model():
    manager = VRAMEfficientModelManager(max_resident=2)
    for name in "ab":
        manager.register(name, lambda: nn.Linear(4, 4))
        manager.get(name)
    manager.aggressive_unloading = True
    manager.get("a")(torch.ones(4))
    manager.get("b")
    assert list(manager.loaded_models()) == ["b"]
    manager.aggressive_unloading = False
    manager.get("a")
    assert set(manager.loaded_models()) == {"a", "b"}


def test_bf16_falls_back_with_a_warning_on_old_cuda_only(card):
    card((7, 5))
    assert compute_dtype("bf16") == torch.float16
    assert compute_dtype("nf4", "cuda") == torch.float16
    assert compute_dtype("fp32", "cuda") == torch.float32
    assert compute_dtype("bf16", "cpu") == torch.bfloat16
    assert VRAMEfficientModelManager("bf16").torch_dtype == torch.float16
    assert VRAMEfficientModelManager("bf16", device="cpu").torch_dtype == torch.bfloat16
    model = nn.Linear(4, 4)
    # The pretended card has no memory to move to: this stops once the warning is out.
    with (
        pytest.warns(RuntimeWarning, match="float16 is used"),
        pytest.raises((AssertionError, RuntimeError)),
    ):
        apply_precision(model, PrecisionMode.BF16, "cuda")
    assert model.weight.dtype == torch.float16
    card((8, 0))
    assert compute_dtype("bf16", "cuda") == torch.bfloat16


def test_monitor(card, capsys):
    card(None)
    assert monitor_vram_usage() == (0.0, 0.0)
    assert "not available" in capsys.readouterr().out
    card((8, 0))
    assert monitor_vram_usage() == (3.0, 4.0)
    assert "3.00 GiB" in capsys.readouterr().out


def test_run_with_precision_on_a_given_model():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(4, 64)
    reference = model(x)
    half = run_with_precision("bf16", x, model)
    assert half.dtype == torch.bfloat16
    assert not half.requires_grad
    low = run_with_precision("NF4", (x,), model)
    assert model[0].weight.dtype == torch.float32
    assert not isinstance(model[0], QuantizedLayer)
    assert 0 < calculate_quality_difference(reference, half) < 2
    assert calculate_quality_difference(reference, half) < calculate_quality_difference(
        reference, low
    )
    assert torch.equal(run_with_precision("fp32", {"input": x}, model), reference)
    with pytest.raises(ValueError, match="fp32, fp16"):
        run_with_precision("fp17", x, model)


def test_run_with_precision_on_the_managers_model():
    manager = VRAMEfficientModelManager()
    with pytest.raises(RuntimeError, match="no current model"):
        run_with_precision("bf16", torch.ones(4), manager=manager)
    manager.register("a", lambda: nn.Linear(4, 4))
    manager.get("a")
    out = run_with_precision("bf16", torch.ones(4), manager=manager)
    assert out.dtype == torch.bfloat16
    assert manager.precision_mode is PrecisionMode.FP32
    assert manager.get("a").weight.dtype == torch.float32


def test_converted_model_goes_back_to_plain():
    model = nn.Linear(64, 64)
    apply_precision(model, PrecisionMode.NF4)
    assert isinstance(model, QuantizedLayer)
    apply_precision(model, PrecisionMode.FP16)
    assert not isinstance(model, QuantizedLayer)
    assert model.weight.dtype == torch.float16


def test_quality_difference():
    a = torch.tensor([3.0, 4.0])
    assert calculate_quality_difference(a, a) == 0.0
    assert calculate_quality_difference(a, torch.tensor([3.0, 4.5])) == pytest.approx(10.0)
    big = torch.full((1000,), 3e4, dtype=torch.float16)
    assert calculate_quality_difference(big, big * 0.5) == pytest.approx(50.0), "no overflow"
    for bad in (math.nan, math.inf, -math.inf):
        assert calculate_quality_difference(a, torch.tensor([3.0, bad])) == math.inf
        assert calculate_quality_difference(torch.tensor([3.0, bad]), a) == math.inf
    zero = torch.zeros(2)
    assert calculate_quality_difference(zero, zero) == 0.0
    assert calculate_quality_difference(zero, a) == math.inf
    with pytest.raises(ValueError, match="shapes"):
        calculate_quality_difference(a, torch.ones(3))


@dataclasses.dataclass
class Output:
    """As models return it."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: float | None = None


class Cache:
    """A plain object in an output, with a setting and a way back to itself."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.layers = [keys]
        self.length = 7
        self.owner = self


def test_quality_difference_of_what_models_return():
    a, b = torch.randn(3, 4), torch.randn(2, 2, dtype=torch.float16)
    c, d = a + 0.1 * torch.randn(3, 4), (b + 0.1).half()
    error = math.sqrt(float((c - a).double().norm()) ** 2 + float((d.double() - b).norm()) ** 2)
    expected = 100 * error / math.hypot(float(a.double().norm()), float(b.double().norm()))
    for make in (
        lambda x, y: (x, y),
        lambda x, y: [x, [y]],
        lambda x, y: {"x": x, "y": {"z": (y,)}, "name": "same", "none": None},
        lambda x, y: Output(x, (y,)),
        lambda x, y: {"logits": x.numpy(), "cache": Cache(y)},
        lambda x, y: [x, *y.flatten().tolist()],
    ):
        found = calculate_quality_difference(make(a, b), make(c, d))
        assert isinstance(found, float)
        assert found == pytest.approx(expected, rel=1e-12)
        assert calculate_quality_difference(make(a, b), make(a, b)) == 0.0
    assert calculate_quality_difference(3.0, 3.3) == pytest.approx(10.0, rel=1e-12)
    assert calculate_quality_difference((a, math.nan), (a, 1.0)) == math.inf
    assert calculate_quality_difference(Cache(a), Cache(a)) == 0.0
    z = torch.tensor([3 + 4j])
    assert calculate_quality_difference([z], [z + 0.5j]) == pytest.approx(10.0)


def test_quality_difference_of_a_transformers_output():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(64, (1, 9))
    with torch.no_grad():
        first, second = model(tokens), model(tokens)
        assert first.past_key_values is not None
        assert calculate_quality_difference(first, second) == 0.0
        model.lm_head.weight += 0.01
        assert 0 < calculate_quality_difference(first, model(tokens)) < 100
        cache = [layer.keys for layer in first.past_key_values.layers]
        cache[1].mul_(2)
    assert calculate_quality_difference(first.past_key_values, second.past_key_values) > 10


@pytest.mark.parametrize(
    ("a", "b", "error", "text"),
    [
        ((torch.ones(2),), (torch.ones(3),), ValueError, "shapes at 0 differ"),
        ({"x": [torch.ones(2)]}, {"x": [torch.ones(2)] * 2}, ValueError, "at x differ in struc"),
        ({"x": torch.ones(2)}, {"y": torch.ones(2)}, ValueError, "'x' is in one"),
        (Output(torch.ones(2), ()), Output(torch.ones(2), (), 1.0), TypeError, "at loss"),
        ([torch.ones(2)], torch.ones(2), TypeError, "list and Tensor"),
        (torch.ones(2), None, TypeError, "Tensor and NoneType"),
        ((torch.ones(2), "a"), (torch.ones(2), "b"), ValueError, "'a' and 'b'"),
        ((torch.ones(2), None), (torch.ones(2), True), ValueError, "None and True"),
        ((), (), ValueError, "nothing to compare"),
        (None, None, ValueError, "nothing to compare"),
        (object(), object(), ValueError, "differ"),
        (SimpleNamespace(a=1), SimpleNamespace(a=1), TypeError, "no tensor"),
    ],
)
def test_quality_difference_of_other_structures(a, b, error, text):
    with pytest.raises(error, match=text):
        calculate_quality_difference(a, b)
