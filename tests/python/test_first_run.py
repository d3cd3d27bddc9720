"""fit's check: the first real call, measured beside the estimate and the limit."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from vramkit import measure
from vramkit.estimator import weight_bytes
from vramkit.first_run import MemoryEstimateWarning

ROWS = 24


def build() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96)).eval()


def hooks_of(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


def fitted(**options: Any) -> nn.Module:
    model = build()
    options.setdefault("inputs", ((ROWS, 96),))
    return vramkit.fit(model, f"{weight_bytes(model) // 2} B", **options)


@pytest.fixture(autouse=True)
def strict() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryEstimateWarning)
        yield


def test_the_first_call_is_measured_and_the_hooks_go() -> None:
    model = fitted()
    found = model.vramkit_first_run
    assert not found.done
    assert found.peak_bytes is found.within_limit is found.difference is None
    x = torch.randn(ROWS, 96)
    expected = measure.call(copy.deepcopy(model), (x,)).activations_bytes
    with torch.inference_mode():
        first = model(x)
        assert hooks_of(model) == 0
        assert torch.equal(first, model(x))
    assert found.activations_bytes == expected == model.vramkit_plan.estimate.activations_bytes
    assert found.weights_bytes == weight_bytes(model)
    assert found.estimate is model.vramkit_plan.estimate
    assert found.difference == 0.0
    assert found.within_limit
    assert found.verification.ratio == 1.0
    assert found.verification.kept
    again = vramkit.estimate(model, inputs=(x,))
    assert again.calibrated.most_bytes == found.activations_bytes
    data = found.to_dict()
    assert data["measured"]["peak_bytes"] == data["estimated"]["peak_bytes"] == found.peak_bytes
    for text in ("measured", "estimated", "within the limit", "weights"):
        assert text in str(found)


def test_the_same_outputs_while_it_is_measured() -> None:
    model, plain = fitted(), fitted(verify=False)
    assert not hasattr(plain, "vramkit_first_run")
    assert hooks_of(plain) == 0
    x = torch.randn(ROWS, 96)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("rows", [1, 7])
def test_other_shapes_get_an_estimate_of_their_own(rows: int) -> None:
    model = fitted()
    with torch.no_grad():
        model(torch.randn(rows, 96))
    found = model.vramkit_first_run
    assert found.verification is None
    assert found.estimate is not model.vramkit_plan.estimate
    assert found.verification.ratio == 1.0
    assert found.difference == 0.0
    without = fitted(inputs=None)
    with torch.no_grad():
        without(torch.randn(rows, 96))
    assert without.vramkit_first_run.activations_bytes == found.activations_bytes
    assert without.vramkit_first_run.estimate.activations_bytes == found.activations_bytes


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, *, scale: Tensor, cache: Any = None, flags: Any = ()) -> Tensor:
        return self.layer(x) * scale


def test_inputs_by_position_and_by_name_are_the_same() -> None:
    shapes = {"x": (3, 64), "scale": (3, 64)}
    model = vramkit.fit(Named().eval(), "1 MB", inputs=shapes)
    with torch.no_grad():
        model(torch.randn(3, 64), scale=torch.randn(3, 64))
    assert model.vramkit_first_run.estimate is model.vramkit_plan.estimate


class Further(Named):
    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return super().forward(x, **more)


class Nameless(Named):
    def forward(self, *x: Tensor, **more: Tensor) -> Tensor:
        return super().forward(*x, **more)


def test_further_names_count_and_mixed_calls_without_names_do_not() -> None:
    shapes, x = {"x": (3, 64), "scale": (3, 64)}, torch.randn(3, 64)
    model = vramkit.fit(Further().eval(), "1 MB", inputs=shapes)
    with torch.no_grad():
        model(x, scale=x)
    assert model.vramkit_first_run.estimate is model.vramkit_plan.estimate
    model = vramkit.fit(Nameless().eval(), "1 MB")
    with torch.no_grad():
        model(x, scale=x)
    assert model.vramkit_first_run.done
    assert model.vramkit_first_run.estimate is None
    assert "call it with names alone" in model.vramkit_first_run.waiting


def test_inputs_that_cannot_be_kept() -> None:
    model = vramkit.fit(Named().eval(), "1 MB", inputs={"x": (3, 64), "scale": (3, 64)})
    with torch.no_grad():
        model(torch.randn(3, 64), scale=torch.randn(3, 64), cache=object())
    found = model.vramkit_first_run
    assert found.done
    assert found.estimate is None
    assert "an input was a object" in found.waiting
    assert found.to_dict()["estimated"] is None
    assert "-" in str(found)


def test_calls_that_are_not_measured() -> None:
    model = fitted()
    found, x = model.vramkit_first_run, torch.randn(ROWS, 96)
    model(x)
    assert "gradients were on" in str(found)
    with torch.no_grad():
        with torch.profiler.profile(), pytest.raises(RuntimeError):
            model(x[:, :5])
        assert "a profiler was running" in str(found)
        with pytest.raises((RuntimeError, ValueError)):
            model(x[:, :5])
        assert "failed" in str(found)
        assert hooks_of(model) == 2
        assert not torch.autograd._profiler_enabled()
        model(x)
    assert found.difference == 0.0


def test_copies_and_files_watch_their_own_first_call() -> None:
    model = fitted()
    twin, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    x = torch.randn(ROWS, 96)
    with torch.no_grad():
        for one in (twin, read, model):
            assert not one.vramkit_first_run.done
            one(x)
            assert one.vramkit_first_run.done
            assert hooks_of(one) == 0
    again = pickle.loads(pickle.dumps(model))
    assert again.vramkit_first_run.activations_bytes == model.vramkit_first_run.activations_bytes


def test_compiled_and_exported_models() -> None:
    model = fitted()
    x = torch.randn(ROWS, 96)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)
        torch.export.export(model, (x,))
        assert torch.equal(model(x), expected)
        assert model.vramkit_first_run.done
        assert torch.equal(compiled(x), expected)


def test_one_of_several_threads_is_measured() -> None:
    model = fitted()
    x, errors = torch.randn(ROWS, 96), []

    def call() -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    model(x)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    with warnings.catch_warnings():
        # What other threads hold at that time counts too.
        warnings.simplefilter("ignore", MemoryEstimateWarning)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert model.vramkit_first_run.done
    assert hooks_of(model) == 0


class Doubling(nn.Module):
    """Calls itself once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        x = self.layer(x)
        return self(x, False) if again else x


def test_a_model_that_calls_itself() -> None:
    model = vramkit.fit(Doubling().eval(), "1 MB")
    with torch.no_grad():
        model(torch.randn(5, 64))
    assert model.vramkit_first_run.difference == 0.0
    assert hooks_of(model) == 0


class Remembering(nn.Module):
    """Makes a table in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(x.shape[-1] * 32, dtype=x.dtype).reshape(32, -1)
        y: Tensor = self.layer(x) + self.table[0]
        return y


def test_what_a_first_call_leaves_counts_once() -> None:
    model = vramkit.fit(Remembering().eval(), "1 MB", inputs=((5, 64),))
    with torch.no_grad():
        model(torch.randn(5, 64))
    found = model.vramkit_first_run
    assert found.estimate.kept_bytes == 32 * 64 * 4
    assert found.difference == 0.0
    assert found.verification is None  # later calls will not hold as much
    assert "left by it" in str(found)


class Hiding(nn.Module):
    """Takes 4 MiB in a real call that a trace does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        held = None if isinstance(x, FakeTensor) else torch.zeros(1 << 20)
        y: Tensor = self.layer(x)
        del held
        return y


def test_what_was_not_estimated_is_warned_of() -> None:
    model = vramkit.fit(Hiding().eval(), "1 MB", inputs=((5, 64),))
    with torch.no_grad(), pytest.warns(MemoryEstimateWarning, match="of what was estimated"):
        model(torch.randn(5, 64))
    tight = vramkit.fit(Hiding().eval(), "2 MB", activations="1 MB")
    with torch.no_grad(), pytest.warns(MemoryEstimateWarning, match="more than its limit"):
        tight(torch.randn(5, 64))
    assert not tight.vramkit_first_run.within_limit
    assert "OVER the limit" in str(tight.vramkit_first_run)
