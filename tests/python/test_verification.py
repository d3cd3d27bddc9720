"""Real runs beside estimates: what they measured is kept, used by the same call, and said."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import vramkit
from torch import Tensor, nn
from vramkit.measure import profiled_peak
from vramkit.verification import KEPT, Measured


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vramkit" / "measured"


def mlp(width: int = 96) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64)).eval()


class Hidden(nn.Module):
    """Holds memory that no trace of shapes sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if type(x) is Tensor:  # fake tensors are of another class
            held = torch.empty(5000, dtype=torch.float32)
            y = y + held.numel() * 0
        return y


def test_a_run_that_was_predicted() -> None:
    model, x = mlp(), torch.randn(8, 64)
    found = vramkit.verify(model, x)
    with torch.inference_mode():
        real = profiled_peak(model, (x,), {})
    assert found.measured_bytes == real == found.predicted_bytes
    assert found.ratio == 1.0
    assert found.within
    assert found.kept
    assert found.seconds is not None
    assert "within the interval" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["ratio"] == 1.0


def test_what_was_measured_is_used_by_the_same_call_and_said() -> None:
    model, x = Hidden().eval(), torch.randn(8, 64)
    before = vramkit.estimate(model, None, x)
    assert before.calibrated is None
    assert before.interval_bytes == (before.peak_bytes, before.peak_bytes)
    found = vramkit.verify(model, x)
    assert found.measured_bytes >= 20000 > found.predicted_bytes == before.activations_bytes
    assert not found.within
    assert "outside the interval" in str(found)
    after = vramkit.estimate(model, None, (8, 64))  # shapes name the same call
    assert after.activations_bytes == found.measured_bytes
    assert after.predicted_bytes == before.activations_bytes
    assert after.calibrated is not None
    assert after.calibrated.device.startswith("CPU")
    assert after.interval_bytes == (after.peak_bytes, after.peak_bytes)
    assert any("real run" in note and "calibrated=False" in note for note in after.notes)
    assert "real runs" in after.interval_from
    assert after.to_dict()["calibrated"]["most_bytes"] == found.measured_bytes
    plain = vramkit.estimate(model, None, x, calibrated=False)
    assert plain.activations_bytes == before.activations_bytes
    assert plain.calibrated is None


@pytest.mark.parametrize("other", ["shape", "format", "width", "mode", "version", "threads"])
def test_other_calls_do_not_use_it(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(), torch.randn(8, 64)
    made = vramkit.estimate(model, None, x)
    vramkit.keep_measurement(made, 12345)
    assert vramkit.estimate(model, None, x).activations_bytes == 12345
    shape: Any = (8, 64)
    precision = None
    if other == "shape":
        shape = (9, 64)
    elif other == "format":
        precision = "nf4"
    elif other == "width":
        model = mlp(97)
    elif other == "mode":
        model.train()
    elif other == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    else:
        monkeypatch.setattr(torch, "__version__", "2.0.0")
    found = vramkit.estimate(model, precision, shape)
    assert found.identity != made.identity
    assert found.calibrated is None


def test_a_plain_model_and_its_conversion_are_the_same_call() -> None:
    model, x = mlp(256), torch.randn(8, 64)
    before = vramkit.estimate(model, "int8", x)
    vramkit.convert(model, "int8")
    assert vramkit.estimate(model, None, x).identity == before.identity


def test_another_prediction_is_not_corrected_by_it() -> None:
    """Of the same shapes, but with other options: the difference is not known to be the same."""
    model, x = mlp(), torch.randn(8, 64)
    vramkit.keep_measurement(vramkit.estimate(model, None, x), 12345)
    found = vramkit.estimate(model, None, x, output_kept=False)
    assert found.calibrated is None
    lstm = nn.LSTM(16, 32)
    probed = vramkit.estimate(lstm, None, (4, 2, 16))
    ruled = vramkit.estimate(lstm, None, (4, 2, 16), probe=False, calibrated=False)
    assert probed.activations_bytes != ruled.activations_bytes
    vramkit.keep_measurement(probed, 54321)
    found = vramkit.estimate(lstm, None, (4, 2, 16), probe=False)
    assert found.activations_bytes == ruled.activations_bytes
    assert any("so it was not used" in note for note in found.notes)


def test_of_several_runs_the_most_counts_and_both_ends_are_kept(cache: Path) -> None:
    model = mlp()
    made = vramkit.estimate(model, None, (8, 64))
    for size in (7000, 9000, 8000, 8000):
        assert vramkit.keep_measurement(made, size).kept
    found = vramkit.estimate(model, None, (8, 64))
    assert found.activations_bytes == 9000
    assert found.activations_interval_bytes == (7000, 9000)
    assert len(list(cache.iterdir())) == 3
    for size in range(3 * KEPT):
        vramkit.keep_measurement(made, size)
    assert len(list(cache.iterdir())) == KEPT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": "vramkit.measured/0"}',
        '{"schema": "vramkit.measured/1", "identity": "?"}',
        "NEGATIVE",
        "\x00\xff",
    ],
)
def test_damaged_files_are_said_and_not_used(cache: Path, text: str) -> None:
    model = mlp()
    made = vramkit.estimate(model, None, (8, 64))
    vramkit.keep_measurement(made, 12345)
    (path,) = cache.iterdir()
    if text == "NEGATIVE":
        text = path.read_text().replace("12345", "-12345")
    path.write_bytes(text.encode("latin-1"))
    found = vramkit.estimate(model, None, (8, 64))
    assert found.calibrated is None
    assert found.activations_bytes == made.activations_bytes
    assert any(str(path) in note and "not used" in note for note in found.notes)


def test_several_writers_at_once() -> None:
    made = vramkit.estimate(mlp(), None, (8, 64))
    sizes = range(1000, 1000 + KEPT)

    def keep(size: int) -> bool:
        return vramkit.keep_measurement(made, size).kept and bool(Measured(made.identity).runs())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(keep, [*sizes, *sizes]))
    kept = Measured(made.identity)
    assert sorted(run["measured_bytes"] for run in kept.runs()) == list(sizes)
    assert not kept.notes
    assert len(list(kept.folder.iterdir())) == KEPT  # no file in the making is left


def test_a_folder_that_cannot_be_written(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    found = vramkit.verify(mlp(), torch.randn(8, 64))
    assert not found.kept
    assert "not kept" in str(found)
    assert not vramkit.verify(mlp(), torch.randn(8, 64), keep=False).notes


def test_what_cannot_be_verified() -> None:
    with pytest.raises(ValueError, match="real inputs"):
        vramkit.verify(mlp(), (8, 64))
    with pytest.raises(ValueError, match="meta device"):
        vramkit.verify(mlp().to("meta"), torch.randn(8, 64))
    with pytest.raises(ValueError, match=r"give\s+estimate\(inputs"):
        vramkit.keep_measurement(vramkit.estimate(mlp()), 5)
    made = vramkit.estimate(mlp(), None, (8, 64))
    for bad in (-1, 1.5, True, "5"):
        with pytest.raises(ValueError, match="whole number"):
            vramkit.keep_measurement(made, bad)
