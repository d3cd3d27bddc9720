"""Memory savers of training: what is kept, where, what a step takes, and that learning goes on."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numerics
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vramkit import convert
from vramkit.errors import BudgetError, PrecisionUnavailableError
from vramkit.measure import profiled_peak
from vramkit.training import (
    AdamW,
    AdaptiveGradScaler,
    BlockCost,
    CheckpointedBlock,
    MemoryPool,
    MixedPrecisionAttention,
    MixedPrecisionWrapper,
    choose_checkpoints,
    compress_activations,
    estimate_step,
    measured_islands,
    offload_activations,
    optimize_conv_memory_format,
    optimized_inference,
    peak_bytes,
    plan_checkpoints,
    stable_mse_loss,
    wrapper,
)
from vramkit.training.attention import fp32_attention

LICENSE = Path(__file__).parents[2] / "LICENSE"
SAVERS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda _: contextlib.nullcontext(),
    "bf16": lambda m: compress_activations(m, "bf16", least_bytes=4096),
    "int8": lambda m: compress_activations(m, "int8", least_bytes=4096),
    "fp8": lambda m: compress_activations(m, "fp8", least_bytes=4096),
    "disk": lambda m: offload_activations(m, least_bytes=4096),
}


class Layer(nn.Module):
    """Attention and a feed-forward part, each beside a normalization."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MixedPrecisionAttention(width, 4)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return out


class Reader(nn.Module):
    """Predicts a byte from the ones around it; enough to learn from a text."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.layers = nn.Sequential(*(Layer(width, 2 * width) for _ in range(layers)))
        self.head = nn.Linear(width, 128)

    def forward(self, codes: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.embedding(codes)))
        return out


def step_of(model: nn.Module, inputs: Any, loss: Any, saver: Any) -> None:
    with saver(model):
        value = loss(model(inputs))
    value.backward()


class TestKeeping:
    def test_what_several_operators_save_is_kept_once(self) -> None:
        layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        x = torch.randn(64, 64)
        for saver in (SAVERS["int8"], SAVERS["disk"]):
            with saver(layers) as saved:
                y = (
                    torch.stack([layer(x).sum() for layer in layers]).sum()
                    + (layers[0].weight[0, 0] * x.t()).sum()
                )
            assert (saved.tensors, saved.shared) == (1, 3)
            y.backward()

    def test_what_was_written_in_between_is_kept_again(self) -> None:
        w = nn.Parameter(torch.randn(64, 64))
        holder = nn.ParameterList([w])
        with offload_activations(holder, least_bytes=1) as saved:
            h = w * 2.0
            first = h.pow(2).sum()
            h.add_(1.0)
            second = h.pow(2).sum()
        (first + second).backward()
        # Plain autograd refuses this: it keeps no copy of what is overwritten.
        expected = 2.0 * (2.0 * (2.0 * w.detach()) + 2.0 * (2.0 * w.detach() + 1.0))
        assert torch.equal(w.grad, expected)
        assert (saved.tensors, saved.shared) == (2, 0)

    def test_layouts_come_back(self) -> None:
        x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
        apart = torch.randn(64, 128)[:, ::2]
        found: list[Tensor] = []

        class Look(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *tensors: Tensor) -> Tensor:
                ctx.save_for_backward(*tensors)
                return tensors[0].new_zeros(())

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                found.extend(ctx.saved_tensors)
                return (None,) * 5

        with offload_activations(nn.Linear(1, 1), least_bytes=1):
            out = Look.apply(x, apart, x.permute(3, 0, 1, 2), torch.ones(4, 4).requires_grad_())
        out.backward()
        for a, b in zip(found, (x, apart, x.permute(3, 0, 1, 2)), strict=False):
            assert torch.equal(a, b)
        assert found[0].stride() == x.stride()

    @pytest.mark.parametrize("to", ["fp16", "bf16", "int8", "fp8"])
    def test_infinities_reach_the_gradients(self, to: Any) -> None:
        layer = nn.Linear(64, 8)
        x = torch.randn(64, 64)
        x[0, 0] = math.inf
        with compress_activations(layer, to, least_bytes=1) as saved:
            loss = layer(x)[1:].sum()
            wide = (layer.weight * 1e6).pow(2).sum()  # beyond float16
        # bfloat16 holds an infinity as it is.
        assert saved.left == {"fp16": 2, "bf16": 0}.get(to, 1)
        (loss + wide).backward()
        assert not bool(torch.isfinite(layer.weight.grad[:, 0]).all())
        assert bool(torch.isfinite(layer.weight.grad[:, 1:]).all())

    def test_seeds(self) -> None:
        layer, x = nn.Linear(64, 8), torch.randn(64, 64)
        found = []
        for seed in (1, 1, 2):
            layer.zero_grad()
            with compress_activations(layer, "int8", seed=seed, least_bytes=1):
                loss = layer(x).sum()
            loss.backward()
            found.append(layer.weight.grad.clone())
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        for bad in (-1, 1 << 64):
            with (
                pytest.raises(ValueError, match="seed"),
                compress_activations(layer, "int8", seed=bad),
            ):
                pass
        with pytest.raises(ValueError, match="not 'nf4'"), compress_activations(layer, "nf4"):  # type: ignore[arg-type]
            pass


class TestOffload:
    def test_has_the_same_bits_and_leaves_nothing(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = Reader()
        codes = torch.randint(128, (4, 32))
        gradients = []
        for saver in (
            SAVERS["none"],
            lambda m: offload_activations(m, folder=tmp_path, least_bytes=1),
        ):
            model.zero_grad()
            with saver(model) as saved:
                for _ in range(3):  # room that one step leaves is used by the next
                    model(codes).square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert saved.bytes_away == 0
        assert 0 < saved.peak_bytes_away <= saved.bytes_before // 3
        assert list(tmp_path.iterdir()) == []

    def test_bad_input(self, tmp_path: Path) -> None:
        model = Reader()
        codes = torch.randint(128, (4, 32))
        before = copy.deepcopy(model.state_dict())
        with (
            offload_activations(model, limit="20 KB", least_bytes=1),
            pytest.raises(BudgetError, match="raise the limit"),
        ):
            model(codes)
        with pytest.raises(ValueError, match="already"), offload_activations(model, "host"):
            pass
        with pytest.raises(ValueError, match="'moon'"), offload_activations(model, "moon"):  # type: ignore[arg-type]
            pass
        with pytest.raises(FileNotFoundError), offload_activations(model, folder=tmp_path / "none"):
            pass
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


class TestEstimates:
    @pytest.mark.parametrize(
        ("precision", "saver"),
        [("fp32", "none"), ("fp32", "disk"), *(("bf16", saver) for saver in SAVERS)],
    )
    def test_are_what_is_measured(self, precision: str, saver: str) -> None:
        torch.manual_seed(0)
        plain = Reader(64).train()
        plain.layers[1] = CheckpointedBlock(plain.layers[1])
        model = MixedPrecisionWrapper(plain, precision)
        codes = torch.randint(128, (4, 64))

        target = torch.randn(4, 64, 128)

        def loss(y: Tensor) -> Tensor:
            return stable_mse_loss(y, target)

        for _ in range(2):
            step_of(model, codes, loss, SAVERS[saver])
            model.zero_grad()
        measured = profiled_peak(step_of, (model, codes, loss, SAVERS[saver]), {})
        model.zero_grad()
        optimizer = AdamW(model.parameters())
        found = estimate_step(model, codes, loss, saver=SAVERS[saver], optimizer=optimizer)
        # Probes know every allocation; 5 % is what is promised of other versions of torch.
        assert found.step_bytes == pytest.approx(measured, rel=0.05)
        assert found.weights_bytes == sum(p.nbytes for p in model.parameters())
        assert found.gradients_bytes == found.weights_bytes
        assert found.optimizer_bytes == 0
        assert found.peak_bytes == found.weights_bytes + found.step_bytes
        assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())


class TestChoice:
    def test_is_the_best_of_all(self) -> None:
        """Against every choice of a short chain, each by a trace of its own step."""
        widths = (96, 32, 160)
        inputs = (256, 32)

        def build() -> nn.Sequential:
            parts = (nn.Sequential(nn.Linear(32, w), nn.GELU(), nn.Linear(w, 32)) for w in widths)
            return nn.Sequential(*parts, nn.Linear(32, 4)).train()

        def loss(y: Tensor) -> Tensor:
            return y.square().mean()

        peaks = {}
        for choice in itertools.product([False, True], repeat=3):
            model = build()
            for place, again in enumerate(choice):
                if again:
                    model[place] = CheckpointedBlock(model[place])
            peaks[choice] = estimate_step(model, inputs, loss, probe=False).peak_bytes
        model = build()
        names = [str(i) for i in range(3)]
        for budget in sorted(set(peaks.values()))[::2]:
            best = min(
                sum(w for w, again in zip(widths, c, strict=True) if again)
                for c, peak in peaks.items()
                if peak <= budget
            )
            plan = plan_checkpoints(
                model, inputs, loss, f"{budget} B", blocks=names[::-1], probe=False
            )
            chosen = tuple(plan.choice.checkpointed)
            cost = sum(w for w, again in zip(widths, chosen, strict=True) if again)
            assert cost <= 1.01 * best
            assert plan.blocks == names
            assert plan.peak_bytes == peaks[chosen] <= budget
        least = min(peaks.values())
        with pytest.raises(BudgetError, match="are the least") as caught:
            plan_checkpoints(model, inputs, loss, f"{least - 1} B", blocks=names, probe=False)
        assert caught.value.needed_bytes == least
        states = list(model.state_dict())
        plan.apply(model)
        assert list(model.state_dict()) == states
        other = plan_checkpoints(build(), inputs, loss, f"{least} B", blocks=names, probe=False)
        with pytest.raises(ValueError, match="another model"):
            other.apply(nn.Linear(1, 1))

    def test_of_costs_with_needs_of_their_own(self) -> None:
        generator = random.Random(4)
        for _ in range(60):
            blocks = [
                BlockCost(
                    generator.randint(0, 100),
                    generator.randint(0, 40),
                    generator.random(),
                    generator.randint(0, 200),
                    generator.randint(0, 200),
                )
                for _ in range(generator.randint(1, 8))
            ]
            every = list(itertools.product([False, True], repeat=len(blocks)))
            peaks = {choice: peak_bytes(blocks, choice) for choice in every}
            budget = generator.choice(sorted(peaks.values()))
            best = min(
                sum(b.forward_cost for b, again in zip(blocks, c, strict=True) if again)
                for c in every
                if peaks[c] <= budget
            )
            found = choose_checkpoints(blocks, budget)
            assert found.extra_cost == pytest.approx(best)
            assert found.peak_bytes == peaks[tuple(found.checkpointed)] <= budget
            with pytest.raises(BudgetError) as caught:
                choose_checkpoints(blocks, min(peaks.values()) - 1)
            assert caught.value.needed_bytes == min(peaks.values())

    def test_bad_blocks(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def plan(*names: str, of: nn.Module = model) -> Any:
            blocks = list(names) or None
            return plan_checkpoints(of, (4, 8), lambda y: y.sum(), "1 B", blocks=blocks)

        with pytest.raises(ValueError, match="no modules of these names"):
            plan("2")
        with pytest.raises(ValueError, match="named twice"):
            plan("0", "0")
        with pytest.raises(ValueError, match="within each other"):
            plan("0", "0.0", of=nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)))
        with pytest.raises(ValueError, match="name its blocks"):
            plan(of=nn.Linear(8, 8))
        shared = nn.Linear(8, 8)
        with pytest.raises(ValueError, match="more than once"):
            plan("0", of=nn.Sequential(shared, nn.ReLU(), shared))

    def test_a_block_is_as_if_it_were_not_there(self) -> None:
        plain = nn.Sequential(Layer(16, 32), nn.Linear(16, 2))
        saved = nn.Sequential(CheckpointedBlock(Layer(16, 32)), nn.Linear(16, 2))
        assert list(saved.state_dict()) == list(plain.state_dict())
        saved.load_state_dict(plain.state_dict())
        plain.load_state_dict(saved.state_dict())
        assert torch.equal(saved[0].module.up.weight, plain[0].up.weight)
        assert saved[0].up.out_features == 32
        with pytest.raises(AttributeError):
            _ = saved[0].nothing
        copied = copy.deepcopy(saved)
        assert copied[0].module is not saved[0].module


class TestWrapper:
    def test_eight_bits_have_the_plain_models_state(self) -> None:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 8)).eval()
        wrapped = MixedPrecisionWrapper(copy.deepcopy(plain), "fp8")
        small, whole = wrapped.parameter_bytes(), sum(p.nbytes for p in plain.parameters())
        assert small < 0.3 * whole
        state = wrapped.state_dict()
        assert list(state) == list(plain.state_dict())
        for name, value in plain.state_dict().items():
            assert state[name].shape == value.shape
            bound = value.abs() * 2.0**-4 + value.abs().amax() * 2.0**-9
            assert bool(((state[name].float() - value).abs() <= bound + 2.0**-8).all())
        other = MixedPrecisionWrapper(copy.deepcopy(plain), "fp8")
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(-1.0)
        outer = nn.Sequential(other)
        outer.load_state_dict({f"0.{k}": v for k, v in plain.state_dict().items()})
        x = torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(other(x), MixedPrecisionWrapper(copy.deepcopy(plain), "fp8")(x))
        assert list(outer.state_dict()) == [f"0.{k}" for k in plain.state_dict()]
        plain.load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
            other.load_state_dict({**plain.state_dict(), "2.weight": torch.zeros(3, 3)})

    def test_auto_goes_by_the_models_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert MixedPrecisionWrapper(nn.Linear(2, 2), "auto").precision.value == "fp32"
        monkeypatch.setattr(wrapper, "_device_of", lambda _: torch.device("cuda"))
        for native, expected in ((True, "bf16"), (False, "fp16")):
            monkeypatch.setattr(wrapper, "has_native_bf16", lambda _, n=native: n)
            mode = wrapper._mode("auto", torch.device("cuda"))
            assert mode.value == expected

    def test_a_precision_that_the_device_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Linear(2, 2).eval()
        falling = MixedPrecisionWrapper(nn.Linear(2, 2).train(), "fp16")
        monkeypatch.setattr(wrapper, "_device_of", lambda _: torch.device("cuda"))
        monkeypatch.setattr(wrapper, "has_native_bf16", lambda _: False)
        for precision in ("bf16", "fp8"):
            with pytest.raises(PrecisionUnavailableError, match=r"emulation.*use fp16"):
                MixedPrecisionWrapper(model, precision)
        assert model.weight.dtype == torch.float32
        with pytest.raises(PrecisionUnavailableError, match="no bfloat16 to go on in"):
            falling.to_bf16("a forward pass overflowed")
        assert (falling.precision.value, falling.fallbacks) == ("fp16", [])
        with pytest.raises(PrecisionUnavailableError):
            wrapper._mode("bf16", torch.device("cuda"))

    def test_weights_beyond_the_range_stay(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
        with torch.no_grad():
            model[0].weight[0, 0] = 1e5
        found = MixedPrecisionWrapper(model, "fp16")
        assert [(i.name, i.reason) for i in found.islands] == [("0", "its weight reaches 1e+05")]
        assert model[0].weight.dtype == torch.float32
        assert model[1].weight.dtype == torch.float16

    def test_inputs_by_name_are_scanned(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.layer(input=x)
                return out

        with torch.no_grad():
            model = Named()
            model.layer.weight.mul_(1e-6)
        found = measured_islands(model, [(torch.full((1, 4), 5e4),)], torch.float16)
        assert [(i.name, i.overflows) for i in found] == [("layer", False)]
        assert "input reaches" in found[0].reason

    @pytest.mark.parametrize("training", [False, True])
    def test_wide_islands_hand_on_what_overflows(self, training: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)).train(training)
        with torch.no_grad():
            model[0].weight.mul_(1e5)
        x = torch.randn(4, 8)
        expected = model(x).detach()
        wrapped = MixedPrecisionWrapper(model, "fp16", calibration=[(x,)], wide_islands=True)
        found = wrapped(x)
        assert wrapped.fallbacks == []
        assert found.dtype == torch.float16
        unit = numerics.UNIT[torch.float16]
        torch.testing.assert_close(found.float(), expected, rtol=16 * unit, atol=16 * unit)
        with pytest.raises(ValueError, match="calibration"):
            MixedPrecisionWrapper(nn.Linear(2, 2), "fp16", wide_islands=True)


class TestHelpers:
    @pytest.mark.parametrize("mask", [None, 1, 2, 3])
    def test_attention_makes_no_matrix(self, mask: int | None) -> None:
        heads, n = 4, 1536
        q, k, v = (torch.randn(1, heads, n, 8, requires_grad=True) for _ in range(3))
        given = None if mask is None else torch.zeros((heads, 1, n)[3 - mask :])

        def run() -> None:
            fp32_attention(q, k, v, given).sum().backward()

        run()
        assert profiled_peak(run, (), {}) < heads * n * n * 4 // 4
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        found = fp32_attention(q, k, v, given)
        assert float((found - exact).abs().max()) < 64 * numerics.UNIT[torch.float32]
        with pytest.raises(ValueError, match="four dimensions"):
            fp32_attention(q, k, v, torch.zeros(1, 1, 1, n, n))

    def test_layouts_of_inputs_by_name_and_of_converted_layers(self) -> None:
        class Cube(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv3d(2, 4, 3)

            def forward(self, *, x: Tensor) -> Tensor:
                assert x.is_contiguous(memory_format=torch.channels_last_3d)
                out: Tensor = self.conv(x)
                return out

        cube, x = Cube(), torch.randn(1, 2, 5, 5, 5)
        expected = cube.conv(x)
        torch.testing.assert_close(optimize_conv_memory_format(cube)(x=x), expected)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)).eval()
        convert(model, "fp8", skip=["1"])
        x = torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(optimize_conv_memory_format(model)(x), expected)
        assert model[1].weight.is_contiguous(memory_format=torch.channels_last)

    def test_inference_in_the_best_precision(self) -> None:
        model = nn.Linear(4, 4)
        assert optimized_inference(model, torch.ones(1, 4), "auto").dtype == torch.float32
        assert optimized_inference(model, (torch.ones(1, 4),), "bf16").dtype == torch.bfloat16

    def test_pools_are_keyed(self) -> None:
        pool = MemoryPool("fp32", device="cpu")
        buffer = pool.get_tensor((2, 3))
        pool.release(buffer)
        assert pool.get_tensor((3, 2)) is not buffer
        assert pool.get_tensor([2, 3]) is buffer
        for bad in ((-1,), (2, -3)):
            with pytest.raises(ValueError, match="negative"):
                pool.get_tensor(bad)
        assert pool.stats().leased == 2


def learn(precision: str, saver: str, seed: int, text: Tensor, steps: int = 20) -> float:
    """The mean loss of the last steps of reading a text."""
    torch.manual_seed(seed)
    plain = Reader().train()
    if saver == "checkpoint":
        for place in range(2):
            plain.layers[place] = CheckpointedBlock(plain.layers[place])
    model = MixedPrecisionWrapper(plain, precision)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scaler = AdaptiveGradScaler(enabled=precision == "fp16")
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        places = torch.randint(len(text) - 33, (8, 1), generator=generator) + torch.arange(33)
        batch = text[places]
        with SAVERS.get(saver, SAVERS["none"])(model):
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        scaler.scale_and_step(optimizer, loss, clip=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


class TestLearning:
    def test_goes_as_in_float32(self) -> None:
        """Short; the benchmark `savers` does it with real models over three seeds."""
        text = torch.tensor([min(b, 127) for b in LICENSE.read_bytes()])
        plain = [learn("fp32", "none", seed, text) for seed in range(2)]
        assert max(plain) < 0.75 * math.log(128)
        assert learn("fp32", "checkpoint", 0, text) == plain[0]
        assert learn("fp32", "disk", 0, text) == plain[0]
        for precision, saver in (("bf16", "int8"), ("bf16", "fp8"), ("fp16", "bf16")):
            found = learn(precision, saver, 0, text)
            # Seeds differ by some percent; rounding must not by more.
            assert found == pytest.approx(plain[0], rel=0.03)

    def test_stable_loss_of_sixteen_bits(self) -> None:
        y = torch.full((8, 64), 400.0, dtype=torch.float16, requires_grad=True)
        loss = stable_mse_loss(y, torch.zeros(8, 64))
        loss.backward()
        assert loss.item() == 160000.0
        assert torch.equal(y.grad, torch.full_like(y, 2 * 400.0 / 512))
