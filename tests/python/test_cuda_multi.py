"""Work over lists of tensors on CUDA: the CPU's own bits. See test_cuda.py."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vramkit import _native
from vramkit.training import (
    AdamW,
    AdaptiveGradScaler,
    cast_,
    gradient_norm,
    scale_,
    square_sum,
)

needs_operators = pytest.mark.skipif(
    not _native.HAS_CUDA_OPERATORS, reason="built without CUDA, or beside a torch without it"
)
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.HAS_CUDA_OPERATORS), reason="no GPU"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = ("square_sum", "scale_", "cast_out", "adamw_", "adamw8_")


def tensors(count: int = 300) -> list[Tensor]:
    """More than a launch takes; odd sizes, chunks of their own, some empty, all dtypes."""
    generator = torch.Generator().manual_seed(2)
    sizes = [0 if k % 50 == 9 else 1 + 2 * (k * k % 900) for k in range(count)]
    sizes[3] = 70_001
    return [torch.randn(n, generator=generator).to(DTYPES[k // 3 % 3]) for k, n in enumerate(sizes)]


# Without a GPU


@needs_operators
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_there_without_a_driver(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vramkit::_multi_{name}", "CUDA")


# On a GPU


@needs_gpu
def test_sums_are_the_cpus() -> None:
    here = tensors()
    there = [t.cuda() for t in here]
    assert square_sum(there) == square_sum(here)
    assert square_sum([*there, *here]) == 2 * square_sum(here)
    assert square_sum([torch.zeros(0, device="cuda")]) == 0.0
    wide = torch.zeros(70, 141, device="cuda")[:, 1:]  # neither dense nor aligned
    wide.copy_(torch.randn(70, 140))
    assert square_sum([wide]) == square_sum([wide.cpu()])
    for bad in (math.inf, math.nan):
        there[3][-1] = bad
        assert not gradient_norm(there).finite


@needs_gpu
@pytest.mark.parametrize("seed", [None, 2**64 - 9])
def test_scaling_and_casts_are_the_cpus(seed: int | None) -> None:
    here = tensors()
    there = [t.cuda() for t in here]
    for lists in (here, there):
        scale_(lists, 0.37)
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a.cpu(), b)
    for dtype in DTYPES:
        found = []
        for lists in (here, there):
            targets = [torch.empty_like(t, dtype=dtype) for t in lists]
            cast_(lists, targets, seed=seed)
            found.append([t.cpu() for t in targets])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"maximize": True, "state_bits": 8},
        {"masters": "fp32"},
        {"masters": "fp32", "state_bits": 8},
        {"masters": "compensated"},
        {"masters": "compensated", "state_bits": 8},
        {"rounding": "stochastic", "seed": 5},
        {"rounding": "stochastic", "seed": 5, "state_bits": 8},
    ],
    ids=str,
)
def test_steps_are_the_cpus(options: dict[str, Any]) -> None:
    all_of_them = tensors()
    chosen = [t for t in all_of_them if t.dtype != torch.float32 or not options.get("masters")]
    ours = [nn.Parameter(t) for t in chosen]
    there = [nn.Parameter(t.cuda()) for t in chosen]
    optimizers = AdamW(ours, lr=1e-2, **options), AdamW(there, lr=1e-2, **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for a, b in zip(ours, there, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(a.dtype)
            b.grad = a.grad.cuda()
        for optimizer in optimizers:
            optimizer.step(factor=0.5)
    for a, b in zip(ours, there, strict=True):
        assert torch.equal(a, b.cpu())
        for key, value in optimizers[0].state[a].items():
            other = optimizers[1].state[b][key]
            if isinstance(value, Tensor):
                assert other.is_cuda
                assert torch.equal(value, other.cpu())


@needs_gpu
def test_states_move_between_devices() -> None:
    p = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    q = nn.Parameter(p.detach().cuda())
    first = AdamW([p], masters="compensated", state_bits=8)
    p.grad = torch.ones_like(p)
    first.step()
    second = AdamW([q], masters="compensated", state_bits=8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    q.data.copy_(p.data)
    q.grad = torch.ones_like(q)
    first.step()
    second.step()
    assert torch.equal(p, q.cpu())


@needs_gpu
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, AdamW])
def test_the_scaler_steps(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 3).cuda()
    plain = copy.deepcopy(model)
    x = torch.randn(4, 8, device="cuda")
    optimizer, other = kind(model.parameters(), lr=0.1), kind(plain.parameters(), lr=0.1)
    report = AdaptiveGradScaler(1024.0).scale_and_step(optimizer, model(x).square().sum(), 0.5)
    plain(x).square().sum().backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    other.step()
    assert report.stepped
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_a_step_is_captured_in_a_graph() -> None:
    """Operators neither wait nor copy: a captured step does as much as one that is called."""
    p = torch.ones(5000, device="cuda")
    g, m, v = (torch.full_like(p, x) for x in (0.5, 0.0, 0.0))
    numbers = (1.0, 0.1, 0.9, 0.999, 1e-8, 0.0, [1], [], None)
    expected = [t.clone() for t in (p, m, v)]
    torch.ops.vramkit._multi_adamw_(
        [expected[0]], [g], [expected[1]], [expected[2]], [], [], *numbers
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.vramkit._multi_adamw_([p], [g], [m], [v], [], [], *numbers)
    assert torch.equal(p, torch.ones_like(p))
    graph.replay()
    assert torch.equal(p, expected[0])
