"""Training in mixed precision: the wrapper, the memory savers, the inference helpers."""

from __future__ import annotations

import copy
import itertools
import math
import random
import threading
import warnings
from typing import Any

import numerics
import pytest
import torch
from torch import Tensor, nn
from vramkit.errors import BudgetError
from vramkit.training import (
    BlockCost,
    CheckpointedBlock,
    MemoryPool,
    MixedPrecisionAttention,
    MixedPrecisionWrapper,
    async_inference,
    choose_checkpoints,
    compress_activations,
    make_tensor_core_friendly,
    measured_islands,
    optimize_conv_memory_format,
    optimized_inference,
    peak_bytes,
    stable_mse_loss,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Net(nn.Module):
    """Convolutions, a batch norm, dropout, a head tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.relu(self.norm(self.conv(x))))
        out: Tensor = self.head(y.mean((2, 3)))
        return out


class TestWrapper:
    @pytest.mark.parametrize("precision", ["fp16", "bf16", "FP32"])
    def test_inference_casts_for_real(self, precision: str) -> None:
        torch.manual_seed(0)
        model = Net().eval()
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            expected = model(x)
            before = MixedPrecisionWrapper(copy.deepcopy(model), "fp32").parameter_bytes()
            wrapped = MixedPrecisionWrapper(model, precision)
            found = wrapped(x)
        assert found.dtype == wrapped.dtype
        unit = numerics.UNIT[wrapped.dtype]
        torch.testing.assert_close(found.float(), expected, rtol=32 * unit, atol=32 * unit)
        assert model.norm.weight.dtype == torch.float32
        if precision != "FP32":
            assert wrapped.parameter_bytes() < 0.65 * before
            weights = (model.conv.weight, model.head.weight)
            assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
            with pytest.raises(RuntimeError, match="freed"):
                wrapped.train()

    def test_states_are_the_plain_models(self) -> None:
        plain = Net().eval()
        wrapped = MixedPrecisionWrapper(copy.deepcopy(plain), "bf16")
        assert list(wrapped.state_dict()) == list(plain.state_dict())
        wrapped.load_state_dict(plain.state_dict())
        plain.load_state_dict(wrapped.state_dict())
        assert torch.equal(plain.conv.weight, wrapped.model.conv.weight.float())
        outer = nn.Sequential(MixedPrecisionWrapper(Net().eval(), "bf16"))
        assert list(outer.state_dict()) == [f"0.{k}" for k in plain.state_dict()]
        outer.load_state_dict({f"0.{k}": v for k, v in plain.state_dict().items()})
        assert torch.equal(outer[0].model.conv.weight.float(), plain.conv.weight)

    def test_training_keeps_masters(self) -> None:
        wrapped = MixedPrecisionWrapper(Net().train(), "bf16")
        assert all(p.dtype == torch.float32 for p in wrapped.parameters())
        out = wrapped(torch.randn(2, 3, 8, 8))
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in wrapped.parameters())
        wrapped.eval()
        wrapped.train()
        wrapped.cast_for_inference()
        assert wrapped.model.conv.weight.dtype == torch.bfloat16

    def test_compensated_training(self) -> None:
        wrapped = MixedPrecisionWrapper(Net().train(), "bf16", masters="compensated")
        assert wrapped.model.conv.weight.dtype == torch.bfloat16
        optimizer = wrapped.optimizer(lr=1e-3)
        wrapped(torch.randn(2, 3, 8, 8)).float().sum().backward()
        optimizer.step()
        remainder = optimizer.state[wrapped.model.conv.weight]["remainder"]
        assert remainder.dtype == torch.bfloat16
        assert float(remainder.abs().max()) > 0

    def test_falls_back_from_overflow_and_says_so(self) -> None:
        for training in (False, True):
            torch.manual_seed(0)
            model = Net().train(training)
            with torch.no_grad():
                model.head.weight.mul_(1e5 if training else 3e4)
                model.head.bias.fill_(6e4)
            wrapped = MixedPrecisionWrapper(model, "fp16")
            x = torch.randn(2, 3, 8, 8) * 100
            with pytest.warns(RuntimeWarning, match="going on in bfloat16"):
                out = wrapped(x)
            assert bool(torch.isfinite(out).all())
            assert len(wrapped.fallbacks) == 1
            assert out.dtype == torch.bfloat16
            assert int(model.norm.num_batches_tracked) == int(training)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                wrapped(x)

    def test_islands_are_measured(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        with torch.no_grad():
            model[0].weight.mul_(1e5)
        x = torch.randn(4, 8)
        found = {i.name: i.reason for i in measured_islands(model, [(x,)], torch.float16)}
        assert set(found) == {"0", "1", "2"}
        assert "reaches" in found["0"]
        assert measured_islands(model, [(x,)], torch.bfloat16) == []
        with torch.no_grad():
            expected = model.eval()(x)
            out = MixedPrecisionWrapper(model, "fp16", calibration=[(x,)])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(RuntimeWarning, match="bfloat16"):
                    # The islands hold, what passes between them in float16 does not.
                    out(x)
        assert expected.shape == (4, 2)

    def test_tied_weights_stay_tied(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
        model[1].weight = model[0].weight
        wrapped = MixedPrecisionWrapper(model, "bf16")
        assert wrapped.model[0].weight is wrapped.model[1].weight

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="unknown precision"):
            MixedPrecisionWrapper(Net(), "fp12")
        with pytest.raises(ValueError, match="mixed precision is"):
            MixedPrecisionWrapper(Net(), "nf4")
        with pytest.raises(ValueError, match="fp8"):
            MixedPrecisionWrapper(Net().train(), "fp8")
        with pytest.raises(TypeError, match="float32"):
            MixedPrecisionWrapper(Net().half(), "bf16")
        with pytest.raises(ValueError, match="no modules"):
            MixedPrecisionWrapper(Net(), "bf16", islands=["nothing"])


class TestSavers:
    def test_checkpointing_changes_nothing(self) -> None:
        torch.manual_seed(0)
        plain = nn.Sequential(Net(), nn.Linear(4, 2)).train()
        saved = copy.deepcopy(plain)
        saved[0] = CheckpointedBlock(saved[0])
        x = torch.randn(2, 3, 8, 8)
        found = []
        for model in (plain, saved):
            torch.manual_seed(7)
            for _ in range(2):
                model(x).square().sum().backward()
            found.append([p.grad for p in model.parameters()] + list(model.buffers()))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    def test_choices_are_the_best(self) -> None:
        generator = random.Random(1)
        for _ in range(60):
            blocks = [
                BlockCost(
                    generator.randint(0, 100), generator.randint(0, 40), generator.random() * 9
                )
                for _ in range(generator.randint(1, 9))
            ]
            every = list(itertools.product([False, True], repeat=len(blocks)))
            peaks = {choice: peak_bytes(blocks, choice) for choice in every}
            budget = generator.choice(sorted(peaks.values()))
            fitting = [c for c in every if peaks[c] <= budget]
            best = min(
                sum(b.forward_cost for b, again in zip(blocks, c, strict=True) if again)
                for c in fitting
            )
            found = choose_checkpoints(blocks, budget)
            assert found.extra_cost == pytest.approx(best)
            assert found.peak_bytes <= budget
            least = min(peaks.values())
            with pytest.raises(BudgetError) as caught:
                choose_checkpoints(blocks, least - 1)
            assert caught.value.needed_bytes == least

    @pytest.mark.parametrize("to", ["fp16", "bf16", "int8", "fp8"])
    def test_activations_in_fewer_bytes(self, to: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        x = torch.randn(128, 64)
        model(x).square().mean().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with compress_activations(model, to) as saved:
            loss = model(x).square().mean()
        loss.backward()
        assert saved.bytes_after <= saved.bytes_before * (0.5 if to in ("fp16", "bf16") else 0.27)
        assert saved.tensors >= 4
        error = {"fp16": 2**-10, "bf16": 2**-7, "int8": 0.03, "fp8": 0.08}[to]
        for p, e in zip(model.parameters(), expected, strict=True):
            assert float((p.grad - e).norm()) <= error * float(e.norm())

    def test_eight_bits_are_unbiased(self) -> None:
        x = torch.randn(64, 256, requires_grad=True)
        layer = nn.Linear(256, 1, bias=False)
        exact = x.detach().sum(0)
        total = torch.zeros(256)
        for seed in range(64):
            layer.zero_grad()
            with compress_activations(layer, "int8", seed=seed):
                loss = layer(x.clone()).sum()
            loss.backward()
            total += layer.weight.grad[0]
        step = x.detach().abs().amax(1).max() / 127
        # 64 * 64 roundings, each off by at most a step: six standard deviations of their mean.
        assert float((total / 64 - exact).abs().max()) < 6 * float(step) * math.sqrt(64 / 64)

    def test_pools_lend_a_buffer_once(self) -> None:
        pool = MemoryPool("bf16", device="cpu")
        held: list[Tensor] = []
        lock = threading.Lock()

        def work() -> None:
            for _ in range(50):
                buffer = pool.get_tensor((8,))
                with lock:
                    assert all(b is not buffer for b in held)
                    held.append(buffer)
                with lock:
                    held[:] = [b for b in held if b is not buffer]
                pool.release(buffer)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        stats = pool.stats()
        assert stats.leased == 0
        assert stats.hits + stats.misses == 200
        assert stats.misses == stats.free <= 4
        buffer = pool.get_tensor((8,))
        with pytest.raises(ValueError, match="not leased"):
            pool.release(buffer[:])
        pool.release(buffer)
        with pytest.raises(ValueError, match="not leased"):
            pool.release(buffer)
        assert pool.clear() == stats.free_bytes
        with pytest.raises(ValueError, match="fp16, bf16 or fp32"):
            MemoryPool("nf4")


class TestHelpers:
    def test_small_ones(self) -> None:
        assert [make_tensor_core_friendly(c) for c in (1, 8, 9, 192)] == [8, 8, 16, 192]
        for bad in (0, -1):
            with pytest.raises(ValueError, match="positive"):
                make_tensor_core_friendly(bad)
        wide = torch.full((4,), 300.0, dtype=torch.float16)
        assert stable_mse_loss(wide, torch.zeros_like(wide)).item() == 90000.0
        with pytest.raises(ValueError, match="shapes"):
            stable_mse_loss(torch.zeros(2, 1), torch.zeros(2))

    def test_layouts(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        x = torch.randn(1, 3, 8, 8)
        expected = model(x)
        weight = model[0].weight
        optimize_conv_memory_format(model)
        assert model[0].weight is weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), expected)
        cube = optimize_conv_memory_format(nn.Conv3d(2, 3, 3))
        assert cube.weight.is_contiguous(memory_format=torch.channels_last_3d)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_attention(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        attention = MixedPrecisionAttention(32, 4).to(dtype)
        attention.query_rows = 7
        x = torch.randn(2, 20, 32).to(dtype)
        exact = copy.deepcopy(attention).double()
        found = attention(x).detach()
        wide = x.double()
        q, k, v = (
            layer(wide).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer in (exact.query, exact.key, exact.value)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
        expected = exact.out((weights @ v).transpose(1, 2).flatten(2)).detach()
        unit = numerics.UNIT[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=16 * unit, atol=16 * unit)
        with pytest.raises(ValueError, match="divide"):
            MixedPrecisionAttention(30, 4)

    def test_inference_leaves_the_model(self) -> None:
        model = Net().train()
        model.drop.eval()
        x = torch.randn(2, 3, 8, 8)
        out = optimized_inference(model, x, "bf16")
        assert out.dtype == torch.bfloat16
        assert out.is_inference()
        assert (model.training, model.drop.training) == (True, False)
        with pytest.raises(ValueError, match="autocast"):
            optimized_inference(model, x, "nf4")

    def test_streams_of_batches(self) -> None:
        model = Net().eval()
        batches = [torch.randn(1, 3, 8, 8) for _ in range(7)]
        with torch.inference_mode():
            expected = [model(b) for b in batches]
        found = async_inference(model, iter(batches))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert async_inference(model, []) == []
        before = threading.active_count()

        def broken() -> Any:
            yield batches[0]
            raise KeyError("gone")

        with pytest.raises(KeyError, match="gone"):
            async_inference(model, broken())

        def fails(_: Tensor) -> Tensor:
            raise ArithmeticError("no")

        with pytest.raises(ArithmeticError, match="no"):
            async_inference(fails, iter(batches))
        assert threading.active_count() == before
        with pytest.raises(ValueError, match="depth"):
            async_inference(model, [], depth=0)

    def test_batches_are_made_during_the_computation(self) -> None:
        """The second batch is asked for before the first one's result is there."""
        asked = threading.Event()

        def stream() -> Any:
            yield torch.zeros(1)
            asked.set()
            yield torch.zeros(1)

        def model(x: Tensor) -> Tensor:
            assert asked.wait(20)
            return x

        assert len(async_inference(model, stream())) == 2
