"""The streaming video model: trained on moving digits, run in every precision, and measured."""

from __future__ import annotations

import copy
import json
import math
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numerics
import pytest
import torch
import vramkit
from click.testing import CliRunner
from vramkit.cli import main
from vramkit.cli_common import EXIT_ERROR
from vramkit.errors import PrecisionUnavailableError
from vramkit.training import (
    LSD,
    MixedPrecisionLSD,
    benchmark_model_precision,
    drift,
    generate_week1_report,
    get_optimal_precision,
    true_scale,
    week1_final_benchmark,
)
from vramkit.training import suite as measured
from vramkit.training.report import frames_png, loss_chart

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50  # of training: about 11 s on one core


@pytest.fixture(scope="module")
def digits() -> Any:
    """benchmarks.lsd_digits: the world of moving digits."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import lsd_digits
    finally:
        sys.path.remove(str(ROOT))
    return lsd_digits


@pytest.fixture(scope="module")
def trained(digits: Any) -> tuple[LSD, list[float]]:
    torch.manual_seed(0)
    model = digits.model()
    losses = digits.train(model, digits.load()[0], steps=STEPS)
    return model, losses


@pytest.fixture(scope="module")
def plain() -> LSD:
    torch.manual_seed(0)
    return LSD(16)


@pytest.fixture(scope="module")
def video() -> MixedPrecisionLSD:
    torch.manual_seed(0)
    return MixedPrecisionLSD(16, "fp32", device="cpu")


@pytest.fixture
def frame() -> torch.Tensor:
    return torch.rand(2, 3, 16, 32)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class TestModel:
    def test_the_published_size(self) -> None:
        with torch.device("meta"):
            model = LSD(192)
        assert sum(p.numel() for p in model.parameters()) == 880_258_653
        # 3,358 MiB with the running statistics, as the document has it.
        assert round(sum(p.numel() * 4 for p in model.parameters()) / 2**20) == 3358

    @pytest.mark.parametrize("width", [0, -16, 8, 24])
    def test_bad_widths(self, width: int) -> None:
        with pytest.raises(ValueError, match=f"positive multiple of 16.*not {width}"):
            MixedPrecisionLSD(width, "fp32", device="cpu")

    def test_next_frames_are_learned(self, trained: tuple[LSD, list[float]], digits: Any) -> None:
        """Held-out digits: half the error of copying, and they can be read."""
        seen, held_out = digits.load()
        found = digits.judge(trained[0], held_out, seen)
        assert found.error < found.copied / 2
        assert found.readable > 0.8
        # Guessing names a tenth rightly; seeds reach 0.49 to 0.66 of 0.85 in 50 steps.
        assert found.recognized > 0.4 * found.readable
        assert trained[1][-1] < trained[1][0] / 3

    def test_videos_are_learned(self, trained: tuple[LSD, list[float]], digits: Any) -> None:
        """The first frames of its own; a longer training, in the benchmark, holds them longer."""
        _, held_out = digits.load()
        pictures = held_out.pictures[:32]
        count = 3
        steps = digits.timesteps(count)
        x = digits.still(pictures)
        video = MixedPrecisionLSD(16, "fp32", device="cpu", model=copy.deepcopy(trained[0]))
        made, _ = video.generate_sequence(x, x, count, timesteps=steps)
        for index, step in enumerate(steps):
            true = digits.frames(pictures, torch.full((32,), int(step)))
            before = digits.frames(pictures, torch.full((32,), int(step) - 1))
            error = float((made[:, index] - true).square().mean())
            assert error < float((before - true).square().mean()) / 2


class TestPrecisions:
    def test_fp32_is_the_model(self, plain: LSD, frame: torch.Tensor) -> None:
        before = torch.rand_like(frame)
        video = MixedPrecisionLSD(16, "fp32", device="cpu", model=copy.deepcopy(plain))
        with torch.inference_mode():
            expected = plain.eval()(frame, 7.0, before)
            found = video(frame, 7.0, before)
        # Channels-last convolutions sum in another order, in 26 layers one after another.
        assert relative(found, expected) < numerics.gamma(1e3)
        assert video.state_dict().keys() == plain.state_dict().keys()
        assert video.dtype == torch.float32

    @pytest.mark.parametrize(
        ("precision", "share", "error"),
        [("bf16", 0.51, 2**-4), ("fp16", 0.51, 2**-7), ("fp8", 0.26, 0.2), ("int8", 0.26, 2**-4)],
    )
    def test_bytes_and_errors(
        self, trained: tuple[LSD, list[float]], digits: Any, precision: str, share: float,
        error: float,
    ) -> None:  # fmt: skip
        """What is saved is really saved; frames stay near float32's."""
        x = digits.still(digits.load()[1].pictures[:8])
        with torch.inference_mode():
            expected = trained[0](x, 3.0, x)
        video = MixedPrecisionLSD(16, precision, device="cpu", model=copy.deepcopy(trained[0]))
        frames, stats = video.generate_sequence(x, x, 1, timesteps=[3.0])
        whole = sum(t.numel() * t.element_size() for t in trained[0].state_dict().values())
        assert video.parameter_bytes() < share * whole
        assert stats["peak_memory_bytes"] > video.parameter_bytes()
        assert stats["precision"] == precision
        assert frames.dtype == video.dtype
        assert relative(frames[:, 0], expected) < error
        if precision in ("fp8", "int8"):
            assert video.conversion is not None
            assert video.conversion.coverage_bytes_fraction > 0.99
            formats = {layer.format for layer in vramkit.describe(video) if layer.kind == "Conv2d"}
            assert precision in formats

    def test_auto(self) -> None:
        assert MixedPrecisionLSD(16, "auto", device="cpu").precision == "fp32"
        if not torch.cuda.is_available():
            assert MixedPrecisionLSD(16).precision == get_optimal_precision() == "fp32"

    @pytest.mark.parametrize("bad", ["int4", "nf4", "double", ""])
    def test_unknown_precisions(self, plain: LSD, bad: str) -> None:
        kept = {k: v.clone() for k, v in plain.state_dict().items()}
        plain.train()
        with pytest.raises(ValueError, match=r"auto, fp32|the precisions are"):
            MixedPrecisionLSD(16, bad, device="cpu", model=plain)
        assert plain.training
        assert all(torch.equal(v, kept[k]) for k, v in plain.state_dict().items())

    def test_what_the_device_has_not(self, plain: LSD, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(PrecisionUnavailableError, match="no cuda:63"):
            MixedPrecisionLSD(16, "fp32", device="cuda:63", model=plain)
        with pytest.raises(PrecisionUnavailableError, match="'cpu' or 'cuda'"):
            MixedPrecisionLSD(16, "fp32", device="meta", model=plain)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for capability, precision in (((7, 5), "bf16"), ((7, 0), "fp8"), ((6, 1), "int8")):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None, c=capability: c)
            with pytest.raises(PrecisionUnavailableError, match="use fp16"):
                MixedPrecisionLSD(16, precision, device="cuda", model=plain)
        assert next(plain.parameters()).dtype == torch.float32

    def test_fp16_that_overflows(self, plain: LSD, frame: torch.Tensor) -> None:
        model = copy.deepcopy(plain)
        with torch.no_grad():
            model.unets[0].out.weight.mul_(1e5)
            model.unets[0].out.bias.fill_(6e4)
            model.unets[1].down[0][0][0].weight.mul_(100)
        video = MixedPrecisionLSD(16, "fp16", device="cpu", model=model)
        with pytest.warns(RuntimeWarning, match="overflowed in float16"):
            frames, stats = video.generate_sequence(frame, num_timesteps=2)
        assert stats["precision"] == "bf16"
        assert frames.dtype == torch.bfloat16
        assert bool(torch.isfinite(frames).all())
        assert video.fallbacks


class TestSequences:
    def test_as_published(self, video: MixedPrecisionLSD, frame: torch.Tensor) -> None:
        """x stays, each frame is the next one's previous, time steps count down by 10."""
        frames, stats = video.generate_sequence(frame, None, 3)
        before = None
        with torch.inference_mode():
            for index, step in enumerate((20.0, 10.0, 0.0)):
                before = video(frame, step, before)
                assert torch.equal(frames[:, index], before)
        assert frames.shape == (2, 3, *frame.shape[1:])
        assert stats["total_time"] > 0
        assert stats["fps"] == pytest.approx(3 / stats["total_time"])
        assert stats["time_per_frame"] == pytest.approx(stats["total_time"] / 3)
        assert stats["peak_memory"] == stats["peak_memory_bytes"] / 2**20
        assert len(stats["frame_seconds"]) == 3
        assert sum(stats["frame_seconds"]) <= stats["total_time"]

    def test_following(self, video: MixedPrecisionLSD, frame: torch.Tensor) -> None:
        previous = torch.rand_like(frame)
        frames, _ = video.generate_sequence(frame, previous, 2, timesteps=[5, 6], follow=True)
        with torch.inference_mode():
            first = video(frame, 5.0, previous)
            assert torch.equal(frames[:, 0], first)
            assert torch.equal(frames[:, 1], video(first, 6.0, frame))

    def test_time_steps_begin_again(self, video: MixedPrecisionLSD) -> None:
        seen: list[float] = []
        kept = video.model.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
        try:
            video.generate_sequence(torch.rand(1, 3, 16, 16), num_timesteps=12)
        finally:
            kept.remove()
        assert seen[-12:] == [10.0, 0.0, *(float(t) for t in range(90, -1, -10))]

    def test_a_step_for_each_sample(self, video: MixedPrecisionLSD, frame: torch.Tensor) -> None:
        with torch.inference_mode():
            both = video(frame, torch.tensor([3.0, 40.0]))
            one = video(frame[1:], 40.0)
        assert relative(both[1:], one) < numerics.gamma(1e3)

    @pytest.mark.parametrize("size", [(15, 16), (16, 17), (8, 8), (0, 16)])
    def test_odd_sizes(self, video: MixedPrecisionLSD, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="multiples of 16"):
            video.generate_sequence(torch.rand(1, 3, *size), num_timesteps=2)

    def test_other_bad_input(self, video: MixedPrecisionLSD, frame: torch.Tensor) -> None:
        kept = {k: v.clone() for k, v in video.state_dict().items()}
        for call, text in (
            (lambda: video.generate_sequence(frame, num_timesteps=0), "1 or more"),
            (lambda: video.generate_sequence(frame, num_timesteps=2, timesteps=[1]), "as many"),
            (lambda: video(frame[:, :2], 0), "a frame is"),
            (lambda: video(frame[0], 0), "a frame is"),
            (lambda: video(frame, 0, frame[:1]), "previous_frame has"),
            (lambda: video(frame, torch.zeros(3)), "one per sample"),
            (lambda: video(frame.to("meta"), 0), "x is on meta"),
        ):
            with pytest.raises(ValueError, match=text):
                call()
        with pytest.raises(TypeError, match="float32"):
            MixedPrecisionLSD(16, "fp16", device="cpu", model=LSD(16).half())
        assert all(torch.equal(v, kept[k]) for k, v in video.state_dict().items())

    def test_long_videos_do_not_drift(self, trained: tuple[LSD, list[float]], digits: Any) -> None:
        """24 frames in fp16: statistics within 2 % of float32's. The benchmark makes 1,000."""
        x = digits.still(digits.load()[1].pictures[:1])
        count = 24
        made = []
        for name in ("fp32", "fp16"):
            video = MixedPrecisionLSD(16, name, device="cpu", model=copy.deepcopy(trained[0]))
            frames, _ = video.generate_sequence(x, x, count, timesteps=digits.timesteps(count))
            made.append(frames[0].float())
            assert bool(torch.isfinite(made[-1]).all())
        assert drift(made[1], made[0]) < 0.02
        # It moves still: the last period is no single picture.
        tail = made[0][-digits.PERIOD :]
        assert float(tail.std(0).mean()) > 0.01

    def test_memory_is_flat(self, video: MixedPrecisionLSD) -> None:
        """A stream keeps no frames: what torch holds does not grow with their number."""
        from vramkit.measure import PeakWatch

        peaks = []
        x = torch.rand(1, 3, 16, 16)
        for count in (2, 12):
            watch = PeakWatch()
            watch.start()
            for _ in video.stream(x, timesteps=[0.0] * count):
                pass
            peaks.append(watch.stop())
        # The last frame and the one in the making.
        assert peaks[1] - peaks[0] <= 2 * x.numel() * 4


class TestSuite:
    def test_rows(self, trained: tuple[LSD, list[float]], digits: Any, tmp_path: Path) -> None:
        x = digits.still(digits.load()[1].pictures[:1])
        results = week1_final_benchmark(
            ["tiny"], ["int8", "fp32"], device="cpu", folder=tmp_path / "out",
            models={"tiny": trained[0]}, inputs=(x, x), num_timesteps=3,
            timesteps=digits.timesteps(3), repeats=2, warmup=0, estimated=False,
        )  # fmt: skip
        assert list(results) == [("fp32", "tiny"), ("int8", "tiny")]
        plain, small = results["fp32", "tiny"], results["int8", "tiny"]
        assert plain.relative_error == plain.drift == 0.0
        assert 0 < small.relative_error < 0.1
        assert small.weights_bytes < 0.26 * plain.weights_bytes
        assert small.peak_bytes < plain.peak_bytes
        assert plain.parameters == sum(p.numel() for p in trained[0].parameters())
        assert len(plain.seconds) == 2
        assert plain.fps == pytest.approx(1 / plain.seconds_per_frame)
        data = json.loads((tmp_path / "out" / "week1.json").read_text())
        assert [row["asked"] for row in data["rows"]] == ["fp32", "int8"]
        assert data["rows"][1]["weights_bytes"] == small.weights_bytes
        html = (tmp_path / "out" / "week1.html").read_text()
        assert html.count("data:image/png;base64,") == 1
        assert "<script" not in html
        text = (tmp_path / "out" / "week1.md").read_text()
        assert "| tiny | int8 |" in text
        assert "(frames_tiny.png)" in text
        assert (tmp_path / "out" / "frames_tiny.png").stat().st_size > 100

    def test_the_estimate(self) -> None:
        row = benchmark_model_precision("tiny", "fp32", device="cpu", num_timesteps=1, repeats=1)
        assert row.peak_bytes is not None
        # Measured are the frames kept too: one here.
        assert row.estimated_bytes == pytest.approx(row.peak_bytes, rel=0.05)
        assert max(live for _, live in row.timeline) <= row.estimated_bytes

    def test_no_room_is_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measured, "available_memory", lambda: 1 << 30)
        results = week1_final_benchmark(["medium"], ["fp32"], device="cpu")
        row = results["fp32", "medium"]
        assert row.failed
        assert "out of memory" in str(row.error)
        assert row.needed_bytes == row.fp32_bytes > 3 << 30
        report = generate_week1_report(results)
        assert "out of memory" in report.html()
        assert "out of memory" in report.markdown()

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        ],
    )
    def test_running_out_on_the_way(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(MixedPrecisionLSD, "generate_sequence", fail)
        row = benchmark_model_precision("tiny", "fp32", device="cpu")
        assert str(row.error).startswith("out of memory")

    def test_other_errors_are_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("something else")

        monkeypatch.setattr(MixedPrecisionLSD, "generate_sequence", fail)
        with pytest.raises(RuntimeError, match="something else"):
            benchmark_model_precision("tiny", "fp32", device="cpu")

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="tiny, small, lightweight, medium, heavy"):
            benchmark_model_precision("huge", "fp32")
        with pytest.raises(ValueError, match="repeats"):
            benchmark_model_precision("tiny", "fp32", repeats=0)
        with pytest.raises(ValueError, match="the precisions are"):
            benchmark_model_precision("tiny", "fp33", device="cpu")
        with pytest.raises(ValueError, match="no results"):
            generate_week1_report({})
        row = benchmark_model_precision("tiny", "fp32", device="cuda:63")
        assert "no cuda:63" in str(row.error)

    def test_drift(self) -> None:
        torch.manual_seed(0)
        a = torch.randn(3, 3, 4, 4)
        assert drift(a, a) == 0.0
        assert drift(a * 1.5, a) == pytest.approx(0.5, rel=0.5)
        assert drift(a + 0.3 * a[1].std(correction=0), a) > 0.2
        a[1, 0, 0, 0] = math.nan
        assert drift(a, torch.randn(3, 3, 4, 4)) == math.inf

    def test_true_scale(self) -> None:
        """The documented peaks are two models, and two score matrices; the rest is the frame's."""
        rows = {row.mode: row for row in true_scale(modes=["fp32"])}
        plain = rows["fp32"]
        with torch.device("meta"):
            model = LSD(192)
        whole = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        assert plain.weights_bytes == whole
        assert plain.peak_bytes < 0.32 * plain.documented_bytes
        scores = 2 * 2 * 16 * 4096**2 * 4
        rest = plain.documented_bytes - 2 * whole - scores
        assert rest > 0
        assert rest == pytest.approx(plain.activations_bytes, rel=0.05)

    def test_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        arguments = ["bench", "lsd", "--sizes", "tiny", "--precisions", "fp32,fp16", "--frames",
                     "2", "--repeats", "1", "--warmup", "0", "--no-estimate", "--device", "cpu",
                     "--report", "out", "--json", "-"]  # fmt: skip
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        data = json.loads(done.stdout)
        assert [row["precision"] for row in data["rows"]] == ["fp32", "fp16"]
        assert (tmp_path / "out" / "week1.html").exists()
        for bad in (["--sizes", "huge"], ["--precisions", "fp64"], ["--sizes", ","]):
            done = CliRunner().invoke(main, ["bench", "lsd", *bad])
            assert done.exit_code == EXIT_ERROR
            assert "tiny" in done.output or "fp32" in done.output


class TestPictures:
    def test_a_png(self) -> None:
        """Read back by hand: signature, sizes, check sums, and the pixels themselves."""
        video = torch.zeros(2, 3, 16, 16)
        video[0, :, 0, 0], video[1, 1] = 1.0, 0.5
        other = video.clone()
        other[0, 0, 3, 3] = math.nan
        data = frames_png([video, other], zoom=2)
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        position, chunks = 8, {}
        while position < len(data):
            length, kind = struct.unpack(">I4s", data[position : position + 8])
            body = data[position + 8 : position + 8 + length]
            check = struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0]
            assert check == zlib.crc32(kind + body)
            chunks[kind] = body
            position += 12 + length
        width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
        assert (width, height) == (2 * 33, 2 * 33)
        raw = zlib.decompress(chunks[b"IDAT"])
        lines = [raw[i * (1 + 3 * width) + 1 : (i + 1) * (1 + 3 * width)] for i in range(height)]
        assert lines[0][:6] == b"\xff" * 6
        assert lines[0][6:9] == b"\0\0\0"
        assert lines[0][3 * 33 : 3 * 34] == bytes([0, 128, 0])
        assert lines[33 + 6][18:21] == b"\xff\0\0"
        with pytest.raises(ValueError, match="no frames"):
            frames_png([])

    def test_loss_curves(self) -> None:
        chart = loss_chart({"fp32": [1.0, 0.1, 0.01], "<b>": [1.0, math.nan, 0.1]})
        assert chart.count('<path class="line') == 2
        assert "1 not finite" in chart
        assert "<b>" not in chart
        # Logarithmic: the middle of 1 and 0.01 is 0.1.
        assert "L500.0 110.0" in chart
        assert "linear" in loss_chart({"a": [1.0, -1.0]})
        assert "No loss" in loss_chart({"a": [math.nan]})


def test_the_package_exports() -> None:
    import vramkit.training as training

    for name in training.__all__:
        assert getattr(training, name) is not None
