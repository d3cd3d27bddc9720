"""Every block of the migration pages runs, in order, on small models of the published structure."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from vramkit.cli import main as cli
from vramkit.errors import StaleHandleError
from vramkit.heartmula import write_small
from vramkit.optimize_fp8 import main as optimize

from benchmarks.small_hunyuan3d import PartFormerPipeline, partformer

PAGES = Path(__file__).parents[2] / "docs" / "migration"


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each block of a page."""
    text = (PAGES / page).read_text(encoding="utf-8")
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What upstream's packages provide, under their names, with small models inside."""

    def from_pretrained(model_path: str, verbose: bool = False) -> PartFormerPipeline:
        assert model_path == "tencent/Hunyuan3D-Part"
        return partformer()

    def auto_mask(ckpt_path: str | None = None) -> Any:
        return partformer().bbox_predictor._auto_mask

    for name, held in (
        ("partgen", {}),
        (
            "partgen.partformer_pipeline",
            {"PartFormerPipeline": SimpleNamespace(from_pretrained=from_pretrained)},
        ),
        ("auto_mask", {"AutoMask": auto_mask}),
    ):
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    import vramkit.model_manager

    monkeypatch.delitem(vars(vramkit.model_manager), "model_manager", raising=False)


@pytest.mark.usefixtures("upstream")
def test_hunyuan3d(capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, Any] = {}
    for language, code in blocks("hunyuan3d.md"):
        assert language == "python"
        exec(compile(code, "hunyuan3d.md", "exec"), space)
        # What the page says of the block, where it says something.
        if "p3sam = model_manager.get_p3sam_model()" in code:
            with pytest.raises(StaleHandleError):
                space["p3sam"].predict_aabb(torch.rand(8, 3))
            mesh, (boxes, gt, exploded) = space["partformer"](num_inference_steps=2)
            assert mesh.shape == (1, 6, 1)
            assert boxes.shape == gt.shape
            assert exploded.dim() == 3
            with space["model_manager"].lease("partformer") as loaded:
                inner = loaded.bbox_predictor._auto_mask.model
                assert inner.head[0].weight.dtype is torch.bfloat16
                assert inner.sonata.stem.weight.dtype is torch.float32
    out = capsys.readouterr().out
    assert "P3-SAM will use approximately: " in out
    assert "Quality difference: 0." in out
    assert 0 < space["quality_diff"] < 0.1  # percent: half a unit of float16 is 0.05
    assert space["choice"].size < 64
    assert "vae.encoder" in out
    expected = "fp32" if not torch.cuda.is_available() else None
    assert expected is None or f"\n{expected}\n" in out
    space["model_manager"].unload_all_models()


def test_heartmula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_small(tmp_path / "ckpt")
    space: dict[str, Any] = {}
    scripts = 0
    for language, code in blocks("heartmula.md"):
        if language == "python":
            exec(compile(code, "heartmula.md", "exec"), space)
            continue
        assert language == "sh"
        for line in code.strip().splitlines():
            words = shlex.split(line)
            if words[:3] == ["python", "-m", "vramkit.optimize_fp8"]:
                assert optimize(words[3:]) == 0
            else:
                assert words[0] == "vramkit"
                done = CliRunner().invoke(cli, words[1:])
                assert done.exit_code == 0, done.output
            scripts += 1
    assert scripts == 3
    for name in ("song.wav", "out/benchmark_output.wav", "out/benchmark_results.json",
                 "out/quantization_config.json", "out2/quantization_config.json"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0
    assert space["music"].wav.shape[0] == 2


def test_lsd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    for language, code in blocks("lsd.md"):
        assert language == "python"
        exec(compile(code, "lsd.md", "exec"), space)
    out = capsys.readouterr().out
    assert "torch.bfloat16" in out
    assert "torch.Size([2, 100, 64])" in out
    assert space["saved"].bytes_after < space["saved"].bytes_before
    assert space["report"].stepped
    assert space["out"].shape == space["frame"].shape
    assert space["frames"].shape == (1, 3, 3, 32, 32)
    assert set(space["stats"]) >= {"total_time", "fps", "time_per_frame", "peak_memory"}
    assert set(space["results"]) == {("fp32", "tiny"), ("int8", "tiny")}
    assert {p.name for p in (tmp_path / "week1").iterdir()} >= {"week1.json", "week1.html"}


def test_pages_have_no_placeholders() -> None:
    for page in PAGES.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^(TABLE|PROFILES|SUITE|FIGURES)$", text, re.MULTILINE), page
