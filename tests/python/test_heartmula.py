"""HeartMuLa: the model against transformers' Llama, caches, loading by config, files, profiles."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vramkit
from click.testing import CliRunner
from vramkit.cli import main as cli
from vramkit.errors import BudgetError, PrecisionConfigError
from vramkit.heartmula import (
    HeartMuLa,
    HeartMuLaConfig,
    HeartMuLaGenPipeline,
    KVCache,
    profile,
    write_small,
)
from vramkit.heartmula.model import FLAVORS, cache_bytes
from vramkit.heartmula.profiles import codec_bytes, model_bytes
from vramkit.heartmula.small import MODEL
from vramkit.optimize_fp8 import main as optimize

pytest.importorskip("tokenizers")
SONG = {"lyrics": "[verse]\nla la la", "tags": "pop,happy"}
SHORT: dict[str, Any] = {"max_audio_length_ms": 400, "seed": 3, "codec_steps": 2}
BOOKS = MODEL.audio_num_codebooks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_small(tmp_path_factory.mktemp("ckpt"))


def load(folder: Path, **options: Any) -> HeartMuLaGenPipeline:
    return HeartMuLaGenPipeline.from_pretrained(folder, version="3B", **options)


def formats(pipe: HeartMuLaGenPipeline) -> dict[str, int]:
    found: dict[str, int] = {}
    with pipe.parts.lease("mula") as mula:
        for module in mula.modules():
            if isinstance(module, vramkit.QuantizedLayer):
                for name in module.stored_names:
                    key = module.stored_parameter(name).fmt.name
                    found[key] = found.get(key, 0) + 1
    return found


def test_backbone_is_transformers_llama() -> None:
    """Same weights, but for the order of the rotary pairs: torchtune's lie side by side."""
    transformers = pytest.importorskip("transformers")
    flavor = FLAVORS["small"]
    model = HeartMuLa(MODEL).eval()
    config = transformers.LlamaConfig(
        hidden_size=flavor.dim,
        intermediate_size=flavor.hidden,
        num_hidden_layers=flavor.layers,
        num_attention_heads=flavor.heads,
        num_key_value_heads=flavor.kv_heads,
        rms_norm_eps=1e-5,
        vocab_size=8,
        max_position_embeddings=262144,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    llama = transformers.LlamaModel(config).eval()

    def halves(weight: torch.Tensor) -> torch.Tensor:
        rows = weight.unflatten(0, (-1, flavor.head_dim // 2, 2))
        return rows.transpose(1, 2).flatten(0, 2)

    with torch.no_grad():
        for mine, theirs in zip(model.backbone.layers, llama.layers, strict=True):
            theirs.self_attn.q_proj.weight.copy_(halves(mine.attn.q_proj.weight))
            theirs.self_attn.k_proj.weight.copy_(halves(mine.attn.k_proj.weight))
            theirs.self_attn.v_proj.weight.copy_(mine.attn.v_proj.weight)
            theirs.self_attn.o_proj.weight.copy_(mine.attn.output_proj.weight)
            theirs.mlp.gate_proj.weight.copy_(mine.mlp.w1.weight)
            theirs.mlp.down_proj.weight.copy_(mine.mlp.w2.weight)
            theirs.mlp.up_proj.weight.copy_(mine.mlp.w3.weight)
        x = torch.randn(2, 300, flavor.dim)
        expected = llama(inputs_embeds=x).last_hidden_state
        torch.testing.assert_close(model.backbone(x), expected, rtol=1e-4, atol=1e-4)


def test_cached_steps_are_the_whole_pass() -> None:
    model = HeartMuLa(MODEL).eval()
    x = torch.randn(2, 12, 64)
    with torch.no_grad():
        whole = model.backbone(x)
        caches = model.make_caches(2, 12)
        steps = [model.backbone(x[:, :7], caches.backbone, 0)]
        for position in range(7, 12):
            step = x[:, position : position + 1]
            steps.append(model.backbone(step, caches.backbone, position))
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="the cache has 12 positions, and 13"):
            model.backbone(x[:, :1], caches.backbone, 12)


def test_eight_bit_cache() -> None:
    """Half the bytes, and each element within half a step of its head's scale."""
    cpu = torch.device("cpu")
    wide = KVCache(2, 4, 30, 64, torch.bfloat16, cpu)
    small = KVCache(2, 4, 30, 64, torch.bfloat16, cpu, bits=8)
    assert wide.nbytes == 2 * 2 * 4 * 30 * 64 * 2
    assert small.nbytes == 2 * 2 * 4 * 30 * (64 + 2)
    k, v = torch.randn(2, 2, 4, 30, 64)
    v[0, 0, 0] = 0
    for got, given in zip(small.append(k, v), (k, v), strict=True):
        # The scale is rounded to float16, 2^-11 of it, which 127 steps multiply.
        step = given.abs().amax(-1, keepdim=True) / 127 * (1 + 2.0**-11) + 2.0**-24
        assert ((got - given).abs() <= step * (0.5 + 127 * 2.0**-11) + 1e-7).all()
    assert small.append.__self__.filled == 30  # type: ignore[attr-defined]


def test_true_sizes() -> None:
    """3.94 B parameters, as published; a cache of 8192 positions is 1.75 GiB."""
    with torch.device("meta"):
        count = sum(p.numel() for p in HeartMuLa(HeartMuLaConfig()).parameters())
    assert count == pytest.approx(3.94e9, rel=0.002)
    assert model_bytes("bf16") == 2 * count
    assert model_bytes("int8") == pytest.approx(3.95e9, rel=0.01)
    assert model_bytes("nf4_dq") == pytest.approx(2.1e9, rel=0.05)
    assert codec_bytes() == pytest.approx(4 * 1.6e9, rel=0.05)
    assert cache_bytes(HeartMuLaConfig(), 8192) == 1.75 * 2**30


def test_profiles() -> None:
    found = {gb: profile(gb) for gb in (6, 8, 12)}
    chosen = {gb: (p.precision, p.codec_device, p.max_seconds) for gb, p in found.items()}
    assert chosen == {6: ("int8", "cpu", 30), 8: ("int8", "cuda", 60), 12: ("bf16", "cuda", 240)}
    for gb, p in found.items():
        assert p.peak_bytes <= gb * 2**30
        assert p.model_bytes == model_bytes(p.precision)
    assert profile(6, cache_bits=8).cache_bytes < found[6].cache_bytes
    with pytest.raises(BudgetError) as caught:
        profile(2)
    assert caught.value.needed_bytes > 2 * 2**30


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"load_in_8bit": True}, {"llm_int8", "int8"}),
        ({"load_in_8bit": True, "llm_int8_threshold": 4.0}, {"llm_int8@4.0", "int8"}),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.bfloat16,
            },
            {"nf4_dq"},
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"fp4"}),
    ],
)
def test_bnb_config(folder: Path, fields: dict[str, Any], expected: set[str]) -> None:
    """Every weight but norms, biases and the one-row embedding; audio_head and embeddings too."""
    configs = pytest.importorskip("transformers").BitsAndBytesConfig
    pipe = load(folder, bnb_config=configs(**fields))
    found = formats(pipe)
    linears = 7 * 3 + 3  # of three layers; the projection, the first head, muq_linear
    assert set(found) == expected
    assert sum(found.values()) == linears + 2 + 1
    assert pipe.mula.dtype is torch.bfloat16
    made = pipe(SONG, **SHORT)
    assert made.frames.shape[0] == BOOKS
    assert torch.isfinite(made.wav).all()
    with pipe.parts.lease("codec") as codec:
        assert codec.dtype is torch.float32
        assert not any(isinstance(m, vramkit.QuantizedLayer) for m in codec.modules())


def test_the_same_music_by_any_object_with_the_fields(folder: Path) -> None:
    fields = {"load_in_8bit": True, "llm_int8_threshold": 5.0}
    made = [load(folder, bnb_config=c)(SONG, **SHORT) for c in (fields, SimpleNamespace(**fields))]
    assert torch.equal(made[0].wav, made[1].wav)
    assert torch.equal(made[0].frames, made[1].frames)


def test_weights_are_those_of_the_plain_model(folder: Path) -> None:
    """Formats in the files' place: logits near the plain model's; codec weights folded exactly."""
    plain, small = load(folder), load(folder, precision="int8")
    tokens = torch.randint(0, 60, (1, 9, BOOKS + 1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        expected = plain.mula(tokens, mask).float()
        error = (small.mula(tokens, mask).float() - expected).norm() / expected.norm()
    assert 0 < error < 0.03
    with plain.parts.lease("mula") as a, small.parts.lease("mula") as b:
        head = b.audio_head.dense() if hasattr(b.audio_head, "dense") else b.audio_head[2]
        reference = a.audio_head if head.dim() == 3 else a.audio_head[2]
        assert (head.float() - reference.float()).abs().max() < reference.abs().max() / 100
    with plain.parts.lease("codec") as codec:
        assert not any("parametrizations" in name for name, _ in codec.named_modules())


def test_restore(folder: Path) -> None:
    pipe = load(folder, precision="int8")
    with pipe.parts.lease("mula") as mula:
        vramkit.restore(mula, "bf16")
        assert type(mula) is HeartMuLa
        assert isinstance(mula.audio_head, torch.nn.Parameter)
    assert formats(pipe) == {}
    assert pipe(SONG, **SHORT).frames.shape[0] == BOOKS


def test_cache_has_the_right_size(folder: Path) -> None:
    pipe, small = load(folder), load(folder, kv_cache_bits=8)
    found = {}
    for milliseconds in (400, 800):
        options = {**SHORT, "max_audio_length_ms": milliseconds}
        found[milliseconds] = pipe(SONG, **options).cache_bytes
        assert small(SONG, **options).cache_bytes < found[milliseconds]
    assert found[800] - found[400] == cache_bytes(MODEL, 5)
    alone = pipe(SONG, cfg_scale=1.0, **SHORT)
    assert alone.cache_bytes == found[400] // 2


def test_lazy_load_has_one_model_at_a_time(folder: Path) -> None:
    pipe = load(folder, lazy_load=True)
    assert pipe.parts.loaded_parts() == {}
    seen: list[tuple[str, str]] = []
    pipe.parts.on(lambda event: seen.append((event.kind, event.name)))
    made = pipe(SONG, **SHORT)
    assert seen == [
        ("loading", "mula"),
        ("loaded", "mula"),
        ("evicting", "mula"),
        ("evicted", "mula"),
        ("loading", "codec"),
        ("loaded", "codec"),
    ]
    assert torch.equal(load(folder)(SONG, **SHORT).wav, made.wav)
    held = sum(pipe.parts.loaded_parts().values())
    assert pipe.unload() == held > 0


def test_dtypes_and_places_apart(folder: Path) -> None:
    pipe = load(folder, dtype=torch.float16, device={"mula": "cpu", "codec": "cpu"})
    with pipe.parts.lease("mula") as mula, pipe.parts.lease("codec") as codec:
        assert mula.dtype is torch.float16
        assert codec.dtype is torch.float32
    half = load(folder, dtype={"codec": "bf16"})
    with half.parts.lease("mula") as mula, half.parts.lease("codec") as codec:
        assert mula.dtype is torch.bfloat16
        assert codec.dtype is torch.bfloat16
    assert torch.isfinite(half(SONG, **SHORT).wav).all()


def test_offload_of_the_float32_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codec stays on the CPU, whatever the one device; a device by part says otherwise."""
    asked: dict[str, str] = {}
    from vramkit.heartmula import pipeline

    def load_model(place: Path, *rest: Any) -> Any:
        asked[place.name] = str(rest[3])
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(pipeline, "load_model", load_model)
    config = {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}
    load(folder, device="meta", bnb_config=config)
    assert asked == {"HeartMuLa-oss-3B": "meta", "HeartCodec-oss": "cpu"}
    load(folder, device={"mula": "cpu", "codec": "meta"}, bnb_config=config)
    assert asked == {"HeartMuLa-oss-3B": "cpu", "HeartCodec-oss": "meta"}


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    configs: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"bnb_config": {"load_in_8bit": True, "load_in_4bit": True}},
            PrecisionConfigError,
            "choose one",
        ),
        (
            {"bnb_config": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}},
            PrecisionConfigError,
            "llm_int8_has_fp16_weight",
        ),
        ({"dtype": "fp17"}, ValueError, "is not one of"),
        ({"dtype": "int8"}, ValueError, "use precision="),
        ({"precision": "int3"}, ValueError, "int3"),
        ({"device": {"vocoder": "cpu"}}, ValueError, "no part 'vocoder'"),
        ({"kv_cache_bits": 4}, ValueError, "kv_cache_bits"),
        ({"precision": "int8", "bnb_config": {"load_in_8bit": True}}, ValueError, "not both"),
    ]
    for options, kind, words in configs:
        with pytest.raises(kind, match=words):
            load(folder, **options)
    with pytest.raises(FileNotFoundError, match=r"no version '7B'.*versions there: 3B"):
        HeartMuLaGenPipeline.from_pretrained(folder, version="7B")
    with pytest.raises(FileNotFoundError, match="no folder"):
        HeartMuLaGenPipeline.from_pretrained(tmp_path / "nowhere")
    pipe = load(folder, lazy_load=True)
    for inputs, options, words in (
        ({"tags": "pop"}, {}, "'lyrics' is text"),
        ({**SONG, "tags": "  "}, {}, "'tags' is text"),
        (SONG, {"max_audio_length_ms": 79}, "less than a frame"),
        (SONG, {"max_audio_length_ms": 10**7}, "the model has 1024"),
        (SONG, {"temperature": 0.0}, "temperature"),
        (SONG, {"save_path": tmp_path / "a.ogg"}, r"\.wav or \.mp3"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(inputs, **{**SHORT, **options})


def test_texts_from_files_and_sound_files(folder: Path, tmp_path: Path) -> None:
    paths = {}
    for key, text in SONG.items():
        (tmp_path / key).write_text(text)
        paths[key] = str(tmp_path / key)
    pipe = load(folder)
    made = pipe(paths, save_path=tmp_path / "a.wav", **SHORT)
    assert torch.equal(made.wav, pipe(SONG, **SHORT).wav)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getnchannels() == 2
        assert file.getframerate() == 600
        assert file.getnframes() == made.wav.shape[1] == round(made.seconds * 600)


def test_the_script_writes_its_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--model_path", str(folder), "--version", "3B", "--device", "cpu"]
    assert optimize([*flags, "--output_path", str(out), "--benchmark", "--seconds", "0.4"]) == 0
    results = json.loads((out / "benchmark_results.json").read_text())
    for key in ("generation_time_seconds", "audio_length_seconds", "rtf", "memory_allocated_gb",
                "memory_reserved_gb"):  # fmt: skip
        assert results[key] > 0
    assert results["rtf"] == pytest.approx(
        results["generation_time_seconds"] / results["audio_length_seconds"]
    )
    with wave.open(str(out / "benchmark_output.wav")) as file:
        assert file.getnframes() / file.getframerate() == pytest.approx(
            results["audio_length_seconds"]
        )
    config = json.loads((out / "quantization_config.json").read_text())
    assert config["load_in_8bit"] is True
    assert config["llm_int8_threshold"] == 6.0
    assert config["converted_bytes"] < 0.6 * config["original_bytes"]
    # The quantized weights load as they are, and are those of quantizing while loading.
    fast, slow = load(out), load(folder, bnb_config={"load_in_8bit": True})
    assert torch.equal(fast(SONG, **SHORT).wav, slow(SONG, **SHORT).wav)
    with pytest.raises(ValueError, match="converted already"):
        load(out, bnb_config={"load_in_8bit": True})
    assert optimize(["--model_path", str(tmp_path / "no"), "--output_path", str(out)]) == 1
    assert "no folder" in capsys.readouterr().err


def test_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["heartmula", "--model_path", str(folder), "--output_path", str(tmp_path / "o")]
    done = CliRunner().invoke(cli, [*arguments, "--precision", "nf4_dq", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "o" / "HeartMuLa-oss-3B" / "vramkit.json").is_file()
    missing = CliRunner().invoke(cli, ["heartmula", "--model_path", str(tmp_path / "nowhere")])
    assert missing.exit_code == 1
    assert "no folder" in missing.output
    assert CliRunner().invoke(cli, [*arguments, "--version", "9B"]).exit_code == 2
