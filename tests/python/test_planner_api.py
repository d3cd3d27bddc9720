"""plan and fit: the least error under a limit, sizes to the byte, plans as files."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit import BudgetError, Plan, QuantizedLayer
from vramkit._operators import encode
from vramkit.estimator import weight_bytes
from vramkit.planner import DEFAULT_FORMATS, weight_error


def small_model() -> nn.Sequential:
    model = nn.Sequential(
        nn.Embedding(40, 64),
        nn.Linear(64, 96),
        nn.LayerNorm(96),
        nn.Linear(96, 33),
        nn.Linear(33, 7),
    )
    with torch.no_grad():
        model[1].weight[0, 0] = 3.0  # outliers make layers differ
        model[3].weight *= torch.rand(33, 1)
    return model.eval()


def squared_error(weight: Tensor, fmt: str) -> float:
    stored = encode(weight, vramkit.get_format(fmt)).dense(torch.float32).double()
    return float((stored - weight.double()).square().sum() / weight.double().square().sum())


def choices(model: nn.Sequential, formats: tuple[str, ...]) -> list[list[tuple[int, float]]]:
    groups = []
    for layer in model:
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            weight = layer.weight.detach()
            group = [(weight.numel() * 4, 0.0)]
            for fmt in formats:
                size = vramkit.get_format(fmt).bytes(weight.shape).total
                group.append((size, squared_error(weight, fmt)))
            groups.append(group)
    return groups


@pytest.mark.parametrize("fraction", [0.2, 0.25, 0.3, 0.45, 0.6, 0.9])
def test_no_combination_is_better(fraction: float) -> None:
    """All 9^4 combinations, sized and measured independently."""
    model = small_model()
    formats = ("bf16", "fp16", "int8", "fp8", "int4_g32", "int4", "nf4", "nf4_dq")
    groups = choices(model, formats)
    fixed = weight_bytes(model) - sum(g[0][0] for g in groups)
    limit = int(weight_bytes(model) * fraction)
    fitting = [
        math.fsum(error for _, error in combination)
        for combination in itertools.product(*groups)
        if sum(size for size, _ in combination) + fixed <= limit
    ]
    made = vramkit.plan(model, f"{limit} B", formats=formats)
    assert made.optimal
    assert made.gap == 0
    assert made.weights_bytes <= limit
    total = math.fsum(e.error for e in made.entries)
    assert total == pytest.approx(min(fitting), rel=1e-9)


def test_entries_say_what_happens() -> None:
    model = small_model()
    made = vramkit.plan(model, f"{int(weight_bytes(model) * 0.3)} B")
    names = [e.name for e in made.entries]
    assert names == ["0", "1", "3", "4"]
    for entry in made.entries:
        weight = model.get_submodule(entry.name).weight.detach()
        assert entry.original_bytes == weight.numel() * 4
        assert entry.kind in ("Linear", "Embedding")
        assert entry.tier == "resident"
        if entry.format is None:
            assert (entry.bytes, entry.error) == (entry.original_bytes, 0.0)
        else:
            assert entry.bytes == vramkit.get_format(entry.format).bytes(weight.shape).total
            assert entry.error == pytest.approx(squared_error(weight, entry.format), rel=1e-9)
            assert entry.format in made.explain(entry.name)
    with pytest.raises(KeyError, match="no layer 'x'"):
        made.explain("x")
    before = weight_bytes(model)
    assert made.original_bytes == before
    assert made.apply(model) is model
    assert weight_bytes(model) == made.weights_bytes
    for entry in made.entries:
        layer = model.get_submodule(entry.name)
        assert isinstance(layer, QuantizedLayer) == (entry.format is not None)


@pytest.mark.parametrize("name", DEFAULT_FORMATS)
def test_weight_error(name: str) -> None:
    for shape in ((40, 96), (33, 100)):
        weight = torch.randn(shape)
        assert weight_error(weight, vramkit.get_format(name)) == pytest.approx(
            squared_error(weight, name), rel=1e-12
        )
    assert weight_error(torch.zeros(8, 64), vramkit.get_format(name)) == 0.0


def test_the_smallest_limit_is_exact() -> None:
    model = small_model()
    with pytest.raises(BudgetError, match="smallest limit that would do") as caught:
        vramkit.plan(model, "100 B", vram_buffer="50 B")
    needed = caught.value.needed_bytes
    assert f"{needed} B" in str(caught.value)
    made = vramkit.plan(model, f"{needed} B", vram_buffer="50 B")
    assert made.weights_bytes == needed - 50
    with pytest.raises(BudgetError) as again:
        vramkit.plan(model, f"{needed - 1} B", vram_buffer="50 B")
    assert again.value.needed_bytes == needed
    assert not any(isinstance(m, QuantizedLayer) for m in model.modules())


def test_a_wide_limit_changes_nothing() -> None:
    model = small_model()
    made = vramkit.plan(model, f"{weight_bytes(model)} B")
    assert [e.format for e in made.entries] == [None] * 4
    made = vramkit.plan(model, f"{weight_bytes(model) - 1} B")
    assert sum(e.format is not None for e in made.entries) >= 1


def test_more_room_is_never_worse() -> None:
    model = small_model()
    errors = []
    for fraction in (0.2, 0.22, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0):
        made = vramkit.plan(model, f"{int(weight_bytes(model) * fraction)} B")
        errors.append(sum(e.error for e in made.entries))
    assert errors == sorted(errors, reverse=True)


def test_deterministic() -> None:
    model = small_model()
    limit = f"{int(weight_bytes(model) * 0.22)} B"
    assert vramkit.plan(model, limit).to_dict() == vramkit.plan(model, limit).to_dict()


def test_skip_and_formats() -> None:
    model = small_model()
    made = vramkit.plan(model, f"{int(weight_bytes(model) * 0.5)} B", skip=["0"], formats=["int8"])
    assert [e.name for e in made.entries] == ["1", "3", "4"]
    assert {e.format for e in made.entries} <= {"int8", None}
    made.apply(model)
    assert not isinstance(model[0], QuantizedLayer)


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 50, bias=False))
    model[1].weight = model[0].weight
    made = vramkit.plan(model, "4000 B", formats=["int8"])
    assert len(made.entries) == 1
    assert made.weights_bytes == 50 * 64 + 50 * 4
    made.apply(model)
    assert model[0].codes is model[1].codes


def test_formats_that_cannot_hold_a_weight_are_not_offered() -> None:
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        model[0].weight[0, 0] = 1e6  # more than float16 reaches
    made = vramkit.plan(model, f"{8 * 64 * 2} B", formats=["fp16", "bf16"])
    assert [e.format for e in made.entries] == ["bf16"]


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        model = small_model()
        made = vramkit.plan(
            model, f"{int(weight_bytes(model) * 0.3)} B", inputs=torch.tensor([[1]])
        )
        made.save(tmp_path / "plan.json")
        assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded.entries == made.entries
        for field in ("limit_bytes", "buffer_bytes", "fixed_bytes", "weights_bytes", "fingerprint"):
            assert getattr(loaded, field) == getattr(made, field)
        loaded.apply(model)
        assert weight_bytes(model) == made.weights_bytes

    def test_edited_by_hand(self, tmp_path: Path) -> None:
        model = small_model()
        vramkit.plan(model, f"{int(weight_bytes(model) * 0.3)} B").save(tmp_path / "plan.json")
        data = json.loads((tmp_path / "plan.json").read_text())
        data["entries"][1]["format"] = "fp8"
        (tmp_path / "plan.json").write_text(json.dumps(data))
        Plan.load(tmp_path / "plan.json").apply(model)
        assert model[1].storage_format.name == "fp8"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"schema": "vramkit.plan/99"}',
            '{"schema": "vramkit.plan/1"}',
            "\xff\xfe",
        ],
    )
    def test_no_plan(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"plan\.json"):
            Plan.load(tmp_path / "plan.json")

    def test_unknown_format(self, tmp_path: Path) -> None:
        model = small_model()
        vramkit.plan(model, "1 GB").save(tmp_path / "plan.json")
        data = json.loads((tmp_path / "plan.json").read_text())
        data["entries"][0]["format"] = "int3"
        (tmp_path / "plan.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match="int3"):
            Plan.load(tmp_path / "plan.json")

    def test_another_model(self) -> None:
        made = vramkit.plan(small_model(), "1 GB")
        other = nn.Sequential(nn.Linear(64, 64))
        with pytest.raises(ValueError, match="other layers or shapes"):
            made.apply(other)
        assert not isinstance(other[0], QuantizedLayer)


def test_as_text_data_and_pictures() -> None:
    model = small_model()
    made = vramkit.plan(model, f"{int(weight_bytes(model) * 0.3)} B", inputs=torch.tensor([[1, 2]]))
    text = str(made)
    assert "optimal" in text
    assert "bounds the weights" in text
    assert "estimated peak" in text
    data = json.loads(json.dumps(made.to_dict()))
    assert data["weights_bytes"] == made.weights_bytes
    assert data["estimate"]["weights_bytes"] == made.weights_bytes
    assert [e["name"] for e in data["entries"]] == ["0", "1", "3", "4"]
    html = made._repr_html_()
    assert all(f">{e.format or 'plain'}<" in html for e in made.entries)
    assert made.plot().axes


def test_plan_leaves_the_model_alone() -> None:
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    vramkit.plan(model, f"{int(weight_bytes(model) * 0.2)} B", inputs=torch.tensor([[1]]))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fit() -> None:
    model = small_model()
    limit = int(weight_bytes(model) * 0.3)
    steps: list[str] = []
    fitted = vramkit.fit(model, f"{limit} B", progress=lambda *s: steps.append(s[2]))
    assert fitted is model
    assert weight_bytes(model) <= limit
    assert isinstance(model.vramkit_plan, Plan)
    assert steps
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 7)
    assert not any("vramkit" in key for key in model.state_dict())


def test_fit_that_cannot() -> None:
    model = small_model()
    with pytest.raises(BudgetError):
        vramkit.fit(model, "1 KB")
    assert not any(isinstance(m, QuantizedLayer) for m in model.modules())


@pytest.mark.parametrize("limit", ["six GB", -1, "", math.nan])
def test_limits_that_are_none(limit: object) -> None:
    with pytest.raises(ValueError, match="size"):
        vramkit.plan(small_model(), limit)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="6 GB"):
        vramkit.plan(small_model(), None)  # type: ignore[arg-type]


def test_numbers_are_gib() -> None:
    assert vramkit.plan(small_model(), 1).limit_bytes == 1 << 30
    assert vramkit.plan(small_model(), "1 GB", vram_buffer=0.5).buffer_bytes == 1 << 29
