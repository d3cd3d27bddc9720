"""HostPool: what vramkit makes lies in it, comes back to it, and steady work takes nothing new."""

from __future__ import annotations

import copy
import gc
import pickle
import resource
import threading

import pytest
import torch
import vramkit
from torch import nn


def test_conversion_lies_in_the_pool_and_goes_back() -> None:
    pool = vramkit.HostPool()
    model = nn.Sequential(nn.Linear(512, 256), nn.Embedding(100, 64))
    plain = copy.deepcopy(model)
    with pool:
        vramkit.convert(model, "nf4")
    stored = sum(
        part.numel()
        for layer in model
        for part in (layer.codes, layer.scales)  # type: ignore[union-attr]
    )
    assert stored <= pool.stats().used <= stored + 64 * 4
    vramkit.convert(plain, "nf4")
    assert torch.equal(plain[0].codes, model[0].codes)  # type: ignore[arg-type]
    x = torch.randn(3, 512)
    assert torch.equal(plain[0](x), model[0](x))
    del model
    gc.collect()
    assert pool.stats().used == 0
    assert pool.trim() > 0
    assert pool.stats().held == 0


def test_restored_weights_and_copies() -> None:
    pool = vramkit.HostPool()
    model = nn.Sequential(nn.Linear(300, 200, bias=False))
    vramkit.convert(model, "int8")
    expected = model[0].weight.clone()
    with pool:
        vramkit.restore(model, "fp32")
    assert pool.stats().used == -(-300 * 200 * 4 // 64) * 64
    assert torch.equal(model[0].weight, expected)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    del model
    gc.collect()
    assert pool.stats().used == 0  # copies are torch's own memory
    assert torch.equal(again[0].weight, expected)


def test_steady_work_takes_no_memory_from_the_system() -> None:
    pool = vramkit.HostPool()
    source = torch.randn(2048, 2048)

    def work() -> None:
        model = nn.Linear(1, 1, bias=False)
        model.weight = nn.Parameter(source, requires_grad=False)
        with pool:
            vramkit.convert(model, "bf16")
            vramkit.restore(model, "fp32")

    work()
    held = pool.stats().held
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        work()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert pool.stats().held == held
    # 5 x 24 MiB would be 30,720 faults of 4 KiB, or 60 of large pages; Python's own are some.
    assert faults < 50


def test_panels_of_products_come_from_the_pool() -> None:
    pool = vramkit.HostPool()
    layer = nn.Linear(512, 512, bias=False)
    vramkit.convert(layer, "nf4")
    x = torch.randn(64, 512)
    expected = layer(x)
    with pool, torch.inference_mode():
        out = layer(x)
    assert torch.equal(out, expected)
    assert pool.stats().lent > 0
    assert pool.stats().used == 0


def test_the_limit_is_an_error_and_leaves_the_model() -> None:
    pool = vramkit.HostPool("2 MiB")
    model = nn.Linear(2048, 2048, bias=False)
    before = model.weight
    with pool, pytest.raises(vramkit.BudgetError, match="no room for 8388608 bytes"):
        vramkit.convert(model, "bf16")
    assert model.weight is before
    assert pool.stats().used == 0
    with pytest.raises(ValueError, match="at least 2097152 bytes"):
        vramkit.HostPool("1 MiB")
    with pytest.raises(ValueError, match="size"):
        vramkit.HostPool("much")


def test_pools_nest_and_are_of_the_thread_that_entered() -> None:
    outer, inner = vramkit.HostPool(), vramkit.HostPool()
    source = torch.randn(64, 64)

    def convert() -> nn.Module:
        layer = nn.Linear(64, 64, bias=False)
        layer.weight = nn.Parameter(source)
        vramkit.convert(layer, "bf16")
        return layer

    kept = []
    with outer:
        with inner:
            kept.append(convert())
        assert inner.stats().used > 0
        assert outer.stats().used == 0
        other = threading.Thread(target=lambda: kept.append(convert()))
        other.start()
        other.join()
        assert outer.stats().used == 0
        kept.append(convert())
        assert outer.stats().used == inner.stats().used
    assert outer.stats().lent == 1


def test_empty_tensors_and_their_types() -> None:
    pool = vramkit.HostPool()
    assert pool.empty((0, 5)).shape == (0, 5)
    for dtype in (torch.uint8, torch.bfloat16, torch.float64):
        made = pool.empty((3, 7), dtype)
        assert (made.shape, made.dtype) == ((3, 7), dtype)
        made.fill_(1)
        assert made.sum() == 21
    assert pool.stats().used == 192  # 3 x 7 x 8 bytes, in units of 64
