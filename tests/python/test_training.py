"""Training in mixed precision: the native passes, the scaler, the wrapper, the memory savers."""

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
    AdamW,
    AdaptiveGradScaler,
    BlockCost,
    CheckpointedBlock,
    MemoryPool,
    MixedPrecisionAttention,
    MixedPrecisionWrapper,
    async_inference,
    cast_,
    choose_checkpoints,
    compress_activations,
    gradient_norm,
    make_tensor_core_friendly,
    measured_islands,
    optimize_conv_memory_format,
    optimized_inference,
    peak_bytes,
    scale_,
    square_sum,
    stable_mse_loss,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (0, 3), (257,), (33, 1000), (5, 7, 3, 3))


def tensors(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


class TestLists:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    def test_sums_of_squares(self, dtype: torch.dtype) -> None:
        lists = tensors(dtype)
        lists.append(torch.randn(40, 50).to(dtype).t())
        lists.append(torch.randn(40, 50).to(dtype)[:, ::2])
        expected = math.fsum(float(v) ** 2 for t in lists for v in t.flatten().tolist())
        # float64 sums of exact squares: one rounding an addition.
        count = sum(t.numel() for t in lists)
        assert square_sum(lists) == pytest.approx(expected, rel=count * 2.0**-53)
        for bad in (math.inf, math.nan):
            assert not math.isfinite(square_sum([*lists, torch.tensor([1.0, bad])]))
        assert square_sum([]) == 0.0

    def test_threads_do_not_change_the_sum(self) -> None:
        lists = [torch.randn(100_000) for _ in range(3)]
        before = torch.get_num_threads()
        found = set()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.add(square_sum(lists))
        finally:
            torch.set_num_threads(before)
        assert len(found) == 1

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scaling_rounds_once(self, dtype: torch.dtype) -> None:
        lists = [*tensors(dtype), torch.randn(40, 50).to(dtype)[:, ::2]]
        expected = [(t.float() * torch.tensor(0.3)).to(dtype) for t in lists]
        scale_(lists, 0.3)
        for t, e in zip(lists, expected, strict=True):
            assert torch.equal(t, e)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_casts(self, dtype: torch.dtype) -> None:
        sources = [*tensors(torch.float32), torch.randn(40, 50).t(), torch.randn(9, 8)[:, ::2]]
        targets = [torch.empty_like(t, dtype=dtype) for t in sources]
        cast_(sources, targets)
        for s, t in zip(sources, targets, strict=True):
            assert torch.equal(s.to(dtype), t)
        with pytest.raises(ValueError, match="shape"):
            cast_([torch.zeros(2)], [torch.zeros(3)])
        with pytest.raises(ValueError, match="1 sources"):
            cast_([torch.zeros(2)], [])

    def test_the_factor_is_torchs(self) -> None:
        gradients = [torch.randn(100), torch.randn(3, 5)]
        found = gradient_norm(gradients, scale=4.0, clip=0.5)
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g / 4.0
        norm = float(nn.utils.clip_grad_norm_(parameters, 0.5))
        # torch sums in float32.
        assert found.norm == pytest.approx(norm, rel=numerics.gamma(120))
        for p, g in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(p.grad, g * found.factor, rtol=1e-5, atol=0)
        assert gradient_norm([torch.ones(2)], clip=5.0).factor == 1.0
        assert not gradient_norm([torch.tensor([math.nan])]).finite
        for bad in ({"scale": 0.0}, {"scale": math.inf}, {"clip": 0.0}):
            with pytest.raises(ValueError, match=r"scale|clip"):
                gradient_norm(gradients, **bad)


def stepped(optimizer: torch.optim.Optimizer, parameters: list[Any], steps: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


class TestAdamW:
    def test_has_the_bits_of_torchs_fused_one(self) -> None:
        ours = [nn.Parameter(t) for t in tensors(torch.float32)]
        theirs = [nn.Parameter(p.detach().clone()) for p in ours]
        options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}
        stepped(AdamW(ours, **options), ours, 5)
        exact = [nn.Parameter(p.detach().double()) for p in theirs]
        stepped(torch.optim.AdamW(theirs, fused=True, **options), theirs, 5)
        stepped(torch.optim.AdamW(exact, **options), exact, 5)
        for a, b, e in zip(ours, theirs, exact, strict=True):
            # Ten roundings a step of w and of an update below lr a step.
            bound = numerics.gamma(50) * (e.abs() + 5 * 3e-3)
            numerics.assert_within(a.detach(), e.detach(), bound)
            numerics.assert_within(b.detach(), e.detach(), bound)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_masters_are_float32s(self, dtype: torch.dtype) -> None:
        ours = [nn.Parameter(t) for t in tensors(dtype)]
        plain = [nn.Parameter(p.detach().float()) for p in ours]
        optimizer = AdamW(ours, lr=1e-3, masters="fp32")
        generator = torch.Generator().manual_seed(1)
        other = AdamW(plain, lr=1e-3)
        for _ in range(4):
            for a, b in zip(ours, plain, strict=True):
                a.grad = torch.randn(a.shape, generator=generator).to(dtype)
                b.grad = a.grad.float()
            optimizer.step()
            other.step()
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(optimizer.state[a]["master"], b.detach())
            assert torch.equal(a.detach(), b.detach().to(dtype))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_compensated_weights_keep_small_updates(self, dtype: torch.dtype) -> None:
        found = {}
        for masters in (None, "compensated"):
            p = nn.Parameter(torch.ones(300, dtype=dtype))
            optimizer = AdamW([p], lr=1e-5, weight_decay=0.0, masters=masters)
            for _ in range(200):
                p.grad = torch.ones_like(p)
                optimizer.step()
            rest = optimizer.state[p].get("remainder", torch.zeros(300))
            found[masters] = p.detach().double() + rest.double()
        assert torch.equal(found[None], torch.ones(300, dtype=torch.float64))
        # Each step moves by lr; the pair of 16-bit halves rounds its lower half each time.
        bound = 200 * numerics.UNIT[dtype] * numerics.UNIT[dtype] + 200 * 1e-5 * 1e-3
        assert float((found["compensated"] - (1 - 200e-5)).abs().max()) < bound

    def test_state_of_eight_bits(self) -> None:
        ours = [nn.Parameter(t) for t in tensors(torch.float32)]
        theirs = [nn.Parameter(p.detach().clone()) for p in ours]
        optimizer, other = AdamW(ours, lr=1e-2, state_bits=8), AdamW(theirs, lr=1e-2)
        stepped(optimizer, ours, 10)
        stepped(other, theirs, 10)
        assert optimizer.state_bytes() < 0.27 * other.state_bytes()
        moved = torch.cat([(a - b).detach().flatten() for a, b in zip(ours, theirs, strict=True)])
        # Of ten steps of 1e-2 each; a moment's code is within 1 % of it but near zero.
        assert float(moved.abs().mean()) < 0.1 * 10 * 1e-2

    def test_eight_bit_maps_are_bitsandbytes(self) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        p = nn.Parameter(torch.zeros(256))
        optimizer = AdamW([p], lr=0.0, betas=(0.0, 0.0), state_bits=8, weight_decay=0.0)
        signed = functional.create_dynamic_map(signed=True).float()
        p.grad = signed.clone()
        optimizer.step()
        state = optimizer.state[p]
        assert torch.equal(state["exp_avg_codes"], torch.arange(256, dtype=torch.uint8))
        unsigned = functional.create_dynamic_map(signed=False).float()
        p.grad = unsigned.sqrt()
        optimizer.step()
        assert torch.equal(state["exp_avg_sq_codes"], torch.arange(256, dtype=torch.uint8))

    @pytest.mark.parametrize("bits", [32, 8])
    @pytest.mark.parametrize("masters", [None, "fp32", "compensated"])
    def test_states_are_saved_and_loaded(self, masters: Any, bits: Any) -> None:
        def make() -> tuple[list[nn.Parameter], AdamW]:
            parameters = [nn.Parameter(t) for t in tensors(torch.bfloat16)]
            return parameters, AdamW(parameters, lr=1e-2, masters=masters, state_bits=bits)

        ours, optimizer = make()
        stepped(optimizer, ours, 3)
        again, resumed = make()
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for a, b in zip(again, ours, strict=True):
            a.data.copy_(b.data)
        stepped(optimizer, ours, 2)
        stepped(resumed, again, 2)
        for a, b in zip(again, ours, strict=True):
            assert torch.equal(a, b)
            for key, value in optimizer.state[b].items():
                if isinstance(value, Tensor):
                    assert value.dtype == resumed.state[a][key].dtype
                    assert torch.equal(value, resumed.state[a][key])

    def test_gradients_in_another_order_of_memory(self) -> None:
        weight = torch.randn(4, 6, 3, 3)
        found = []
        for layout in (torch.contiguous_format, torch.channels_last):
            p = nn.Parameter(weight.clone(memory_format=layout))
            p.grad = torch.ones(4, 6, 3, 3).cumsum(0)
            AdamW([p]).step()
            found.append(p.detach())
        assert torch.equal(*found)
        assert found[1].is_contiguous(memory_format=torch.channels_last)

    def test_torchs_scaler_drives_it(self) -> None:
        p = nn.Parameter(torch.ones(5))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
        scaler.scale((p * 2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(p.detach(), torch.full((5,), 0.9))
        assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((5,), 2.0) * (1 - 0.9))
        p.grad = torch.full((5,), math.inf)
        optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((5,), 0.9))

    def test_bad_input(self) -> None:
        p = nn.Parameter(torch.ones(2))
        for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"masters": "no"}):
            with pytest.raises(ValueError, match=r"lr|betas|eps|masters"):
                AdamW([p], **bad)
        with pytest.raises(ValueError, match="state_bits"):
            AdamW([p], state_bits=16)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="16 bits"):
            AdamW([p], masters="fp32")
        with pytest.raises(TypeError, match="float64"):
            AdamW([nn.Parameter(torch.ones(2).double())])
        with pytest.raises(TypeError, match="dense"):
            AdamW([nn.Parameter(torch.ones(4, 4)[:, ::2])])
        embedding = nn.Embedding(3, 2, sparse=True)
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(TypeError, match="sparse"):
            AdamW(embedding.parameters()).step()


class TestScaler:
    def test_decides_as_torchs(self) -> None:
        generator = random.Random(3)
        options: dict[str, Any] = {
            "init_scale": 2.0**10,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 3,
        }
        ours, theirs = AdaptiveGradScaler(**options), torch.amp.GradScaler("cpu", **options)
        pairs = [[nn.Parameter(torch.ones(4)) for _ in range(2)] for _ in range(2)]
        optimizers = [[torch.optim.SGD([p], lr=0.1) for p in both] for both in pairs]
        for _ in range(60):
            kinds = [generator.choice([1.0, 1.0, 1.0, math.inf, math.nan]) for _ in range(2)]
            for both in pairs:
                for p, kind in zip(both, kinds, strict=True):
                    p.grad = torch.full((4,), kind) * ours.get_scale()
            ours.step(optimizers[0])
            theirs.scale(torch.zeros(()))  # which makes its scale a tensor
            for optimizer in optimizers[1]:
                theirs.unscale_(optimizer)
                theirs.step(optimizer)
            theirs.update()
            assert ours.get_scale() == theirs.get_scale()
            for a, b in zip(*pairs, strict=True):
                assert torch.equal(a, b)
        assert ours.skipped > 10

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, AdamW])
    def test_clips_and_accumulates(self, kind: Any) -> None:
        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        plain = copy.deepcopy(model)
        batches = [torch.randn(4, 8) for _ in range(2)]
        scaler = AdaptiveGradScaler(init_scale=1024.0)
        optimizer, other = kind(model.parameters(), lr=0.1), kind(plain.parameters(), lr=0.1)
        scaler.backward(model(batches[0]).square().sum())
        report = scaler.scale_and_step(optimizer, model(batches[1]).square().sum(), clip=0.5)
        for x in batches:
            plain(x).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        other.step()
        assert report == (True, pytest.approx(float(norm), rel=1e-5), 1024.0)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_parameters_of_sixteen_bits(self) -> None:
        p = nn.Parameter(torch.ones(4, dtype=torch.float16))
        optimizer = AdamW([p], lr=0.25, masters="fp32", weight_decay=0.0)
        assert AdaptiveGradScaler(2.0**10).scale_and_step(optimizer, (p * 1e-3).sum()).stepped
        assert torch.equal(p.detach(), torch.full((4,), 0.75, dtype=torch.float16))

    def test_switches_to_bfloat16(self) -> None:
        p = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([p], lr=1.0)
        switched: list[int] = []
        scaler = AdaptiveGradScaler(bf16_after=3, on_switch=lambda: switched.append(1))
        for turn in range(4):
            p.grad = torch.full((2,), math.inf)
            if turn == 2:
                with pytest.warns(RuntimeWarning, match="3 steps in a row"):
                    assert not scaler.step(optimizer).stepped
            else:
                assert not scaler.step(optimizer).stepped
        assert switched == [1]
        assert (scaler.precision, scaler.get_scale(), scaler.skipped) == ("bf16", 1.0, 4)
        assert torch.equal(p.detach(), torch.ones(2))

    def test_states(self) -> None:
        p = nn.Parameter(torch.ones(2))
        scaler = AdaptiveGradScaler(growth_interval=5)
        optimizer = torch.optim.SGD([p], lr=0.0)
        for kind in (1.0, math.inf, 1.0, 1.0):
            p.grad = torch.full((2,), kind)
            scaler.step(optimizer)
        other = AdaptiveGradScaler()
        other.load_state_dict(scaler.state_dict())
        assert other.state_dict() == scaler.state_dict()
        for one in (scaler, other):
            for _ in range(3):
                p.grad = torch.ones(2)
                one.step(optimizer)
        assert other.get_scale() == scaler.get_scale() == 2.0**16
        with pytest.raises(ValueError, match="lacks"):
            other.load_state_dict({"scale": 1.0})
        assert other.state_dict() == scaler.state_dict()

    def test_bad_input_changes_nothing(self) -> None:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = AdaptiveGradScaler()
        before = copy.deepcopy((model.state_dict(), scaler.state_dict()))
        with pytest.raises(FloatingPointError, match="before it is scaled"):
            scaler.scale_and_step(optimizer, model(torch.full((1, 2), math.inf)).sum())
        assert all(p.grad is None for p in model.parameters())
        with pytest.raises(RuntimeError, match="no gradients"):
            scaler.step(optimizer)
        stranger = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        with pytest.raises(RuntimeError, match="no gradients"):
            scaler.scale_and_step([optimizer, stranger], model(torch.ones(1, 2)).sum())
        with pytest.raises(ValueError, match="clip"):
            scaler.scale_and_step(optimizer, model(torch.ones(1, 2)).sum(), clip=-1.0)
        after = (model.state_dict(), scaler.state_dict())
        assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
        assert before[1] == after[1]
        for bad in (
            {"init_scale": 0.0},
            {"growth_factor": 1.0},
            {"backoff_factor": 1.0},
            {"growth_interval": 0},
            {"bf16_after": 0},
        ):
            with pytest.raises(ValueError, match=next(iter(bad))):
                AdaptiveGradScaler(**bad)


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
