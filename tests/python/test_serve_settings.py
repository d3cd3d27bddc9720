"""Settings of the server: names, defaults, .env, and what is said of values out of range."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from vramkit.cli import EXIT_ERROR, main
from vramkit.serve import engines
from vramkit.serve.engines import FormantEngine, make_engine
from vramkit.serve.settings import ChatterboxSettings, SettingsError, read_settings

NAMES = [name.upper() for name in ChatterboxSettings.model_fields]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_documented_defaults() -> None:
    found = read_settings().model_dump()
    documented = {
        "host": "0.0.0.0", "port": 4123, "device": "auto", "model_dtype": "auto",
        "use_int8_quantization": False, "max_chunk_length": 280, "max_total_length": 3000,
        "memory_cleanup_interval": 5, "cuda_cache_clear_interval": 3,
        "enable_memory_monitoring": True, "exaggeration": 0.5, "cfg_weight": 0.5,
        "temperature": 0.8, "cors_origins": "*",
    }  # fmt: skip
    assert {name: found[name] for name in documented} == documented


def test_file_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The document's own lines; the environment wins over the file."""
    Path(".env").write_text(
        "# Enable INT8 quantization\nUSE_INT8_QUANTIZATION=true\n"
        "MODEL_DTYPE=auto  # Options: auto, float32, float16, bfloat16\n"
        "MAX_CHUNK_LENGTH=200\nSOMETHING_ELSE=1\nPORT=\n"
    )
    found = read_settings()
    assert found.use_int8_quantization is True
    assert (found.model_dtype, found.max_chunk_length, found.port) == ("auto", 200, 4123)
    monkeypatch.setenv("MAX_CHUNK_LENGTH", "250")
    monkeypatch.setenv("MODEL_DTYPE", "Float16")
    assert read_settings().max_chunk_length == 250
    assert read_settings().model_dtype == "float16"
    other = tmp_path / "other.env"
    other.write_text("PORT=99\n")
    assert read_settings(other).port == 99
    with pytest.raises(SettingsError, match=r"no file .*missing\.env"):
        read_settings("missing.env")


# The blocks of the guide's text, each as it stands there.
GUIDE = {
    "# Enable INT8 quantization\nUSE_INT8_QUANTIZATION=true": {"use_int8_quantization": True},
    "USE_INT8_QUANTIZATION=true\nMODEL_DTYPE=float16": {"model_dtype": "float16"},
    "USE_INT8_QUANTIZATION=false\nMODEL_DTYPE=float32": {"model_dtype": "float32"},
    "USE_INT8_QUANTIZATION=false\nMODEL_DTYPE=auto  # Uses float16 on CUDA": {
        "model_dtype": "auto"
    },
    "USE_INT8_QUANTIZATION=true\nMODEL_DTYPE=auto  # Ignored when quantization is enabled": {
        "model_dtype": "auto", "use_int8_quantization": True
    },
    "USE_INT8_QUANTIZATION=false\nMODEL_DTYPE=bfloat16": {"model_dtype": "bfloat16"},
    "MAX_CHUNK_LENGTH=200": {"max_chunk_length": 200},
    "MEMORY_CLEANUP_INTERVAL=3\nCUDA_CACHE_CLEAR_INTERVAL=2": {
        "memory_cleanup_interval": 3, "cuda_cache_clear_interval": 2
    },
}  # fmt: skip


@pytest.mark.parametrize("block", list(GUIDE))
def test_the_guides_settings(block: str) -> None:
    Path(".env").write_text(block + "\n")
    assert GUIDE[block].items() <= read_settings().model_dump().items()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "65536"), ("PORT", "http"), ("MODEL_DTYPE", "int8"), ("DEVICE", "gpu"),
        ("MAX_CHUNK_LENGTH", "0"), ("MAX_TOTAL_LENGTH", "-1"), ("MEMORY_CLEANUP_INTERVAL", "0"),
        ("CUDA_CACHE_CLEAR_INTERVAL", "0"), ("EXAGGERATION", "2.5"), ("EXAGGERATION", "nan"),
        ("CFG_WEIGHT", "1.1"), ("TEMPERATURE", "0"), ("USE_INT8_QUANTIZATION", "perhaps"),
        ("ENGINE", "espeak"), ("S3GEN_DTYPE", "int8"), ("VOICE_LIBRARY_DIR", "nowhere"),
        ("MAX_QUEUE_SIZE", "-1"), ("QUEUE_TIMEOUT_SECONDS", "0"), ("MODEL_PATH", "nowhere"),
    ],
)  # fmt: skip
def test_out_of_range(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=rf"{name}='?{re.escape(value)}"):
        read_settings()


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "-1")
    monkeypatch.setenv("TEMPERATURE", "9")
    with pytest.raises(SettingsError, match=r"PORT=.*TEMPERATURE="):
        read_settings()


def test_the_command_line_says_it_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "99999")
    done = CliRunner().invoke(main, ["serve", "chatterbox"])
    assert done.exit_code == EXIT_ERROR
    assert "PORT='99999'" in done.output
    monkeypatch.setenv("PORT", "4000")
    done = CliRunner().invoke(
        main, ["serve", "chatterbox", "--check", "--json", "settings.json"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert json.loads(Path("settings.json").read_text())["port"] == 4000


def test_options_of_the_command_line_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "4000")
    arguments = ["serve", "chatterbox", "--port", "4001", "--engine", "formant", "--check"]
    done = CliRunner().invoke(main, [*arguments, "--json", "-"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert (found["port"], found["engine"]) == (4001, "formant")


def test_which_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(engines, "ChatterboxEngine", lambda s: asked.append(s) or "chatterbox")
    monkeypatch.setattr(engines, "chatterbox_version", lambda: None)
    assert isinstance(make_engine(ChatterboxSettings()), FormantEngine)
    assert make_engine(ChatterboxSettings(engine="chatterbox")) == "chatterbox"
    assert make_engine(ChatterboxSettings(model_path=tmp_path)) == "chatterbox"
    monkeypatch.setattr(engines, "chatterbox_version", lambda: "0.1.7")
    assert make_engine(ChatterboxSettings()) == "chatterbox"
    assert isinstance(make_engine(ChatterboxSettings(engine="formant")), FormantEngine)


def test_what_an_engine_cannot_follow(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot imitate"):
        FormantEngine(ChatterboxSettings(voice_library_dir=tmp_path))
    with pytest.raises(SettingsError, match="DEVICE='cuda:99'"):
        FormantEngine(ChatterboxSettings(device="cuda:99"))


def test_the_app_is_made_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from vramkit.serve import chatterbox

    monkeypatch.delitem(vars(chatterbox), "app", raising=False)
    monkeypatch.setenv("PORT", "-1")
    with pytest.raises(SettingsError):
        _ = chatterbox.app
    monkeypatch.setenv("PORT", "5")
    assert chatterbox.app.state.service.settings.port == 5
    assert chatterbox.app is chatterbox.app
    monkeypatch.delitem(vars(chatterbox), "app")


DOCKER = Path(__file__).resolve().parents[2] / "docker"


@pytest.mark.skipif(not DOCKER.is_dir(), reason="the tests stand outside the repository")
def test_the_example_file_holds_every_setting_and_its_default() -> None:
    example = DOCKER / ".env.example"
    found = dict(re.findall(r"^(\w+)=(.*)$", example.read_text(), flags=re.MULTILINE))
    assert list(found) == NAMES
    assert read_settings(example) == read_settings(None)


@pytest.mark.skipif(not DOCKER.is_dir(), reason="the tests stand outside the repository")
@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_compose_files(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((DOCKER / name).read_text())["services"]["chatterbox"]
    build = service["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert all(f"ARG {argument}=" in dockerfile for argument in build["args"])
    assert set(service["environment"]) <= set(NAMES)
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > ChatterboxSettings.model_fields["shutdown_timeout_seconds"].default
