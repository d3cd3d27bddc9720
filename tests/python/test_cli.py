"""The command line: results, JSON, exit codes, and the demonstration's promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from click.testing import CliRunner
from torch import nn
from vramkit.cli import main
from vramkit.cli_common import EXIT_BUDGET, EXIT_ERROR, parse_inputs
from vramkit.demo import SENTENCES

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that builds a model, and that model's weights."""
    (tmp_path / "factory_for_cli.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("factory_for_cli", None)
    import factory_for_cli

    model = factory_for_cli.build()
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    """The JSON that a command gives with --json -, and its exit code as expected."""
    done = CliRunner().invoke(main, [*arguments, "--json", "result.json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(Path("result.json").read_text())
    return found


def plain_bytes() -> int:
    return 4 * (96 * 128 + 128 + 128 * 64 + 64)


def test_estimate_of_an_entry_point(workplace: Path) -> None:
    found = run("estimate", "factory_for_cli:build", "--inputs", "2x96")
    rows = {row["precision"]: row for row in found["estimates"]}
    assert rows["fp32"]["weights_bytes"] == plain_bytes()
    sizes = (96 * 128, 128 * 64)
    assert rows["nf4"]["weights_bytes"] == sum(n // 2 + n // 64 * 4 for n in sizes) + 4 * 192
    assert rows["int8"]["peak_bytes"] > rows["int8"]["weights_bytes"]
    assert rows["int8"]["inputs_bytes"] == 2 * 96 * 4


def test_estimate_prints_one_in_full_and_draws(workplace: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("estimate", "factory_for_cli:build", "--inputs", "2x96", "--precision")
    done = CliRunner().invoke(main, [*arguments, "nf4", "--picture", "a.svg", "--vram-limit", "1"])
    assert done.exit_code == 0, done.output
    for words in ("interval exact", "peak, load", "weights, nf4", "picture: a.svg"):
        assert words in done.output
    assert Path("a.svg").read_text().startswith("<?xml")
    found = run(*arguments, "fp32,int8", "--picture", "b.png", "--target", "cuda:8.9",
                "--context", "100 MB")  # fmt: skip
    assert all(Path(f"b-{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("fp32", "int8"))
    for row in found["estimates"]:
        account = row["account"]
        context = [line for line in account["lines"] if line["name"] == "CUDA context"]
        assert context[0]["device_bytes"] == 100_000_000
        assert account["device_bytes"] > row["reserved_bytes"] + 100_000_000
        assert row["interval_bytes"] is None


def test_estimate_of_a_plan(workplace: Path) -> None:
    run("plan", "factory_for_cli:build", "--vram-limit", "20 KiB", "--save", "plan.json")
    found = run("estimate", "factory_for_cli:build", "--inputs", "2x96", "--plan", "plan.json")
    (row,) = found["estimates"]
    assert row["weights_bytes"] == vramkit.Plan.load("plan.json").weights_bytes
    assert row["interval_bytes"] == [row["peak_bytes"]] * 2


def test_convert_fit_and_load(workplace: Path) -> None:
    arguments = ("weights.safetensors", "--factory", "factory_for_cli:build")
    found = run("convert", arguments[0], "out", *arguments[1:], "--precision", "int8")
    assert found["original_bytes"] == plain_bytes()
    import factory_for_cli

    model = vramkit.load("out", factory=factory_for_cli.build)
    expected = factory_for_cli.build()
    vramkit.convert(expected, "int8")
    x = torch.randn(5, 96)
    assert torch.equal(model(x), expected(x))

    fitted = run("fit", arguments[0], "fitted", *arguments[1:], "--vram-limit", "16000 B")
    assert fitted["plan"]["weights_bytes"] <= 16000
    assert vramkit.Plan.load("fitted/plan.json").weights_bytes == fitted["plan"]["weights_bytes"]
    again = run("convert", arguments[0], "again", *arguments[1:], "--plan", "fitted/plan.json")
    assert again["converted_bytes"] == fitted["converted_bytes"]
    a = Path("fitted/model.safetensors").read_bytes()
    assert a == Path("again/model.safetensors").read_bytes()


def test_fit_runs_the_result_once(workplace: Path) -> None:
    arguments = ("--vram-limit", "16000 B", "--inputs", "5x96")
    checkpoint = ("weights.safetensors", "fitted", "--factory", "factory_for_cli:build")
    for where in (checkpoint, ("factory_for_cli:build", "fitted-too")):
        found = run("fit", *where, *arguments)["first_run"]
        assert {**found["measured"], "kept_bytes": 0} == found["estimated"]
        assert found["within_limit"]
        assert found["measured"]["activations_bytes"] > 0
    assert "first_run" not in run("fit", "factory_for_cli:build", "c", *arguments, "--no-verify")


def test_plan_saves_and_prints(workplace: Path) -> None:
    found = run("plan", "factory_for_cli:build", "--vram-limit", "20 KB", "--save", "plan.json")
    assert found["weights_bytes"] <= 20_000
    assert json.loads(Path("plan.json").read_text())["entries"] == found["entries"]


def test_sensitivity_is_saved_and_planned_by(workplace: Path) -> None:
    from safetensors.torch import save_file

    save_file({"input": torch.randn(4, 96)}, "batch.safetensors")
    source = ("weights.safetensors", "--factory", "factory_for_cli:build")
    options = ("--format", "int8", "--format", "int4", "--no-cache", "--save", "found.json")
    found = run("sensitivity", *source, "--batch", "batch.safetensors", *options)
    assert found["method"] == "layer"
    assert json.loads(Path("found.json").read_text()) == found
    made = run("plan", *source, "--vram-limit", "20 KB", "--sensitivity", "found.json")
    errors = {layer["name"]: layer["errors"] for layer in found["layers"]}
    for entry in made["entries"]:
        assert entry["error"] == errors[entry["name"]][entry["format"]]
    assert run("sensitivity", *source, "--no-cache")["method"] == "weights"


def test_plan_prints_what_is_possible(workplace: Path) -> None:
    options = ("--tier", "device", "--tier", "host", "--host-limit", "1 MB", "--rows", "4")
    found = run("plan", "factory_for_cli:build", "--vram-limit", "20 KB", *options)
    rows = {row["mode"]: row for row in found["table"]["rows"]}
    assert rows["as it is"]["weights_bytes"] == plain_bytes()
    assert not rows["as it is"]["fits"]
    assert rows["int8"]["seconds"] > 0
    assert found["table"]["chosen"]["loss"] == found["loss"]
    assert found["device_bytes"] <= 20_000
    assert found["rates"]["measuring_seconds"] > 0
    bare = ("--no-rates", "--no-layers", "--max-quality-loss", "1e-9")
    found = run("plan", "factory_for_cli:build", "--vram-limit", "10 KB", *bare, code=EXIT_BUDGET)
    assert found["needed_bytes"] > 10_000
    found = run("plan", "factory_for_cli:build", "--vram-limit", "1 MB", *bare)
    assert found["seconds"] is None


def test_a_limit_that_nothing_fits(workplace: Path) -> None:
    found = run("plan", "factory_for_cli:build", "--vram-limit", "2 KB", code=EXIT_BUDGET)
    needed = found["needed_bytes"]
    assert "smallest limit" in found["error"]
    run("plan", "factory_for_cli:build", "--vram-limit", f"{needed} B")
    run("plan", "factory_for_cli:build", "--vram-limit", f"{needed - 1} B", code=EXIT_BUDGET)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("estimate", "no/such/model"), "no model at"),
        (("estimate", "no_such_module:build"), "cannot find"),
        (("estimate", "factory_for_cli:build", "--precision", "fp7"), "the precisions are"),
        (("estimate", "factory_for_cli:build", "--inputs", "2by3"), "cannot read the input"),
        (("estimate", "weights.safetensors"), "--factory"),
        (("plan", "factory_for_cli:build", "--vram-limit", "6 parsecs"), "cannot read the size"),
    ],
)
def test_errors_are_sentences(workplace: Path, arguments: tuple[str, ...], text: str) -> None:
    found = run(*arguments, code=EXIT_ERROR)
    assert text in found["error"]


def test_wrong_usage(workplace: Path) -> None:
    done = CliRunner().invoke(main, ["convert", "weights.safetensors", "out"])
    assert done.exit_code == 2
    assert "give --precision or --plan" in done.output
    assert not Path("out").exists()


def test_json_on_stdout_is_only_json(workplace: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(workplace), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "vramkit.cli", "estimate", "factory_for_cli:build", "--json", "-"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert json.loads(done.stdout)["model"] == "factory_for_cli:build"
    assert "precision" in done.stderr


def test_inputs_as_text() -> None:
    assert parse_inputs(("2x3",)) == ((2, 3),)
    assert parse_inputs(("a=2x3:int64", "b=4")) == {"a": ("int64", (2, 3)), "b": (4,)}
    with pytest.raises(ValueError, match="name all inputs or none"):
        parse_inputs(("a=2", "3"))


def test_doctor() -> None:
    done = CliRunner().invoke(main, ["doctor", "--json", "-"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["torch"] == torch.__version__
    assert found["isa"] in found["isa_available"]
    assert found["memory"]["read_bytes_per_second"] > 1e8
    assert found["kernels"]["nf4"]["linear_bytes_per_second"] > 1e6


@pytest.mark.usefixtures("minilm_path")
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("demo")
    limit = found["vram_limit_bytes"]
    assert limit == found["reference_bytes"] // 4
    assert found["measured"]["weights_bytes"] <= limit
    assert found["estimate"]["weights_bytes"] == found["measured"]["weights_bytes"]
    assert found["estimate"]["peak_bytes"] == pytest.approx(
        found["measured"]["peak_bytes"], rel=0.05
    )
    assert found["quality"]["cosine"] >= 0.998
    assert found["coverage_bytes_fraction"] > 0.99
    assert {"name", "format", "bytes", "tier"} <= set(found["plan"][0])
    report = Path("vramkit-report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "<script" not in report
    assert "embeddings.word_embeddings" in report


@pytest.mark.usefixtures("minilm_path")
@pytest.mark.parametrize(("share", "promised"), [(0.20, 0.996), (0.15, 0.965)])
def test_demo_in_less(share: float, promised: float) -> None:
    from vramkit import demo

    found = demo.run(f"{int(90852864 * share)} B").to_dict()
    assert found["measured"]["weights_bytes"] <= found["vram_limit_bytes"]
    assert found["quality"]["cosine"] >= promised
    assert len(SENTENCES) == 16


@pytest.mark.usefixtures("minilm_path")
def test_demo_says_the_smallest_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("demo", "--vram-limit", "5 MB", code=EXIT_BUDGET)
    assert found["needed_bytes"] > 5_000_000
    assert not Path("vramkit-report.html").exists()


def test_module_without_config_needs_a_factory(tmp_path: Path) -> None:
    vramkit.save(nn.Linear(8, 8), tmp_path / "saved")
    with pytest.raises(vramkit.CheckpointError, match=r"config\.json"):
        vramkit.load(tmp_path / "saved")
