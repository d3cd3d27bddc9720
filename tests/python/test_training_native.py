"""Native passes over lists of tensors, AdamW and the gradient scaler that are made of them."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numerics
import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit.training import (
    AdamW,
    AdaptiveGradScaler,
    cast_,
    gradient_norm,
    scale_,
    square_sum,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (0, 3), (257,), (33, 1000), (5, 7, 3, 3))


def tensors(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def assert_neighbours(found: Tensor, exact: Tensor) -> None:
    """Each number is one of the two of its dtype that enclose the exact one."""
    nearest = exact.to(found.dtype)
    steps = found.double() - nearest.double()
    away = torch.where(nearest.double() < exact, 1.0, -1.0) * math.inf
    other = torch.nextafter(nearest, away.to(found.dtype))
    assert bool(((found == nearest) | ((found == other) & (nearest.double() != exact))).all()), (
        steps
    )


@pytest.fixture
def threads() -> Iterator[tuple[int, ...]]:
    before = torch.get_num_threads()
    yield (1, 2, 3)
    torch.set_num_threads(before)


Made = tuple[list[nn.Parameter], AdamW]


def gone_on(
    make: Callable[[], Made],
) -> tuple[list[nn.Parameter], AdamW, list[nn.Parameter], AdamW]:
    """An optimizer after five steps, and one that took up its state after three: the same bits."""
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
    return ours, optimizer, again, resumed


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

    def test_threads_do_not_change_the_sum(self, threads: tuple[int, ...]) -> None:
        lists = [torch.randn(100_000) for _ in range(3)]
        found = set()
        for count in threads:
            torch.set_num_threads(count)
            found.add(square_sum(lists))
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

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_casts_at_random(self, dtype: torch.dtype) -> None:
        sources = [*tensors(torch.float32), torch.randn(40, 50).t()]
        targets = [torch.empty_like(t, dtype=dtype) for t in sources]
        again = [torch.empty_like(t) for t in targets]
        other = [torch.empty_like(t) for t in targets]
        cast_(sources, targets, seed=2**64 - 3)
        cast_(sources, again, seed=2**64 - 3)
        cast_(sources, other, seed=4)
        moved = False
        for s, t, a, o in zip(sources, targets, again, other, strict=True):
            assert torch.equal(t, a)
            moved |= not torch.equal(t, o)
            assert_neighbours(t, s.double())
        assert moved
        # The first tensor has the words of an encoded weight's first row.
        row = torch.randn(1, 999)
        half = torch.empty_like(row, dtype=dtype)
        cast_([row], [half], seed=7)
        fmt = vramkit.get_format("bf16" if dtype == torch.bfloat16 else "fp16")
        codes, _, _ = torch.ops.vramkit.quantize_stochastic(row, None, fmt.spec, 7)
        assert torch.equal(half.view(torch.uint8).flatten(), codes.flatten())
        # Equal numbers do not round alike, and their mean is the number: a third of a step up.
        step = torch.finfo(dtype).eps
        same, low = torch.full((20_000,), 1 + step / 3), torch.empty(20_000, dtype=dtype)
        cast_([same], [low], seed=1)
        up = float((low > 1).double().mean())
        assert abs(up - 1 / 3) < numerics.mean_bound(20_000)

    def test_casts_at_random_that_are_refused(self) -> None:
        target = torch.zeros(4, dtype=torch.bfloat16)
        for source in (torch.ones(4).double(), torch.ones(8)[::2]):
            with pytest.raises(ValueError, match="no stochastic cast"):
                cast_([torch.ones(4), source], [torch.empty_like(target), target], seed=0)
        with pytest.raises(ValueError, match="seed"):
            cast_([torch.ones(4)], [target], seed=-1)
        assert not target.any()

    def test_three_hundred_gradients(self) -> None:
        """Odd sizes and all dtypes at once: norm, check, unscaling and clipping."""
        generator = torch.Generator().manual_seed(8)
        gradients = [
            torch.randn(1 + 2 * (k * k % 700), generator=generator).to(DTYPES[k % 3])
            for k in range(300)
        ]
        gradients[7] = torch.zeros(0)
        gradients[8] = torch.randn(30, 41).half().t()
        found = gradient_norm(gradients, scale=128.0, clip=0.25)
        squares = math.fsum(float(g.double().square().sum()) for g in gradients)
        assert found.norm == pytest.approx(math.sqrt(squares) / 128, rel=1e-12)
        assert found.factor == pytest.approx(0.25 / (found.norm + 1e-6) / 128, rel=1e-15)
        for k in (0, 8, 299):
            for bad in (math.inf, -math.inf, math.nan):
                changed = [*gradients]
                changed[k] = gradients[k].clone()
                changed[k].view(-1)[-1:].fill_(bad) if k != 8 else changed[k][-1, -1].fill_(bad)
                assert not gradient_norm(changed).finite
        clipped = [g.clone() for g in gradients]
        scale_(clipped, found.factor)
        for c, g in zip(clipped, gradients, strict=True):
            assert torch.equal(c, (g.float() * found.factor).to(g.dtype))

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
    @pytest.mark.parametrize("maximize", [False, True])
    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_is_torchs(self, weight_decay: float, amsgrad: bool, maximize: bool) -> None:
        """Against torch's AdamW in float64: what float32 rounds, and no more."""
        ours = [nn.Parameter(t) for t in tensors(torch.float32)]
        exact = [nn.Parameter(p.detach().double()) for p in ours]
        fused = [nn.Parameter(p.detach().clone()) for p in ours]
        options: dict[str, Any] = {
            "lr": 3e-3,
            "betas": (0.8, 0.99),
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        steps = 5
        stepped(AdamW(ours, **options), ours, steps)
        stepped(torch.optim.AdamW(exact, **options), exact, steps)
        stepped(torch.optim.AdamW(fused, fused=True, **options), fused, steps)
        for a, b, e in zip(ours, fused, exact, strict=True):
            # Per step: two roundings of w, and ten of an update, which is lr times a ratio m /
            # sqrt(v) below (1 - beta1) / sqrt(1 - beta2), 2 here.
            bound = steps * (numerics.gamma(2) * e.detach().abs() + numerics.gamma(10) * 2 * 3e-3)
            numerics.assert_within(a.detach(), e.detach(), bound)
            numerics.assert_within(b.detach(), e.detach(), bound)

    @pytest.mark.parametrize("state_bits", [32, 8])
    def test_threads_do_not_change_it(self, threads: tuple[int, ...], state_bits: Any) -> None:
        found = []
        for count in threads:
            torch.set_num_threads(count)
            ours = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (70_001, 33, 40_000)]
            stepped(AdamW(ours, lr=1e-2, state_bits=state_bits), ours, 2)
            found.append(torch.cat([p.detach() for p in ours]))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    @pytest.mark.parametrize("state_bits", [32, 8])
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_rounds_at_random(self, dtype: torch.dtype, state_bits: Any) -> None:
        step = torch.finfo(dtype).eps / 2  # of the numbers below 1
        lr = step / 16

        def run(seed: int, rounding: Any = "stochastic") -> Tensor:
            p = nn.Parameter(torch.ones(10_000, dtype=dtype))
            options: dict[str, Any] = {"state_bits": state_bits, "rounding": rounding}
            optimizer = AdamW([p], lr=lr, weight_decay=0.0, eps=0.0, seed=seed, **options)
            for _ in range(8):  # each moves by lr, whatever the gradient
                p.grad = torch.ones_like(p)
                optimizer.step()
            return p.detach()

        assert torch.equal(run(0, "nearest"), torch.ones(10_000, dtype=dtype))
        found = run(3)
        assert torch.equal(found, run(3))
        assert not torch.equal(found, run(4))
        # Half a step down on average, by eight roundings of each of 10,000.
        down = float((1 - found.double()).mean()) / step
        assert abs(down - 0.5) < 8 * numerics.mean_bound(80_000)

    def test_rounding_at_random_resumes(self) -> None:
        def make() -> tuple[list[nn.Parameter], AdamW]:
            halves = [nn.Parameter(t) for t in tensors(torch.bfloat16)]
            single = nn.Parameter(torch.ones(40))
            groups = [{"params": halves[:2]}, {"params": [*halves[2:], single]}]
            return [*halves, single], AdamW(groups, lr=1e-3, rounding="stochastic", seed=9)

        gone_on(make)
        # A step of a float32 parameter beside them is the plain one.
        plain = nn.Parameter(torch.ones(40))
        single = nn.Parameter(torch.ones(40))
        for p, options in ((plain, {}), (single, {"rounding": "stochastic"})):
            stepped(AdamW([p], **options), [p], 2)
        assert torch.equal(plain, single)

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

        ours, optimizer, again, resumed = gone_on(make)
        for a, b in zip(again, ours, strict=True):
            for key, value in optimizer.state[b].items():
                if isinstance(value, Tensor):
                    assert value.dtype == resumed.state[a][key].dtype
                    assert torch.equal(value, resumed.state[a][key])

    def test_other_orders_of_memory(self) -> None:
        weight = torch.randn(4, 6, 3, 3)
        gradient = torch.ones(4, 6, 3, 3).cumsum(0)
        layouts = (torch.contiguous_format, torch.channels_last)
        found = []
        for layout, other in itertools.product(layouts, layouts):
            p = nn.Parameter(weight.clone(memory_format=layout))
            p.grad = gradient.clone(memory_format=other)
            AdamW([p]).step()
            found.append(p.detach())
            assert p.is_contiguous(memory_format=layout)
            assert torch.equal(found[0], p.detach())
        p = nn.Parameter(weight.clone())
        p.grad = torch.empty(4, 6, 3, 6)[..., ::2].copy_(gradient)  # not dense
        AdamW([p]).step()
        assert torch.equal(found[0], p.detach())

    def test_state_of_eight_bits_that_is_not_finite(self) -> None:
        p = nn.Parameter(torch.ones(600))
        optimizer = AdamW([p], state_bits=8)
        p.grad = torch.ones(600)
        p.grad[0], p.grad[-1] = math.nan, math.inf
        optimizer.step()
        scales = optimizer.state[p]["exp_avg_scales"]
        assert scales.isnan().tolist() == [True, False, True]
        assert p.detach()[256:512].isfinite().all()

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
        with pytest.raises(ValueError, match="amsgrad"):
            AdamW([p], state_bits=8, amsgrad=True)
        with pytest.raises(ValueError, match="masters=None"):
            AdamW([nn.Parameter(p.detach().half())], masters="fp32", rounding="stochastic")
        with pytest.raises(ValueError, match="rounding"):
            AdamW([p], rounding="up")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="seed"):
            AdamW([p], seed=-1)
        with pytest.raises(ValueError, match="lr"):
            AdamW([{"params": [p], "lr": -1.0}])
        with pytest.raises(TypeError, match="16 bits"):
            AdamW([p], masters="fp32")
        with pytest.raises(TypeError, match="float64"):
            AdamW([nn.Parameter(torch.ones(2).double())])
        with pytest.raises(TypeError, match="dense"):
            AdamW([nn.Parameter(torch.ones(4, 4)[:, ::2])])
        embedding = nn.Embedding(3, 2, sparse=True)
        embedding(torch.tensor([1])).sum().backward()
        p.grad = torch.ones(2)
        optimizer = AdamW([p, *embedding.parameters()])
        with pytest.raises(TypeError, match="sparse"):
            optimizer.step()
        assert torch.equal(p.detach(), torch.ones(2))
        assert not optimizer.state


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
