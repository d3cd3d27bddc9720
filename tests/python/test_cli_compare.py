"""`vramkit compare`: models by their weights and outputs, sounds, images, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vramkit
from click.testing import CliRunner
from numerics import FLOAT64_SUM, reordered
from safetensors.torch import save_file
from torch import nn
from vramkit.cli import main
from vramkit.cli_common import EXIT_ERROR
from vramkit.weight_comparison import compare_weights

FACTORY = """
import torch
from torch import nn

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 48, 96))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.experts)

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.BatchNorm1d(96), nn.Linear(96, 96, bias=False),
                          Experts())
    model[2].weight = model[0].weight
    return model

def words():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 50))
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "factory_for_compare.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("factory_for_compare", None)
    import factory_for_compare

    return factory_for_compare


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["compare", *arguments, "--json", "result.json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(Path("result.json").read_text())
    return found


def expected_errors(plain: nn.Module, converted: nn.Module) -> dict[str, tuple[float, float]]:
    """(relative L2, cosine) of every tensor, by the layers' own decoding."""
    other = dict(converted.state_dict())
    found = {}
    for name, a in plain.state_dict().items():
        module, _, leaf = name.rpartition(".")
        layer = converted.get_submodule(module)
        b = getattr(layer, leaf) if name not in other else other[name]
        a, b = a.double(), torch.as_tensor(b[:] if name not in other else b).double()
        norm = float(a.norm())
        error = float((b - a).norm())
        cosine = float((a * b).sum() / (a.norm() * b.norm())) if norm else 1.0
        found[name] = (error / norm if norm else 0.0, cosine)
    return found


@pytest.mark.parametrize("precision", ["int8", "nf4", "nf4_dq", "int4", "fp8", "bf16", "int4_g16"])
def test_weights_of_a_converted_folder(workplace: Any, precision: str) -> None:
    plain, model = workplace.build(), workplace.build()
    save_file({k: v for k, v in plain.state_dict().items() if k != "2.weight"}, "plain.safetensors")
    vramkit.convert(model, precision, parameters=True)
    vramkit.save(model, "converted")
    found = compare_weights("plain.safetensors", "converted")
    expected = expected_errors(plain, model)
    del expected["2.weight"]
    assert {t.name for t in found.tensors} == set(expected)
    for tensor in found.tensors:
        error, cosine = expected[tensor.name]
        assert tensor.relative_l2 == pytest.approx(error, rel=FLOAT64_SUM * 100, abs=1e-15)
        assert tensor.cosine == pytest.approx(cosine, rel=FLOAT64_SUM * 100)
        changed = tensor.name in ("0.weight", "3.experts")
        assert (tensor.relative_l2 > 0) == changed
        assert tensor.formats[1] == (precision if changed else tensor.formats[0])
    assert found.left_out == [("2.weight", "only in converted")]
    stored = vramkit.load_file("converted/model.safetensors")
    assert found.bytes == sum(t.nbytes for t in stored.values())
    by_name = {t.name: t for t in found.tensors}
    parts = [t.nbytes for name, t in stored.items() if name.startswith("3.experts_")]
    assert by_name["3.experts"].bytes == (4 * 48 * 96 * 4, sum(parts))
    # The same from memory, where the tied weight has both names on both sides.
    live = compare_weights(workplace.build(), model)
    assert {t.name: t.relative_l2 for t in live.tensors if t.name != "2.weight"} == {
        t.name: t.relative_l2 for t in found.tensors
    }
    assert not live.left_out
    assert compare_weights(model, "converted").identical
    largest = max(error for error, _ in expected.values())
    assert found.worst(1)[0].relative_l2 == pytest.approx(largest, rel=FLOAT64_SUM * 100)
    assert "tensors" in str(found)


def test_prefixes_and_what_differs(tmp_path: Path) -> None:
    a = {"bert.x.weight": torch.randn(4, 5), "bert.y": torch.ones(3), "head": torch.ones(2)}
    b = {"x.weight": a["bert.x.weight"].clone(), "y": torch.ones(4), "z": torch.ones(1)}
    for first, second in ((a, b), (b, a)):
        save_file(first, tmp_path / "a.safetensors")
        save_file(second, tmp_path / "b.safetensors")
        found = compare_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        assert [t.relative_l2 for t in found.tensors] == [0.0]
        reasons = sorted(reason.split()[0] for _, reason in found.left_out)
        assert reasons == ["only", "only", "the"]
        assert not found.identical


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    a = {"x": torch.ones(4), "y": torch.zeros(3), "n": torch.arange(3), "e": torch.zeros(0)}
    save_file(a, tmp_path / "a.safetensors")
    save_file(a | {"x": torch.tensor([1, math.nan, 1, 1])}, tmp_path / "b.safetensors")
    found = compare_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    errors = {t.name: (t.relative_l2, t.cosine) for t in found.tensors}
    same = (0.0, 1.0)
    assert errors == {"x": (math.inf, 0.0), "y": same, "n": same, "e": same}
    assert (found.relative_l2, found.cosine, found.max_error) == (math.inf, 0.0, math.inf)
    assert found.to_dict()["relative_l2"] is None
    save_file(a | {"y": torch.ones(3)}, tmp_path / "b.safetensors")
    found = compare_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [t.relative_l2 for t in found.tensors if t.name == "y"] == [math.inf]
    assert found.relative_l2 == pytest.approx(math.sqrt(3 / (4 + 5)), rel=FLOAT64_SUM)


def test_codes_of_another_library_are_not_numbers(tmp_path: Path) -> None:
    weights = {"l.weight": torch.zeros(8, 1, dtype=torch.uint8), "l.weight.absmax": torch.ones(2),
               "l.weight.quant_map": torch.ones(16), "n.weight": torch.ones(3)}  # fmt: skip
    save_file(weights, tmp_path / "a.safetensors")
    found = compare_weights(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert [name for name, _ in found.left_out] == ["l.weight"]


def test_models_from_the_command_line(workplace: Any) -> None:
    vramkit.save(workplace.build(), "plain")
    model = workplace.build()
    vramkit.convert(model, "int8")
    vramkit.save(model, "converted")
    found = run("plain", "converted", "--report", "page.html")
    assert found["kind"] == "model"
    assert found["relative_l2"] == compare_weights("plain", "converted").relative_l2
    assert "outputs" not in found
    factory = ("--factory", "factory_for_compare:build")
    found = run("plain", "converted", *factory, "--inputs", "7x96", "--per-layer",
                "--report", "page.html")  # fmt: skip
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    expected = vramkit.compare(workplace.build().eval(), model.eval(), [(x,)])
    assert expected.relative_l2 > 0
    close = pytest.approx(expected.relative_l2, rel=reordered(96, expected.relative_l2))
    assert found["outputs"]["relative_l2"] == close
    assert {layer["name"] for layer in found["outputs"]["layers"]} >= {"0", "1"}
    page = Path("page.html").read_text()
    assert "Tensors that differ most" in page
    assert "0.weight" in page
    assert "http" not in page.replace("http-equiv", "")
    save_file({"input": x}, "batch.safetensors")
    same = run("factory_for_compare:build", "converted", *factory, "--batch", "batch.safetensors")
    assert same["outputs"]["relative_l2"] == close
    one = run("plain", "plain", *factory, "--inputs", "7x96")
    assert one["identical"]
    assert one["outputs"]["relative_l2"] == 0.0


def test_tokens_stay_below_the_vocabulary(workplace: Any) -> None:
    source = "factory_for_compare:words"
    found = run(source, source, "--inputs", "4x9:int64", "--seed", "3")
    assert found["outputs"]["inputs"] == ["an input: random integers below 50"]
    assert found["outputs"]["relative_l2"] == 0.0


# --- sounds and images ---------------------------------------------------------------------------


def write_wav(path: str, samples: torch.Tensor, rate: int = 16000) -> None:
    whole = (samples * 32767).round().to(torch.int16)
    with wave.open(path, "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(whole.t().contiguous().numpy().tobytes())


def test_sounds_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = 0.2 * torch.randn(2, 20000).clamp(-4, 4)
    write_wav("a.wav", base)
    write_wav("b.wav", torch.cat([torch.zeros(2, 160), base], dim=1))
    found = run("a.wav", "b.wav", "--report", "page.html")
    assert found["kind"] == "sound"
    assert (found["snr_db"], found["lag_samples"], found["aligned_samples"]) == (None, 160, 20000)
    assert found["aligned_snr_db"] is None  # infinite: the same samples
    assert found["aligned_log_spectral_distance_db"] == 0.0
    page = Path("page.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("data:image/png") == 2
    assert "http" not in page.replace("http-equiv", "")
    write_wav("c.wav", base * 0.9)
    found = run("a.wav", "c.wav")
    # 0.9 of it, and 16-bit rounding, which lies far lower.
    assert found["snr_db"] == pytest.approx(20, abs=0.01)
    assert run("a.wav", "a.wav")["identical"]
    late = run("a.wav", "b.wav", "--max-lag", "0.001")
    assert abs(late["lag_samples"]) <= 16
    write_wav("d.wav", base, 22050)
    assert "sample rates differ" in run("a.wav", "d.wav", code=EXIT_ERROR)["error"]
    write_wav("e.wav", base[:1])
    assert "1 channels" in run("a.wav", "e.wav", code=EXIT_ERROR)["error"]
    write_wav("silent.wav", torch.zeros(2, 20000))
    from scipy.io import wavfile

    wavfile.write("nan.wav", 16000, np.full((20000, 2), np.nan, "f4"))
    assert "NaN or infinity" in run("a.wav", "nan.wav", code=EXIT_ERROR)["error"]
    assert "largest lag" in run("a.wav", "a.wav", "--max-lag", "-1", code=EXIT_ERROR)["error"]
    found = run("a.wav", "silent.wav", "--report", "page.html")
    assert (found["snr_db"], found["level_db"]) == (0.0, None)


def test_images_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 250, (31, 47, 3), dtype="u1")
    image.fromarray(pixels).save("a.png")
    image.fromarray(pixels + 4).save("b.png")
    found = run("a.png", "b.png", "--report", "page.html")
    assert found["kind"] == "image"
    assert found["psnr_db"] == pytest.approx(20 * math.log10(255 / 4), rel=1e-12)
    assert 0.9 < found["ssim"] < 1
    assert found["different_fraction"] == 1.0
    page = Path("page.html").read_text()
    assert len(re.findall("data:image/png", page)) == 3
    assert run("a.png", "a.png")["identical"]
    image.fromarray(pixels[:20]).save("c.png")
    assert "to one size" in run("a.png", "c.png", code=EXIT_ERROR)["error"]
    large = np.zeros((5, 3000, 3), dtype="u1")
    image.fromarray(large).save("large.png")
    run("large.png", "large.png", "--report", "page.html")
    assert len(Path("page.html").read_text()) < 40_000


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"\x89PNG....")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in run("a.png", "a.png", code=EXIT_ERROR)["error"]


def test_what_is_refused(workplace: Any) -> None:
    save_file({"x": torch.ones(3)}, "a.safetensors")
    save_file({"y": torch.ones(3)}, "b.safetensors")
    write_wav("a.wav", torch.zeros(1, 10))
    Path("a.txt").write_text("text")
    Path("folder").mkdir()
    cases = {
        ("a.safetensors", "b.safetensors"): "no tensor of one name and shape",
        ("a.safetensors", "nowhere"): "nothing at 'nowhere'",
        ("a.safetensors", "a.wav"): "is a model and a.wav is a sound",
        ("a.txt", "a.txt"): "no image",
        ("folder", "a.safetensors"): "no safetensors file",
        ("no_module:build", "a.safetensors"): "cannot find",
    }
    for arguments, text in cases.items():
        assert text in run(*arguments, code=EXIT_ERROR)["error"]
    found = run("a.safetensors", "a.safetensors", "--inputs", "3", code=EXIT_ERROR)
    assert "--factory" in found["error"]
    for arguments in (("a.wav", "a.wav", "--inputs", "3"),
                      ("a.safetensors", "a.safetensors", "--per-layer"),
                      ("a.safetensors",) * 2 + ("--inputs", "3", "--batch", "a.wav")):  # fmt: skip
        done = CliRunner().invoke(main, ["compare", *arguments])
        assert done.exit_code == 2, done.output


def test_a_damaged_folder_is_an_error(workplace: Any) -> None:
    model = workplace.build()
    vramkit.convert(model, "int4")
    vramkit.save(model, "converted")
    manifest = json.loads(Path("converted/vramkit.json").read_text())
    for change, text in (({"shape": [96, 90]}, "has codes and scales"), (None, "lack its codes")):
        changed = json.loads(json.dumps(manifest))
        if change is None:
            changed["layers"]["missing"] = changed["layers"]["0"]
        else:
            changed["layers"]["0"] |= change
        Path("converted/vramkit.json").write_text(json.dumps(changed))
        with pytest.raises((vramkit.CheckpointError, ValueError), match=text):
            compare_weights("converted", "converted")
