"""Rounding with feedback against its published form in float64, and conversion with calibration."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import vramkit
from numerics import UNIT, accumulation_bound
from torch import Tensor, nn
from torch.library import opcheck
from vramkit._operators import StoredParts, encode
from vramkit._rounding import compensate, damped, feedback_coefficients
from vramkit.calibration import Calibration, Moment
from vramkit.errors import CalibrationError, NonFiniteWeightError

FORMATS = ["int4", "int4_g32", "int8", "nf4", "nf4_dq", "fp4", "fp8", "fp8_e5m2"]


def problem(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs with strong correlations."""
    x = torch.randn(4 * cols, cols) @ torch.randn(cols, cols)
    return torch.randn(rows, cols), (x.T @ x) / x.shape[0]


def output_error(weight: Tensor, parts: StoredParts, moment: Tensor) -> float:
    """tr(E H E^T) in float64."""
    error = weight.double() - parts.dense(torch.float32).double()
    return float(((error @ moment.double()) * error).sum())


def levels_of(parts: StoredParts) -> Tensor:
    """Every element's value for each code, [codes, rows, cols], by decoding each code."""
    fmt = parts.fmt
    every = []
    for code in range(1 << fmt.bits):
        byte = code if fmt.bits == 8 else code << 4 | code
        filled = torch.full_like(parts.codes, byte)
        every.append(
            StoredParts(fmt, parts.shape, filled, parts.scales, parts.extra).dense(torch.float32)
        )
    if fmt.name == "int8":
        del every[128]  # -128, which symmetric codes leave out
    return torch.stack(every).double()


def excess_over_published(
    weight: Tensor, moment: Tensor, levels: Tensor, order: Tensor, chosen: Tensor
) -> Tensor:
    """How much farther `chosen` lies from GPTQ's target than the nearest level, [rows, cols].

    The targets are the paper's, in float64: the inverse's Cholesky factor, and all later columns
    updated after each one. The errors carried on are those of `chosen`, so that one choice between
    two levels at the same distance does not decide all that follow.
    """
    w = weight.double()[:, order].clone()
    grid = levels[:, :, order].nan_to_num(nan=float("inf"))
    values = chosen.double()[:, order]
    inverse = torch.linalg.inv(moment.double()[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    excess = torch.empty_like(w)
    for k in range(w.shape[1]):
        nearest = (grid[:, :, k] - w[:, k]).abs().amin(0)
        excess[:, k] = (values[:, k] - w[:, k]).abs() - nearest
        step = (w[:, k] - values[:, k]) / upper[k, k]
        w[:, k:] -= step[:, None] * upper[k, k:]
    return excess


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cols", [1, 33, 64, 130])
def test_the_published_algorithm(name: str, cols: int) -> None:
    weight, moment = problem(21, cols)
    parts = encode(weight, vramkit.get_format(name))
    moment = damped(moment, 0.01)
    order, first, _ = feedback_coefficients(moment)
    compensate(weight, parts, moment, damping=0.0, passes=0)
    chosen = parts.dense(torch.float32)
    excess = excess_over_published(weight, moment, levels_of(parts), order, chosen)
    # Both distances move by the error of the float32 target, which is a sum of these magnitudes.
    error = (weight - chosen)[:, order].abs().double()
    magnitude = weight[:, order].abs() + error @ first.abs().double().t()
    bound = 2 * (accumulation_bound(cols) + 4 * UNIT[torch.float32]) * magnitude
    assert bool((excess <= bound).all()), float((excess / bound).max())


@pytest.mark.parametrize("name", FORMATS)
def test_every_pass_lowers_the_output_error(name: str) -> None:
    weight, moment = problem(70, 200)
    fmt = vramkit.get_format(name)
    errors = [output_error(weight, encode(weight, fmt), moment)]
    for passes in range(4):
        parts = encode(weight, fmt)
        compensate(weight, parts, moment, damping=0.0, passes=passes)
        errors.append(output_error(weight, parts, moment))
    print(name, [round(e / errors[0], 4) for e in errors])
    assert errors[1] < 0.7 * errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < errors[1]


@pytest.mark.parametrize("name", ["int4", "nf4", "int8"])
def test_scales_stay(name: str) -> None:
    weight, moment = problem(9, 100)
    parts = encode(weight, vramkit.get_format(name))
    before = (parts.scales.clone(), None if parts.extra is None else parts.extra.clone())
    compensate(weight, parts, moment, damping=0.01, passes=1)
    assert torch.equal(parts.scales, before[0])
    assert before[1] is None or torch.equal(parts.extra, before[1])


def test_uncorrelated_inputs_need_no_feedback() -> None:
    weight = torch.randn(30, 77)
    parts = encode(weight, vramkit.get_format("int8"))
    nearest = parts.codes.clone()
    compensate(weight, parts, torch.eye(77), damping=0.0, passes=2)
    assert torch.equal(parts.codes, nearest)


def test_columns_without_inputs_are_rounded_to_nearest() -> None:
    weight, moment = problem(8, 64)
    moment[:, 10] = moment[10] = 0
    parts = encode(weight, vramkit.get_format("int8"))
    nearest = parts.codes.clone()
    compensate(weight, parts, moment, damping=0.01, passes=2)
    assert torch.equal(parts.codes[:, 10], nearest[:, 10])
    parts = encode(weight, vramkit.get_format("int8"))
    compensate(weight, parts, torch.zeros(64, 64), damping=0.01, passes=1)
    assert torch.equal(parts.codes, nearest)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_rows(name: str) -> None:
    weight, moment = problem(5, 64)
    weight[2] = 0
    parts = encode(weight, vramkit.get_format(name))
    compensate(weight, parts, moment, damping=0.01, passes=2)
    assert not parts.dense(torch.float32)[2].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite(value: float) -> None:
    weight, moment = problem(4, 32)
    moment[3, 5] = value
    parts = encode(weight, vramkit.get_format("int4"))
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        compensate(weight, parts, moment, damping=0.01, passes=1)


def test_the_same_codes_for_any_number_of_threads() -> None:
    weight, moment = problem(300, 96)
    order, first, _ = feedback_coefficients(damped(moment, 0.01))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            parts = encode(weight, vramkit.get_format("int4"))
            torch.ops.vramkit._feedback_out(
                weight, first, order, parts.scales, parts.extra, None, parts.fmt.spec, False,
                parts.codes,
            )  # fmt: skip
            results.append(parts.codes)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


def test_the_operators_checks() -> None:
    weight, moment = problem(6, 40)
    parts = encode(weight, vramkit.get_format("int4"))
    order, first, _ = feedback_coefficients(damped(moment, 0.01))
    op = torch.ops.vramkit._feedback_out

    def call(x: Tensor, coefficients: Tensor, positions: Tensor) -> None:
        op(x, coefficients, positions, parts.scales, parts.extra, None, parts.fmt.spec, False,
           parts.codes)  # fmt: skip

    with pytest.raises(RuntimeError, match="permutation"):
        call(weight, first, torch.zeros_like(order))
    with pytest.raises(RuntimeError, match="coefficients"):
        call(weight, first[:10], order)
    with pytest.raises(RuntimeError, match="float32"):
        call(weight.half(), first, order)
    args: Any = (weight, first, order, parts.scales, parts.extra, None, parts.fmt.spec, False,
                 parts.codes)  # fmt: skip
    opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 40)).eval()


def correlated(count: int, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ basis


@pytest.mark.parametrize("name", ["int4", "nf4", "int8"])
def test_convert_lowers_the_error_of_the_outputs(name: str) -> None:
    batches = list(correlated(2000).split(500))
    model = small_model()
    x = batches[0]
    expected = model(x).detach()

    def error(**arguments: Any) -> float:
        converted = copy.deepcopy(model)
        report = vramkit.convert(converted, name, **arguments)
        assert report.uncalibrated == []
        return float((converted(x) - expected).detach().norm() / expected.norm())

    plain, calibrated = error(), error(calibration=batches)
    assert calibrated < 0.8 * plain
    # Batches that are read once, and a budget that makes each layer a group of its own.
    assert error(calibration=iter(batches)) == calibrated
    assert error(calibration=batches, calibration_memory="40 KB") == calibrated
    assert error(calibration=Calibration.collect(model, batches)) == calibrated


def test_moments_are_those_of_the_inputs() -> None:
    class Both(nn.Module):
        """Two layers on one tensor, and one on what was written in place."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y = x.clone()
            first = self.a(y) + self.b(input=y)
            y.mul_(2.0)
            return first + self.c(y)

    x = torch.randn(3, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    found = Calibration.collect(Both().eval(), [{"x": x, "attention_mask": mask}] * 2)
    kept = x[mask.bool()].double()
    expected = kept.T @ kept / len(kept)
    for name, factor in (("a", 1), ("b", 1), ("c", 4)):
        assert found.moments[name].rows == 2 * len(kept)
        difference = found.moments[name].mean.double() - factor * expected
        # float32 sums of 26 products.
        assert float(difference.abs().max()) < 1e-5 * factor
    assert found.nbytes == 3 * 8 * 8 * 4


def test_layers_that_no_batch_reaches() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)
            self.table = nn.Embedding(10, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Branch().eval()
    plain = encode(model.unused.weight, vramkit.get_format("int4")).codes
    with pytest.warns(UserWarning, match="no calibration batch reached unused"):
        report = vramkit.convert(model, "int4", calibration=[correlated(50, 32)])
    assert dict(report.uncalibrated) == {
        "unused": "no calibration batch reached it",
        "table": "no calibration for Embedding",
    }
    assert {"name": "unused", "reason": "no calibration batch reached it"} in report.to_dict()[
        "uncalibrated"
    ]
    assert torch.equal(model.unused.codes, plain)


def test_formats_without_a_choice() -> None:
    model = small_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = vramkit.convert(model, "bf16", calibration=[correlated(10)])
    assert [reason for _, reason in report.uncalibrated] == ["bf16 rounds to nearest"] * 2


def test_bad_calibration_leaves_the_model_alone() -> None:
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bad = correlated(10)
    bad[4, 4] = float("nan")
    with pytest.raises(CalibrationError, match="'0' hold NaN"):
        vramkit.convert(model, "int4", calibration=[bad])
    other = Calibration({"0": Moment(torch.eye(7), 1)})
    with pytest.raises(CalibrationError, match="of 7 input features"):
        vramkit.convert(model, "int4", calibration=other)
    with pytest.raises(CalibrationError, match="calibration_memory"):
        vramkit.convert(model, "int4", calibration=[correlated(10)], calibration_memory="1 KB")
    with pytest.raises(TypeError, match="write \\[inputs\\]"):
        vramkit.convert(model, "int4", calibration=correlated(10))
    with pytest.raises(ValueError, match="damping"):
        Calibration(damping=-1.0)
    broken = small_model()
    broken.get_parameter("0.weight").data[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeightError):
        vramkit.convert(broken, "int4", calibration=[correlated(10)])
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_layers_share_their_calibrated_codes() -> None:
    first = nn.Linear(48, 48)
    second = nn.Linear(48, 48)
    second.weight = first.weight
    model = nn.Sequential(first, second).eval()
    vramkit.convert(model, "int4", calibration=[correlated(100)])
    assert model[0].codes is model[1].codes


def test_progress() -> None:
    seen: list[tuple[int, int, str]] = []
    model = small_model()
    batches = [correlated(10)] * 3
    Calibration.collect(model, batches, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3, "calibrate"), (2, 3, "calibrate"), (3, 3, "calibrate")]


class Pipe(nn.Module):
    """Two layers on one input, of which the first is loud, and one that the output does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64, bias=False), nn.Linear(48, 64, bias=False)
        self.unused = nn.Linear(48, 64, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.unused(x)
        return 10 * self.first(x) + self.second(x)


def pipe_limit(*formats: str) -> str:
    return f"{sum(vramkit.get_format(name).bytes((64, 48)).total for name in formats)} B"


def test_a_plan_by_data_spends_bytes_where_the_output_feels_it() -> None:
    model = Pipe().eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = list(correlated(1000).split(250))
    calibration = Calibration.collect(model, batches)
    plan = vramkit.plan(
        model,
        pipe_limit("int8", "int4_g16", "int4_g16"),
        formats=("int8", "int4_g16"),
        batches=batches,
        calibration=calibration,
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    chosen = {entry.name: entry.format for entry in plan.entries}
    assert chosen == {"first": "int8", "second": "int4_g16", "unused": "int4_g16"}
    errors = {entry.name: entry.error for entry in plan.entries}
    assert errors["unused"] == 0.0
    expected = torch.cat([model(batch) for batch in batches]).detach().double()
    plan.apply(model, calibration=calibration)
    found = torch.cat([model(batch) for batch in batches]).detach().double()
    error = float((found - expected).square().sum() / expected.square().sum())
    # Errors of layers add up but for their correlation, which is within 2 sqrt(a b).
    together = errors["first"] + errors["second"]
    slack = 2 * (errors["first"] * errors["second"]) ** 0.5
    assert abs(error - together) <= slack + 1e-6 * together


def test_measured_costs_are_errors_of_the_output_and_leave_padding_out() -> None:
    model = Pipe().eval()
    x = correlated(60).reshape(2, 30, 48)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 7:] = 0
    garbage = x.clone()
    garbage[1, 7:] = 1e3
    batch = {"x": garbage, "attention_mask": mask}
    plan = vramkit.plan(model, pipe_limit(*["nf4"] * 3), formats=["nf4"], batches=[batch])
    kept = x[mask.bool()].double()
    outputs = kept @ (10 * model.first.weight + model.second.weight).double().t()
    for name, factor in (("first", 10), ("second", 1)):
        weight = model.get_submodule(name).weight.detach()
        change = encode(weight, vramkit.get_format("nf4")).dense(torch.float32) - weight
        expected = (factor * kept @ change.double().t()).square().sum() / outputs.square().sum()
        found = next(entry.error for entry in plan.entries if entry.name == name)
        # The outputs are float32 sums, and the error is a difference of two of them.
        assert found == pytest.approx(float(expected), rel=1e-3), name


def test_a_plan_by_data_refuses() -> None:
    model = small_model()
    batches = [correlated(10)]
    with pytest.raises(ValueError, match="batches=, which is missing"):
        vramkit.plan(model, "1 MB", calibration=Calibration())
    with pytest.raises(TypeError, match="write \\[inputs\\]"):
        vramkit.plan(model, "1 MB", batches=correlated(10))
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        vramkit.plan(model, "1 MB", batches=[correlated(10) * float("nan")])
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    def fails(result: Tensor) -> Tensor:
        if not torch.equal(model.get_parameter("0.weight"), weights["0.weight"]):
            raise RuntimeError("in the middle")
        return result

    with pytest.raises(RuntimeError, match="in the middle"):
        vramkit.plan(model, "1 MB", batches=batches, output=fails)
    assert all(torch.equal(v, weights[name]) for name, v in model.state_dict().items())
    folded = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(48, 64))).eval()
    with pytest.raises(CalibrationError, match="computed by"):
        vramkit.plan(folded, "1 MB", batches=batches)
